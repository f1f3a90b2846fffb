"""Content blocks: from many at once, against a plain stream, against liars, and after SIGKILL. On loopback.

    swarm_vs_single   4 peers fetch a model at once, from a seed and each other / from the seed alone, each
                      uplink capped alike: aggregate rate                                     target >= 2
    fourth_vs_first   time of the fourth peer / of the first, one after another                target < 1
    block_vs_raw      blocks from disk to disk / one stream, SHA-256 and a file, both uncapped target >= 0.8
    corrupt_detected  of 20 fetches from an honest peer and one that changes one byte of each block: those
                      in which it was dropped and nothing wrong was kept                       target 20
    resumed           of 20 fetches killed (SIGKILL) at a random moment: those that, begun again, fetch
                      only what was not kept, and end complete                                target 20

Every peer is a process with its store on disk and fsyncs each block; the plain stream's file is fsynced once,
at its end. `--only PART` measures one part; `--mib` and `--uplink` set the size of the model (1024) and the
cap in MiB/s (32): a machine that cannot carry four times the cap measures itself.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import trio
from blocks_far import RAW
from measure import compare, report, stopwatch

from mycel.dht.block.add import add_model
from mycel.dht.block.disk import DiskStore
from mycel.dht.block.exchange import Exchange
from mycel.dht.block.manifest import Want, pin_name
from mycel.dht.block.memory import MemoryStore
from mycel.dht.block.message import BLOCK_PROTOCOL, read, write
from mycel.dht.block.model import fetch_model
from mycel.dht.block.safetensor import SINGLE, header_of
from mycel.node.host import Host
from mycel.node.tcp import TcpNetwork
from mycel.protocol.cid import Cid, cid_of, cid_text
from mycel.protocol.keys import OwnKey
from mycel.protocol.limits import MIB
from mycel.protocol.mesh import Access, Stream

PEERS = 4
LAYERS = 16
ROUNDS = 20
KILL_MIB = 32


class Far:
    """A peer in a process of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        said = self.read()
        self.addr, self.peer = said["addr"], said["peer"]

    def read(self) -> dict[str, Any]:
        """Its next line."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit("a peer of the benchmark ended; its error is above")
        said: dict[str, Any] = json.loads(line)
        return said

    def ask(self, **what: Any) -> None:
        """Give it something to do."""
        assert self.process.stdin is not None
        print(json.dumps(what), file=self.process.stdin, flush=True)

    def connect(self, others: Sequence[Far]) -> None:
        """Connect it with others."""
        self.ask(connect=[other.addr for other in others])
        self.read()


@contextmanager
def far(folder: Path, uplink: float = 0) -> Iterator[Far]:
    """A running peer with its store in `folder`."""
    command = [sys.executable, str(Path(__file__).with_name("blocks_far.py")), str(folder), str(uplink)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Far(process)
        finally:
            process.kill()


async def seed_model(folder: Path, mib: int) -> Cid:
    """A store in `folder`/seed with a model of random bytes; its root."""
    source = folder / "model"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"num_hidden_layers": LAYERS}))
    side = mib * MIB // LAYERS
    names = [f"model.layers.{n}.weight" for n in range(LAYERS)]
    with (source / SINGLE).open("wb") as file:
        file.write(header_of((name, "U8", (side,), side) for name in names))
        for _ in names:
            file.write(os.urandom(side))
    store = DiskStore(folder / "seed")
    root = await add_model(store, source, name="bench", fingerprint="bench")
    store.close()
    shutil.rmtree(source)
    return root


def swarm(folder: Path, root: Cid, mib: int, uplink: float) -> dict[str, float]:
    """Seconds of all at once from the seed alone, of all from all, and of one after another."""
    figures = {}
    for way in ("single", "swarm", "turns"):
        with ExitStack() as stack:
            seed = stack.enter_context(far(folder / "seed", uplink))
            peers = [stack.enter_context(far(folder / f"{way}{n}", uplink)) for n in range(PEERS)]
            for n, peer in enumerate(peers):
                peer.connect([seed, *peers[:n]])
            only = seed.peer if way == "single" else None
            with stopwatch() as seconds:
                took = []
                for peer in peers:
                    peer.ask(fetch=cid_text(root), only=only)
                    if way == "turns":
                        took.append(peer.read()["s"])
                if way != "turns":
                    took = [peer.read()["s"] for peer in peers]
                figures[way] = seconds()
            print(f"{way:7} {PEERS} x {mib} MiB: " + ", ".join(f"{s:.1f} s" for s in took), flush=True)
            figures[f"{way}_first"], figures[f"{way}_fourth"] = took[0], took[-1]
        for n in range(PEERS):
            shutil.rmtree(folder / f"{way}{n}")
    return figures


@asynccontextmanager
async def host() -> AsyncIterator[Host]:
    """A host in this process."""
    key = OwnKey(os.urandom(32))
    mine = Host(TcpNetwork(), key, listen=["/ip4/127.0.0.1/tcp/0"], default_access=Access.MEMBER)
    async with trio.open_nursery() as nursery:
        await nursery.start(mine.run)
        yield mine
        nursery.cancel_scope.cancel()


async def against_raw(folder: Path, root: Cid, mib: int) -> dict[str, float]:
    """MiB per second from disk to disk by blocks, and by one plain stream."""

    async def blocks() -> float:
        store = DiskStore(folder / "near")
        async with host() as mine:
            await mine.connect([seed.addr])
            exchange = Exchange(mine, store)
            with stopwatch() as seconds:
                await fetch_model(exchange, root)
                took = seconds()
        store.close()
        shutil.rmtree(folder / "near")
        return mib / took

    async def raw() -> float:
        async with host() as mine:
            peer = await mine.connect([seed.addr])
            digest = hashlib.sha256()
            with stopwatch() as seconds, (folder / "raw").open("wb", buffering=0) as file:
                stream = await mine.open_stream(peer, RAW)
                await stream.send((mib * MIB).to_bytes(8, "big"))
                while data := await stream.receive_some():
                    digest.update(data)
                    file.write(data)
                os.fsync(file.fileno())
                took = seconds()
                assert file.tell() == mib * MIB
        (folder / "raw").unlink()
        return mib / took

    with far(folder / "seed") as seed:
        compared = await compare({"raw": raw, "blocks": blocks}, rounds=3)
    print("disk to disk\n" + compared.table("MiB/s"), flush=True)
    return {
        "block_vs_raw": compared.ratio("blocks", "raw"),
        "block_mib_s": compared.median("blocks"),
        "raw_mib_s": compared.median("raw"),
    }


async def against_liars() -> int:
    """Fetches, of `ROUNDS`, in which the liar was dropped and nothing wrong was kept."""
    good = 0
    chance = random.Random(4)
    for _ in range(ROUNDS):
        data = [chance.randbytes(chance.randint(1, 2 * MIB)) for _ in range(12)]
        wants = [Want(cid_of(block), len(block)) for block in data]
        async with host() as honest, host() as liar, host() as mine:
            source, store = MemoryStore(), MemoryStore()
            for want, block in zip(wants, data, strict=True):
                await source.put(want.cid, block)
            Exchange(honest, source, upload_bytes_per_s=64 * MIB)
            serve_lies(liar, source, chance)
            for other in (liar, honest):
                await mine.connect(other.listen_addrs)
            exchange = Exchange(mine, store)
            await exchange.fetch(wants)
            kept = [await store.get(want.cid) for want in wants]
            good += kept == data and list(exchange.liars) == [liar.peer_id]
    return good


def serve_lies(liar: Host, source: MemoryStore, chance: random.Random) -> None:
    """Let `liar` send what `source` has, with one bit of each block turned over."""

    async def lie(stream: Stream) -> None:
        while (message := await read(stream)) is not None:
            kind, cids, _ = message
            if kind == "want":
                await stream.send(write("have", cids))
            elif kind == "get":
                for cid in cids:
                    block = bytearray(await source.get(cid) or b"")
                    block[chance.randrange(len(block))] ^= 1 << chance.randrange(8)
                    await stream.send(write("block", [cid], len(block)) + block)

    liar.serve_stream(BLOCK_PROTOCOL, lie)


async def against_kills(folder: Path) -> int:
    """Fetches, of `ROUNDS`, that went on where they were killed."""
    good = 0
    chance = random.Random(5)
    (folder / "kill").mkdir()
    root = await seed_model(folder / "kill", KILL_MIB)
    total = KILL_MIB * MIB
    with far(folder / "kill" / "seed", KILL_MIB * MIB) as seed:
        for _ in range(ROUNDS):
            with far(folder / "near") as peer:
                peer.connect([seed])
                peer.ask(fetch=cid_text(root), only=None)
                await trio.sleep(chance.uniform(0.0, 1.0))
            store = DiskStore(folder / "near")
            kept = store.shelf.used_bytes
            store.close()
            with far(folder / "near") as peer:
                peer.connect([seed])
                peer.ask(fetch=cid_text(root), only=None)
                received = peer.read()["received"]
            store = DiskStore(folder / "near")
            cids = store.pinned(pin_name(root))
            whole = store.shelf.used_bytes >= total and all(
                [await store.get(cid) is not None for cid in cids]
            )
            good += whole and store.shelf.used_bytes == kept + received
            print(f"killed at {kept / total:4.0%}, fetched {received / total:4.0%} more", flush=True)
            store.close()
            shutil.rmtree(folder / "near")
    return good


async def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--uplink", type=int, default=32, help="MiB per second")
    parser.add_argument("--only", choices=["swarm", "raw", "liars", "kills"])
    options = parser.parse_args()
    chosen = [options.only] if options.only else ["swarm", "raw", "liars", "kills"]
    figures: dict[str, float] = {"mib": options.mib, "uplink_mib_s": options.uplink}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        root = await seed_model(folder, options.mib)
        if "swarm" in chosen:
            took = swarm(folder, root, options.mib, options.uplink * MIB)
            figures["swarm_vs_single"] = took["single"] / took["swarm"]
            figures["fourth_vs_first"] = took["turns_fourth"] / took["turns_first"]
        if "raw" in chosen:
            figures |= await against_raw(folder, root, options.mib)
        if "liars" in chosen:
            figures["corrupt_detected"] = await against_liars()
        if "kills" in chosen:
            figures["resumed"] = await against_kills(folder)
    report("blocks", figures)


if __name__ == "__main__":
    trio.run(main)
