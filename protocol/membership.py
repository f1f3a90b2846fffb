"""The membership exchange: two peers show each other that they belong to one swarm.

It runs once per connection, on a stream of `/mycel/member/1`, before anything beyond the strangers' list is
served. The connection's handshake has already proved who the other peer is (`stream.peer`); here its chain
(mycel.protocol.chain) must name that very peer. The side that opened the connection calls `prove`, the other
`answer`:

    prove                           answer
    Show(chain)            ->       judges it
                           <-       Show(chain), Settled(certificate | nil)      or Refusal
    judges it
    Settled(certificate | nil) ->                                                or Refusal

A stranger learns nothing: the answering side shows its chain only to a peer whose chain was good. A side
that refuses says why, and both raise the same `Refused`. Messages are msgpack behind a 4-byte big-endian
length, bounded by `Limits.membership_bytes`; the whole exchange has `Limits.membership_s`.

A chain through a ticket ends with the ticket. So a node that holds the root key puts a certificate signed by
the root itself into its `Settled` for a peer whose chain ends within half a year: that is anybody who came by
a ticket of usual life, and later whoever's certificate has lived half its own. The peer keeps it and needs
the ticket no more. Peers on the root holder's `revoked` list are refused by it and never renewed.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Container
from dataclasses import dataclass, field, replace
from typing import Annotated, NoReturn, TypeVar

import msgspec
import trio

from mycel.protocol.chain import (
    CHAIN_BYTES_MAX,
    Chain,
    Grant,
    certify_peer,
    decode_chain,
    encode_chain,
    read_certificate,
    verify_chain,
)
from mycel.protocol.errors import (
    ConnectionLost,
    DeadlineExceeded,
    LocalProtocolError,
    Refused,
    RemoteProtocolError,
    StreamReset,
)
from mycel.protocol.identity import SigningKey
from mycel.protocol.limits import DEFAULT_LIMITS, Limits
from mycel.protocol.mesh import Access, PeerId, Stream

PROTOCOL = "/mycel/member/1"
REASONS = ("malformed", "wrong_swarm", "forged", "foreign_chain", "expired", "not_yet", "revoked")
"""Words a refusal may carry; what else arrives is read as "refused"."""
REFUSAL_CHARS_MAX = 512
LINGER_S = 1.0
"""How long a refusing side waits for the other to have read why, before the caller hangs up."""

_ChainBytes = Annotated[bytes, msgspec.Meta(max_length=CHAIN_BYTES_MAX)]


class Show(msgspec.Struct, frozen=True, tag="show"):
    """My chain."""

    chain: _ChainBytes


class Settled(msgspec.Struct, frozen=True, tag="settled"):
    """Your chain is good; here may be a better one for you."""

    certificate: _ChainBytes | None = None


class Refusal(msgspec.Struct, frozen=True, tag="refusal"):
    """I do not accept you, and why: one word for machines, a sentence for people."""

    reason: Annotated[str, msgspec.Meta(max_length=32)]
    text: Annotated[str, msgspec.Meta(max_length=REFUSAL_CHARS_MAX)]


_T = TypeVar("_T", Show, Settled)
_DECODER = msgspec.msgpack.Decoder(Show | Settled | Refusal)


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a node brings into the exchange: whose swarm, and how it belongs to it."""

    peer: PeerId
    root: bytes
    """Public half (32 bytes) of the swarm's root key."""
    chain: Chain
    signer: SigningKey | None = field(default=None, repr=False)
    """The root key itself, on the node that founded the swarm."""


def found_swarm(
    peer: PeerId, root: SigningKey, now: float, *, limits: Limits = DEFAULT_LIMITS
) -> Credentials:
    """Credentials of the node that holds the root key: an admin by its own signature."""
    grant = Grant(
        Access.ADMIN, _start(now, limits), int(now + limits.certificate_s), "founder", by_ticket=False
    )
    chain = Chain((certify_peer(root, root.public, peer, grant),))
    return Credentials(peer, root.public, chain, root)


