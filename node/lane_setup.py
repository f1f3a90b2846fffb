"""How two peers come to have lanes: what is asked over their connection, and the hello on a socket.

The sender asks for lanes (`lane.open`) with a fresh share and gets the other's share, a token and a port. It
dials that port at the address where the peer is connected, once for each lane, and says

    token (16 bytes) || lane (1) || mark (16)      mark = HMAC-SHA-256(hello key, "dial" || token), cut

and the other, where the mark holds, answers with its own mark ("take" in place of "dial"). From then on the
socket carries sealed frames one way. Where the receiver's port cannot be reached, the sender asks it to dial
in turn (`lane.invite`), with the same hello: the dialler then is the receiver.

A socket that nobody is expected on, or whose mark does not hold, is closed without a word.
"""

from __future__ import annotations

import hmac
import socket
from dataclasses import dataclass

import msgspec
import trio

from mycel.node.lane_wire import HELLO_BYTES, MARK_BYTES, SHARE_BYTES, TOKEN_BYTES, LaneKeys
from mycel.protocol.errors import AddressError, RemoteProtocolError
from mycel.protocol.mesh import PeerId
from mycel.protocol.method import Method

Share = msgspec.Meta(min_length=SHARE_BYTES, max_length=SHARE_BYTES)

LANES_MAX = 16
"""Lanes that one call may ask for."""
EXPECTED_MAX = 256
"""Calls for lanes whose sockets are to come."""
HELLOS_MAX = 64
"""Sockets that are saying hello at once."""


class OpenLanes(msgspec.Struct, frozen=True, array_like=True):
    """I want to send you bulk over so many lanes."""

    share: bytes
    lanes: int
    is_plain: bool
    """Without encryption; refused unless the other side is set so too."""


class LanesOpen(msgspec.Struct, frozen=True, array_like=True):
    """Dial this port and say this token."""

    share: bytes
    token: bytes
    port: int


class InviteLanes(msgspec.Struct, frozen=True, array_like=True):
    """I want to send you bulk and cannot reach you: dial me, at this port, and say this token."""

    share: bytes
    token: bytes
    port: int
    lanes: int
    is_plain: bool


class LanesInvited(msgspec.Struct, frozen=True, array_like=True):
    """I shall."""

    share: bytes


OPEN = Method("lane.open", OpenLanes, LanesOpen)
INVITE = Method("lane.invite", InviteLanes, LanesInvited)


@dataclass(frozen=True, slots=True)
class Expected:
    """Sockets that are to come with a token."""

    peer: PeerId
    keys: tuple[LaneKeys, ...]
    is_incoming: bool
    """Whether `peer` sends over them, or this node."""


class Coming:
    """Sockets that are expected, maybe before it is known with which keys: a peer may be quick to dial."""

    def __init__(self) -> None:
        self._known = trio.Event()
        self._expected: Expected | None = None

    def settle(self, expected: Expected) -> None:
        """Say what is expected; once."""
        self._expected = expected
        self._known.set()

    async def known(self) -> Expected:
        """Wait until it is."""
        await self._known.wait()
        assert self._expected is not None
        return self._expected


def check_share(share: bytes, token: bytes = bytes(TOKEN_BYTES)) -> None:
    """Raise `RemoteProtocolError` unless they have their lengths."""
    if len(share) != SHARE_BYTES or len(token) != TOKEN_BYTES:
        raise RemoteProtocolError("a share for lanes has 32 bytes, a token 16")


async def dial(host: str, port: int, keys: LaneKeys, token: bytes, lane: int) -> socket.socket:
    """The socket that is the lane, not blocking. The deadline is the caller's.

    Raises `OSError`, and `RemoteProtocolError` where somebody else answers.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await sock.connect((host, port))
        await send_all(sock, token + bytes((lane,)) + keys.mark(b"dial", token))
        if not hmac.compare_digest(await receive(sock, MARK_BYTES), keys.mark(b"take", token)):
            raise RemoteProtocolError("a stranger is at the lane's port: its mark does not hold")
        return detached(sock)
    except BaseException:  # why: a cancelled dial closes its socket too; raised again
        sock.close()
        raise


async def read_hello(sock: trio.socket.SocketType) -> tuple[bytes, int, bytes]:
    """(token, lane, mark) of whoever dialled. Raises `OSError`, `RemoteProtocolError`."""
    hello = await receive(sock, HELLO_BYTES)
    return hello[:TOKEN_BYTES], hello[TOKEN_BYTES], hello[TOKEN_BYTES + 1 :]


async def receive(sock: trio.socket.SocketType, count: int) -> bytes:
    """Exactly `count` bytes."""
    data = b""
    while len(data) < count:
        more = await sock.recv(count - len(data))
        if not more:
            raise RemoteProtocolError("a lane's socket ended within its hello")
        data += more
    return data


async def send_all(sock: trio.socket.SocketType, data: bytes) -> None:
    """Send all of a few bytes."""
    while data:
        data = data[await sock.send(data) :]


def detached(sock: trio.socket.SocketType, silence_s: float = 5.0) -> socket.socket:
    """The socket for a thread; trio's is of no more use. What is not acknowledged for `silence_s` ends it."""
    plain = socket.socket(fileno=sock.detach())
    plain.setblocking(False)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(silence_s * 1000))
    return plain


def listen(host: str, port: int) -> trio.socket.SocketType:
    """A listening socket. Raises `AddressError`."""
    sock = trio.socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        raw = socket.socket(fileno=sock.detach())
        raw.bind((host, port))
        raw.listen(128)
        raw.setblocking(False)
        return trio.socket.from_stdlib_socket(raw)
    except OSError as error:
        sock.close()
        raise AddressError(
            f"cannot listen for lanes on {host} port {port}: {error.strerror}; name another lane_port"
        ) from None
