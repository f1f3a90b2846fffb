"""The daemon's side of a worker: an `Engine` whose torch runs in a process of its own.

The process is a child with one end of a socket pair, a few harmless environment variables, and no keys. A
call writes its frame and reads the answer in the caller's own task: no task of ours stands between, so a
step costs two system calls and two wake-ups more than torch's own time. Calls take turns (first come, first
served).

A call that is cancelled loses nothing: what was not yet written stays in the outbox and goes out before the
next request, what was half read stays in the receiver, and the answer nobody waits for is dropped by its
number. The worker still does what it was asked, so a cancelled `step` may have run.

The process may die at any time, for any reason. Whoever is in a call then, and whoever calls later, gets
`EngineLost` with the exit code or signal and the last lines it printed; `wait_lost` hears it at once also
when nobody calls. The same holds for a worker that speaks nonsense or does not answer: it is killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, TypeVar

import trio

from mycel.compute.engine import (
    Done,
    EngineLost,
    EngineStats,
    ModelCard,
    ModelUnsupported,
    StageInfo,
    StageSpec,
    Work,
)
from mycel.compute.pipe import (
    DESCRIBE,
    FAILURE,
    FORGET,
    GATHER_MAX,
    HELLO,
    LOAD,
    PROGRESS,
    REWIND,
    STATS,
    STEP,
    TOKENIZER_FILES,
    FrameReceiver,
    Hello,
    Nothing,
    Operation,
    Rewind,
    advance,
)
from mycel.protocol.errors import LocalProtocolError, RemoteProtocolError
from mycel.protocol.frame import Frame, FrameKind, pack
from mycel.protocol.mesh import Buffer

Req = TypeVar("Req")
Res = TypeVar("Res")

PASSED_ON = (
    "PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TMPDIR", "XDG_CACHE_HOME", "LD_LIBRARY_PATH",
    "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "HIP_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES",
    "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT",
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE",
)  # fmt: skip
"""Variables a worker may see of those it is offered: where things are, never secrets."""
OWN_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "passive",  # idle OpenMP threads sleep instead of burning what other workers need
    "GOMP_SPINCOUNT": "0",
    "KMP_BLOCKTIME": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONHASHSEED": "0",
}
STDERR_QUOTED_BYTES = 2000
STDERR_QUOTED_LINES = 6
EXIT_S = 2.0
"""How long a worker that was told to go, or whose socket ended, may take before it is killed."""


@dataclass(frozen=True)
class WorkerOptions:
    """How to run a worker process."""

    environment: Mapping[str, str] = field(default_factory=dict)
    """The daemon's own; only `PASSED_ON` of it reaches the worker."""
    memory_bytes_max: int = 0
    """Private main memory that the process may take; 0: no limit. Not for CUDA, which maps more."""
    step_s_max: float = 120.0
    """A step (or any call but load) unanswered for so long means a hung worker, which is killed. Far above
    any step: sessions have their own, shorter deadlines."""
    start_s_max: float = 120.0
    """From start to the worker's hello: importing torch takes 2-4 s, on a busy or cold machine much more."""


