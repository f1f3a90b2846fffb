"""What a shared state consists of, as hashes: named tensors, each cut into chunks; and which chunks differ.

A state's *root* is the hash over its inventory, so equal roots mean equal names, sizes and bytes, and an
inventory that is fetched from one peer proves itself against the root that the group agreed on; each chunk
then proves itself against its hash in the inventory. Nobody has to be trusted for more than having the chunk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Annotated

import msgspec
import numpy as np

from mycel.compute.collective.attempt import Array, as_items
from mycel.protocol.errors import RemoteProtocolError, UsageProblem

CHUNK_BYTES = 1 << 20
DIGEST_BYTES = 32

Digest = Annotated[bytes, msgspec.Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]


class Holding(msgspec.Struct, frozen=True, array_like=True):
    """One tensor: its name, its bytes, and the hash of each of its chunks."""

    name: Annotated[str, msgspec.Meta(max_length=512)]
    size: Annotated[int, msgspec.Meta(ge=0, lt=1 << 48)]
    digests: tuple[Digest, ...]


Inventory = tuple[Holding, ...]


def digest(data: bytes | memoryview) -> bytes:
    """The hash of a chunk or of an inventory."""
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


def bytes_of(array: Array) -> memoryview:
    """The array's memory, flat. Raises `UsageProblem` where it is not contiguous."""
    try:
        return as_items(array).view(np.uint8).data
    except ValueError as error:
        raise UsageProblem(str(error)) from error


def span_of(chunk: int) -> slice:
    """Where a chunk lies in its tensor."""
    return slice(chunk * CHUNK_BYTES, (chunk + 1) * CHUNK_BYTES)


def take_stock(state: Mapping[str, Array]) -> Inventory:
    """Hash a state, names in order. About a second for a gigabyte; hashing lets other threads run."""
    holdings = []
    for name in sorted(state):
        data = bytes_of(state[name])
        chunks = range(-(-len(data) // CHUNK_BYTES))
        holdings.append(Holding(name, len(data), tuple(digest(data[span_of(chunk)]) for chunk in chunks)))
    return tuple(holdings)


def root_of(inventory: Inventory) -> bytes:
    """The hash that a state goes by."""
    return digest(msgspec.msgpack.encode(inventory))


def differing(own: Inventory, other: Inventory) -> list[tuple[int, int]]:
    """(tensor, chunk) of all chunks that are not the same here and there.

    Raises `RemoteProtocolError` where names or sizes differ: those are different models.
    """
    mine = [(holding.name, holding.size) for holding in own]
    theirs = [(holding.name, holding.size) for holding in other]
    if mine != theirs:
        odd = next((pair for pair in zip(mine, theirs, strict=False) if pair[0] != pair[1]), (mine, theirs))
        raise RemoteProtocolError(f"the group's state is of other tensors: here {odd[0]}, there {odd[1]}")
    for holding in other:
        if len(holding.digests) != -(-holding.size // CHUNK_BYTES):
            raise RemoteProtocolError(
                f"{holding.name} of {holding.size} bytes has {len(holding.digests)} chunks"
            )
    return [
        (tensor, chunk)
        for tensor, (here, there) in enumerate(zip(own, other, strict=True))
        for chunk, wanted in enumerate(there.digests)
        if here.digests[chunk] != wanted
    ]
