"""Circuit relay v2 (libp2p specs/relay/circuit-v2): the messages, without a stream.

Two protocols. Over `HOP` a node asks a relay for a reservation, or to be connected with a peer that holds
one; over `STOP` the relay asks that peer. Messages are protobufs behind their length. Once a status of OK
went over both, the two streams are joined and carry a connection like any other, Noise included: the relay
sees ciphertext and who talks to whom.

A reservation comes with a voucher, the relay's signed word that it holds it. A relay that limits its circuits
says so (`Limit`), to both ends.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from google.protobuf.message import DecodeError
from multiaddr import Multiaddr

from mycel.protocol import envelope, varint
from mycel.protocol.errors import RemoteProtocolError
from mycel.protocol.identify import read_addrs
from mycel.protocol.keys import PublicKey, peer_id_bytes, peer_id_text
from mycel.protocol.mesh import PeerId
from mycel.protocol.pb import circuit_pb2

HOP = "/libp2p/circuit/relay/0.2.0/hop"
STOP = "/libp2p/circuit/relay/0.2.0/stop"

MESSAGE_BYTES_MAX = 4096
"""A message's bound, go-libp2p's own. A reservation with 16 addresses and a voucher takes under 2 KiB."""

ADDRS_MAX = 16
"""Addresses of a relay that a reservation is read for."""

_VOUCHER = envelope.Kind(b"libp2p-relay-rsvp", b"\x03\x02", "relay voucher")


class Kind(enum.Enum):
    """What a message is."""

    RESERVE = "reserve"
    CONNECT = "connect"
    STATUS = "status"


class Status(enum.IntEnum):
    """How a request ended."""

    OK = 100
    RESERVATION_REFUSED = 200
    RESOURCE_LIMIT_EXCEEDED = 201
    PERMISSION_DENIED = 202
    CONNECTION_FAILED = 203
    NO_RESERVATION = 204
    MALFORMED_MESSAGE = 400
    UNEXPECTED_MESSAGE = 401


_MEANINGS = {
    Status.RESERVATION_REFUSED: "it takes no further reservation",
    Status.RESOURCE_LIMIT_EXCEEDED: "its limits are reached",
    Status.PERMISSION_DENIED: "it does not permit that",
    Status.CONNECTION_FAILED: "it could not reach the peer",
    Status.NO_RESERVATION: "the peer holds no reservation there",
    Status.MALFORMED_MESSAGE: "it could not read the request",
    Status.UNEXPECTED_MESSAGE: "it did not expect the request",
}


def meaning(status: int) -> str:
    """A status in words; unknown ones by their number."""
    try:
        known = Status(status)
    except ValueError:
        return f"status {status}"
    return f"{_MEANINGS.get(known, 'fine')} ({known.name})"


@dataclass(frozen=True, slots=True)
class Limit:
    """What a relay lets a circuit do. 0: no bound."""

    seconds: int = 0
    data: int = 0
    """Bytes; whether both directions count together is the relay's affair."""

    def __bool__(self) -> bool:
        return bool(self.seconds or self.data)

    def __str__(self) -> str:
        said = [f"{self.seconds} s"] * bool(self.seconds) + [f"{self.data} bytes"] * bool(self.data)
        return " and ".join(said) or "no limit"


UNLIMITED = Limit()


@dataclass(frozen=True, slots=True)
class Reservation:
    """A place at a relay, until the calendar time `expire` (seconds since 1970)."""

    expire: int
    addrs: tuple[Multiaddr, ...] = ()
    """Where the relay says it can be dialled, each ending in its peer id."""
    voucher: bytes = b""


@dataclass(frozen=True, slots=True)
class Message:
    """A HOP or a STOP message (which knows no RESERVE and no reservation)."""

    kind: Kind
    peer: PeerId | None = None
    """CONNECT: with whom (HOP), from whom (STOP)."""
    status: int = 0
    reservation: Reservation | None = None
    limit: Limit = UNLIMITED


def write_hop(message: Message) -> bytes:
    """A HOP message behind its length."""
    raw = circuit_pb2.HopMessage(type=_HOP_TYPES[message.kind])
    _fill(raw, message)
    if message.reservation is not None:
        held = message.reservation
        raw.reservation.expire = held.expire
        raw.reservation.addrs.extend(addr.to_bytes() for addr in held.addrs)
        if held.voucher:
            raw.reservation.voucher = held.voucher
    return varint.prefixed(raw.SerializeToString())


def write_stop(message: Message) -> bytes:
    """A STOP message behind its length."""
    raw = circuit_pb2.StopMessage(type=_STOP_TYPES[message.kind])
    _fill(raw, message)
    return varint.prefixed(raw.SerializeToString())


