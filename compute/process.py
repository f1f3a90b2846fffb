"""A worker's process as its daemon holds it: started with little, watched, quoted when it ends.

The process is a child with one end of a socket pair, a few harmless environment variables, and no keys. What
it prints goes to a file without a name, kept short by the worker itself, of which the last lines are quoted
when it dies.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import IO

import trio

PASSED_ON = (
    "PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TMPDIR", "XDG_CACHE_HOME", "LD_LIBRARY_PATH",
    "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "HIP_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES",
    "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT",
    "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE",
)  # fmt: skip
"""Variables a worker may see of those it is offered: where things are, never secrets."""
OWN_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "passive",  # idle OpenMP threads sleep instead of burning what other workers need,
    "GOMP_SPINCOUNT": "5000",  # ...0.1 ms after the last product: within a step the next one is near
    "KMP_BLOCKTIME": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONHASHSEED": "0",
}
STDERR_QUOTED_BYTES = 2000
STDERR_QUOTED_LINES = 6


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
    serve: str = "mycel.compute.worker_serve"
    """The module whose `serve` the process runs."""
    threads: int = 0
    """Threads that array libraries may use; 0: as they like."""


class WorkerProcess:
    """One child process, our end of its socket, and the file it prints to."""

    def __init__(self, process: subprocess.Popen[bytes], sock: socket.socket, stderr: IO[bytes]) -> None:
        self._process = process
        self.sock = sock
        self._stderr = stderr
        self._watch = trio.Lock()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def status(self) -> int | None:
        """How it ended, as subprocess tells it; None while it runs."""
        return self._process.poll()

    def kill(self) -> None:
        """End it at once; nothing happens where it has ended."""
        self._process.kill()

    async def wait_exit(self) -> None:
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

    def last_words(self) -> str:
        """The last lines it printed, each on a line of its own."""
        fd = self._stderr.fileno()
        begin = max(0, os.fstat(fd).st_size - STDERR_QUOTED_BYTES)
        lines = os.pread(fd, STDERR_QUOTED_BYTES, begin).decode("utf-8", "replace").strip().splitlines()
        return "".join(f"\n    {line}" for line in lines[-STDERR_QUOTED_LINES:])

    def close_socket(self) -> None:
        """Close our end; tasks that wait on it get `trio.ClosedResourceError`."""
        if self.sock.fileno() >= 0:
            trio.lowlevel.notify_closing(self.sock)
            self.sock.close()

    def close(self) -> None:
        """Free what is held of a process that has ended."""
        self.close_socket()
        self._stderr.close()


def start_process(options: WorkerOptions) -> WorkerProcess:
    """Start `mycel.compute.worker_main`; it dies with the thread that calls this. Raises `OSError`."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.setblocking(False)
    stderr = open_stderr()
    command = [
        sys.executable, "-I", "-m", "mycel.compute.worker_main",
        str(theirs.fileno()), str(os.getpid()), str(options.memory_bytes_max), options.serve,
    ]  # fmt: skip
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stderr,
            stderr=stderr,
            pass_fds=(theirs.fileno(),),
            env=scrub(options.environment) | _threads(options.threads),
            start_new_session=True,
        )
    except OSError:
        ours.close()
        stderr.close()
        raise
    finally:
        theirs.close()
    return WorkerProcess(process, ours, stderr)


def open_stderr() -> IO[bytes]:
    """A file without a name for what a worker prints; appended to, so that it can be cut short meanwhile."""
    file = tempfile.TemporaryFile(prefix="mycel-worker-")  # noqa: SIM115 the engine closes it
    fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) | os.O_APPEND)
    return file


def scrub(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a worker: what of `environment` it may see, and our own settings."""
    return {name: environment[name] for name in PASSED_ON if name in environment} | OWN_ENVIRONMENT


def _threads(count: int) -> dict[str, str]:
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
    return {name: str(count) for name in names} if count else {}


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
