"""Chat templates: messages to prompt text, by the model's own Jinja template or a plain default.

A template is a small program that came with a model, so it runs in Jinja's immutable sandbox (no attribute
that starts with an underscore, nothing of the host), and what the sandbox leaves open is bounded here:
products and powers, ranges, and the length of the text. The dialect is that of transformers'
`apply_chat_template`: trimmed blocks, loop controls, `raise_exception`, `tojson` that keeps letters as they
are, `strftime_now` where a clock is given, and `{% generation %}`, which marks training text and prints it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from mycel.protocol.errors import MycelError

TEMPLATE_BYTES_MAX = 256 * 1024
PROMPT_CHARS_MAX = 16 * 1024 * 1024
RANGE_MAX = 100_000
"""Items that all ranges of one rendering may have together."""

DEFAULT_TEMPLATE = (
    "{% for message in messages %}{{ message.role | capitalize }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


class ChatError(MycelError, ValueError):
    """These messages cannot be made a prompt of this model; the text says why."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`: prints what stands in it."""

    tags = {"generation"}  # noqa: RUF012 jinja's own spelling

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and not (abs(left) <= 1024 and abs(right) <= 64):
            raise ChatError("the chat template computes a power that is too large")
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if hasattr(one, "__len__") and isinstance(other, int) and len(one) * other > PROMPT_CHARS_MAX:
                    raise ChatError("the chat template repeats a text too often")
        return super().call_binop(context, operator, left, right)


class ChatTemplate:
    """One compiled template and the special tokens' texts it may name (`bos_token`, `eos_token`, ...)."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        *,
        wall: Callable[[], float] | None = None,
    ) -> None:
        """`wall` is the calendar clock for templates that print the date; None: they use their default.

        Raises `ChatError` for a template that Jinja cannot read.
        """
        if len(source) > TEMPLATE_BYTES_MAX:
            raise ChatError(f"the chat template is longer than {TEMPLATE_BYTES_MAX} characters")
        environment = _Sandbox(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        if wall is not None:
            environment.globals["strftime_now"] = lambda form: time.strftime(form, time.gmtime(wall()))
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ChatError(f"the model's chat template cannot be read: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text. `variables` are further names for the template (`tools`, `enable_thinking`).

        Raises `ChatError`: what the template refused, or the rule that it broke.
        """
        budget = RANGE_MAX

        def bounded_range(*args: int) -> range:
            nonlocal budget
            items = range(*args)
            budget -= len(items)
            if budget < 0:
                raise ChatError("the chat template loops too often")
            return items

        names = {**self._special_tokens, "tools": None, "documents": None, **(variables or {})}
        names |= {
            "messages": [_plain(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
            "range": bounded_range,
        }
        pieces, length = [], 0
        try:
            for piece in self._template.generate(names):
                pieces.append(piece)
                length += len(piece)
                if length > PROMPT_CHARS_MAX:
                    raise ChatError(f"the chat prompt is longer than {PROMPT_CHARS_MAX} characters")
        except ChatError:
            raise
        except Exception as error:  # boundary: the template is the model's program and may raise anything
            raise ChatError(f"the model's chat template failed: {type(error).__name__}: {error}") from error
        return "".join(pieces)


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose content is one text: OpenAI's list of text parts is joined."""
    if not isinstance(message.get("role"), str):
        raise ChatError("every message needs a role, such as user")
    content = message.get("content")
    if isinstance(content, list):
        texts = []
        for part in content:
            if not (
                isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part["text"], str)
            ):
                raise ChatError("message content can be text only; this model takes no images or audio")
            texts.append(part["text"])
        content = "".join(texts)
    if content is None:
        content = ""
    if not isinstance(content, str):
        raise ChatError("message content must be text or a list of text parts")
    return {**message, "content": content}


def _raise(text: str) -> None:
    raise ChatError(text)


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)
