"""Which layers the survivors take beside their own when their last holder is gone.

A model that was whole has lost layers, and nobody else held them. Every survivor that has memory left says
how much (a fact of its own), so all of them can work out the same division: for each run of missing layers in
order, the peer that can take most of it from its beginning does, then the next, until all are taken or nobody
has room. Ties fall to who has more room, then to the lower id.

Views differ for moments, so a share is claimed before it is loaded, and settled as in
`mycel.compute.infer.placement`: a claim of a lower id counts as held, one of a higher id does not.

Nothing is taken before a while has passed (`Vigil`): who was only cut off for a moment, or is replaced by a
newcomer, comes sooner than layers load. A model that was never whole is left to those who are about to come.

But peers that came at the same moment, before they knew each other, may have taken the same layers. Then
those that are not needed where they are move (`moves_before`): they drop what they have and choose anew, the
highest id first, the others later and only if something is missing still.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Annotated

import msgspec

from mycel.compute.engine import ModelCard, Span
from mycel.compute.infer.placement import Holding
from mycel.compute.infer.route import missing_layers
from mycel.protocol.board import Board
from mycel.protocol.mesh import PeerId

ROOM_KEY = "room"
"""Board: bytes of weights that the author could take beside what it holds."""


_Room = Annotated[int, msgspec.Meta(ge=0)]


class Vigil:
    """Watches one model from one node. Times are seconds."""

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._was_whole = False
        self._missing_since: float | None = None

    def look(self, missing: Sequence[Span], now: float) -> bool:
        """Whether it is time to take layers, given those that nobody holds, loads or claims now."""
        if not missing:
            self._was_whole, self._missing_since = True, None
        elif self._was_whole and self._missing_since is None:
            self._missing_since = now
        return self._missing_since is not None and now - self._missing_since >= self._grace_s


def plan_rescue(
    card: ModelCard, holdings: Sequence[Holding], rooms: Mapping[PeerId, int], me: PeerId
) -> Span | None:
    """What `me` should take now beside its own, None for nothing.

    `holdings` are those of all peers, of `me` too, without its own claim; `rooms` are bytes for weights. Only
    peers that hold some of the model take more of it.
    """
    counted = [held for held in holdings if _counts(held, me)]
    room = {peer: rooms.get(peer, 0) for peer in sorted({held.peer for held in counted})}
    for held in counted:
        if held.state != "ready":  # its weights are not in the fact yet
            room[held.peer] -= weight_bytes(card, held.span)
    for missing in missing_layers(card.n_layers, counted):
        at = missing.start
        while at < missing.end:
            rest = Span(at, missing.end)
            fits = {peer: _fitting(card, rest, left) for peer, left in room.items()}
            best = min(fits, key=lambda peer: (-fits[peer], -room[peer], peer), default=me)
            taken = Span(at, at + fits.get(best, 0))
            if taken.start == taken.end:
                at += 1  # nobody has room for this layer; another may be without an edge
                continue
            if best == me:
                return taken
            room[best] -= weight_bytes(card, taken)
            at = taken.end
    return None


def moves_before(card: ModelCard, holdings: Sequence[Holding], me: PeerId) -> int | None:
    """How many peers should choose other layers before `me` does; None where it should not.

    It should where layers are missing and all of its own are held by others as well.
    """
    taken = [held for held in holdings if held.state != "leaving"]
    if not missing_layers(card.n_layers, taken) or not _is_redundant(taken, me):
        return None
    peers = sorted({held.peer for held in taken if held.peer > me})
    return sum(_is_redundant(taken, peer) for peer in peers)


def weight_bytes(card: ModelCard, span: Span) -> int:
    """What loading `span` takes at most."""
    edges = card.edge_bytes if span.start == 0 or span.end == card.n_layers else 0
    return (span.end - span.start) * card.layer_bytes + edges


def read_rooms(board: Board) -> dict[PeerId, int]:
    """What peers say that they could take; what makes no sense is none."""
    rooms = {}
    for fact in board.facts(ROOM_KEY):
        if fact.key == ROOM_KEY and fact.value is not None:
            with suppress(msgspec.MsgspecError):
                rooms[fact.author] = msgspec.msgpack.decode(fact.value, type=_Room)
    return rooms


def _fitting(card: ModelCard, span: Span, room: int) -> int:
    """How many layers of `span`, from its beginning, fit into `room` bytes."""
    sizes = range(span.end - span.start, 0, -1)
    return next((n for n in sizes if weight_bytes(card, Span(span.start, span.start + n)) <= room), 0)


def _is_redundant(holdings: Sequence[Holding], peer: PeerId) -> bool:
    own = [held.span for held in holdings if held.peer == peer]
    others = [held for held in holdings if held.peer != peer and held.state != "claiming"]
    layers = [layer for span in own for layer in range(span.start, span.end)]
    return bool(own) and all(
        any(held.span.start <= layer < held.span.end for held in others) for layer in layers
    )


def _counts(held: Holding, me: PeerId) -> bool:
    if held.state == "leaving":
        return False
    return held.state != "claiming" or held.peer < me
