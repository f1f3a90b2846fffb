"""The generate kind: a file of prompts in, a file of completions out, spread over the swarm.

Any member can own a session, whether or not it holds layers, so the coordinator hands every member a few
prompts at a time (`at_once`), each as a call of its own: a peer that dies gives its prompts back at once, a
slow one takes fewer. Completions are kept and checkpointed every second; what was kept is not done again,
whoever coordinates next. The draw for prompt number i depends on the job's seed and i, so a prompt that is
done a second time comes out as it did.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Annotated, Protocol

import msgspec
import trio
from msgspec import Meta

from mycel.compute.chat import ChatError
from mycel.compute.engine import Sampling
from mycel.compute.infer.request import GenerateRequest, Piece, RequestInvalid
from mycel.compute.tokenizer import Tokenizer, TokenizerError
from mycel.node.jobs.kinds import GenerateSpec, SamplingKeys, Spec
from mycel.node.jobs.lease import Lease
from mycel.node.jobs.prompts import Completion, Parts, Plan, Prompt, read_prompts, write_completions
from mycel.node.jobs.runner import Context, JobFailed, Services
from mycel.node.jobs.spec import Blob, Job, JobInvalid
from mycel.protocol.errors import ConnectionLost, MycelError, Refused, RemoteError
from mycel.protocol.limits_jobs import DEFAULT_JOB_LIMITS, JobLimits
from mycel.protocol.mesh import Access, PeerDown, PeerId
from mycel.protocol.method import Call, Method

log = logging.getLogger("mycel.jobs")

PROMPT_S = 3600.0
"""Deadline of one prompt; a peer that is gone is noticed by its connection."""
PAUSE_S = 1.0
"""Before a member that could not do a prompt gets the next one."""
NOBODY = ("ModelUnknown", "LayersMissing")
"""What a member says when nobody serves the model (yet): that is not the prompt's fault."""
COMPLETIONS = msgspec.msgpack.Decoder(list[Completion])


class Running(Protocol):
    """A generation, as `mycel.compute.infer.generation.Generation`."""

    def __aiter__(self) -> AsyncIterator[Piece]: ...


class Generates(Protocol):
    """What this needs of `mycel.compute.infer.generate.Generator`."""

    def generate(self, request: GenerateRequest) -> AbstractAsyncContextManager[Running]: ...
    async def tokenizer(self, model: str) -> Tokenizer: ...


class Ask(msgspec.Struct, frozen=True):
    """One prompt for a member."""

    lease: Lease
    model: Annotated[str, Meta(max_length=128)]
    sampling: SamplingKeys
    prompt: Prompt


GENERATE = Method("jobs.generate", Ask, Completion, access=Access.MEMBER, idempotent=True)


class GenerateRunner:
    """See `Runner`."""

    kind = GenerateSpec.KIND

    def __init__(
        self, services: Services, generator: Generates, limits: JobLimits = DEFAULT_JOB_LIMITS
    ) -> None:
        self._services = services
        self._generator = generator
        self._limits = limits
        services.rpc.serve(GENERATE, self._on_generate)

    async def check(self, spec: Spec, files: Mapping[str, bytes | Path]) -> None:
        """See `Checker.check`."""
        content = files.get("prompts", b"")
        if isinstance(content, Path):
            content = await trio.to_thread.run_sync(content.read_bytes)
        read_prompts(_spec_of(spec), content)

    # --- a member

    async def take_part(self, job: Job, context: Context) -> None:
        """Nothing is to be done but to answer calls."""

    async def _on_generate(self, call: Call, ask: Ask) -> Completion:
        if not self._services.takes_part:
            raise Refused("this node's owner does not let it work for jobs", reason="takes-no-part")
        self._services.fence.check(call.peer, ask.lease)
        prompt = ask.prompt
        keys = ask.sampling
        sampling = Sampling(
            temperature=keys.temperature,
            top_k=keys.top_k,
            top_p=keys.top_p,
            repetition_penalty=keys.repetition_penalty,
            seed=keys.seed + prompt.index,
        )
        try:
            given: str | tuple[int, ...] = prompt.text or ""
            if prompt.messages is not None:
                tokenizer = await self._generator.tokenizer(ask.model)
                given = tuple(tokenizer.encode_chat(prompt.messages))
            request = GenerateRequest(
                model=ask.model, prompt=given, sampling=sampling, max_tokens=keys.max_tokens, stop=keys.stop
            )
            text, tokens, finish = "", 0, ""
            async with self._generator.generate(request) as generation:
                async for piece in generation:
                    text += piece.text
                    tokens += len(piece.tokens)
                    finish = piece.finish or finish
        except (RequestInvalid, TokenizerError, ChatError) as error:
            return Completion(prompt.index, "", 0, "failed", str(error))
        return Completion(prompt.index, text, tokens, finish)

    # --- the coordinator

    async def coordinate(self, job: Job, context: Context) -> None:
        """See `Runner.coordinate`."""
        spec = _spec_of(job.spec)
        try:
            prompts = read_prompts(spec, await context.fetch(job.inputs["prompts"]))
        except JobInvalid as error:
            raise JobFailed(str(error)) from None
        await _Coordination(job, spec, prompts, context, self._limits).run()


