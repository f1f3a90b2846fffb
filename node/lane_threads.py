"""The threads that drive lanes: each has some sockets of both directions, and waits for all of them at once.

What came is worked in and what follows from it is sent by the same thread, so that a chunk is received,
deciphered, added to, sealed and sent on while it is in one core's cache, and no thread waits for another's
lock, Python's included. As many threads as there are lanes to a peer share the work where one core is less
than the line.

A lane is asked to make a `step`, over and over, for as long as any does something: to try a socket costs less
than to ask which are ready. Then the thread sleeps until a socket can be read, or written where a lane waits
for that, until a bound on the rate is over, or until `wake` is called.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from collections import deque
from typing import Protocol

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


class LaneEnd(Protocol):
    """One end of a lane. All but `sock` is of the thread that drives it."""

    sock: socket.socket
    """Not blocking."""
    is_over: bool
    is_full: bool
    """Whether it waits for its socket to take more."""
    has_news: bool
    """Set when there was something to read: for who does not look at every step."""

    def step(self) -> bool:
        """Do a little, without waiting; whether there was anything to do."""

    def pause_s(self) -> float | None:
        """Seconds after which it wants to make a step, whatever the socket says; None for no such wish."""

    def leave(self) -> None:
        """It is over, and not driven any more. Its socket is closed after this."""


class LaneThread:
    """See above."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._bell, self._ringing = socket.socketpair()
        for end in (self._bell, self._ringing):
            end.setblocking(False)
        self._selector.register(self._ringing, READ)
        self._coming: deque[LaneEnd] = deque()
        self._lanes: tuple[LaneEnd, ...] = ()
        self._is_awake = False
        self._is_over = False
        self._thread = threading.Thread(target=self._run, name="lanes", daemon=True)
        self._thread.start()

    def add(self, lane: LaneEnd) -> None:
        """Drive `lane` until it is over. From any thread."""
        self._coming.append(lane)
        self.wake()

    def wake(self) -> None:
        """Have all lanes make a step. From any thread; costs nothing in this one."""
        if threading.get_ident() != self._thread.ident and not self._is_awake:
            self._is_awake = True
            with contextlib.suppress(OSError):  # so full a bell rings anyhow, and a closed one has no ear
                self._bell.send(b"\0")

    def stop(self) -> None:
        """Close all lanes' sockets and wait for the thread. From any other."""
        self._is_over = True
        self._is_awake = False
        self.wake()
        self._thread.join()
        self._selector.close()
        self._bell.close()
        self._ringing.close()

    def _run(self) -> None:
        while not self._is_over:
            if self._coming:
                self._take_in()
            is_idle = True
            for lane in self._lanes:
                if lane.step():
                    is_idle = False
                if lane.is_over:
                    self._leave(lane)
            if is_idle:
                self._sleep()
        for lane in (*self._lanes, *self._coming):
            lane.sock.close()

    def _pause_s(self) -> float | None:
        pauses = [pause for lane in self._lanes if (pause := lane.pause_s()) is not None]
        return min(pauses, default=None)

    def _sleep(self) -> None:
        """Until there may be something to do."""
        for lane in self._lanes:
            events = READ | WRITE if lane.is_full else READ
            if self._selector.get_key(lane.sock).events != events:
                self._selector.modify(lane.sock, events, lane)
        for key, events in self._selector.select(self._pause_s()):
            if key.fileobj is self._ringing:
                self._ringing.recv(4096)
            elif events & READ:
                key.data.has_news = True
        self._is_awake = False  # before it is looked what there is

    def _take_in(self) -> None:
        while self._coming:
            lane = self._coming.popleft()
            self._selector.register(lane.sock, READ, lane)
            self._lanes = (*self._lanes, lane)

    def _leave(self, lane: LaneEnd) -> None:
        self._lanes = tuple(other for other in self._lanes if other is not lane)
        self._selector.unregister(lane.sock)
        lane.leave()
        lane.sock.close()
