"""`mycel serve` and `mycel models`: which layers are lent, and which models are kept as blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mycel.commands.common import client_of, home_option, json_option, print_json, print_table
from mycel.commands.progress import follow


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
    """Let the running node lend layers of MODEL: a local directory, a name or root that `mycel models list`
    shows (just its layers are fetched, from members), or a hub id."""
    if Path(model).expanduser().is_dir():
        model = str(Path(model).expanduser().absolute())
    stage = follow(client_of(home, timeout_s=None), "models/serve", {"model": model, "layers": layers})
    if as_json:
        print_json(stage)
        return
    size = f"{stage['weight_bytes'] / (1 << 20):.0f} MiB"
    click.echo(
        f"serving {stage['model']}, layers {stage['start']}:{stage['end']} of {stage['layers']} "
        f"({stage['device']}, {stage['dtype']}, {size})"
    )


@click.group(invoke_without_command=True)
@home_option
@json_option
@click.pass_context
def models(context: click.Context, home: Path | None, as_json: bool) -> None:
    """Models of the swarm, and who lends which layers.

    \b
    Models as blocks, which members fetch from each other:
    mycel models list          which there are, here and elsewhere
    mycel models add MODEL     keep a directory or a hub model as blocks
    mycel models get MODEL     fetch one from members
    mycel models remove MODEL  keep it no more
    """
    if context.invoked_subcommand is not None:
        context.obj = home
        return
    told = client_of(home).get("models")
    if as_json:
        print_json(told)
        return
    away = {model["fingerprint"]: model for model in client_of(home).get("away/models")}
    rows = []
    for model in told:
        missing = ", ".join(f"{start}:{end}" for start, end in model["missing"])
        state = "ready" if model["complete"] else f"missing {missing}"
        gone = away.pop(model["fingerprint"], {"holders": []})
        holders = ", ".join(_held(one) for one in [*model["holders"], *gone["holders"]])
        rows.append((model["name"], model["architecture"], str(model["layers"]), state, holders))
    for model in away.values():
        holders = ", ".join(_held(one) for one in model["holders"])
        rows.append((model["name"], model["architecture"], str(model["layers"]), "away", holders))
    print_table(("model", "architecture", "layers", "state", "held by"), rows)
    if not rows:
        click.echo("none yet; `mycel serve MODEL` lends one", err=True)


def _held(holder: dict[str, Any]) -> str:
    state = "" if holder["state"] == "ready" else f" ({holder['state']})"
    return f"{holder['label']} {holder['start']}:{holder['end']}{state}"


@models.command("list")
@home_option
@json_option
@click.pass_obj
def list_(outer: Path | None, home: Path | None, as_json: bool) -> None:
    """Models kept as blocks, here and at connected members."""
    told = client_of(home or outer).get("models/kept")
    if as_json:
        print_json(told)
        return
    rows = [
        (
            one["name"],
            str(one["layers"]),
            f"{one['nbytes'] / (1 << 20):.0f} MiB",
            _parts(one, one["here"]) if one["here"] else "",
            ", ".join(f"{keeper['label']} {_parts(one, keeper)}" for keeper in one["others"]),
            one["root"],
        )
        for one in told
    ]
    print_table(("model", "layers", "size", "here", "elsewhere", "root"), rows)
    if not rows:
        click.echo("none yet; `mycel models add DIRECTORY` keeps one as blocks", err=True)


def _parts(model: dict[str, Any], keeper: dict[str, Any]) -> str:
    """What a keeper has of a model, in few words."""
    if (
        keeper["edge"]
        and keeper["held"] in ([[0, model["layers"]]], [])
        and (keeper["held"] or not model["layers"])
    ):
        return "all"
    return " ".join(f"{start}:{end}" for start, end in keeper["held"]) or "files only"


@models.command()
@click.argument("model")
@click.option("--name", help="What the swarm shall call it. [default: the directory's name, or the hub id]")
@home_option
@json_option
@click.pass_obj
def add(outer: Path | None, model: str, name: str | None, home: Path | None, as_json: bool) -> None:
    """Keep MODEL as blocks: a local directory, or a hub id, which is downloaded first if it is not here.

    Members can then fetch and serve it by its name. Its files may be deleted afterwards.
    """
    client = client_of(home or outer, timeout_s=None)
    client.get("status")  # before anything is downloaded
    directory = Path(model).expanduser()
    if not directory.is_dir():
        directory, name = _download(model), name or model
    ask = {"directory": str(directory.absolute()), "name": name or directory.absolute().name}
    _print_kept(follow(client, "models/add", ask), as_json)


def _download(model: str) -> Path:
    """Where the hub's own cache has the model, fetched where it has not."""
    from mycel.compute.engine import ModelUnsupported
    from mycel.compute.model.checkpoint import fetch_whole
    from mycel.protocol.errors import UsageProblem

    click.echo(f"looking for {model} in the hub's cache and at the hub ...", err=True)
    try:
        return fetch_whole(model)
    except (FileNotFoundError, ModelUnsupported) as error:
        raise UsageProblem(str(error)) from None


@models.command()
@click.argument("model")
@click.option("--layers", callback=_layers, metavar="i:j",
              help="Layers i up to, not including, j. [default: all]")  # fmt: skip
@home_option
@json_option
@click.pass_obj
def get(
    outer: Path | None, model: str, layers: tuple[int, int] | None, home: Path | None, as_json: bool
) -> None:
    """Fetch MODEL, a name or root that `mycel models list` shows, from members, and keep it."""
    client = client_of(home or outer, timeout_s=None)
    _print_kept(follow(client, "models/get", {"model": model, "layers": layers}), as_json)


@models.command()
@click.argument("model")
@home_option
@click.pass_obj
def remove(outer: Path | None, model: str, home: Path | None) -> None:
    """Keep MODEL, a name or root, no more: its blocks go when others need the room."""
    client_of(home or outer, timeout_s=None).post("models/remove", {"model": model})


def _print_kept(kept: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(kept)
        return
    click.echo(f"{kept['name']}: {_parts(kept, kept['here'])} of {kept['layers']} layers here")
    click.echo(f"root {kept['root']}")
