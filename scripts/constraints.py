"""Write constraints.txt: exact versions of everything that mycel and its tests pull in, as installed here.

    .venv/bin/python scripts/constraints.py > constraints.txt

Run it in the virtual environment after adding or upgrading a dependency; `make test` then says whether the
new set holds. Only what pyproject.toml leads to is listed, so a package tried out by hand does not get in.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.version import Version

ROOT: tuple[str, tuple[str, ...]] = ("mycel", ("test", "bench", "demo"))


def normalized(name: str) -> str:
    """The distribution's name as PEP 503 spells it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    """Installed versions by name, over all that `ROOT` requires on this machine.

    Raises `SystemExit` when a requirement is not installed.
    """
    found: dict[str, str] = {}
    seen: dict[tuple[str, tuple[str, ...]], None] = {}
    todo = [ROOT]
    while todo:
        name, extras = todo.pop()
        key = (normalized(name), tuple(sorted(extras)))
        if key in seen:
            continue
        seen[key] = None
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            sys.exit(f"{name} is required but not installed: run `make setup` first")
        found[key[0]] = Version(installed.version).public  # 2.13.0, not 2.13.0+cpu: any build of it
        for text in installed.requires or ():
            wanted = Requirement(text)
            if wanted.marker is None or any(wanted.marker.evaluate({"extra": e}) for e in ("", *extras)):
                todo.append((wanted.name, tuple(wanted.extras)))
    del found[ROOT[0]]
    return found


if __name__ == "__main__":
    print("# Exact versions that `make` and CI install; scripts/constraints.py writes this file.")
    for name, version in sorted(pins().items()):
        print(f"{name}=={version}")
