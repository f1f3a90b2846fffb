"""Bounds of reaching peers: relays, hole punching, and finding out how others see this node.

As in `mycel.protocol.limits`: each with its unit and the reason for its size.
"""

from __future__ import annotations

from dataclasses import dataclass

from mycel.protocol.limits import KIB, MIB


@dataclass(frozen=True, slots=True)
class PunchLimits:
    """Bounds of hole punching (`mycel.protocol.punch`, `mycel.protocol.dcutr`)."""

    message_bytes: int = 4 * KIB
    """One message about a punch; libp2p's own bound for DCUtR. Ours take under 1 KiB."""

    step_s: float = 5.0
    """Until the other side's next message: a round trip over two slow relayed lines, and an address echo."""

    learn_s: float = 3.0
    """For this side's own mapping: two connections to an echo at 500 ms, and one SYN lost."""

    plain_s: float = 2.0
    """For dialling an address that the other side holds for public: one SYN lost."""

    window_s: float = 3.0
    """For both sides dialling and accepting on one port each: the kernel repeats a SYN after 1 s and 3 s."""

    redial_s: float = 0.02
    """Pause before a target that refused is dialled again; it doubles each time..."""

    redial_max_s: float = 0.25
    """...up to this. A NAT that answers RST does so only until the other side's first SYN has left."""

    targets: int = 8
    """Addresses dialled in one punch: what a lying peer can make this node knock at."""

    redials: int = 16
    """Dials of one target in one punch, all refusals included."""

    proof_s: float = 2.0
    """A socket on the punched port that has not proven itself by then is a stranger's."""

    sockets: int = 16
    """Sockets on the punched port that are in proof at once."""

    settle_s: float = 5.0
    """From a proven socket to a connection of the host: the handshake."""

    serving: int = 32
    """Exchanges that others began and that this node takes part in at once."""

    again_s: float = 5.0
    """Wait before a failed punch is tried again; it grows fourfold each time..."""

    again_max_s: float = 3600.0
    """...up to this, which is also the wait where it cannot work: NATs change with the network."""

    yield_s: float = 4.0
    """How long the peer whose turn it is not waits for the other one to begin."""

    return_s: float = 0.5
    """Between tries to get back over a relay when a direct connection died; it doubles."""

    returns: int = 4
    """Such tries, of which the first is made at once; then the peer is redialled like any contact."""


DEFAULT_PUNCH_LIMITS = PunchLimits()


@dataclass(frozen=True, slots=True)
class ReachLimits:
    """Bounds of finding out how others see this node (`mycel.protocol.echo`, `mycel.protocol.dialback`)."""

    echo_s: float = 3.0
    """From the question to a proven answer: three round trips at 500 ms, and one SYN lost."""

    echo_key_s: float = 10.0
    """Life of an echo key: the asker connects at once."""

    echo_keys: int = 1024
    """Echo keys given and not used up, all askers together; 200 bytes each."""

    echo_keys_per_peer: int = 8
    """Of one asker: several punches at once."""

    echo_sockets: int = 256
    """Connections on the echo ports at once, strangers' included; more are reset unanswered."""

    echo_hold_s: float = 15.0
    """How long an asker may keep an answered echo connection open, so that no NAT forgets its mapping."""

    knock_s: float = 4.0
    """A dial-back's TCP connect: two SYNs lost."""

    dialback_s: float = 12.0
    """A whole dial-back through a third peer: a connect, a handshake and the membership exchange."""

    dialback_message_bytes: int = 4 * KIB
    """One message about a dial-back: four addresses and a peer id."""

    dialbacks: int = 16
    """Dial-backs under way here for others at once, and..."""

    dialback_every_s: float = 1.0
    """...the shortest time between two for one peer: what a member can make this node knock at."""


DEFAULT_REACH_LIMITS = ReachLimits()


@dataclass(frozen=True, slots=True)
class RelayLimits:
    """Bounds of relaying for others and of being relayed; 0 means none where it says so."""

    reservations: int = 1024
    """Peers that may be reached through this node. Each is a connection, about 100 kB."""

    reservation_s: float = 3600.0
    """Life of a reservation; libp2p's custom. It ends at once when its peer goes."""

    circuits: int = 256
    """Circuits at once, all peers together. One holds 640 KiB at the very most (in each direction a window
    that nobody empties, and a piece on its way), so all hold 160 MiB and `window_pool`; in good times next
    to nothing."""

    circuits_per_peer: int = 64
    """Circuits of which one peer is an end: a swarm of as many that talks to a peer behind a NAT."""

    bytes_per_s: int = 64 * MIB
    """All circuits together, both directions (0: as fast as it goes): half of a gigabit line, twice
    through it."""

    bytes_per_s_per_peer: int = 16 * MIB
    """Circuits of one peer together (0: as fast as it goes): hidden states of a busy stage fit many times."""

    circuit_s: float = 0.0
    """Life of a circuit between members (0: as long as they like)..."""

    circuit_bytes: int = 0
    """...and bytes in each direction (0: as many as they like)."""

    stranger_circuit_s: float = 600.0
    """Life of a circuit with a stranger at an end: time to find a direct way, or for a chat..."""

    stranger_circuit_bytes: int = 16 * MIB
    """...and bytes in each direction. go-libp2p gives 128 KiB and 2 minutes."""

    window: int = 4 * MIB
    """What a receive window of a circuit may grow to at the relay: 40 MB/s at 100 ms..."""

    window_pool: int = 64 * MIB
    """...as long as the growth of all of them together stays within this."""

    pending: int = 128
    """Circuits in the making at once, at a relay or at a peer that is reached through one."""

    request_s: float = 5.0
    """For a request and its answer, at each hop."""

    retry_s: float = 1.0
    """How soon a relay that gave no reservation is asked again; doubles with each failure..."""

    retry_max_s: float = 300.0
    """...up to this."""


DEFAULT_RELAY_LIMITS = RelayLimits()
