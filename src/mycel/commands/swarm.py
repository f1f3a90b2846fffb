"""`mycel ticket | status | peers | down`: ask the running node of a home."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from mycel.commands.common import (
    client_of,
    home_option,
    json_option,
    print_json,
    print_table,
    printable,
    seconds,
)

UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


def _life(_: click.Context, __: click.Parameter, text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhdw])", text.strip().lower())
    if match is None:
        raise click.BadParameter(f"{text!r} is no time; write 30m, 12h, 7d or 4w")
    return float(match[1]) * UNITS_S[match[2]]


@click.command()
@click.option("--role", type=click.Choice(["submit", "member", "admin"]), default="member", show_default=True,
              help="submit may only ask, member also lends, admin may do all.")  # fmt: skip
@click.option("--expires", "life_s", default="7d", show_default=True, callback=_life,
              help="How long it lets machines in, e.g. 30m, 12h, 7d.")  # fmt: skip
@click.option("--label", default="", help="Whom or what it is for; peers see it.")
@home_option
@json_option
def ticket(role: str, life_s: float, label: str, home: Path | None, as_json: bool) -> None:
    """Print a ticket: the one string that lets machines into this swarm. Treat it as a password."""
    issued = client_of(home).post("ticket", {"role": role, "life_s": life_s, "label": label})
    if as_json:
        print_json(issued)
        return
    click.echo(issued["text"])
    until = time.strftime("%Y-%m-%d %H:%M", time.localtime(issued["expires"]))
    click.echo(f"lets machines in as {role} until {until}; there: mycel join TICKET", err=True)
    if not issued["bootstrap"]:
        click.echo("no address is in it: this node does not listen anywhere", err=True)


@click.command()
@home_option
@json_option
def status(home: Path | None, as_json: bool) -> None:
    """How the node of this home is."""
    told = client_of(home).get("status")
    if as_json:
        print_json(told)
        return
    rows = [
        ("node", f"{told['label']}  {told['peer']}"),
        ("swarm", f"{told['swarm']}  ({told['access']}{', founder' if told['founder'] else ''})"),
        ("up", f"{seconds(told['up_s'])}, process {told['pid']}, version {told['version']}"),
        *(("listens", addr) for addr in told["listen"]),
        *_reach_rows(told["reach"]),
        ("api", told["api"]),
        ("peers", f"{told['peers']} members, {told['strangers']} strangers connected"),
        ("models", ", ".join(told["models"]) or "none that could run now"),
        *_capacity_rows(told["capacity"]),
    ]
    for stage in told["stages"]:
        rows += _stage_rows(stage)
    rows += [("trouble", f"{one['peer']}: {one['why']}") for one in told["trouble"]]
    for what, text in rows:
        click.echo(click.style(f"{what:>8}", fg="cyan") + f"  {printable(text)}")


def _reach_rows(reach: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("reach", f"{reach['verdict']}: {reach['meaning']}"), *(("", line) for line in reach["evidence"])]
    if reach["relays"]:
        rows.append(("", f"reached through {' and '.join(reach['relays'])}"))
    rows += [("", f"no relay at {line}") for line in reach["relay_trouble"]]
    if reach["relaying"]:
        size = reach["forwarded_bytes"] / 1e6
        rows.append(
            (
                "relays",
                f"for {reach['reservations']} peers, {reach['circuits']} circuits now, {size:.1f} MB so far",
            )
        )
    rows += [("indirect", f"{one['label']}, over a relay: {one['why']}") for one in reach["indirect"]]
    return rows


def _capacity_rows(capacity: dict[str, Any] | None) -> list[tuple[str, str]]:
    if capacity is None:
        return [("machine", "not measured yet")]
    rows: list[tuple[str, str]] = []
    for one in capacity["devices"]:
        free = one["memory_free_bytes"]
        memory = "" if free is None else f"{free / 1e9:.1f} of "
        rows.append(
            (
                "machine" if not rows else "",
                f"{one['device']}  {one['name']}: {memory}{one['memory_bytes'] / 1e9:.1f} GB"
                f"{' free' if memory else ''}, fp32 {one['fp32_gflops']:.0f}, bf16 {one['bf16_gflops']:.0f} "
                f"GFLOP/s, memory read at {one['read_gb_s']:.0f} GB/s",
            )
        )
    if capacity["up_bytes_per_s"] is not None:
        rows.append(("line", f"{_line(capacity)} Mbit/s up and down"))
    return rows


def _line(capacity: dict[str, Any]) -> str:
    return "/".join(f"{capacity[way] * 8 / 1e6:.3g}" for way in ("up_bytes_per_s", "down_bytes_per_s"))


def _capacity_text(capacity: dict[str, Any] | None) -> str:
    """A machine in a few words: its best device, and its line."""
    if capacity is None:
        return ""
    words = []
    if capacity["devices"]:
        best = max(capacity["devices"], key=lambda one: max(one["fp32_gflops"], one["bf16_gflops"]))
        speed = max(best["fp32_gflops"], best["bf16_gflops"])
        words.append(f"{best['device']} {best['memory_bytes'] / 1e9:.0f} GB {speed:.0f} GFLOP/s")
    if capacity["up_bytes_per_s"] is not None:
        words.append(f"{_line(capacity)} Mbit/s")
    return ", ".join(words)


def _stage_rows(stage: dict[str, Any]) -> list[tuple[str, str]]:
    span = "layers not chosen yet"
    if stage["layers"]:
        span = f"layers {stage['start']}:{stage['end']} of {stage['layers']}"
    rows = [("serves", f"{stage['model']}  {span}  {stage['state']}  {stage['device']} {stage['dtype']}")]
    return [*rows, ("", stage["trouble"])] if stage["trouble"] else rows


@click.command()
@home_option
@click.option("--away", is_flag=True, help="Only members that are known and not connected.")
@json_option
def peers(home: Path | None, away: bool, as_json: bool) -> None:
    """Who is connected, and which other members are known."""
    told = client_of(home).get("away/peers" if away else "peers")
    if as_json:
        print_json(told)
        return
    gone = told if away else client_of(home).get("away/peers")
    if not away:
        _print_connected(told)
    if gone:
        rows = [
            (
                one["label"],
                one["peer"],
                f"{seconds(max(0.0, time.time() - one['seen']))} ago",
                one["addr"],
                " ".join(one["serves"]),
            )
            for one in gone
        ]
        print_table(("away", "peer", "last heard of", "last address", "served"), rows)


def _print_connected(told: Sequence[dict[str, Any]]) -> None:
    rows = [
        (
            one["label"],
            one["peer"],
            one["access"],
            f"{one['rtt_ms']:.1f} ms" if one["rtt_ms"] is not None else "",
            one["path"],
            one["addr"],
            _capacity_text(one["capacity"]),
            " ".join(one["serves"]),
        )
        for one in told
    ]
    print_table(("label", "peer", "role", "rtt", "path", "address", "measured", "serves"), rows)
    if not rows:
        click.echo("nobody yet; `mycel ticket` prints what lets another machine in", err=True)


@click.command()
@home_option
def down(home: Path | None) -> None:
    """Let the node of this home leave in order and end."""
    client_of(home).post("stop", {})
