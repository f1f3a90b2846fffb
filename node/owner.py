"""What a link asks of the host that owns it, and tells it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from mycel.protocol.connection import Setup
from mycel.protocol.limits import Limits
from mycel.protocol.mesh import PeerId, StreamHandler

if TYPE_CHECKING:
    from mycel.node.gate import Gate, Service
    from mycel.node.link import Link
    from mycel.node.stream import HostStream


class Owner(Protocol):
    """What a link needs of its host."""

    limits: Limits
    setup: Setup
    receive_buffer: memoryview
    services: dict[str, Service]

    def on_open(self, link: Link) -> Gate:
        """The handshake succeeded; returns the peer's gate. Raises `Refused` where it is not wanted."""

    def on_lost(self, link: Link) -> None:
        """The link ended; `link.lost` says why."""

    def on_shutdown(self, link: Link) -> None:
        """The link's tasks end; where it is not lost yet, the node shuts down, and this ends it."""

    def on_drain(self, link: Link) -> None:
        """The peer opens no more streams on this link."""

    def on_stream_refused(self, cause: str) -> None:
        """An inbound stream was turned away."""

    async def handle(self, stream: HostStream, handler: StreamHandler) -> None:
        """Run `handler`; its failure ends the stream and nothing else."""

    def learned_window(self, peer: PeerId) -> int:
        """The receive window that `peer` filled on an earlier connection, in bytes."""

    def on_handler_error(self, protocol: str, error: Exception) -> None:
        """A handler or receiver of `protocol` raised."""
