"""Membership under whatever order, loss and death a seed comes up with; the bottle checks what must hold.

Each run is a number of small steps: somebody starts, dies, is cut off, calls, gives up, has its attempts
moved or broken; in between time passes. Meanwhile messages are lost, doubled and overtake each other. At the
end the network is healed, everybody alive calls the same operation, and it must end alike on all.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mycel.compute.collective.epoch import Epoch, Member, Terms
from mycel.compute.collective.policy import Policy

NAMES = "abcde"
STEPS = {
    "start": 3,
    "kill": 2,
    "part": 3,
    "heal": 3,
    "call": 12,
    "move": 20,
    "break": 2,
    "give_up": 1,
    "run": 25,
}


class Run:
    """Plays steps in a bottle."""

    def __init__(self, bottle: Any) -> None:
        self.bottle = bottle
        self.terms = Terms("all_reduce", "float32", 8, "avg")

    def start(self, name: str) -> None:
        is_first = name == "a" and "a" not in self.bottle.nodes
        node = self.bottle.start(name, founds=is_first or self.bottle.policy.quorum == "any")
        node.core.join(self.bottle.now)
        self.bottle.act(node)

    def play(self) -> None:
        bottle, draw = self.bottle, self.bottle.random
        (what,) = draw.choices(list(STEPS), list(STEPS.values()))
        name = draw.choice(NAMES)
        node = bottle.nodes.get(name)
        is_alive = node is not None and node.alive
        if what == "run":
            bottle.run(draw.choice([0.003, 0.02, 0.1, 0.4, 1.5]))
        elif what == "heal":
            bottle.heal()
        elif what == "part":
            bottle.part(draw.sample(NAMES, draw.randint(1, 3)))
        elif what == "start" and not is_alive:
            self.start(name)
        elif is_alive:
            self.touch(what, node)

    def touch(self, what: str, node: Any) -> None:
        bottle, draw = self.bottle, self.bottle.random
        tag = draw.choice("xy")
        attempts = list(node.began)
        if what == "kill":
            bottle.kill(node.name)
        elif what == "call" and not node.core.is_open(tag):
            node.core.call(bottle.now, tag, self.terms)
        elif what == "give_up":
            node.core.withdraw(bottle.now, tag, "enough")
        elif what == "move" and attempts:
            bottle.move(node, draw.choice(attempts))
        elif what == "break" and attempts:
            bottle.break_off(node, draw.choice(attempts), draw.choice([None, *NAMES]))
        bottle.act(node)

    def end(self) -> None:
        """Let all be well, and see that the group works."""
        bottle = self.bottle
        bottle.loss = bottle.doubling = 0.0
        bottle.delay = (0.01, 0.1)
        bottle.heal()
        bottle.moves_at_once = True
        for node in bottle.nodes.values():
            for attempt in list(node.began) if node.alive else ():
                if attempt in node.began:
                    bottle.move(node, attempt)
        bottle.run(20)


def survivors_agree(run: Run) -> None:
    bottle = run.bottle
    alive = [node for node in bottle.nodes.values() if node.alive]
    for node in alive:
        bottle.run(0.1)
        if not node.core.is_open("z"):
            node.core.call(bottle.now, "z", run.terms)
            bottle.act(node)
    bottle.run(5)
    assert [node.last("z") for node in alive] == ["kept"] * len(alive)
    assert len({node.core.epoch for node in alive}) == 1
    assert sorted(alive[0].core.epoch.peers) == sorted(node.name for node in alive)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 32))
@pytest.mark.parametrize("quorum", ["majority", "any"])
def test_whatever_happens_members_agree(bottle_of: Any, quorum: Any, seed: int) -> None:
    run = Run(bottle_of(Policy(quorum=quorum), seed))
    bottle = run.bottle
    for name in NAMES:
        run.start(name)
    bottle.run(3)
    bottle.loss = bottle.doubling = bottle.random.choice([0.0, 0.05, 0.3])
    bottle.delay = bottle.random.choice([(0.001, 0.01), (0.001, 0.2), (0.001, 1.0)])
    bottle.moves_at_once = False
    for _ in range(bottle.random.choice([30, 60, 120])):
        run.play()
    run.end()
    alive = [node for node in bottle.nodes.values() if node.alive]
    epochs = [epoch for node in alive if (epoch := node.core.epoch) is not None]
    if not alive or (quorum == "majority" and not has_majority(epochs, [node.core.member for node in alive])):
        return  # lost for good: it stands still
    survivors_agree(run)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 32))
@pytest.mark.parametrize("quorum", ["majority", "any"])
def test_where_all_live_nobody_is_left_out(bottle_of: Any, quorum: Any, seed: int) -> None:
    """However messages overtake each other while one after the other comes in."""
    run = Run(bottle_of(Policy(quorum=quorum), seed))
    bottle = run.bottle
    bottle.delay = bottle.random.choice([(0.001, 0.01), (0.001, 0.1), (0.001, 0.3)])
    bottle.lag = {(a, b): bottle.random.choice([0.0, 0.0, 0.3]) for a in NAMES for b in NAMES}
    for name in NAMES:
        run.start(name)
        for _ in range(bottle.random.choice([0, 5, 20])):
            node = bottle.nodes[bottle.random.choice(list(bottle.nodes))]
            run.touch("call", node)
            bottle.run(bottle.random.choice([0.01, 0.1, 0.4]))
    bottle.run(10)
    assert {node.name: node.left for node in bottle.nodes.values() if node.left} == {}
    survivors_agree(run)


def has_majority(epochs: list[Epoch], alive: list[Member]) -> bool:
    """Whether the members that live on are the majority of the latest epoch."""
    if not epochs:
        return False
    latest = max(epochs, key=lambda epoch: epoch.number)
    return 2 * len([member for member in latest.members if member in alive]) > len(latest.members)