class WorkerEngine:
    """An `Engine` in a process of its own. Made by `start_worker`; `aclose` ends the process."""

    def __init__(
        self, process: subprocess.Popen[bytes], sock: socket.socket, stderr: IO[bytes], options: WorkerOptions
    ) -> None:
        self._process = process
        self._sock = sock
        self._stderr = stderr
        self._options = options
        self._receiver = FrameReceiver()
        self._outbox: list[Buffer] = []
        self._number = 0
        self._turn = trio.Lock()
        self._watch = trio.Lock()
        self._hello: Hello | None = None
        self._why: str | None = None  # set once the worker is lost

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self._process.pid

    async def hello(self) -> Hello:
        """What the worker is and which devices torch sees there; waits until it is up.

        Raises `EngineLost`.
        """
        async with self._turn:
            await self._await_hello()
        assert self._hello is not None
        return self._hello

    async def describe(self, model: str) -> ModelCard:
        return await self._call(DESCRIBE, model, limit_s=float("inf"))

    async def tokenizer_files(self, model: str) -> dict[str, bytes]:
        return await self._call(TOKENIZER_FILES, model, limit_s=float("inf"))

    async def load(self, spec: StageSpec, progress: Callable[[float, str], None] | None = None) -> StageInfo:
        return await self._call(LOAD, spec, limit_s=float("inf"), progress=progress)

    async def step(self, works: Sequence[Work]) -> list[Done]:
        return await self._call(STEP, list(works))

    async def rewind(self, session: str, position: int) -> None:
        await self._call(REWIND, Rewind(session, position))

    async def forget(self, session: str) -> None:
        await self._call(FORGET, session)

    async def stats(self) -> EngineStats:
        return await self._call(STATS, Nothing())

    async def wait_lost(self) -> EngineLost:
        await self._wait_exit()
        if self._turn.locked():  # whoever is in a call reads the worker's own reason first
            with trio.move_on_after(EXIT_S):
                async with self._turn:
                    pass
        self._lose(None)
        return self._lost()

    def kill(self, why: str) -> None:
        """End the process at once; every call from now on raises `EngineLost` with `why`."""
        self._lose(why)

    async def aclose(self) -> None:
        """Let the process end, kill it where it does not, and free what it held."""
        with trio.CancelScope(shield=True):
            if self._why is None:
                self._why = "it was closed"
                with contextlib.suppress(OSError):
                    self._sock.shutdown(socket.SHUT_RDWR)
                with trio.move_on_after(EXIT_S):
                    await self._wait_exit()
            self._process.kill()
            await self._wait_exit()
        _close(self._sock)
        self._stderr.close()

    async def _call(
        self,
        operation: Operation[Req, Res],
        request: Req,
        *,
        limit_s: float | None = None,
        progress: Callable[[float, str], None] | None = None,
    ) -> Res:
        content = operation.request.encode(request)
        async with self._turn:
            await self._await_hello()
            self._number += 1
            number = self._number
            self._outbox += pack(FrameKind.REQUEST, number, content[0], name=operation.name, raws=content[1])
            limit_s = self._options.step_s_max if limit_s is None else limit_s
            name = operation.name.decode()
            with self._killing_after(limit_s, f"it did not answer {name} within {limit_s:g} s"):
                frame = await self._answer(number, progress)
            if frame.kind == FrameKind.ERROR:
                raise self._failure(frame, name)
            try:
                return operation.response.decode(frame.body, frame.raws)
            except RemoteProtocolError as error:
                self._lose(f"its answer to {name} made no sense: {error}")
                raise self._lost() from error

    async def _await_hello(self) -> None:
        if self._why is not None:
            raise self._lost()
        if self._hello is None:
            limit_s = self._options.start_s_max
            with self._killing_after(limit_s, f"it did not start within {limit_s:g} s"):
                frame = await self._answer(0, None)
            try:
                self._hello = HELLO.decode(frame.body)
            except RemoteProtocolError as error:
                self._lose(f"its first words made no sense: {error}")
                raise self._lost() from error

    @contextlib.contextmanager
    def _killing_after(self, limit_s: float, why: str) -> Iterator[None]:
        with trio.move_on_after(limit_s) as scope:
            yield
        if scope.cancelled_caught:
            self._lose(why)
            raise self._lost()

    async def _answer(self, number: int, progress: Callable[[float, str], None] | None) -> Frame:
        """Flush the outbox and read until the answer to `number`. Raises `EngineLost`."""
        try:
            await self._flush()
            while True:
                frame = await self._receive()
                if frame is None:
                    break
                if frame.call == number and frame.kind in (FrameKind.RESPONSE, FrameKind.ERROR):
                    return frame
                if frame.call > number or frame.kind == FrameKind.REQUEST:
                    raise RemoteProtocolError(f"a frame of kind {frame.kind} for call {frame.call}")
                if frame.call == number and progress is not None:
                    news = PROGRESS.decode(frame.body)
                    progress(news.fraction, news.what)
        except RemoteProtocolError as error:
            self._lose(f"it sent garbage: {error}")
        except (OSError, trio.ClosedResourceError):
            pass  # its end of the socket is gone
        if self._why is None:
            with trio.move_on_after(EXIT_S):
                await self._wait_exit()
            self._lose(None)
        raise self._lost()

    async def _flush(self) -> None:
        while self._outbox:
            try:
                sent = self._sock.sendmsg(self._outbox[:GATHER_MAX])
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._sock)
            else:
                self._outbox = advance(self._outbox, sent)

    async def _receive(self) -> Frame | None:
        while (frame := self._receiver.next()) is None:
            try:
                count = self._sock.recv_into(self._receiver.room())
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._sock)
                continue
            if not count:
                return None
            self._receiver.got(count)
        return frame

    def _failure(self, frame: Frame, name: str) -> Exception:
        try:
            failure = FAILURE.decode(frame.body)
        except RemoteProtocolError as error:
            self._lose(f"its failure of {name} made no sense: {error}")
            return self._lost()
        match failure.kind:
            case "unsupported":
                return ModelUnsupported(failure.text)
            case "missing":
                return FileNotFoundError(failure.text)
            case "value":
                return ValueError(failure.text)
            case "order":
                return LocalProtocolError(failure.text)
            case "memory":
                self._lose(f"out of memory in {name}: {failure.text}")
            case _:
                self._lose(f"it failed in {name}: {failure.text}{self._last_words()}")
        return self._lost()

    async def _wait_exit(self) -> None:
        """Park until the process has ended. Any number of tasks may wait."""
        async with self._watch:
            if self._process.poll() is not None:
                return
            if hasattr(os, "pidfd_open"):
                fd = os.pidfd_open(self._process.pid)
                try:
                    await trio.lowlevel.wait_readable(fd)
                finally:
                    os.close(fd)
                self._process.wait()
            else:
                await trio.to_thread.run_sync(self._process.wait, abandon_on_cancel=True)

    def _lose(self, why: str | None) -> None:
        """Note the loss, once; None: by how the process ended."""
        if self._why is not None:
            return
        status = self._process.poll()
        if why is None:
            why = "it closed its socket" if status is None else describe_exit(status)
            why += self._last_words()
        self._why = why
        self._process.kill()
        self._outbox.clear()
        _close(self._sock)

    def _lost(self) -> EngineLost:
        return EngineLost(f"worker process {self.pid} is gone: {self._why}")

    def _last_words(self) -> str:
        fd = self._stderr.fileno()
        begin = max(0, os.fstat(fd).st_size - STDERR_QUOTED_BYTES)
        lines = os.pread(fd, STDERR_QUOTED_BYTES, begin).decode("utf-8", "replace").strip().splitlines()
        return "".join(f"\n    {line}" for line in lines[-STDERR_QUOTED_LINES:])