class Membership:
    """One node's side of every membership exchange.

    `wall` gives the calendar time (seconds since 1970). `on_certificate` is called with this node's new
    chain when a root holder handed one over; it should keep it. `revoked` holds peers that are not let in
    whatever they show.
    """

    protocol = PROTOCOL

    def __init__(
        self,
        credentials: Credentials,
        wall: Callable[[], float],
        *,
        limits: Limits = DEFAULT_LIMITS,
        on_certificate: Callable[[Chain], None] | None = None,
        revoked: Collection[PeerId] = (),
    ) -> None:
        """Raises `LocalProtocolError` when `credentials.signer` is not the swarm's root key."""
        if credentials.signer is not None and credentials.signer.public != credentials.root:
            raise LocalProtocolError("the signer of these credentials is not the swarm's root key")
        self._credentials = credentials
        self._wall = wall
        self._limits = limits
        self._on_certificate = on_certificate
        self._revoked = revoked
        self._ends: dict[PeerId, int] = {}  # when the chains end that peers have shown

    @property
    def credentials(self) -> Credentials:
        """What this node shows now: a root holder's certificate may have replaced the first chain."""
        return self._credentials

    def expired(self, connected: Container[PeerId]) -> list[PeerId]:
        """Of the peers connected those whose chain has ended since they showed it; each is told of once."""
        over = self._wall() - self._limits.clock_skew_s
        ended = [peer for peer, end in self._ends.items() if end < over]
        for peer in ended:
            del self._ends[peer]
        return [peer for peer in ended if peer in connected]

    def own_grant(self) -> Grant:
        """What this node's own chain gives it. Raises `Refused` as its peers would."""
        own = self._credentials
        return verify_chain(own.chain, own.peer, own.root, self._wall(), skew_s=self._limits.clock_skew_s)

    def judge(self, peer: PeerId, chain: bytes) -> Grant:
        """What a chain in its encoding gives `peer` now; raises `Refused` with its reason.

        The peer need not be here: what stands in for the connection that proves who it is (its signature over
        a document, say) is the caller's to check.
        """
        if peer in self._revoked:
            raise Refused(f"{peer} is on the list of revoked peers", reason="revoked")
        own = self._credentials
        return verify_chain(
            decode_chain(chain), peer, own.root, self._wall(), skew_s=self._limits.clock_skew_s
        )

    async def prove(self, stream: Stream) -> Access:
        """The connecting side: show first. Returns the other peer's role; closes the stream.

        Raises `Refused` (either side said no), `RemoteProtocolError` (not this protocol), `DeadlineExceeded`,
        `StreamReset`, `ConnectionLost`.
        """
        return await self._within_deadline(stream, self._prove)

    async def answer(self, stream: Stream) -> Access:
        """The connected-to side: be shown first. Returns and raises as `prove`."""
        return await self._within_deadline(stream, self._answer)

    async def _prove(self, exchange: _Exchange) -> Access:
        await exchange.send(self._show())
        shown = await exchange.receive(Show)
        settled = await exchange.receive(Settled)
        grant = await self._judge(exchange, shown)
        self._adopt(settled)
        await exchange.send(self._settle(exchange.stream.peer, grant))
        return grant.access

    async def _answer(self, exchange: _Exchange) -> Access:
        grant = await self._judge(exchange, await exchange.receive(Show))
        await exchange.send(self._show(), self._settle(exchange.stream.peer, grant))
        self._adopt(await exchange.receive(Settled))
        return grant.access

    async def _within_deadline(
        self, stream: Stream, side: Callable[[_Exchange], Awaitable[Access]]
    ) -> Access:
        deadline_s = self._limits.membership_s
        try:
            with trio.fail_after(deadline_s):
                access = await side(_Exchange(stream, self._limits))
                await stream.aclose()
                return access
        except trio.TooSlowError:
            stream.reset()
            raise DeadlineExceeded(
                f"{stream.peer} did not settle its membership within {deadline_s:g} s"
            ) from None
        except BaseException:  # why: a cancelled exchange resets its stream too; raised again
            stream.reset()
            raise

    def _show(self) -> Show:
        """Our chain; a root holder signs itself a fresh one before the old one runs out."""
        own = self._credentials
        ends = read_certificate(own.chain.links[-1]).not_after
        if own.signer is not None and ends - self._wall() < self._limits.certificate_s / 2:
            own = found_swarm(own.peer, own.signer, self._wall(), limits=self._limits)
            self._credentials = own
        return Show(encode_chain(own.chain))

    async def _judge(self, exchange: _Exchange, shown: Show) -> Grant:
        """The other peer's grant; when there is none, it is told why before `Refused` is raised."""
        peer = exchange.stream.peer
        try:
            grant = self.judge(peer, shown.chain)
        except Refused as refused:
            await exchange.refuse(refused)
        self._ends[peer] = grant.not_after
        return grant

    def _settle(self, peer: PeerId, grant: Grant) -> Settled:
        """Accept `peer`, with a certificate by the root where this node may sign one and it is due."""
        root = self._credentials.signer
        if root is None or not needs_certificate(grant, self._wall(), self._limits):
            return Settled()
        now = self._wall()
        longer = replace(
            grant, not_before=_start(now, self._limits), not_after=int(now + self._limits.certificate_s)
        )
        self._ends[peer] = longer.not_after
        return Settled(encode_chain(Chain((certify_peer(root, root.public, peer, longer),))))

    def _adopt(self, settled: Settled) -> None:
        """Take the certificate in `settled` for our own chain if it is better than the one we have."""
        if settled.certificate is None:
            return
        own = self._credentials
        try:
            chain = decode_chain(settled.certificate)
            new = verify_chain(chain, own.peer, own.root, self._wall(), skew_s=self._limits.clock_skew_s)
        except Refused as refused:
            raise RemoteProtocolError(
                f"the peer handed over a certificate that is not ours: {refused}"
            ) from None
        try:
            old = self.own_grant()
        except Refused:
            old = None
        if old is not None and (new.access < old.access or new.not_after <= old.not_after):
            return
        self._credentials = replace(own, chain=chain)
        if self._on_certificate is not None:
            self._on_certificate(chain)


