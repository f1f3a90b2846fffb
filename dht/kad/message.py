"""The messages of libp2p's kad-dht (specs/kad-dht, "RPC messages"), one behind its length each way.

A question and its answer have one form. What an answer names beyond its bounds is cut, a peer whose id is
none is left out; bytes that are no message at all raise. `PUT_VALUE` and `ADD_PROVIDER` are answered with
what the peer holds after it, so that whoever asked can count: under libp2p's own id `ADD_PROVIDER` has no
answer."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from mycel.dht.kad.key import bytes_of_peer, peer_of_bytes
from mycel.dht.kad.table import Contact
from mycel.protocol import varint
from mycel.protocol.errors import RemoteProtocolError
from mycel.protocol.limits import KadLimits
from mycel.protocol.pb import kad_pb2

KAD_PROTOCOL = "/mycel/kad/1"
FOREIGN_PROTOCOL = "/ipfs/kad/1.0.0"
"""libp2p's own, for an open swarm that opts in."""

ADDRS_MAX = 8
ADDR_BYTES_MAX = 512


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


def write(message: Message) -> bytes:
    """`message` behind its length."""
    raw = kad_pb2.Message(
        type=kad_pb2.Message.MessageType.Name(message.kind),
        key=message.name,
        closer_peers=[_write_peer(contact) for contact in message.closer],
        provider_peers=[_write_peer(contact) for contact in message.providers],
    )
    if message.record is not None:
        raw.record.key = message.name
        raw.record.value = message.record
    return varint.prefixed(raw.SerializeToString())


def read(raw: bytes, limits: KadLimits) -> Message:
    """The message `raw` (without its length). Raises `RemoteProtocolError` for bytes that are none."""
    try:
        found = kad_pb2.Message.FromString(raw)
        kind = Kind(found.type)
    except (DecodeError, ValueError) as error:
        raise RemoteProtocolError(f"not a Kademlia message: {error}") from None
    if len(found.key) > limits.name_bytes + 128:
        raise RemoteProtocolError(f"a key of {len(found.key)} bytes")
    record = None
    if found.HasField("record"):
        if found.record.key and found.record.key != found.key:
            raise RemoteProtocolError("a record under another key than the message's")
        record = found.record.value
    return Message(
        kind,
        found.key,
        record,
        tuple(_read_peers(found.closer_peers[: limits.bucket])),
        tuple(_read_peers(found.provider_peers[: limits.providers])),
    )


def _write_peer(contact: Contact) -> kad_pb2.Message.Peer:
    return kad_pb2.Message.Peer(id=bytes_of_peer(contact.peer), addrs=contact.addrs)


def _read_peers(peers: Iterable[kad_pb2.Message.Peer]) -> Iterable[Contact]:
    for peer in peers:
        try:
            name = peer_of_bytes(peer.id)
        except ValueError:
            continue
        addrs = [addr for addr in peer.addrs[:ADDRS_MAX] if 0 < len(addr) <= ADDR_BYTES_MAX]
        yield Contact(name, tuple(addrs))
