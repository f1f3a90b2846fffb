"""The train kind: one model that many peers train together, by DiLoCo.

Every participant has a trainer process take the inner steps and is in the job's group (`job/ID`), where the
borders happen (`mycel.compute.train.course`). Nobody is needed for that but the members themselves: a course
goes on while the coordinator dies and another one takes over. The coordinator, which takes part as well,
reports, keeps a checkpoint now and then, and writes the results at the end:

    model.safetensors        the shared weights
    checkpoint.safetensors   those and the outer momentum: `model` of a later job, on any number of peers
    borders.json             step, loss and peers of every border

Whoever begins asks the coordinator where: with the last checkpoint, or anew. A member that comes later gets
the state from the group in any case.

A member whose trainer fails is out, and comes again after a while; one whose owner does not let it take part
stays out. Where that is the coordinator, its try has failed, and another one coordinates: what is wrong may
be wrong at one node only.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import trio

from mycel.compute.engine import EngineLost
from mycel.compute.train.client import Owner
from mycel.compute.train.trade import BUNDLE_ENTRY, Source, StartAsk, WorkAsk, seed_of
from mycel.compute.train.trainer import Trainers
from mycel.node.jobs.federate import UNREAD, source_of
from mycel.node.jobs.kinds import Spec, TrainSpec
from mycel.node.jobs.runner import Context, Services
from mycel.node.jobs.spec import Blob, Job, JobInvalid
from mycel.node.together import Together
from mycel.protocol.errors import MycelError, Refused, UsageProblem
from mycel.protocol.limits import MIB
from mycel.protocol.method import Call, Method
from mycel.protocol.tensor import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mycel.compute.train.border import Border
    from mycel.compute.train.course import Passed
    from mycel.compute.train.layout import Layout
    from mycel.compute.train.outer import Flat

CHECKPOINT_S = 30.0
"""Between two checkpoints, at least: a crash of everybody costs that much."""
ASK_S = 1.0
"""Between two questions where to begin, while nobody coordinates."""
SMALL_BYTES = MIB
"""Files up to this are written at once; larger ones in a thread, so that streams go on."""
OWNERS_NO = ("untrusted", "no-data")
"""Reasons to take no part that trying again does not change."""
RETRY_S, RETRY_S_MAX = 1.0, 60.0
"""Between two tries to take part, doubled with each."""
STEP_S_MAX = 600.0
"""For one request of inner steps: a trainer that needs longer is killed."""


class Where(msgspec.Struct, frozen=True):
    """Of which job somebody asks where to begin."""

    job: str


class Begin(msgspec.Struct, frozen=True):
    """The last checkpoint, None where there is none."""

    checkpoint: Blob | None


BEGIN = Method("train.begin", Where, Begin)


@dataclass(slots=True)
class _Course:
    """A job at this node."""

    border: Border
    layout: Layout
    passed: list[Passed] = field(default_factory=list)
    is_over: bool = False
    """The last border is passed, or this node came after it."""
    news: trio.Event = field(default_factory=trio.Event)

    def tell(self) -> None:
        """Wake who reports."""
        self.news.set()
        self.news = trio.Event()


class TrainRunner:
    """See `Runner`."""

    kind = TrainSpec.KIND

    def __init__(self, services: Services, trainers: Trainers, owner: Owner, together: Together) -> None:
        self._services = services
        self._trainers = trainers
        self._owner = owner
        self._together = together
        self._begins: dict[str, Begin] = {}
        self._courses: dict[str, _Course] = {}
        self._troubles: dict[str, MycelError] = {}
        """Why this node takes no part in a job now."""
        self._changed = trio.Event()
        services.rpc.serve(BEGIN, self._tell_begin)

    async def check(self, spec: Spec, files: Mapping[str, bytes | Path]) -> None:
        """See `Checker.check`."""
        keys = _spec_of(spec)
        if (keys.data is None) == (keys.offered is None):
            raise JobInvalid(
                "give one of data (a file that you bring) and offered (the name under which owners offer it)"
            )
        try:
            source_of(keys, None if keys.code is None else UNREAD[BUNDLE_ENTRY]).check()
        except UsageProblem as error:
            raise JobInvalid(str(error)) from None

    # --- a participant

    async def take_part(self, job: Job, context: Context) -> None:
        """See `Runner.take_part`."""
        pause = RETRY_S
        try:
            while True:
                try:
                    await self._train(job, context)
                except (MycelError, EngineLost, ValueError) as error:
                    known = error if isinstance(error, MycelError) else Refused(str(error), reason="trainer")
                self._troubles[job.id] = known
                self._tell()
                context.log(f"takes no part: {known}")
                await trio.sleep(math.inf if getattr(known, "reason", "") in OWNERS_NO else pause)
                pause = min(2 * pause, RETRY_S_MAX)
        finally:
            self._troubles.pop(job.id, None)

    async def _train(self, job: Job, context: Context) -> None:
        from mycel.compute.train.course import run_course, stay
        from mycel.compute.train.rows import row_of

        spec = _spec_of(job.spec)
        source = await self._source(job, context)
        async with self._data(job, context) as data:
            begin = await self._ask_begin(job, context)
            border, layout = await self._border(job, context, source, begin)
            course = _Course(border, layout)

            async def work(weights: Flat, steps: int, done: int) -> tuple[Flat, float]:
                settings = {**spec.settings, "batch": spec.batch, "steps": steps, "done": done,
                            "total": spec.steps, "keeps_optimizer": True}  # fmt: skip
                seed = seed_of(spec.seed, done, context.mesh.peer_id)
                tensor = Tensor("float32", (layout.size,), weights.data.cast("B"))
                ask = WorkAsk(spec.app, job.id, done, layout, tensor, settings, seed, str(data), True, False)
                result = await self._trainers.work(source, ask, STEP_S_MAX)
                assert result.update is not None, "training was asked for"
                arrived = row_of(result.update.data, layout) + weights
                return arrived, result.metrics.get("loss", math.nan)

            def on_border(passed: Passed) -> None:
                course.passed.append(passed)
                course.tell()

            group = self._together.group(f"job/{job.id}", quorum=spec.quorum, least=spec.peers)
            with self._in_course(job.id, course):
                async with group as (members, state):
                    await run_course(members, state, border, work, outer_steps(spec), on_border)
                    course.is_over = True
                    course.tell()
                    await stay(state, border)  # until the job ends

    @contextmanager
    def _in_course(self, job: str, course: _Course) -> Iterator[None]:
        self._courses[job] = course
        self._troubles.pop(job, None)
        self._tell()
        try:
            yield
        finally:
            del self._courses[job]
            course.tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _source(self, job: Job, context: Context) -> Source:
        """Raises `Refused` ("untrusted")."""
        spec = _spec_of(job.spec)
        code: bytes | None = None
        if spec.code is not None:
            self._owner.check_code(job.id, job.submitter, context.mesh.peer_id)
            code = await context.fetch(job.inputs["code"])
        return source_of(spec, code).check()

    @asynccontextmanager
    async def _data(self, job: Job, context: Context) -> AsyncIterator[Path]:
        """Where the data stands. Raises `Refused` ("no-data")."""
        spec = _spec_of(job.spec)
        if spec.offered is not None:
            yield self._owner.offered(spec.offered)
            return
        content = await context.fetch(job.inputs["data"])
        with tempfile.TemporaryDirectory(prefix="mycel-data-") as folder:
            path = Path(folder) / Path(spec.data or "data").name
            if len(content) <= SMALL_BYTES:
                path.write_bytes(content)
            else:
                await trio.to_thread.run_sync(path.write_bytes, content)
            yield path

    async def _ask_begin(self, job: Job, context: Context) -> Begin:
        while True:
            try:
                coordinator = context.coordinator
                if coordinator == context.mesh.peer_id:
                    if job.id in self._begins:
                        return self._begins[job.id]
                else:
                    return await context.rpc.call(coordinator, BEGIN, Where(job.id), deadline_s=ASK_S * 5)
            except MycelError:  # nobody coordinates yet, or not for long: the next one will know
                pass
            await trio.sleep(ASK_S)

    async def _border(
        self, job: Job, context: Context, source: Source, begin: Begin
    ) -> tuple[Border, Layout]:
        """The state to begin with."""
        from mycel.compute.train.border import BorderOptions
        from mycel.compute.train.checkpoint import Checkpoint, read_checkpoint
        from mycel.compute.train.rows import row_of

        spec = _spec_of(job.spec)
        blob = begin.checkpoint or job.inputs.get("model")
        if blob is None:
            ask = StartAsk(spec.app, dict(spec.settings), spec.seed)
            begun = await self._trainers.start_model(source, ask)
            first = Checkpoint(begun.layout, row_of(begun.model.data, begun.layout))
        else:
            first = read_checkpoint(await context.fetch(blob))
            if begin.checkpoint is None:  # an earlier job's: its steps are not this one's
                first = replace(first, steps=0)
        codec = None if spec.codec == "none" else spec.codec
        options = BorderOptions(every=spec.inner_steps, codec=codec, overlap=spec.overlap)
        return first.border(options), first.layout

    def _tell_begin(self, call: Call, where: Where) -> Begin:
        if where.job not in self._begins:
            raise Refused(f"this node does not coordinate job {where.job[:8]}", reason="unknown-job")
        return self._begins[where.job]

    # --- the coordinator

    async def coordinate(self, job: Job, context: Context) -> None:
        """See `Runner.coordinate`. Raises what keeps this node from taking part: another one shall."""
        spec = _spec_of(job.spec)
        if not self._services.takes_part:
            raise Refused("this node's owner does not let it work for jobs", reason="takes-no-part")
        last = await context.resume()
        self._begins[job.id] = Begin(None if last is None else msgspec.msgpack.decode(last, type=Blob))
        try:
            course = await self._course_of(job.id)
            await self._follow(job.id, course, spec, context)
            await self._finish(course, context)
        finally:
            del self._begins[job.id]

    async def _course_of(self, job: str) -> _Course:
        """This node's course, once it has begun. Raises what keeps it from beginning."""
        while job not in self._courses:
            if job in self._troubles:
                raise self._troubles[job]
            await self._changed.wait()
        return self._courses[job]

    async def _follow(self, job: str, course: _Course, spec: TrainSpec, context: Context) -> None:
        """Report and keep checkpoints until the last border. Raises what ends the course before."""
        from mycel.compute.train.checkpoint import write_checkpoint

        until = outer_steps(spec)
        kept_at = trio.current_time()
        told = 0
        while not course.is_over or told < len(course.passed):
            if self._courses.get(job) is not course:
                await self._course_of(job)
                raise Refused("this node fell out of the course and is in it anew", reason="trainer")
            for passed in course.passed[told:]:
                figures = {"loss": passed.loss, "peers": float(passed.members), "way": passed.step.length}
                context.report(passed.step.number, figures, steps=until)
            told = len(course.passed)
            if trio.current_time() >= kept_at + CHECKPOINT_S:
                kept_at = trio.current_time()
                blob = await context.keep(write_checkpoint(course.border, course.layout))
                await context.checkpoint(msgspec.msgpack.encode(blob), [blob])
            if told == len(course.passed) and not course.is_over:
                await course.news.wait()

    async def _finish(self, course: _Course, context: Context) -> None:
        from mycel.compute.train.checkpoint import write_checkpoint
        from mycel.compute.train.rows import to_safetensors

        await context.artefact("model.safetensors", to_safetensors(course.border.weights, course.layout))
        await context.artefact("checkpoint.safetensors", write_checkpoint(course.border, course.layout))
        rows = [
            {"step": passed.step.number, "loss": passed.loss, "peers": passed.step.contributors}
            for passed in course.passed
        ]
        await context.artefact("borders.json", json.dumps(rows, indent=1).encode())


def outer_steps(spec: TrainSpec) -> int:
    """Borders until the job is done."""
    return -(-spec.steps // spec.inner_steps)


def _spec_of(spec: Spec) -> TrainSpec:
    assert isinstance(spec, TrainSpec), "a train job's spec"
    return spec
