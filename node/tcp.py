"""The real network: TCP over non-blocking sockets, for trio.

A `TcpPipe` calls the socket straight from the connection core (no task hop, no buffer of its own) and parks
in trio only when the kernel says "not now". Nagle is off, because the core writes whole messages. Kernel
buffers stay on autotuning, which reaches the bandwidth-delay product; a fixed SO_RCVBUF would cap it.

Closing in order: a socket that is closed while it holds unread bytes makes the kernel throw away what was
not sent yet and answer RST. So `close` shuts the sending side first and, only where bytes are still
unsent, lets a system task read the rest away for at most `LINGER_S` before the descriptor goes.

Operating system errors are mapped to Mycel's here and nowhere else.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import ipaddress
import os
import socket
import struct
import sys
import time

import psutil
import trio
from multiaddr import Multiaddr

from mycel.node.dialer import Race, Stagger
from mycel.protocol.address import Endpoint, endpoint_of, tcp_addr
from mycel.protocol.errors import AddressError, DialError, PipeBroken

BACKLOG = 512
"""Connections the kernel keeps for us between two accepts; beyond it newcomers are refused."""

LINGER_S = 2.0
"""How long a closed pipe may go on sending what it had taken."""

NO_DESCRIPTORS_S = 0.05
"""Pause of an acceptor when the process is out of file descriptors."""

SIOCOUTQ = 0x5411
"""Linux: bytes in the send queue that the other end has not acknowledged (tcp(7))."""

OUT_OF_DESCRIPTORS = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
LOST_BEFORE_ACCEPT = (errno.ECONNABORTED, errno.EPERM, errno.EPROTO, errno.ENETDOWN, errno.EHOSTUNREACH)


def _addr_of(name: tuple[str, int] | tuple[str, int, int, int]) -> Multiaddr:
    return tcp_addr(name[0].partition("%")[0], name[1])


def _unsent(sock: socket.socket) -> int:
    """Bytes not acknowledged yet, 0 where the platform does not tell."""
    if sys.platform != "linux":
        return 0
    try:
        (count,) = struct.unpack("i", fcntl.ioctl(sock, SIOCOUTQ, b"\0\0\0\0"))
    except OSError:
        return 0
    return int(count)


async def _linger(sock: socket.socket) -> None:
    """Read and forget until the other end has acknowledged everything, hangs up, or `LINGER_S` is over."""
    try:
        with trio.move_on_after(LINGER_S):
            while _unsent(sock):
                with trio.move_on_after(0.02):
                    await trio.lowlevel.wait_readable(sock.fileno())
                try:
                    if not sock.recv(65536):
                        # The other end sends no more, so nothing unread can spoil the close.
                        return
                except BlockingIOError:
                    continue
    except OSError:
        return  # reset by the other end: nobody is left to send to
    finally:
        sock.close()


class TcpPipe:
    """A TCP connection as a `Pipe`."""

    __slots__ = ("_sock", "_why", "local", "remote")

    def __init__(self, sock: socket.socket) -> None:
        """Take over a connected, non-blocking socket. Raises `OSError` where it is gone already."""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.local = _addr_of(sock.getsockname())
        self.remote = _addr_of(sock.getpeername())
        self._sock = sock
        self._why: str | None = None

    def __repr__(self) -> str:
        return f"<TcpPipe {self.local} -> {self.remote}{' ' + self._why if self._why else ''}>"

    def _broken(self, error: OSError) -> PipeBroken:
        """Remember the first loss: the kernel reports it once, we report it to every later call."""
        if self._why is None:
            self._why = f"was lost: {error.strerror or error}"
        return PipeBroken(f"connection to {self.remote} {self._why}")

    def _check(self) -> None:
        if self._why is not None:
            raise PipeBroken(f"connection to {self.remote} {self._why}")

    def try_send(self, data: memoryview | bytes | bytearray) -> int:
        """See `Pipe.try_send`."""
        if self._why is not None:
            self._check()
        try:
            return self._sock.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            raise self._broken(error) from None

    def try_recv_into(self, buffer: memoryview | bytearray) -> int | None:
        """See `Pipe.try_recv_into`."""
        if self._why is not None:
            self._check()
        try:
            return self._sock.recv_into(buffer)
        except (BlockingIOError, InterruptedError):
            return None
        except OSError as error:
            raise self._broken(error) from None

    async def wait_writable(self) -> None:
        """See `Pipe.wait_writable`."""
        self._check()
        try:
            await trio.lowlevel.wait_writable(self._sock.fileno())
        except trio.ClosedResourceError:
            self._check()

    async def wait_readable(self) -> None:
        """See `Pipe.wait_readable`."""
        self._check()
        try:
            await trio.lowlevel.wait_readable(self._sock.fileno())
        except trio.ClosedResourceError:
            self._check()

    def close(self) -> None:
        """See `Pipe.close`."""
        if not self._end("was closed on this side"):
            return
        try:
            self._sock.shutdown(socket.SHUT_WR)
            lingers = _unsent(self._sock) > 0
        except OSError:
            lingers = False
        if lingers:
            trio.lowlevel.spawn_system_task(_linger, self._sock)
        else:
            self._sock.close()

    def reset(self) -> None:
        """See `Pipe.reset`."""
        if not self._end("was reset on this side"):
            return
        with contextlib.suppress(
            OSError
        ):  # the other end may have been faster: then close is all that is left
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._sock.close()

    def _end(self, why: str) -> bool:
        """Wake whoever waits. False when the descriptor is gone already."""
        if self._sock.fileno() < 0 or (self._why or "").endswith("this side"):
            return False
        self._why = why
        trio.lowlevel.notify_closing(self._sock.fileno())
        return True


class TcpListener:
    """A listening TCP socket as a `Listener`."""

    __slots__ = ("_sock", "addr")

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.addr = _addr_of(sock.getsockname())

    async def accept(self) -> TcpPipe:
        """See `Listener.accept`."""
        while True:
            if self._sock.fileno() < 0:
                raise PipeBroken(f"the listener on {self.addr} is closed")
            try:
                sock, _ = self._sock.accept()
                sock.setblocking(False)
                return TcpPipe(sock)
            except (BlockingIOError, InterruptedError):
                try:
                    await trio.lowlevel.wait_readable(self._sock.fileno())
                except trio.ClosedResourceError:
                    continue
            except OSError as error:
                if error.errno in OUT_OF_DESCRIPTORS:
                    await trio.sleep(NO_DESCRIPTORS_S)
                elif error.errno not in LOST_BEFORE_ACCEPT and error.errno not in (
                    errno.ENOTCONN,
                    errno.EINVAL,
                    errno.ECONNRESET,
                ):
                    raise PipeBroken(f"the listener on {self.addr} broke: {error.strerror}") from error

    def close(self) -> None:
        """See `Listener.close`."""
        if self._sock.fileno() >= 0:
            trio.lowlevel.notify_closing(self._sock.fileno())
            self._sock.close()


def _open_socket(host: str, *, reuse_port: bool) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if reuse_port:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    return sock


async def _dial_ip(host: str, port: int, local: Endpoint | None) -> TcpPipe:
    """One connect. Raises `DialError`; a cancelled dial leaves no descriptor."""
    where = tcp_addr(host, port)
    sock = _open_socket(host, reuse_port=local is not None)
    try:
        if local is not None:
            sock.bind((local.host, local.port))
        result = sock.connect_ex((host, port))
        if result in (errno.EINPROGRESS, errno.EWOULDBLOCK):
            await trio.lowlevel.wait_writable(sock.fileno())
            result = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        else:
            await trio.lowlevel.checkpoint()
        if result:
            raise OSError(result, os.strerror(result))
        if sock.getsockname() == sock.getpeername():
            # A free port dialled from itself connects to itself (RFC 9293, section 3.5): nobody listens.
            raise OSError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
        return TcpPipe(sock)
    except OSError as error:
        sock.close()
        raise DialError(f"cannot reach {where}: {error.strerror or error}") from None
    except BaseException:  # why: a cancelled dial closes its socket too; raised again
        sock.close()
        raise


async def _resolve(endpoint: Endpoint) -> list[str]:
    """IP addresses of a name, in the system's order. Raises `DialError`."""
    family = {"dns4": socket.AF_INET, "dns6": socket.AF_INET6}.get(endpoint.kind, socket.AF_UNSPEC)
    try:
        found = await trio.socket.getaddrinfo(endpoint.host, endpoint.port, family, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise DialError(f"cannot resolve {endpoint.host}: {error}") from None
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class TcpNetwork:
    """`Network` over the operating system's sockets, clock and randomness."""

    def __init__(self) -> None:
        self._stagger = Stagger()

    async def dial(self, addr: Multiaddr, *, local: Multiaddr | None = None) -> TcpPipe:
        """See `Network.dial`."""
        endpoint = endpoint_of(addr)
        near = None if local is None else endpoint_of(local)
        if near is not None and near.is_name:
            raise AddressError(f"{local} names a host; a local address is /ip4/... or /ip6/...")
        if not endpoint.is_name:
            return await _dial_ip(endpoint.host, endpoint.port, near)
        hosts = await _resolve(endpoint)

        async def attempt(addr: Multiaddr) -> TcpPipe:
            found = endpoint_of(addr)
            return await _dial_ip(found.host, found.port, near)

        addrs = [tcp_addr(host, endpoint.port) for host in hosts]
        return await Race(addrs, attempt, self._stagger, TcpPipe.reset).run()

    async def listen(self, addr: Multiaddr, *, shared: bool = False) -> TcpListener:
        """See `Network.listen`."""
        endpoint = endpoint_of(addr)
        if endpoint.is_name:
            raise AddressError(f"{addr} names a host; listen on an IP address such as /ip4/0.0.0.0/tcp/0")
        sock = _open_socket(endpoint.host, reuse_port=shared)
        try:
            if ":" in endpoint.host:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((endpoint.host, endpoint.port))
            sock.listen(BACKLOG)
        except OSError as error:
            sock.close()
            raise AddressError(
                f"cannot listen on {addr}: {error.strerror}; free the port or name another"
            ) from None
        await trio.lowlevel.checkpoint()
        return TcpListener(sock)

    def local_ips(self) -> list[str]:
        """See `Network.local_ips`. Link-local IPv6 is left out: it means nothing without its interface."""
        up = {name for name, state in psutil.net_if_stats().items() if state.isup}
        found: list[str] = []
        for name, entries in sorted(psutil.net_if_addrs().items()):
            for entry in entries:
                if name in up and entry.family in (socket.AF_INET, socket.AF_INET6):
                    host = entry.address.partition("%")[0]
                    if not (":" in host and ipaddress.ip_address(host).is_link_local):
                        found.append(host)
        return sorted(dict.fromkeys(found), key=lambda host: ipaddress.ip_address(host).is_loopback)

    def wall(self) -> float:
        """See `Network.wall`."""
        return time.time()

    def entropy(self, count: int) -> bytes:
        """See `Network.entropy`."""
        return os.urandom(count)
