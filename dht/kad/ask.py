"""Asking one peer one question: dial it if need be, open a stream, send, hear the answer.

What comes of it is noted where others look: the table learns who is alive and who is not, the pace how long
it took. A failure counts against a peer only when somebody else was heard since it was asked; otherwise it
may well be this node that is off the net, which should not cost it everybody it knows.

Connections that questions opened are kept for the next ones, up to a number; then the one unused the longest
goes, unless somebody else uses it (`may_hang_up`). The other end may do the same at any moment, so a question
on a connection that was there before and fails is asked once more over a fresh one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import trio

from mycel.dht.kad.message import ADDRS_MAX, FOREIGN_PROTOCOL, Kind, Message, read, write
from mycel.dht.kad.pace import Pace
from mycel.dht.kad.table import Contact, Table
from mycel.protocol import varint
from mycel.protocol.address import is_circuit, tcp_of
from mycel.protocol.errors import (
    AddressError,
    ConnectionLost,
    DeadlineExceeded,
    DialError,
    LimitExceeded,
    Refused,
    RemoteProtocolError,
    StreamReset,
)
from mycel.protocol.identify import read_addrs
from mycel.protocol.limits import KadLimits
from mycel.protocol.mesh import Access, Mesh, PeerId, PeerInfo, Stream

FAILURES = (
    AddressError,
    ConnectionLost,
    DeadlineExceeded,
    DialError,
    LimitExceeded,
    Refused,
    RemoteProtocolError,
    StreamReset,
)
"""How a question may end that is the peer's affair, or the way's."""


class Asker:
    """Asks peers."""

    def __init__(self, mesh: Mesh, table: Table, protocols: tuple[str, ...], limits: KadLimits) -> None:
        self._mesh = mesh
        self.own = mesh.peer_id
        self._table = table
        self._protocols = protocols
        self._limits = limits
        self._opened: dict[PeerId, None] = {}
        self._in_use: dict[PeerId, int] = {}
        self._heard_at = float("-inf")
        self._doubted: dict[PeerId, None] = {}
        self._met: dict[PeerId, PeerInfo] = {}
        self.may_hang_up: Callable[[PeerId], bool] = lambda peer: True
        """Whether nobody else needs the connection to a peer."""
        self.can_lead: Callable[[str], bool] = lambda addr: True
        """Whether an address that others told may lead anywhere from where this node is."""
        self.pace = Pace(limits)
        self.asked = self.unanswered = self.bytes = 0

    def late_at(self, peer: PeerId) -> float:
        """When a question that is asked now will be late: at once where the peer's last one failed."""
        if peer in self._doubted:
            return trio.current_time()
        rtt, dial = self._mesh.rtt(peer), peer not in self._mesh.peers
        return trio.current_time() + self.pace.late_s(peer, rtt=rtt, dial=dial)

    async def ask(self, contact: Contact, question: Message) -> Message | None:
        """The answer of `contact`, None where none came in time or none that can be read."""
        peer, began = contact.peer, trio.current_time()
        dial = peer not in self._mesh.peers
        answer: Message | None = None
        self.asked += 1
        self._in_use[peer] = self._in_use.get(peer, 0) + 1
        try:
            with trio.move_on_after(self.pace.answer_s(peer, rtt=self._mesh.rtt(peer), dial=dial)):
                try:
                    answer = await self._try(contact, question)
                except ConnectionLost:
                    if not dial:
                        dial, began = True, trio.current_time()
                        answer = await self._try(contact, question)
        except FAILURES:
            pass
        finally:
            self._in_use[peer] -= 1
            if not self._in_use[peer]:
                del self._in_use[peer]
                self._close_unused()
        now = trio.current_time()
        if answer is None:
            self.unanswered += 1
            self.doubt(peer)
            if self._heard_at > began:
                self._table.on_failure(peer)
            return None
        self._heard_at = now
        self.pace.answered(peer, now - began, dialled=dial)
        self.heard(peer)
        return answer

    def doubt(self, peer: PeerId) -> None:
        """Let questions to `peer` hold nothing up until it was heard again."""
        self._doubted[peer] = None
        if len(self._doubted) > self._limits.known_paces:
            del self._doubted[next(iter(self._doubted))]

    def heard(self, peer: PeerId) -> Contact:
        """A peer that answers questions was heard of; its contact."""
        self._doubted.pop(peer, None)
        info = self._mesh.peers.get(peer)
        if info is None:
            return Contact(peer)
        contact = contact_of(info)
        if self._answers(info):
            self._table.on_alive(contact, host_of(info), trio.current_time())
        elif is_identified(info):
            self._table.forget(peer)  # it says that it answers no questions, or no more
        self.touch(peer)
        return contact

    def meet(self) -> None:
        """Take connected peers that answer questions for known."""
        for peer in list(self._mesh.peers):
            self.heard(peer)

    def meet_changed(self) -> None:
        """As `meet`, for those of whom something is new since the last time."""
        before, self._met = self._met, dict(self._mesh.peers)
        for peer, info in self._met.items():
            if before.get(peer) is not info:
                self.heard(peer)

    def _answers(self, info: PeerInfo) -> bool:
        return any(access_to(name) <= info.access and name in info.protocols for name in self._protocols)

    def touch(self, peer: PeerId) -> None:
        """The connection to `peer` was of use, to either side."""
        if peer in self._opened:
            del self._opened[peer]
            self._opened[peer] = None

    async def connect(self, contact: Contact) -> None:
        """Be connected with `contact`, for as long as it is of use. Raises as `Mesh.connect` does."""
        if contact.peer not in self._mesh.peers:
            await self._mesh.connect([addr for addr in dialable(contact) if self.can_lead(addr)])
            self._opened[contact.peer] = None
            self._close_unused()

    async def _try(self, contact: Contact, question: Message) -> Message:
        peer = contact.peer
        await self.connect(contact)
        info = self._mesh.peers.get(peer)
        if info is not None and is_identified(info) and not self._answers(info):
            self._table.forget(peer)
            raise Refused(f"{peer} answers no questions", reason="protocol")
        stream = await self._mesh.open_stream(peer, self._protocol(peer))
        done = False
        try:
            answer = await self._exchange(stream, question)
            done = True
            return answer
        finally:
            if done:
                await stream.aclose()
            else:
                stream.reset()

    async def _exchange(self, stream: Stream, question: Message) -> Message:
        """Send and hear.

        js-libp2p gives a stream up whose end came with the question, so over libp2p's own protocol the end
        comes later; there `ADD_PROVIDER` has no answer, and that of a ping sent after it shows that it was
        taken.
        """
        is_foreign = stream.protocol == FOREIGN_PROTOCOL
        raw, kind = write(question), question.kind
        if is_foreign and kind is Kind.ADD_PROVIDER:
            raw, kind = raw + write(Message(Kind.PING)), Kind.PING
        self.bytes += len(raw)
        await stream.send(raw, end=not is_foreign)
        data = b""
        while (cut := varint.split_prefixed(data, self._limits.message_bytes)) is None:
            piece = await stream.receive_some()
            if not piece:
                raise RemoteProtocolError("the stream ended without an answer")
            data += piece
        self.bytes += len(data)
        answer = read(cut[0], self._limits)
        if answer.kind is not kind:
            raise RemoteProtocolError(f"asked {kind.name}, answered {answer.kind.name}")
        return question if kind is not question.kind else answer

    def _protocol(self, peer: PeerId) -> str:
        """What `peer` speaks of what this node speaks; Mycel's own where it did not say."""
        info = self._mesh.peers.get(peer)
        spoken = () if info is None else info.protocols
        return next((name for name in self._protocols if name in spoken), self._protocols[0])

    def _close_unused(self) -> None:
        for peer in list(self._opened):
            if len(self._opened) <= self._limits.connections:
                return
            if peer not in self._in_use and self.may_hang_up(peer):
                del self._opened[peer]
                self._mesh.disconnect(peer, "unused")

    def lost(self, peer: PeerId, reason: str) -> None:
        """The connection to `peer` is over, for a reason as in `ConnectionLost`."""
        self._opened.pop(peer, None)
        if reason == "left":
            self._table.forget(peer)
        elif reason in ("silent", "reset"):
            self.doubt(peer)
            if self._mesh.peers:  # else it is rather this node that is off the net
                self._table.on_failure(peer)


