"""Where inbound calls arrive: which of the three ways of serving takes a stream, and how many at once.

serve_line    many small calls on one stream
serve_lone    a small call that came whole with its stream
serve_single  every other call with a stream of its own
"""

from __future__ import annotations

from mycel.protocol.callbook import CallBook
from mycel.protocol.errors import RemoteProtocolError
from mycel.protocol.limits import CallLimits
from mycel.protocol.mesh import Access, Mesh, PeerId, Stream
from mycel.protocol.outlet import Budget
from mycel.protocol.serve_line import LINE, LineServer
from mycel.protocol.serve_lone import LoneServer
from mycel.protocol.serve_single import SINGLE, SingleServer
from mycel.protocol.shop import Shop


class Server:
    """Serves the calls of all peers."""

    def __init__(self, mesh: Mesh, limits: CallLimits) -> None:
        self.shop = Shop(mesh, CallBook(mesh), limits)
        self._lines: dict[PeerId, int] = {}
        self._singles: dict[PeerId, int] = {}
        self._budgets: dict[PeerId, Budget] = {}
        mesh.take_streams(LINE, self.take_line, access=Access.SUBMIT)
        mesh.take_streams(SINGLE, self.take_single, access=Access.SUBMIT)

    def take_line(self, stream: Stream) -> None:
        """Serve the calls on a peer's line."""
        if self._is_too_much(self._lines, stream.peer, self.shop.limits.lines):
            stream.reset()
        else:
            LineServer(self.shop, stream, self._end_line).start()

    def take_single(self, stream: Stream) -> None:
        """Serve the call that has this stream to itself."""
        if self._is_too_much(self._singles, stream.peer, self.shop.limits.streams):
            stream.reset()
            return
        lone = LoneServer(self.shop, stream, self._end_single)
        try:
            if not lone.serve():
                self.shop.spawn(self._serve_single, stream, lone)
        except RemoteProtocolError as error:
            self._end_single(stream.peer)
            self.shop.mesh.disconnect(stream.peer, str(error))

    def _is_too_much(self, counts: dict[PeerId, int], peer: PeerId, most: int) -> bool:
        """Whether one more cannot be served (or nothing can, before `Rpc.run`); counts it if it can."""
        count = counts.get(peer, 0)
        if self.shop.nursery is None or count >= most:
            return True
        counts[peer] = count + 1
        return False

    async def _serve_single(self, stream: Stream, lone: LoneServer) -> None:
        limits = self.shop.limits
        budget = self._budgets.setdefault(stream.peer, Budget(limits.in_flight_bytes, limits.shared_bytes))
        try:
            await SingleServer(self.shop, stream, budget, lone.first).run()
        finally:
            self._end_single(stream.peer)

    def _end_line(self, peer: PeerId) -> None:
        self._lines[peer] -= 1
        if not self._lines[peer]:
            del self._lines[peer]

    def _end_single(self, peer: PeerId) -> None:
        self._singles[peer] -= 1
        if not self._singles[peer]:
            del self._singles[peer]
            self._budgets.pop(peer, None)
