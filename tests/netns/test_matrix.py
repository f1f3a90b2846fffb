"""Real nodes behind real NATs: everybody calls everybody, and whoever can be direct becomes it.

A selection of kinds that differ in what a punch has to do; `make bench NAME=nat` runs all eleven.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from netlab.cast import cast
from netlab.lab import kind
from netlab.matrix import Outcome, assemble, calls, stage

KINDS = ("open", "full cone", "port", "rejecting", "symmetric", "carrier")
SHARED = (("one home", False), ("one carrier", True), ("one carrier", False))
RELAYED = {
    ("symmetric", "symmetric"),
    ("port", "symmetric"),
    ("rejecting", "symmetric"),
    ("symmetric", "carrier"),
}

pytestmark = pytest.mark.slow


async def test_everybody_calls_everybody(tmp_path: Path) -> None:
    with stage([kind(name) for name in KINDS], SHARED) as built:
        await built.find_possible()
        async with cast(built.places.items(), tmp_path) as players:
            await assemble(players, built)
            found: list[Outcome] = await calls(players, built, 1, at_once=4, heard=lambda outcome: None)
    assert len(found) == 21 + 3
    assert [outcome for outcome in found if not outcome.call_ok] == []
    direct = {outcome.pair: outcome.is_direct for outcome in found}
    assert direct == built.can_be_direct
    relayed = {frozenset(pair) for pair, is_direct in direct.items() if not is_direct}
    assert relayed == {*map(frozenset, RELAYED), frozenset({"one carrier hairpin off"})}
    # Most were relayed first and then took over; nobody had a direct connection taken away.
    assert sum(outcome.upgrade_s is not None for outcome in found) >= 10
