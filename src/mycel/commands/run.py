"""`mycel up` and `mycel join`: be a node, in the foreground, until told to stop."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from mycel.commands.common import home_option, json_option

F = TypeVar("F", bound=Callable[..., Any])

OPTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--label", {"help": "What to call this node. [default: the host name]"}),
    ("--preset", {"help": "local (this machine only), lan, or wan. [default: lan]"}),
    ("--listen", {"multiple": True, "metavar": "ADDR", "help": "Listen here, e.g. /ip4/0.0.0.0/tcp/4800."}),
    ("--announce", {"multiple": True, "metavar": "ADDR", "help": "Tell others this address instead."}),
    ("--mdns/--no-mdns", {"default": None, "help": "Find members on the local network. [default: yes]"}),
    (
        "--port-mapping/--no-port-mapping",
        {"default": None, "help": "Ask the router to forward a port. [default: yes]"},
    ),
    ("--api", {"metavar": "HOST:PORT", "help": "HTTP API. [default: 127.0.0.1:4810 or a free port]"}),
    (
        "--serve",
        {"multiple": True, "metavar": "MODEL[@i:j]", "help": "Lend layers from the start."},
    ),
    ("--assign/--no-assign", {"default": None, "help": "Take layers that the swarm needs. [default: yes]"}),
    ("--models", {"multiple": True, "metavar": "FOLDER", "help": "Look here for models by name."}),
    ("--stages", {"metavar": "N", "help": "Spread models over N peers. [default: as few as hold them]"}),
    (
        "--memory",
        {"metavar": "SIZE", "help": "Memory for weights, e.g. 8GiB. [default: half of the free]"},
    ),
    ("--device", {"help": "cpu, cuda, cuda:N or auto."}),
    ("--dtype", {"help": "float32, bfloat16, float16 or auto."}),
    ("--threads", {"metavar": "N", "help": "Cores for torch. [default: all]"}),
    ("--log", {"help": "debug, info, warning or error."}),
)
FIELDS = {"memory": "memory_bytes"}


def node_options(command: F) -> F:
    """The settings that have a flag of their own, and --set for all others."""
    for name, keywords in reversed(OPTIONS):
        command = click.option(name, **keywords)(command)
    setting = click.option("--set", "settings", multiple=True, metavar="NAME=VALUE",
                           help="Any other setting; `mycel config` lists them.")  # fmt: skip
    return setting(command)


@click.command()
@home_option
@node_options
@json_option
def up(home: Path | None, as_json: bool, settings: tuple[str, ...], **flags: Any) -> None:
    """Be a node. Without a swarm yet, found one."""
    _run(home, flags, settings, as_json)


@click.command()
@click.argument("ticket")
@click.option("--leave", is_flag=True, help="Give up the swarm that this home belongs to.")
@home_option
@node_options
@json_option
def join(
    ticket: str, leave: bool, home: Path | None, as_json: bool, settings: tuple[str, ...], **flags: Any
) -> None:
    """Join the swarm of TICKET and be a node. `-` reads the ticket from standard input."""
    if ticket == "-":
        ticket = sys.stdin.read()
    _run(home, flags, settings, as_json, ticket=ticket, leave=leave)


def _run(
    home: Path | None,
    flags: Mapping[str, Any],
    settings: tuple[str, ...],
    as_json: bool,
    **joining: Any,
) -> None:
    import trio

    from mycel.node import start
    from mycel.node.settings import resolve

    config = resolve(_given(home, flags, settings), os.environ)
    logging.basicConfig(
        level=config.log.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("multiaddr").setLevel(logging.INFO)  # it tells of every address it reads
    told = _Json() if as_json else _Lines(joining=bool(joining))
    watcher = start.Watcher(told.on_up, told.on_alone, told.on_leaving)
    trio.run(lambda: start.run(config, watcher, **joining))


def _given(home: Path | None, flags: Mapping[str, Any], settings: tuple[str, ...]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise click.UsageError(f"--set {setting}: write --set NAME=VALUE")
        given[name.strip()] = value.strip()
    given |= {FIELDS.get(name, name): value for name, value in flags.items() if value not in (None, ())}
    if home is not None:
        given["home"] = str(home)
    return given


class _Lines:
    """How it goes, for people."""

    def __init__(self, *, joining: bool) -> None:
        self._joining = joining

    def on_up(self, node: Any) -> None:
        status = node.status()
        self._say("node", f"{status.label}  {status.peer}")
        self._say("swarm", status.swarm + ("  (founded here)" if status.founder else ""))
        for addr in status.listen:
            self._say("listens", addr)
        self._say("api", status.api)
        self._say("home", status.home)
        if status.founder:
            self._say("next", "`mycel ticket` prints what lets another machine in")

    def on_alone(self, node: Any) -> None:
        trouble = "; ".join(one.why for one in node.status().trouble) or "no answer"
        self._say("waiting", f"nobody of the swarm answers yet ({trouble}); going on trying")

    def on_leaving(self) -> None:
        self._say("leaving", "letting sessions move to others; Ctrl-C again to end at once")

    def _say(self, what: str, text: str) -> None:
        click.echo(click.style(f"{what:>8}", fg="cyan") + f"  {text}", err=True)


class _Json:
    """The same as lines of JSON on standard output."""

    def on_up(self, node: Any) -> None:
        import msgspec

        self._say({"event": "up", **msgspec.to_builtins(node.status())})

    def on_alone(self, node: Any) -> None:
        self._say({"event": "alone", "trouble": [one.why for one in node.status().trouble]})

    def on_leaving(self) -> None:
        self._say({"event": "leaving"})

    def _say(self, content: object) -> None:
        print(json.dumps(content), flush=True)
