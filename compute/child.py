"""The daemon's side of a child process that is asked one thing after the other.

A call writes its frame and reads the answer in the caller's own task: no task of ours stands between, so a
step costs two system calls and two wake-ups more than torch's own time. Calls take turns (first come, first
served).

A call that is cancelled loses nothing: what was not yet written stays in the outbox and goes out before the
next request, what was half read stays in the receiver, and the answer nobody waits for is dropped by its
number. The child still does what it was asked, so a cancelled call may have run.

The process may die at any time, for any reason. Whoever is in a call then, and whoever calls later, gets
`EngineLost` with the exit code or signal and the last lines it printed; `wait_lost` hears it at once also
when nobody calls. The same holds for a child that speaks nonsense or does not answer: it is killed.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import TypeVar

import trio

from mycel.compute.engine import EngineLost, ModelUnsupported
from mycel.compute.pipe import (
    FAILURE,
    GATHER_MAX,
    HELLO,
    PROGRESS,
    FrameReceiver,
    Hello,
    Operation,
    advance,
)
from mycel.compute.process import WorkerOptions, WorkerProcess, describe_exit
from mycel.protocol.errors import LocalProtocolError, RemoteProtocolError
from mycel.protocol.frame import Frame, FrameKind, pack
from mycel.protocol.mesh import Buffer

Req = TypeVar("Req")
Res = TypeVar("Res")

EXIT_S = 2.0
"""How long a worker that was told to go, or whose socket ended, may take before it is killed."""


class Child:
    """A worker process and what is said to it; `aclose` ends the process."""

    def __init__(self, process: WorkerProcess, options: WorkerOptions) -> None:
        self._process = process
        self._options = options
        self._receiver = FrameReceiver()
        self._outbox: list[Buffer] = []
        self._number = 0
        self._turn = trio.Lock()
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

    async def wait_lost(self) -> EngineLost:
        await self._process.wait_exit()
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
                    self._process.sock.shutdown(socket.SHUT_RDWR)
                with trio.move_on_after(EXIT_S):
                    await self._process.wait_exit()
            self._process.kill()
            await self._process.wait_exit()
        self._process.close()

    async def ask(
        self,
        operation: Operation[Req, Res],
        request: Req,
        *,
        limit_s: float | None = None,
        progress: Callable[[float, str], None] | None = None,
    ) -> Res:
        """Ask one thing and wait for its answer, for at most `limit_s` (None: `WorkerOptions.step_s_max`).

        Raises `EngineLost`, and what the child refused with: `ModelUnsupported`, `FileNotFoundError`,
        `ValueError`, `LocalProtocolError`.
        """
        content = operation.request.encode(request)
        if self._turn.locked():
            await self._turn.acquire()
        else:
            self._turn.acquire_nowait()  # without a pass of trio's loop, which would be on every token's way
        try:
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
        finally:
            self._turn.release()

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
                await self._process.wait_exit()
            self._lose(None)
        raise self._lost()

    async def _flush(self) -> None:
        while self._outbox:
            try:
                sent = self._process.sock.sendmsg(self._outbox[:GATHER_MAX])
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._process.sock)
            else:
                self._outbox = advance(self._outbox, sent)

    async def _receive(self) -> Frame | None:
        while (frame := self._receiver.next()) is None:
            try:
                count = self._process.sock.recv_into(self._receiver.room())
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self._process.sock)
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
                self._lose(f"it failed in {name}: {failure.text}{self._process.last_words()}")
        return self._lost()

    def _lose(self, why: str | None) -> None:
        """Note the loss, once; None: by how the process ended."""
        if self._why is not None:
            return
        status = self._process.status
        if why is None:
            why = "it closed its socket" if status is None else describe_exit(status)
            why += self._process.last_words()
        self._why = why
        self._process.kill()
        self._outbox.clear()
        self._process.close_socket()

    def _lost(self) -> EngineLost:
        return EngineLost(f"worker process {self.pid} is gone: {self._why}")
