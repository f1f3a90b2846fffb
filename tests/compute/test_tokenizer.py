"""Tokenizers from their files: same ids and same chat prompts as transformers, and clear refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from mycel.compute.chat import ChatError, ChatTemplate
from mycel.compute.tokenizer import (
    TokenizerError,
    byte_level_tokenizer_files,
    byte_level_tokenizer_json,
    read_tokenizer,
)

CHATML = (
    "{{ bos_token if bos_token is defined else '' }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] | trim }}{% endgeneration %}"
    "{% else %}{{ message['content'] | trim }}{% endif %}{{ eos_token }}\n"
    "{% endfor %}\n"
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHAT = [
    {"role": "system", "content": "Be  brief. "},
    {"role": "user", "content": "Grüße 😀"},
    {"role": "assistant", "content": " ok"},
    {"role": "user", "content": "and now?"},
]


@given(st.text())
def test_byte_level_tokens_are_the_bytes(text: str) -> None:
    tokenizer = read_tokenizer(byte_level_tokenizer_files())
    ids = tokenizer.encode(text.replace("<|end|>", ""))
    assert bytes(ids) == text.replace("<|end|>", "").encode()
    assert tokenizer.decode(ids) == text.replace("<|end|>", "")


def test_specials_follow_the_bytes() -> None:
    tokenizer = read_tokenizer({"tokenizer.json": byte_level_tokenizer_json(["<a>", "<b>"])})
    assert tokenizer.vocab_size == 258
    assert tokenizer.special == {256: "<a>", 257: "<b>"}
    assert tokenizer.encode("x<b>y") == [120, 257, 121]
    assert tokenizer.decode([120, 257, 121]) == "xy"
    assert tokenizer.decode([120, 257, 121], skip_special=False) == "x<b>y"
    assert [tokenizer.token_text(token) for token in (120, 257)] == ["x", "<b>"]


def test_ids_and_prompts_equal_those_of_transformers(tmp_path: Path) -> None:
    files = byte_level_tokenizer_files(CHATML)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    theirs = PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    ours = read_tokenizer(files)
    assert ours.has_chat_template
    for kwargs in ({"add_generation_prompt": True}, {"add_generation_prompt": False}):
        wanted = theirs.apply_chat_template(CHAT, tokenize=False, **kwargs)
        assert ours.render_chat(CHAT, **kwargs) == wanted
    assert ours.encode_chat(CHAT) == theirs.encode(
        theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True), add_special_tokens=False
    )
    tools = [{"type": "function", "function": {"name": "größe", "parameters": {}}}]
    assert ours.render_chat(CHAT, variables={"tools": tools}) == theirs.apply_chat_template(
        CHAT, tools=tools, tokenize=False, add_generation_prompt=True
    )


def test_template_places() -> None:
    files = byte_level_tokenizer_files()
    plain = read_tokenizer(files)
    assert not plain.has_chat_template
    assert plain.render_chat(CHAT[1:2]) == "User: Grüße 😀\nAssistant:"
    config = json.loads(files["tokenizer_config.json"])
    several = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    config["chat_template"] = several
    named = files | {"tokenizer_config.json": json.dumps(config).encode()}
    assert read_tokenizer(named).render_chat(CHAT) == "D"
    assert read_tokenizer(named | {"chat_template.json": b'{"chat_template": "J"}'}).render_chat(CHAT) == "J"
    assert read_tokenizer(named | {"chat_template.jinja": b"F"}).render_chat(CHAT) == "F"


def test_text_parts_are_joined_and_pictures_refused() -> None:
    tokenizer = read_tokenizer(byte_level_tokenizer_files())
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert tokenizer.render_chat([{"role": "user", "content": parts}]) == "User: one two\nAssistant:"
    with pytest.raises(ChatError, match="images"):
        tokenizer.render_chat([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}])
    with pytest.raises(ChatError, match="role"):
        tokenizer.render_chat([{"content": "x"}])


def test_end_tokens_come_from_both_files() -> None:
    files = byte_level_tokenizer_files()
    assert read_tokenizer(files).eos_tokens == (256,)
    assert read_tokenizer(files | {"generation_config.json": b'{"eos_token_id": [7, 256]}'}).eos_tokens == (
        7,
        256,
    )
    config = {"eos_token": {"__type": "AddedToken", "content": "<|end|>"}}
    assert read_tokenizer(files | {"tokenizer_config.json": json.dumps(config).encode()}).eos_tokens == (256,)


def test_dates_come_from_the_given_clock_only() -> None:
    source = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% else %}none{% endif %}"
    assert ChatTemplate(source, {}).render([]) == "none"
    assert ChatTemplate(source, {}, wall=lambda: 86400.0 * 365).render([]) == "01 Jan 1971"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.environ }}",
        "{{ 'a' * 10**9 }}",
        "{{ 9**9**9 }}",
        "{% for i in range(1000) %}{% for j in range(1000) %}{% endfor %}{% endfor %}",
        "{% set x = 'a' * 1000000 %}{% for i in range(1000) %}{{ x }}{% endfor %}",
        "{{ messages[0].append }}{{ messages.append(1) }}",
        "{{ 1 / 0 }}",
    ],
)
def test_templates_that_misbehave_are_an_error_of_the_chat(source: str) -> None:
    with pytest.raises(ChatError):
        ChatTemplate(source, {}).render(CHAT)


@pytest.mark.parametrize(
    ("files", "word"),
    [
        ({}, "no tokenizer.json"),
        ({"tokenizer.json": b"{"}, "tokenizer.json cannot be read"),
        ({"tokenizer.json": b"\xff\x00"}, "tokenizer.json cannot be read"),
        ({"tokenizer_config.json": b"[1]"}, "tokenizer_config.json"),
        ({"tokenizer_config.json": b"{"}, "tokenizer_config.json"),
        ({"generation_config.json": b"["}, "generation_config.json"),
        ({"chat_template.jinja": b"{% if %}"}, "chat template"),
    ],
)
def test_broken_files_are_named(files: dict[str, bytes], word: str) -> None:
    whole = {} if not files or "tokenizer.json" in files else byte_level_tokenizer_files()
    with pytest.raises(TokenizerError, match=word):
        read_tokenizer(whole | files)


def changed(**parts: object) -> dict[str, bytes]:
    """The byte-level tokenizer with other parts in its tokenizer.json."""
    whole = json.loads(byte_level_tokenizer_json())
    return {"tokenizer.json": json.dumps(whole | parts).encode()}


def test_a_panic_of_the_library_is_contained() -> None:
    """Rust's panics arrive as a BaseException of no importable class: a bad file must not end a daemon."""
    with pytest.raises(TokenizerError, match="cannot be read"):
        read_tokenizer(changed(normalizer={"type": "Precompiled", "precompiled_charsmap": "/////w=="}))
    tokenizer = read_tokenizer(changed(pre_tokenizer={"type": "FixedLength", "length": 0}))
    with pytest.raises(TokenizerError, match="cannot be encoded"):
        tokenizer.encode("abc")


def test_ids_from_nowhere_have_no_text() -> None:
    tokenizer = read_tokenizer(byte_level_tokenizer_files())
    assert tokenizer.decode([-1, 65, 257, 2**40]) == "A"


def test_the_tokenizer_needs_neither_torch_nor_transformers() -> None:
    program = (
        "import sys, mycel.compute.tokenizer as t\n"
        "t.read_tokenizer(t.byte_level_tokenizer_files()).encode_chat([{'role': 'user', 'content': 'x'}])\n"
        "sys.exit(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)) != [])"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
