"""Tickets: one string to paste that lets a machine into a swarm.

A ticket carries a delegation key that the swarm's root certified for a role and a time, and addresses of
peers to begin with. Whoever holds it can certify its own peer id with the delegation key (`Ticket.chain_for`)
and so prove membership; the ticket itself is never sent to anybody. Several machines may use one ticket
until it expires. It is a secret like a password: `describe` says what is in it without giving it away.

The text is "mycel1" and the base58 of

    body      msgpack [link, seed, [multiaddr, ...]]   (link: the root's certificate of the delegation key)
    checksum  first 4 bytes of sha256("mycel1" + body)

Base58 has no look-alike characters, survives double-click selection, and line breaks in it are ignored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import base58
import msgspec
from multiaddr import Multiaddr

from mycel.protocol.chain import (
    DELEGATE,
    LABEL_CHARS_MAX,
    Certificate,
    Chain,
    Grant,
    Link,
    certify_peer,
    check_time,
    is_signed_by,
    read_certificate,
    sign_certificate,
    swarm_id,
)
from mycel.protocol.errors import Refused, UsageProblem
from mycel.protocol.identity import SEED_BYTES, SigningKey
from mycel.protocol.limits import DEFAULT_LIMITS
from mycel.protocol.mesh import Access, PeerId

PREFIX = "mycel1"
TEXT_CHARS_MAX = 8192
"""Base58 is quadratic in length; this bounds what a pasted text can cost."""
BOOTSTRAP_MAX = 16
ADDR_BYTES_MAX = 256
CHECKSUM_BYTES = 4
LIFE_S = 7 * 86400.0
"""How long a ticket lives when nobody says: time to paste it into a few machines."""


class TicketError(UsageProblem):
    """This text is no ticket, or not any more; the message says what to do."""


class _Body(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    link: Link
    seed: Annotated[bytes, msgspec.Meta(min_length=SEED_BYTES, max_length=SEED_BYTES)]
    bootstrap: Annotated[
        tuple[Annotated[bytes, msgspec.Meta(max_length=ADDR_BYTES_MAX)], ...],
        msgspec.Meta(max_length=BOOTSTRAP_MAX),
    ]


@dataclass(frozen=True, slots=True)
class Ticket:
    """A parsed ticket. Its `repr` does not show the delegation seed."""

    link: Link
    certificate: Certificate
    delegation: SigningKey
    bootstrap: tuple[Multiaddr, ...]

    @property
    def root(self) -> bytes:
        """Public half (32 bytes) of the swarm's root key."""
        return self.certificate.swarm

    @property
    def access(self) -> Access:
        """The role it gives."""
        return Access(self.certificate.access)

    def with_bootstrap(self, addrs: Sequence[Multiaddr]) -> Ticket:
        """The same ticket with these addresses of peers to begin with (each ending in /p2p/ID).

        Raises `TicketError` when they are too many or too long.
        """
        if len(addrs) > BOOTSTRAP_MAX or any(len(addr.to_bytes()) > ADDR_BYTES_MAX for addr in addrs):
            raise TicketError(f"a ticket holds at most {BOOTSTRAP_MAX} addresses of {ADDR_BYTES_MAX} bytes")
        return replace(self, bootstrap=tuple(addrs))

    def text(self) -> str:
        """The string to paste: treat it as a password."""
        addrs = tuple(addr.to_bytes() for addr in self.bootstrap)
        body = msgspec.msgpack.encode(_Body(self.link, self.delegation.seed, addrs))
        return PREFIX + base58.b58encode(body + _checksum(body)).decode("ascii")

    def chain_for(self, peer: PeerId) -> Chain:
        """The chain root -> ticket -> `peer`, with all of the ticket's rights until it expires."""
        own = self.certificate
        grant = Grant(self.access, own.not_before, own.not_after, own.label, by_ticket=True)
        return Chain((self.link, certify_peer(self.delegation, self.root, peer, grant)))


