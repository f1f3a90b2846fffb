"""A model's tokenizer from the bytes of its small files, without torch or transformers.

`tokenizer.json` (the `tokenizers` library's own format) says how text becomes ids; `tokenizer_config.json`
names the special tokens and holds the chat template, which newer models keep in `chat_template.jinja`.
A model that has no tokenizer.json is converted in the worker, where transformers is.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from mycel.compute.chat import DEFAULT_TEMPLATE, ChatError, ChatTemplate
from mycel.compute.textstream import TextStream
from mycel.protocol.errors import MycelError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
"""Every file that `read_tokenizer` looks at; all but the first may be missing."""
FILES_BYTES_MAX = 64 * 1024 * 1024
"""All of them together; the largest known tokenizer.json has 33 MB."""

END = "<|end|>"


class TokenizerError(MycelError, ValueError):
    """These files are no tokenizer, or one that fails; the text says where, and what to do."""


class Tokenizer:
    """Text to token ids and back, for one model."""

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str],
        template: ChatTemplate | None,
        eos_tokens: Sequence[int] = (),
    ) -> None:
        self._inner = inner
        self._special_tokens = dict(special_tokens)
        self._template = template
        self._default_template = ChatTemplate(DEFAULT_TEMPLATE, special_tokens)
        added = inner.get_added_tokens_decoder()
        vocabulary = inner.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values(), default=-1) + 1
        """One more than the highest id, added tokens included (the model's own count may be larger)."""
        self.special: dict[int, str] = {i: added[i].content for i in sorted(added) if added[i].special}
        """Special tokens by id: they have no text in an answer."""
        named = self.id_of(self._special_tokens.get("eos_token"))
        self.eos_tokens: tuple[int, ...] = tuple(sorted({*eos_tokens, *([] if named is None else [named])}))
        """Ids that end an answer, as the tokenizer's files and generation_config.json know them."""

    @property
    def has_chat_template(self) -> bool:
        """Whether the model brought a template; without one, chats use a plain "User: / Assistant:" form."""
        return self._template is not None

    def id_of(self, token: str | None) -> int | None:
        """The id of a token by its text in the vocabulary, None for none."""
        if token is None:
            return None
        found: int | None = self._inner.token_to_id(token)
        return found

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Token ids of `text`. `add_special` adds what the model wants around a text (a first token).

        Raises `TokenizerError` where the files make no sense for it.
        """
        with _contained("this text cannot be encoded"):
            ids: list[int] = self._inner.encode(text, add_special_tokens=add_special).ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of `ids`; unfinished characters come out as U+FFFD. Unknown ids have no text.

        Raises `TokenizerError` where the files make no sense for it.
        """
        known = [i for i in ids if 0 <= i < self.vocab_size]
        with _contained("these tokens cannot be decoded"):
            text: str = self._inner.decode(known, skip_special_tokens=skip_special)
        return text

    def token_text(self, token: int) -> str:
        """The text of one token alone, special ones by their name: for log-probabilities."""
        return self.special.get(token) or self.decode([token], skip_special=False)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a chat (`role` and `content` each) as text. Raises `ChatError`."""
        template = self._template or self._default_template
        return template.render(messages, add_generation_prompt=add_generation_prompt, variables=variables)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The prompt of a chat as ids. A model's own template writes its special tokens itself."""
        text = self.render_chat(messages, add_generation_prompt=add_generation_prompt, variables=variables)
        return self.encode(text, add_special=self._template is None)

    def stream(self, stops: Sequence[str] = ()) -> TextStream:
        """A fresh stream that turns an answer's tokens into text as they come. Raises `ValueError`."""
        return TextStream(self.decode, self.special, stops)


def read_tokenizer(files: Mapping[str, bytes], *, wall: Callable[[], float] | None = None) -> Tokenizer:
    """The tokenizer that `files` (by name, see `TOKENIZER_FILES`) describe.

    `wall` is the calendar clock (seconds since 1970) for chat templates that print the date. Raises
    `TokenizerError`.
    """
    if sum(len(content) for content in files.values()) > FILES_BYTES_MAX:
        raise TokenizerError(f"the tokenizer's files are larger than {FILES_BYTES_MAX >> 20} MiB")
    if "tokenizer.json" not in files:
        raise TokenizerError(
            "the model has no tokenizer.json; save one beside its config.json with "
            "transformers.AutoTokenizer.from_pretrained(MODEL).save_pretrained(MODEL)"
        )
    with _contained("tokenizer.json cannot be read"):
        inner = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
    inner.no_truncation()
    inner.no_padding()
    config = _read_json(files, "tokenizer_config.json")
    special_tokens = _special_tokens({**_read_json(files, "special_tokens_map.json"), **config})
    source = _template_source(files, config)
    try:
        template = None if source is None else ChatTemplate(source, special_tokens, wall=wall)
    except ChatError as error:
        raise TokenizerError(str(error)) from error
    return Tokenizer(inner, special_tokens, template, _eos_ids(_read_json(files, "generation_config.json")))


def byte_level_tokenizer_json(specials: Sequence[str] = (END,)) -> bytes:
    """A tokenizer.json whose tokens are the 256 byte values (id = byte), then `specials` from id 256."""
    letters = _byte_letters()
    inner = tokenizers.Tokenizer(models.BPE(vocab={letters[byte]: byte for byte in range(256)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    text: str = inner.to_str()
    return text.encode()


def byte_level_tokenizer_files(chat_template: str | None = None) -> dict[str, bytes]:
    """Both files of a byte-level tokenizer whose one special token, id 256, ends a text."""
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    if chat_template is not None:
        config["chat_template"] = chat_template
    return {
        "tokenizer.json": byte_level_tokenizer_json(),
        "tokenizer_config.json": json.dumps(config, indent=2).encode(),
    }


@contextlib.contextmanager
def _contained(what: str) -> Iterator[None]:
    """Make a `TokenizerError` of whatever the library raises over a file that makes no sense.

    It raises bare Exception, and where it fails an assertion of its own a PanicException, which derives from
    BaseException, cannot be imported, and would otherwise end the daemon.
    """
    try:
        yield
    except BaseException as error:  # boundary: of a library in another language, see above
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(f"{what}: {error}") from error


def _byte_letters() -> list[str]:
    """The printable letter that stands for each byte in byte-level vocabularies (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [table[byte] for byte in range(256)]


def _read_json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    if name not in files:
        return {}
    try:
        content = json.loads(files[name])
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{name} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{name} should hold one JSON object")
    return content


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Texts of bos_token, eos_token and the like, each given as a text or as an object with `content`."""
    found = {}
    for name in sorted(config):
        token = config[name]
        if isinstance(token, dict):
            token = token.get("content")
        if name.endswith("_token") and isinstance(token, str):
            found[name] = token
    return found


def _template_source(files: Mapping[str, bytes], config: Mapping[str, Any]) -> str | None:
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode("utf-8", "replace")
    template = _read_json(files, "chat_template.json").get("chat_template", config.get("chat_template"))
    if isinstance(template, list):  # several by name: [{"name": ..., "template": ...}]
        by_name = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = by_name.get("default")
    return template if isinstance(template, str) else None


def _eos_ids(generation: Mapping[str, Any]) -> list[int]:
    ids = generation.get("eos_token_id")
    if isinstance(ids, list):
        return [i for i in ids if isinstance(i, int)]
    return [ids] if isinstance(ids, int) else []
