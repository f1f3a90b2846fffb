"""Every bound in one place, each with its unit and the reason for its size.

A queue, frame, table or task count anywhere in Mycel takes its bound from here. `Limits` is handed to
the connection core at construction, so that a test or an owner can tighten one without patching.
"""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of the connection core (seconds, bytes, counts)."""

    dial_s: float = 5.0
    """TCP connect. Three SYN retransmissions fit; a dead address costs no more than this."""

    handshake_s: float = 5.0
    """From the first byte to a multiplexed connection: four round trips at 1 s each and some arithmetic."""

    membership_s: float = 5.0
    """From a multiplexed connection to settled membership; one round trip and two signatures."""

    negotiate_s: float = 10.0
    """How long an inbound stream may take to name its protocol."""

    keepalive_s: float = 0.5
    """An idle connection pings this often..."""

    silence_s: float = 2.0
    """...and is dead when nothing at all arrived for this long after a ping (notice in under 3 s)."""

    drain_s: float = 10.0
    """How long streams may go on over a connection that another one to the same peer replaced."""

    connections: int = 1024
    """Connections at once; each costs about 100 kB and two file descriptors at most."""

    pending_handshakes: int = 128
    """Inbound connections in handshake at once: what a flood of strangers can make us hold."""

    connections_per_ip: int = 256
    """Inbound connections of one address: generous for carrier NATs, short of all."""

    streams: int = 4096
    """Open streams per connection and direction."""

    stream_window_min: int = 256 * KIB
    """yamux's initial window; a fresh stream may send this much unasked."""

    stream_window_max: int = 64 * MIB
    """What a window may grow to: 1 Gbit/s at 500 ms."""

    connection_window_max: int = 128 * MIB
    """What one peer can make this node buffer over all its streams."""

    output_bytes: int = 4 * MIB
    """Bytes enqueued towards one peer before senders wait."""

    multistream_message: int = 1024
    """A protocol name and its newline; libp2p's own bound."""

    events: int = 4096
    """Peer events a slow watcher may lag behind."""

    membership_bytes: int = 4 * KIB
    """One message of the membership exchange; a chain and a fresh certificate take under 1 KiB."""

    clock_skew_s: float = 300.0
    """How far two machines' calendar clocks may differ when certificates are judged: a laptop that has
    not met a time server for months is off by seconds to a few minutes."""

    certificate_s: float = 365 * 86400.0
    """Life of the membership certificate that a root holder hands out; renewed when half of it is gone."""


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, slots=True)
class CallLimits:
    """Bounds of calls (`mycel.protocol.rpc`), each per peer unless said otherwise."""

    shared_bytes: int = 64 * KIB
    """Largest message on the stream that small calls share: at 1 Gbit/s it holds up the next for 0.5 ms.
    Larger ones take a stream of their own."""

    message_bytes: int = 64 * MIB
    """Largest message, tensors included: 1 024 rows of 16 384 float32."""

    tensors: int = 4096
    """Tensors in one message: more than a step of a full batch carries."""

    in_flight: int = 16384
    """Unanswered calls on the shared stream, in each direction. Callers wait, excess arrivals are refused;
    10 000 at once is what a busy stage sees, and each costs a few kB."""

    in_flight_bytes: int = 128 * MIB
    """Request bytes that handlers hold or that are on their way in: two of the largest messages."""

    streams: int = 1024
    """Calls with a stream of their own that are served at once; a quarter of the connection's streams."""

    backlog_bytes: int = 256 * KIB
    """Bytes waiting for a shared stream's window before senders wait too."""

    request_s: float = 10.0
    """How long a call's own stream may take to bring the first 20 bytes of its request."""

    lines: int = 8
    """Shared streams that one peer has here at once: the one in use, an old one whose last
    answer is to come, and as many as a careless end may leave behind."""

    line_s: float = 30.0
    """Age at which the shared stream is replaced. It would keep a connection open that was given up for
    another one."""

    retry_s: float = 1.0
    """How long a call that may be asked again waits for the lost peer to be back, deadline permitting."""

    threads: int = 64
    """Worker threads for plain handlers, all peers together: they block, so more than cores."""

    error_text: int = 4096
    """Characters of a failure's text that travel."""


DEFAULT_CALL_LIMITS = CallLimits()