def read_hop(raw: bytes) -> Message:
    """The HOP message `raw` (without its length). Raises `RemoteProtocolError`."""
    try:
        found = circuit_pb2.HopMessage.FromString(raw)
    except DecodeError as error:
        raise RemoteProtocolError(f"not a HOP message: {error}") from None
    reservation = None
    if found.HasField("reservation"):
        held = found.reservation
        reservation = Reservation(held.expire, read_addrs(held.addrs[:ADDRS_MAX]), held.voucher)
    return _message(found, _HOP_KINDS, "HOP", reservation)


def read_stop(raw: bytes) -> Message:
    """The STOP message `raw` (without its length). Raises `RemoteProtocolError`."""
    try:
        found = circuit_pb2.StopMessage.FromString(raw)
    except DecodeError as error:
        raise RemoteProtocolError(f"not a STOP message: {error}") from None
    return _message(found, _STOP_KINDS, "STOP", None)


def seal_voucher(relay: PublicKey, sign: envelope.Sign, peer: PeerId, expire: int) -> bytes:
    """The word of the relay with that key, who signs with `sign`: `peer` has a reservation until `expire`."""
    payload = circuit_pb2.ReservationVoucher(
        relay=peer_id_bytes(relay.peer_id), peer=peer_id_bytes(peer), expiration=expire
    ).SerializeToString()
    return envelope.seal(relay, sign, _VOUCHER, payload)


def open_voucher(raw: bytes, *, relay: PeerId, peer: PeerId) -> int:
    """Until when (seconds since 1970) `relay` vouches that `peer` has a reservation.

    Raises `RemoteProtocolError` for anything but that relay's signed word about that peer.
    """
    key, payload = envelope.open_sealed(raw, _VOUCHER)
    try:
        voucher = circuit_pb2.ReservationVoucher.FromString(payload)
        named = peer_id_text(voucher.relay), peer_id_text(voucher.peer)
    except (DecodeError, ValueError) as error:
        raise RemoteProtocolError(f"not a relay voucher: {error}") from None
    if named != (relay, peer) or key.peer_id != relay:
        raise RemoteProtocolError("a voucher of another relay or for another peer")
    return voucher.expiration


def relayed_addrs(relay: PeerId, reached: Sequence[Multiaddr], said: Sequence[Multiaddr]) -> list[Multiaddr]:
    """The addresses that a reservation at `relay` gives its holder, without the holder's id.

    `reached` is where this node itself reached the relay, `said` what the relay says of itself, which counts
    only where it names that relay and no further one.
    """
    ending = f"/p2p/{relay}"
    bases = [str(addr).removesuffix(ending) for addr in reached]
    bases += [text.removesuffix(ending) for addr in said if (text := str(addr)).endswith(ending)]
    plain = dict.fromkeys(base for base in bases if "/p2p" not in base)
    return [Multiaddr(f"{base}{ending}/p2p-circuit") for base in list(plain)[:ADDRS_MAX]]


_HOP_TYPES = {
    Kind.RESERVE: circuit_pb2.HopMessage.RESERVE,
    Kind.CONNECT: circuit_pb2.HopMessage.CONNECT,
    Kind.STATUS: circuit_pb2.HopMessage.STATUS,
}
_STOP_TYPES = {Kind.CONNECT: circuit_pb2.StopMessage.CONNECT, Kind.STATUS: circuit_pb2.StopMessage.STATUS}
_HOP_KINDS: dict[int, Kind] = {number: kind for kind, number in _HOP_TYPES.items()}
_STOP_KINDS: dict[int, Kind] = {number: kind for kind, number in _STOP_TYPES.items()}


def _fill(raw: circuit_pb2.HopMessage | circuit_pb2.StopMessage, message: Message) -> None:
    """Write the fields that both messages share."""
    if message.peer is not None:
        raw.peer.id = peer_id_bytes(message.peer)
    if message.limit.seconds:
        raw.limit.duration = message.limit.seconds
    if message.limit.data:
        raw.limit.data = message.limit.data
    if message.kind is Kind.STATUS:
        raw.status = Status(message.status).value  # type: ignore[assignment]


def _message(
    found: circuit_pb2.HopMessage | circuit_pb2.StopMessage,
    kinds: dict[int, Kind],
    name: str,
    reservation: Reservation | None,
) -> Message:
    kind = kinds.get(found.type) if found.HasField("type") else None
    if kind is None:
        raise RemoteProtocolError(f"a {name} message of no known type")
    peer = None
    if found.HasField("peer"):
        try:
            peer = peer_id_text(found.peer.id)
        except ValueError as error:
            raise RemoteProtocolError(f"a {name} message that names no peer: {error}") from None
    if kind is Kind.CONNECT and peer is None:
        raise RemoteProtocolError(f"a {name} CONNECT without a peer")
    status: int = found.status if found.HasField("status") else 0
    if kind is Kind.STATUS and not status:
        raise RemoteProtocolError(f"a {name} status without a status")
    return Message(kind, peer, status, reservation, Limit(found.limit.duration, found.limit.data))
