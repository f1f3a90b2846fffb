"""The messages of libp2p's kad-dht (specs/kad-dht, "RPC messages"), one behind its length each way.

A question and its answer have one form. What an answer names beyond its bounds is cut, a peer whose id is
none is left out; bytes that are no message at all raise. `PUT_VALUE` and `ADD_PROVIDER` are answered with
what the peer holds after it, so that whoever asked can count: under libp2p's own id `ADD_PROVIDER` has no
answer.

The same peers are told again and again, so their bytes are written and read once (`Envelope` in kad.proto
leaves them alone) and remembered, up to a number."""

from __future__ import annotations

import enum
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from mycel.dht.kad.key import bytes_of_peer, peer_of_bytes
from mycel.dht.kad.table import Contact
from mycel.protocol import varint
from mycel.protocol.errors import RemoteProtocolError
from mycel.protocol.limits import KadLimits
from mycel.protocol.mesh import PeerId
from mycel.protocol.pb import kad_pb2

KAD_PROTOCOL = "/mycel/kad/1"
FOREIGN_PROTOCOL = "/ipfs/kad/1.0.0"
"""libp2p's own, for an open swarm that opts in."""

ADDRS_MAX = 8
ADDR_BYTES_MAX = 512

REMEMBERED = 16384
"""Peers whose bytes are remembered, each way..."""

REMEMBERED_BYTES_MAX = 256
"""...where they are no longer than this, as with two or three addresses: what strangers send stays small."""


class Kind(enum.IntEnum):
    """What is asked."""

    PUT_VALUE = 0
    GET_VALUE = 1
    ADD_PROVIDER = 2
    GET_PROVIDERS = 3
    FIND_NODE = 4
    PING = 5


@dataclass(frozen=True, slots=True)
class Message:
    """A question or an answer."""

    kind: Kind
    name: bytes = b""
    """What it is about: a record's name, what is provided, or the bytes of a peer id."""
    record: bytes | None = None
    closer: tuple[Contact, ...] = ()
    providers: tuple[Contact, ...] = ()


_TYPES = {kind: kad_pb2.Message.MessageType.Name(kind) for kind in Kind}


def write(message: Message) -> bytes:
    """`message` behind its length."""
    raw = kad_pb2.Envelope(
        type=_TYPES[message.kind],
        key=message.name,
        closer_peers=[_bytes_of(contact.peer, contact.addrs) for contact in message.closer],
        provider_peers=[_bytes_of(contact.peer, contact.addrs) for contact in message.providers],
    )
    if message.record is not None:
        raw.record.key = message.name
        raw.record.value = message.record
    return varint.prefixed(raw.SerializeToString())


def read(raw: bytes, limits: KadLimits) -> Message:
    """The message `raw` (without its length). Raises `RemoteProtocolError` for bytes that are none."""
    try:
        found = kad_pb2.Envelope.FromString(raw)
        kind = Kind(found.type)
        closer = tuple(_read_peers(found.closer_peers[: limits.bucket]))
        providers = tuple(_read_peers(found.provider_peers[: limits.providers]))
    except (DecodeError, ValueError) as error:
        raise RemoteProtocolError(f"not a Kademlia message: {error}") from None
    if len(found.key) > limits.name_bytes + 128:
        raise RemoteProtocolError(f"a key of {len(found.key)} bytes")
    record = None
    if found.HasField("record"):
        if found.record.key and found.record.key != found.key:
            raise RemoteProtocolError("a record under another key than the message's")
        record = found.record.value
    return Message(kind, found.key, record, closer, providers)


@functools.lru_cache(maxsize=REMEMBERED)
def _bytes_of(peer: PeerId, addrs: tuple[bytes, ...]) -> bytes:
    return kad_pb2.Message.Peer(id=bytes_of_peer(peer), addrs=addrs).SerializeToString()


def _read_peers(raws: Iterable[bytes]) -> Iterator[Contact]:
    for raw in raws:
        contact = (_remembered if len(raw) <= REMEMBERED_BYTES_MAX else _read_peer)(raw)
        if contact is not None:
            yield contact


def _read_peer(raw: bytes) -> Contact | None:
    """The peer `raw`, None where its id is none. Raises `DecodeError`."""
    peer = kad_pb2.Message.Peer.FromString(raw)
    try:
        name = peer_of_bytes(peer.id)
    except ValueError:
        return None
    return Contact(name, tuple(addr for addr in peer.addrs[:ADDRS_MAX] if 0 < len(addr) <= ADDR_BYTES_MAX))


_remembered = functools.lru_cache(maxsize=REMEMBERED)(_read_peer)
