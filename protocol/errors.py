"""Errors, by whom they blame.

A caller can act on the class alone: `LocalProtocolError` says our own code erred (a bug to fix),
`RemoteProtocolError` says the peer sent what the protocol forbids (drop it), `ConnectionLost` says the
world broke (try elsewhere), `DeadlineExceeded` says time ran out, `Refused` says somebody decided no,
and `RemoteError` carries the failure of a handler at the other end. Foreign exceptions are mapped to
these once, at the seam where they appear.
"""

from __future__ import annotations


class MycelError(Exception):
    """Root of every error that Mycel raises on purpose. Its text says what to do next."""


class UsageProblem(MycelError):
    """What the user gave cannot be used as it is: a setting, an argument, a pasted ticket."""


class LocalProtocolError(MycelError):
    """Our own code asked for something the protocol forbids: a bug on this side."""


class RemoteProtocolError(MycelError):
    """The peer sent bytes the protocol forbids. The connection is dropped and this is the reason."""


class AddressError(MycelError):
    """A multiaddr that this node cannot dial or listen on."""


class DialError(MycelError):
    """No connection could be made; the text says what was tried and how each try ended."""


class PipeBroken(MycelError):
    """A pipe's other end reset it, or the network did. Nothing more can be sent or received."""


class ConnectionLost(MycelError):
    """A peer's connection ended while it was needed.

    `reason` is one word for machines: "reset", "silent", "closed", "left" (a node stopped in order),
    "protocol", "refused", "superseded".
    """

    def __init__(self, text: str, *, reason: str = "closed") -> None:
        super().__init__(text)
        self.reason = reason


class StreamReset(MycelError):
    """The peer (or this side) reset one stream; its connection goes on."""


class StreamClosed(LocalProtocolError):
    """This side used a stream that it had closed itself."""


class DeadlineExceeded(MycelError):
    """A step did not end within its deadline; the text names the step and the seconds it had."""


class LimitExceeded(MycelError):
    """A bound of `mycel.protocol.limits` was reached; the text names the bound."""


class Refused(MycelError):
    """Somebody decided no: the wrong swarm, an expired ticket, a missing right. `reason` is one word."""

    def __init__(self, text: str, *, reason: str) -> None:
        super().__init__(text)
        self.reason = reason


class RemoteError(MycelError):
    """A handler at another peer failed. `kind` is the error's class name there, the text is its message."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind
        self.text = text


def single_failure(error: BaseException) -> MycelError | None:
    """What to tell the user of `error`, a group or not: its first part. None where any part is a bug."""
    if isinstance(error, BaseExceptionGroup):
        parts = [single_failure(part) for part in error.exceptions]
        return None if None in parts else parts[0]
    return error if isinstance(error, MycelError) else None
