"""Making a job of a spec and its files: electors are chosen, inputs kept, and the whole is signed.

Electors are the members that have been connected longest, this node only where there are too few others: it
may be a laptop that is closed tonight. They are an odd number, five or what there is; a swarm of one or two
has one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from mycel.node.jobs.keep import INPUTS, Blobs
from mycel.node.jobs.kinds import Spec
from mycel.node.jobs.record import Stop, stop_bytes
from mycel.node.jobs.spec import (
    VERSION,
    Blob,
    Body,
    Envelope,
    JobInvalid,
    encode_body,
    encode_spec,
    file_keys,
    id_of,
    signed_bytes,
)
from mycel.protocol.errors import UsageProblem
from mycel.protocol.limits_jobs import DEFAULT_JOB_LIMITS, JobLimits
from mycel.protocol.mesh import Access, Mesh, PeerId

Files = Mapping[str, bytes | Path]
"""What `mycel submit` brings, by the key that names it."""


def choose_electors(mesh: Mesh, *, is_member: bool, count: int = DEFAULT_JOB_LIMITS.electors) -> list[PeerId]:
    """Electors for a job submitted here. Raises `UsageProblem` where there is nobody."""
    infos = [info for info in mesh.peers.values() if info.access >= Access.MEMBER]
    others = [info.peer for info in sorted(infos, key=lambda info: (info.since, info.peer))]
    pool = [*others, mesh.peer_id] if is_member else others
    if not pool:
        raise UsageProblem("no member is connected that could run a job: see `mycel peers`")
    if len(pool) < 3 and is_member:
        return [mesh.peer_id]
    size = min(count, len(pool))
    return pool[: size if size % 2 else size - 1]


@dataclass(frozen=True, slots=True)
class Draft:
    """What a job is made of."""

    spec: Spec
    files: Files
    electors: Sequence[PeerId]
    chain: bytes
    """What shows that this node may submit."""


async def make_job(
    mesh: Mesh, blobs: Blobs, draft: Draft, limits: JobLimits = DEFAULT_JOB_LIMITS
) -> Envelope:
    """The signed job, with its inputs kept here.

    Raises `JobInvalid` for files that are not those of the spec or too large, and what the store raises.
    """
    spec, files = draft.spec, draft.files
    named = file_keys(spec)
    if sorted(named) != sorted(files):
        wrong = sorted(set(named) ^ set(files))[0]
        raise JobInvalid(
            f"{wrong}: a file is to be sent along for each of the keys {', '.join(named) or '-'}"
        )
    nonce = mesh.entropy(8)
    inputs: dict[str, Blob] = {}
    for key in sorted(files):
        blob = await blobs.add(nonce.hex(), files[key])
        if blob.nbytes > limits.input_bytes:
            raise JobInvalid(
                f"{key}: {blob.nbytes} bytes; a job brings at most {limits.input_bytes} in a file"
            )
        inputs[key] = blob
    body = encode_body(
        Body(
            version=VERSION,
            submitter=mesh.peer_id,
            created=int(mesh.wall() * 1000),
            nonce=nonce,
            electors=tuple(draft.electors),
            kind=spec.KIND,
            spec=encode_spec(spec),
            inputs=inputs,
        )
    )
    await blobs.hold(id_of(body), INPUTS, list(inputs.values()))
    await blobs.settle(blobs.fresh(nonce.hex()))
    return Envelope(body, mesh.sign(signed_bytes(body)), draft.chain)


def make_stop(mesh: Mesh, job: str, chain: bytes) -> Stop:
    """This node's signed word that a job is to stop."""
    return Stop(job, mesh.peer_id, mesh.sign(stop_bytes(job, mesh.peer_id)), chain)


def packed(content: Envelope | Stop) -> bytes:
    """As it stands in a document."""
    return msgspec.msgpack.encode(content)
