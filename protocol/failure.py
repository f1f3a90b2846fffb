"""How a call's failure travels: [cause, kind, text], and which error each side makes of it."""

from __future__ import annotations

from typing import Literal

import msgspec

from mycel.protocol.errors import (
    ConnectionLost,
    DeadlineExceeded,
    MycelError,
    Refused,
    RemoteError,
    StreamReset,
)
from mycel.protocol.mesh import PeerId
from mycel.protocol.message import Codec, MessageError

BAD_REQUEST = "BadRequest"


class Failure(msgspec.Struct, frozen=True, array_like=True):
    """Why a call has no answer. `kind` is a class name for "error", a reason in one word for "refused"."""

    cause: Literal["error", "refused", "deadline"]
    kind: str
    text: str

    def to_error(self) -> MycelError:
        """What the caller raises."""
        if self.cause == "refused":
            return Refused(self.text, reason=self.kind)
        if self.cause == "deadline":
            return DeadlineExceeded(self.text)
        return RemoteError(self.kind, self.text)


_CODEC = Codec(Failure)


def encode_failure(failure: Failure) -> bytes:
    """The body of an error frame."""
    return _CODEC.encode(failure)[0]


def decode_failure(body: bytes | bytearray | memoryview) -> MycelError:
    """The caller's error for the body of an error frame. Raises `MessageError`."""
    return _CODEC.decode(body).to_error()


def failure_of(error: Exception, text_max: int) -> Failure:
    """What a handler's exception tells its caller. A `Refused` stays one; a group of one is that one."""
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    text = str(error)[:text_max]
    if isinstance(error, Refused):
        return Failure("refused", error.reason[:text_max], text)
    return Failure("error", type(error).__name__[:text_max], text)


def bad_request(method: str, error: MessageError, text_max: int) -> Failure:
    """The request is not of the type that the method takes."""
    return Failure("error", BAD_REQUEST, f"{method}: {error}"[:text_max])


def deadline_failure(method: str) -> Failure:
    """The handler was cancelled at the caller's deadline."""
    return Failure("deadline", "deadline", f"{method}: the handler did not answer in time and was cancelled")


def lost(error: StreamReset, peer: PeerId, method: str) -> ConnectionLost:
    """A reset stream is, for the call on it, the loss of its connection: nobody knows how far it came."""
    return ConnectionLost(f"{peer} reset the stream of {method}: {error}", reason="reset")
