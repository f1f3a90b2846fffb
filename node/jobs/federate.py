"""The federate kind: rounds of local training, where the data stays home.

The work is done by `mycel.compute.train`; here it is joined to jobs. A coordinator's claim carries its lease,
which every client checks by the fence; a job's terms (application, data, settings) come from the signed job
and never from its coordinator. Models and what strategies keep are blobs of the job's checkpoints, so whoever
holds the lease next goes on with the same round.

What needs numpy is loaded when this node coordinates its first federated job, not before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import psutil
import trio

from mycel.compute.train.client import FederatedClient, Owner, Terms
from mycel.compute.train.orders import FIRST, Claim
from mycel.compute.train.trade import BUNDLE_ENTRY, Begun, Source
from mycel.compute.train.trainer import Trainers
from mycel.node.jobs.kinds import FederateSpec, Spec, TrainSpec
from mycel.node.jobs.lease import Lease
from mycel.node.jobs.runner import Context, Fence, JobFailed, Services
from mycel.node.jobs.spec import Blob, Job, JobInvalid
from mycel.protocol.errors import MycelError, Refused, UsageProblem
from mycel.protocol.mesh import PeerId

if TYPE_CHECKING:
    from mycel.compute.train.layout import Layout
    from mycel.compute.train.rounds import RoundRules
    from mycel.compute.train.rows import Flat
    from mycel.compute.train.strategy import Strategy

FIRST_S = 300.0
"""How long making the first model may take, on a client that imports torch for it."""
MODEL = "model.safetensors"
"""The artefact."""
UNREAD = {BUNDLE_ENTRY: b""}
"""In place of a bundle that was not fetched, because its submitter is not trusted here."""


class FederateRunner:
    """See `Runner`."""

    kind = FederateSpec.KIND

    def __init__(self, services: Services, trainers: Trainers, owner: Owner) -> None:
        self._owner = owner
        self._own = services.mesh.peer_id
        self._gate = LeaseGate(services.fence, services.takes_part)
        self._client = FederatedClient(services.mesh, services.rpc, self._gate, trainers, owner)

    async def check(self, spec: Spec, files: Mapping[str, bytes | Path]) -> None:
        """See `Checker.check`."""
        keys = _spec_of(spec)
        try:
            rules_of(keys)
            strategy = strategy_of(keys)
            if keys.fan_out and not strategy.is_linear:
                raise UsageProblem(
                    f"fan_out = {keys.fan_out}: strategy {keys.strategy!r} must see every update itself, so "
                    "no client can add up for others; leave fan_out out, or take a linear strategy"
                )
            code = files.get("code")
            if isinstance(code, Path):
                code = await trio.to_thread.run_sync(code.read_bytes)
            source_of(keys, code).check()
        except UsageProblem as error:
            raise JobInvalid(str(error)) from None

    # --- a client

    async def take_part(self, job: Job, context: Context) -> None:
        """See `Runner.take_part`."""
        spec = _spec_of(job.spec)
        code: bytes | None = None
        if spec.code is not None:
            is_trusted = self._owner.trusts(job.submitter, self._own)
            code = await context.fetch(job.inputs["code"]) if is_trusted else UNREAD[BUNDLE_ENTRY]
        source = source_of(spec, code)
        terms = Terms(job.id, job.submitter, source, spec.data, dict(spec.settings), spec.seed)
        self._gate.terms_of[job.id] = terms
        try:
            await self._client.attend(job.id, source)
        except Refused as refused:
            context.log(str(refused))
        finally:
            del self._gate.terms_of[job.id]

    # --- the coordinator

    async def coordinate(self, job: Job, context: Context) -> None:
        """See `Runner.coordinate`. Raises `UnderQuorum` where a round finds too few clients."""
        from mycel.compute.train.federated import Coordinator, News, Plan
        from mycel.compute.train.rows import to_safetensors

        spec = _spec_of(job.spec)
        claim = Claim(job.id, context.epoch, msgspec.msgpack.encode(context.lease))
        plan = Plan(
            claim=claim,
            rounds=spec.rounds,
            rules=rules_of(spec),
            strategy=strategy_of(spec),
            seed=spec.seed,
            evaluate_every=spec.evaluate_every,
            fan_out=spec.fan_out,
            memory_bytes=psutil.virtual_memory().available,
        )
        history: dict[int, dict[str, float]] = {}

        def report(number: int, figures: Mapping[str, float]) -> None:
            history.setdefault(number, {}).update(figures)
            context.report(max(history), figures, steps=spec.rounds)

        coordinator = Coordinator(
            context.mesh, context.rpc, plan, BlobKeep(context), News(report, context.log)
        )
        layout, model = await coordinator.run(lambda: self._first(job, context, claim))
        await context.artefact(MODEL, to_safetensors(model, layout))
        rows = [{"round": number, **figures} for number, figures in sorted(history.items())]
        await context.artefact("rounds.json", json.dumps(rows, indent=1).encode())

    async def _first(self, job: Job, context: Context, claim: Claim) -> tuple[Layout, Flat]:
        """The model to begin with: the job's own, or what a member makes of its seed.

        Raises `JobFailed` where the job's own cannot be read, `Refused` where nobody makes one.
        """
        from mycel.compute.train.rows import from_safetensors, row_of

        if "model" in job.inputs:
            try:
                flat, layout, _ = from_safetensors(await context.fetch(job.inputs["model"]))
            except UsageProblem as error:
                raise JobFailed(f"model: {error}") from None
            return layout, flat
        said: list[str] = []
        members = [self._own, *(peer for peer in context.members() if peer != self._own)]
        for peer in members:
            try:
                begun: Begun = await context.rpc.call(peer, FIRST, claim, deadline_s=FIRST_S)
                return begun.layout, row_of(begun.model.data, begun.layout)
            except MycelError as error:
                said.append(f"{context.label(peer)}: {error}")
        raise Refused("no member made a first model: " + "; ".join(said[:8]), reason="application")


@dataclass(frozen=True, slots=True)
class LeaseGate:
    """Lets in whoever shows a lease of a job that this node has begun with: see `Gate`."""

    fence: Fence
    takes_part: bool
    terms_of: dict[str, Terms] = field(default_factory=dict)

    def terms(self, peer: PeerId, claim: Claim) -> Terms:
        """See `Gate.terms`."""
        if not self.takes_part:
            raise Refused("this node's owner does not let it work for jobs", reason="takes-no-part")
        try:
            lease = msgspec.msgpack.decode(claim.warrant, type=Lease)
        except msgspec.DecodeError as error:
            raise Refused(f"the lease that came cannot be read: {error}", reason="unproven") from None
        job = self.fence.check(peer, lease)
        if (lease.job, lease.epoch) != (claim.job, claim.epoch):
            raise Refused("the lease that came is for something else", reason="unproven")
        terms = self.terms_of.get(job.id)
        if terms is None:
            raise Refused(f"this node has not begun with job {job.id[:8]}", reason="not-ready")
        return terms


class BlobKeep:
    """A coordinator's `Keep`: blobs of the job's checkpoints."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def keep(self, content: bytes) -> bytes:
        """See `Keep.keep`."""
        return msgspec.msgpack.encode(await self._context.keep(content))

    async def fetch(self, name: bytes) -> bytes:
        """See `Keep.fetch`."""
        return await self._context.fetch(msgspec.msgpack.decode(name, type=Blob))

    async def checkpoint(self, state: bytes, names: Sequence[bytes]) -> None:
        """See `Keep.checkpoint`."""
        blobs = [msgspec.msgpack.decode(name, type=Blob) for name in names]
        await self._context.checkpoint(state, blobs)

    async def resume(self) -> bytes | None:
        """See `Keep.resume`."""
        return await self._context.resume()


