"""The OpenAI API's shapes: requests in, answers and errors out. Pure translation, no server in it.

Requests are checked by pydantic against what this module names. What OpenAI knows and a swarm cannot do yet
(tools, penalties by frequency, forced formats) is refused by name unless it asks for nothing; what changes
nothing about the answer (user, metadata, ...) is accepted; a name nobody knows is refused as OpenAI does.
`top_k` and `repetition_penalty` are accepted beside OpenAI's own, as other servers of open models do.

Source: platform.openai.com/docs/api-reference (chat, completions, models, streaming).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from mycel.compute.engine import Sampling
from mycel.compute.infer.request import GenerateRequest, Token
from mycel.compute.tokenizer import Tokenizer
from mycel.protocol.errors import MycelError

CHOICES_MAX = 64
"""Answers in one response: prompts times n."""
CHAT_TOKENS_DEFAULT = 1 << 20
"""A chat without max_tokens goes on until the model stops or its positions end."""


class ApiError(MycelError):
    """An error in OpenAI's shape: HTTP status, type, and which parameter or code it is about."""

    def __init__(self, status: int, text: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """The JSON body of the answer."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class StreamOptions(BaseModel):
    """What a stream holds besides the answer."""

    include_usage: bool = False
    include_obfuscation: bool = False


class _Request(BaseModel):
    """What chat and plain completions share."""

    model_config = ConfigDict(extra="forbid")

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    top_k: int = Field(0, ge=0)
    repetition_penalty: float = Field(1.0, gt=0)
    n: int = Field(1, ge=1, le=16)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    # Refused unless they ask for nothing (`_refuse_unable`):
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    # Accepted; the answer does not depend on them:
    user: str | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None

    def stops(self) -> tuple[str, ...]:
        """Stop strings, at most four of them as OpenAI has it. Raises `ApiError`."""
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stops) > 4 or "" in stops:
            raise ApiError(400, "stop takes up to four strings that are not empty", param="stop")
        return stops

    def sampling(self, choice: int, seed: int, logprobs: int) -> Sampling:
        """How choice number `choice` is drawn: each has a seed of its own."""
        return Sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
            seed=seed + choice,
            logprobs=logprobs,
        )


class ChatMessage(BaseModel):
    """One message of a chat; further keys (name, tool_calls, ...) go to the model's template."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[dict[str, Any]] | None = None


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    response_format: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    modalities: list[str] | None = None
    parallel_tool_calls: bool | None = None
    store: bool | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    """Further names for the model's chat template, such as enable_thinking."""


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = None
    suffix: str | None = None


AnyRequest = ChatRequest | CompletionRequest
UNABLE: Mapping[str, Sequence[object]] = {
    "frequency_penalty": (None, 0.0),
    "presence_penalty": (None, 0.0),
    "logit_bias": (None, {}),
    "response_format": (None, {"type": "text"}),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "modalities": (None, ["text"]),
    "best_of": (None, 1),
    "suffix": (None, ""),
}
"""Parameters that cannot be honoured, with the values that ask for nothing."""


def chat_jobs(asked: ChatRequest, tokenizer: Tokenizer, seed: int) -> list[GenerateRequest]:
    """The generations that answer a chat request, one per choice. Raises `ApiError`, `ChatError`."""
    _refuse_unable(asked)
    if asked.top_logprobs and not asked.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    messages = [message.model_dump(exclude_unset=True) for message in asked.messages]
    prompt = tuple(tokenizer.encode_chat(messages, variables=asked.chat_template_kwargs))
    return [
        GenerateRequest(
            model=asked.model,
            prompt=prompt,
            sampling=asked.sampling(choice, seed, asked.top_logprobs),
            max_tokens=asked.max_completion_tokens or asked.max_tokens or CHAT_TOKENS_DEFAULT,
            stop=asked.stops(),
        )
        for choice in range(asked.n)
    ]


def completion_jobs(asked: CompletionRequest, seed: int) -> list[GenerateRequest]:
    """The generations that answer a completion request: n for each prompt. Raises `ApiError`."""
    _refuse_unable(asked)
    prompts = _prompts(asked.prompt)
    if len(prompts) * asked.n > CHOICES_MAX:
        raise ApiError(400, f"{len(prompts)} prompts with n={asked.n}: at most {CHOICES_MAX} answers at once")
    return [
        GenerateRequest(
            model=asked.model,
            prompt=prompt,
            sampling=asked.sampling(choice, seed, asked.logprobs or 0),
            max_tokens=asked.max_tokens or 16,
            stop=asked.stops(),
            echo=asked.echo,
        )
        for prompt in prompts
        for choice in range(asked.n)
    ]


def chat_logprobs(tokens: Sequence[Token]) -> dict[str, Any]:
    """`logprobs` of a chat choice."""

    def entry(text: str, logprob: float) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    return {
        "content": [
            {
                **entry(token.text, token.logprob),
                "top_logprobs": [entry(text, logprob) for _, text, logprob in token.top],
            }
            for token in tokens
        ],
        "refusal": None,
    }


def completion_logprobs(tokens: Sequence[Token], offset: int) -> dict[str, Any]:
    """`logprobs` of a completion choice whose text so far has `offset` characters."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [{text: logprob for _, text, logprob in token.top} for token in tokens],
        "text_offset": offsets,
    }


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """The usage object."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def describe_invalid(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The `ApiError` for what pydantic found wrong with a body; the first finding counts."""
    first = errors[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    param = ".".join(place) or None
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"Unrecognized request argument supplied: {param}", param=param)
    if first["type"] == "json_invalid":
        return ApiError(400, "We could not parse the JSON body of your request.")
    if first["type"] == "missing":
        return ApiError(400, f"you must provide a {param} parameter", param=param)
    return ApiError(400, f"Invalid value for '{param}': {first['msg']}", param=param, code="invalid_value")


def _prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str | tuple[int, ...]]:
    if isinstance(prompt, str):
        return [prompt]
    if prompt and isinstance(prompt[0], int):
        return [tuple(item for item in prompt if isinstance(item, int))]
    out = [item if isinstance(item, str) else tuple(item) for item in prompt if not isinstance(item, int)]
    if not out:
        raise ApiError(400, "prompt is empty", param="prompt")
    return out


def _refuse_unable(asked: AnyRequest) -> None:
    for name, nothing in UNABLE.items():
        value = getattr(asked, name, None)
        if value not in nothing:
            raise ApiError(
                400,
                f"{name} is not supported by this server; leave it out",
                param=name,
                code="unsupported_parameter",
            )
