"""All the ways by which a node dials and listens, as one `Network`: TCP, and WebSocket over it.

It stands on any network, real or simulated. `/ws` is WebSocket over TCP, `/tls/ws` (also written `/wss`) has
TLS in between; a listener for that needs a certificate, one behind a web server that ends TLS needs none.
"""

from __future__ import annotations

import ssl
from collections import deque
from collections.abc import Sequence

import trio
from multiaddr import Multiaddr

from mycel.node.tls import TlsPipe, client_context
from mycel.node.websocket import WebPipe
from mycel.protocol.address import WebAddress, endpoint_of, is_web, web_of
from mycel.protocol.errors import AddressError, DialError, PipeBroken
from mycel.protocol.network import Listener, Network, Pipe

PENDING_MAX = 128
"""Newcomers in handshake, or not accepted yet, at once."""

SHAKE_S = 5.0
"""How long TLS and WebSocket may take to be agreed."""


class WebListener:
    """A listener whose pipes speak WebSocket. Handshakes go on beside each other, so a silent newcomer
    keeps nobody waiting; it is dropped after `SHAKE_S`."""

    def __init__(self, below: Listener, suffix: str, context: ssl.SSLContext | None) -> None:
        self._below = below
        self._suffix = suffix
        self._context = context
        self._pending = 0
        self._ready: deque[Pipe] = deque()
        self._news = trio.lowlevel.ParkingLot()
        self._scope = trio.CancelScope()
        self._is_open = True
        trio.lowlevel.spawn_system_task(self._take)

    @property
    def addr(self) -> Multiaddr:
        """See `Listener.addr`."""
        return Multiaddr(f"{self._below.addr}{self._suffix}")

    async def accept(self) -> Pipe:
        """See `Listener.accept`."""
        await trio.lowlevel.checkpoint()
        while not self._ready:
            if not self._is_open:
                raise PipeBroken(f"the listener on {self.addr} is closed")
            await self._news.park()
        return self._ready.popleft()

    def close(self) -> None:
        """See `Listener.close`."""
        self._is_open = False
        self._below.close()
        self._scope.cancel()
        while self._ready:
            self._ready.popleft().reset()
        self._news.unpark_all()

    async def _take(self) -> None:
        with self._scope:
            async with trio.open_nursery() as nursery:
                while self._is_open:
                    try:
                        pipe = await self._below.accept()
                    except PipeBroken:
                        break
                    if self._pending + len(self._ready) >= PENDING_MAX:
                        pipe.reset()
                        continue
                    self._pending += 1
                    nursery.start_soon(self._shake, pipe)
        self.close()

    async def _shake(self, pipe: Pipe) -> None:
        try:
            with trio.fail_after(SHAKE_S):
                if self._context is not None:
                    coat = pipe = TlsPipe(pipe, self._context)
                    await coat.shake()
                socket = WebPipe(pipe)
                await socket.shake()
        except (trio.TooSlowError, DialError):
            return
        finally:
            self._pending -= 1
        self._ready.append(socket)
        self._news.unpark()


class Transports:
    """See `mycel.protocol.network.Network`."""

    def __init__(self, below: Network, *, server_tls: ssl.SSLContext | None = None) -> None:
        """`server_tls` holds the certificate for `/tls/ws` listeners (`mycel.node.tls.server_context`)."""
        self._below = below
        self._server_tls = server_tls
        self._client_tls: ssl.SSLContext | None = None

    async def dial(self, addr: Multiaddr, *, local: Multiaddr | None = None) -> Pipe:
        """See `Network.dial`."""
        if not is_web(addr):
            return await self._below.dial(addr, local=local)
        return await self._dial_web(web_of(addr), local)

    async def _dial_web(self, web: WebAddress, local: Multiaddr | None) -> Pipe:
        pipe = await self._below.dial(web.tcp, local=local)
        end = endpoint_of(web.tcp)
        if web.is_secure:
            self._client_tls = self._client_tls or client_context()
            pipe = TlsPipe(pipe, self._client_tls, host=end.host)
            await pipe.shake()
        host = f"[{end.host}]" if ":" in end.host else end.host
        socket = WebPipe(pipe, host=f"{host}:{end.port}")
        await socket.shake()
        return socket

    async def listen(self, addr: Multiaddr, *, shared: bool = False) -> Listener:
        """See `Network.listen`."""
        if not is_web(addr):
            return await self._below.listen(addr, shared=shared)
        web = web_of(addr)
        if web.is_secure and self._server_tls is None:
            raise AddressError(
                f"cannot listen on {addr} without a certificate: set web_certificate and web_key, or listen "
                "on /ws behind a web server that has one"
            )
        suffix = "/tls/ws" if web.is_secure else "/ws"
        below = await self._below.listen(web.tcp, shared=shared)
        return WebListener(below, suffix, self._server_tls if web.is_secure else None)

    def local_ips(self) -> Sequence[str]:
        """See `Network.local_ips`."""
        return self._below.local_ips()

    def wall(self) -> float:
        """See `Network.wall`."""
        return self._below.wall()

    def entropy(self, count: int) -> bytes:
        """See `Network.entropy`."""
        return self._below.entropy(count)