def source_of(spec: FederateSpec | TrainSpec, code: bytes | None) -> Source:
    """Where the job's application comes from."""
    return Source(spec.app, {BUNDLE_ENTRY: code} if code is not None else {})


def rules_of(spec: FederateSpec) -> RoundRules:
    """When a round is good. Raises `UsageProblem`."""
    from mycel.compute.train.rounds import RoundRules

    if 0 < spec.clients < spec.quorum:
        raise UsageProblem(
            f"clients = {spec.clients}: a round closes with its quorum of {spec.quorum} or more"
        )
    return RoundRules(
        wanted=spec.clients,
        quorum=spec.quorum,
        oversample=spec.oversample,
        round_s_max=spec.round_s_max,
        patience_s=spec.patience_s,
    ).check()


def strategy_of(spec: FederateSpec) -> Strategy:
    """Raises `UsageProblem`."""
    from mycel.compute.train.strategy import make_strategy

    return make_strategy(spec.strategy, spec.tuning)


def owner_of(data: Sequence[str], trusted: Sequence[str]) -> Owner:
    """What an owner lets federated jobs do, from the config's NAME=PATH and peer ids."""
    named = dict(item.split("=", 1) for item in data)
    paths = {name.strip(): Path(path.strip()).expanduser() for name, path in named.items()}
    return Owner(paths, [PeerId(peer) for peer in trusted])


def _spec_of(spec: Spec) -> FederateSpec:
    assert isinstance(spec, FederateSpec), "a federate job's spec"
    return spec
