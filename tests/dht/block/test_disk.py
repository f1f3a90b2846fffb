"""Blocks on disk: whole or not at all, also when the process is killed while it writes."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from mycel.dht.block.disk import DiskStore
from mycel.protocol.blockstore import CorruptBlock
from mycel.protocol.cid import Cid, cid_of, cid_text, parse_cid
from mycel.protocol.errors import LimitExceeded, UsageProblem

WRITER = """
import sys
import trio
from pathlib import Path
from mycel.dht.block.disk import DiskStore
from mycel.protocol.cid import cid_of, cid_text

async def main():
    store = DiskStore(Path(sys.argv[1]))
    data = [n.to_bytes(4, "big") * 50_000 for n in range(400)]
    await store.pin("all", [cid_of(part) for part in data])
    print("ready", flush=True)
    for part in data:
        cid = cid_of(part)
        if not store.has(cid):
            await store.put(cid, part)
            print(cid_text(cid), flush=True)
    print("done", flush=True)

trio.run(main)
"""
"""Writes 400 blocks of 200 kB that it does not have yet, and says each when it is kept."""


def part(n: int, nbytes: int = 1000) -> tuple[Cid, bytes]:
    data = n.to_bytes(4, "big") * (nbytes // 4)
    return cid_of(data), data


def files_under(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def file_of(folder: Path, cid: Cid) -> Path:
    return folder / "blocks" / cid_text(cid)[-2:] / cid_text(cid)


async def test_blocks_and_pins_are_there_again_after_opening(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    cid, data = part(1)
    await store.put(cid, data)
    await store.put(cid, data)
    await store.pin("org/model", [cid])
    await store.pin("gone", [cid])
    await store.unpin("gone")
    store.close()
    again = DiskStore(tmp_path, quota_bytes=1500)
    assert again.has(cid)
    assert await again.get(cid) == data
    assert again.shelf.used_bytes == 1000
    assert again.shelf.pins == {"org/model": (cid,)}
    with pytest.raises(LimitExceeded, match="pinned"):
        await again.put(*part(2))
    await again.unpin("org/model")
    await again.put(*part(2))
    assert not again.has(cid)
    assert not file_of(tmp_path, cid).exists()
    assert await again.get(cid) is None
    again.close()


async def test_what_is_not_its_name_is_not_kept(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    with pytest.raises(CorruptBlock):
        await store.put(part(1)[0], part(2)[1])
    assert not store.has(part(1)[0])
    assert store.shelf.used_bytes == 0
    assert files_under(tmp_path) == [tmp_path / "lock"]
    store.close()


async def test_a_block_damaged_on_the_disk_is_not_here(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    cid, data = part(1)
    await store.put(cid, data)
    store.close()
    file_of(tmp_path, cid).write_bytes(data[:-1] + b"x")
    again = DiskStore(tmp_path)
    assert again.has(cid)
    assert await again.get(cid) is None
    assert not again.has(cid)
    assert (again.damaged, again.shelf.used_bytes) == (1, 0)
    await again.put(cid, data)
    assert await again.get(cid) == data
    again.close()


@pytest.mark.parametrize("fails", [None, errno.EXDEV])
async def test_a_block_is_copied_into_a_file_whatever_the_file_system_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: int | None
) -> None:
    if fails is not None:

        def refuse(*_: object) -> int:
            raise OSError(fails, "not here")

        monkeypatch.setattr(os, "copy_file_range", refuse)
    store = DiskStore(tmp_path / "store")
    (one, data), (other, rest) = part(1, 5000), part(2, 3_000_000)
    await store.put(one, data)
    await store.put(other, rest)
    with (tmp_path / "file").open("wb", buffering=0) as file:
        file.write(b"head")
        assert await store.append(one, file.fileno())
        assert await store.append(other, file.fileno())
        assert not await store.append(part(3)[0], file.fileno())
    assert (tmp_path / "file").read_bytes() == b"head" + data + rest
    store.close()
    file_of(tmp_path / "store", one).write_bytes(data[:-1] + b"x")
    again = DiskStore(tmp_path / "store")
    with (tmp_path / "file").open("wb", buffering=0) as file:
        assert not await again.append(one, file.fileno()), "it was damaged"
        assert file.tell() == 0
    again.close()


async def test_the_least_recently_used_goes_also_over_a_restart(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    for n in range(3):
        await store.put(*part(n))
        await trio.sleep(0.02)  # the file system's clock ticks every few ms
    store.close()
    store = DiskStore(tmp_path)
    await store.get(part(0)[0])
    store.close()
    store = DiskStore(tmp_path, quota_bytes=3000)
    await store.put(*part(3))
    assert [store.has(part(n)[0]) for n in range(4)] == [True, False, True, True]
    store.close()


async def test_many_at_once(tmp_path: Path) -> None:
    store = DiskStore(tmp_path, quota_bytes=20_000)
    for turn in range(8):
        async with trio.open_nursery() as nursery:
            for n in range(8):
                nursery.start_soon(store.put, *part((turn * 7 + n // 2 * 2) % 40))
    files = files_under(tmp_path / "blocks")
    assert len(files) >= 8
    assert sum(path.stat().st_size for path in files) == store.shelf.used_bytes <= 20_000
    assert all(store.has(parse_cid(path.name)) for path in files)
    store.close()


def test_a_folder_has_one_process(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    with pytest.raises(UsageProblem, match="another process"):
        DiskStore(tmp_path)
    store.close()
    DiskStore(tmp_path).close()


def test_a_damaged_pin_is_told_of(tmp_path: Path) -> None:
    DiskStore(tmp_path).close()
    (tmp_path / "pins" / "x").write_bytes(b"\xc1")
    with pytest.raises(UsageProblem, match="damaged"):
        DiskStore(tmp_path)


def run_and_kill(folder: Path, lines: int) -> list[Cid]:
    """What a writer said it kept until it was killed after saying so many."""
    command = [sys.executable, "-c", WRITER, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        said = [process.stdout.readline() for _ in range(lines)]
        process.kill()
        said += process.stdout.read().splitlines(keepends=True)
    return [parse_cid(line.strip()) for line in said if line.endswith("\n")]


async def test_a_killed_writer_goes_on_where_it_was(tmp_path: Path) -> None:
    """SIGKILL at a random moment, again and again: what was said to be kept is, and nothing is half there."""
    chance = random.Random(8)
    kept: dict[Cid, None] = {}
    for _ in range(4):
        for cid in run_and_kill(tmp_path, chance.randint(1, 40)):
            assert cid not in kept, "written again"
            kept[cid] = None
        store = DiskStore(tmp_path)
        assert list((tmp_path / "partial").iterdir()) == []
        assert len(store.shelf.pins["all"]) == 400
        here = [cid for cid in store.shelf.pins["all"] if store.has(cid)]
        assert [cid for cid in kept if cid not in here] == []
        assert len(here) <= len(kept) + 1, "one may be kept and not yet said"
        for cid in here:
            kept[cid] = None
            assert await store.get(cid) is not None
        assert store.damaged == 0
        store.close()
