"""Run the Dockerfile's steps in a clean root, where no container engine exists, and try what it makes.

    python scripts/dockerfile_steps.py [--build-arg NAME=VALUE] [--mount DIR] [--env NAME=VALUE]

Needs root, debootstrap and a Debian mirror. The base image is stood in for by a fresh minimal Debian 12 with
its own Python 3.11; each stage is a copy of it, its RUN steps run by chroot, with nothing of this machine in
reach but /proc, a few devices, the resolver's settings and what --mount names (read-only, for a local package
mirror). Then the last stage's CMD is started as its USER, HEALTHCHECK must come to succeed, and on STOPSIGNAL
the program must end with status 0.

What this does not try: an engine's own parser, layers and cache, the real base image, networks and volumes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUITE = "bookworm"
PACKAGES = "python3,python3-venv,ca-certificates"
HEALTHY_WITHIN_S = 60
ENDS_WITHIN_S = 30
DEVICES = ("null", "zero", "full", "random", "urandom", "tty")


@dataclass
class Stage:
    """One FROM and what follows it."""

    root: Path
    name: str
    args: dict[str, str]
    env: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    user: str = "root"
    command: list[str] = field(default_factory=list)
    healthcheck: list[str] = field(default_factory=list)
    stop_signal: str = "SIGTERM"


@dataclass(frozen=True)
class Options:
    """What the command line said."""

    build_args: dict[str, str]
    env: dict[str, str]
    mounts: list[Path]
    work: Path


def main() -> None:
    """Build and try; exits non-zero with a sentence when a step fails."""
    parser = argparse.ArgumentParser(description="Run the Dockerfile's steps in a clean root.")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="seen by RUN steps only"
    )
    parser.add_argument("--mount", action="append", default=[], metavar="DIR", type=Path)
    parser.add_argument("--base", type=Path, help="a minimal Debian root made before, instead of debootstrap")
    said = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("chroot and mounts need root")
    with tempfile.TemporaryDirectory(prefix="mycel-image.") as folder:
        options = Options(pairs(said.build_arg), pairs(said.env), said.mount, Path(folder))
        base = said.base or make_base(options.work / "base")
        stage = build(read_steps(ROOT / "Dockerfile"), base, options)
        try_out(stage)
    say("all steps ran; the node came up healthy as a plain user and ended in order")


def pairs(items: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE items as a mapping."""
    return dict(item.split("=", 1) for item in items)


def read_steps(path: Path) -> list[tuple[str, str]]:
    """The Dockerfile's instructions as (WORD, rest), comments and continued lines resolved."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    text = re.sub(r"\\\n", " ", "\n".join(lines))
    steps = [line.strip().partition(" ") for line in text.splitlines() if line.strip()]
    return [(word.upper(), rest.strip()) for word, _, rest in steps]


def make_base(root: Path) -> Path:
    """A minimal Debian in `root`."""
    say(f"base: Debian {SUITE} with {PACKAGES}")
    run(["debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, str(root)], quiet=True)
    return root


def build(steps: list[tuple[str, str]], base: Path, options: Options) -> Stage:
    """Run every step; returns the last stage."""
    outer: dict[str, str] = {}
    stages: list[Stage] = []
    for number, (word, rest) in enumerate(steps, 1):
        say(f"{number} of {len(steps)}: {word} {rest}")
        if word == "ARG":
            name, _, default = rest.partition("=")
            scope = stages[-1].args if stages else outer
            scope[name] = options.build_args.get(name, outer.get(name, default))
        elif word == "FROM":
            stages.append(begin_stage(rest, base, len(stages), options))
        else:
            step(stages, word, rest, options)
    return stages[-1]


def begin_stage(rest: str, base: Path, number: int, options: Options) -> Stage:
    """A fresh copy of the base for a stage."""
    _, _, name = rest.partition(" AS ")
    root = options.work / f"stage{number}"
    run(["cp", "-a", str(base), str(root)])
    return Stage(root, name or str(number), {})


def step(stages: list[Stage], word: str, rest: str, options: Options) -> None:
    """One instruction within the last stage."""
    stage = stages[-1]
    match word:
        case "RUN":
            run_inside(stage, rest, options)
        case "COPY":
            copy(stages, rest)
        case "ENV":
            stage.env.update(pairs(shlex.split(rest)))
        case "WORKDIR":
            stage.workdir = rest
            (stage.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
        case "USER":
            stage.user = rest
        case "CMD":
            stage.command = json.loads(rest)
        case "HEALTHCHECK":
            stage.healthcheck = json.loads(rest[rest.index("CMD ") + 4 :])
        case "STOPSIGNAL":
            stage.stop_signal = rest
        case "VOLUME" | "EXPOSE":
            pass  # what an engine does when it runs the image
        case _:
            sys.exit(f"this script does not know the instruction {word}")


def copy(stages: list[Stage], rest: str) -> None:
    """COPY [--from=STAGE] SOURCE... TARGET, a folder's contents as Docker copies them."""
    stage, words = stages[-1], shlex.split(rest)
    source_root = ROOT
    if words[0].startswith("--from="):
        source_root = next(other.root for other in stages if other.name == words[0].removeprefix("--from="))
        words = words[1:]
    *sources, target = words
    place = stage.root / os.path.normpath(os.path.join(stage.workdir, target)).lstrip("/")
    for source in sources:
        path = source_root / source.lstrip("/")
        into = place / path.name if path.is_file() and (target.endswith("/") or len(sources) > 1) else place
        if path.is_dir():
            shutil.copytree(
                path, into, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True
            )
        else:
            into.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, into)