def needs_certificate(grant: Grant, now: float, limits: Limits) -> bool:
    """Whether a root holder should hand this peer one: what it has ends before half of a fresh one's life."""
    return grant.not_after - now < limits.certificate_s / 2


def _start(now: float, limits: Limits) -> int:
    return max(0, int(now - limits.clock_skew_s))


class _Exchange:
    """The messages of one exchange on its stream."""

    def __init__(self, stream: Stream, limits: Limits) -> None:
        self.stream = stream
        self._bytes_max = limits.membership_bytes

    async def send(self, *messages: Show | Settled | Refusal) -> None:
        """Send `messages` in one piece."""
        bodies = [msgspec.msgpack.encode(message) for message in messages]
        await self.stream.send(b"".join(len(body).to_bytes(4, "big") + body for body in bodies))

    async def receive(self, kind: type[_T]) -> _T:
        """The next message, which must be of `kind`.

        Raises `Refused` when a refusal came instead, `RemoteProtocolError` for anything else.
        """
        size = int.from_bytes(await self.stream.receive_exactly(4), "big")
        if size > self._bytes_max:
            raise RemoteProtocolError(f"a membership message of {size} bytes (at most {self._bytes_max})")
        try:
            message = _DECODER.decode(await self.stream.receive_exactly(size))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise RemoteProtocolError(f"a membership message that cannot be read: {error}") from None
        if isinstance(message, Refusal):
            reason = message.reason if message.reason in REASONS else "refused"
            raise Refused(f"{self.stream.peer} refuses this node: {printable(message.text)}", reason=reason)
        if not isinstance(message, kind):
            raise RemoteProtocolError(
                f"{type(message).__name__} came where {kind.__name__} is due in the membership exchange"
            )
        return message

    async def refuse(self, refused: Refused) -> NoReturn:
        """Tell the other side why, give it a moment to read that, and raise `refused`."""
        try:
            await self.send(Refusal(refused.reason, str(refused)[:REFUSAL_CHARS_MAX]))
            await self.stream.send_eof()
            with trio.move_on_after(LINGER_S):
                while await self.stream.receive_some(self._bytes_max):
                    pass
        except (StreamReset, ConnectionLost):
            pass  # it hung up first; our verdict stands
        raise refused


def printable(text: str) -> str:
    """`text` from the wire, fit for a terminal or a log line."""
    return "".join(char if char.isprintable() else "?" for char in text)
