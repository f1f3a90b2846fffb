"""Who adds up for whom: a round's clients as a tree of aggregators, one level deep.

With n clients and a fan-out f the coordinator talks to n / (f + 1) aggregators, each of which passes on to f
others: its own traffic falls by that factor, and an aggregator's grows by f models each way. A second level
would help from fan-out squared clients on, and cost another trainer's time at every death; there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mycel.protocol.mesh import PeerId


@dataclass(frozen=True, slots=True)
class Branch:
    """An aggregator and the clients below it."""

    head: PeerId
    below: tuple[PeerId, ...] = ()


def plan_tree(clients: Sequence[PeerId], fan_out: int) -> list[Branch]:
    """Branches that hold each client once, as even as can be; with a fan-out of 0 everybody is alone."""
    if fan_out <= 0 or len(clients) <= 2:
        return [Branch(client) for client in clients]
    count = -(-len(clients) // (fan_out + 1))
    return [Branch(clients[at], tuple(clients[at + count :: count])) for at in range(count)]
