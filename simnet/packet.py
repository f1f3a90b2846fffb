"""What crosses the simulated internet one by one: the segments of a handshake, and resets.

Data travels as a `Flow`, chunk by chunk; where boxes stand on its way, each chunk is shown to them as a
packet of its own. TCP tells segments of one connection from leftovers of another by sequence numbers; here a
packet names the connection end that sent it, and the one that it answers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from mycel.simnet.tcp import Opening

Address = tuple[str, int]
"""An IP address and a port."""

SYN, SYN_ACK, ACK, DATA, FIN, RST = "syn", "syn-ack", "ack", "data", "fin", "rst"


class Packet(NamedTuple):
    """A TCP segment under way. Boxes rewrite its addresses and nothing else."""

    kind: str
    source: Address
    target: Address
    sender: Opening | None = None
    """Which end of a connection it comes from; None where a box made it."""
    about: Opening | None = None
    """Which end it answers: whose SYN an ACK acknowledges, whom a reset is for."""

    def answer_reset(self) -> Packet:
        """The reset that refuses this packet, from the address that it was sent to."""
        return Packet(RST, self.target, self.source, about=self.sender)