def run_inside(stage: Stage, script: str, options: Options) -> None:
    """RUN: a shell command in the stage's root, as its user."""
    environment = {**stage.args, **stage.env, **options.env}
    with mounted(stage.root, options.mounts):
        done = subprocess.run(inside(stage, ["/bin/sh", "-c", script], environment))
    if done.returncode:
        sys.exit(f"RUN ended with status {done.returncode}: {script}")


def inside(stage: Stage, command: Sequence[str], environment: dict[str, str]) -> list[str]:
    """The command line that runs `command` in the stage's root with just this environment."""
    path = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
    settings = [f"{name}={value}" for name, value in {**path, **environment}.items()]
    shell = f"cd {shlex.quote(stage.workdir)} && exec {shlex.join(command)}"
    chroot = [shutil.which("chroot") or "/usr/sbin/chroot", f"--userspec={stage.user}", str(stage.root)]
    return ["env", "-i", *settings, *chroot, "/bin/sh", "-c", shell]


def try_out(stage: Stage) -> None:
    """Start CMD as USER, wait for HEALTHCHECK to succeed, stop it with STOPSIGNAL."""
    if stage.user == "root":
        sys.exit("the image would run as root")
    say(f"starting {shlex.join(stage.command)} as {stage.user}")
    with mounted(stage.root, []), subprocess.Popen(inside(stage, stage.command, stage.env)) as node:
        try:
            wait_healthy(stage, node)
            node.send_signal(getattr(signal, stage.stop_signal))
            status = node.wait(ENDS_WITHIN_S)
        finally:
            node.kill()
    if status:
        sys.exit(f"the node ended with status {status} after {stage.stop_signal}")


def wait_healthy(stage: Stage, node: subprocess.Popen[bytes]) -> None:
    """Ask HEALTHCHECK once a second until it succeeds."""
    deadline = time.monotonic() + HEALTHY_WITHIN_S
    while subprocess.run(inside(stage, stage.healthcheck, stage.env)).returncode:
        if node.poll() is not None:
            sys.exit(f"the node ended by itself with status {node.returncode}")
        if time.monotonic() > deadline:
            sys.exit(f"the node was not healthy within {HEALTHY_WITHIN_S} s")
        time.sleep(1)


@contextmanager
def mounted(root: Path, mounts: Sequence[Path]) -> Iterator[None]:
    """/proc, a few devices, the resolver's settings and `mounts` inside `root`, and gone again after."""
    with ExitStack() as stack:
        for name in DEVICES:
            (root / "dev" / name).unlink(missing_ok=True)
            (root / "dev" / name).touch()
            bind(stack, Path("/dev") / name, root / "dev" / name)
        run(["mount", "-t", "proc", "proc", str(root / "proc")])
        stack.callback(run, ["umount", str(root / "proc")])
        for file in ("resolv.conf", "hosts"):
            shutil.copy2(Path("/etc") / file, root / "etc" / file)
        for path in mounts:
            inner = root / str(path).lstrip("/")
            if path.is_dir():
                inner.mkdir(parents=True, exist_ok=True)
            else:
                inner.parent.mkdir(parents=True, exist_ok=True)
                inner.touch()
            bind(stack, path, inner, "-o", "ro")
        yield


def bind(stack: ExitStack, outer: Path, inner: Path, *options: str) -> None:
    """Bind `outer` to `inner` until the stack unwinds."""
    run(["mount", "--bind", *options, str(outer), str(inner)])
    stack.callback(run, ["umount", str(inner)])


def run(command: Sequence[str], *, quiet: bool = False) -> None:
    """Run a command of this machine; exits when it fails."""
    done = subprocess.run(command, capture_output=quiet, text=True)
    if done.returncode:
        said = (done.stdout or "") + (done.stderr or "")
        sys.exit(f"{shlex.join(command)} ended with status {done.returncode}\n{said}")


def say(text: str) -> None:
    """One line of progress."""
    print(f"[image] {text}", flush=True)


if __name__ == "__main__":
    main()
