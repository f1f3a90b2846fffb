"""What happens on a fresh connection before its peer is up: membership, and identify beside it.

The dialer proves over a stream of the membership protocol and learns what the peer is; the listener answers.
Whoever does not speak that protocol is a stranger and stays one. A refusal disconnects, and both sides know
the reason: the one that refuses sends it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

import trio
from multiaddr import Multiaddr

from mycel.node import introduce
from mycel.node.link import Link
from mycel.node.peering import Peering
from mycel.node.roster import Roster
from mycel.protocol import identify
from mycel.protocol.errors import (
    ConnectionLost,
    DeadlineExceeded,
    MycelError,
    Refused,
    RemoteProtocolError,
    StreamReset,
)
from mycel.protocol.identify import Identity, PeerRecord
from mycel.protocol.keys import OwnKey
from mycel.protocol.limits import Limits
from mycel.protocol.mesh import Access, PeerId, Stream, StreamHandler

_log = logging.getLogger(__name__)

AGENT = "mycel/0.1.0"


class Membership(Protocol):
    """How two nodes prove to each other that they are of one swarm (`mycel.protocol.membership`)."""

    @property
    def protocol(self) -> str:
        """The protocol id of the exchange."""

    async def prove(self, stream: Stream) -> Access:
        """The dialing side. Returns what the peer is to this node; raises `Refused`."""

    async def answer(self, stream: Stream) -> Access:
        """The side that was dialed."""


class Node(Protocol):
    """What settling needs of the host."""

    limits: Limits

    @property
    def told_addrs(self) -> Sequence[Multiaddr]: ...

    @property
    def protocols(self) -> Sequence[str]: ...

    def serve_stream(self, protocol: str, handler: StreamHandler, *, access: Access) -> None: ...

    def wall(self) -> float: ...

    def on_stream_refused(self, cause: str) -> None: ...


class Settling:
    """The exchanges of one host with its fresh peers."""

    def __init__(
        self,
        node: Node,
        key: OwnKey,
        roster: Roster,
        membership: Membership | None,
        default_access: Access,
    ) -> None:
        """Registers ping, identify and the membership exchange with `node`."""
        self._node = node
        self._key = key
        self._roster = roster
        self._membership = membership
        self._default_access = default_access
        self._seq = 0
        self._record = b""
        self._record_addrs: tuple[Multiaddr, ...] | None = None
        self.stale = False
        """Whether peers know less of this node than there is to know."""
        self.observed: dict[PeerId, Multiaddr] = {}
        """Where each connected peer says it sees this node."""
        stranger = Access.STRANGER
        node.serve_stream(introduce.FAREWELL, _nothing, access=stranger)
        node.serve_stream(introduce.PING, introduce.answer_ping, access=stranger)
        node.serve_stream(identify.PROTOCOL, self._answer_identify, access=stranger)
        node.serve_stream(identify.PUSH, self._take_push, access=stranger)
        if membership is not None:
            node.serve_stream(membership.protocol, self._answer_membership, access=stranger)

    async def run(self, link: Link, peering: Peering) -> None:
        """Settle the peer behind a fresh link; ends when both exchanges did."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._identify, link, peering)
            if self._membership is None:
                self._roster.settle(peering, self._default_access)
            elif not peering.up:
                nursery.start_soon(self._settle, self._membership, link, peering)

    def on_tick(self) -> None:
        """Tell every peer (identify push) where this node's protocols or addresses changed."""
        if not self.stale:
            return
        self.stale = False
        for peer in self._roster.peers:
            peering = self._roster.get(peer)
            if peering is not None and peering.identity and identify.PUSH in peering.identity.protocols:
                peering.primary.start_soon(self._push, peering.primary)

    # Membership

    async def _settle(self, membership: Membership, link: Link, peering: Peering) -> None:
        seconds = self._node.limits.membership_s
        if not link.dialer:
            # The peer proves; where it never does, it is a stranger.
            with trio.move_on_after(seconds):
                while not peering.up and not self._is_foreign(peering):
                    await self._roster.changed.park()
            self._roster.settle(peering, Access.STRANGER)
            return
        try:
            with trio.fail_after(seconds):
                stream = await link.open_stream(membership.protocol)
                access = await membership.prove(stream)
        except trio.TooSlowError:
            self._refuse(peering, DeadlineExceeded(f"membership not settled within {seconds:g} s"))
        except Refused as error:
            if error.reason == "protocol":
                self._roster.settle(peering, Access.STRANGER)
            else:
                self._refuse(peering, error)
        except ConnectionLost:
            return
        except MycelError as error:
            self._refuse(peering, error)
        else:
            self._roster.settle(peering, access)

    async def _answer_membership(self, stream: Stream) -> None:
        assert self._membership is not None
        peering = self._roster.get(stream.peer)
        if peering is None:
            return
        try:
            access = await self._membership.answer(stream)
        except (Refused, RemoteProtocolError, DeadlineExceeded) as error:
            self._refuse(peering, error)
        except StreamReset:
            return
        else:
            self._roster.settle(peering, access)

    def _refuse(self, peering: Peering, error: MycelError) -> None:
        self._node.on_stream_refused("membership")
        _log.warning("%s refused: %s", peering.peer, error)
        for link in list(peering.links):
            link.failure = error
            link.end("refused", str(error))

    def _is_foreign(self, peering: Peering) -> bool:
        said = peering.identity
        return (
            said is not None
            and self._membership is not None
            and self._membership.protocol not in said.protocols
        )

    # Identify

    async def _identify(self, link: Link, peering: Peering) -> None:
        assert link.key is not None
        try:
            with trio.move_on_after(introduce.IDENTIFY_S):
                stream = await link.open_stream(identify.PROTOCOL)
                self._learn(peering, await introduce.read_identity(stream, link.key))
        except RemoteProtocolError as error:
            link.end("protocol", str(error))
        except MycelError as error:
            _log.debug("%s was not identified: %s", peering.peer, error)

    def _learn(self, peering: Peering, said: Identity) -> None:
        if said.observed is not None:
            self.observed[peering.peer] = said.observed
        self._roster.identified(peering, said)
        self._roster.changed.unpark_all()

    async def _answer_identify(self, stream: Stream) -> None:
        await stream.send(self._message(stream.peer))
        await stream.send_eof()

    async def _take_push(self, stream: Stream) -> None:
        peering = self._roster.get(stream.peer)
        if peering is not None and (key := peering.primary.key) is not None:
            self._learn(peering, await introduce.read_identity(stream, key))

    async def _push(self, link: Link) -> None:
        try:
            stream = await link.open_stream(identify.PUSH)
            await stream.send(self._message(link.peer))
            await stream.aclose()
        except MycelError as error:
            _log.debug("%s took no identify push: %s", link.peer, error)

    def _message(self, peer: PeerId) -> bytes:
        peering = self._roster.get(peer)
        addrs = tuple(self._node.told_addrs)
        if addrs != self._record_addrs:
            self._record_addrs = addrs
            self._seq = max(self._seq + 1, int(self._node.wall() * 1000))
            record = PeerRecord(self._key.peer_id, self._seq, addrs)
            self._record = identify.seal_record(self._key, record)
        said = Identity(
            agent=AGENT,
            protocols=tuple(self._node.protocols),
            listen_addrs=addrs,
            observed=peering.primary.remote if peering is not None else None,
        )
        return identify.write(self._key.public, said, self._record)


async def _nothing(stream: Stream) -> None:
    """Farewells are read by the link itself."""
