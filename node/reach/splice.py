"""Joining two streams at a relay: what comes on one goes out on the other, with no task and little memory.

A piece that arrives is copied straight into the other connection's output where there is room and the rate
allows it. Else it is held, and only what was forwarded is credited: the sender stops once its window is
full, so a circuit holds its two windows at most, however slow or hostile an end is. One task of the relay
goes on with what was held, when room or time has come; flows take turns a piece at a time.

A circuit ends in order when both ends have finished, and by a reset of both streams when one is lost or a
limit is reached.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import trio

from mycel.node.stream import HostStream
from mycel.protocol.alarm import Alarm
from mycel.protocol.errors import MycelError
from mycel.protocol.rate import Bucket
from mycel.protocol.relay import Limit
from mycel.protocol.yamux import Pool

LARGE_BYTES = 8 * 1024
"""Pieces from this size on are flushed together with those behind them; smaller ones at once."""


class Splicer:
    """The copying of one relay. Call `run` in a nursery."""

    def __init__(self, window: int, pool: int) -> None:
        """`window`: bytes that a receive window of a circuit may grow to; `pool`: by which all may grow."""
        self._window = window
        self._pool = Pool(pool)
        self._alarm = Alarm()
        self._numbers = 0
        self._ready: dict[int, Flow] = {}
        self._unsent: dict[int, HostStream] = {}
        self._task: trio.lowlevel.Task | None = None
        self.forwarded = 0
        """Bytes, over all circuits."""

    async def run(self) -> None:
        """Copy what had to wait until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._alarm.run)
            while True:
                if not self._ready and not self._unsent:
                    self._task = trio.lowlevel.current_task()
                    await trio.lowlevel.wait_task_rescheduled(self._abort)
                ready, self._ready = self._ready, {}
                for flow in ready.values():
                    flow.go_on()
                unsent, self._unsent = self._unsent, {}
                for stream in unsent.values():
                    stream.flush()
                await trio.lowlevel.checkpoint()

    def _abort(self, _: trio.lowlevel.RaiseCancelT) -> trio.lowlevel.Abort:
        self._task = None
        return trio.lowlevel.Abort.SUCCEEDED

    def join(self, one: HostStream, other: HostStream, limit: Limit, buckets: tuple[Bucket, ...]) -> Splice:
        """From now on what comes on either stream goes out on the other."""
        splice = Splice(self, (one, other), limit, buckets)
        if limit.seconds:
            self.at(trio.current_time() + limit.seconds, splice)
        for flow in splice.flows:
            flow.start(self._window, self._pool)
        return splice

    def wake(self, flow: Flow) -> None:
        """`flow` can go on."""
        self._ready[flow.number] = flow
        self._wake()

    def flush_soon(self, flow: Flow, sink: HostStream) -> None:
        """Flush `sink`, once for all that is forwarded before this relay's task runs."""
        self._unsent[flow.number] = sink
        self._wake()

    def _wake(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            trio.lowlevel.reschedule(task)

    def at(self, when: float, waiter: Flow | Splice) -> None:
        """Wake or end `waiter` at `when`."""
        self._alarm.set(when, self.number(), waiter)

    def forget(self, waiter: Flow | Splice) -> None:
        """`waiter` is over."""
        self._alarm.clear(waiter)
        if isinstance(waiter, Flow):
            self._ready.pop(waiter.number, None)
            self._unsent.pop(waiter.number, None)

    def number(self) -> int:
        """A fresh number."""
        self._numbers += 1
        return self._numbers


class Splice:
    """One circuit."""

    def __init__(
        self,
        splicer: Splicer,
        streams: tuple[HostStream, HostStream],
        limit: Limit,
        buckets: tuple[Bucket, ...],
    ) -> None:
        self._splicer = splicer
        self._streams = streams
        self._on_end: Callable[[str], None] | None = None
        self.limit = limit
        self.buckets = buckets
        self.is_settled = True
        self.ended: str | None = None
        """Why it is over."""
        one, other = streams
        self.flows = (Flow(splicer, self, one, other), Flow(splicer, self, other, one))

    def when_over(self, tell: Callable[[str], None]) -> None:
        """Call `tell` with the reason when the circuit is over, at once where it is."""
        self._on_end = tell
        if self.ended is not None:
            tell(self.ended)

    def expire(self) -> None:
        """See `deadlines.Waiter`: the circuit's time is up."""
        self.cut(f"its {self.limit.seconds} s are over")

    def cut(self, reason: str) -> None:
        """End both streams at once."""
        if self._settle(reason):
            for stream in self._streams:
                stream.reset()

    def on_finished(self) -> None:
        """One direction has ended."""
        if all(flow.is_finished for flow in self.flows):
            self._settle("both ends finished")

    def _settle(self, reason: str) -> bool:
        if self.ended is not None:
            return False
        self.ended = reason
        self._splicer.forget(self)
        for flow in self.flows:
            flow.drop()
        if self._on_end is not None:
            self._on_end(reason)
        return True


class Flow:
    """One direction of a circuit."""

    __slots__ = (
        "_count",
        "_ended",
        "_held",
        "_sink",
        "_source",
        "_splice",
        "_splicer",
        "is_finished",
        "is_settled",
        "number",
    )

    def __init__(self, splicer: Splicer, splice: Splice, source: HostStream, sink: HostStream) -> None:
        self._splicer = splicer
        self._splice = splice
        self._source = source
        self._sink = sink
        self._held: deque[memoryview] = deque()
        self._count = 0
        self._ended = False
        self.is_finished = False
        self.is_settled = True
        self.number = splicer.number()

    def start(self, window: int, pool: Pool) -> None:
        """Take what comes from the source from now on."""
        self._sink.on_room = self._on_room
        self._source.bound_window(window, pool)
        self._source.deliver_to(self._take, credit=False)

    def expire(self) -> None:
        """See `deadlines.Waiter`: the rate allows more."""
        self._splicer.wake(self)

    def go_on(self) -> None:
        """Forward one piece of what is held; come again while there is more and it can go."""
        if self._held and self._splice.ended is None and self._sink.has_room and self._is_time():
            piece = self._held[0]
            taken = self._forward(piece)
            if taken == len(piece):
                self._held.popleft()
            elif taken:
                self._held[0] = piece[taken:]
            if self._held and self._sink.has_room:
                self._splicer.wake(self)  # behind the others: whoever just sent asks for its time last
        self._finish()

    def drop(self) -> None:
        """The circuit is over."""
        self._held.clear()
        self._sink.on_room = None
        self._splicer.forget(self)

    def _on_room(self) -> None:
        if self._held:
            self._splicer.wake(self)

    def _take(self, data: memoryview | None, error: Exception | None) -> None:
        """The source's receiver."""
        if self._splice.ended is not None:
            return
        if data is None:
            if error is not None:
                self._splice.cut(f"{self._source.peer}: {error}")
            else:
                self._ended = True
                self._finish()
            return
        self._count += len(data)
        if 0 < self._splice.limit.data < self._count:
            self._splice.cut(f"its {self._splice.limit.data} bytes in one direction are used up")
            return
        taken = 0
        if not self._held and self._sink.has_room and self._is_time():
            taken = self._forward(data)
        if taken < len(data) and self._splice.ended is None:
            self._held.append(memoryview(bytes(data[taken:])))

    def _forward(self, data: memoryview) -> int:
        try:
            taken = self._sink.offer(data, flush=len(data) < LARGE_BYTES)
        except MycelError as error:
            self._splice.cut(f"{self._sink.peer}: {error}")
            return 0
        if len(data) >= LARGE_BYTES:
            self._splicer.flush_soon(self, self._sink)
        for bucket in self._splice.buckets:
            bucket.spend(taken)
        self._splicer.forwarded += taken
        self._source.credit(taken)
        return taken

    def _is_time(self) -> bool:
        """Whether the rates allow more now; else the flow is woken when they do."""
        if not self._splice.buckets:
            return True
        now = trio.current_time()
        when = max(bucket.ready_at(now) for bucket in self._splice.buckets)
        if when <= now:
            return True
        if self.is_settled:
            self._splicer.at(when, self)
        return False

    def _finish(self) -> None:
        if self._ended and not self._held and not self.is_finished and self._splice.ended is None:
            self.is_finished = True
            self._sink.finish()
            self._splice.on_finished()
