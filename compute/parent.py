"""A worker process's end of the socket to its daemon, in blocking frames."""

from __future__ import annotations

import socket

from mycel.compute.pipe import GATHER_MAX, FrameReceiver, advance
from mycel.protocol.frame import Frame, FrameKind, pack
from mycel.protocol.mesh import Buffer


class Connection:
    """The socket to the daemon, in blocking frames."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._receiver = FrameReceiver()

    def receive(self) -> Frame | None:
        """The next frame; None when the daemon is gone. Raises `RemoteProtocolError`."""
        while (frame := self._receiver.next()) is None:
            count = self._sock.recv_into(self._receiver.room())
            if not count:
                return None
            self._receiver.got(count)
        return frame

    def send(self, kind: FrameKind, number: int, content: tuple[bytes, list[Buffer]]) -> None:
        """Send one frame, raw buffers from where they lie."""
        parts = pack(kind, number, content[0], raws=content[1])
        while parts:
            sent = self._sock.sendmsg(parts[:GATHER_MAX])
            parts = advance(parts, sent)
