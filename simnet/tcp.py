"""TCP's handshake on the simulated internet, segment by segment (RFC 9293, section 3.5).

An `Opening` is one end of a connection that is being made: a dial, or what a listener made of a SYN. The
usual way is SYN, SYN-ACK, ACK: the dialler's pipe is ready after one round trip, the acceptor's half a round
trip later, accepted or not. When two dials cross, each from the port that the other one calls, each takes the
other's SYN for its own connection's and answers with a SYN-ACK: a simultaneous open, one connection, no
listener needed; and where a listener shares the port, the dial comes first, as in Linux.

A SYN or SYN-ACK that nothing answers is sent again after 1, 2, 4, ... s. A segment that fits nothing here is
answered by a reset, which ends whatever sent it. The two flows of a connection are made by the end that
answers a SYN; its partner takes them over when it hears of it.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

import trio

from mycel.protocol.address import tcp_addr
from mycel.protocol.errors import DialError
from mycel.simnet.flow import Flow
from mycel.simnet.packet import ACK, RST, SYN, SYN_ACK, Address, Packet
from mycel.simnet.park import Park
from mycel.simnet.pipe import SimPipe

if TYPE_CHECKING:
    from mycel.simnet.machine import Machine, SimListener
    from mycel.simnet.wire import Trip

RETRY_S = 1.0
"""Until the first repetition of an unanswered segment; each next wait is double (RFC 6298)."""

SYN_TRIES = 7
"""One SYN and six repetitions (Linux: tcp_syn_retries): 127 s."""

SYN_ACK_TRIES = 6
"""One SYN-ACK and five repetitions (Linux: tcp_synack_retries): 63 s."""

Key = tuple[Address, Address]
"""Both addresses of a connection as one machine sees them, its own first."""


class Stage(StrEnum):
    """How far one end has come."""

    CALLING = "a syn was sent"
    ANSWERING = "a syn came and was answered"
    OPEN = "open"
    OVER = "failed or given up"


class Opening:
    """One end of a connection that is being made, and afterwards what its segments are known by."""

    def __init__(self, machine: Machine, near: Address, far: Address, listener: SimListener | None) -> None:
        """`listener`: whom the connection is for, None for a dial."""
        self.machine = machine
        self.near = near
        self.far = far
        self.stage = Stage.CALLING
        self.partner: Opening | None = None
        self.pipe: SimPipe | None = None
        self.partner_pipe: SimPipe | None = None
        self._listener = listener
        self._tries = 0
        self._failure = ""
        self._park = Park("a dial")

    def __repr__(self) -> str:
        return f"<Opening {self.near} {self.far} {self.stage}>"

    async def finish(self) -> SimPipe:
        """Dial. Raises `DialError`. Cancelled: the other end sees a reset when it answers."""
        self.repeat()
        try:
            while self.stage in (Stage.CALLING, Stage.ANSWERING):
                await self._park.wait()
        except trio.Cancelled:
            self._give_up()
            raise
        if self.stage is Stage.OVER or self.pipe is None:
            raise DialError(f"cannot reach {tcp_addr(*self.far)}: {self._failure}")
        return self.pipe

    def repeat(self) -> None:
        """Say again what nobody has answered, and keep at it."""
        if self.stage not in (Stage.CALLING, Stage.ANSWERING):
            return
        if self._tries == (SYN_TRIES if self._listener is None else SYN_ACK_TRIES):
            self.fail("Connection timed out")
            return
        if self.stage is Stage.CALLING:
            self._say(SYN)
        else:
            self._say(SYN_ACK, self.partner)
        self.machine.internet.timeline.after(RETRY_S * 2**self._tries, self.repeat)
        self._tries += 1

    def answer(self, partner: Opening, trip: Trip) -> None:
        """A SYN came from `partner`: make the connection's two flows and answer it."""
        self.stage = Stage.ANSWERING
        self.partner = partner
        if partner.partner is self and partner.pipe is not None:
            self.pipe, self.partner_pipe = partner.partner_pipe, partner.pipe
        else:
            self._make_pipes(partner, trip)
        assert self.pipe is not None
        self.pipe.await_first(self._on_data)

    def _make_pipes(self, partner: Opening, trip: Trip) -> None:
        path_there, path_back = self.machine.internet.wire.paths(trip, partner, self)
        names = f"{partner.near[0]}:{partner.near[1]}", f"{partner.far[0]}:{partner.far[1]}"
        there = Flow(f"{names[0]}>{names[1]}", partner.machine, self.machine, path_there)
        back = Flow(f"{names[1]}>{names[0]}", self.machine, partner.machine, path_back)
        self.partner_pipe = SimPipe(partner, there, back)
        self.pipe = SimPipe(self, back, there)

    # -- what arrives ------------------------------------------------------------------------------------

    def on_packet(self, packet: Packet, trip: Trip) -> None:
        """A segment between this end's two addresses."""
        if packet.kind == SYN:
            self._on_syn(packet, trip)
        elif packet.kind == SYN_ACK:
            self._on_syn_ack(packet)
        elif packet.kind == ACK:
            self._on_ack(packet)
        else:
            self._on_reset(packet)

    def _on_syn(self, packet: Packet, trip: Trip) -> None:
        assert packet.sender is not None
        if self.stage is Stage.CALLING and packet.sender is not self:
            self.answer(packet.sender, trip)
            self._say(SYN_ACK, self.partner)
        elif self.stage is Stage.CALLING:
            # A free port that dials itself would be connected to itself; a network calls that refused.
            self.fail("Connection refused")
        elif self.stage is Stage.ANSWERING and packet.sender is self.partner:
            self._say(SYN_ACK, self.partner)
        else:
            # RFC 5961, section 4: whoever sent it resets this end if it is what is left of an old connection.
            self._say(ACK, self.partner)

    def _on_syn_ack(self, packet: Packet) -> None:
        if packet.about is not self:
            if self.stage in (Stage.CALLING, Stage.ANSWERING):
                self.machine.tcp.refuse(packet)
            return
        if self.stage is Stage.CALLING and packet.sender is not None:
            self.partner = packet.sender
            self.pipe = packet.sender.partner_pipe
        if self.stage is not Stage.OPEN:
            self._open(say=True)
        else:
            self._say(ACK, self.partner)

    def _on_ack(self, packet: Packet) -> None:
        if packet.about is self and self.stage is Stage.ANSWERING:
            self._open()
        elif packet.about is not self and self.stage is Stage.CALLING:
            self.machine.tcp.refuse(packet)

    def _on_data(self) -> None:
        """Data came before the ACK, and acknowledges as well as that; too late, it is refused."""
        if self.stage is Stage.ANSWERING:
            self._open()
        elif self.stage is Stage.OVER and self.pipe is not None:
            self.pipe.reset()

    def _on_reset(self, packet: Packet) -> None:
        if packet.about is not self:
            return
        if self.stage is Stage.OPEN and self.pipe is not None:
            self.pipe.on_reset("connection reset by peer")
        else:
            self.fail("Connection refused")

    def on_unreachable(self) -> None:
        """A router said that nobody has the address."""
        self.fail("No route to host")

    # -- ends --------------------------------------------------------------------------------------------

    def _open(self, say: bool = False) -> None:
        assert self.pipe is not None
        self.stage = Stage.OPEN
        self.machine.tcp.forget(self)
        self.machine.own_pipe(self.pipe)
        self.pipe.open()
        if say:
            self._say(ACK, self.partner)
        if self._listener is not None:
            self._listener.admit(self.pipe)
        self._park.wake()

    def fail(self, why: str) -> None:
        """It will come to nothing. A listener never hears of it."""
        if self.stage not in (Stage.CALLING, Stage.ANSWERING):
            return
        self.stage = Stage.OVER
        self._failure = why
        self.machine.tcp.forget(self)
        if self._listener is not None:
            self._listener.coming -= 1
        self._park.wake()

    def _give_up(self) -> None:
        """The dial was cancelled. The other end is told when it says something next."""
        self.fail("the dial was given up")
        if self.stage is Stage.OPEN and self.pipe is not None:
            self.pipe.reset()

    def _say(self, kind: str, about: Opening | None = None) -> None:
        self.machine.internet.wire.send(Packet(kind, self.near, self.far, self, about), self.machine)


