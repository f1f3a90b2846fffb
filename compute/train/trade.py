"""What a daemon and its trainer process say to each other: operations over the socket of
`mycel.compute.pipe`.

Models and updates are flat rows of float32 beside the message (`mycel.compute.train.layout`), never pickled.
This module needs no numpy: a client's daemon only hands rows through.
"""

from __future__ import annotations

import hashlib
import posixpath
from typing import Protocol

import msgspec

from mycel.compute.engine import EngineLost
from mycel.compute.pipe import Nothing, Operation
from mycel.compute.train.layout import Layout
from mycel.protocol.errors import UsageProblem
from mycel.protocol.limits import MIB
from mycel.protocol.tensor import Tensor

BUNDLE_BYTES_MAX = 8 * MIB
BUNDLE_FILES_MAX = 256
BUNDLE_ENTRY = "app.py"
"""The file of a bundle that defines `app`."""
BUILT_IN = ("classifier", "causal-lm")
"""Applications that come with Mycel."""

Setting = str | int | float | bool
"""One setting of a job or an application, as TOML can say it."""


class Source(msgspec.Struct, frozen=True):
    """Where an application comes from: built in by its name, or a bundle of the submitter's files."""

    name: str
    files: dict[str, bytes] = {}

    @property
    def is_bundle(self) -> bool:
        """Whether it is somebody's own code."""
        return bool(self.files)

    @property
    def key(self) -> str:
        """What shares a process: all that is built in, or one bundle."""
        if not self.files:
            return ""
        return hashlib.sha256(msgspec.msgpack.encode(sorted(self.files.items()))).hexdigest()

    def check(self) -> Source:
        """Raise `UsageProblem` for what cannot be run; returns itself."""
        if not self.files:
            if self.name not in BUILT_IN:
                raise UsageProblem(f"no application {self.name!r}; built in are {', '.join(BUILT_IN)}")
            return self
        size = sum(len(content) for content in self.files.values())
        if len(self.files) > BUNDLE_FILES_MAX or size > BUNDLE_BYTES_MAX:
            raise UsageProblem(
                f"a bundle of {len(self.files)} files and {size} bytes: at most {BUNDLE_FILES_MAX} and "
                f"{BUNDLE_BYTES_MAX}; data and weights do not belong into it"
            )
        for name in self.files:
            is_plain = posixpath.normpath(name) == name and not name.startswith(("/", "..", "~"))
            if not is_plain or "\\" in name or "\0" in name or not name.isprintable():
                raise UsageProblem(f"a bundle's files are named like pack/part.py, not {name!r}")
        if BUNDLE_ENTRY not in self.files:
            raise UsageProblem(f"a bundle has a file {BUNDLE_ENTRY} with app = App(); this one has none")
        return self


def seed_of(seed: int, number: int, peer: str) -> int:
    """The seed for one piece of a job's work: another one for every peer and number (a round, or the steps
    done before), the same when it is repeated. `seed` is the job's."""
    text = f"{seed} {number} {peer}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


class StartAsk(msgspec.Struct, frozen=True):
    """Make the first model of a job."""

    app: str
    settings: dict[str, Setting]
    seed: int


class Begun(msgspec.Struct, frozen=True):
    """A first model: a row of float32, and how it lies in it."""

    layout: Layout
    model: Tensor


class WorkAsk(msgspec.Struct, frozen=True):
    """Train a model, or judge it, or judge it first and train it then."""

    app: str
    job: str
    number: int
    layout: Layout
    model: Tensor
    settings: dict[str, Setting]
    seed: int
    data: str
    """Path of this node's data."""
    train: bool
    evaluate: bool


class WorkDone(msgspec.Struct, frozen=True):
    """What came of it."""

    update: Tensor | None
    """The row of differences, or their momentum; None where nothing was trained."""
    examples: int
    metrics: dict[str, float]
    judged_examples: int
    judged: dict[str, float]
    seconds: float


OPEN = Operation("open", Source, Nothing)
START = Operation("start", StartAsk, Begun)
WORK = Operation("work", WorkAsk, WorkDone)


class Trainer(Protocol):
    """Whoever runs applications: a process of its own, or, in simulations, this one."""

    async def open(self, source: Source) -> None:
        """Load an application. Raises `ValueError` for one that does not load, `EngineLost`."""

    async def start(self, ask: StartAsk) -> Begun:
        """Make a first model. Raises `ValueError`, `EngineLost`."""

    async def work(self, ask: WorkAsk, limit_s: float) -> WorkDone:
        """Train or judge; a trainer that needs longer than `limit_s` is killed.

        Raises `ValueError` for what the application refused or failed with, `EngineLost`.
        """

    async def wait_lost(self) -> EngineLost:
        """Park until the trainer dies; returns why."""

    async def aclose(self) -> None: ...