def issue_ticket(
    root: SigningKey,
    *,
    access: Access,
    now: float,
    entropy: Callable[[int], bytes],
    life_s: float = LIFE_S,
    label: str = "",
) -> Ticket:
    """A fresh ticket of the swarm of `root`, valid from `now` (seconds since 1970) for `life_s` seconds.

    Raises `TicketError` for a role, life or label that no ticket can have.
    """
    if access is Access.STRANGER:
        raise TicketError("a ticket gives one of the roles submit, member, admin")
    if not 0 < life_s < 1 << 40:
        raise TicketError(f"a ticket cannot live for {life_s} s")
    if len(label) > LABEL_CHARS_MAX or not label.isprintable():
        raise TicketError(f"a label is printable text of at most {LABEL_CHARS_MAX} characters")
    delegation = SigningKey(entropy(SEED_BYTES))
    certificate = Certificate(
        kind=DELEGATE,
        swarm=root.public,
        subject=delegation.public,
        access=int(access),
        not_before=int(now),
        not_after=int(now + life_s),
        label=label,
    )
    return Ticket(sign_certificate(root, certificate), certificate, delegation, ())


def parse_ticket(text: str) -> Ticket:
    """Read a pasted ticket; spaces and line breaks in it do not matter. Its expiry is not judged here.

    Raises `TicketError` when it is none, was mistyped or cut off, or is not what a root key signed.
    """
    compact = "".join(text.split())
    if not compact.startswith(PREFIX):
        raise TicketError(f'a ticket begins with "{PREFIX}"; copy the whole line that `mycel ticket` printed')
    if len(compact) > TEXT_CHARS_MAX:
        raise TicketError(f"{len(compact)} characters are too many for a ticket (at most {TEXT_CHARS_MAX})")
    try:
        raw = base58.b58decode(compact[len(PREFIX) :])
    except ValueError:
        raise TicketError(
            "a ticket has letters and digits only, without 0, O, I and l; copy it again"
        ) from None
    body, checksum = raw[:-CHECKSUM_BYTES], raw[-CHECKSUM_BYTES:]
    if _checksum(body) != checksum:
        raise TicketError("the ticket was mistyped or cut off (its checksum does not fit); copy it again")
    try:
        fields = msgspec.msgpack.decode(body, type=_Body)
        certificate = read_certificate(fields.link)
        bootstrap = tuple(_read_addr(addr) for addr in fields.bootstrap)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, Refused) as error:
        raise TicketError(f"this is not a ticket that mycel made: {error}") from None
    ticket = Ticket(fields.link, certificate, SigningKey(fields.seed), bootstrap)
    _check_genuine(ticket)
    return ticket


def check_ticket(ticket: Ticket, now: float, *, skew_s: float = DEFAULT_LIMITS.clock_skew_s) -> None:
    """Raise `Refused` (expired, not_yet) unless the ticket can be used at `now` (seconds since 1970)."""
    check_time(ticket.certificate, now, skew_s)


def describe(ticket: Ticket) -> dict[str, str | int | list[str]]:
    """What a ticket says, without its secret: for `mycel ticket --inspect` and logs."""
    return {
        "swarm": swarm_id(ticket.root),
        "access": ticket.access.name.lower(),
        "label": ticket.certificate.label,
        "not_before": ticket.certificate.not_before,
        "not_after": ticket.certificate.not_after,
        "delegation": base58.b58encode(ticket.delegation.public).decode("ascii"),
        "bootstrap": [str(addr) for addr in ticket.bootstrap],
    }


def _checksum(body: bytes) -> bytes:
    return hashlib.sha256(PREFIX.encode("ascii") + body).digest()[:CHECKSUM_BYTES]


def _read_addr(raw: bytes) -> Multiaddr:
    try:
        addr = Multiaddr(raw)
        str(addr)  # parses every part; a malformed one shows only here
    except Exception as error:  # boundary: multiaddr's codecs raise a dozen unrelated classes
        raise TicketError(f"a bootstrap address in it cannot be read: {error}") from None
    return addr


def _check_genuine(ticket: Ticket) -> None:
    """The certificate is a delegation, by its swarm's root, of the very key that the ticket carries."""
    certificate = ticket.certificate
    if certificate.kind != DELEGATE or certificate.subject != ticket.delegation.public:
        raise TicketError("the ticket's key and certificate do not belong together; ask for a new one")
    if not is_signed_by(ticket.root, ticket.link):
        raise TicketError("the ticket was not signed by its swarm's root key; ask for a new one")
