"""Daemons that listen nowhere, in real processes: found, called and served through one that relays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

MachineOf = Callable[[str], Any]
Poll = Callable[[Callable[[], Any]], Any]

pytestmark = pytest.mark.slow


def swarm(machine: MachineOf) -> tuple[Any, Any, Any]:
    """A daemon that relays, and two of its swarm that nobody can call."""
    relay, anna, bert = machine("relay"), machine("anna"), machine("bert")
    settings = {relay: 'relay = "on"\n', anna: "listen = []\n", bert: "listen = []\n"}
    for one, text in settings.items():
        one.home.mkdir(parents=True)
        (one.home / "config.toml").write_text(text)
    relay.start("up", "--label", "relay", "--no-assign")
    ticket = relay.run("ticket").stdout.strip()
    anna.start("join", ticket, "--label", "anna", "--no-assign")
    bert.start("join", ticket, "--label", "bert", "--no-assign")
    return relay, anna, bert


def test_daemons_that_listen_nowhere_meet_through_a_relay_and_run_a_model(
    machine: MachineOf, poll: Poll, byte_model: Path
) -> None:
    relay, anna, bert = swarm(machine)
    for one, other in ((anna, "bert"), (bert, "anna")):
        poll(lambda one=one, other=other: other in [peer["label"] for peer in one.json("peers")])
    anna.run("serve", str(byte_model), "--layers", "0:2")
    bert.run("serve", str(byte_model), "--layers", "2:4")
    poll(lambda: [one for one in anna.json("models") if one["complete"]])
    told = anna.json("generate", "-p", "def main(", "-n", "20")
    assert [stage["span"] for stage in told["report"]["route"]] == [[0, 2], [2, 4]]
    reach = relay.json("status")["reach"]
    assert reach["relaying"]
    assert reach["reservations"] == 2
    assert reach["forwarded_bytes"] > 0  # they met here; what came after may have found a direct way


async def test_js_libp2p_reaches_a_daemon_that_listens_nowhere(
    machine: MachineOf, poll: Poll, js_node: Any
) -> None:
    _relay, anna, _bert = await trio.to_thread.run_sync(swarm, machine)
    addrs = await trio.to_thread.run_sync(poll, lambda: anna.json("status")["listen"])
    with trio.fail_after(60):
        async with js_node() as js:
            seen = await js.ask({"dial": addrs[0], "echo": False})
    assert "/p2p-circuit/" in addrs[0]
    assert addrs[0].endswith(seen["peer"])
    assert seen["limited"]
    assert seen["ping_ms"] < 10_000
    assert seen["agent"].startswith("mycel/")
    assert seen["signed"][0] + f"/p2p/{seen['peer']}" == addrs[0]
    assert seen["unknown"] != "opened"
