"""Peers that come, die and stop, all the time, with eight reduces under way: real processes and sockets.

Two to six peers sum arrays without end. Every half to two seconds one of them is killed (SIGKILL), or stopped
for up to six seconds (SIGSTOP, SIGCONT), or a new one comes. Of every reduce it must be true that all who
ended it have the same bytes, and that these are the sum of what its contributors gave; of every peer, that
none of its eight reduces waits for longer than 10 s while it runs, whether it waits for a result, a stop or
its death. Time in which this bench itself did not run, because somebody stopped it or the machine slept, is
nobody's pause; it is played longer by as much. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import subprocess
import sys
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio
from measure import report

FAR = Path(__file__).with_name("churn_far.py")
PEERS_MIN, PEERS_MAX = 2, 6
PAUSE_S_MAX = 10.0
STOP_S = (0.2, 6.0)
TAGS = [f"t{tag}" for tag in range(8)]
TICK_S = 0.1
LATE_S = 0.5
"""A tick that comes this late says that this process stood still."""


@dataclass(eq=False)
class Peer:
    """One process."""

    number: int
    process: trio.Process
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    id: str = ""
    address: str = ""
    is_stopped: bool = False
    last: list[str] = field(default_factory=list)
    """Who contributed to its last result."""
    since: dict[str, float] = field(default_factory=dict)
    """Per tag: since when it has waited for a result, without being stopped."""


class Churn:
    """The peers there are, and what they said."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.peers: list[Peer] = []
        self.count = 0
        self.results: dict[str, tuple[str, float | None, list[str]]] = {}
        self.numbers: dict[str, int] = {}
        self.pauses: list[float] = []
        self.together: dict[int, int] = {}
        """How many results came of groups of how many."""
        self.missed: dict[str, tuple[float, list[str]]] = {}
        """Killed peers: when, and who had reduced with them just before."""
        self.after_kill: list[float] = []
        self.wrong: list[str] = []
        self.ticked = self.began = trio.current_time()
        self.stood_still_s = 0.0
        self.story: deque[tuple[float, str]] = deque(maxlen=200)
        """What happened lately: when, and what."""
        self.long: list[str] = []
        """Pauses that were too long, and what had happened before them."""
        self.events = dict.fromkeys(("come", "kill", "stop", "fenced", "reductions", "retried"), 0)

    async def run(self, seconds: float) -> None:
        """Play for so long."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.tick)
            for _ in range(3):
                await self.come(nursery)
            end = trio.current_time() + seconds
            while self.now() < end + self.stood_still_s:
                await trio.sleep(self.draw.uniform(0.5, 2))
                awake = [peer for peer in self.peers if peer.id and not peer.is_stopped]
                what = self.draw.choice(["come", "kill", "stop"])
                if what == "come" and len(self.peers) < PEERS_MAX:
                    await self.come(nursery)
                elif what == "kill" and len(awake) > PEERS_MIN:
                    self.kill(self.draw.choice(awake))
                elif what == "stop" and len(awake) > PEERS_MIN:
                    nursery.start_soon(self.stop, self.draw.choice(awake), self.draw.uniform(*STOP_S))
            for peer in self.peers[:]:
                self.kill(peer)
            nursery.cancel_scope.cancel()

    async def tick(self) -> None:
        """Look at the clock, often."""
        while True:
            self.now()
            await trio.sleep(TICK_S)

    def now(self) -> float:
        """The time; what this process did not see of it is left out of all that is waited for."""
        now = trio.current_time()
        late = now - self.ticked - TICK_S
        self.ticked = now
        if late > LATE_S:
            self.stood_still_s += late
            self.note(f"this process stood still for {late:.1f} s")
            for peer in self.peers:
                peer.since = {tag: since + late for tag, since in peer.since.items()}
            self.missed = {peer: (when + late, who) for peer, (when, who) in self.missed.items()}
        return now

    async def come(self, nursery: trio.Nursery) -> None:
        """A process starts."""
        self.count += 1
        self.events["come"] += 1
        self.note(f"peer {self.count} starts")
        command = [sys.executable, str(FAR), str(self.count)]
        process = await trio.lowlevel.open_process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        peer = Peer(self.count, process)
        self.peers.append(peer)
        nursery.start_soon(self.listen, peer)

    def kill(self, peer: Peer) -> None:
        """It dies at once."""
        self.events["kill"] += 1
        self.note(f"peer {peer.number} is killed")
        self.peers.remove(peer)
        self.waited(peer)
        self.missed[peer.id] = (self.now(), [other for other in peer.last if other != peer.id])
        peer.process.send_signal(signal.SIGKILL)
        peer.scope.cancel()

    async def stop(self, peer: Peer, seconds: float) -> None:
        """It stands still for a while."""
        self.events["stop"] += 1
        self.note(f"peer {peer.number} is stopped for {seconds:.1f} s")
        self.waited(peer)
        peer.is_stopped = True
        peer.process.send_signal(signal.SIGSTOP)
        await trio.sleep(seconds)
        if peer in self.peers:
            peer.process.send_signal(signal.SIGCONT)
            self.note(f"peer {peer.number} goes on")
            self.waited(peer)
            peer.is_stopped = False

    def waited(self, peer: Peer, tags: Iterable[str] = TAGS) -> None:
        """It has waited for results until now, be it that it has them or not."""
        now = self.now()
        for tag in tags:
            pause = now - peer.since.get(tag, now)
            if tag in peer.since and not peer.is_stopped:
                self.pauses.append(pause)
                if pause > PAUSE_S_MAX:
                    self.long.append(
                        f"{now - self.began:7.2f} peer {peer.number} waited {pause:.1f} s for {tag}"
                    )
                    self.long += [
                        f"    {t:7.2f} {what}" for t, what in self.story if t > now - self.began - 2 * pause
                    ]
            peer.since[tag] = now

    def note(self, what: str) -> None:
        """Something happened."""
        self.story.append((trio.current_time() - self.began, what))

    async def listen(self, peer: Peer) -> None:
        """Take what a process says, until it is killed."""
        stdout, stdin = peer.process.stdout, peer.process.stdin
        assert stdout is not None
        assert stdin is not None
        rest = b""
        with peer.scope:
            while True:
                rest += await stdout.receive_some()
                *lines, rest = rest.split(b"\n")
                for line in lines:
                    await self.take(peer, json.loads(line))
        await peer.process.wait()

    async def take(self, peer: Peer, said: dict[str, Any]) -> None:
        """One line of a peer."""
        if "address" in said:
            peer.id, peer.address = said["id"], said["address"]
            self.note(f"peer {peer.number} is up")
            self.waited(peer)
            self.numbers[peer.id] = peer.number
            everybody = {p.id: (p.number, p.address) for p in self.peers if p.id}
            for other in self.peers:
                if other.id and other.process.stdin is not None and not other.is_stopped:
                    await other.process.stdin.send_all(json.dumps({"peers": everybody}).encode() + b"\n")
            return
        if "fenced" in said:
            self.events["fenced"] += 1
            self.note(f"peer {peer.number} is fenced")
            if not said["untouched"]:
                self.wrong.append(f"peer {peer.number} was fenced, and its array is not as it was")
            return
        self.events["reductions"] += 1
        self.events["retried"] += said["attempts"] > 1
        now = self.now()
        self.waited(peer, [said["name"].split("/")[1]])
        self.together[len(said["of"])] = self.together.get(len(said["of"]), 0) + 1
        peer.last = said["of"]
        for dead, (when, mourners) in list(self.missed.items()):
            if peer.id in mourners and dead not in said["of"]:
                self.after_kill.append(now - when)
                del self.missed[dead]
        self.check(said)

    def check(self, said: dict[str, Any]) -> None:
        """Is it the right sum, and the same as everybody's?"""
        name, found = said["name"], (said["digest"], said["sum"], said["of"])
        if self.results.setdefault(name, found) != found:
            self.wrong.append(f"{name}: {found} here, {self.results[name]} there")
        if said["sum"] != sum(self.numbers[peer] for peer in said["of"]):
            self.wrong.append(f"{name}: the sum over {said['of']} is not {said['sum']}")


async def play(seed: int, seconds: float) -> Churn:
    """Churn for so long."""
    churn = Churn(seed)
    await churn.run(seconds)
    return churn


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    churn = trio.run(play, options.seed, options.seconds)
    longest = max(churn.pauses, default=options.seconds)
    for line in [*churn.wrong[:20], *churn.long[:100]]:
        print(line)
    report(
        "churn",
        {
            "seconds": options.seconds,
            "seed": options.seed,
            "wrong": len(churn.wrong),
            "longest_pause_s": longest,
            "median_gap_s": statistics.median(churn.pauses) if churn.pauses else options.seconds,
            "after_kill_s": statistics.median(churn.after_kill) if churn.after_kill else None,
            "after_kill_s_max": max(churn.after_kill, default=None),
            "stood_still_s": churn.stood_still_s,
            "operations": len(churn.results),
            **churn.events,
            **{f"of_{size}": count for size, count in sorted(churn.together.items())},
        },
    )
    if churn.wrong or longest > PAUSE_S_MAX or not churn.results:
        sys.exit("churn: " + (churn.wrong[0] if churn.wrong else f"nothing ended for {longest:.1f} s"))


if __name__ == "__main__":
    main()
