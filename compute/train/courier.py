"""Carrying one order to one client, and its update back; and many pieces of one row over a call.

A row is sent in pieces from where it lies, and received into one buffer made for it. The sender waits where
the receiver is behind: an update that nobody has room for yet waits in the network's window and with its
client, so a coordinator that takes in four at a time holds four, however many are ready.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import trio

from mycel.compute.train.orders import ROUND, Down, Order, Report, Up
from mycel.protocol.call_single import CallStream
from mycel.protocol.errors import DeadlineExceeded, MycelError, Refused
from mycel.protocol.limits_train import DEFAULT_FEDERATED_LIMITS, FederatedLimits
from mycel.protocol.mesh import PeerId
from mycel.protocol.rpc import Rpc
from mycel.protocol.tensor import Tensor


@dataclass(frozen=True, slots=True)
class Delivery:
    """What a client sent up."""

    report: Report
    update: memoryview | None
    """A row of float32 as bytes, of the layout's length; unchecked otherwise."""


class Courier:
    """Takes orders to clients. `uploads` bounds how many updates are received at once (None: no bound)."""

    def __init__(
        self,
        rpc: Rpc,
        limits: FederatedLimits = DEFAULT_FEDERATED_LIMITS,
        uploads: trio.CapacityLimiter | None = None,
    ) -> None:
        self._rpc = rpc
        self._limits = limits
        self._uploads = uploads

    async def carry(self, client: PeerId, order: Order, model: memoryview) -> Delivery:
        """Order work from `client` and wait for what comes of it.

        Raises `Refused` (the client's own reasons; "replayed" and "report" for an answer to something else,
        "wrong-size" for an update of another length), `ConnectionLost`, `DeadlineExceeded`, `RemoteError`.
        """
        async with self._rpc.stream(client, ROUND, deadline_s=order.limit_s) as call:
            report = await self._exchange(call, order, model)
            if report is None:
                raise Refused(f"{client} sent a piece where its report belongs", reason="report")
            report.check(order, client, self._limits)
            update = None
            if report.has_update:
                async with self._uploads or nullcontext():
                    update = await self._receive_row(call, order.layout.nbytes)
            await self._expect_end(call)
            return Delivery(report, update)
        raise AssertionError("unreachable: the call returns or raises")

    async def _exchange(self, call: CallStream[Down, Up], order: Order, model: memoryview) -> Report | None:
        """Send order and model, and receive the report, whichever is first done: a client that did this
        work before answers at once."""
        failure: MycelError | None = None
        report = None

        async def send() -> None:
            nonlocal failure
            try:
                await self._send_down(call, order, model)
            except DeadlineExceeded as error:
                failure = error
                nursery.cancel_scope.cancel()
            except MycelError:
                return  # the reader hears why

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            try:
                report = (await self._receive(call)).report
            except MycelError as error:
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        return report

    async def _send_down(self, call: CallStream[Down, Up], order: Order, model: memoryview) -> None:
        await call.send(Down(order=order))
        for piece in pieces_of(model, self._limits.chunk_bytes):
            with stalling(self._limits.stall_s, "took no piece of the model"):
                await call.send(Down(piece=piece))
        await call.end()

    async def _receive(self, call: CallStream[Down, Up]) -> Up:
        try:
            return await call.receive()
        except trio.EndOfChannel:
            raise Refused("the client ended its answer early", reason="wrong-size") from None

    async def _expect_end(self, call: CallStream[Down, Up]) -> None:
        with stalling(self._limits.stall_s, "did not end its answer"):
            async for _ in call:
                raise Refused("the client sent more than its update", reason="wrong-size")

    async def _receive_row(self, call: CallStream[Down, Up], size: int) -> memoryview:
        async def next_piece() -> Tensor | None:
            return (await self._receive(call)).piece

        return await receive_row(next_piece, size, self._limits.stall_s)


async def receive_row(
    next_piece: Callable[[], Awaitable[Tensor | None]], size: int, stall_s: float, digest: str = ""
) -> memoryview:
    """A row of `size` bytes, piece by piece, into one buffer.

    Raises `Refused`: "wrong-size" for a piece too large or no piece, "corrupt" where it is not `digest`'s;
    `DeadlineExceeded` for a piece that does not come.
    """
    row = memoryview(bytearray(size))
    found, at = hashlib.sha256(), 0
    while at < size:
        with stalling(stall_s, "sent nothing"):
            piece = await next_piece()
        data = memoryview(piece.data).cast("B") if piece is not None else memoryview(b"")
        if not 0 < data.nbytes <= size - at:
            raise Refused(
                f"a piece of {data.nbytes} bytes where {size - at} are to come", reason="wrong-size"
            )
        row[at : at + data.nbytes] = data
        if digest:
            found.update(data)
        at += data.nbytes
    if digest and found.hexdigest() != digest:
        raise Refused("the model that came is not the one that the order names", reason="corrupt")
    return row


def pieces_of(row: memoryview, chunk_bytes: int) -> list[Tensor]:
    """A row as tensors of bytes, views of it."""
    parts = [row[at : at + chunk_bytes] for at in range(0, row.nbytes, chunk_bytes)]
    return [Tensor("uint8", (part.nbytes,), part) for part in parts]


@contextmanager
def stalling(seconds: float, what: str) -> Iterator[None]:
    """`with stalling(s, "what was not done"):` raises `DeadlineExceeded` when the block takes longer."""
    with trio.move_on_after(seconds) as scope:
        yield
    if scope.cancelled_caught:
        raise DeadlineExceeded(f"{what} for {seconds:g} s")


async def piece_of(items: AsyncIterator[Down]) -> Tensor | None:
    """The next item's piece. Raises `Refused` ("wrong-size") where there is none."""
    async for item in items:
        return item.piece
    raise Refused("the coordinator ended its order early", reason="wrong-size")
