"""WebSocket as a pipe (RFC 6455; libp2p specs/websockets), for networks that let only web traffic through.

Each write is one binary message; message bounds mean nothing inbound. Masks and keys are drawn by the
library from the operating system, so a simulated run with WebSocket in it does not replay bit by bit.
"""

from __future__ import annotations

from wsproto import ConnectionType, WSConnection
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Event,
    Ping,
    Pong,
    RejectConnection,
    RejectData,
    Request,
)
from wsproto.utilities import ProtocolError

from mycel.node.layer import LayeredPipe
from mycel.protocol.errors import PipeBroken
from mycel.protocol.network import Pipe

PATH = "/"


class WebPipe(LayeredPipe):
    """A WebSocket over a pipe, from the side that asked (`host` is given) or the side that was asked."""

    def __init__(self, below: Pipe, *, host: str | None = None) -> None:
        """`host` is the name that the server is known by (HTTP's Host)."""
        super().__init__(below, "/ws")
        self._web = WSConnection(ConnectionType.CLIENT if host is not None else ConnectionType.SERVER)
        if host is not None:
            self._put(self._web.send(Request(host=host, target=PATH)))

    def _wrap(self, data: bytes) -> bytes:
        try:
            return self._web.send(BytesMessage(data=data))
        except ProtocolError:
            raise PipeBroken(f"connection to {self.remote} was closed by the peer") from None

    def _unwrap(self, data: bytes) -> None:
        try:
            self._web.receive_data(data or None)
            for event in self._web.events():
                self._on_event(event)
        except ProtocolError as error:
            raise PipeBroken(f"{self.remote} does not speak WebSocket: {error}") from None

    def _on_event(self, event: Event) -> None:
        if isinstance(event, BytesMessage):
            self._arrived += event.data
        elif isinstance(event, Request):
            self._held += self._web.send(AcceptConnection())
            self.is_ready = True
        elif isinstance(event, AcceptConnection):
            self.is_ready = True
        elif isinstance(event, Ping):
            self._held += self._web.send(event.response())
        elif isinstance(event, CloseConnection):
            self._ended = True
        elif isinstance(event, RejectConnection):
            raise PipeBroken(f"{self.remote} refused WebSocket with HTTP status {event.status_code}")
        elif not isinstance(event, Pong | RejectData):
            raise PipeBroken(f"{self.remote} sent a text message where only bytes belong")

    def _goodbye(self) -> bytes:
        try:
            return self._web.send(CloseConnection(code=1000))
        except ProtocolError:
            return b""  # the other side closed first
