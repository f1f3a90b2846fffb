"""What a stateful box knows of one connection: the states that Linux's connection tracking gives TCP.

A box sees the segments of both directions and follows them. What matters for reaching somebody: a SYN that
comes from the other side while ours is unanswered belongs to the connection (simultaneous open, RFC 9293
section 3.5, figure 7), a reset ends it, and then only who opened it may open it again at once. Segments that
fit no state are invalid: they are treated like those of a stranger.

The transitions and waiting times are those of the kernel's nf_conntrack_proto_tcp (its loose pick-up of a
connection in mid-stream included), with its four states of a closing connection drawn together to two.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from mycel.simnet.packet import ACK, DATA, FIN, RST, SYN, SYN_ACK, Address


class State(StrEnum):
    """How far a connection has come. "Forward" is the direction of whoever opened it."""

    SYN_SENT = "syn sent"
    SYN_BOTH = "both sent a syn"
    SYN_RECEIVED = "syn received"
    ESTABLISHED = "established"
    FIN_FORWARD = "opener finished"
    FIN_BACKWARD = "answerer finished"
    TIME_WAIT = "time wait"
    CLOSED = "closed"


WAITS_S = {
    State.SYN_SENT: 120.0,
    State.SYN_BOTH: 120.0,
    State.SYN_RECEIVED: 60.0,
    State.FIN_FORWARD: 120.0,
    State.FIN_BACKWARD: 120.0,
    State.TIME_WAIT: 120.0,
    State.CLOSED: 10.0,
}
"""How long a connection is remembered in each state without a packet; the box's kind says it for the rest."""

_FORWARD = {
    (SYN, State.SYN_SENT): State.SYN_SENT,
    (SYN, State.SYN_BOTH): State.SYN_BOTH,
    (SYN_ACK, State.SYN_BOTH): State.SYN_RECEIVED,
    (SYN_ACK, State.SYN_RECEIVED): State.SYN_RECEIVED,
    (ACK, State.SYN_RECEIVED): State.ESTABLISHED,
    (FIN, State.SYN_RECEIVED): State.FIN_FORWARD,
    (FIN, State.ESTABLISHED): State.FIN_FORWARD,
    (FIN, State.FIN_BACKWARD): State.TIME_WAIT,
}
_BACKWARD = {
    (SYN, State.SYN_SENT): State.SYN_BOTH,
    (SYN, State.SYN_BOTH): State.SYN_BOTH,
    (SYN_ACK, State.SYN_SENT): State.SYN_RECEIVED,
    (SYN_ACK, State.SYN_BOTH): State.SYN_RECEIVED,
    (FIN, State.SYN_RECEIVED): State.FIN_BACKWARD,
    (FIN, State.ESTABLISHED): State.FIN_BACKWARD,
    (FIN, State.FIN_FORWARD): State.TIME_WAIT,
}
_INVALID_FORWARD = {
    SYN_ACK: tuple(state for state in State if state not in (State.SYN_BOTH, State.SYN_RECEIVED)),
    ACK: (State.SYN_SENT, State.SYN_BOTH),
    FIN: (State.SYN_SENT, State.SYN_BOTH),
}
_INVALID_BACKWARD = {
    SYN: tuple(state for state in State if state not in (State.SYN_SENT, State.SYN_BOTH)),
    FIN: (State.SYN_SENT, State.SYN_BOTH),
}


def follow(state: State, kind: str, *, forward: bool) -> State | None:
    """The state after a packet of `kind` has passed in that direction; None where it is invalid."""
    kind = ACK if kind == DATA else kind
    if kind == RST:
        return State.CLOSED
    invalid = _INVALID_FORWARD if forward else _INVALID_BACKWARD
    if state in invalid.get(kind, ()):
        return None
    return (_FORWARD if forward else _BACKWARD).get((kind, state), state)


def may_reopen(state: State, *, forward: bool) -> bool:
    """Whether a SYN in that direction begins a new connection between the same two addresses."""
    return state is State.TIME_WAIT or (forward and state is State.CLOSED)


@dataclass(slots=True)
class Track:
    """One connection through one box."""

    inside: Address
    outside: Address
    peer: Address
    from_inside: bool
    """Whether the inside opened it."""
    state: State
    expires: float

    def pass_through(self, kind: str, outward: bool, now: float, idle_s: float) -> bool:
        """Follow one packet. False where it is invalid."""
        after = follow(self.state, kind, forward=outward == self.from_inside)
        if after is None:
            return False
        self.state = after
        self.expires = now + WAITS_S.get(after, idle_s)
        return True
