"""multistream-select 1.0: how two sides agree on a protocol (libp2p specs/connections).

A message is a length, a text and a newline. Each side first says `/multistream/1.0.0`; then the dialer names
a protocol and the listener echoes it or says `na`. A dialer that wants just one protocol need not wait for
the echo: it sends both messages and its first data together (lazy negotiation), so a fresh stream costs
no round trip. Both roles are machines here: bytes in, and what is left behind the agreement out. Bytes that
were proposed before need none: `proposal` and `recognise` are one look into a table.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from mycel.protocol import varint
from mycel.protocol.errors import LimitExceeded, Refused, RemoteProtocolError
from mycel.protocol.limits import DEFAULT_LIMITS

HEADER = "/multistream/1.0.0"
NA = "na"
LS = "ls"
PROPOSALS_MAX = 16
"""Protocols a dialer may propose on one stream before the listener gives up on it."""


def message(text: str) -> bytes:
    """One multistream message. Raises `LimitExceeded` for a protocol name that no peer would accept."""
    raw = text.encode() + b"\n"
    if len(raw) > DEFAULT_LIMITS.multistream_message:
        raise LimitExceeded(f"protocol name of {len(raw)} bytes; {DEFAULT_LIMITS.multistream_message} fit")
    return varint.prefixed(raw)


_HEADER_MESSAGE = message(HEADER)
_NAME_AT = len(_HEADER_MESSAGE) + 1
_KNOWN_MAX = 1024
_known: dict[bytes, str] = {}
"""Proposals that this process made or agreed to, and the protocol of each."""


@functools.lru_cache(maxsize=_KNOWN_MAX)
def proposal(protocol: str) -> bytes:
    """What a lazy dialer sends ahead of its data, and what a listener that agrees sends ahead of its own."""
    proposed = _HEADER_MESSAGE + message(protocol)
    if len(_known) < _KNOWN_MAX:
        _known[proposed] = protocol
    return proposed


def recognise(data: memoryview | bytes) -> str | None:
    """The protocol that `data` begins by proposing, where `proposal` was asked for it before; None where it
    takes a `Listener` to tell."""
    if len(data) < _NAME_AT:
        return None
    return _known.get(bytes(data[: _NAME_AT + data[_NAME_AT - 1]]))


class _Messages:
    """Cuts arriving bytes into messages; holds back at most one incomplete message."""

    __slots__ = ("_held", "_limit")

    def __init__(self, limit: int) -> None:
        self._held = bytearray()
        self._limit = limit

    def feed(self, data: memoryview | bytes) -> None:
        self._held += data

    def next(self) -> str | None:
        cut = varint.split_prefixed(self._held, self._limit)
        if cut is None:
            return None
        raw, end = cut
        del self._held[:end]
        if raw[-1:] != b"\n":
            raise RemoteProtocolError("a multistream message does not end in a newline")
        try:
            return raw[:-1].decode()
        except UnicodeDecodeError:
            raise RemoteProtocolError("a multistream message is not UTF-8") from None

    def rest(self) -> bytes:
        rest = bytes(self._held)
        self._held.clear()
        return rest


class Dialer:
    """The side that named `protocol` already (see `proposal`) and now reads the answer."""

    __slots__ = ("_messages", "_protocol", "_seen_header")

    def __init__(self, protocol: str, limit: int = DEFAULT_LIMITS.multistream_message) -> None:
        self._protocol = protocol
        self._messages = _Messages(limit)
        self._seen_header = False

    def receive(self, data: memoryview | bytes) -> memoryview | bytes | None:
        """The bytes behind the agreement (maybe none), or None while the answer is incomplete.

        Raises `Refused` (reason "protocol") for `na`, `RemoteProtocolError` for anything else.
        """
        messages = self._messages
        messages.feed(data)
        while (text := messages.next()) is not None:
            if not self._seen_header:
                if text != HEADER:
                    raise RemoteProtocolError(f"expected {HEADER}, got {text[:80]!r}")
                self._seen_header = True
            elif text == self._protocol:
                return messages.rest()
            elif text == NA:
                raise Refused(f"the peer does not speak {self._protocol}", reason="protocol")
            else:
                raise RemoteProtocolError(f"proposed {self._protocol}, got {text[:80]!r}")
        return None


class Listener:
    """The side that is asked. `speaks` says which protocols it agrees to."""

    __slots__ = ("_messages", "_proposals", "_said_header", "_speaks", "given_up", "protocol")

    def __init__(
        self, speaks: Callable[[str], bool], limit: int = DEFAULT_LIMITS.multistream_message
    ) -> None:
        self._speaks = speaks
        self._messages = _Messages(limit)
        self._proposals = 0
        self._said_header = False
        self.protocol: str | None = None
        self.given_up: str | None = None
        """Why nothing will be agreed on: what follows a proposal that was declined is no message. Such is a
        lazy dialer's data, and nobody's fault."""

    def receive(self, data: memoryview | bytes) -> tuple[bytes, memoryview | bytes]:
        """What to answer, and the bytes behind the agreement once `protocol` is set (maybe none).

        Raises `RemoteProtocolError` where the peer does not speak multistream-select at all.
        """
        messages = self._messages
        messages.feed(data)
        answer = bytearray()
        try:
            self._converse(messages, answer)
        except RemoteProtocolError as error:
            if not self._proposals:
                raise
            self.given_up = str(error)
            messages.rest()
        return bytes(answer), messages.rest() if self.protocol is not None else b""

    def _converse(self, messages: _Messages, answer: bytearray) -> None:
        while self.protocol is None and (text := messages.next()) is not None:
            if not self._said_header:
                if text != HEADER:
                    raise RemoteProtocolError(f"expected {HEADER}, got {text[:80]!r}")
                self._said_header = True
                answer += _HEADER_MESSAGE
                continue
            self._proposals += 1
            if self._proposals > PROPOSALS_MAX:
                raise RemoteProtocolError(f"more than {PROPOSALS_MAX} protocols proposed on one stream")
            if text != LS and self._speaks(text):
                self.protocol = text
                answer += proposal(text)[len(_HEADER_MESSAGE) :]
            else:
                answer += message(NA)
