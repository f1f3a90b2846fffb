"""The thread of lanes: nobody waits for anybody, and it sleeps where there is nothing to do."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from mycel.node.lane_threads import LaneThread

LONG_S = 10


class Lane:
    """A `LaneEnd` whose steps are told from outside."""

    def __init__(self, step: Callable[[], bool]) -> None:
        self.sock, self.far = socket.socketpair()
        self.sock.setblocking(False)
        self.is_over = self.is_full = self.has_news = False
        self.steps = 0
        self.left = threading.Event()
        self._step = step

    def step(self) -> bool:
        self.steps += 1
        return self._step()

    def pause_s(self) -> float | None:
        return None

    def leave(self) -> None:
        self.left.set()


@pytest.fixture
def thread() -> Iterator[LaneThread]:
    made = LaneThread()
    yield made
    made.stop()


@pytest.fixture
def make() -> Iterator[Callable[[Callable[[], bool]], Lane]]:
    lanes: list[Lane] = []

    def make(step: Callable[[], bool]) -> Lane:
        lanes.append(Lane(step))
        return lanes[-1]

    yield make
    for lane in lanes:
        lane.far.close()


def test_a_lane_that_comes_while_another_is_busy_is_driven_at_once(
    thread: LaneThread, make: Callable[..., Lane]
) -> None:
    driven = threading.Event()
    thread.add(make(lambda: not driven.is_set()))
    thread.add(make(lambda: driven.set() or False))
    assert driven.wait(LONG_S)


def test_it_sleeps_until_it_is_woken_or_something_comes(
    thread: LaneThread, make: Callable[..., Lane]
) -> None:
    stepped = threading.Semaphore(0)
    lane = make(lambda: stepped.release() or False)
    thread.add(lane)
    assert stepped.acquire(timeout=LONG_S)
    while stepped.acquire(timeout=0.2):  # the round in which it came, and one for the bell
        assert lane.steps < 5
    thread.wake()
    assert stepped.acquire(timeout=LONG_S)
    lane.far.send(b"x")
    assert stepped.acquire(timeout=LONG_S)
    assert lane.has_news


def test_a_full_lane_is_driven_again_once_its_socket_takes_more(
    thread: LaneThread, make: Callable[..., Lane]
) -> None:
    filled, moved = threading.Event(), threading.Event()

    def push() -> bool:
        if moved.is_set():
            lane.is_over = True
            return True
        try:
            lane.sock.send(bytes(1 << 16))
        except BlockingIOError:
            lane.is_full = True
            filled.set()
            return False
        if filled.is_set():
            moved.set()
        return True

    lane = make(push)
    thread.add(lane)
    assert filled.wait(LONG_S)
    while not moved.is_set():
        lane.far.recv(1 << 20)
    assert lane.left.wait(LONG_S)


def test_a_lane_that_is_over_is_left_and_closed_and_others_go_on(
    thread: LaneThread, make: Callable[..., Lane]
) -> None:
    other = make(lambda: False)
    thread.add(other)

    def end() -> bool:
        lane.is_over = True
        return True

    lane = make(end)
    thread.add(lane)
    assert lane.left.wait(LONG_S)
    assert lane.far.recv(1) == b""
    before = other.steps
    thread.wake()
    other.far.send(b"x")
    while other.steps == before:
        pass
    assert not other.left.is_set()
