"""Certificates and chains: how a peer shows that it belongs to a swarm.

A swarm is everybody who trusts one root key. A **certificate** says: in this swarm, this key has this role
until then. It is signed by the root, or by a delegation key that the root certified (a ticket's). A
**chain** is one or two certificates that end in a peer's own key:

    root -> peer                 a membership certificate, handed out by a node that holds the root key
    root -> ticket -> peer       made by whoever holds the ticket, for its own peer id

A chain is no secret. It is worthless to anybody but the peer it names, because it is only ever accepted on a
connection whose handshake proved possession of that peer's key. Signatures cover the certificate's exact
bytes, in the domain "certificate 1". Everything here is pure: the time comes in, `Refused` or a `Grant`
comes out.

Roles narrow downwards: a ticket for submitters cannot make a member. Validity is judged with a tolerance
for clocks that differ (`Limits.clock_skew_s`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import base58
import msgspec

from mycel.protocol.errors import Refused
from mycel.protocol.identity import SigningKey, in_domain, public_of, verify
from mycel.protocol.limits import DEFAULT_LIMITS
from mycel.protocol.mesh import Access, PeerId

DOMAIN = "certificate 1"
CHAIN_BYTES_MAX = 1024
"""Two certificates with the longest labels take under 600 bytes."""
LABEL_CHARS_MAX = 64

Key = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Signature = Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]
Seconds = Annotated[int, msgspec.Meta(ge=0, le=1 << 48)]

DELEGATE = "delegate"
PEER = "peer"


class Certificate(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a signer says of a key. Times are seconds since 1970, both ends included."""

    kind: Annotated[str, msgspec.Meta(pattern="^(delegate|peer)$")]
    swarm: Key
    """Public half of the root key."""
    subject: Key
    """Public half of the delegation key or of the peer's key."""
    access: Annotated[int, msgspec.Meta(ge=int(Access.SUBMIT), le=int(Access.ADMIN))]
    not_before: Seconds
    not_after: Seconds
    label: Annotated[str, msgspec.Meta(max_length=LABEL_CHARS_MAX)]
    """Whom or what it was made for, in the issuer's words; peers see it."""


class Link(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A certificate's exact bytes and the signature over them."""

    body: Annotated[bytes, msgspec.Meta(max_length=CHAIN_BYTES_MAX)]
    signature: Signature


class Chain(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One or two links, from the root down to the peer."""

    links: Annotated[tuple[Link, ...], msgspec.Meta(min_length=1, max_length=2)]


@dataclass(frozen=True, slots=True)
class Grant:
    """What a valid chain gives its peer."""

    access: Access
    not_before: int
    not_after: int
    label: str
    by_ticket: bool
    """Whether the chain goes through a ticket (and so ends when the ticket does)."""


def sign_certificate(signer: SigningKey, certificate: Certificate) -> Link:
    """Sign `certificate` with the root key or a ticket's delegation key."""
    body = msgspec.msgpack.encode(certificate)
    return Link(body, signer.sign(in_domain(DOMAIN, body)))


def is_signed_by(public: bytes, link: Link) -> bool:
    """Whether the signature over `link`'s certificate is by the key with this public half."""
    return verify(public, in_domain(DOMAIN, link.body), link.signature)


def encode_chain(chain: Chain) -> bytes:
    """The chain's bytes, for the wire and for files."""
    return msgspec.msgpack.encode(chain)


def decode_chain(data: bytes) -> Chain:
    """Parse a chain without judging it.

    Raises `Refused` (malformed) for anything but the exact bytes of `encode_chain`.
    """
    if len(data) > CHAIN_BYTES_MAX:
        raise Refused(
            f"a chain of {len(data)} bytes is too long (at most {CHAIN_BYTES_MAX})", reason="malformed"
        )
    try:
        chain = msgspec.msgpack.decode(data, type=Chain)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refused(f"the chain cannot be read: {error}", reason="malformed") from None
    if encode_chain(chain) != data:
        raise Refused("the chain is not in its one proper encoding", reason="malformed")
    return chain


def read_certificate(link: Link) -> Certificate:
    """The certificate in `link`, its signature not yet judged. Raises `Refused` (malformed)."""
    try:
        certificate = msgspec.msgpack.decode(link.body, type=Certificate)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Refused(f"a certificate cannot be read: {error}", reason="malformed") from None
    if not certificate.label.isprintable():  # it is shown in terminals
        raise Refused("a certificate's label is not printable text", reason="malformed")
    return certificate


def verify_chain(
    chain: Chain, peer: PeerId, root: bytes, now: float, *, skew_s: float = DEFAULT_LIMITS.clock_skew_s
) -> Grant:
    """What `chain` grants to `peer` in the swarm of `root` at the time `now` (seconds since 1970).

    Raises `Refused` with a reason: malformed, wrong_swarm, forged, foreign_chain (made for another peer),
    expired, or not_yet (begins in the future, beyond the clock tolerance).
    """
    certificates = [read_certificate(link) for link in chain.links]
    kinds = [certificate.kind for certificate in certificates]
    if kinds not in ([PEER], [DELEGATE, PEER]):
        raise Refused(f"a chain cannot be made of {' and '.join(kinds)} certificates", reason="malformed")
    signer = root
    for link, certificate in zip(chain.links, certificates, strict=True):
        if certificate.swarm != root:
            raise Refused(
                f"the chain is of swarm {swarm_id(certificate.swarm)}, and this is swarm {swarm_id(root)}; "
                "join by a ticket of this one",
                reason="wrong_swarm",
            )
        if not is_signed_by(signer, link):
            raise Refused("a signature in the chain is not by the key it names", reason="forged")
        signer = certificate.subject
    first, last = certificates[0], certificates[-1]
    if last.access > first.access:
        raise Refused(
            f"the chain claims {Access(last.access).name.lower()} from a ticket for "
            f"{Access(first.access).name.lower()}",
            reason="forged",
        )
    if not _names(last, peer):
        raise Refused("the chain was made for another peer", reason="foreign_chain")
    grant = Grant(
        access=Access(last.access),
        not_before=max(first.not_before, last.not_before),
        not_after=min(first.not_after, last.not_after),
        label=last.label,
        by_ticket=len(certificates) == 2,
    )
    check_time(grant, now, skew_s)
    return grant


def check_time(span: Grant | Certificate, now: float, skew_s: float) -> None:
    """Raise `Refused` (expired, not_yet) unless `now` is in the span, give or take `skew_s`."""
    if now > span.not_after + skew_s:
        late = now - span.not_after
        raise Refused(f"expired {late:.0f} s ago; ask for a new ticket", reason="expired")
    if now < span.not_before - skew_s:
        early = span.not_before - now
        raise Refused(
            f"not valid for another {early:.0f} s; check the clocks of both machines", reason="not_yet"
        )


def certify_peer(signer: SigningKey, swarm: bytes, peer: PeerId, grant: Grant) -> Link:
    """A certificate for `peer` with the rights of `grant`, by the root key or a ticket's delegation key."""
    return sign_certificate(
        signer,
        Certificate(
            kind=PEER,
            swarm=swarm,
            subject=public_of(peer),
            access=int(grant.access),
            not_before=grant.not_before,
            not_after=grant.not_after,
            label=grant.label,
        ),
    )


def swarm_id(root: bytes) -> str:
    """A swarm's name for people: its root public key in base58."""
    return base58.b58encode(root).decode("ascii")


def _names(certificate: Certificate, peer: PeerId) -> bool:
    try:
        return public_of(peer) == certificate.subject
    except ValueError:
        return False
