"""The command line: quick, clear about mistakes, and honest in its exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from multiaddr import Multiaddr

from mycel.cli import COMMANDS, cli
from mycel.commands.common import print_table
from mycel.protocol.errors import UsageProblem
from mycel.protocol.identity import SigningKey
from mycel.protocol.mesh import Access
from mycel.protocol.ticket import issue_ticket

MachineOf = Callable[[str], Any]


def ticket(*, age_s: float = 0.0, bootstrap: Sequence[str] = ()) -> str:
    """A ticket of a swarm that nobody runs, issued `age_s` ago for an hour."""
    root = SigningKey(b"r" * 32)
    addrs = [Multiaddr(addr) for addr in bootstrap]
    now = time.time() - age_s
    issued = issue_ticket(root, access=Access.MEMBER, now=now, entropy=os.urandom, life_s=3600.0)
    return issued.with_bootstrap(addrs).text()


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - {"sim"}))
def test_every_command_explains_itself(command: str) -> None:
    done = CliRunner().invoke(cli, [command, "--help"])
    assert done.exit_code == 0
    assert "Usage:" in done.output
    assert len(done.output.splitlines()) > 4


def test_the_front_page_names_every_command() -> None:
    page = CliRunner().invoke(cli, ["--help"]).output
    for command in COMMANDS:
        assert f"\n  {command} " in page


def test_the_command_line_imports_little() -> None:
    """What makes `mycel status` slow is imports: none of the heavy ones may happen for it."""
    code = (
        "import sys; from click.testing import CliRunner; from mycel.cli import cli;"
        "CliRunner().invoke(cli, ['status', '--home', '/nonexistent']);"
        "print([name for name in ('torch', 'trio', 'fastapi', 'httpx', 'rich', 'tokenizers', 'cryptography')"
        " if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("command", ["status", "peers", "models", "ticket", "down"])
def test_without_a_node_commands_say_how_to_start_one(machine: MachineOf, command: str) -> None:
    assert "mycel up" in machine("a").run(command, rc=1).stderr


@pytest.mark.parametrize(
    ("text", "words", "rc"),
    [
        ("hello", 'begins with "mycel1"', 2),
        (ticket()[:-3], "mistyped or cut off", 2),
        (ticket()[:40] + "0" + ticket()[41:], "copy it again", 2),
        (ticket(age_s=7200), "expired", 1),
    ],
)
def test_a_wrong_ticket_is_told_from_an_expired_one(
    machine: MachineOf, text: str, words: str, rc: int
) -> None:
    done = machine("a").run("join", text, "--preset", "local", rc=rc)
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_second_swarm_is_not_joined_by_accident(machine: MachineOf) -> None:
    home = machine("a")
    up = home.start("join", ticket(), "--no-assign")
    home.stop()
    other = machine("f")
    other.start("up", "--no-assign")
    text = other.run("ticket").stdout.strip()
    assert "--leave" in home.run("join", text, "--preset", "local", rc=1).stderr
    assert home.start("join", text, "--leave", "--no-assign")["swarm"] != up["swarm"]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["up", "--set", "colour=red"], "no setting"),
        (["up", "--set", "colour"], "NAME=VALUE"),
        (["up", "--api", "0.0.0.0:4810"], "api_token"),
        (["up", "--listen", "4800"], "multiaddr"),
        (["up", "--memory", "lots"], "memory_bytes"),
        (["ticket", "--expires", "soon"], "30m, 12h"),
        (["serve", "m", "--layers", "3:1"], "i below j"),
        (["generate", "-t", "-1"], "temperature"),
        (["frobnicate"], "No such command"),
    ],
)
def test_usage_errors_exit_with_2(machine: MachineOf, command: list[str], words: str) -> None:
    if command == ["frobnicate"]:
        done = subprocess.run(
            [sys.executable, "-m", "mycel", *command], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 2
    else:
        done = machine("a").run(*command, rc=2, text="")
    assert words in done.stderr


def test_one_node_per_home(machine: MachineOf) -> None:
    home = machine("a")
    home.start("up", "--no-assign")
    assert "running" in home.run("up", "--preset", "local", rc=1).stderr
    port = home.json("status")["api"].split(":")[2].removesuffix("/v1")
    taken = machine("b").run("up", "--preset", "local", "--api", f"127.0.0.1:{port}", rc=2)
    assert f"api = '127.0.0.1:{port}' cannot be bound" in taken.stderr
    assert home.json("status")["founder"] is True
    home.run("down")
    assert home.process is not None
    assert home.process.wait(15) == 0


def test_a_node_joins_by_a_ticket_from_standard_input_and_waits_for_its_swarm(machine: MachineOf) -> None:
    home = machine("a")
    founder = machine("f")
    founder.start("up", "--no-assign")
    text = founder.run("ticket", "--role", "submit", "--expires", "1h").stdout
    founder.stop()
    up = home.start("join", text.strip(), "--no-assign")
    assert up["access"] == "submit"
    assert home.json("status")["peers"] == 0
    again = founder.start("up", "--no-assign")
    assert home.process is not None
    deadline = time.monotonic() + 30
    while home.json("status")["peers"] == 0 and time.monotonic() < deadline:
        time.sleep(0.1)
    (peer,) = home.json("peers")
    assert peer["peer"] == again["peer"]


def test_a_swarm_that_says_no_ends_the_join(machine: MachineOf) -> None:
    founder = machine("f")
    listen = founder.start("up", "--no-assign")["listen"]
    done = machine("a").run("join", ticket(bootstrap=listen), "--preset", "local", rc=1)
    assert "by a ticket of this one" in done.stderr


def test_config_shows_what_a_home_would_use(machine: MachineOf, tmp_path: Path) -> None:
    home = machine("a")
    home.home.mkdir()
    (home.home / "config.toml").write_text('label = "anna"\napi_token = "secret"\n')
    shown = home.json("config")
    assert shown["label"] == "anna"
    assert shown["api_token"] == "(set)"
    assert "secret" not in home.run("config").stdout


def test_what_others_worded_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("name",), [("\x1b[2Jevil[bold]",)])
    shown = capsys.readouterr().out
    assert "?[2Jevil[bold]" in shown
    assert "\x1b[2J" not in shown


def test_usage_problems_are_one_family() -> None:
    from mycel.node.config import ConfigError
    from mycel.protocol.ticket import TicketError

    assert issubclass(ConfigError, UsageProblem)
    assert issubclass(TicketError, UsageProblem)
