"""Serving one daemon from within its trainer process: applications, one request after the other.

What an application raises is an answer like any other, with its last lines: the process is as good as before.
Running out of memory ends it; its daemon starts another.
"""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import psutil

from mycel.compute.parent import Connection
from mycel.compute.pipe import FAILURE, HELLO, Failure, Hello, Nothing, Operation
from mycel.compute.train.trade import OPEN, START, WORK, Source
from mycel.compute.train.workshop import Workshop
from mycel.protocol.errors import MycelError
from mycel.protocol.frame import Frame, FrameKind

Req = TypeVar("Req")
Res = TypeVar("Res")

EXIT_NONSENSE = 81
EXIT_MEMORY = 82


def serve(sock: socket.socket, tidy: Callable[[], None]) -> int:
    """Say hello and serve until the daemon closes its end, doing `tidy` before each request.

    Returns the exit status.
    """
    connection = Connection(sock)
    workshop = Workshop()

    def open_app(source: Source) -> Nothing:
        workshop.open(source)
        return Nothing()

    does: dict[bytes, Callable[[Frame], tuple[bytes, list[Any]]]] = {
        OPEN.name: _through(OPEN, open_app),
        START.name: _through(START, workshop.start),
        WORK.name: _through(WORK, workshop.work),
    }
    start_s = time.time() - psutil.Process().create_time()
    try:
        connection.send(FrameKind.RESPONSE, 0, HELLO.encode(Hello(os.getpid(), "", (), start_s)))
        while (request := connection.receive()) is not None:
            tidy()
            try:
                connection.send(FrameKind.RESPONSE, request.call, does[request.name](request))
            except _Failed as failed:
                connection.send(FrameKind.ERROR, request.call, FAILURE.encode(failed.failure))
                if failed.failure.kind == "memory":
                    return EXIT_MEMORY
    except (BrokenPipeError, ConnectionResetError):
        return 0  # the daemon is gone
    except MycelError as error:
        print(f"the daemon's request made no sense: {error}", file=sys.stderr)
        return EXIT_NONSENSE
    return 0


class _Failed(Exception):
    """A request failed."""

    def __init__(self, failure: Failure) -> None:
        self.failure = failure


def _through(
    operation: Operation[Req, Res], handler: Callable[[Req], Res]
) -> Callable[[Frame], tuple[bytes, list[Any]]]:
    def do(frame: Frame) -> tuple[bytes, list[Any]]:
        request = operation.request.decode(frame.body, frame.raws)
        try:
            return operation.response.encode(handler(request))
        except MycelError as error:
            raise _Failed(Failure("value", str(error))) from error
        except MemoryError as error:
            raise _Failed(Failure("memory", str(error) or "no memory left")) from error
        except Exception as error:  # boundary: applications are others' code and raise what they like
            if "out of memory" in str(error):
                raise _Failed(Failure("memory", str(error).splitlines()[0])) from error
            traceback.print_exception(error)
            at = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{os.path.basename(at.filename)}:{at.lineno}"
            raise _Failed(Failure("value", f"{type(error).__name__}: {error} ({where})")) from error

    return do
