"""What the board and the mesh together say of the swarm, as a session's owner needs it."""

from __future__ import annotations

from collections.abc import Container, Sequence

import msgspec

from mycel.compute.engine import ModelCard, Span
from mycel.compute.infer.messages import ModelFact, is_stage_key, stage_key
from mycel.compute.infer.request import Holder, LayersMissing, ModelStatus, ModelUnknown
from mycel.compute.infer.route import Offer, missing_layers
from mycel.compute.infer.served import read_stage
from mycel.protocol.board import Board
from mycel.protocol.mesh import Mesh, PeerId

RTT_UNKNOWN_S = 0.02
"""What a round trip is taken to be before it was measured."""


class SwarmView:
    """Models, their holders, and the ways to them."""

    def __init__(self, mesh: Mesh, board: Board) -> None:
        self._mesh = mesh
        self._board = board

    def models(self) -> list[ModelStatus]:
        """Every model that somebody in reach holds layers of, ordered by name."""
        cards: dict[str, ModelCard] = {}
        for fact in self._board.facts("models/"):
            card = _card(fact.value)
            if card is not None and fact.key == f"models/{card.fingerprint}":
                cards.setdefault(card.fingerprint, card)
        statuses = []
        for fingerprint in sorted(cards):
            card = cards[fingerprint]
            holders = self.holders(card)
            missing = missing_layers(card.n_layers, self.offers(card))
            statuses.append(ModelStatus(card, holders, missing))
        return sorted(statuses, key=lambda status: (status.card.name, status.card.fingerprint))

    def find(self, model: str) -> ModelCard:
        """The card of a model by name or fingerprint; of several of one name, a complete one.

        Raises `ModelUnknown`.
        """
        statuses = self.models()
        named = [s for s in statuses if model in (s.card.name, s.card.fingerprint)]
        if not named:
            names = ", ".join(dict.fromkeys(status.card.name for status in statuses)) or "none yet"
            raise ModelUnknown(
                f"no peer in reach serves {model!r} (served: {names}); start it with: mycel serve {model}"
            )
        return max(named, key=lambda status: (status.complete, len(status.holders))).card

    def holders(self, card: ModelCard) -> tuple[Holder, ...]:
        """The model's stages and who has them, ordered by layers."""
        holders = []
        for fact in self._board.facts(stage_key(card.fingerprint)):
            stage = read_stage(fact.value)
            if is_stage_key(fact.key, card.fingerprint) and stage is not None:
                holders.append(Holder(fact.author, stage.span, stage.state))
        return tuple(sorted(holders, key=lambda holder: (holder.span, holder.peer)))

    def offers(self, card: ModelCard) -> list[Offer]:
        """Stages that are ready and connected, ordered by peer: others are known by hearsay only."""
        offers = []
        for fact in self._board.facts(stage_key(card.fingerprint)):
            stage = read_stage(fact.value)
            if stage is None or stage.state != "ready":
                continue
            if fact.author != self._mesh.peer_id and fact.author not in self._mesh.peers:
                continue
            if is_stage_key(fact.key, card.fingerprint) and stage.span.end <= card.n_layers:
                offers.append(
                    Offer(fact.author, stage.span, stage.layer_row_s, stage.sessions, stage.standby)
                )
        return offers

    def rtt(self, a: PeerId, b: PeerId) -> float:
        """Seconds of a round trip between two peers: measured from here, else estimated."""
        if a == b:
            return 0.0
        if a == self._mesh.peer_id:
            return self._own(b)
        if b == self._mesh.peer_id:
            return self._own(a)
        return max(self._own(a), self._own(b))

    def _own(self, peer: PeerId) -> float:
        measured = self._mesh.rtt(peer)
        return RTT_UNKNOWN_S if measured is None else measured

    def addrs(self, peer: PeerId) -> tuple[str, ...]:
        """Where a connected peer can be dialled."""
        if peer == self._mesh.peer_id:
            return tuple(str(addr) for addr in self._mesh.listen_addrs)
        info = self._mesh.peers.get(peer)
        if info is None:
            return ()
        addrs = [str(addr) for addr in (*info.listen_addrs, info.addr)]
        return tuple(dict.fromkeys(addr if "/p2p/" in addr else f"{addr}/p2p/{peer}" for addr in addrs))

    def is_coming(self, card: ModelCard, avoid: Container[PeerId]) -> bool:
        """Whether layers have no ready holder, but peers load all of them or are about to."""
        ready = [offer for offer in self.offers(card) if offer.peer not in avoid]
        return bool(missing_layers(card.n_layers, ready)) and not missing_layers(
            card.n_layers, [*ready, *self._coming(card)]
        )

    def _coming(self, card: ModelCard) -> list[Holder]:
        return [holder for holder in self.holders(card) if holder.state in ("claiming", "loading")]

    def missing(self, card: ModelCard, avoid: Container[PeerId]) -> LayersMissing:
        """The error that says which layers nobody serves and what to do about it."""
        offers = [offer for offer in self.offers(card) if offer.peer not in avoid]
        spans = missing_layers(card.n_layers, offers)
        if not spans:
            return LayersMissing(
                f"the peers in reach hold all layers of {card.name}, but no peer twice on one route covers "
                f"them; add a holder with: mycel serve {card.name}"
            )
        still = missing_layers(card.n_layers, [*offers, *self._coming(card)])
        if not still:
            return LayersMissing(
                f"layers {_named(spans)} of {card.name} are still being loaded; try again in a while, "
                f"`mycel models` shows when they are there"
            )
        return LayersMissing(
            f"nobody in reach serves layers {_named(still)} of {card.name} ({card.n_layers} layers); on "
            f"another peer run: mycel serve {card.name} --layers {still[0].start}:{still[0].end}"
        )


def _named(spans: Sequence[Span]) -> str:
    return ", ".join(f"{span.start}:{span.end}" for span in spans)


def _card(value: bytes | None) -> ModelCard | None:
    try:
        return None if value is None else msgspec.msgpack.decode(value, type=ModelFact).card
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
