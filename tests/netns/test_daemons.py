"""The program itself, started as a user starts it, on both sides of real NATs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from netlab.daemon import Daemon, until
from netlab.lab import Lab, kind

SETTLED_S = 60.0
LISTEN = ("--listen", "/ip4/0.0.0.0/tcp/4001")
HOMES = ("port", "symmetric", "carrier", "full cone")

pytestmark = pytest.mark.slow


@pytest.fixture
def town(tmp_path: Path) -> Iterator[dict[str, Daemon]]:
    """Two public hosts and a home of some kinds, each with a daemon that is not started yet."""
    with Lab() as lab:
        daemons = {}
        for name in ("hub", "second"):
            daemons[name] = Daemon(lab.public(name).home, tmp_path / name)
        for name in HOMES:
            daemons[name] = Daemon(lab.site(name, kind(name)).home, tmp_path / name)
        lab.open()
        try:
            yield daemons
        finally:
            for daemon in daemons.values():
                daemon.stop()


def expected(one: str, other: str) -> str:
    """Two homes end up connected over a relay only where one is symmetric and the other asks for the port."""
    strict = {"port", "carrier", "symmetric"}
    return "relayed" if "symmetric" in (one, other) and {one, other} <= strict else "direct"


def test_everybody_reaches_everybody(town: dict[str, Daemon]) -> None:
    hub = town["hub"]
    hub.start("up", *LISTEN)
    ticket = hub.run("ticket").strip()
    for name, daemon in town.items():
        if name != "hub":
            daemon.start("join", ticket, *LISTEN)
    wanted = {one: {other: expected(one, other) for other in town if other != one} for one in town}
    found: dict[str, dict[str, str]] = {}

    def settled() -> bool:
        found.update({name: daemon.paths() for name, daemon in town.items()})
        return found == wanted

    try:
        until("every daemon is connected with every other as well as can be", SETTLED_S, settled)
    except AssertionError:
        assert found == wanted  # shows the difference
        raise
    assert [daemon.stop() for daemon in town.values()] == [0] * len(town)
