"""Make .venv and put everything into it that `make demo`, `make test` and `make check` need.

Run by any Python >= 3.11 (`make` finds one). It does nothing when a stamp in .venv says that just this was
installed already: a hash over pyproject.toml, constraints.txt, kernel.c, this file and the place of the
clone.

torch goes first and by itself, because left to itself pip fetches gigabytes of CUDA on Linux. The CPU
wheel comes from PyTorch's own index when that can be reached. MYCEL_TORCH_INDEX names another one, or, set
to nothing, leaves the choice to pip (which on Linux means CUDA, unless pip is configured otherwise).
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / ".mycel-setup"
CONSTRAINTS = ROOT / "constraints.txt"
KERNEL = ROOT / "compute" / "collective" / "kernel.c"
JS = ROOT / "tests" / "e2e" / "js"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
PROBE_S = 5


def main() -> None:
    """Bring .venv up to date; exits with a sentence when that cannot be done."""
    began = time.monotonic()
    if not is_current():
        make_venv()
        install()
        STAMP.write_text(wanted_stamp())
        say(f"ready after {time.monotonic() - began:.0f} s")
    install_js()


def is_current() -> bool:
    """Whether the stamp in .venv is that of this clone as it stands now."""
    return PYTHON.exists() and STAMP.exists() and STAMP.read_text() == wanted_stamp()


def wanted_stamp() -> str:
    """What the stamp must say."""
    digest = hashlib.sha256()
    sources = (ROOT / "pyproject.toml", CONSTRAINTS, Path(__file__), KERNEL)
    for part in (str(ROOT).encode(), *(source.read_bytes() for source in sources)):
        digest.update(len(part).to_bytes(8, "big") + part)
    return f"{venv_version()} {digest.hexdigest()}\n"


def venv_version() -> str:
    """The version of the Python in .venv, from the file that venv writes ("" where there is none)."""
    config = VENV / "pyvenv.cfg"
    found = (
        re.search(r"^version(?:_info)? *= *(\S+)", config.read_text(), re.MULTILINE)
        if config.exists()
        else None
    )
    return found.group(1) if found else ""


def make_venv() -> None:
    """Make .venv unless a usable one is there."""
    if PYTHON.exists():
        check = "import sys; sys.exit(sys.version_info < (3, 11))"
        if subprocess.run([PYTHON, "-c", check]).returncode:
            sys.exit(f"the Python in {VENV} is older than 3.11 or broken: delete {VENV} and run this again")
        return
    say(f"virtual environment in .venv with Python {platform.python_version()}")
    if subprocess.run([sys.executable, "-m", "venv", "--clear", VENV]).returncode:
        sys.exit(
            "no virtual environment could be made; on Debian and Ubuntu `apt install python3-venv` helps"
        )


def install() -> None:
    """Install the pinned dependencies, torch first, then this clone in editable form."""
    torch = next(line for line in CONSTRAINTS.read_text().splitlines() if line.startswith("torch=="))
    say(f"1 of 3: {torch} for CPU")
    pip(torch, *torch_index())
    say("2 of 3: what builds the package")
    pip("setuptools")
    say("3 of 3: mycel and what it and its tests need")
    pip("--no-build-isolation", "--editable", f"{ROOT}[test,bench,demo]")
    # trio-typing, which py-libp2p brings, ships stubs of an old trio that hide the types in trio itself.
    for stubs in VENV.glob("lib/python3*/site-packages/trio-stubs"):
        shutil.rmtree(stubs)


def torch_index() -> list[str]:
    """pip's arguments to find torch's CPU wheel."""
    chosen = os.environ.get("MYCEL_TORCH_INDEX")
    if chosen is not None:
        return ["--extra-index-url", chosen] if chosen else []
    if platform.system() != "Linux":
        return []  # PyPI's own wheels are CPU builds there
    try:
        with urllib.request.urlopen(f"{TORCH_INDEX}/torch/", timeout=PROBE_S):
            return ["--extra-index-url", TORCH_INDEX]
    except OSError as error:
        say(f"{TORCH_INDEX} cannot be reached ({error}): pip looks where it is configured to")
        return []


def pip(*arguments: str) -> None:
    """Run pip's install within the constraints, its progress visible; exits when it fails."""
    command: list[str | Path] = [
        PYTHON,
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "-c",
        CONSTRAINTS,
        *arguments,
    ]
    if subprocess.run(command, cwd=ROOT).returncode:
        sys.exit(f"pip could not install {arguments[-1]}: its last lines above say why")


def install_js() -> None:
    """Install js-libp2p for the tests that let it dial a daemon, where npm is there to do it."""
    lock = JS / "package-lock.json"
    if not lock.exists():
        return
    digest = hashlib.sha256(lock.read_bytes()).hexdigest()
    stamp = JS / "node_modules" / ".mycel-setup"
    if stamp.exists() and stamp.read_text() == digest:
        return
    if shutil.which("npm") is None or shutil.which("node") is None:
        say("no node and npm here: the tests against js-libp2p will be skipped")
        return
    say("js-libp2p, to test the wire against")
    if subprocess.run(["npm", "ci", "--no-audit", "--no-fund"], cwd=JS).returncode:
        sys.exit(f"npm could not install what {JS.relative_to(ROOT)}/package-lock.json names")
    stamp.write_text(digest)


def say(text: str) -> None:
    """One line of progress."""
    print(f"[setup] {text}", flush=True)


if __name__ == "__main__":
    main()
