"""Serving one daemon from within its worker process: requests in, torch's answers out, one after the other.

An error that leaves no doubt about what is in memory (no such model, a span that makes no sense) is an answer
like any other. All else (memory ran out, something unforeseen in a step) is reported and ends the process:
its daemon starts another.
"""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import TypeVar

import psutil
import torch

from mycel.compute.engine import EngineStats, ModelUnsupported, StageInfo, StageSpec
from mycel.compute.model.card import read_card
from mycel.compute.model.devices import see_devices
from mycel.compute.model.load import load_stage
from mycel.compute.model.memory import is_out_of_memory
from mycel.compute.model.stage import Stage
from mycel.compute.model.tokenizer_files import read_tokenizer_files
from mycel.compute.parent import Connection
from mycel.compute.pipe import (
    DESCRIBE,
    FAILURE,
    FORGET,
    HELLO,
    LOAD,
    PROGRESS,
    REWIND,
    STATS,
    STEP,
    TOKENIZER_FILES,
    Failure,
    Hello,
    Nothing,
    Operation,
    Progress,
    Rewind,
)
from mycel.protocol.errors import MycelError
from mycel.protocol.frame import Frame, FrameKind
from mycel.protocol.mesh import Buffer

Req = TypeVar("Req")
Res = TypeVar("Res")

EXIT_CRASH = 81
EXIT_MEMORY = 82
PROGRESS_EVERY_S = 0.1


class Doubtful(Exception):
    """The request failed in a way after which this process must not go on."""

    def __init__(self, failure: Failure, status: int) -> None:
        self.failure = failure
        self.status = status


class Worker:
    """At most one stage, and what can be asked of it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stage: Stage | None = None
        self.number = 0
        self._serves: dict[bytes, Callable[[Frame], tuple[bytes, list[Buffer]]]] = {}
        self._serve(DESCRIBE, read_card)
        self._serve(TOKENIZER_FILES, read_tokenizer_files)
        self._serve(LOAD, self._load)
        self._serve(STEP, lambda works: self._loaded.step(works), doubtful=True)
        self._serve(REWIND, self._rewind)
        self._serve(FORGET, self._forget)
        self._serve(STATS, self._stats)

    def answer(self, request: Frame) -> None:
        """Serve one request and send its answer. Raises `Doubtful` when the process should end."""
        self.number = request.call
        try:
            serve = self._serves[request.name]
            content = serve(request)
        except _Refusal as refusal:
            self._connection.send(FrameKind.ERROR, request.call, FAILURE.encode(refusal.failure))
        else:
            self._connection.send(FrameKind.RESPONSE, request.call, content)

    def _serve(
        self, operation: Operation[Req, Res], handler: Callable[[Req], Res], *, doubtful: bool = False
    ) -> None:
        def serve(frame: Frame) -> tuple[bytes, list[Buffer]]:
            request = operation.request.decode(frame.body, frame.raws)
            try:
                return operation.response.encode(handler(request))
            except Exception as error:  # boundary: what torch and transformers raise is sorted here
                raise _sort(error, doubtful) from error

        self._serves[operation.name] = serve

    @property
    def _loaded(self) -> Stage:
        if self._stage is None:
            raise _Refusal(Failure("order", "no stage is loaded; call load first"))
        return self._stage

    def _load(self, spec: StageSpec) -> StageInfo:
        last = -PROGRESS_EVERY_S

        def report(fraction: float, what: str) -> None:
            nonlocal last
            now = time.monotonic()
            if fraction >= 1 or now - last >= PROGRESS_EVERY_S:
                last = now
                progress = PROGRESS.encode(Progress(fraction, what))
                self._connection.send(FrameKind.ITEM, self.number, progress)

        if self._stage is not None:  # its memory first
            self._stage.close()
            self._stage = None
        try:
            self._stage = load_stage(spec, report)
        except ValueError as error:  # a span, dtype or device that is not to be had
            raise ModelUnsupported(str(error)) from error
        return self._stage.info

    def _rewind(self, request: Rewind) -> Nothing:
        self._loaded.rewind(request.session, request.position)
        return Nothing()

    def _forget(self, session: str) -> Nothing:
        if self._stage is not None:
            self._stage.forget(session)
        return Nothing()

    def _stats(self, _: Nothing) -> EngineStats:
        if self._stage is None:
            return EngineStats(0, 0, 0, 0, 0, 0.0)
        return self._stage.stats()


class _Refusal(Exception):
    """The request failed; the process is as good as before."""

    def __init__(self, failure: Failure) -> None:
        self.failure = failure


def _sort(error: Exception, doubtful: bool) -> Exception:
    """What an error in a handler means for the process: a `_Refusal`, or `Doubtful`."""
    if isinstance(error, _Refusal):
        return error
    text = str(error) or type(error).__name__
    if isinstance(error, ModelUnsupported):
        return _Refusal(Failure("unsupported", text))
    if isinstance(error, FileNotFoundError):
        return _Refusal(Failure("missing", text))
    if is_out_of_memory(error):
        return Doubtful(Failure("memory", text.splitlines()[0]), EXIT_MEMORY)
    traceback.print_exception(error)
    described = f"{type(error).__name__}: {text}"
    if doubtful:
        return Doubtful(Failure("crash", described), EXIT_CRASH)
    return _Refusal(Failure("value" if isinstance(error, ValueError) else "unsupported", described))


def serve(sock: socket.socket, tidy: Callable[[], None]) -> int:
    """Say hello and serve until the daemon closes its end, doing `tidy` before each request.

    Returns the exit status.
    """
    connection = Connection(sock)
    start_s = time.time() - psutil.Process().create_time()
    hello = Hello(os.getpid(), str(torch.__version__), see_devices(), start_s)
    worker = Worker(connection)
    try:
        connection.send(FrameKind.RESPONSE, 0, HELLO.encode(hello))
        while (request := connection.receive()) is not None:
            tidy()
            worker.answer(request)
    except Doubtful as doubt:
        connection.send(FrameKind.ERROR, worker.number, FAILURE.encode(doubt.failure))
        return doubt.status
    except (BrokenPipeError, ConnectionResetError):
        return 0  # the daemon is gone
    except MycelError as error:
        print(f"the daemon's request made no sense: {error}", file=sys.stderr)
        return EXIT_CRASH
    return 0
