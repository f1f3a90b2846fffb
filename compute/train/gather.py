"""Adding up on the way: what an aggregator of a tree makes of the updates below it and its own.

Each update is taken in whole, looked at, added and let go: one that breaks off midway, or is not finite,
leaves no trace in the sum. What goes up is the mean, weighted by examples, with all examples as its weight,
so that whoever is above need not know whether it was one client's or a hundred's.
"""

from __future__ import annotations

import statistics
from collections.abc import Awaitable, Callable, Mapping, Sequence

import msgspec
import trio

from mycel.compute.train.courier import Courier, Delivery
from mycel.compute.train.orders import Missing, Order, Report
from mycel.compute.train.rows import row_of
from mycel.compute.train.strategy import Sum
from mycel.protocol.errors import MycelError
from mycel.protocol.limits_train import DEFAULT_FEDERATED_LIMITS
from mycel.protocol.mesh import PeerId


async def gather_branches(
    courier: Courier,
    order: Order,
    model: memoryview,
    own: Callable[[], Awaitable[Delivery]],
    me: PeerId,
) -> Delivery:
    """Pass `order` on to its branches and add up what they and this client send. Never fails as a whole: who
    gave nothing is named in the report."""
    total = Sum(order.layout.size)
    reports: list[Report] = []
    missing: list[Missing] = []
    below = msgspec.structs.replace(order, branches=())

    async def one(client: PeerId, deliver: Callable[[], Awaitable[Delivery]]) -> None:
        try:
            delivery = await deliver()
            if delivery.update is not None:
                total.add(row_of(delivery.update, order.layout), max(1, delivery.report.examples))
            reports.append(delivery.report)
        except MycelError as error:
            missing.append(Missing(client, str(error)[: DEFAULT_FEDERATED_LIMITS.text]))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(one, me, own)
        for client in order.branches:
            nursery.start_soon(one, client, lambda client=client: courier.carry(client, below, model))
    update = total.mean().data.cast("B") if order.train and reports else None
    return Delivery(merge(order, reports, missing), update)


def merge(order: Order, reports: Sequence[Report], missing: Sequence[Missing]) -> Report:
    """One report for several: examples add up, figures are means weighted by them."""
    return Report(
        job=order.claim.job,
        epoch=order.claim.epoch,
        number=order.number,
        model=order.model,
        clients=tuple(sorted(client for report in reports for client in report.clients)),
        has_update=order.train and bool(reports),
        examples=sum(max(1, report.examples) for report in reports),
        metrics=mean_of([(report.metrics, report.examples) for report in reports]),
        judged_examples=sum(report.judged_examples for report in reports),
        judged=mean_of([(report.judged, report.judged_examples) for report in reports]),
        seconds=max((report.seconds for report in reports), default=0.0),
        missing=tuple(sorted(missing, key=lambda one: one.client)),
    )


def mean_of(figures: Sequence[tuple[Mapping[str, float], int]]) -> dict[str, float]:
    """Means of figures by name, each over those who have it, weighted by examples."""
    sums: dict[str, tuple[float, int]] = {}
    for metrics, examples in figures:
        for name, value in metrics.items():
            total, count = sums.get(name, (0.0, 0))
            sums[name] = (total + value * max(1, examples), count + max(1, examples))
    return {name: total / count for name, (total, count) in sorted(sums.items())}


def median_of(figures: Sequence[tuple[Mapping[str, float], int]]) -> dict[str, float]:
    """Medians of figures by name, whatever examples clients say they have: for where some may lie."""
    values: dict[str, list[float]] = {}
    for metrics, _ in figures:
        for name, value in metrics.items():
            values.setdefault(name, []).append(value)
    return {name: statistics.median(found) for name, found in sorted(values.items())}
