"""What a node keeps of its Kademlia between two runs: whom it knew, and what it said itself.

One msgpack value, small, made and read here; where it is kept is the node's affair. Records of others are not
in it: their replicas see to them. What cannot be read is as good as nothing: a node that lost it asks its
bootstrap peers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from mycel.dht.kad.key import bytes_of_peer
from mycel.dht.kad.table import Contact
from mycel.protocol.mesh import PeerId

VERSION = 1


@dataclass(frozen=True, slots=True)
class Remembered:
    """What is kept. `records` are this node's own: (name, raw, life in seconds)."""

    contacts: tuple[Contact, ...] = ()
    records: tuple[tuple[bytes, bytes, float], ...] = ()
    provided: tuple[bytes, ...] = ()


class _Kept(msgspec.Struct, frozen=True, array_like=True):
    version: int
    contacts: list[tuple[str, list[bytes]]]
    records: list[tuple[bytes, bytes, float]]
    provided: list[bytes]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Kept)


def write(remembered: Remembered) -> bytes:
    """`remembered` as bytes."""
    contacts = [(str(one.peer), list(one.addrs)) for one in remembered.contacts]
    return _encoder.encode(_Kept(VERSION, contacts, list(remembered.records), list(remembered.provided)))


def read(raw: bytes | None) -> Remembered:
    """What was kept; nothing where `raw` is None, cut, or of another version."""
    if raw is None:
        return Remembered()
    try:
        kept = _decoder.decode(raw)
        if kept.version != VERSION:
            return Remembered()
        return Remembered(_contacts(kept.contacts), tuple(kept.records), tuple(kept.provided))
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return Remembered()


def _contacts(kept: Sequence[tuple[str, list[bytes]]]) -> tuple[Contact, ...]:
    contacts = tuple(Contact(PeerId(peer), tuple(addrs)) for peer, addrs in kept)
    for contact in contacts:
        bytes_of_peer(contact.peer)
    return contacts
