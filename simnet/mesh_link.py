"""A connection of the simulated mesh: two ends, and a one-way journey from each to the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import trio

from mycel.protocol.errors import ConnectionLost, Refused, StreamReset
from mycel.simnet.stream import MeshStream

if TYPE_CHECKING:
    from mycel.simnet.mesh_node import SimMesh


Act = tuple[Callable[..., object], tuple[Any, ...]]
"""What happens at the other end, and with which arguments."""


class Way:
    """What goes from one node to another over one connection: in order, after latency and bandwidth.

    What arrives at one moment arrives as one event, as a packet would: a question and its end, or a credit,
    an answer and its end.
    """

    __slots__ = ("_free_at", "_held", "_last_arrival", "_leaving", "_source", "_target", "_world")

    def __init__(self, source: SimMesh, target: SimMesh) -> None:
        self._world = source.world
        self._source = source.peer_id
        self._target = target.peer_id
        self._free_at = 0.0
        self._last_arrival = 0.0
        self._leaving: list[Act] | None = None
        """The latest packet, until it arrives."""
        self._held: list[Act] | None = None

    @property
    def is_blocked(self) -> bool:
        """Whether a cut lies across now."""
        return self._world.is_blocked(self._source, self._target)

    def carry(self, size: int, act: Callable[..., object], *args: Any) -> None:
        """Call `act(*args)` at the other end; `size` bytes take their time on the link."""
        world = self._world
        world.bytes_carried += size
        self._free_at = max(trio.current_time(), self._free_at) + size / world.options.bytes_per_s
        arrival = self._free_at + world.latency(self._source, self._target)
        if self._leaving is not None and arrival <= self._last_arrival:
            self._leaving.append((act, args))
            return
        self._last_arrival = max(self._last_arrival, arrival)
        self._leaving = [(act, args)]
        world.timeline.at(self._last_arrival, self._arrive, self._leaving)

    def _arrive(self, packet: list[Act]) -> None:
        if packet is self._leaving:
            self._leaving = None
        if self._held is not None or self.is_blocked:
            self._held = [*(self._held or ()), *packet]
            return
        for act, args in packet:
            act(*args)

    def release(self) -> None:
        """Deliver what a cut held back, in order, as retransmissions would."""
        if self._held is not None and not self.is_blocked:
            held, self._held = self._held, None
            for act, args in held:
                act(*args)


class ConnectionEnd:
    """One node's end of a connection, and its streams."""

    __slots__ = ("_cuts", "_next_id", "_open", "_out", "_streams", "inbound", "node", "other")

    def __init__(self, node: SimMesh, out: Way, *, inbound: bool) -> None:
        self.node = node
        self.other = self
        self.inbound = inbound
        self._out = out
        self._open = True
        self._next_id = 2 if inbound else 1
        self._streams: dict[int, MeshStream] = {}
        self._cuts = 0

    def open_stream(self, protocol: str) -> MeshStream:
        """A fresh stream; the other end hears of it one journey later."""
        stream_id, self._next_id = self._next_id, self._next_id + 2
        self._out.carry(0, self.other._on_open, stream_id, protocol)
        return self._new_stream(stream_id, protocol)

    def _new_stream(self, stream_id: int, protocol: str) -> MeshStream:
        window = self.node.world.options.window_bytes
        stream = MeshStream(self, stream_id, self.other.node.peer_id, protocol, window)
        self._streams[stream_id] = stream
        return stream

    def _on_open(self, stream_id: int, protocol: str) -> None:
        if not self._open:
            return
        found = self.node.handler_of(protocol)
        if found is None:
            text = f"{self.node.peer_id} does not speak {protocol}"
            self.tell(0, "on_reset", stream_id, StreamReset(text))
            return
        handler, access = found
        granted = self.node.peers[self.other.node.peer_id].access
        if granted < access:
            text = f"{protocol} needs {access.name}, you have {granted.name}; ask for a ticket of that role"
            self.tell(0, "on_reset", stream_id, Refused(text, reason="access"))
            return
        self.node.start_handler(handler, self._new_stream(stream_id, protocol))

    def tell_protocols(self, protocols: tuple[str, ...]) -> None:
        """Tell the other end what this node serves now."""
        if self._open:
            self._out.carry(0, self.other._on_protocols, protocols)

    def _on_protocols(self, protocols: tuple[str, ...]) -> None:
        if self._open:
            self.node.on_protocols(self.other.node.peer_id, protocols)

    def tell(self, size: int, act: str, stream_id: int, *args: object) -> None:
        """See `StreamEnd.tell`."""
        if self._open:
            self._out.carry(size, self.other._on_message, act, stream_id, args)

    def _on_message(self, act: str, stream_id: int, args: tuple[Any, ...]) -> None:
        if not self._open:
            return
        stream = self._streams.get(stream_id)
        if stream is not None:
            getattr(stream, act)(*args)
        elif act == "on_data":
            self.tell(0, "on_reset", stream_id, StreamReset("the stream is over at the other end"))

    def forget(self, stream_id: int) -> None:
        """See `StreamEnd.forget`."""
        self._streams.pop(stream_id, None)

    def count_error(self, protocol: str, error: Exception) -> None:
        """See `StreamEnd.count_error`."""
        self.node.count_error(protocol, error)

    def close(self, text: str) -> None:
        """End the connection for a reason that both sides see."""
        if self._open:
            self._out.carry(0, self.other.lose, "closed", text)
            self.lose("closed", text)

    def crash(self) -> None:
        """This end's process is gone; its kernel resets the connection."""
        self._out.carry(0, self.other.lose, "reset", f"{self.node.peer_id} reset the connection")
        self.lose("reset", "this node was killed")

    def lose(self, reason: str, text: str) -> None:
        """The connection is over at this end."""
        if not self._open:
            return
        self._open = False
        peer = self.other.node.peer_id
        streams, self._streams = self._streams, {}
        self.node.on_down(peer, reason, text)
        for stream in streams.values():
            stream.on_loss(ConnectionLost(f"lost {peer}: {text}", reason=reason))
        self.other = self  # what is over holds nothing

    def watch_silence(self) -> None:
        """Give the connection up when the cut that was just made is still there after `silence_s`."""
        for end in (self, self.other):
            if end._open and end._out.is_blocked:
                end._cuts += 1
                end.node.world.timeline.after(end.node.world.options.silence_s, end._check_silence, end._cuts)

    def _check_silence(self, cut: int) -> None:
        if cut == self._cuts and self._out.is_blocked:
            self.lose("silent", f"nothing came for {self.node.world.options.silence_s:g} s")

    def release(self) -> None:
        """The cut healed: it counts no more, and what it held arrives."""
        if not self._out.is_blocked:
            self._cuts += 1
            self._out.release()


def connect_ends(dialer: SimMesh, listener: SimMesh) -> None:
    """Make a connection between two nodes and tell both."""
    near = ConnectionEnd(dialer, Way(dialer, listener), inbound=False)
    far = ConnectionEnd(listener, Way(listener, dialer), inbound=True)
    near.other, far.other = far, near
    dialer.on_up(near)
    listener.on_up(far)
