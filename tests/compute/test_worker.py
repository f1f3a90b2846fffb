"""Worker processes that die, hang, run out of memory or talk nonsense: a lost stage, never a lost daemon."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from mycel.compute.engine import EngineLost, Sampling, Span, StageSpec, Work
from mycel.compute.model.tiny import tiny_llama
from mycel.compute.pipe import HELLO, Hello
from mycel.compute.process import WorkerOptions, WorkerProcess, describe_exit, open_stderr, scrub
from mycel.compute.worker import WorkerEngine, start_worker
from mycel.protocol.frame import FrameKind, pack

ALL = Span(0, 4)
STEP = Work("s", ALL, 0, tokens=(1, 2, 3), sampling=Sampling())


def spec(path: Path) -> StageSpec:
    return StageSpec(str(path), None, device="cpu", threads=1)


@contextlib.asynccontextmanager
async def fresh_worker(**options: float) -> AsyncIterator[WorkerEngine]:
    worker = start_worker(WorkerOptions(environment=os.environ, **options))  # type: ignore[arg-type]
    try:
        yield worker
    finally:
        await worker.aclose()


async def test_killed_in_a_step(tiny_llama_path: Path) -> None:
    async with fresh_worker() as worker:
        await worker.load(spec(tiny_llama_path))
        os.kill(worker.pid, signal.SIGSTOP)
        heard: list[str] = []

        async def hear() -> None:
            heard.append(str(await worker.wait_lost()))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(hear)
            nursery.start_soon(hear)
            nursery.start_soon(kill_soon, worker.pid)
            with pytest.raises(EngineLost, match="SIGKILL"):
                await worker.step([STEP])
        assert len(heard) == 2
        assert all(f"worker process {worker.pid} is gone: it was killed by SIGKILL" in why for why in heard)
        with pytest.raises(EngineLost, match="SIGKILL"):
            await worker.stats()


async def kill_soon(pid: int) -> None:
    await trio.sleep(0.05)  # the step is on its way by then; the outcome is the same if it is not
    os.kill(pid, signal.SIGKILL)


async def test_out_of_memory_is_a_lost_engine_that_says_so(tmp_path: Path) -> None:
    shape = {"hidden_size": 64, "num_key_value_heads": 1, "intermediate_size": 16_384}
    path = tiny_llama(tmp_path / "wide", max_position_embeddings=20_000, **shape)
    limit = 64 << 30
    async with fresh_worker(memory_bytes_max=limit) as worker:
        await worker.load(spec(path))
        assert resource.prlimit(worker.pid, resource.RLIMIT_DATA) == (limit, limit)
        held = data_bytes(worker.pid)
        # Room for the session's cache (a few MiB), not for a forward's activations (over a GiB).
        resource.prlimit(worker.pid, resource.RLIMIT_DATA, (held + (128 << 20), limit))
        heard: list[str] = []

        async def hear() -> None:
            heard.append(str(await worker.wait_lost()))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(hear)
            with pytest.raises(EngineLost, match="out of memory in step"):
                await worker.step([Work("big", ALL, 0, tokens=(1,) * 20_000, sampling=Sampling())])
        assert "out of memory in step" in heard[0], "the worker's own reason, whoever hears of it first"


def data_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmData:"))
    return int(line.split()[1]) * 1024


async def test_hung_worker_meets_the_callers_deadline_and_is_killed_at_its_own(tiny_llama_path: Path) -> None:
    async with fresh_worker(step_s_max=4.0) as worker:
        await worker.load(spec(tiny_llama_path))
        os.kill(worker.pid, signal.SIGSTOP)
        with trio.move_on_after(0.2) as deadline:
            await worker.step([STEP])
        assert deadline.cancelled_caught
        os.kill(worker.pid, signal.SIGCONT)
        (done,) = await worker.step([STEP])
        assert done.sampled is not None
        assert (await worker.stats()).steps == 2, "the abandoned step ran too, and its answer was dropped"
        os.kill(worker.pid, signal.SIGSTOP)
        with pytest.raises(EngineLost, match="did not answer step within 4 s"):
            await worker.step([STEP])
        assert "did not answer" in str(await worker.wait_lost())


async def test_garbage_on_the_socket_ends_the_worker_with_a_reason() -> None:
    async with fresh_worker() as worker:
        await worker.hello()
        worker._outbox.append(os.urandom(4096))
        with pytest.raises(EngineLost, match=r"status 81(.|\n)*frame of"):
            await worker.stats()


def say(*parts: bytes) -> str:
    """A program that writes to its socket and then waits."""
    return (
        "import socket, sys, time\n"
        "s = socket.socket(fileno=int(sys.argv[1]))\n"
        f"s.sendall({b''.join(parts)!r})\n"
        "print('last words', file=sys.stderr, flush=True)\n"
    )


def hello() -> bytes:
    body, _ = HELLO.encode(Hello(1, "0", (), 0.0))
    return b"".join(bytes(part) for part in pack(FrameKind.RESPONSE, 0, body))


def frame(kind: FrameKind, number: int, body: bytes) -> bytes:
    return b"".join(bytes(part) for part in pack(kind, number, body))


@pytest.mark.parametrize(
    ("program", "why"),
    [
        (say() + "sys.exit(3)", "status 3\n    last words"),
        (say() + "import os; os.abort()", "SIGABRT"),
        (say(b"\xff" * 100) + "time.sleep(60)", "garbage: frame of"),
        (say(frame(FrameKind.RESPONSE, 0, b"\xc1")) + "time.sleep(60)", "first words"),
        (say(frame(FrameKind.RESPONSE, 9, b"")) + "time.sleep(60)", "garbage: a frame .* for call 9"),
        (say(frame(FrameKind.REQUEST, 0, b"")) + "time.sleep(60)", "garbage: a frame"),
        (
            say(hello(), frame(FrameKind.RESPONSE, 1, b"\x01")) + "time.sleep(60)",
            "answer to stats made no sense",
        ),
        (
            say(hello(), frame(FrameKind.ERROR, 1, b"\x01")) + "time.sleep(60)",
            "failure of stats made no sense",
        ),
        (say(hello(), frame(FrameKind.RESPONSE, 1, bytes(500))[:50]) + "sys.exit(0)", "status 0"),
        (say(hello()) + "s.shutdown(1); time.sleep(60)", "closed its socket"),
    ],
)
async def test_worker_that_talks_nonsense_is_killed(program: str, why: str) -> None:
    worker = start_program(program)
    try:
        with pytest.raises(EngineLost, match=why):
            await worker.stats()
        with pytest.raises(EngineLost, match=why):
            await worker.step([STEP])
        with trio.fail_after(10):
            await worker._process.wait_exit()
    finally:
        await worker.aclose()


def start_program(program: str, **options: float) -> WorkerEngine:
    """An engine over any Python program instead of the worker's."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    stderr = open_stderr()
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", program, str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        stderr=stderr,
    )
    theirs.close()
    return WorkerEngine(WorkerProcess(process, ours, stderr), WorkerOptions(**options))  # type: ignore[arg-type]


