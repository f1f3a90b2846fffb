"""Files of any size as blocks: the same bytes at the other end, and nothing where something is wrong."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import trio

from mycel.dht.block.exchange import Exchange
from mycel.dht.block.file import add_file, fetch_file, read_list
from mycel.dht.block.manifest import Pieces
from mycel.dht.block.memory import MemoryStore
from mycel.protocol.cid import cid_of
from mycel.protocol.errors import RemoteProtocolError
from mycel.protocol.limits import DEFAULT_BLOCK_LIMITS
from mycel.simnet.mesh import MeshOptions, mesh_world

BLOCK = DEFAULT_BLOCK_LIMITS.block_bytes


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("nbytes", [0, 5, BLOCK, 2 * BLOCK + 7])
async def test_a_file_arrives_as_it_was(tmp_path: Path, nbytes: int) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.write_bytes((b"%d " % nbytes) * (nbytes // 2 + 1))
    with source.open("r+b") as file:
        file.truncate(nbytes)
    async with mesh_world(MeshOptions(latency_s_min=0.0001, latency_s_max=0.0002)) as world:
        one, other = world.add("one"), world.add("other")
        store = MemoryStore()
        Exchange(one, store)
        await other.connect(one.listen_addrs)
        root = await add_file(store, source, "job/1")
        with trio.fail_after(20):
            await fetch_file(Exchange(other, MemoryStore()), root, copy)
    assert copy.read_bytes() == source.read_bytes()
    assert root in store.pinned("job/1")
    assert names_in(tmp_path) == ["copy", "source"]


@pytest.mark.parametrize("listed", [b"noise", msgspec.msgpack.encode(Pieces(5, cid_of(b"a") + cid_of(b"b")))])
def test_what_lists_no_file_is_refused(listed: bytes) -> None:
    assert len(read_list(msgspec.msgpack.encode(Pieces(5, cid_of(b"a")))).cids) == 36
    with pytest.raises(RemoteProtocolError):
        read_list(listed)
