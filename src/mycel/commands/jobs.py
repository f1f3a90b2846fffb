"""`mycel submit | jobs | logs | stop | pull`: work that the swarm does to its end, whoever dies meanwhile."""

from __future__ import annotations

import os
import sys
import time
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

ID_SHOWN = 8


@click.command()
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@home_option
@json_option
def submit(file: Path, home: Path | None, as_json: bool) -> None:
    """Hand the job that FILE (a job.toml) describes to the swarm, with the files that it names."""
    import msgspec

    from mycel.node.jobs.spec import JobInvalid, file_keys, read_job_file

    spec = read_job_file(file)
    files = {}
    for key, name in file_keys(spec).items():
        path = (file.parent / Path(name).expanduser()).absolute()
        if not path.is_file():
            raise JobInvalid(f"{key} = {name!r}: there is no file {path}; names are relative to {file}")
        files[key] = str(path)
    ask = {"job": {"kind": spec.KIND, **msgspec.to_builtins(spec)}, "files": files}
    view = client_of(home, timeout_s=None).post("jobs/submit", ask)
    if as_json:
        print_json(view)
        return
    job = view["id"][:ID_SHOWN]
    click.echo(view["id"])
    click.echo(
        f"job {printable(view['name'])}, with {len(view['electors'])} electors; see `mycel jobs`, "
        f"`mycel logs -f {job}`, and when it is done `mycel pull {job}`",
        err=True,
    )


@click.command()
@home_option
@json_option
def jobs(home: Path | None, as_json: bool) -> None:
    """Jobs of the swarm, and how they stand."""
    told = client_of(home).get("jobs")
    if as_json:
        print_json(told)
        return
    rows = [_row(job) for job in told["jobs"]]
    print_table(("job", "name", "kind", "state", "done", "by", "age", "results", ""), rows)
    if not rows:
        click.echo("none yet; `mycel submit job.toml` hands one in", err=True)
    for refused in told["refused"]:
        say = f"refused ({refused['reason']}): {refused['text']}"
        click.echo(click.style(printable(say), dim=True), err=True)


def _row(job: dict[str, Any]) -> tuple[str, ...]:
    done = f"{job['step']}/{job['steps']}" if job["steps"] else str(job["step"] or "")
    figures = "  ".join(f"{name} {value:g}" for name, value in job["metrics"].items())
    return (
        job["id"][:ID_SHOWN],
        job["name"],
        job["kind"],
        job["phase"],
        done,
        job["coordinator_label"],
        seconds(max(0.0, time.time() - job["created"])),
        " ".join(one["name"] for one in job["artefacts"]),
        job["text"] or figures,
    )


@click.command()
@click.argument("job")
@click.option("-f", "--follow", is_flag=True, help="Go on until the job ends.")
@home_option
@json_option
def logs(job: str, follow: bool, home: Path | None, as_json: bool) -> None:
    """What peers say about JOB: its name, or its id or the beginning of it."""
    lines = client_of(home, timeout_s=None).lines("jobs/logs", {"job": job, "follow": follow})
    for line in lines:
        if as_json:
            print_json(line)
            continue
        when = time.strftime("%H:%M:%S", time.localtime(line["at"]))
        click.echo(f"{click.style(when, dim=True)} {printable(line['label'])}: {printable(line['text'])}")
        sys.stdout.flush()


@click.command()
@click.argument("job")
@home_option
@json_option
def stop(job: str, home: Path | None, as_json: bool) -> None:
    """Stop JOB for good. Its submitter may, and admins."""
    view = client_of(home).post("jobs/stop", {"job": job})
    if as_json:
        print_json(view)
    else:
        click.echo(f"{view['id'][:ID_SHOWN]}  {printable(view['name'])}: {view['phase']}")


@click.command()
@click.argument("job")
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path), default=Path("."))
@home_option
@json_option
def pull(job: str, directory: Path, home: Path | None, as_json: bool) -> None:
    """Fetch the results of JOB, so far, into DIRECTORY (the current one by default)."""
    client = client_of(home, timeout_s=None)
    view = client.post("jobs/view", {"job": job})
    if not view["artefacts"]:
        from mycel.node.client import ControlError

        raise ControlError(
            f"job {view['id'][:ID_SHOWN]} ({view['phase']}) has no results yet; see `mycel jobs`"
        )
    directory.mkdir(parents=True, exist_ok=True)
    pulled = []
    for artefact in view["artefacts"]:
        path = directory / Path(artefact["name"]).name
        partial = path.with_name(f".{path.name}.partial")
        ask = {"job": view["id"], "name": artefact["name"]}
        with partial.open("wb") as file:
            for piece in client.pieces("jobs/content", ask):
                file.write(piece)
        os.replace(partial, path)
        pulled.append({"path": str(path), "nbytes": artefact["nbytes"]})
        if not as_json:
            click.echo(f"{path}  {artefact['nbytes']} bytes")
    if as_json:
        print_json({"job": view["id"], "phase": view["phase"], "files": pulled})
