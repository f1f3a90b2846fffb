"""Processes that are one group, for bench/kills.py: started, told, listened to, buried and replaced.

Each runs bench/kills_far.py. What one says is kept with its time, which all processes share, so whoever waits
for a word names the moment from which on it counts.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

FAR = Path(__file__).with_name("kills_far.py")
WITHIN_S = 60.0
TICK_S = 0.05
LATE_S = 0.25
"""A tick that comes this late says that this process stood still."""

Said = dict[str, Any]


class NotSo(Exception):
    """Something that was to happen did not, in time."""


@dataclass(eq=False)
class Peer:
    """One process, and what it said."""

    number: int
    process: trio.Process
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    id: str = ""
    address: str = ""
    said: list[Said] = field(default_factory=list)
    news: trio.lowlevel.ParkingLot = field(default_factory=trio.lowlevel.ParkingLot)

    async def tell(self, **command: Any) -> None:
        """Give it a command."""
        assert self.process.stdin is not None
        await self.process.stdin.send_all(json.dumps(command).encode() + b"\n")

    def find(self, word: str, since: float, where: Callable[[Said], bool] = bool) -> Said | None:
        """The first thing it said with this word, since then."""
        return next((s for s in self.said if word in s and s["t"] >= since and where(s)), None)

    async def hear(
        self, word: str, since: float, where: Callable[[Said], bool] = bool, within_s: float = WITHIN_S
    ) -> Said:
        """Wait for that. Raises `NotSo`; time in which this process itself stood still is not counted."""
        for _ in range(math.ceil(within_s)):
            with trio.move_on_after(1):
                while (found := self.find(word, since, where)) is None:
                    await self.news.park()
                return found
        last = [said for said in self.said if said["t"] >= since][-5:]
        raise NotSo(f"peer {self.number} did not say {word!r} within {within_s:g} s; it said {last}")

    def wake(self) -> None:
        """Let it go on after SIGSTOP."""
        self.process.send_signal(signal.SIGCONT)


class Standstill:
    """Notices that this process did not run for a while: then neither did what it measures."""

    def __init__(self) -> None:
        self.seconds = 0.0

    async def watch(self) -> None:
        """Look at the clock, often."""
        while True:
            due = trio.current_time() + TICK_S
            await trio.sleep_until(due)
            late = trio.current_time() - due
            if late > LATE_S:
                self.seconds += late


class Crowd:
    """The processes there are. `peers` are in the order of their group's epoch, once `ready` said so."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._count = 0
        self._group: Said = {}
        self._joined: dict[Peer, str] = {}
        self.peers: list[Peer] = []
        self.numbers: dict[str, int] = {}

    async def come(self, count: int = 1) -> list[Peer]:
        """So many processes start, and are connected with each other and all others soon."""
        fresh = []
        for _ in range(count):
            self._count += 1
            command = [sys.executable, str(FAR), str(self._count)]
            process = await trio.lowlevel.open_process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            fresh.append(Peer(self._count, process))
            self.peers.append(fresh[-1])
            self._nursery.start_soon(self._listen, fresh[-1])
        for peer in fresh:
            hello = await peer.hear("address", 0.0)
            peer.id, peer.address = hello["id"], hello["address"]
            self.numbers[peer.id] = peer.number
        everybody = {p.id: (p.number, p.address) for p in self.peers}
        await self.tell(self.peers, peers=everybody)
        return fresh

    async def join(self, peer: Peer) -> None:
        """It wants into the group that the others are in."""
        self._joined[peer] = self._group["group"]
        await peer.tell(join=self._group)

    async def ready(self, count: int, *, quorum: str = "majority", admits: str = "whenever") -> list[Peer]:
        """See to it that a group of so many and of this kind is there; returns them in its order.

        Where members wait for each other at borders only, they are not waited for.
        """
        while len(self.peers) > count:
            await self.bury([self.peers[-1]])
        await self.come(count - len(self.peers))
        name = f"{quorum}-{admits}"
        fresh = self._group.get("group") != name
        self._group = {"group": name, "quorum": quorum, "admits": admits, "founds": False}
        for at, peer in enumerate(self.peers):
            if fresh and not at:
                await peer.tell(join={**self._group, "founds": True})
                self._joined[peer] = name
            elif self._joined.get(peer) != name:
                await self.join(peer)
        return self.peers if admits == "border" else await self.meet(self.peers)

    async def meet(self, peers: list[Peer]) -> list[Peer]:
        """Wait until just these are the group; returns them in its order."""
        since = time.monotonic()
        await self.tell(peers, meet=[peer.id for peer in peers])
        met = [(await peer.hear("met", since))["met"] for peer in peers]
        if met.count(met[0]) != len(met):
            raise NotSo(f"members are in different epochs: {met}")
        self.peers.sort(key=lambda peer: met[0].index(peer.id) if peer.id in met[0] else len(met[0]))
        return [peer for peer in self.peers if peer.id in met[0]]

    async def tell(self, whom: Iterable[Peer], **command: Any) -> None:
        """Give all of them a command."""
        for peer in list(whom):
            await peer.tell(**command)

    async def bury(self, peers: Iterable[Peer]) -> None:
        """They are dead, or are killed now."""
        for peer in list(peers):
            self.peers.remove(peer)
            self._joined.pop(peer, None)
            os.kill(peer.process.pid, signal.SIGKILL)
            await peer.process.wait()
            peer.scope.cancel()

    async def disperse(self) -> None:
        """Kill all, and begin anew."""
        await self.bury(self.peers)
        self._group = {}

    def names(self, ids: Iterable[str]) -> list[int]:
        """The numbers of peers."""
        return sorted(self.numbers[peer] for peer in ids)

    async def _listen(self, peer: Peer) -> None:
        """Keep what it says, until it is buried."""
        assert peer.process.stdout is not None
        rest = b""
        with peer.scope:
            while data := await peer.process.stdout.receive_some():
                rest += data
                *lines, rest = rest.split(b"\n")
                peer.said += map(json.loads, lines)
                peer.news.unpark_all()
