"""The worker process: torch, one thread of it, at the far end of a socket pair.

`python -I -m mycel.compute.worker_main FD PARENT MEMORY SERVE` serves one request after the other from the
inherited socket FD until its end, as the module SERVE does, and dies when the process PARENT does, from its
first moment on: that is why torch is imported only after `die_with`. It holds no keys, reads no
configuration, and knows of the world only what a request says. What it prints goes to standard error, which
the daemon quotes when it dies.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import os
import resource
import signal
import socket
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h
STDERR_BYTES_MAX = 1 << 20
"""What the process may have printed before its standard error begins anew."""


def die_with(parent: int) -> None:
    """Have the kernel kill this process when `parent` dies, and exit if it has already."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("500")  # when memory runs out, rather the worker than its daemon
    if os.getppid() != parent:
        sys.exit("the daemon is gone")


def limit_memory(limit: int) -> None:
    """Let this process's private memory (RLIMIT_DATA: heap and anonymous maps) grow to `limit` bytes."""
    if limit:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def trim_stderr() -> None:
    """Begin the file behind standard error anew when it has grown large."""
    if os.fstat(2).st_size > STDERR_BYTES_MAX:
        os.ftruncate(2, 0)


def main(arguments: list[str]) -> int:
    """Serve until the daemon closes its end. Returns the exit status."""
    fd, parent, memory = (int(argument) for argument in arguments[:3])
    faulthandler.enable()
    die_with(parent)
    serve = importlib.import_module(arguments[3]).serve  # the daemon's own choice, never a peer's
    limit_memory(memory)
    status: int = serve(socket.socket(fileno=fd), trim_stderr)
    return status


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(status)  # taking torch apart in order takes seconds and helps nobody
