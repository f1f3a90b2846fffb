"""Records: small values that only their author can write and anybody can check and pass on.

A record's name is `/mycel/AUTHOR/NAME`, AUTHOR being the author's peer id. So whoever holds a record knows
whose signature it needs: a record in another's name cannot be made, and one by another author has another
key. The value that travels in a libp2p record is a msgpack array

    [1, sequence, expires, value, signature]

`expires` in milliseconds since 1970. A value too large for that is a block (`mycel.dht.kad.large`): then 2
stands first, and the value says which block. What is signed is a domain, the name and the first four, each
behind its length, so that a signature made here is worth nothing elsewhere. Of two records of one name the
higher sequence is newer; the author who signs the same value anew keeps the sequence and moves the expiry.

Pure: the calendar and the check of a signature come in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from mycel.dht.kad.key import bytes_of_peer
from mycel.protocol import varint
from mycel.protocol.errors import Refused
from mycel.protocol.limits import KadLimits
from mycel.protocol.mesh import PeerId

DOMAIN = b"mycel-record"
BLOCK_DOMAIN = b"mycel-record-block"
"""What signatures begin with where the value names a block, so that neither passes for the other."""
NAMESPACE = b"/mycel/"
PLAIN, BLOCK = 1, 2
SEQUENCE_MAX = (1 << 63) - 1

Sign = Callable[[bytes], bytes]
Verify = Callable[[PeerId, bytes, bytes], bool]


class _Sealed(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    version: int
    sequence: int
    expires_ms: int
    value: bytes
    signature: bytes


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Sealed)


@dataclass(frozen=True, slots=True)
class Record:
    """A checked record. `raw` is what travels."""

    name: bytes
    author: PeerId
    sequence: int
    expires_ms: int
    value: bytes
    raw: bytes
    names_block: bool = False
    """Whether `value` says which block holds what the author states."""

    @property
    def order(self) -> tuple[int, int, bytes]:
        """Newer is greater. Two that an author signed with one sequence have one order for everybody."""
        return self.sequence, self.expires_ms, self.raw

    @property
    def expires(self) -> float:
        """Seconds since 1970."""
        return self.expires_ms / 1000


def name_of(author: PeerId, name: str, limits: KadLimits) -> bytes:
    """The whole name of a record. Raises `ValueError` for a name that is empty or too long."""
    raw = name.encode()
    if not 0 < len(raw) <= limits.name_bytes:
        raise ValueError(f"a record's name takes 1 to {limits.name_bytes} bytes, not {len(raw)}")
    return NAMESPACE + author.encode() + b"/" + raw


def seal(
    author: PeerId,
    name: bytes,
    stated: tuple[int, float, bytes],
    sign: Sign,
    *,
    names_block: bool = False,
) -> Record:
    """The record in which `author` states (sequence, expiry in seconds since 1970, value) under `name`."""
    sequence, expires, value = stated
    version, expires_ms = BLOCK if names_block else PLAIN, int(expires * 1000)
    signature = sign(_signed(name, version, sequence, expires_ms, value))
    raw = _encoder.encode(_Sealed(version, sequence, expires_ms, value, signature))
    return Record(name, author, sequence, expires_ms, value, raw, names_block)


def read(name: bytes, raw: bytes, wall: float, verify: Verify, limits: KadLimits) -> Record:
    """The record `raw` under `name`, checked; what costs nothing is checked first.

    Raises `Refused` with reason "name", "size", "form", "expired", "future" (an expiry further ahead than a
    record may live: a wrong clock, or somebody who wants to stay for ever) or "signature".
    """
    author = author_of(name, limits)
    if len(raw) > limits.value_bytes + 256:
        raise Refused(f"a record of {len(raw)} bytes; {limits.value_bytes} are allowed", reason="size")
    try:
        sealed = _decoder.decode(raw)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise Refused(f"not a record: {error}", reason="form") from None
    if (
        sealed.version not in (PLAIN, BLOCK)
        or not 0 <= sealed.sequence <= SEQUENCE_MAX
        or sealed.expires_ms < 0
    ):
        raise Refused("a record of another version, or with numbers out of bounds", reason="form")
    if len(sealed.value) > limits.value_bytes:
        raise Refused(
            f"a value of {len(sealed.value)} bytes; {limits.value_bytes} are allowed", reason="size"
        )
    if sealed.expires_ms <= wall * 1000:
        raise Refused("the record expired", reason="expired")
    if sealed.expires_ms > (wall + limits.life_s + limits.skew_s) * 1000:
        raise Refused(f"the record expires more than {limits.life_s:g} s ahead", reason="future")
    signed = _signed(name, sealed.version, sealed.sequence, sealed.expires_ms, sealed.value)
    if not verify(author, signed, sealed.signature):
        raise Refused(f"the record is not signed by {author}", reason="signature")
    is_block = sealed.version == BLOCK
    return Record(name, author, sealed.sequence, sealed.expires_ms, sealed.value, raw, is_block)


def author_of(name: bytes, limits: KadLimits) -> PeerId:
    """Whose record stands under `name`. Raises `Refused` (reason "name") for a name that is none of a
    record."""
    head, _, rest = name.removeprefix(NAMESPACE).partition(b"/")
    try:
        author = PeerId(head.decode("ascii"))
        bytes_of_peer(author)
    except (UnicodeDecodeError, ValueError):
        author = PeerId("")
    if not name.startswith(NAMESPACE) or not author or not 0 < len(rest) <= limits.name_bytes:
        raise Refused("a record is named /mycel/PEERID/NAME", reason="name")
    return author


def _signed(name: bytes, version: int, sequence: int, expires_ms: int, value: bytes) -> bytes:
    domain = BLOCK_DOMAIN if version == BLOCK else DOMAIN
    parts = (domain, name, sequence.to_bytes(8, "big"), expires_ms.to_bytes(8, "big"), value)
    return b"".join(varint.prefixed(part) for part in parts)
