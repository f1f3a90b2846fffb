"""Asking one peer one question: dial it if need be, open a stream, send, hear the answer (`Question`).

What comes of it is noted where others look: the table learns who is alive and who is not, the pace how long
it took. A failure counts against a peer only when somebody else was heard since it was asked; otherwise it
may well be this node that is off the net, which should not cost it everybody it knows.

Connections that questions opened are kept for the next ones, up to a number; then the one unused the longest
goes, unless somebody else uses it (`may_hang_up`). The other end may do the same at any moment, so a question
on a connection that was there before and fails is asked once more over a fresh one.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

import trio

from mycel.dht.kad.message import ADDRS_MAX, FOREIGN_PROTOCOL, Message
from mycel.dht.kad.pace import Pace
from mycel.dht.kad.question import Question
from mycel.dht.kad.table import Contact, Table
from mycel.protocol.address import is_circuit, tcp_of
from mycel.protocol.alarm import Alarm
from mycel.protocol.errors import (
    AddressError,
    ConnectionLost,
    DeadlineExceeded,
    DialError,
    LimitExceeded,
    LocalProtocolError,
    Refused,
    RemoteProtocolError,
    StreamReset,
)
from mycel.protocol.identify import read_addrs
from mycel.protocol.limits import KadLimits
from mycel.protocol.mesh import Access, Mesh, PeerId, PeerInfo

FAILURES = (
    AddressError,
    ConnectionLost,
    DeadlineExceeded,
    DialError,
    LimitExceeded,
    LocalProtocolError,
    Refused,
    RemoteProtocolError,
    StreamReset,
)
"""How a question may end that is the peer's affair, or the way's."""


NOT_RUNNING = "Kademlia.run is not running; start it before asking"

Then = Callable[[Message | None], None]
"""Called with the answer, or with None where none came in time or none that can be read."""


@dataclass(frozen=True, slots=True)
class Face:
    """What a connection says of its peer."""

    info: PeerInfo
    contact: Contact
    host: str
    protocol: str
    """What it is asked over; Mycel's own where it did not say what it speaks."""
    answers: bool
    """Whether it answers this node's questions."""


class Asker:
    """Asks peers. Its tasks live in a nursery of the service (`lives_in`), its deadlines in `alarm`."""

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
        self._faces: dict[PeerId, Face] = {}
        self._nursery: trio.Nursery | None = None
        self.alarm = Alarm()
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

    def lives_in(self, nursery: trio.Nursery | None) -> None:
        """Where dials and deadlines live."""
        self._nursery = nursery
        if nursery is not None:
            nursery.start_soon(self.alarm.run)

    def start(self, task: Callable[[], Awaitable[object]]) -> None:
        """Run `task` beside everything else. Raises `LocalProtocolError` where the service does not run."""
        if self._nursery is None:
            raise LocalProtocolError(NOT_RUNNING)
        self._nursery.start_soon(task)

    async def ask(self, contact: Contact, message: Message) -> Message | None:
        """The answer of `contact`, None where none came in time or none that can be read."""
        over = trio.Event()
        answers: list[Message | None] = []

        def then(answer: Message | None) -> None:
            answers.append(answer)
            over.set()

        self.ask_soon(contact, message, then)
        await over.wait()
        return answers[0]

    def ask_soon(self, contact: Contact, message: Message, then: Then = lambda answer: None) -> None:
        """Ask without waiting; `then` is called from elsewhere. Raises `LocalProtocolError` as `start`."""
        if self._nursery is None:
            raise LocalProtocolError(NOT_RUNNING)
        peer = contact.peer
        self.asked += 1
        alarm = (self.alarm, self.asked)
        question = Question(contact, message, partial(self._over, then), alarm, self._limits)
        question.dialled = peer not in self._mesh.peers
        patience = self.pace.answer_s(peer, rtt=self._mesh.rtt(peer), dial=question.dialled)
        self._in_use[peer] = self._in_use.get(peer, 0) + 1
        question.watch(question.began + patience)
        if question.dialled or not self._try(question):
            self.start(partial(self._dial, question))

    def _try(self, question: Question) -> bool:
        """Whether the question could be put at once."""
        peer = question.contact.peer
        info = self._mesh.peers.get(peer)
        if info is None or not self._may_answer(info):
            return False
        try:
            stream = self._mesh.try_open_stream(peer, self._face(info).protocol)
            return stream is not None and question.try_send(stream)
        except FAILURES:
            return False  # the task will see why

    async def _dial(self, question: Question) -> None:
        """Put the question, whatever that takes; its deadline cancels this."""
        peer = question.contact.peer
        with trio.CancelScope() as question.scope:
            try:
                if question.is_over:
                    return
                question.dialled = peer not in self._mesh.peers
                await self.connect(question.contact)
                if question.is_over or self._try(question):
                    return
                info = self._mesh.peers.get(peer)
                if info is None:
                    raise ConnectionLost(f"{peer} hung up at once", reason="closed")
                if not self._may_answer(info):
                    self._table.forget(peer)
                    raise Refused(f"{peer} answers no questions", reason="protocol")
                await question.send(await self._mesh.open_stream(peer, self._face(info).protocol))
            except FAILURES as error:
                question.fail(error)

    def _over(self, then: Then, question: Question, answer: Message | None, error: Exception | None) -> None:
        """A question ended, unless its connection did that had been there before: then once more."""
        peer, now = question.contact.peer, trio.current_time()
        if isinstance(error, ConnectionLost) and not question.dialled and self._nursery is not None:
            question.again()
            question.watch(question.until)
            self.start(partial(self._dial, question))
            return
        self.bytes += question.bytes
        self._in_use[peer] -= 1
        if not self._in_use[peer]:
            del self._in_use[peer]
            self._close_unused()
        if answer is None:
            self.unanswered += 1
            self.doubt(peer)
            if self._heard_at > question.began:
                self._table.on_failure(peer)
        else:
            self._heard_at = now
            self.pace.answered(peer, now - question.began, dialled=question.dialled)
            self.heard(peer)
        then(answer)

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
        face = self._face(info)
        if face.answers:
            self._table.on_alive(face.contact, face.host, trio.current_time())
        elif is_identified(info):
            self._table.forget(peer)  # it says that it answers no questions, or no more
        self.touch(peer)
        return face.contact

    def _face(self, info: PeerInfo) -> Face:
        face = self._faces.get(info.peer)
        if face is None or face.info is not info:
            spoken = next((name for name in self._protocols if name in info.protocols), self._protocols[0])
            face = Face(info, contact_of(info), host_of(info), spoken, self._answers(info))
            self._faces[info.peer] = face
        return face

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

    def _may_answer(self, info: PeerInfo) -> bool:
        """Whether it answers, or did not say yet what it speaks."""
        return not is_identified(info) or self._face(info).answers

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

    def _close_unused(self) -> None:
        if len(self._opened) <= self._limits.connections:
            return
        for peer in list(self._opened):
            if len(self._opened) <= self._limits.connections:
                return
            if peer not in self._in_use and self.may_hang_up(peer):
                del self._opened[peer]
                self._mesh.disconnect(peer, "unused")

    def lost(self, peer: PeerId, reason: str) -> None:
        """The connection to `peer` is over, for a reason as in `ConnectionLost`."""
        self._opened.pop(peer, None)
        self._faces.pop(peer, None)
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
