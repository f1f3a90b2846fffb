"""Inbound streams between their first byte and their handler: which protocol, and may this peer have it.

The protocol is agreed in the connection's reader, without a task. A lazy dialer sent its first data along, so
the agreement rides back on the first answer; one that waits gets it at once. A stream whose protocol
strangers may not use waits until the peer's membership is settled, at most as long as that may take, and
is reset where the right is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mycel.node.stream import HostStream
from mycel.protocol import multistream
from mycel.protocol.channel import Channel
from mycel.protocol.errors import MycelError, StreamReset
from mycel.protocol.mesh import Access, StreamHandler, StreamTaker

if TYPE_CHECKING:
    from mycel.node.link import Link


@dataclass(frozen=True, slots=True)
class Service:
    """Who serves a protocol, and to whom: a handler in a task of its own, or a taker in the reader."""

    handler: StreamHandler | None
    access: Access
    taker: StreamTaker | None = None


class Arrival:
    """The sink of an inbound stream until its protocol is agreed."""

    __slots__ = ("_channel", "_link", "_listener", "_services", "deadline")

    def __init__(
        self, link: Link, channel: Channel, services: Mapping[str, Service], deadline: float
    ) -> None:
        """`deadline` (trio time) is when the peer must have named a protocol that is served."""
        self._link = link
        self._channel = channel
        self._services = services
        self._listener: multistream.Listener | None = None
        self.deadline = deadline
        channel.sink = self

    def __call__(self, data: memoryview | None, error: MycelError | None) -> None:
        """See `mycel.protocol.channel.Sink`."""
        channel = self._channel
        if data is None:
            if error is None:
                channel.reset(StreamReset("the peer ended the stream before naming a protocol"))
            self._link.arrivals.pop(channel.id, None)
            return
        rest: memoryview | bytes
        protocol = multistream.recognise(data) if self._listener is None else None
        if protocol is not None and protocol in self._services:
            answer = multistream.proposal(protocol)
            rest = data[len(answer) :]
            channel.prefix = answer
        else:
            listener = self._listener
            if listener is None:
                speaks, limit = self._services.__contains__, self._link.limits.multistream_message
                listener = self._listener = multistream.Listener(speaks, limit)
            answer, rest = listener.receive(data)
            channel.prefix += answer
            protocol = listener.protocol
            if listener.given_up is not None:
                self._link.arrivals.pop(channel.id, None)
                channel.forget()
                return
        channel.credit(len(data) - len(rest))
        if protocol is None or not rest:
            channel.flush_prefix()
        if protocol is not None:
            self._link.arrivals.pop(channel.id, None)
            stream = HostStream(self._link, channel, self._link.peer, protocol)
            self._link.on_stream(stream, self._services[protocol], rest)

    def expire(self, seconds: float) -> None:
        """The peer took too long."""
        self._channel.reset(StreamReset(f"no protocol named within {seconds:g} s"))


class Gate:
    """Streams of one peer that wait for its membership."""

    __slots__ = ("_waiting", "access")

    def __init__(self) -> None:
        self.access: Access | None = None
        self._waiting: list[tuple[Link, HostStream, Service]] = []

    def admit(self, link: Link, stream: HostStream, service: Service) -> None:
        """Start the handler now or when the peer's role is known, or turn the stream away."""
        if service.access == Access.STRANGER:
            _give(link, stream, service)
        elif self.access is None:
            self._waiting.append((link, stream, service))
        elif self.access >= service.access:
            _give(link, stream, service)
        else:
            link.turn_away(stream)

    def settle(self, access: Access) -> None:
        """The peer's role is known from now on."""
        self.access = access
        waiting, self._waiting = self._waiting, []
        for link, stream, service in waiting:
            self.admit(link, stream, service)


def _give(link: Link, stream: HostStream, service: Service) -> None:
    if service.handler is not None:
        link.start_handler(stream, service.handler)
    elif service.taker is not None and link.lost is None:
        try:
            service.taker(stream)
        except Exception as error:  # boundary: a taker's failure ends its own stream only
            link.on_handler_error(stream.protocol, error)
            stream.reset()
