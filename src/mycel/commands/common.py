"""What the commands share: options, the client of the running node, tables and JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from mycel.node.client import Client

F = TypeVar("F", bound=Callable[..., Any])
DEFAULT_HOME = "~/.mycel"


def home_option(command: F) -> F:
    """--home: which node."""
    return click.option(
        "--home",
        type=click.Path(file_okay=False, path_type=Path),
        help="The node's folder. [default: MYCEL_HOME, else ~/.mycel]",
    )(command)


def json_option(command: F) -> F:
    """--json: for scripts."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def home_of(home: Path | None) -> Path:
    """The folder of the node that is meant."""
    return (home or Path(os.environ.get("MYCEL_HOME") or DEFAULT_HOME)).expanduser().absolute()


def client_of(home: Path | None, *, timeout_s: float | None = 30.0) -> Client:
    """The control client of the node that is meant."""
    return Client(home_of(home), timeout_s=timeout_s)


def print_json(content: object) -> None:
    """One JSON document on standard output."""
    click.echo(json.dumps(content, indent=2 if sys.stdout.isatty() else None, ensure_ascii=False))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table for people."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    width = None if sys.stdout.isatty() else 200
    Console(highlight=False, width=width).print(table)


def printable(text: str) -> str:
    """`text`, which another peer may have worded, without what would steer a terminal."""
    return "".join(char if char.isprintable() else "?" for char in text)


def seconds(count: float) -> str:
    """A duration for people."""
    if count < 90:
        return f"{count:.0f} s"
    if count < 5400:
        return f"{count / 60:.0f} min"
    return f"{count / 3600:.0f} h" if count < 172800 else f"{count / 86400:.0f} d"
