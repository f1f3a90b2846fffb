"""OpenAI's shapes: what is taken, what is refused by name, and how answers look."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from mycel.compute.infer.request import Token
from mycel.compute.tokenizer import byte_level_tokenizer_files, read_tokenizer
from mycel.node.openai_shapes import (
    UNABLE,
    ApiError,
    ChatRequest,
    CompletionRequest,
    chat_jobs,
    chat_logprobs,
    completion_jobs,
    completion_logprobs,
    describe_invalid,
    usage,
)

TOKENIZER = read_tokenizer(byte_level_tokenizer_files())
HELLO = [{"role": "user", "content": "hello"}]


def chat(**settings: Any) -> ChatRequest:
    return ChatRequest.model_validate({"model": "m", "messages": HELLO} | settings)


def completion(**settings: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"model": "m", "prompt": "p"} | settings)


def test_a_chat_becomes_one_job_per_choice_with_seeds_of_their_own() -> None:
    asked = chat(n=3, seed=7, temperature=0.5, top_p=0.9, stop="X", max_completion_tokens=5, max_tokens=9)
    jobs = chat_jobs(asked, TOKENIZER, 7)
    assert [job.sampling.seed for job in jobs] == [7, 8, 9]
    assert {job.max_tokens for job in jobs} == {5}
    assert {job.stop for job in jobs} == {("X",)}
    assert (jobs[0].sampling.temperature, jobs[0].sampling.top_p) == (0.5, 0.9)
    assert TOKENIZER.decode(jobs[0].prompt) == "User: hello\nAssistant:"  # type: ignore[arg-type]


def test_openais_defaults_hold() -> None:
    (job,) = completion_jobs(completion(), 1)
    assert (job.max_tokens, job.sampling.temperature, job.sampling.top_p, job.stop) == (16, 1.0, 1.0, ())


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [(1, 2)]),
        ([[1], [2, 3]], [(1,), (2, 3)]),
    ],
)
def test_prompts_in_all_four_forms(prompt: Any, prompts: list[Any]) -> None:
    assert [job.prompt for job in completion_jobs(completion(prompt=prompt), 1)] == prompts


def test_too_many_answers_at_once_are_refused() -> None:
    with pytest.raises(ApiError, match="at most 64"):
        completion_jobs(completion(prompt=["a"] * 33, n=2), 1)


@pytest.mark.parametrize("name", sorted(UNABLE))
def test_what_is_not_supported_is_refused_by_name_unless_it_asks_for_nothing(name: str) -> None:
    wanted: dict[str, Any] = {
        "frequency_penalty": 0.5,
        "presence_penalty": 0.5,
        "logit_bias": {"5": 1.0},
        "response_format": {"type": "json_object"},
        "tools": [{"type": "function"}],
        "tool_choice": "required",
        "functions": [{}],
        "modalities": ["audio"],
        "best_of": 2,
        "suffix": "x",
    }
    is_chat = name in ChatRequest.model_fields

    def run(value: Any) -> None:
        if is_chat:
            chat_jobs(chat(**{name: value}), TOKENIZER, 1)
        else:
            completion_jobs(completion(**{name: value}), 1)

    for nothing in UNABLE[name]:
        run(nothing)
    with pytest.raises(ApiError, match=name) as raised:
        run(wanted[name])
    assert (raised.value.status, raised.value.param) == (400, name)


@pytest.mark.parametrize("stop", [["a", "b", "c", "d", "e"], [""], ""])
def test_stops_out_of_bounds(stop: Any) -> None:
    with pytest.raises(ApiError, match="stop takes up to four"):
        completion_jobs(completion(stop=stop), 1)


def test_top_logprobs_want_logprobs() -> None:
    with pytest.raises(ApiError, match="needs logprobs"):
        chat_jobs(chat(top_logprobs=2), TOKENIZER, 1)


@pytest.mark.parametrize(
    ("body", "text", "param"),
    [
        ({"model": "m"}, "you must provide a messages parameter", "messages"),
        ({"model": "m", "messages": HELLO, "foo": 1}, "Unrecognized request argument supplied: foo", "foo"),
        (
            {"model": "m", "messages": HELLO, "temperature": 3},
            "Invalid value for 'temperature'",
            "temperature",
        ),
        ({"model": "m", "messages": HELLO, "n": 0}, "Invalid value for 'n'", "n"),
        ({"model": "m", "messages": []}, "Invalid value for 'messages'", "messages"),
    ],
)
def test_invalid_bodies_are_described_as_openai_does(body: dict[str, Any], text: str, param: str) -> None:
    with pytest.raises(ValidationError) as raised:
        ChatRequest.model_validate(body)
    error = describe_invalid(raised.value.errors())  # type: ignore[arg-type]
    told = error.body()["error"]
    assert told["message"].startswith(text)
    assert (told["param"], told["type"]) == (param, "invalid_request_error")


def test_logprobs_in_both_shapes() -> None:
    tokens = [Token(104, "h", -0.5, ((104, "h", -0.5), (105, "i", -1.0))), Token(195, "é", -2.0)]
    assert completion_logprobs(tokens, 3) == {
        "tokens": ["h", "é"],
        "token_logprobs": [-0.5, -2.0],
        "top_logprobs": [{"h": -0.5, "i": -1.0}, {}],
        "text_offset": [3, 4],
    }
    content = chat_logprobs(tokens)["content"]
    assert content[1] == {"token": "é", "logprob": -2.0, "bytes": [195, 169], "top_logprobs": []}
    assert [top["token"] for top in content[0]["top_logprobs"]] == ["h", "i"]


def test_usage_adds_up() -> None:
    assert usage(3, 4) == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