class _Coordination:
    """One coordinator's work on one job."""

    def __init__(
        self, job: Job, spec: GenerateSpec, prompts: list[Prompt], context: Context, limits: JobLimits
    ) -> None:
        self._spec = spec
        self._context = context
        self._limits = limits
        self._plan = Plan(prompts)
        self._parts: list[Blob] = []
        self._news = trio.Event()
        self._helpers: dict[PeerId, trio.CancelScope] = {}
        self._said = -1e9
        self._began = trio.current_time()
        self._done_before = 0

    async def run(self) -> None:
        context = self._context
        await self._resume()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._follow_members, nursery)
            while not self._plan.is_done:
                await self._news.wait()
                self._news = trio.Event()
                await trio.sleep(0 if self._plan.is_done else self._limits.flush_s)
                await self._flush()
            nursery.cancel_scope.cancel()
        await self._flush()
        await context.artefact(self._spec.output, write_completions(self._plan.prompts, self._plan.done))
        failed = sum(bool(completion.error) for completion in self._plan.done.values())
        context.log(f"{len(self._plan.prompts)} prompts done, {failed} of them failed")

    async def _resume(self) -> None:
        state = await self._context.resume()
        done: list[Completion] = []
        if state is not None:
            self._parts = list(msgspec.msgpack.decode(state, type=Parts).parts)
            for part in self._parts:
                done += COMPLETIONS.decode(await self._context.fetch(part))
        self._plan = Plan(self._plan.prompts, done)
        self._done_before = len(self._plan.done)
        if done:
            self._context.log(
                f"resumed with {len(self._plan.done)} of {len(self._plan.prompts)} prompts done"
            )
        self._report()

    async def _flush(self) -> None:
        """Keep what came since the last time, and checkpoint."""
        fresh = self._plan.take_fresh()
        if not fresh:
            return
        if len(self._parts) >= self._limits.parts:
            fresh, self._parts = list(self._plan.done.values()), []
            self._plan.take_fresh()
        self._parts.append(await self._context.keep(msgspec.msgpack.encode(fresh)))
        await self._context.checkpoint(msgspec.msgpack.encode(Parts(tuple(self._parts))), self._parts)
        self._report()

    def _report(self) -> None:
        done, spent_s = len(self._plan.done), trio.current_time() - self._began
        rate = (done - self._done_before) / spent_s if spent_s > 0 else 0.0
        metrics = {"tokens": float(self._plan.tokens), "prompts_per_s": round(rate, 3)}
        self._context.report(done, metrics, steps=len(self._plan.prompts))

    # --- members

    async def _follow_members(self, nursery: trio.Nursery) -> None:
        """Give prompts to every member, those who come later included."""
        async with self._context.mesh.events() as events:
            self._engage_all(nursery)
            async for event in events:
                if isinstance(event, PeerDown):
                    helper = self._helpers.pop(event.peer, None)
                    if helper is not None:
                        helper.cancel()
                self._engage_all(nursery)

    def _engage_all(self, nursery: trio.Nursery) -> None:
        for peer in self._context.members():
            if peer not in self._helpers:
                self._helpers[peer] = trio.CancelScope()
                nursery.start_soon(self._engage, peer, self._helpers[peer])

    async def _engage(self, peer: PeerId, scope: trio.CancelScope) -> None:
        with scope:
            async with trio.open_nursery() as nursery:
                for _ in range(self._spec.at_once):
                    nursery.start_soon(self._feed, peer)

    async def _feed(self, peer: PeerId) -> None:
        """One prompt after another to one member."""
        while not self._plan.is_done:
            prompt = self._plan.next()
            if prompt is None:
                await trio.sleep(PAUSE_S)  # somebody may give one back
                continue
            goes_on = await self._ask(peer, prompt)
            if not goes_on:
                return

    async def _ask(self, peer: PeerId, prompt: Prompt) -> bool:
        """Have `peer` do a prompt; whether it may be given another."""
        context = self._context
        ask = Ask(context.lease, self._spec.model, self._spec.sampling, prompt)
        done: Completion | None = None
        why, counts, goes_on = "", False, True
        try:
            done = await context.rpc.call(peer, GENERATE, ask, deadline_s=PROMPT_S)
        except Refused as error:
            why, goes_on = str(error), error.reason in ("unknown-job", "busy")
        except ConnectionLost as error:
            why = str(error)
        except RemoteError as error:
            why, counts = error.text, error.kind not in NOBODY
        except MycelError as error:
            why, counts = str(error), True
        finally:
            if done is not None and done.index == prompt.index:
                self._plan.finish(done)
            else:
                self._plan.give_back(prompt, why, counts=counts)
            self._news.set()
        if done is None:
            self._say(f"{context.label(peer)} could not do prompt {prompt.index}: {why}")
            await trio.sleep(PAUSE_S)
        return goes_on

    def _say(self, line: str) -> None:
        """Log, but not every second."""
        if trio.current_time() - self._said >= 10 * PAUSE_S:
            self._said = trio.current_time()
            self._context.log(line)


def _spec_of(spec: Spec) -> GenerateSpec:
    if not isinstance(spec, GenerateSpec):
        raise JobInvalid(f"a job of kind {spec.KIND} is none of kind {GenerateSpec.KIND}")
    return spec