def access_to(protocol: str) -> Access:
    """Who may ask over `protocol`: members, and over libp2p's own, where it is served, anybody."""
    return Access.STRANGER if protocol == FOREIGN_PROTOCOL else Access.MEMBER


def is_identified(info: PeerInfo) -> bool:
    """Whether the peer said what it serves."""
    return bool(info.agent or info.protocols)


def contact_of(info: PeerInfo) -> Contact:
    """A connected peer as others may be told of it."""
    return Contact(info.peer, tuple(addr.to_bytes() for addr in info.listen_addrs[:ADDRS_MAX]))


def host_of(info: PeerInfo) -> str:
    """The IP address a peer is seen at, "" behind a relay."""
    try:
        return "" if is_circuit(info.addr) else tcp_of(info.addr).host
    except AddressError:
        return ""


def dialable(contact: Contact) -> list[str]:
    """Where `contact` can be dialled, its id at the end of each. Raises `DialError` where nobody knows."""
    addrs = [_dialable(raw, contact.peer) for raw in contact.addrs]
    found = [addr for addr in addrs if addr]
    if not found:
        raise DialError(f"no address of {contact.peer} is known")
    return found


@functools.lru_cache(maxsize=16384)
def _dialable(raw: bytes, peer: PeerId) -> str:
    (addr,) = read_addrs([raw]) or (None,)
    if addr is None:
        return ""
    text, ending = str(addr), f"/p2p/{peer}"
    return text if text.endswith(ending) else text + ending
