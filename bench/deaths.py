"""The cases of bench/kills.py: who dies where, what the others do meanwhile, and what must be true of it."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import trio
from crowd import Crowd, Peer

MID = 6
"""Of some twenty pieces that a member takes in each phase: in the midst of it."""
ROUNDS = 100
"""Syncs until all do them together..."""
LOOK_S = 0.2
"""...and between two."""
STATE_MID = 5
"""Of 24 chunks."""


@dataclass
class Finding:
    """What was seen in a case."""

    case: str
    members: list[int]
    victims: list[int] = field(default_factory=list)
    fell: list[str] = field(default_factory=list)
    """Where the victims were."""
    results: list[dict[str, Any]] = field(default_factory=list)
    """What each survivor reported of the operation."""
    error_s: list[float] = field(default_factory=list)
    retried_s: list[float] = field(default_factory=list)
    done_s: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    stood_still_s: float = 0.0
    """So long the bench itself did not run: then the times say nothing."""

    def check(self, what: bool, why: str) -> None:
        """Note what is not as it must be."""
        if not what:
            self.wrong.append(why)


Play = Callable[[Crowd, int], Awaitable[Finding]]


def step(at: str, count: int = 1, **more: Any) -> dict[str, Any]:
    """A step of a trap."""
    return {"at": at, "count": count, **more}


async def results_of(crowd: Crowd, finding: Finding, peers: list[Peer], since: float) -> None:
    """Wait until the operation has ended on all of them, and compare."""
    for peer in peers:
        said = await peer.hear("result", since)
        finding.results.append(
            {
                "peer": peer.number,
                "result": said["result"],
                "of": crowd.names(said.get("of", [])),
                "sha256": said.get("sha256", ""),
                "right": said["right"],
                "attempts": said.get("attempts", 0),
                "name": said.get("name", ""),
                "at": said.get("at", said["t"]),
                "said": said["t"],
            }
        )
    first = finding.results[0]
    for result in finding.results:
        for key in ("result", "of", "sha256", "name"):
            finding.check(result[key] == first[key], f"{key} differs: {result} and {first}")
        finding.check(result["right"], f"not numpy's sum: {result}")
    finding.check(first["result"] == "kept", f"it ended as {first}")


def clock(finding: Finding, peers: list[Peer], victims: list[Peer], since: float, died: float) -> None:
    """When it was noticed, and when bytes moved again."""
    ids = [victim.id for victim in victims]
    for peer, result in zip(peers, finding.results, strict=True):
        begun = [s for s in peer.said if s.get("attempt") == "begun" and s["t"] >= since]
        finding.check(all(s["restored"] for s in begun), f"peer {peer.number} began with another input")
        broke = [s["t"] for s in peer.said if s.get("attempt") in ("failed", "dropped") and s["t"] >= died]
        missed = [s["t"] for s in peer.said if s.get("down") in ids and s["t"] >= died]
        finding.check(bool(broke or missed), f"peer {peer.number} noticed nothing")
        noticed = min(broke or missed or [result["at"]])
        finding.error_s.append(noticed - died)
        finding.retried_s += [s["at"] - noticed for s in begun if s["at"] >= noticed][:1]
        finding.done_s.append(max(0.0, result["at"] - died))


@dataclass(frozen=True)
class Death:
    """A case in which one member falls in mid-reduce, and maybe takes others along."""

    name: str
    steps: list[dict[str, Any]]
    also: int = 0
    """How many others."""
    count: int = 3
    quorum: str = "majority"
    alone: bool = False
    """The survivors' result cannot have the dead one's part."""

    async def play(self, crowd: Crowd, seed: int) -> Finding:
        """See above; `seed` says who falls."""
        members = await crowd.ready(self.count, quorum=self.quorum)
        victims = [members[(seed + 2 * at) % self.count] for at in range(1 + self.also)]
        return await fall(crowd, self.name, {victims[0]: self.steps}, victims, alone=self.alone)


async def fall(
    crowd: Crowd,
    name: str,
    traps: dict[Peer, list[dict[str, Any]]],
    victims: list[Peer],
    *,
    alone: bool = False,
) -> Finding:
    """All members reduce; the victims with traps fall, the others are taken along by the first."""
    members = list(crowd.peers)
    survivors = [peer for peer in members if peer not in victims]
    finding = Finding(name, [p.number for p in members], [p.number for p in victims])
    since = time.monotonic()
    others = [peer.process.pid for peer in victims if peer not in traps]
    for peer, steps in traps.items():
        last = {**steps[-1], "also": others} if others else steps[-1]
        await peer.tell(trap=[*steps[:-1], last])
    await crowd.tell(members, reduce=1)
    fell = [await peer.hear("fell", since) for peer in traps]
    cut = [said for peer in traps if (said := peer.find("cut", since))]
    finding.fell = [said.get("fell") or said["cut"] for said in (*cut, *fell)]
    died = min(said["t"] for said in (*cut, *fell))
    await results_of(crowd, finding, survivors, since)
    clock(finding, survivors, victims, since, died)
    ours, everybody = sorted(p.number for p in survivors), sorted(p.number for p in members)
    of = finding.results[0]["of"]
    finding.check(of == ours or (of == everybody and not alone), f"of {of}, survivors are {ours}")
    await crowd.bury(victims)
    await crowd.meet(survivors)
    return finding


async def proposer_dies(crowd: Crowd, seed: int, *, name: str, at: str) -> Finding:
    """A member dies in mid-reduce, then the one that makes the next epoch, as it does."""
    members = await crowd.ready(5)
    first = members[1 + seed % 4]
    traps = {first: [step("reduce-scatter", MID)], members[0]: [step(at)]}
    return await fall(crowd, name, traps, [first, members[0]], alone=True)


async def stop(crowd: Crowd, seed: int, *, name: str, at: str) -> Finding:
    """A member is stopped in mid-reduce until the others have gone on; then it finds out and comes back."""
    members = await crowd.ready(3)
    victim = members[seed % 3]
    survivors = [peer for peer in members if peer is not victim]
    finding = Finding(name, [p.number for p in members], [victim.number])
    since = time.monotonic()
    await victim.tell(trap=[step(at, MID, do="stop")])
    await crowd.tell(members, reduce=1)
    fell = await victim.hear("fell", since)
    finding.fell = [fell["fell"]]
    await results_of(crowd, finding, survivors, since)
    clock(finding, survivors, [victim], since, fell["t"])
    finding.check(victim.number not in finding.results[0]["of"], "the silent one's part is in the result")
    woke = time.monotonic()
    victim.wake()
    zombie = await victim.hear("result", since)
    finding.check(zombie["result"] == "Fenced", f"the one that was stopped: {zombie}")
    finding.check(zombie["right"], "the one that was stopped has not its input any more")
    finding.results.append({"peer": victim.number, "result": zombie["result"], "right": zombie["right"]})
    finding.results[-1]["fenced_s"] = zombie["t"] - woke
    await again(crowd, finding, members)
    return finding


async def nap(crowd: Crowd, seed: int, *, name: str) -> Finding:
    """A member is stopped for a second, which costs nobody its place."""
    members = await crowd.ready(3)
    victim = members[seed % 3]
    finding = Finding(name, [p.number for p in members], [victim.number])
    since = time.monotonic()
    await victim.tell(trap=[step("reduce-scatter", MID, do="stop")])
    await crowd.tell(members, reduce=1)
    finding.fell = [(await victim.hear("fell", since))["fell"]]
    await trio.sleep(1)
    victim.wake()
    await results_of(crowd, finding, members, since)
    finding.check(finding.results[0]["of"] == sorted(finding.members), f"of {finding.results[0]['of']}")
    finding.check(finding.results[0]["attempts"] == 1, "a second's silence cost an attempt")
    return finding


async def again(crowd: Crowd, finding: Finding, members: list[Peer]) -> None:
    """All of these come together, and sum once more."""
    await crowd.meet(members)
    later = Finding(finding.case, [])
    since = time.monotonic()
    await crowd.tell(members, reduce=1)
    await results_of(crowd, later, members, since)
    everybody = sorted(p.number for p in members)
    later.check(later.results[0]["of"] == everybody, f"of {later.results[0]['of']}, not {everybody}")
    finding.wrong += [f"afterwards: {wrong}" for wrong in later.wrong]


async def newcomer(crowd: Crowd, seed: int, *, name: str, at: str) -> Finding:
    """Somebody comes in while the others reduce, and dies as it does; what they call next is not held up."""
    members = list(await crowd.ready(3))
    (fresh,) = await crowd.come()
    finding = Finding(name, [p.number for p in members], [fresh.number])
    since = time.monotonic()
    await fresh.tell(trap=[step(at)])
    await crowd.tell(members, reduce=3)
    await crowd.join(fresh)
    fell = await fresh.hear("fell", since)
    finding.fell = [fell["fell"]]
    for turn in range(4):
        one = Finding(name, finding.members)
        if turn == 3:
            since = time.monotonic()
            await crowd.tell(members, reduce=1)
        await results_of(crowd, one, members, since)
        one.check(one.results[0]["of"] == sorted(finding.members), f"of {one.results[0]['of']}")
        finding.wrong += [f"reduce {turn + 1}: {wrong}" for wrong in one.wrong]
        finding.results = one.results
        began, since = since, max(result["said"] for result in one.results) + 1e-6
    finding.done_s = [result["at"] - max(began, fell["t"]) for result in finding.results]
    await crowd.bury([fresh])
    await crowd.meet(members)
    return finding


async def sync_dies(crowd: Crowd, seed: int, *, name: str, at: str) -> Finding:
    """A newcomer takes the state over from three members; it dies in mid-course, or one of those does.

    Timed is the newcomer's sync from that death on, or the others' next one, from its beginning.
    """
    members = list(await crowd.ready(3, admits="border"))
    await share(crowd, Finding(name, []), dict.fromkeys(members, 1.0))
    (fresh,) = await crowd.come()
    finding = Finding(name, [p.number for p in (*members, fresh)])
    victim = fresh if at == "state-receiver" else members[seed % 3]
    survivors = [peer for peer in (*members, fresh) if peer is not victim]
    finding.victims = [victim.number]
    await crowd.join(fresh)
    since = time.monotonic()
    await victim.tell(trap=[step(at, STATE_MID)])
    await share(crowd, finding, {fresh: 0.0, **dict.fromkeys(members, 1.0)}, victim)
    fell = await victim.hear("fell", since)
    finding.fell = [fell["fell"]]
    if victim is not fresh:
        finding.done_s = [r["at"] - fell["t"] for r in finding.results if r["peer"] == fresh.number]
        replaced = [result["peer"] for result in finding.results if result["replaced"]]
        finding.check(replaced == [fresh.number], f"{replaced} took the state over")
    await crowd.bury([victim])
    since = time.monotonic()
    later = Finding(name, [])
    await share(crowd, later, dict.fromkeys(survivors, 1.0))
    finding.check(not any(result["behind"] for result in later.results), "they differ afterwards")
    finding.wrong += [f"afterwards: {wrong}" for wrong in later.wrong]
    finding.done_s = finding.done_s or [result["at"] - since for result in later.results]
    return finding


async def share(
    crowd: Crowd, finding: Finding, values: dict[Peer, float], victim: Peer | None = None
) -> None:
    """All share their state until they have done it together; then they hold the same.

    Whoever comes in does so at a border, and who was there already has to come to another one.
    """
    everybody = crowd.names(peer.id for peer in values)

    async def one(peer: Peer, value: float) -> None:
        of: list[int] = []
        for _ in range(ROUNDS):
            if of == everybody:
                break
            await trio.sleep(LOOK_S)  # who comes may not be connected to all yet
            since = time.monotonic()
            await peer.tell(sync=value)
            said = await peer.hear("synced", since)
            of = crowd.names(said.get("of", []))
            finding.check(said["synced"] == "kept", f"peer {peer.number}: {said}")
            if finding.wrong:
                return
        if peer is victim:
            return  # it gives to others yet
        behind = crowd.names(said["behind"])
        finding.results.append(
            {"peer": peer.number, "root": said["root"], "replaced": said["replaced"], "behind": behind}
        )
        finding.results[-1]["at"] = said["t"]

    async def until_it_falls(peer: Peer, value: float) -> None:
        since = time.monotonic()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one, peer, value)
            await peer.hear("fell", since)
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for peer, value in values.items():
            nursery.start_soon(until_it_falls if peer is victim else one, peer, value)
    roots = [result["root"] for result in finding.results]
    finding.check(bool(roots) and roots.count(roots[0]) == len(roots), f"states differ: {finding.results}")


async def down_to_one(crowd: Crowd, seed: int, *, name: str) -> Finding:
    """Two of three die at once; the one that is left goes on alone, and two others come in."""
    death = Death(name, [step("reduce-scatter", MID)], also=1, quorum="any", alone=True)
    finding = await death.play(crowd, seed)
    alone = list(crowd.peers)
    finding.check(len(alone) == 1, f"{len(alone)} are left")
    await again(crowd, finding, alone)
    await again(crowd, finding, await crowd.ready(3, quorum="any"))
    return finding


def dying(name: str, steps: list[dict[str, Any]], **more: Any) -> tuple[str, Play]:
    """A case in which one member falls in mid-reduce."""
    return name, Death(name, steps, **more).play


BREAK = step("reduce-scatter", MID, do="cut")

CASES: dict[str, Play] = dict(
    [
        dying("arrival", [step("begin")], alone=True),
        dying("reduce_scatter", [step("reduce-scatter", MID)], alone=True),
        dying("all_gather", [step("all-gather", MID)], alone=True),
        dying("before_vote", [step("vote")]),
        dying("others_have_voted", [step("vote", wait_s=0.5)]),
        dying("vote_told_to_one", [step("vote-told", wait_s=0.5)]),
        dying("before_commit", [step("commit")]),
        dying("re_dialling", [BREAK, step("dial")]),
        dying("re_connected", [BREAK, step("dialled")]),
        ("silent", partial(stop, name="silent", at="reduce-scatter")),
        ("silent_late", partial(stop, name="silent_late", at="all-gather")),
        ("nap", partial(nap, name="nap")),
        ("newcomer_knocks", partial(newcomer, name="newcomer_knocks", at="knock")),
        ("newcomer_admitted", partial(newcomer, name="newcomer_admitted", at="admitted")),
        dying("two_of_five", [step("reduce-scatter", MID)], also=1, count=5, alone=True),
        ("proposer_proposes", partial(proposer_dies, name="proposer_proposes", at="accept-told")),
        ("proposer_settles", partial(proposer_dies, name="proposer_settles", at="news-told")),
        ("state_sender", partial(sync_dies, name="state_sender", at="state-sender")),
        ("state_receiver", partial(sync_dies, name="state_receiver", at="state-receiver")),
        ("down_to_one", partial(down_to_one, name="down_to_one")),
    ]
)
