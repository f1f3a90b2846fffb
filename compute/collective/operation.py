"""One operation at one member: pieces come in, arrays change, pieces go out. Threads may bring them at once.

What the caller handed over is worked on in place; what stood there is kept aside, chunk by chunk, at the
moment at which the chunk is first written. That costs the copy that a result in memory of its own would cost
at the end, but while the chunk is in the core's cache anyhow and the network is busy; a committed operation
then has nothing left to do. `drop` puts back what was kept aside.

A chunk is added to in the thread that received it, straight from where it was deciphered. A piece counts
once: what comes again, because it was sent again when a lane died, is not even opened.

Memory that is sent stays as it is until it has arrived: a partial sum is overwritten by the finished part,
and that exists only because the partial sum had arrived. So what was sent can be sent again until the
operation is kept or dropped.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import numpy as np

from mycel.compute.collective.arithmetic import finish, items_of, narrow, put_together, widen
from mycel.compute.collective.attempt import Array, InputRefused
from mycel.compute.collective.gate import Doorway
from mycel.compute.collective.plan import Plan
from mycel.compute.collective.quantize import BlockCodec, Bytes, Floats, NotFinite, as_bytes, feed_back
from mycel.compute.collective.residual import Residual
from mycel.compute.collective.ring import SPREAD, SUM, Piece, Send
from mycel.compute.collective.stock import Stock
from mycel.protocol.errors import RemoteProtocolError
from mycel.protocol.lane import PART, Body, Head, Parcel


class _Workplace(threading.local):
    """A chunk of float32 for each thread."""

    def __init__(self) -> None:
        self._values = np.empty(0, np.float32)

    def values(self, items: int) -> Floats:
        """An array of `items` items that hold anything."""
        if self._values.size < items:
            self._values = np.empty(items, np.float32)
        return self._values[:items]


_workplace = _Workplace()


def _raise(error: InputRefused) -> None:
    raise error


class Untrue(RemoteProtocolError):
    """A member sent what is not its to send: the operation cannot end, whatever carries it is in order."""


class Operation:
    """See above. `source` is this member's input, `target` where the result grows; they may be the same."""

    def __init__(
        self,
        plan: Plan,
        source: Array,
        target: Array,
        stock: Stock,
        *,
        residual: Residual | None = None,
        is_scratch: bool = False,
    ) -> None:
        """Neither array is written before `work` or `place_own`. Both are of `storage(dtype)` of the rule.

        `is_scratch`: nobody cares what the target held before.
        """
        self.plan = plan
        self.digest = plan.digest()
        self.places = plan.places
        self.gate = Doorway()
        self.course = plan.course()
        self.missing = self.course.expected
        self.on_refused: Callable[[InputRefused], None] = _raise
        """Called in whatever thread encodes, where an item of this member's has no code."""
        self._rule = plan.task.rule
        self._codec = plan.codec
        self._source = source
        self._target = target
        self._stock = stock
        self._residual = residual
        self._turn = threading.Lock()
        self._come: dict[Piece, None] = {}
        self._is_scratch = is_scratch
        self._kept_spans: dict[tuple[int, int], None] = {}
        self._borrowed: list[Bytes] = []
        self._kept_items = target
        if not self._is_scratch:
            self._borrowed.append(stock.take(target.nbytes))
            self._kept_items = self._borrowed[0].view(target.dtype)
        self._wire: dict[int, Bytes] = {}
        self._offsets: list[int] = []
        if self._codec is not None:
            self._lay_out_wire(self._codec)
        self._arrays = {plan.me: source} if plan.is_star else {}

    def _lay_out_wire(self, codec: BlockCodec) -> None:
        cut, at = self.plan.cut, 0
        for part in range(len(cut.parts)):
            self._offsets.append(at)
            for chunk in range(cut.chunks(part)):
                begin, end = cut.bounds(part, chunk)
                at += -(-codec.wire_bytes(end - begin) // 4) * 4  # scales are aligned
        for phase in (SUM, SPREAD):
            self._wire[phase] = self._stock.take(at)
            self._borrowed.append(self._wire[phase])

    # What goes out

    def first(self, place: int) -> list[Parcel]:
        """What the member at `place` gets before anything came from anywhere."""
        return [self._parcel(send, own=True) for send in self.course.first() if send.to == place]

    def _parcel(self, send: Send, *, own: bool = False) -> Parcel:
        piece = send.piece
        head = Head(self.digest, PART, piece.phase, piece.part, piece.chunk, self._length(piece))
        fill = partial(self._fill, piece, own)
        return Parcel(self.places[send.to], head, fill, self.gate, is_answer=not own)

    def _length(self, piece: Piece) -> int:
        begin, end = self.plan.cut.bounds(piece.part, piece.chunk)
        if self._codec is not None:
            return self._codec.wire_bytes(end - begin)
        return (end - begin) * self._target.dtype.itemsize

    def _fill(self, piece: Piece, own: bool) -> memoryview | None:
        """The bytes of a piece as they travel. `own`: it is this member's input and nothing else."""
        begin, end = self.plan.cut.bounds(piece.part, piece.chunk)
        if self._codec is None:
            array = self._source if own and piece.phase == SUM else self._target
            return array[begin:end].data.cast("B")
        wire = self._wire_of(piece)
        try:
            if own and piece.phase == SUM:
                self._encode_own(piece, wire)
        except InputRefused as error:
            self.on_refused(error)
            return None
        return wire.data

    def _wire_of(self, piece: Piece) -> Bytes:
        assert self._codec is not None
        at = self._offsets[piece.part]
        if piece.chunk:
            full = self._codec.wire_bytes(self.plan.cut.chunk_items)
            at += piece.chunk * (-(-full // 4) * 4)
        return self._wire[piece.phase][at : at + self._length(piece)]

    def _encode_own(self, piece: Piece, wire: Bytes) -> None:
        begin, end = self.plan.cut.bounds(piece.part, piece.chunk)
        self._encode(self._own_values(begin, end), wire, begin)

    # What comes in

    def expect(self, place: int, head: Head) -> Piece | None:
        """The piece of a frame; None where it has come before.

        Raises `RemoteProtocolError` unless it is one that the member at `place` has to send, in its length.
        """
        piece = Piece(head.phase, head.part, head.chunk)
        if not self.course.expects(place, piece):
            raise Untrue(f"part {piece.part}, chunk {piece.chunk} of phase {piece.phase} is not its to send")
        if head.length != self._length(piece):
            raise Untrue(
                f"part {piece.part}, chunk {piece.chunk} comes as {head.length} bytes "
                f"and has {self._length(piece)}"
            )
        with self._turn:
            if piece in self._come:
                return None
            self._come[piece] = None
            return piece

    def work(self, piece: Piece, body: Body) -> list[Parcel]:
        """Work in a piece that `expect` gave, within the gate; returns what to send now.

        Raises `RemoteProtocolError` where its body is not what was sent (it may come again then), and
        `InputRefused` where this member's own items cannot be encoded.
        """
        try:
            if self.plan.is_star:
                self._work_star(piece, body)
            elif piece.phase == SUM:
                self._work_sum(piece, body)
            else:
                self._work_spread(piece, body)
        except RemoteProtocolError:
            with self._turn:
                del self._come[piece]
            raise
        with self._turn:
            sends = self.course.after(piece)
        if sends and self.plan.is_star:
            self._sum_star()
        with self._turn:
            self.missing -= 1
        return [self._parcel(send) for send in sends]

    def place_own(self, part: Array, start: int) -> None:
        """Put this member's own part, which begins at item `start`, where it stands in the result.

        For what is gathered and not summed, before anything is sent. Raises `InputRefused`.
        """
        place = self.plan.me
        for chunk in range(self.plan.cut.chunks(place)):
            begin, end = self.plan.cut.bounds(place, chunk)
            own = part[begin - start : end - start]
            self._keep_aside(begin, end)
            if self._codec is None:
                self._target[begin:end] = own
                continue
            wire = self._wire_of(Piece(SPREAD, place, chunk))
            self._encode(widen(self._rule.dtype, own), wire, begin)
            self._decode_into_target(begin, end, wire)

    def _work_sum(self, piece: Piece, body: Body) -> None:
        begin, end = self.plan.cut.bounds(piece.part, piece.chunk)
        is_last = piece.part == self.plan.me
        members = len(self.places)
        if self._codec is None:
            theirs = items_of(body.open(), self._rule.dtype)
            self._keep_aside(begin, end)
            out = self._target[begin:end]
            put_together(self._rule.dtype, self._rule.op, theirs, self._source[begin:end], out)
            if is_last:
                finish(self._rule.dtype, self._rule.op, members, out)
            return
        wire = as_bytes(body.open())
        self._check_scales(wire, end - begin)
        values = _workplace.values(end - begin)
        self._codec.decode(wire, values, add=self._own_values(begin, end))
        if not is_last:
            self._encode(values, self._wire_of(piece), begin)
            return
        self._keep_aside(begin, end)
        decoded = self._target[begin:end]
        if self._rule.dtype != "float32":
            decoded = np.empty(end - begin, np.float32)
        divisor = members if self._rule.op == "avg" else 1
        spread = self._wire_of(piece._replace(phase=SPREAD))
        self._encode(values, spread, begin, divisor=divisor, decoded=decoded)
        if self._rule.dtype != "float32":
            narrow(self._rule.dtype, decoded, self._target[begin:end])

    def _work_spread(self, piece: Piece, body: Body) -> None:
        begin, end = self.plan.cut.bounds(piece.part, piece.chunk)
        if self._codec is None:
            self._keep_aside(begin, end)
            body.open_into(self._target[begin:end].data.cast("B"))
            return
        wire = self._wire_of(piece)
        body.open_into(wire.data)
        self._check_scales(wire, end - begin)
        self._keep_aside(begin, end)
        self._decode_into_target(begin, end, wire)

    def _work_star(self, piece: Piece, body: Body) -> None:
        if piece.phase == SUM:
            self._arrays[piece.part] = items_of(bytes(body.open()), self._rule.dtype)
            return
        self._keep_aside(0, self._target.size)
        body.open_into(self._target.data.cast("B"))

    def _sum_star(self) -> None:
        """At the centre, once all arrays are there: in the order of the places."""
        total = self._arrays[0].copy()
        for place in range(1, len(self.places)):
            put_together(self._rule.dtype, self._rule.op, total, self._arrays[place], total)
        finish(self._rule.dtype, self._rule.op, len(self.places), total)
        self._keep_aside(0, self._target.size)
        self._target[...] = total

    # Quantized items

    def _own_values(self, begin: int, end: int) -> Floats:
        """This member's input and what was lost of it before; the caller's own memory where it is that."""
        values = widen(self._rule.dtype, self._source[begin:end])
        return values if self._residual is None else values + self._residual.before[begin:end]

    def _encode(
        self, values: Floats, wire: Bytes, begin: int, *, divisor: int = 1, decoded: Floats | None = None
    ) -> None:
        """Encode the values of a chunk that begins at item `begin`, and see to what that loses."""
        assert self._codec is not None
        if self._residual is not None and decoded is None:
            decoded = np.empty_like(values)
        try:
            self._codec.encode(values, wire, divisor=divisor, decoded=decoded)
        except NotFinite as error:
            raise InputRefused(
                f"{error}; {self._rule.codec} has no code for it: skip the step, or leave the codec out"
            ) from None
        if self._residual is not None and decoded is not None:
            lost = self._residual.after[begin : begin + values.size]
            feed_back(values, decoded.copy() if divisor != 1 else decoded, divisor, lost)

    def _check_scales(self, wire: Bytes, items: int) -> None:
        assert self._codec is not None
        try:
            self._codec.check(wire, items)
        except NotFinite as error:
            raise Untrue(f"a quantized chunk with {error}") from None

    def _decode_into_target(self, begin: int, end: int, wire: Bytes) -> None:
        assert self._codec is not None
        out = self._target[begin:end]
        if self._rule.dtype == "float32":
            self._codec.decode(wire, out)
            return
        decoded = np.empty(end - begin, np.float32)
        self._codec.decode(wire, decoded)
        narrow(self._rule.dtype, decoded, out)

    # The end

    def _keep_aside(self, begin: int, end: int) -> None:
        """Before a span of the target is written for the first time. Spans are chunks: equal or apart."""
        if self._is_scratch:
            return
        span = (begin, end)
        with self._turn:
            if span in self._kept_spans:
                return
            self._kept_spans[span] = None
        self._kept_items[begin:end] = self._target[begin:end]

    def keep(self) -> None:
        """The result stands."""
        self.gate.close()
        self._give_back()

    def drop(self) -> None:
        """Put everything back as it was."""
        self.gate.close()
        for begin, end in self._kept_spans:
            self._target[begin:end] = self._kept_items[begin:end]
        self._give_back()

    def _give_back(self) -> None:
        for array in self._borrowed:
            self._stock.give(array)
        self._borrowed.clear()