class Tcp:
    """A machine's kernel, as far as handshakes go: which segment is for whom."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.openings: dict[Key, Opening] = {}

    def dial(self, near: Address, far: Address) -> Opening:
        """A dial between two addresses that nothing here uses yet. It begins with `finish`."""
        opening = self.openings[near, far] = Opening(self._machine, near, far, None)
        return opening

    def receive(self, packet: Packet, trip: Trip) -> None:
        """A segment arrived."""
        machine = self._machine
        if packet.kind == SYN and trip.origin is not None:
            machine.internet.trace.note("syn", trip.origin.name, machine.name, packet.target[1])
        key = packet.target, packet.source
        end = self.openings.get(key)
        if end is None and (pipe := machine.pipe_at(key)) is not None:
            end = pipe.opening
        if end is not None:
            end.on_packet(packet, trip)
        elif packet.kind == SYN and packet.sender is not None:
            self._on_newcomer(packet, packet.sender, trip)
        else:
            self.refuse(packet)

    def _on_newcomer(self, packet: Packet, sender: Opening, trip: Trip) -> None:
        listener = self._machine.listener_at(*packet.target)
        if listener is None:
            self.refuse(packet)
        elif not listener.is_full:
            opening = Opening(self._machine, packet.target, packet.source, listener)
            self.openings[packet.target, packet.source] = opening
            listener.coming += 1
            opening.answer(sender, trip)
            opening.repeat()

    def refuse(self, packet: Packet) -> None:
        """Answer what belongs to nothing here with a reset; a reset itself gets no answer."""
        if packet.kind != RST:
            self._machine.internet.wire.send(packet.answer_reset(), self._machine)

    def forget(self, opening: Opening) -> None:
        """It is open, or over."""
        if self.openings.get((opening.near, opening.far)) is opening:
            del self.openings[opening.near, opening.far]

    def drop_all(self, why: str) -> None:
        """The programs here are gone, or the power is."""
        for opening in list(self.openings.values()):
            opening.fail(why)
