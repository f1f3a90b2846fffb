"""Which layers a peer takes when nobody names them.

First every layer must have a holder: the model is cut at balanced borders into as many stages as were asked
for (or as its memory needs), and a peer takes the first piece that nobody holds, as far as its own memory
goes. Once all layers are held, a further peer becomes a spare: all layers if they fit, else the span that the
fewest hold. A spare is taken into routes when a holder is lost.

Several peers may arrive at once. Each first publishes a claim, waits until claims have spread, and plans
again with the claims of peers whose id is lower than its own: if the plan is still its claim it loads,
otherwise it claims anew. The lowest id never yields, so n peers settle in at most n rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mycel.compute.engine import ModelCard, Span
from mycel.protocol.mesh import PeerId


class Holding(NamedTuple):
    """What another peer's fact says."""

    peer: PeerId
    span: Span
    state: str
    """ "claiming", "loading", "ready" or "leaving"."""
    standby: bool = False


class Placement(NamedTuple):
    """What to load."""

    span: Span
    standby: bool


def plan_placement(
    card: ModelCard,
    holdings: Sequence[Holding],
    me: PeerId,
    weight_bytes_max: int,
    stages: int | None = None,
) -> Placement | None:
    """What `me` should hold of the model, None when not even one layer fits into `weight_bytes_max`.

    Holdings of `me` itself and of leaving peers do not count, nor do claims of peers with a higher id.
    """
    n = card.n_layers
    if weight_bytes_max >= card.edge_bytes + n * card.layer_bytes:
        capacity = n
    else:
        capacity = max(0, (weight_bytes_max - card.edge_bytes) // max(card.layer_bytes, 1))
    if capacity == 0:
        return None
    counted = [held for held in holdings if _counts(held, me)]
    held_by = [sum(held.span.start <= layer < held.span.end for held in counted) for layer in range(n)]
    pieces = min(stages or -(-n // capacity), n)
    if 0 in held_by:
        start = held_by.index(0)
        end = next(layer for layer in (*range(start + 1, n), n) if layer == n or held_by[layer])
        borders = [piece * n // pieces for piece in range(1, pieces + 1)]
        border = next(border for border in borders if border > start)
        return Placement(Span(start, min(end, border, start + capacity)), standby=False)
    if capacity == n:
        return Placement(Span(0, n), standby=True)
    first = min(range(n - capacity + 1), key=lambda start: (sum(held_by[start : start + capacity]), start))
    return Placement(Span(first, first + capacity), standby=True)


def _counts(held: Holding, me: PeerId) -> bool:
    if held.peer == me or held.state == "leaving":
        return False
    return held.state != "claiming" or held.peer < me
