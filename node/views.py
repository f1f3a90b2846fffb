"""What a node says of itself and of its swarm to its faces: plain data, as JSON for scripts."""

from __future__ import annotations

from typing import Any

import msgspec

from mycel.compute.infer.request import Report


class StageView(msgspec.Struct, frozen=True):
    """Layers [start:end) of a model that this node lends or is about to."""

    model: str
    fingerprint: str
    start: int
    end: int
    layers: int
    """Of the whole model."""
    state: str
    """ "starting", "claiming", "loading", "ready", "leaving", or "lost" while its worker is down."""
    device: str = ""
    dtype: str = ""
    weight_bytes: int = 0
    trouble: str = ""


class TroubleView(msgspec.Struct, frozen=True):
    """A contact that cannot be reached."""

    peer: str
    addrs: tuple[str, ...]
    why: str


class IndirectView(msgspec.Struct, frozen=True):
    """A peer that is reached over a relay for want of a direct way."""

    peer: str
    label: str
    why: str


class ReachView(msgspec.Struct, frozen=True):
    """How others reach this node, and what it does for those who are worse placed."""

    verdict: str
    """ "public", "punchable", "symmetric", "relay-only", "unknown" or "local"."""
    meaning: str
    """The verdict in plain words."""
    evidence: tuple[str, ...]
    """Why it was judged so."""
    ip: str
    """Where most see this node from outside; "" where nobody does."""
    addrs: tuple[str, ...]
    """Addresses that lead here from outside, where it is public."""
    relays: tuple[str, ...]
    """What those relays are called through which others reach this node."""
    relay_trouble: tuple[str, ...]
    """Why other relays gave no reservation."""
    relaying: bool
    """Whether this node is a relay."""
    reservations: int
    """Peers that can be reached through it."""
    circuits: int
    """Connections that go through it now."""
    forwarded_bytes: int
    echoing: bool
    """Whether it tells others how it sees their ports."""
    indirect: tuple[IndirectView, ...]


class DeviceView(msgspec.Struct, frozen=True):
    """What one device was measured to do; 0 where that is not to be had."""

    device: str
    name: str
    memory_bytes: int
    fp32_gflops: float
    bf16_gflops: float
    read_gb_s: float
    memory_free_bytes: int | None = None
    """Of this machine only."""


class CapacityView(msgspec.Struct, frozen=True):
    """What a machine was measured to do."""

    cores: int
    lends_bytes: int
    """Memory for weights that it lends."""
    devices: tuple[DeviceView, ...]
    up_bytes_per_s: float | None
    down_bytes_per_s: float | None
    measured: float
    """When, seconds since 1970."""


class StatusView(msgspec.Struct, frozen=True):
    """This node."""

    peer: str
    label: str
    swarm: str
    access: str
    founder: bool
    version: str
    pid: int
    home: str
    up_s: float
    listen: tuple[str, ...]
    reach: ReachView
    api: str
    """Base URL of the OpenAI-compatible API."""
    peers: int
    """Connected members."""
    strangers: int
    stages: tuple[StageView, ...]
    models: tuple[str, ...]
    """Names of models that the swarm can run now."""
    trouble: tuple[TroubleView, ...]
    capacity: CapacityView | None = None
    """None before it was measured."""


class PeerView(msgspec.Struct, frozen=True):
    """A connected peer, or a member that is away: `path` says so."""

    peer: str
    label: str
    access: str
    addr: str
    path: str
    agent: str
    inbound: bool
    rtt_ms: float | None
    connected_s: float
    serves: tuple[str, ...]
    """MODEL@i:j of each stage it says it holds."""
    seen: float = 0.0
    """Of a member that is away: when it was last heard of, seconds since 1970."""
    capacity: CapacityView | None = None
    """As it states it."""


class HolderView(msgspec.Struct, frozen=True):
    """Who holds which layers of a model."""

    peer: str
    label: str
    start: int
    end: int
    state: str


class ModelView(msgspec.Struct, frozen=True):
    """A model known in the swarm."""

    name: str
    fingerprint: str
    architecture: str
    layers: int
    positions: int
    complete: bool
    missing: tuple[tuple[int, int], ...]
    holders: tuple[HolderView, ...]


class KeeperView(msgspec.Struct, frozen=True):
    """What a peer keeps of a model as blocks."""

    peer: str
    label: str
    held: tuple[tuple[int, int], ...]
    """Spans of layers."""
    edge: bool
    """Whether embeddings and head are there too."""


class KeptView(msgspec.Struct, frozen=True):
    """A model that can be had as blocks."""

    name: str
    root: str
    """What its blocks are found by, in any swarm."""
    fingerprint: str
    layers: int
    nbytes: int
    """Of all its weights."""
    here: KeeperView | None
    others: tuple[KeeperView, ...]


class ProgressEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of the answer to what takes time: how far it is, at the end what came of it."""

    what: str = ""
    done: int = 0
    total: int = 0
    result: Any = None
    error: str = ""
    kind: str = ""


class TicketView(msgspec.Struct, frozen=True):
    """A fresh ticket. `text` is a secret."""

    text: str
    swarm: str
    access: str
    label: str
    expires: int
    """Seconds since 1970."""
    bootstrap: tuple[str, ...]


class GenerateEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line of a generation's answer: text as it comes, at the end the report."""

    text: str = ""
    report: Report | None = None
    labels: dict[str, str] = {}
    """With the report: what the peers in it call themselves."""
    error: str = ""


class GenerateAsk(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A generation asked for over the control API: `prompt` or `messages`."""

    model: str
    prompt: str | None = None
    messages: list[dict[str, str]] | None = None
    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


class ServeAsk(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Layers to lend; `layers` None lets the swarm's need decide."""

    model: str
    layers: tuple[int, int] | None = None


class AddAsk(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A directory to keep as blocks, under a name."""

    directory: str
    name: str


class GetAsk(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A model to fetch, by name or root; `layers` None: all."""

    model: str
    layers: tuple[int, int] | None = None


class RemoveAsk(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A model to keep no more, by name or root."""

    model: str


class TicketAsk(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A ticket to issue."""

    role: str = "member"
    life_s: float = 7 * 86400.0
    label: str = ""


class Problem(msgspec.Struct, frozen=True):
    """Why a control call failed."""

    error: str
    kind: str = ""
