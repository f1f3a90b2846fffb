"""Files of any size as blocks: cut every 2 MiB, and a block that lists them, whose name is the file's.

The list is msgpack of `Pieces`, as a manifest's. An empty file is a list of nothing. One list names up to
58 000 blocks, 113 GiB.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec
import trio

from mycel.dht.block.exchange import Exchange, Progress
from mycel.dht.block.manifest import Pieces, Want, check_pieces, cut, wants_of
from mycel.protocol.blockstore import BlockStore, CorruptBlock
from mycel.protocol.cid import CID_BYTES, Cid, cid_of
from mycel.protocol.errors import LimitExceeded, RemoteProtocolError, UsageProblem
from mycel.protocol.limits import DEFAULT_BLOCK_LIMITS
from mycel.protocol.mesh import PeerId


async def add_file(store: BlockStore, path: Path, pin: str) -> Cid:
    """Keep the file at `path`, pinned under `pin`; the name of its list.

    Raises `UsageProblem` where the file changes meanwhile, `LimitExceeded` where it is too large, `OSError`,
    and what the store raises.
    """
    sizes = cut((await trio.to_thread.run_sync(path.stat)).st_size)
    if len(sizes) > (DEFAULT_BLOCK_LIMITS.block_bytes - 64) // CID_BYTES:
        raise LimitExceeded(f"{path} is too large to be listed in one block: cut it in two")
    cids = await trio.to_thread.run_sync(_names, path, sizes)
    listed = msgspec.msgpack.encode(Pieces(sum(sizes), b"".join(cids)))
    root = cid_of(listed)
    await store.pin(pin, [root, *cids])
    async with await trio.open_file(path, "rb") as file:
        for cid, size in zip(cids, sizes, strict=True):
            try:
                await store.put(cid, await file.read(size))
            except CorruptBlock:
                raise UsageProblem(f"{path} changed while it was added: add it again") from None
    await store.put(root, listed)
    return root


def _names(path: Path, sizes: Sequence[int]) -> list[Cid]:
    with path.open("rb", buffering=0) as file:
        return [cid_of(file.read(size)) for size in sizes]


async def fetch_file(
    exchange: Exchange,
    root: Cid,
    path: Path,
    *,
    first: Sequence[PeerId] = (),
    progress: Progress | None = None,
) -> None:
    """Write the file that `root` lists to `path`, there whole or not at all, fetching what is not here.

    Its blocks stay here until others need the room. Raises `RemoteProtocolError` where `root` is no list,
    `OSError`, and as `Exchange.fetch` does.
    """
    pieces = read_list(await exchange.get(Want(root, None), first=first))
    await exchange.fetch(wants_of(pieces), first=first, progress=progress)
    partial = path.with_name(f".{path.name}.partial")
    async with await trio.open_file(partial, "wb") as file:
        for want in wants_of(pieces):
            await file.write(await exchange.get(want, first=first))
        await file.flush()
        await trio.to_thread.run_sync(os.fsync, file.fileno())
    await trio.to_thread.run_sync(os.replace, partial, path)


def read_list(data: bytes) -> Pieces:
    """A file's list in a block, checked. Raises `RemoteProtocolError`."""
    try:
        pieces = msgspec.msgpack.decode(data, type=Pieces)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RemoteProtocolError(f"this block is no list of a file: {error}") from None
    check_pieces("a file", pieces)
    return pieces
