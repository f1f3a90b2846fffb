"""What a node writes of itself into the swarm's document, and what it makes of others' words.

Under `member` stands how it is called and where it can be dialled, under `placements/FINGERPRINT` which
layers of a model it serves: what lasts, so that it is known of a member that is away too. It is looked at now
and then, and written where it changed. A placement stays for a while when its stage is gone: a node that
starts again, or whose worker died, serves the same layers soon.

A node that starts dials the members it knows from its documents; it needs no bootstrap address then. Later
news of where members are is heeded after a pause, since most of them are told of by `mycel.node.gather` and
connected by then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated

import msgspec
import trio

import mycel
from mycel.node.contacts import ADDR_CHARS_MAX, ADDRS_MAX
from mycel.node.gather import leads_to
from mycel.node.views import HolderView, ModelView, PeerView
from mycel.protocol.board import Fact
from mycel.protocol.membership import printable
from mycel.protocol.mesh import Access, PeerId

if TYPE_CHECKING:
    from mycel.node.running import Node

MEMBER_KEY = "member"
PLACEMENTS = "placements/"

LOOK_S = 10.0
"""How often a node looks whether what it wrote of itself still holds..."""
FIRST_S = 2.0
"""...and first, when it has addresses."""
AGAIN_S = 3600.0
"""How often it writes that it is there, with nothing else new: how exactly others know when it was."""
GONE_S = 60.0
"""How long layers are not served before they are no more its own."""
HEED_S = 15.0
"""After news of where a member is, before it is dialled."""
SPANS_MAX = 64

_Text = Annotated[str, msgspec.Meta(max_length=128)]
_Addr = Annotated[str, msgspec.Meta(max_length=ADDR_CHARS_MAX)]
_Number = Annotated[int, msgspec.Meta(ge=0, le=1 << 20)]


class Member(msgspec.Struct, frozen=True, array_like=True):
    """A node's word on itself. It is signed with the document that it stands in."""

    label: _Text
    version: _Text
    addrs: Annotated[tuple[_Addr, ...], msgspec.Meta(max_length=ADDRS_MAX)]
    at: Annotated[float, msgspec.Meta(ge=0, le=1e12)]
    """When it was written, seconds since 1970 by its calendar."""


class Placement(msgspec.Struct, frozen=True, array_like=True):
    """Layers [start:end) of a model that a node serves."""

    name: _Text
    architecture: _Text
    layers: _Number
    """Of the whole model."""
    spans: Annotated[tuple[tuple[_Number, _Number], ...], msgspec.Meta(max_length=SPANS_MAX)]


_members = msgspec.msgpack.Decoder(Member)
_placements = msgspec.msgpack.Decoder(Placement)


def read_member(fact: Fact) -> Member | None:
    """What a fact says under `member`; None where it cannot be read."""
    try:
        return _members.decode(fact.value or b"")
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def read_placement(fact: Fact) -> Placement | None:
    """What a fact says under `placements/...`; None where it cannot be read."""
    try:
        return _placements.decode(fact.value or b"")
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


