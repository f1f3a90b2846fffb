"""The address echo: how a node learns from which address and port others see it.

Behind a NAT a node cannot know its own public address, and what one connection shows holds for that
connection only. So a member that others can call (the server) keeps two TCP ports open. Over an authenticated
stream it tells the asker the ports and a key (`Offer`); the asker then connects to both from one local port
of its own and gets back what the server saw. Two equal answers: the NAT shows every destination the same
port, which can be told to a peer that will punch there. Two different ones: a symmetric NAT.

The TCP exchange is plain, for nothing but a bare connection from the port in question will do, so it proves
itself. The asker sends 40 bytes, key id, nonce and MAC; the server answers with 34, address and MAC. Each MAC
is HMAC-SHA-256 under the key, cut to 16 bytes, over a label of its direction, the nonce and the port's
index; each key serves once per port, so that nobody can have an exchange of his own answered by a copied
question. The address is masked, because some NATs rewrite addresses that they find in payloads.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from typing import Annotated

import msgspec
from multiaddr import Multiaddr

from mycel.protocol.address import endpoint_of, tcp_addr
from mycel.protocol.errors import RemoteProtocolError

PROTOCOL = "/mycel/echo/1"

KEY_ID_BYTES = 8
KEY_BYTES = 16
NONCE_BYTES = 16
MAC_BYTES = 16
QUESTION_BYTES = KEY_ID_BYTES + NONCE_BYTES + MAC_BYTES
_PLACE_BYTES = 18
ANSWER_BYTES = _PLACE_BYTES + MAC_BYTES
OFFER_BYTES_MAX = 512
WHY_MAX = 100

_Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]


class Wish(msgspec.Struct, frozen=True, array_like=True):
    """Which ports echo? `family` is 4 or 6, the IP version of the asker's port."""

    family: Annotated[int, msgspec.Meta(ge=4, le=6)]


class Offer(msgspec.Struct, frozen=True, array_like=True):
    """Two ports of the server and the key for one question to each, good for some seconds.

    No `ports` at all: this node answers none, and `why` says why.
    """

    ports: tuple[_Port, _Port] | None
    key_id: Annotated[bytes, msgspec.Meta(max_length=KEY_ID_BYTES)] = b""
    """8 bytes."""
    key: Annotated[bytes, msgspec.Meta(max_length=KEY_BYTES)] = b""
    """16 bytes."""
    why: Annotated[str, msgspec.Meta(max_length=WHY_MAX)] = ""


@dataclass(frozen=True, slots=True)
class Mapped:
    """How two ports of one echo server see one local port, as TCP addresses without a peer id."""

    first: Multiaddr
    second: Multiaddr

    @property
    def is_symmetric(self) -> bool:
        """Whether every destination is shown another address: nobody can be told where to punch."""
        return self.first != self.second


def ask(key_id: bytes, key: bytes, nonce: bytes, index: int) -> bytes:
    """The question to port `index` (0 or 1) of the server that gave the key."""
    return key_id + nonce + _mac(key, b"ask", nonce, index)


def key_id_of(question: bytes) -> bytes:
    """Whose question it is."""
    return question[:KEY_ID_BYTES]


def answer(question: bytes, key: bytes, index: int, seen: Multiaddr) -> bytes:
    """What a server that got `question` on its port `index` from the TCP address `seen` says to that.

    Raises `RemoteProtocolError` where the key's owner did not ask this, or asked the other port.
    """
    nonce, mac = question[KEY_ID_BYTES:-MAC_BYTES], question[-MAC_BYTES:]
    if len(question) != QUESTION_BYTES or not hmac.compare_digest(mac, _mac(key, b"ask", nonce, index)):
        raise RemoteProtocolError("an echo question without the key it names")
    place = _pack(seen)
    return _masked(place, key, nonce, index) + _mac(key, b"say", nonce, index, place)


def read_answer(raw: bytes, key: bytes, nonce: bytes, index: int) -> Multiaddr:
    """The TCP address that the server saw. Raises `RemoteProtocolError` where it did not."""
    if len(raw) != ANSWER_BYTES:
        raise RemoteProtocolError(f"an echo answer of {len(raw)} bytes instead of {ANSWER_BYTES}")
    place = _masked(raw[:_PLACE_BYTES], key, nonce, index)
    if not hmac.compare_digest(raw[_PLACE_BYTES:], _mac(key, b"say", nonce, index, place)):
        raise RemoteProtocolError("an echo answer that its server did not give; somebody changed it")
    return _unpack(place)


def _mac(key: bytes, label: bytes, nonce: bytes, index: int, data: bytes = b"") -> bytes:
    said = b"mycel echo 1 " + label + nonce + bytes([index]) + data
    return hmac.digest(key, said, "sha256")[:MAC_BYTES]


def _masked(place: bytes, key: bytes, nonce: bytes, index: int) -> bytes:
    mask = hmac.digest(key, b"mycel echo 1 mask" + nonce + bytes([index]), "sha256")
    return bytes(one ^ two for one, two in zip(place, mask[:_PLACE_BYTES], strict=True))


def _pack(addr: Multiaddr) -> bytes:
    endpoint = endpoint_of(addr)
    host = endpoint.host if ":" in endpoint.host else f"::ffff:{endpoint.host}"
    return IPv6Address(host).packed + endpoint.port.to_bytes(2, "big")


def _unpack(place: bytes) -> Multiaddr:
    host = IPv6Address(place[:16])
    return tcp_addr(str(host.ipv4_mapped or ip_address(host)), int.from_bytes(place[16:], "big"))
