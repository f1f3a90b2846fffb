"""Keeps this node connected with its swarm: dials contacts, and learns of more from members.

The plan is `mycel.node.contacts`; this service acts on it. When a member comes up it is asked, by the call
`mesh.peers`, where it and the members that it is connected with listen; so a newcomer that knows one member
soon knows all, and dials them. The question is repeated to one member in turn now and then, for what was
missed when several joined at once. What is known is remembered for the next start.

A swarm is fully meshed up to the bounds of `mycel.node.contacts`.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from typing import Annotated

import msgspec
import trio
from multiaddr import Multiaddr

from mycel.node.contacts import ADDR_CHARS_MAX, ADDRS_MAX, Contact, Contacts
from mycel.node.memory import Memory
from mycel.protocol.address import peer_of
from mycel.protocol.errors import AddressError, DialError, LimitExceeded, MycelError, Refused
from mycel.protocol.mesh import Access, Mesh, PeerId, PeerUp
from mycel.protocol.method import Call, Method
from mycel.protocol.rpc import Rpc

log = logging.getLogger("mycel.node")

FIRST_ASKS_S = (0.0, 1.0, 4.0)
"""After a member came up: again soon, for whoever joined together with it is known to it a moment later."""
ASK_S = 15.0
"""Between two questions to one member in turn."""
ASK_DEADLINE_S = 5.0
TOLD_MAX = 256
"""Members named in one reply."""
REMEMBERED = "contacts"

_Text = Annotated[str, msgspec.Meta(max_length=ADDR_CHARS_MAX)]


class Told(msgspec.Struct, frozen=True, array_like=True):
    """A member and where it listens."""

    peer: _Text
    addrs: Annotated[tuple[_Text, ...], msgspec.Meta(max_length=ADDRS_MAX)]


class AskPeers(msgspec.Struct, frozen=True):
    """Who is there?"""


class TellPeers(msgspec.Struct, frozen=True):
    """Members that the answering peer is connected with, itself first."""

    peers: Annotated[tuple[Told, ...], msgspec.Meta(max_length=TOLD_MAX)]


PEERS = Method("mesh.peers", AskPeers, TellPeers, access=Access.SUBMIT, idempotent=True)


class Gather:
    """The service."""

    def __init__(self, mesh: Mesh, rpc: Rpc, contacts: Contacts, memory: Memory) -> None:
        self._mesh = mesh
        self._rpc = rpc
        self._contacts = contacts
        self._memory = memory
        self._changed = trio.Event()
        self.joined = trio.Event()
        """Set when a member was met for the first time, or refused this node."""
        self.on_told: Callable[[PeerId, Sequence[PeerId]], None] = lambda teller, members: None
        """Hears which members a member named, before any that is new is dialled."""
        self.can_lead: Callable[[str], bool] = lambda addr: True
        """Whether an address that others told may lead anywhere from where this node is."""
        self.refused: Refused | None = None
        """The last refusal by somebody whom this node dialled."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; started once this node answers `mesh.peers` and hears of peers."""
        self._rpc.serve(PEERS, self._tell, inline=True)
        self._recall()
        async with trio.open_nursery() as nursery:
            await nursery.start(self._listen, nursery)
            nursery.start_soon(self._dial, nursery)
            nursery.start_soon(self._ask_in_turn)
            task_status.started()

    async def _listen(
        self, nursery: trio.Nursery, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        started = False
        while True:
            async with self._mesh.events() as events:
                for peer, info in list(self._mesh.peers.items()):
                    self._on_up(PeerUp(peer, info.access), nursery)
                if not started:
                    task_status.started()
                    started = True
                try:
                    async for event in events:
                        if isinstance(event, PeerUp):
                            self._on_up(event, nursery)
                        else:
                            log.info("%s is gone: %s", event.peer, event.text)
                            self._contacts.on_down(
                                event.peer, trio.current_time(), left=event.reason == "left"
                            )
                        self._wake()
                except LimitExceeded:
                    continue  # too slow once: start over from who is connected now

    def _on_up(self, event: PeerUp, nursery: trio.Nursery) -> None:
        if event.access >= Access.SUBMIT:
            info = self._mesh.peers.get(event.peer)
            log.info("%s is up (%s)", event.peer, info.addr if info else "gone already")
            self._contacts.learn(event.peer, (), trio.current_time())
            self._contacts.on_up(event.peer)
            self.joined.set()
            nursery.start_soon(self._ask_first, event.peer)

    async def _dial(self, nursery: trio.Nursery) -> None:
        while True:
            self._changed = trio.Event()
            for contact in self._contacts.plan_dials(trio.current_time()):
                nursery.start_soon(self._connect, contact)
            due = self._contacts.next_s()
            with trio.move_on_at(due) if math.isfinite(due) else trio.CancelScope():
                await self._changed.wait()

    async def _connect(self, contact: Contact) -> None:
        if contact.peer in self._mesh.peers:
            self._contacts.on_up(contact.peer)
            self._wake()
            return
        addrs = [addr for addr in contact.addrs if addr in contact.given or self.can_lead(addr)]
        try:
            if not addrs:
                raise DialError(f"all its addresses are in another network: {', '.join(contact.addrs)}")
            await self._mesh.connect(addrs)
            self._contacts.on_up(contact.peer)
        except MycelError as error:
            # Somebody else at an address (homes have the same ones inside) is not the peer's own refusal.
            refused = isinstance(error, Refused) and error.reason not in ("identity", "self")
            log.info("cannot connect to %s: %s", contact.peer, error)
            spread = int.from_bytes(self._mesh.entropy(2), "big") / 65536
            self._contacts.on_failed(contact.peer, trio.current_time(), spread, str(error), refused=refused)
            if isinstance(error, Refused) and refused:
                self.refused = error
                self.joined.set()
        self._wake()

    async def _ask_first(self, peer: PeerId) -> None:
        began = trio.current_time()
        for after in FIRST_ASKS_S:
            await trio.sleep_until(began + after)
            if peer in self._mesh.peers:
                await self._ask(peer)

    async def _ask_in_turn(self) -> None:
        turn = 0
        while True:
            await trio.sleep(ASK_S)
            members = [one.peer for one in self._contacts.told()]
            if members:
                await self._ask(members[turn % len(members)])
                turn += 1

    async def _ask(self, peer: PeerId) -> None:
        try:
            reply = await self._rpc.call(peer, PEERS, AskPeers(), deadline_s=ASK_DEADLINE_S)
        except MycelError as error:
            log.debug("%s did not say whom it knows: %s", peer, error)
            return
        now = trio.current_time()
        for told in reply.peers:
            addrs = [addr for addr in told.addrs if leads_to(addr, told.peer)]
            if addrs:
                self._contacts.learn(PeerId(told.peer), addrs, now)
        self.on_told(peer, [PeerId(told.peer) for told in reply.peers])
        self._remember()
        self._wake()

    def own_addrs(self) -> Sequence[Multiaddr]:
        """Where others can dial this node."""
        return self._mesh.listen_addrs

    def _tell(self, call: Call, request: AskPeers) -> TellPeers:
        addrs = [text for addr in self.own_addrs() if len(text := str(addr)) <= ADDR_CHARS_MAX]
        own = Told(self._mesh.peer_id, tuple(addrs[:ADDRS_MAX]))
        others = [Told(one.peer, one.current) for one in self._contacts.told() if one.current]
        return TellPeers((own, *others[: TOLD_MAX - 1]))

    def learn(self, peer: PeerId, addrs: Sequence[str]) -> None:
        """Somebody else than a member says that `peer` is at `addrs`: dial it, unless it is connected."""
        if peer not in self._mesh.peers:
            self._contacts.learn(peer, addrs, trio.current_time())
            self._wake()

    def _wake(self) -> None:
        self._changed.set()

    def _recall(self) -> None:
        """Learn what the last run knew; a memory that cannot be read is none."""
        try:
            known = msgspec.json.decode(self._memory.get(REMEMBERED) or b"[]", type=list[Told])
        except msgspec.DecodeError:
            return
        for told in known:
            self._contacts.learn(PeerId(told.peer), told.addrs, trio.current_time())

    def _remember(self) -> None:
        known = [[one.peer, one.current] for one in self._contacts.told() if one.current]
        value = json.dumps(known).encode()
        if known and value != self._memory.get(REMEMBERED):
            try:
                self._memory.put(REMEMBERED, value)
            except OSError as error:
                log.warning("contacts are not remembered: %s", error)


def leads_to(addr: str, peer: str) -> bool:
    """Whether `addr` can be dialled and names `peer`."""
    try:
        return peer_of(addr) == peer
    except AddressError:
        return False
