"""The processes of bench/federated.py: clients and coordinators, each a host of its own over TCP.

    federated_far.py client NAME DATA COORDINATOR,...
    federated_far.py coordinator NAME FOLDER

prints its address as a line of JSON, connects where lines of {"connect": [addresses]} on its input say, and
tells by further lines what it does. A client trains on the file DATA for coordinators of these names, in a
trainer process of its own. A coordinator told {"run": {...}} runs the job and keeps it in FOLDER; told
{"watch": peer, "run": {...}} it does so once that peer is gone.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import trio

from mycel.compute.process import WorkerOptions
from mycel.compute.train.client import FederatedClient, Owner, Terms
from mycel.compute.train.federated import Coordinator, News, Plan
from mycel.compute.train.keep import FolderKeep
from mycel.compute.train.layout import Layout
from mycel.compute.train.orders import Claim
from mycel.compute.train.rounds import RoundRules
from mycel.compute.train.rows import Flat, row_of
from mycel.compute.train.strategy import make_strategy
from mycel.compute.train.trade import Source, StartAsk, WorkAsk, WorkDone
from mycel.compute.train.trainer import SERVE, Trainers, start_trainer
from mycel.node.host import Host
from mycel.node.tcp import TcpNetwork
from mycel.protocol.errors import Refused
from mycel.protocol.keys import OwnKey
from mycel.protocol.mesh import Access, PeerDown, PeerId
from mycel.protocol.network import Pipe
from mycel.protocol.rpc import Rpc

JOB = "digits"
DATA = "digits"
APP = Source("classifier")


class Counted:
    """A pipe that counts what goes through, ciphers and heads included."""

    def __init__(self, pipe: Pipe, count: list[int]) -> None:
        self._pipe = pipe
        self._count = count

    def try_send(self, data: Any) -> int:
        sent = self._pipe.try_send(data)
        self._count[0] += sent
        return sent

    def try_recv_into(self, buffer: Any) -> int | None:
        got = self._pipe.try_recv_into(buffer)
        self._count[1] += got or 0
        return got

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)


class CountingNetwork:
    """TCP, with its bytes counted: (sent, received)."""

    def __init__(self) -> None:
        self._network = TcpNetwork()
        self.count = [0, 0]

    async def dial(self, *args: Any, **kwargs: Any) -> Any:
        return Counted(await self._network.dial(*args, **kwargs), self.count)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)


class Timed(Trainers):
    """Trainers that say when a piece of work is done."""

    async def work(self, source: Source, ask: WorkAsk, limit_s: float) -> WorkDone:
        done = await super().work(source, ask, limit_s)
        if ask.train:
            say(worked=ask.number, at=time.monotonic())
        return done


class Named:
    """Lets coordinators of given names order the one job there is."""

    def __init__(self, names: list[str]) -> None:
        self._peers = [key_of(name).peer_id for name in names]

    def terms(self, peer: PeerId, claim: Claim) -> Terms:
        if peer not in self._peers or claim.job != JOB:
            raise Refused(f"{peer} does not coordinate {claim.job}", reason="unproven")
        return Terms(JOB, peer, APP, DATA, json.loads(os.environ["BENCH_SETTINGS"]))


def key_of(name: str) -> OwnKey:
    """The key of the process of that name, the same in every run: so that all know each other's ids."""
    return OwnKey(hashlib.sha256(f"bench federated {name}".encode()).digest())


def say(**what: Any) -> None:
    """One line of JSON."""
    print(json.dumps(what), flush=True)


async def be(role: str, name: str, place: str, *more: str) -> None:
    """Serve until standard input ends."""
    network: Any = CountingNetwork()
    host = Host(network, key_of(name), listen=["/ip4/127.0.0.1/tcp/0"], default_access=Access.MEMBER)
    rpc = Rpc(host)
    trainers = Timed(lambda: start_trainer(WorkerOptions(environment=os.environ, serve=SERVE, threads=1)))
    async with trio.open_nursery() as nursery:
        await nursery.start(host.run)
        await nursery.start(rpc.run)
        if role == "client":
            owner = Owner({DATA: Path(place)})
            client = FederatedClient(host, rpc, Named(more[0].split(",")), trainers, owner)
            await nursery.start(client.attend, JOB, APP)
        say(addr=str(host.listen_addrs[0]), peer=host.peer_id)
        while line := await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True):
            asked = json.loads(line)
            for addr in asked.get("connect", ()):
                await host.connect([addr])
            if "run" in asked:
                nursery.start_soon(coordinate, host, rpc, trainers, network, (Path(place), asked))
            else:
                say(connected=len(host.peers))
        nursery.cancel_scope.cancel()


async def coordinate(
    host: Host, rpc: Rpc, trainers: Trainers, network: CountingNetwork, what: tuple[Path, dict[str, Any]]
) -> None:
    """Run the job to its end, saying how it goes."""
    folder, asked = what
    run = asked["run"]
    if "watch" in asked:
        async with host.events() as events:
            async for event in events:
                if isinstance(event, PeerDown) and event.peer == asked["watch"]:
                    say(took_over=time.monotonic())
                    break
    before = list(network.count)

    def report(number: int, figures: Mapping[str, float]) -> None:
        say(round=number, at=time.monotonic(), **figures)

    async def first() -> tuple[Layout, Flat]:
        settings = json.loads(os.environ["BENCH_SETTINGS"])
        begun = await trainers.start_model(APP, StartAsk(APP.name, settings, run["seed"]))
        return begun.layout, row_of(begun.model.data, begun.layout)

    plan = Plan(
        claim=Claim(JOB, run["epoch"]),
        rounds=run["rounds"],
        rules=RoundRules(quorum=run["quorum"], patience_s=20.0),
        strategy=make_strategy(run["strategy"]),
        seed=run["seed"],
        fan_out=run.get("fan_out", 0),
    )
    news = News(report, lambda line: say(log=line))
    coordinator = Coordinator(host, rpc, plan, FolderKeep(folder), news)
    began = time.monotonic()
    await coordinator.run(first)
    await trainers.aclose()
    sent, received = network.count[0] - before[0], network.count[1] - before[1]
    say(done=time.monotonic() - began, sent=sent, received=received)


if __name__ == "__main__":
    trio.run(be, *sys.argv[1:])
