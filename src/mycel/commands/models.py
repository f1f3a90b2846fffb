"""`mycel serve` and `mycel models`: which layers are lent, by this node and by the swarm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mycel.commands.common import client_of, home_option, json_option, print_json, print_table


def _layers(_: click.Context, __: click.Parameter, text: str | None) -> tuple[int, int] | None:
    from mycel.node.config import ConfigError, parse_layers

    try:
        return None if text is None else parse_layers(text)
    except ConfigError as error:
        raise click.BadParameter(str(error)) from None


@click.command()
@click.argument("model")
@click.option("--layers", callback=_layers, metavar="i:j",
              help="Layers i up to, not including, j. [default: what the swarm needs]")  # fmt: skip
@home_option
@json_option
def serve(model: str, layers: tuple[int, int] | None, home: Path | None, as_json: bool) -> None:
    """Let the running node lend layers of MODEL, a local directory or a hub id."""
    if Path(model).expanduser().is_dir():
        model = str(Path(model).expanduser().absolute())
    if not as_json:
        click.echo(f"loading {model} ...", err=True)
    stage = client_of(home, timeout_s=None).post("serve", {"model": model, "layers": layers})
    if as_json:
        print_json(stage)
        return
    size = f"{stage['weight_bytes'] / (1 << 20):.0f} MiB"
    click.echo(
        f"serving {stage['model']}, layers {stage['start']}:{stage['end']} of {stage['layers']} "
        f"({stage['device']}, {stage['dtype']}, {size})"
    )


@click.command()
@home_option
@json_option
def models(home: Path | None, as_json: bool) -> None:
    """Models of the swarm, and who holds which layers."""
    told = client_of(home).get("models")
    if as_json:
        print_json(told)
        return
    rows = []
    for model in told:
        missing = ", ".join(f"{start}:{end}" for start, end in model["missing"])
        state = "ready" if model["complete"] else f"missing {missing}"
        holders = ", ".join(_held(one) for one in model["holders"])
        rows.append((model["name"], model["architecture"], str(model["layers"]), state, holders))
    print_table(("model", "architecture", "layers", "state", "held by"), rows)
    if not rows:
        click.echo("none yet; `mycel serve MODEL` lends one", err=True)


def _held(holder: dict[str, Any]) -> str:
    state = "" if holder["state"] == "ready" else f" ({holder['state']})"
    return f"{holder['label']} {holder['start']}:{holder['end']}{state}"
