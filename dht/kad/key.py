"""Keys: points in a space of 256 bits, where distance is exclusive or (Maymounkov and Mazieres 2002, 2.1).

A peer's key is the SHA-256 of its id, a record's the SHA-256 of its name, as libp2p's kad-dht has it. Two
keys share as many leading bits as their distance has leading zeros; that number is the index of a bucket."""

from __future__ import annotations

import functools
import hashlib
from typing import NewType

from mycel.protocol.keys import peer_id_bytes, peer_id_text
from mycel.protocol.mesh import PeerId

Key = NewType("Key", int)
"""0 to 2**256 - 1."""

BITS = 256

TRIES_PER_BIT = 4
"""Times 2**bits: how many names are tried before none is taken to fall where one should."""


def key_of(name: bytes) -> Key:
    """The key of a record, a provided thing, or the bytes of a peer id."""
    return Key(int.from_bytes(hashlib.sha256(name).digest(), "big"))


@functools.lru_cache(maxsize=65536)
def key_of_peer(peer: PeerId) -> Key:
    """Where `peer` stands. Raises `ValueError` for text that is no peer id."""
    return key_of(bytes_of_peer(peer))


@functools.lru_cache(maxsize=65536)
def bytes_of_peer(peer: PeerId) -> bytes:
    """`peer_id_bytes`, remembered: base58 is slow. Raises `ValueError` for text that is no peer id."""
    return peer_id_bytes(peer)


@functools.lru_cache(maxsize=65536)
def peer_of_bytes(raw: bytes) -> PeerId:
    """`peer_id_text`, remembered. Raises `ValueError` for bytes that are no peer id."""
    return peer_id_text(raw)


def shared_bits(one: Key, other: Key) -> int:
    """How many leading bits two keys share, 256 when they are equal."""
    return BITS - (one ^ other).bit_length()


def name_near(own: Key, bits: int, entropy: bytes) -> bytes | None:
    """A name whose key shares exactly `bits` leading bits with `own`, drawn from `entropy`.

    A question names what it looks for, and the asked hash it; so a bucket can only be looked through by a
    name that falls into it. Such names are found by trying, which is cheap as long as the bucket is not
    deeper than a network is large. None where trying found none."""
    seed, shift = hashlib.sha256(entropy).digest()[:24], BITS - 1 - bits
    wanted = own >> shift ^ 1
    for number in range(TRIES_PER_BIT << bits):
        name = seed + number.to_bytes(8, "big")
        if key_of(name) >> shift == wanted:
            return name
    return None
