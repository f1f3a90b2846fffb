"""Which peers a session goes through: the cheapest way over the layers' borders.

A route is a walk from layer 0 to the last: at border b, any peer that holds layers from before b until after
b may run [b : c) for a border c within what it holds. A step costs half a round trip to get there plus its
layers' measured time, stretched by what already waits there. No stage may appear twice (its cache of a
session covers one span), though a peer with several stages may; so the search keeps, at each border, a few of
the cheapest walks that differ in the stages they used. Ties fall to fewer stages, then to peer ids, so equal
views give equal routes.

A recovery keeps the surviving stages with their spans, because their caches are there, and covers only the
gaps between them; where that cannot be done, it plans anew and lets survivors start over.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import NamedTuple, Protocol

from mycel.compute.engine import Span
from mycel.compute.infer.request import RouteStage
from mycel.protocol.mesh import PeerId

WALKS_MAX = 8
"""Walks kept per border: enough that a walk blocked by its own stages has others beside it."""
HOLDERS_PER_SPAN_MAX = 16
"""Holders of the same span that are considered, the cheapest: in a large swarm they are many and alike."""
LAYER_ROW_S = 0.001
"""What a layer is taken to cost before anybody measured it."""
STAGE_S = 0.0005
"""Fixed cost of one more stage: frames, scheduling, a worker's round trip."""
STANDBY_S = 1.0
"""What taking a spare costs: only used when the layers have no other holder, or a badly overloaded one."""


class Offer(NamedTuple):
    """A peer that holds layers and is ready to run them."""

    peer: PeerId
    span: Span
    layer_row_s: float = 0.0
    sessions: int = 0
    standby: bool = False


Rtt = Callable[[PeerId, PeerId], float]


class _Walk(NamedTuple):
    cost: float
    stages: tuple[RouteStage, ...]

    @property
    def order(self) -> tuple[object, ...]:
        return (round(self.cost, 9), len(self.stages), self.stages)

    def uses(self, offer: Offer) -> bool:
        return _is_used(offer, self.stages)


class Held(Protocol):
    """Whatever speaks of layers: an offer, a holding."""

    @property
    def span(self) -> Span: ...


def missing_layers(n_layers: int, held: Sequence[Held]) -> tuple[Span, ...]:
    """Layers that none of `held` covers, as maximal spans in order."""
    missing: list[Span] = []
    at = 0
    for span in sorted(one.span for one in held):
        if span.start > at:
            missing.append(Span(at, min(span.start, n_layers)))
        at = max(at, span.end)
    if at < n_layers:
        missing.append(Span(at, n_layers))
    return tuple(missing)


def plan_route(
    n_layers: int, offers: Sequence[Offer], owner: PeerId, rtt: Rtt, avoid: Container[PeerId] = ()
) -> tuple[RouteStage, ...] | None:
    """The cheapest route for a new session, None when there is none. `rtt` gives seconds between peers."""
    usable = [offer for offer in offers if offer.peer not in avoid]
    return _cheapest(Span(0, n_layers), usable, owner, owner, rtt)


def plan_repair(
    route: Sequence[RouteStage],
    offers: Sequence[Offer],
    owner: PeerId,
    rtt: Rtt,
    avoid: Container[PeerId],
) -> tuple[RouteStage, ...] | None:
    """A route that replaces the stages of `route` whose peers are to be avoided; None when there is none.

    Surviving stages keep their peer and span where the gaps can be covered by others.
    """
    n_layers = route[-1].span.end
    kept = [stage for stage in route if stage.peer not in avoid]
    free = [offer for offer in offers if offer.peer not in avoid and not _is_used(offer, kept)]
    repaired: list[RouteStage] = []
    at = 0
    for stage in [*kept, None]:
        until = n_layers if stage is None else stage.span.start
        if at < until:
            before = repaired[-1].peer if repaired else owner
            after = owner if stage is None else stage.peer
            offered = [offer for offer in free if not _is_used(offer, repaired)]
            gap = _cheapest(Span(at, until), offered, before, after, rtt)
            if gap is None:
                return plan_route(n_layers, offers, owner, rtt, avoid)
            repaired += gap
        if stage is not None:
            repaired.append(stage)
            at = stage.span.end
    return tuple(repaired)


def _cheapest(
    span: Span, offers: Sequence[Offer], before: PeerId, after: PeerId, rtt: Rtt
) -> tuple[RouteStage, ...] | None:
    """The cheapest walk over `span`, coming from peer `before` and going on to `after`."""
    offers = _foremost(span, offers, before, rtt)
    borders = {span.end}
    for offer in offers:
        borders |= {offer.span.start, offer.span.end}
    stops = sorted(border for border in borders if span.start < border <= span.end)
    walks: dict[int, list[_Walk]] = {span.start: [_Walk(0.0, ())]}
    for start in [span.start, *stops[:-1]]:
        for walk in walks.get(start, ()):
            for offer in offers:
                if not offer.span.start <= start < offer.span.end or walk.uses(offer):
                    continue
                hop = rtt(walk.stages[-1].peer if walk.stages else before, offer.peer) / 2
                for end in stops:
                    if start < end <= offer.span.end:
                        cost = walk.cost + hop + _time(offer, end - start)
                        if end == span.end:
                            cost += rtt(offer.peer, after) / 2
                        stage = RouteStage(offer.peer, Span(start, end))
                        _keep(walks.setdefault(end, []), _Walk(cost, (*walk.stages, stage)))
    arrived = walks.get(span.end)
    return arrived[0].stages if arrived else None


def _is_used(offer: Offer, stages: Sequence[RouteStage]) -> bool:
    return any(stage.peer == offer.peer and stage.span in offer.span for stage in stages)


def _keep(walks: list[_Walk], walk: _Walk) -> None:
    """Insert in order, and keep the best."""
    walks.append(walk)
    walks.sort(key=lambda walk: walk.order)
    del walks[WALKS_MAX:]


def _foremost(span: Span, offers: Sequence[Offer], before: PeerId, rtt: Rtt) -> list[Offer]:
    """The offers that touch `span`; of those with equal layers the cheapest."""
    by_span: dict[Span, list[tuple[float, PeerId, Offer]]] = {}
    for offer in offers:
        if offer.span.start < span.end and offer.span.end > span.start:
            cost = rtt(before, offer.peer) / 2 + _time(offer, offer.span.end - offer.span.start)
            by_span.setdefault(offer.span, []).append((cost, offer.peer, offer))
    return [offer for held in sorted(by_span) for _, _, offer in sorted(by_span[held])[:HOLDERS_PER_SPAN_MAX]]


def _time(offer: Offer, layers: int) -> float:
    busy = 1 + offer.sessions / 8  # sessions share steps, so eight of them cost about twice one
    spare = STANDBY_S if offer.standby else 0.0
    return STAGE_S + spare + layers * (offer.layer_row_s or LAYER_ROW_S) * busy
