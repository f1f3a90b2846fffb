"""Real kernels' NATs in network namespaces; skipped, saying why, where they cannot be built.

With NETNS_TESTS=must-run in the environment (continuous integration, where root and nft are there) what would
be skipped fails instead.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # netlab, which bench/nat.py uses too

from netlab.boxes import KINDS  # noqa: E402
from netlab.lab import Lab  # noqa: E402
from netlab.space import missing  # noqa: E402

why_not = functools.cache(missing)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything in this folder."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("netns")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip where there can be no lab, or fail where there must be one."""
    if HERE in item.path.parents and (reason := why_not()) is not None:
        if os.environ.get("NETNS_TESTS") == "must-run":
            pytest.fail(f"no network lab here, and NETNS_TESTS=must-run asks for one: {reason}")
        pytest.skip(f"no network lab here: {reason}")


@pytest.fixture(scope="module")
def kinds_lab() -> Iterator[Lab]:
    """Three public hosts (known, other, stranger) and two sites of every kind ("port 0", "port 1"), open."""
    with Lab() as lab:
        for name in ("known", "other", "stranger"):
            lab.public(name)
        for kind in KINDS:
            for number in (0, 1):
                lab.site(f"{kind.name} {number}", kind)
        lab.open()
        yield lab