class Members:
    """The service, over a running node."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._gone: dict[str, float] = {}
        """Since when placements that stand there are not served."""
        self._seen: dict[PeerId, float] = {}
        """When members were last connected, by this node's calendar."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Write, and heed what others write, until cancelled. One who is no member writes nothing."""
        if self._node.membership.own_grant().access < Access.MEMBER:
            task_status.started()
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._heed)
            task_status.started()
            await trio.sleep(FIRST_S)
            while not self._node.stopping.is_set():
                self._look()
                await trio.sleep(LOOK_S)

    # --- writing

    def _look(self) -> None:
        now = self._node.host.wall()
        for peer in self._node.host.peers:
            self._seen[peer] = now
        own = self._node.host.peer_id
        held = {
            fact.key: fact.value
            for prefix in (MEMBER_KEY, PLACEMENTS)
            for fact in self._node.documents.read(prefix)
            if fact.author == own
        }
        changes = {**self._member_change(held.get(MEMBER_KEY)), **self._placement_changes(held)}
        if changes:
            self._node.documents.write(changes)

    def _member_change(self, held: bytes | None) -> Mapping[str, bytes]:
        addrs = [text for addr in self._node.gather.own_addrs() if len(text := str(addr)) <= ADDR_CHARS_MAX]
        now = self._node.host.wall()
        label = self._node.config.label[:64]
        member = Member(label, mycel.__version__, tuple(addrs[:ADDRS_MAX]), now)
        before = read_member(Fact(self._node.host.peer_id, MEMBER_KEY, held)) if held else None
        is_recent = before is not None and abs(now - before.at) < AGAIN_S
        if before is not None and is_recent and msgspec.structs.replace(before, at=now) == member:
            return {}
        return {MEMBER_KEY: msgspec.msgpack.encode(member)}

    def _placement_changes(self, held: Mapping[str, bytes | None]) -> Mapping[str, bytes | None]:
        served = {key: msgspec.msgpack.encode(placement) for key, placement in self._served().items()}
        changes: dict[str, bytes | None] = {
            key: value for key, value in served.items() if held.get(key) != value
        }
        now = trio.current_time()
        is_loading = any(not stage.fingerprint for stage in self._node.lender.views())
        gone = [key for key in held if key.startswith(PLACEMENTS) and key not in served and not is_loading]
        self._gone = {key: self._gone.get(key, now) for key in gone}
        return changes | {key: None for key, since in self._gone.items() if now - since >= GONE_S}

    def _served(self) -> dict[str, Placement]:
        """What this node lends, by key."""
        cards = {status.card.fingerprint: status.card for status in self._node.generator.models()}
        spans: dict[str, list[tuple[int, int]]] = {}
        for stage in self._node.lender.views():
            if stage.fingerprint in cards:
                spans.setdefault(stage.fingerprint, []).append((stage.start, stage.end))
        return {
            PLACEMENTS + fingerprint: Placement(
                cards[fingerprint].name[:128],
                cards[fingerprint].architecture[:128],
                cards[fingerprint].n_layers,
                tuple(sorted(held)[:SPANS_MAX]),
            )
            for fingerprint, held in spans.items()
        }

    # --- heeding

    async def _heed(self) -> None:
        """Dial members that documents tell of: at once those known from the last run, others later."""
        async with self._node.documents.watch(MEMBER_KEY) as changes:
            for fact in self._node.documents.read(MEMBER_KEY):
                self._learn(fact)
            while True:
                news = [await anext(changes)]
                await trio.sleep(HEED_S)
                with trio.move_on_after(0):
                    while True:
                        news.append(await anext(changes))
                for fact in news:
                    self._learn(fact)

    def _learn(self, fact: Fact) -> None:
        member = read_member(fact) if fact.key == MEMBER_KEY else None
        if member is not None and fact.author != self._node.host.peer_id:
            self._node.gather.learn(fact.author, [one for one in member.addrs if leads_to(one, fact.author)])

    # --- showing

    def away(self) -> list[PeerView]:
        """Members that are known and not connected, ordered by id."""
        placed: dict[PeerId, list[str]] = {}
        for author, _, placement in self._placements():
            told = [f"{printable(placement.name)}@{start}:{end}" for start, end in placement.spans]
            placed.setdefault(author, []).extend(told)
        return [
            PeerView(
                peer=author,
                label=printable(member.label),
                access=Access.MEMBER.name.lower(),
                addr=next((one for one in member.addrs if leads_to(one, author)), ""),
                path="away",
                agent=f"mycel/{printable(member.version)}",
                inbound=False,
                rtt_ms=None,
                connected_s=0.0,
                serves=tuple(placed.get(author, ())),
                seen=max(self._seen.get(author, 0.0), member.at),
                capacity=self._node.capacity.view_of(author),
            )
            for author, member in sorted(self._away().items())
        ]

    def away_models(self) -> list[ModelView]:
        """Models that members served who are away, ordered by fingerprint; those that are there, too."""
        members = self._away()
        shown: dict[str, ModelView] = {}
        for author, fingerprint, placement in self._placements():
            if author not in members:
                continue
            label = printable(members[author].label)
            holders = tuple(HolderView(author, label, start, end, "away") for start, end in placement.spans)
            before = shown.get(fingerprint)
            shown[fingerprint] = ModelView(
                name=printable(placement.name) if before is None else before.name,
                fingerprint=fingerprint,
                architecture=printable(placement.architecture),
                layers=placement.layers,
                positions=0,
                complete=False,
                missing=(),
                holders=holders if before is None else (*before.holders, *holders),
            )
        return [shown[fingerprint] for fingerprint in sorted(shown)]

    def _away(self) -> dict[PeerId, Member]:
        known = {}
        for fact in self._node.documents.read(MEMBER_KEY):
            is_here = fact.author in self._node.host.peers or fact.author == self._node.host.peer_id
            member = read_member(fact) if fact.key == MEMBER_KEY and not is_here else None
            if member is not None:
                known[fact.author] = member
        return known

    def _placements(self) -> Iterator[tuple[PeerId, str, Placement]]:
        for fact in self._node.documents.read(PLACEMENTS):
            placement = read_placement(fact)
            if placement is not None:
                yield fact.author, printable(fact.key.removeprefix(PLACEMENTS)), placement