async def test_worker_that_does_not_start_in_time_is_killed() -> None:
    worker = start_program("import time; time.sleep(60)", start_s_max=0.3)
    with pytest.raises(EngineLost, match=r"did not start within 0\.3 s"):
        await worker.hello()
    await worker.aclose()


async def test_close_ends_a_worker_that_will_not_listen() -> None:
    worker = start_program("import time; time.sleep(60)")
    began = trio.current_time()
    await worker.aclose()
    assert trio.current_time() - began < 10
    assert worker._process.status == -signal.SIGKILL
    with pytest.raises(EngineLost, match="closed"):
        await worker.stats()
    await worker.aclose()


async def test_nothing_is_left_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        worker = start_program(say() + "sys.exit(1)")
        with pytest.raises(EngineLost):
            await worker.stats()
        await worker.wait_lost()
        await worker.aclose()
    assert len(os.listdir("/proc/self/fd")) == before


def test_worker_dies_with_its_daemon() -> None:
    """Also while it still imports, and although nobody closes anything."""
    program = (
        "import os, sys, time\n"
        "from mycel.compute.worker import start_worker\n"
        "print(start_worker().pid, flush=True)\n"
        "time.sleep(60)"
    )
    daemon = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert daemon.stdout is not None
    pid = int(daemon.stdout.readline())
    gone = os.pidfd_open(pid)
    try:
        daemon.kill()
        daemon.wait()
        assert select.select([gone], [], [], 30)[0]
    finally:
        os.close(gone)
        daemon.stdout.close()


