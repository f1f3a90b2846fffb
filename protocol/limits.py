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


@dataclass(frozen=True, slots=True)
class KadLimits:
    """Bounds of Kademlia (`mycel.dht.kad`)."""

    bucket: int = 20
    """Peers in a bucket, peers told in an answer, and replicas of a record: Kademlia's k."""

    group: int = 2
    """Peers of one public /24 (IPv4) or /48 (IPv6) in a bucket: what one rented network can fill of it."""

    paths: int = 3
    """Disjoint paths of a lookup: a liar on one of them does not lead the others astray."""

    quorum: int = 11
    """Peers next to a key that a reader asks. A put that more than 9 of 20 confirmed is seen by it."""

    message_bytes: int = 64 * KIB
    """One message: a record and 20 peers with eight addresses each."""

    value_bytes: int = 16 * KIB
    """A record's value; a larger one goes into a block, which the record names..."""

    large_bytes: int = 1 * MIB
    """...up to this: half of what a block may hold. Beyond it stand models and documents."""

    own_bytes: int = 512 * KIB
    """What a node states in all, blocks apart: it remembers that over a restart in one small file."""

    name_bytes: int = 256
    """What an author calls a record, and a key that is provided."""

    life_s: float = 24 * 3600.0
    """Life of a record from its author's last signature; so much, and a clock's error, may lie ahead."""

    skew_s: float = 300.0
    """How far two calendars may differ (see `Limits.clock_skew_s`)."""

    provider_s: float = 3600.0
    """Life of a provider record; told anew when half of it is gone."""

    records: int = 65536
    """Records held for others..."""

    record_bytes: int = 64 * MIB
    """...and their bytes, all authors together."""

    author_records: int = 1024
    """Records of one author..."""

    author_bytes: int = 4 * MIB
    """...and their bytes: a sixteenth of the whole, so that no author fills a peer."""

    provided_keys: int = 16384
    """Keys with providers, all together; 100 bytes each."""

    providers: int = 64
    """Providers of one key."""

    provider_keys: int = 1024
    """Keys that one peer may provide at another, and at all."""

    questions_per_s: float = 400.0
    """Questions of one peer that are answered; a tenth of it may come at once. Busy ones ask 30."""

    questions: int = 32
    """Questions of one lookup under way, late ones included..."""

    lookup_questions: int = 256
    """...and in all: ten times what one takes, so that peers who name ever nearer friends do not keep it."""

    late_s_min: float = 0.02
    """A question is not late before this..."""

    late_s_max: float = 2.0
    """...and is after this, whatever is known of the peer."""

    answer_s_min: float = 1.0
    """A question is given up no sooner than this..."""

    answer_s_max: float = 6.0
    """...and no later: a dial to a dead address and a bit."""

    failures: int = 3
    """Failed questions in a row after which a peer leaves its bucket though nobody takes its place."""

    known_paces: int = 4096
    """Peers whose round trips are remembered."""

    connections: int = 128
    """Connections that lookups opened and that are kept for the next ones."""

    tick_s: float = 5.0
    """How often upkeep looks at what is due."""

    check_s: float = 300.0
    """A peer in a bucket that was not heard of for this long is asked whether it is there..."""

    checks: int = 8
    """...so many of them at a tick."""

    refresh_s: float = 600.0
    """A bucket that no lookup went through for this long is looked through."""

    republish_s: float = 600.0
    """How often a replica sees to it that a record has all its replicas: half of the peers of a restless
    swarm stay no longer than this."""


DEFAULT_KAD_LIMITS = KadLimits()


@dataclass(frozen=True, slots=True)
class BlockLimits:
    """Bounds of content blocks and their exchange (`mycel.dht.block`)."""

    block_bytes: int = 2 * MIB
    """Largest block, the largest that other implementations of the exchange commonly take. It is part of how
    models are cut: another value gives other names."""

    file_bytes: int = 64 * MIB
    """Largest small file of a model: a tokenizer of 250 000 words takes 30."""

    wants: int = 65536
    """Blocks that one fetch asks its peers for: 128 GiB. More is fetched in turns."""

    peers: int = 32
    """Peers that one fetch talks to at once."""

    uploads: int = 32
    """Streams that are served at once, each with one block in memory: 64 MiB..."""

    uploads_per_peer: int = 4
    """...and of one peer: several fetches at once."""

    asked: int = 256
    """Blocks asked for and not answered, of one stream."""

    storing: int = 4
    """Blocks being checked and written at once, of one fetch."""

    ahead_s: float = 0.5
    """A peer is asked for so many seconds of its measured rate in advance: more than a round trip, and little
    enough that others can still take a share..."""

    ahead_bytes_min: int = 4 * MIB
    """...at least this, two blocks, so that it always has the next one..."""

    ahead_bytes_max: int = 64 * MIB
    """...and at most this."""

    stall_s: float = 10.0
    """A peer that sends nothing for so long is asked for nothing more until it does, and what it was asked
    for is asked of others: a block on a line of 2 Mbit/s takes 8 s."""

    patience_s: float = 60.0
    """How long a fetch waits for its next block, from whomever, before it gives up."""

    retry_s: float = 2.0
    """Before a peer that ended its stream is asked again."""

    liars: int = 4096
    """Peers remembered for a corrupt block, the latest ones."""

    message_bytes: int = 4 * MIB
    """One message of the exchange, blocks apart: the names of `wants` blocks take 2.25 MiB."""


DEFAULT_BLOCK_LIMITS = BlockLimits()


@dataclass(frozen=True, slots=True)
class LaneLimits:
    """Bounds of bulk bytes between peers (`mycel.protocol.lane`)."""

    lanes: int = 2
    """Sockets towards one peer. More fill a long line better, and each costs a thread at both ends..."""

    lanes_here: int = 1
    """...which on one machine share its cores: 64 MB between two processes cost a sixth more over two."""

    chunk_bytes: int = 1 * MIB
    """Items of an array that travel and are sealed together: one call of the cipher, one of the socket; what
    stays of it in a core's cache is added there."""

    small_bytes: int = 32 * KIB
    """What is no longer than this travels on the connection's own streams, and is put together at one
    member instead of around the ring."""

    survey_bytes: int = 2 * MIB
    """Where each of three members or more has a larger part than this, they first tell each other how fast
    their lines are, to agree on a ring: one round trip."""

    text_bytes: int = 4 * KIB
    """What a control frame says: the description of an operation, why one was given up."""

    early: int = 1024
    """Control frames kept of operations that did not begin here yet; the oldest go."""

    stock_bytes: int = 1024 * MIB
    """Working memory kept between operations, so that the next finds its pages in place..."""

    residuals: int = 256
    """...and tags whose quantization errors are remembered."""

    progress_s: float = 5.0
    """An attempt that moved nothing for so long has failed: a quarter of a MiB in it is 400 kbit/s."""

    setup_s: float = 5.0
    """From the wish for lanes to lanes: a call, a dial and a hello."""

    retry_s: float = 30.0
    """Before lanes to a peer that could not be reached directly are tried again."""


DEFAULT_LANE_LIMITS = LaneLimits()
