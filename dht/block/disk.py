"""Blocks on disk: one file each, named by its content, there whole or not at all.

    blocks/ku/bafkrei...ku    a block; the folder is its name's last two characters
    partial/                  being written; emptied on opening
    pins/                     a file per pin: its name, and the blocks it keeps
    lock                      held by the process that uses the folder

A block is written under another name, fsynced and renamed, so a process that is killed at any moment leaves
complete blocks and nothing else, and goes on from there. After a power failure the last few renames may be
missing; those blocks are fetched again. A block is checked against its name before it is written and when
it is first read after opening; one that was damaged on the disk is removed and counted, and is then simply
not here.

Everything that touches the disk or hashes runs in a worker thread, a whole block at a time. The index
(sizes, least recently used, pins) lives in memory and is rebuilt on opening from names and times of the
files.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import trio

from mycel.dht.block.extents import append_file
from mycel.dht.block.shelf import Shelf
from mycel.protocol.blockstore import CorruptBlock
from mycel.protocol.cid import Cid, cid_of, cid_text, cids_from, parse_cid
from mycel.protocol.errors import LimitExceeded, RemoteProtocolError, UsageProblem


class _Pin(msgspec.Struct, array_like=True):
    name: str
    cids: bytes


class DiskStore:
    """A `BlockStore` in `folder`. Close it at the end.

    Raises `UsageProblem` on opening where another process uses the folder or a pin's file is damaged.
    """

    def __init__(self, folder: Path, quota_bytes: int = 0) -> None:
        self.shelf = Shelf(quota_bytes)
        self.damaged = 0
        """Blocks found damaged on the disk."""
        self._folder = folder
        self._checked: dict[Cid, None] = {}
        self._writes = 0
        for name in ("blocks", "partial", "pins"):
            (folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise UsageProblem(f"another process uses the blocks in {folder}: stop it first") from None
        try:
            self._open()
        except BaseException:  # why: whatever ends the opening, others may use the folder; raised again
            self.close()
            raise

    def close(self) -> None:
        """Let other processes use the folder."""
        os.close(self._lock)

    @property
    def used_bytes(self) -> int:
        """See `BlockStore.used_bytes`."""
        return self.shelf.used_bytes

    @property
    def quota_bytes(self) -> int:
        """See `BlockStore.quota_bytes`."""
        return self.shelf.quota_bytes

    def _open(self) -> None:
        for partial in sorted((self._folder / "partial").iterdir()):
            partial.unlink()
        for _, cid, size in sorted(_scan(self._folder / "blocks")):
            self.shelf.used_bytes += size
            self.shelf.place(cid, size)
        for path in sorted((self._folder / "pins").iterdir()):
            try:
                pin = msgspec.msgpack.decode(path.read_bytes(), type=_Pin)
                self.shelf.pin(pin.name, cids_from(pin.cids))
            except (msgspec.MsgspecError, UnicodeDecodeError, RemoteProtocolError) as error:
                raise UsageProblem(
                    f"{path} is damaged ({error}): delete it, and add or get its model again"
                ) from None

    def has(self, cid: Cid) -> bool:
        """See `BlockStore.has`."""
        return cid in self.shelf

    async def get(self, cid: Cid) -> bytes | None:
        """See `BlockStore.get`."""
        if cid not in self.shelf:
            await trio.lowlevel.checkpoint()
            return None
        self.shelf.touch(cid)
        is_new = cid not in self._checked
        data = await trio.to_thread.run_sync(_read, self._path(cid), cid if is_new else None)
        if data is None:
            if cid in self.shelf:  # not evicted meanwhile
                self.damaged += 1
                self._forget(cid)
            return None
        self._checked[cid] = None
        return data

    async def append(self, cid: Cid, descriptor: int) -> bool:
        """See `BlockStore.append`."""
        if cid not in self._checked and await self.get(cid) is None:
            return False
        try:
            await trio.to_thread.run_sync(append_file, self._path(cid), descriptor)
        except FileNotFoundError:  # evicted
            return False
        return True

    async def put(self, cid: Cid, data: bytes) -> None:
        """See `BlockStore.put`."""
        if cid in self.shelf:
            self.shelf.touch(cid)
            await trio.lowlevel.checkpoint()
            return
        gone = self.shelf.reserve(len(data))
        self._writes += 1
        partial = self._folder / "partial" / f"{self._writes}"
        placed = False
        try:
            with trio.CancelScope(shield=True):  # what is off the shelf has to leave the disk too
                if gone:
                    await trio.to_thread.run_sync(_unlink, [self._path(old) for old in gone])
                    for old in gone:
                        self._checked.pop(old, None)
                await trio.to_thread.run_sync(_write, partial, self._path(cid), cid, data)
            self.shelf.place(cid, len(data))
            self._checked[cid] = None
            placed = True
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise LimitExceeded(
                    f"the disk of {self._folder} is full: make room, or lower the quota"
                ) from None
            raise UsageProblem(f"cannot write to {self._folder}: {error.strerror}") from None
        finally:
            if not placed:
                self.shelf.release(len(data))

    async def pin(self, name: str, cids: Sequence[Cid]) -> None:
        """See `BlockStore.pin`."""
        self.shelf.pin(name, cids)
        data = msgspec.msgpack.encode(_Pin(name, b"".join(cids)))
        self._writes += 1
        partial = self._folder / "partial" / f"{self._writes}"
        await trio.to_thread.run_sync(_write, partial, self._pin_path(name), None, data)

    def pinned(self, name: str) -> Sequence[Cid]:
        """See `BlockStore.pinned`."""
        return self.shelf.pins.get(name, ())

    def pins(self) -> Sequence[str]:
        """See `BlockStore.pins`."""
        return sorted(self.shelf.pins)

    async def unpin(self, name: str) -> None:
        """See `BlockStore.unpin`."""
        self.shelf.unpin(name)
        await trio.to_thread.run_sync(_unlink, [self._pin_path(name)])

    def _forget(self, cid: Cid) -> None:
        self.shelf.remove(cid)
        self._checked.pop(cid, None)

    def _path(self, cid: Cid) -> Path:
        text = cid_text(cid)
        return self._folder / "blocks" / text[-2:] / text

    def _pin_path(self, name: str) -> Path:
        return self._folder / "pins" / hashlib.sha256(name.encode()).hexdigest()


@asynccontextmanager
async def disk_store(folder: Path, quota_bytes: int = 0) -> AsyncIterator[DiskStore]:
    """A store that is opened in a worker thread, for many blocks take a while to look at, and closed at the
    end. Raises as `DiskStore`."""
    store = await trio.to_thread.run_sync(DiskStore, folder, quota_bytes)
    try:
        yield store
    finally:
        store.close()


def _scan(folder: Path) -> Iterator[tuple[int, Cid, int]]:
    """(Last use, name, size) of the blocks under `folder`; what is no block is left alone."""
    for shard in os.scandir(folder):
        if not shard.is_dir(follow_symlinks=False):
            continue
        for entry in os.scandir(shard.path):
            try:
                cid = parse_cid(entry.name)
            except RemoteProtocolError:
                continue
            status = entry.stat(follow_symlinks=False)
            yield status.st_mtime_ns, cid, status.st_size


def _read(path: Path, cid: Cid | None) -> bytes | None:
    """The file, checked and marked as used where `cid` is given; None where it is damaged or gone."""
    try:
        data = path.read_bytes()
        if cid is not None:
            if cid_of(data) != cid:
                path.unlink()
                return None
            os.utime(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.EIO:
            return None
        raise
    return data


def _write(partial: Path, path: Path, cid: Cid | None, data: bytes) -> None:
    """Make the file whole or not at all, after checking it against `cid`."""
    if cid is not None and cid_of(data) != cid:
        raise CorruptBlock(f"{len(data)} bytes that are not {cid_text(cid)}")
    path.parent.mkdir(mode=0o700, exist_ok=True)
    try:
        with partial.open("wb", buffering=0) as file:
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _unlink(paths: Sequence[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
