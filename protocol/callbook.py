"""Which methods this node serves, how each is run, and who may call it."""

from __future__ import annotations

import enum
import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

from mycel.protocol.errors import LocalProtocolError
from mycel.protocol.failure import Failure
from mycel.protocol.mesh import Access, Mesh, PeerId
from mycel.protocol.message import Codec
from mycel.protocol.method import Kind, Method


class Mode(enum.Enum):
    """Where a handler runs."""

    INLINE = "inline"
    TASK = "task"
    THREAD = "thread"


_CODECS: dict[Any, Codec[Any]] = {}


def codec_of(message: Any) -> Codec[Any]:
    """The codec of a message type, made once. Raises `LocalProtocolError` for what cannot be a message."""
    codec = _CODECS.get(message)
    if codec is None:
        codec = _CODECS[message] = Codec(message)
    return codec


class Served:
    """A method with its handler."""

    __slots__ = ("access", "calls", "handler", "method", "mode", "name", "request", "response")

    def __init__(self, method: Method[Any, Any], handler: Callable[..., Any], mode: Mode) -> None:
        self.method = method
        self.name = method.name
        self.access = method.access
        self.handler = handler
        self.mode = mode
        self.calls = 0
        self.request = codec_of(method.request)
        self.response = codec_of(method.response)


class CallBook:
    """Served methods by name."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._served: dict[bytes, Served] = {}
        self.refused: Counter[str] = Counter()
        """Calls that were not let in, by reason."""

    def add(self, method: Method[Any, Any], handler: Callable[..., Any], inline: bool) -> None:
        """Serve `method` from now on. Raises `LocalProtocolError` for a handler that does not fit it."""
        name = method.name.encode()
        if name in self._served:
            raise LocalProtocolError(f"{method.name} is served already; give each method a name of its own")
        if method.access is Access.STRANGER:
            raise LocalProtocolError(
                f"{method.name}: strangers cannot make calls; serve a stream protocol of its own for them"
            )
        self._served[name] = Served(method, handler, plan_mode(method, handler, inline))

    def remove(self, method: Method[Any, Any]) -> None:
        """Serve `method` no more. Nothing happens where it is not served."""
        self._served.pop(method.name.encode(), None)

    def find(self, name: bytes, peer: PeerId) -> tuple[Served, Access] | Failure:
        """What `peer` gets when it calls `name`: the method and the access it has, or why not."""
        served = self._served.get(name)
        if served is None:
            text = f"no method {name.decode(errors='replace')!r} here; is the other side of another version?"
            return Failure("refused", "unknown-method", text)
        if peer == self._mesh.peer_id:
            return served, Access.ADMIN
        info = self._mesh.peers.get(peer)
        access = Access.STRANGER if info is None else info.access
        if access < served.access:
            need, have = served.access.name.lower(), access.name.lower()
            text = f"{served.name} needs the role {need}, you have {have}; ask for a ticket with it"
            return Failure("refused", "access", text)
        return served, access

    def count(self, found: tuple[Served, Access] | Failure) -> None:
        """What `find` said is what the caller gets."""
        if isinstance(found, Failure):
            self.refused[found.kind] += 1
        else:
            found[0].calls += 1

    @property
    def calls(self) -> dict[str, int]:
        """Calls that were let in, by method."""
        return {served.name: served.calls for served in self._served.values()}


def plan_mode(method: Method[Any, Any], handler: Callable[..., Any], inline: bool) -> Mode:
    """Where `handler` runs. Raises `LocalProtocolError` when it is of another shape than the method."""
    call = handler if inspect.isroutine(handler) else getattr(handler, "func", type(handler).__call__)
    is_async = inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(call)
    is_generator = inspect.isasyncgenfunction(handler) or inspect.isasyncgenfunction(call)
    if method.kind in (Kind.SERVER_STREAM, Kind.BIDI):
        if not is_generator or inline:
            raise LocalProtocolError(
                f"{method.name}: a {method.kind.value} handler is an async generator function"
            )
        return Mode.TASK
    if is_generator or (method.kind is Kind.CLIENT_STREAM and not is_async):
        raise LocalProtocolError(f"{method.name}: a {method.kind.value} handler is an async def with return")
    if inline:
        if is_async:
            raise LocalProtocolError(f"{method.name}: an inline handler is a plain def")
        return Mode.INLINE
    return Mode.TASK if is_async else Mode.THREAD
