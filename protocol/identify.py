"""identify 1.0.0 (libp2p specs/identify) and the signed peer record in it (libp2p RFC 0002 and 0003).

Each side tells the other its agent, protocols, listen addresses and the address it sees the other at. All of
it is hearsay of an authenticated peer: bounded on arrival, addresses that do not parse are left out, and the
public key must be the one the connection proved.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from google.protobuf.message import DecodeError
from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from mycel.protocol import envelope, varint
from mycel.protocol.errors import RemoteProtocolError
from mycel.protocol.keys import OwnKey, PublicKey, peer_id_bytes, peer_id_text
from mycel.protocol.mesh import PeerId
from mycel.protocol.pb import identify_pb2, record_pb2

PROTOCOL = "/ipfs/id/1.0.0"
PUSH = "/ipfs/id/push/1.0.0"
VERSION = "ipfs/0.1.0"

MESSAGE_BYTES_MAX = 64 * 1024
"""An identify message's bound (go-libp2p's is 8 KiB for signed parts, js-libp2p's 8 KiB in all)."""

ADDRS_MAX = 64
PROTOCOLS_MAX = 512
TEXT_MAX = 256
_ADDR_BYTES_MAX = 1024
_RECORD = envelope.Kind(b"libp2p-peer-record", b"\x03\x01", "peer record")


@dataclass(frozen=True, slots=True)
class PeerRecord:
    """A peer's own, signed statement of where it listens; the highest `seq` counts."""

    peer: PeerId
    seq: int
    addrs: tuple[Multiaddr, ...]


@dataclass(frozen=True, slots=True)
class Identity:
    """What a peer says of itself."""

    agent: str
    protocols: tuple[str, ...]
    listen_addrs: tuple[Multiaddr, ...]
    observed: Multiaddr | None
    """Where the sender sees the receiver."""
    record: PeerRecord | None = None


def write(key: PublicKey, said: Identity, record: bytes = b"") -> bytes:
    """An identify message by the owner of `key`, behind its length; `record` is a sealed peer record."""
    message = identify_pb2.Identify(
        publicKey=key.serialized,
        listenAddrs=[addr.to_bytes() for addr in said.listen_addrs],
        protocols=said.protocols,
        protocolVersion=VERSION,
        agentVersion=said.agent,
    )
    if said.observed is not None:
        message.observedAddr = said.observed.to_bytes()
    if record:
        message.signedPeerRecord = record
    return varint.prefixed(message.SerializeToString())


def read(raw: bytes, sender: PublicKey) -> Identity:
    """The identify message `raw` (without its length) that came from the owner of `sender`.

    Raises `RemoteProtocolError` for bytes that are no such message, name another key, or hold a peer record
    that its signature does not cover. Fields beyond their bounds are cut.
    """
    try:
        message = identify_pb2.Identify.FromString(raw)
    except DecodeError:
        raise RemoteProtocolError("not an identify message") from None
    if message.publicKey and message.publicKey != sender.serialized:
        raise RemoteProtocolError("identify names another public key than the connection proved")
    record = None
    if message.signedPeerRecord:
        record = open_record(message.signedPeerRecord)
        if record.peer != sender.peer_id:
            raise RemoteProtocolError("identify carries another peer's record")
    return Identity(
        agent=message.agentVersion[:TEXT_MAX],
        protocols=tuple(name[:TEXT_MAX] for name in message.protocols[:PROTOCOLS_MAX]),
        listen_addrs=read_addrs(message.listenAddrs),
        observed=next(iter(read_addrs([message.observedAddr])), None),
        record=record,
    )


def seal_record(key: OwnKey, record: PeerRecord) -> bytes:
    """`record` in an envelope signed by `key`."""
    payload = record_pb2.PeerRecord(
        peer_id=peer_id_bytes(record.peer),
        seq=record.seq,
        addresses=[record_pb2.PeerRecord.AddressInfo(multiaddr=addr.to_bytes()) for addr in record.addrs],
    ).SerializeToString()
    return envelope.seal(key.public, key.sign, _RECORD, payload)


def open_record(raw: bytes) -> PeerRecord:
    """The peer record in an envelope. Raises `RemoteProtocolError` unless its own peer signed it."""
    key, payload = envelope.open_sealed(raw, _RECORD)
    try:
        record = record_pb2.PeerRecord.FromString(payload)
        peer = peer_id_text(record.peer_id)
    except (DecodeError, ValueError) as error:
        raise RemoteProtocolError(f"not a signed peer record: {error}") from None
    if key.peer_id != peer:
        raise RemoteProtocolError("an envelope that holds no record of its own signer")
    return PeerRecord(peer, record.seq, read_addrs([entry.multiaddr for entry in record.addresses]))


def read_addrs(raws: Sequence[bytes]) -> tuple[Multiaddr, ...]:
    """Those of `raws` that are addresses, at most `ADDRS_MAX`."""
    addrs = (_addr(bytes(raw)) for raw in raws[:ADDRS_MAX] if 0 < len(raw) <= _ADDR_BYTES_MAX)
    return tuple(addr for addr in addrs if addr is not None)


@functools.lru_cache(maxsize=1024)
def _addr(raw: bytes) -> Multiaddr | None:
    """The address `raw`, None where it is none (the library takes cut ones for good until written)."""
    try:
        addr = Multiaddr(raw)
        return addr if Multiaddr(str(addr)).to_bytes() == raw else None
    except (MultiaddrError, ValueError, LookupError):
        return None
