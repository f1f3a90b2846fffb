"""The boxes do what their names say, found out by plain sockets; and what a raw punch gets through them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from itertools import combinations_with_replacement

import pytest
import trio
from netlab.boxes import KINDS, Box, Kind
from netlab.lab import Lab
from netlab.probe import Behaviour, knock, mapped, posts, punch, tcp, verify

SILENT = ("silent", "silent")
BEHAVIOUR = {
    # keeps the port, is symmetric, (stranger, acquaintance), passes UDP
    "open": (True, False, ("in", "in"), True),
    "full cone": (True, False, ("in", "in"), True),
    "address": (True, False, ("silent", "in"), True),
    "port": (True, False, SILENT, True),
    "renumbering": (False, False, SILENT, True),
    "rejecting": (True, False, ("refused", "refused"), True),
    "symmetric": (False, True, SILENT, True),
    "carrier": (True, False, SILENT, True),
    "carrier symmetric": (False, True, SILENT, True),
    "udp blocked": (True, False, SILENT, False),
    "firewall": (True, False, SILENT, True),
}
ANSWERS_SYMMETRIC = ("open", "full cone", "address")
"""Whom a symmetric site can be connected with: they do not ask which port an answer comes from."""


async def all_at_once(lab: Lab, *jobs: Callable[[], Awaitable[None]]) -> None:
    """Run jobs together, with the public hosts at their posts."""
    async with posts(lab.sites["known"], lab.sites["other"]), trio.open_nursery() as nursery:
        for job in jobs:
            nursery.start_soon(job)


@pytest.fixture(scope="module")
def behaviours(kinds_lab: Lab) -> dict[str, Behaviour]:
    """Every kind's behaviour, all of them asked at once."""
    found: dict[str, Behaviour] = {}
    sites = kinds_lab.sites

    def job(name: str) -> Callable[[], Awaitable[None]]:
        async def ask() -> None:
            found[name] = await verify(sites[f"{name} 0"], sites["known"], sites["other"], sites["stranger"])

        return ask

    trio.run(all_at_once, kinds_lab, *(job(kind.name) for kind in KINDS))
    return found


@pytest.mark.parametrize("kind", BEHAVIOUR)
def test_a_kind_behaves_as_its_name_says(kind: str, behaviours: dict[str, Behaviour]) -> None:
    keeps_port, is_symmetric, (stranger, acquaintance), udp = BEHAVIOUR[kind]
    assert behaviours[kind] == Behaviour(keeps_port, is_symmetric, stranger, acquaintance, udp)


def test_every_kind_is_looked_at() -> None:
    assert list(BEHAVIOUR) == [kind.name for kind in KINDS]


async def test_fifty_one_of_the_sixty_six_pairs_can_be_punched(kinds_lab: Lab) -> None:
    sites = kinds_lab.sites
    server = (sites["known"].addr, 1)
    seconds: dict[tuple[str, str], float | None] = {}

    def job(one: str, two: str) -> Callable[[], Awaitable[None]]:
        async def try_it() -> None:
            homes = sites[f"{one} 0"].home, sites[f"{two} 1"].home
            seconds[one, two] = await punch(*homes, server)

        return try_it

    pairs = list(combinations_with_replacement(KINDS, 2))
    await all_at_once(kinds_lab, *(job(one.name, two.name) for one, two in pairs))
    expected = {
        (one.name, two.name)
        for one, two in pairs
        if not (one.is_symmetric or two.is_symmetric)
        or one.name in ANSWERS_SYMMETRIC
        or two.name in ANSWERS_SYMMETRIC
    }
    assert {pair for pair, took in seconds.items() if took is not None} == expected
    assert (len(seconds), len(expected)) == (66, 51)


@pytest.mark.parametrize("hairpin", [True, False])
async def test_two_homes_of_one_network(hairpin: bool) -> None:
    with Lab() as lab:
        lab.public("known")
        lab.public("other")
        site = lab.site("two", Kind("port", (Box(hairpin=hairpin),)), homes=2)
        lab.open()
        one, two = site.homes

        async def try_it() -> None:
            listener = tcp(two)
            listener.listen(8)
            port = listener.getsockname()[1]
            outside, held = await mapped(two, port, (lab.sites["known"].addr, 1))
            assert outside == (site.outer, port)
            with listener, held:
                # Inside their network always; by the address outside only where the box turns packets around.
                assert await knock(one, (site.addrs[1], port)) == "in"
                assert await knock(one, outside) == ("in" if hairpin else "silent")
            took = await punch(one, two, (lab.sites["known"].addr, 1))
            assert (took is not None) == hairpin

        await all_at_once(lab, try_it)


@pytest.mark.parametrize("hairpin", [True, False])
async def test_two_homes_of_one_carrier(hairpin: bool) -> None:
    with Lab() as lab:
        lab.public("known")
        lab.public("other")
        one, two = lab.neighbours(("one", "two"), Box(), Box(hairpin=hairpin))
        lab.open()

        async def try_it() -> None:
            took = await punch(one.home, two.home, (lab.sites["known"].addr, 1))
            assert (took is not None) == hairpin

        await all_at_once(lab, try_it)
