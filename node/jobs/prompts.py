"""The generate kind's files and its plan: prompts in, completions out, each once and in order. No I/O here.

What is done is kept in parts: blobs of completions in whatever order they came. The checkpoint lists them, so
that it stays small while the output grows; many small parts are merged into one from time to time.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from mycel.node.jobs.kinds import GenerateSpec
from mycel.node.jobs.spec import Blob, JobInvalid
from mycel.protocol.limits_jobs import DEFAULT_JOB_LIMITS as LIMITS

GIVE_UP = 8
"""Peers in a row at which a prompt failed before its line says so."""
RESERVED = ("index", "completion", "tokens", "finish", "error")
"""Keys of an output line that are ours."""


class Prompt(msgspec.Struct, frozen=True):
    """One line of the input."""

    index: int
    text: str | None
    """None where there are messages."""
    messages: list[dict[str, str]] | None = None
    rest: dict[str, Any] = {}
    """What else stood in the line; it is given back."""


class Completion(msgspec.Struct, frozen=True, array_like=True):
    """What came of one prompt."""

    index: int
    text: str
    tokens: int
    finish: str
    """ "stop", "length", or "failed"."""
    error: str = ""


class Parts(msgspec.Struct, frozen=True, array_like=True):
    """The checkpoint."""

    parts: tuple[Blob, ...]


def read_prompts(spec: GenerateSpec, data: bytes) -> list[Prompt]:
    """The prompts in a file, in order. Raises `JobInvalid` naming the line."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise JobInvalid(f"prompts: {spec.prompts} is no UTF-8 text ({error})") from None
    lines = text.splitlines() if not spec.prompts.endswith(".jsonl") else text.split("\n")
    prompts: list[Prompt] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if len(line) > LIMITS.prompt_chars:
            raise JobInvalid(f"prompts: line {number} has more than {LIMITS.prompt_chars} characters")
        index = len(prompts)
        if spec.prompts.endswith(".jsonl"):
            prompts.append(_read_line(index, number, line))
        else:
            prompts.append(Prompt(index, line))
    if not prompts:
        raise JobInvalid(f"prompts: {spec.prompts} has no line with a prompt")
    if len(prompts) > LIMITS.prompts:
        raise JobInvalid(f"prompts: {len(prompts)} lines; a job has at most {LIMITS.prompts}: cut it in two")
    return prompts


def _read_line(index: int, number: int, line: str) -> Prompt:
    what = 'a JSON text, or an object with "prompt" or "messages"'
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise JobInvalid(f"prompts: line {number} is no JSON ({error}); write {what}") from None
    if isinstance(found, str) and found:
        return Prompt(index, found)
    if isinstance(found, dict):
        rest = {key: value for key, value in found.items() if key not in (*RESERVED, "prompt", "messages")}
        prompt, messages = found.get("prompt"), found.get("messages")
        if isinstance(prompt, str) and prompt and messages is None:
            return Prompt(index, prompt, None, rest)
        if prompt is None and isinstance(messages, list) and messages and all(map(_is_message, messages)):
            return Prompt(index, None, messages, rest)
    raise JobInvalid(f"prompts: line {number} is none; write {what}")


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and all(isinstance(one, str) for one in (*message, *message.values()))


def write_completions(prompts: Sequence[Prompt], done: Mapping[int, Completion]) -> bytes:
    """The output file: a JSON object a line, in the order of the prompts."""
    lines = []
    for prompt in prompts:
        one = done[prompt.index]
        given = {"prompt": prompt.text} if prompt.messages is None else {"messages": prompt.messages}
        came = {"completion": one.text, "tokens": one.tokens, "finish": one.finish}
        line = {"index": prompt.index, **prompt.rest, **given, **came}
        if one.error:
            line["error"] = one.error
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return "".join(lines).encode("utf-8")


class Plan:
    """Which prompts are still to be done, and by whom they are being done."""

    def __init__(self, prompts: Sequence[Prompt], done: Iterable[Completion] = ()) -> None:
        self.prompts = prompts
        self.done: dict[int, Completion] = {}
        for completion in done:
            if 0 <= completion.index < len(prompts):
                self.done.setdefault(completion.index, completion)
        self._waiting = deque(prompt.index for prompt in prompts if prompt.index not in self.done)
        self._failures: dict[int, int] = {}
        self._fresh: list[Completion] = []

    @property
    def is_done(self) -> bool:
        """Whether every prompt has its completion."""
        return len(self.done) == len(self.prompts)

    @property
    def tokens(self) -> int:
        """Tokens in all completions."""
        return sum(completion.tokens for completion in self.done.values())

    @property
    def is_waiting(self) -> bool:
        """Whether there is a prompt that nobody works on."""
        return bool(self._waiting)

    def next(self) -> Prompt | None:
        """A prompt to work on now, None where all are done or being done."""
        return self.prompts[self._waiting.popleft()] if self._waiting else None

    def finish(self, completion: Completion) -> None:
        """One is done. A second completion of the same prompt changes nothing."""
        if completion.index not in self.done:
            self.done[completion.index] = completion
            self._fresh.append(completion)

    def give_back(self, prompt: Prompt, why: str, *, counts: bool) -> None:
        """Its peer could not do it: somebody else does, unless too many failed (`counts`) already."""
        if counts:
            self._failures[prompt.index] = self._failures.get(prompt.index, 0) + 1
            if self._failures[prompt.index] >= GIVE_UP:
                self.finish(Completion(prompt.index, "", 0, "failed", why))
                return
        self._waiting.appendleft(prompt.index)

    def take_fresh(self) -> list[Completion]:
        """Completions since this was asked last."""
        fresh, self._fresh = self._fresh, []
        return fresh
