"""What can be called: a method's name, types and rights, and what its handler is told of a call.

A method is declared once, in the room that owns it, and shared by both sides:

    ECHO = Method("demo.echo", Ping, Pong, access=Access.MEMBER, idempotent=True)

Handlers by kind (each gets the `Call` first):

    UNARY          async def h(call, request) -> response      runs as a task
                   def h(call, request) -> response            runs in a worker thread: it may block
                   ... served with inline=True: plain def, answered in the connection's reader;
                   it must return at once (no I/O, under about 100 us)
    SERVER_STREAM  async def h(call, request): yield response ...
    CLIENT_STREAM  async def h(call, items) -> response        items: AsyncIterator of requests
    BIDI           async def h(call, items): yield response ...
"""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import msgspec
import trio

from mycel.protocol.errors import LocalProtocolError
from mycel.protocol.mesh import Access, PeerId

Req = TypeVar("Req")
Res = TypeVar("Res")

NAME_BYTES_MAX = 255
"""The frame carries a method's name behind one length byte."""


class Kind(enum.Enum):
    """How many messages go each way."""

    UNARY = "unary"
    SERVER_STREAM = "server_stream"
    CLIENT_STREAM = "client_stream"
    BIDI = "bidi"


@dataclass(frozen=True, slots=True)
class Method(Generic[Req, Res]):
    """One thing that a peer can be asked to do. `request` and `response` are the types of each message.

    Types are whatever msgspec can check: Structs (preferred), builtins, containers of them; `Tensor` fields
    anywhere in a Struct travel as raw bytes. For no message use `NoneType`.

    `idempotent`: asking twice does no harm, so a call that lost its connection is asked once more when the
    peer is back. All others run at most once.
    """

    name: str
    request: type[Req]
    response: type[Res]
    access: Access = Access.MEMBER
    idempotent: bool = False
    kind: Kind = Kind.UNARY

    def __post_init__(self) -> None:
        if not 0 < len(self.name.encode()) <= NAME_BYTES_MAX:
            raise LocalProtocolError(f"a method's name has 1 to {NAME_BYTES_MAX} bytes, not {self.name!r}")
        if self.idempotent and self.kind is not Kind.UNARY:
            raise LocalProtocolError(
                f"{self.name}: only unary calls can be asked again, not {self.kind.value}"
            )


class Call(msgspec.Struct, frozen=True):
    """What a handler is told of the call it serves."""

    peer: PeerId
    """Who asks; this node's own id for a local call."""
    access: Access
    """What that peer may do here."""
    method: str
    deadline: float
    """Trio time at which the handler is cancelled; math.inf for a stream without one."""

    @property
    def remaining_s(self) -> float:
        """Seconds left. Only from trio's thread; a worker thread compares `deadline` itself."""
        return self.deadline - trio.current_time()


Handler = (
    Callable[[Call, Req], Awaitable[Res]]
    | Callable[[Call, Req], Res]
    | Callable[[Call, Req], AsyncIterator[Res]]
    | Callable[[Call, AsyncIterator[Req]], Awaitable[Res]]
    | Callable[[Call, AsyncIterator[Req]], AsyncIterator[Res]]
)