def start_worker(options: WorkerOptions | None = None) -> WorkerEngine:
    """Start a worker process and return at once: its imports (2-4 s) go on while others work.

    Must be called in the thread that runs trio; the worker dies with that thread. Raises `OSError` when no
    process can be started.
    """
    options = options or WorkerOptions()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.setblocking(False)
    stderr = tempfile.TemporaryFile(prefix="mycel-worker-")  # noqa: SIM115 closed by aclose
    fcntl.fcntl(
        stderr, fcntl.F_SETFL, fcntl.fcntl(stderr, fcntl.F_GETFL) | os.O_APPEND
    )  # it will be cut short
    command = [
        sys.executable, "-I", "-m", "mycel.compute.worker_main",
        str(theirs.fileno()), str(os.getpid()), str(options.memory_bytes_max),
    ]  # fmt: skip
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stderr,
            stderr=stderr,
            pass_fds=(theirs.fileno(),),
            env=scrub(options.environment),
            start_new_session=True,
        )
    except OSError:
        ours.close()
        stderr.close()
        raise
    finally:
        theirs.close()
    return WorkerEngine(process, ours, stderr, options)


def open_stderr() -> IO[bytes]:
    """A file without a name for what a worker prints; appended to, so that it can be cut short meanwhile."""
    file = tempfile.TemporaryFile(prefix="mycel-worker-")  # noqa: SIM115 the engine closes it
    fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) | os.O_APPEND)
    return file


def scrub(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a worker: what of `environment` it may see, and our own settings."""
    return {name: environment[name] for name in PASSED_ON if name in environment} | OWN_ENVIRONMENT


def describe_exit(status: int) -> str:
    """How a process ended, in words, by its return code as subprocess tells it."""
    if status >= 0:
        return f"it exited with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    hint = " (the kernel does so when memory runs out)" if -status == signal.SIGKILL else ""
    return f"it was killed by {name}{hint}"


def _close(sock: socket.socket) -> None:
    """Close a socket that tasks may be waiting on: they get `trio.ClosedResourceError`."""
    if sock.fileno() >= 0:
        trio.lowlevel.notify_closing(sock)
        sock.close()
