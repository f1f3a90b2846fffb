"""How many threads a decode step is worth just now: found by trying, since nobody can tell beforehand.

Theory of operation. A decode step is a hundred short products, and after each of them all threads wait for
the slowest. On an idle machine more threads are faster, up to where memory has no more to give. Where others
want the processor too (another stage's worker, a browser), a thread that has to wait for its core holds up
the rest at every product, and a step with two threads can take three times as long as with one.

So steps of a kind (by how many rows they have) run with the number of threads that was fastest lately, and
now and then a few of them with half or twice as many. What was tried in vain is tried again more and more
rarely; when the usual step becomes much slower, soon. Decides only: the time a step took is told to it.
"""

from __future__ import annotations

import statistics

TRY_STEPS = 3
"""Steps of a try; their median counts."""
PAUSE_MIN, PAUSE_MAX = 8, 256
"""Steps between two tries."""
BETTER = 0.9
"""Another number of threads is taken when a step with it takes less than this share of the usual time."""
WORSE = 1.3
"""A usual step that takes this much longer than when it was chosen asks for another try."""
_GAIN = 0.2


class ThreadChoice:
    """Numbers of threads, from `most` halved down to 1, for steps of one kind."""

    def __init__(self, most: int) -> None:
        self.levels = levels(most)
        self._level = 0
        self._usual: dict[int, float] = {}
        """Seconds of a step, by level, when last seen."""
        self._chosen_s = 0.0
        self._pause = PAUSE_MIN
        self._since = 0
        self._trying: int | None = None
        self._tried: list[float] = []
        self._up_next = False

    def threads(self) -> int:
        """What the next step should run with."""
        return self.levels[self._level if self._trying is None else self._trying]

    def note(self, seconds: float) -> None:
        """A step with `threads()` took so long."""
        if self._trying is not None:
            self._tried.append(seconds)
            if len(self._tried) == TRY_STEPS:
                self._end_try()
            return
        level = self._level
        usual = self._usual.get(level)
        self._usual[level] = seconds if usual is None else usual + (seconds - usual) * _GAIN
        self._chosen_s = self._chosen_s or self._usual[level]
        self._since += 1
        if self._usual[level] > WORSE * self._chosen_s:
            self._chosen_s = self._usual[level]
            self._pause = PAUSE_MIN
        if self._since >= self._pause and len(self.levels) > 1:
            self._trying = self._neighbour()
            self._tried = []

    def _neighbour(self) -> int:
        """The level to try: up and down in turns, within bounds."""
        self._up_next = not self._up_next
        wanted = self._level + (1 if self._up_next else -1)
        return wanted if 0 <= wanted < len(self.levels) else 2 * self._level - wanted

    def _end_try(self) -> None:
        assert self._trying is not None
        took = statistics.median(self._tried)
        self._since = 0
        if took < BETTER * self._usual[self._level]:
            self._level = self._trying
            self._usual[self._level] = self._chosen_s = took
            self._pause = PAUSE_MIN
        else:
            self._pause = min(2 * self._pause, PAUSE_MAX)
        self._trying = None


def levels(most: int) -> tuple[int, ...]:
    """`most`, its half, ..., 1."""
    found = [max(most, 1)]
    while found[-1] > 1:
        found.append(found[-1] // 2)
    return tuple(found)