async def test_worker_sees_where_things_are_and_no_secrets(shared_worker: WorkerEngine) -> None:
    await shared_worker.hello()
    seen = await trio.Path(f"/proc/{shared_worker.pid}/environ").read_bytes()
    names = {entry.partition("=")[0] for entry in seen.decode().split("\0") if entry}
    assert "OMP_WAIT_POLICY" in names
    assert "PYTEST_CURRENT_TEST" not in names
    offered = {
        "PATH": "/bin",
        "HF_TOKEN": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "MYCEL_KEY": "x",
        "PYTHONPATH": "/x",
    }
    assert "x" not in scrub(offered).values()
    assert "/x" not in scrub(offered).values()
    assert scrub(offered)["PATH"] == "/bin"


async def test_hello_tells_what_torch_sees(shared_worker: WorkerEngine) -> None:
    import torch

    hello = await shared_worker.hello()
    assert hello.pid == shared_worker.pid
    assert hello.torch == torch.__version__
    assert hello.devices[-1].name == "cpu"
    assert hello.devices[-1].memory_bytes > 0
    assert len(hello.devices) == 1 + torch.cuda.device_count()


async def test_large_steps_pass_whole(
    shared_worker: WorkerEngine, tiny_llama_path: Path, tmp_path: Path
) -> None:
    """Megabytes each way, far beyond what a socket buffer holds."""
    path = tiny_llama(tmp_path / "long", max_position_embeddings=20_000)
    await shared_worker.load(spec(path))
    tokens = tuple(i % 96 for i in range(4000))
    first = Work("long", Span(0, 1), 0, tokens=tokens)
    (done,) = await shared_worker.step([first])
    assert done.hidden is not None
    assert done.hidden.shape == (4000, 32)
    halves = [Work("h", Span(0, 1), at, tokens=tokens[at : at + 1000]) for at in range(0, 4000, 1000)]
    dones = await shared_worker.step(halves)
    works = [
        Work(f"s{i}", Span(1, 2), 0, hidden=done.hidden)
        for i, done in enumerate([done, *dones])
        if done.hidden
    ]
    results = await shared_worker.step(works)
    assert [r.hidden.shape[0] for r in results if r.hidden] == [4000, 1000, 1000, 1000, 1000]


def test_a_talkative_worker_fills_no_disk() -> None:
    program = (
        "import os\n"
        "from mycel.compute.worker_main import STDERR_BYTES_MAX, trim_stderr\n"
        "os.write(2, b'x' * STDERR_BYTES_MAX); trim_stderr()\n"
        "assert os.fstat(2).st_size == STDERR_BYTES_MAX or os._exit(3)\n"
        "os.write(2, b'y'); trim_stderr(); os.write(2, b'last words'); trim_stderr()"
    )
    with open_stderr() as stderr:
        assert subprocess.run([sys.executable, "-c", program], stderr=stderr, timeout=100).returncode == 0
        assert os.pread(stderr.fileno(), 100, 0) == b"last words"


def test_exits_in_words() -> None:
    assert describe_exit(0) == "it exited with status 0"
    assert "SIGSEGV" in describe_exit(-signal.SIGSEGV)
    assert "memory" in describe_exit(-signal.SIGKILL)
