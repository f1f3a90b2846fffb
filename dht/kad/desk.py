"""Where questions of others come in: streams, answered in the connection's reader without a task.

A stream carries one question after the other until its end, as libp2p has it. An asker that does not take its
answers, asks too much, or asks what cannot be read has its stream reset.
"""

from __future__ import annotations

from functools import partial

import trio

from mycel.dht.kad.answer import Answerer
from mycel.dht.kad.ask import Asker
from mycel.dht.kad.message import FOREIGN_PROTOCOL, Kind, read, write
from mycel.protocol import varint
from mycel.protocol.errors import ConnectionLost, RemoteProtocolError, StreamReset
from mycel.protocol.limits import KadLimits
from mycel.protocol.mesh import Mesh, Stream


class Desk:
    """Takes streams."""

    def __init__(self, mesh: Mesh, asker: Asker, answerer: Answerer, limits: KadLimits) -> None:
        self._mesh = mesh
        self._asker = asker
        self._answerer = answerer
        self._limits = limits

    def take(self, stream: Stream) -> None:
        """Answer what comes over `stream`."""
        stream.deliver_to(partial(self._on_data, stream, bytearray()))

    def _on_data(
        self, stream: Stream, unread: bytearray, data: memoryview | None, error: Exception | None
    ) -> None:
        if error is not None:
            return
        try:
            if data is None:
                stream.try_send(b"", end=True)
                return
            unread += data
            while (cut := varint.split_prefixed(unread, self._limits.message_bytes)) is not None:
                del unread[: cut[1]]
                if not self._answer(stream, cut[0]):
                    stream.reset()
                    return
        except RemoteProtocolError:
            self._answerer.count("refused_message")
            stream.reset()
        except (ConnectionLost, StreamReset):
            pass  # nobody waits for the answer

    def _answer(self, stream: Stream, raw: bytes) -> bool:
        """Whether the question was answered and the stream may go on."""
        now = trio.current_time()
        if not self._answerer.may_ask(stream.peer, now):
            return False
        question = read(raw, self._limits)
        asker = self._asker.heard(stream.peer)
        answer = self._answerer.answer(asker, question, self._mesh.wall(), now)
        if stream.protocol == FOREIGN_PROTOCOL and question.kind is Kind.ADD_PROVIDER:
            return True
        return stream.try_send(write(answer))
