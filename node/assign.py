"""What this node lends because the swarm needs it.

Unless its owner turned it off, a node looks at the models that the swarm runs and

- **takes** layers of each that it can find: in the folders that its config names, as blocks of members, or on
  the hub if that was allowed. A model is the same one only if its fingerprint is;
- **moves**: gives up layers that others hold too, for such as nobody holds, unless its owner named them;
- **rescues** layers of a model that it serves already: when their last holder is gone, the survivors that
  have memory left take them beside their own (`mycel.compute.infer.rescue` says who takes which). Those that
  have not the model's files but its blocks take part where somebody has the blocks of the missing layers.

One load at a time: what a node takes changes what is missing.
"""

from __future__ import annotations

import logging

import msgspec
import trio

from mycel.compute.engine import ModelCard, Span
from mycel.compute.infer.generate import Generator
from mycel.compute.infer.rescue import ROOM_KEY, Vigil, moves_before, plan_rescue, read_rooms
from mycel.compute.infer.route import missing_layers
from mycel.compute.infer.served import UNBOUNDED, read_holdings
from mycel.node.config import Config
from mycel.node.lend import FAILURES, RETRY_S, Lender, Lent
from mycel.protocol.board import Board
from mycel.protocol.errors import Refused
from mycel.protocol.mesh import PeerId

log = logging.getLogger("mycel.node")

LOOK_S = 0.5
"""Between two looks at what the swarm needs: news come in bursts."""
MOVE_S = 2.0
"""Between two peers that might move: the second sees what the first does."""


class Assigner:
    """The service; `me` is this node."""

    def __init__(
        self, config: Config, lender: Lender, generator: Generator, board: Board, me: PeerId
    ) -> None:
        self._config = config
        self._lender = lender
        self._catalog = lender.catalog
        self._generator = generator
        self._board = board
        self._me = me
        self._not_before: dict[str, float] = {}  # models that could not be taken, by fingerprint
        self._no_rescue_before = 0.0
        self._vigils: dict[str, Vigil] = {}
        self._needless_since: dict[str, float] = {}  # this node's layers of a model
        self._room: int | None = None

    async def run(self) -> None:
        """Take what is needed, until cancelled."""
        while True:
            for status in self._generator.models():
                if self._is_to_move(status.card):
                    await self._give_up(status.card)
                await self._take(status.card)
                await self._rescue(status.card)
            await self._wait_news()

    async def _wait_news(self) -> None:
        """Until other models are known or others hold them, layers are to be rescued, or to try again."""
        known = self._known()
        with trio.move_on_after(RETRY_S):
            while True:
                self._tell_room()
                await trio.sleep(LOOK_S)
                # Every vigil looks, whatever the others find.
                cards = [status.card for status in self._generator.models()]
                needs = [self._share(card) is not None or self._is_to_move(card) for card in cards]
                if any(needs) or known != self._known():
                    return

    def _known(self) -> list[tuple[str, object]]:
        return [(status.card.fingerprint, status.holders) for status in self._generator.models()]

    # --- a first stage of a model

    async def _take(self, card: ModelCard) -> None:
        now = trio.current_time()
        if self._is_busy() or self._own(card) is not None or now < self._not_before.get(card.fingerprint, 0):
            return  # one at a time, and each model once
        self._not_before[card.fingerprint] = now + RETRY_S
        folder = self._lender.find(card.name)
        root = None
        if folder is None and self._config.assign_from_members:
            root = self._catalog.find_same(card.fingerprint)
        if folder is None and root is None and not self._config.assign_from_hub:
            log.info("%s is not to be had here; its layers are left to others", card.name)
            return
        try:
            await self._lender.lend(Lent(card.name, str(folder or card.name), None, root), card.fingerprint)
        except FAILURES as error:
            log.warning("no layers of %s are taken: %s", card.name, error)

    def _is_to_move(self, card: ModelCard) -> bool:
        """Whether this node's layers of a model are needless for long enough, while others are missing."""
        now, own = trio.current_time(), self._own(card)
        before = moves_before(card, read_holdings(self._board, card.fingerprint), self._me)
        if before is None or own is None or own.span is not None or not self._config.rescue_s:
            self._needless_since.pop(card.fingerprint, None)
            return False
        since = self._needless_since.setdefault(card.fingerprint, now)
        return now - since >= self._config.rescue_s + before * MOVE_S

    async def _give_up(self, card: ModelCard) -> None:
        own = self._own(card)
        assert own is not None
        log.warning("others hold the same layers of %s, and some are missing: choosing anew", card.name)
        await self._lender.drop(own)
        self._needless_since.pop(card.fingerprint, None)
        self._not_before.pop(card.fingerprint, None)

    # --- a further one

    async def _rescue(self, card: ModelCard) -> None:
        own, share = self._own(card), self._share(card)
        if own is None or share is None:
            return
        if own.root is not None and not self._catalog.is_whole(own.root, share.start, share.end):
            log.warning("layers %d:%d of %s have no holder left, and nobody has their blocks",
                        share.start, share.end, card.name)  # fmt: skip
            self._no_rescue_before = trio.current_time() + RETRY_S
            self._tell_room()
            return
        log.warning("layers %d:%d of %s have no holder left: taking them", share.start, share.end, card.name)
        try:
            lent = Lent(card.name, own.place, None, own.root)
            await self._lender.lend(lent, card.fingerprint, beside=True)
        except FAILURES as error:
            if isinstance(error, Refused) and error.reason in ("settled", "leaving"):
                log.info("%s", error)
            else:
                log.warning("the missing layers of %s are not taken: %s", card.name, error)
                self._no_rescue_before = trio.current_time() + RETRY_S
        self._tell_room()

    def _share(self, card: ModelCard) -> Span | None:
        """What this node is to rescue of a model now."""
        holdings = read_holdings(self._board, card.fingerprint)
        missing = missing_layers(card.n_layers, [held for held in holdings if held.state != "leaving"])
        vigil = self._vigils.setdefault(card.fingerprint, Vigil(self._config.rescue_s))
        if not vigil.look(missing, trio.current_time()) or self._tell_room() == 0:
            return None
        return plan_rescue(card, holdings, read_rooms(self._board), self._me)

    def _tell_room(self) -> int:
        """Say how many bytes of weights this node could take beside what it holds; returns them."""
        room = (self._config.memory_bytes or UNBOUNDED) - sum(
            lent.info.weight_bytes for lent in self._lender.lent if lent.info is not None
        )
        if not self._config.rescue_s or self._is_busy() or trio.current_time() < self._no_rescue_before:
            room = 0
        room = max(room, 0)
        if room != self._room:
            self._room = room
            self._board.publish(ROOM_KEY, msgspec.msgpack.encode(room))
        return room

    def _is_busy(self) -> bool:
        """Whether something loads whose size is not known yet."""
        return any(lent.info is None for lent in self._lender.lent)

    def _own(self, card: ModelCard) -> Lent | None:
        """A loaded stage of the model."""
        for lent in self._lender.lent:
            if lent.info is not None and lent.info.card.fingerprint == card.fingerprint:
                return lent
        return None
