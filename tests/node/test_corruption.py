"""One percent of a connection's bytes changed on the way, over real sockets: nobody takes what it carried."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import trio

from mycel.compute.train.app import App, Task, Trained
from mycel.compute.train.client import FederatedClient, Owner, Terms
from mycel.compute.train.federated import Coordinator, News, Plan
from mycel.compute.train.inline import InlineTrainer
from mycel.compute.train.keep import FolderKeep
from mycel.compute.train.layout import Entry, Layout
from mycel.compute.train.orders import Claim
from mycel.compute.train.rounds import RoundRules
from mycel.compute.train.rows import Flat
from mycel.compute.train.strategy import make_strategy
from mycel.compute.train.trade import Source
from mycel.compute.train.trainer import Trainers
from mycel.compute.train.workshop import Workshop
from mycel.node.host import Host
from mycel.node.tcp import TcpNetwork
from mycel.protocol.keys import OwnKey
from mycel.protocol.mesh import Access, PeerId
from mycel.protocol.rpc import Rpc

SIZE = 100_000
LAYOUT = Layout((Entry("w", (SIZE,)),))
SOURCE = Source("classifier")


class Open:
    """A gate that lets anybody order the job."""

    def terms(self, peer: PeerId, claim: Claim) -> Terms:
        return Terms("job", PeerId("submitter"), SOURCE, "numbers")


class Proxy:
    """Passes a connection's bytes on; while it corrupts, one in a hundred of its dialler's is changed."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._chance = np.random.default_rng(4)
        self.corrupts = False

    async def carry(self, dialler: trio.SocketStream) -> None:
        target = await trio.open_tcp_stream("127.0.0.1", self._target)
        async with dialler, target, trio.open_nursery() as nursery:
            nursery.start_soon(self._pass, target, dialler, False)
            await self._pass(dialler, target, True)
            nursery.cancel_scope.cancel()

    async def _pass(self, source: trio.SocketStream, target: trio.SocketStream, changes: bool) -> None:
        try:
            async for data in source:
                row = np.frombuffer(bytearray(data), np.uint8)
                if changes and self.corrupts:
                    row[self._chance.random(len(row)) < 0.01] ^= 0x41
                await target.send_all(row.tobytes())
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return


async def a_host(nursery: trio.Nursery) -> tuple[Host, Rpc]:
    host = Host(
        TcpNetwork(), OwnKey(os.urandom(32)), listen=["/ip4/127.0.0.1/tcp/0"], default_access=Access.MEMBER
    )
    rpc = Rpc(host)
    await nursery.start(host.run)
    await nursery.start(rpc.run)
    return host, rpc


async def a_client(nursery: trio.Nursery, target: float) -> Host:
    host, rpc = await a_host(nursery)
    app = App()

    @app.train
    def train(task: Task) -> Trained:
        return task.done({"w": np.full(SIZE, target, np.float32)}, examples=1)

    workshop = Workshop()
    workshop.add(SOURCE.name, app)
    trainers = Trainers(lambda: InlineTrainer(workshop))
    service = FederatedClient(host, rpc, Open(), trainers, Owner({"numbers": Path("numbers")}))
    await nursery.start(service.attend, "job", SOURCE)
    return host


async def test_a_round_does_without_a_client_whose_bytes_are_changed_on_the_way(tmp_path: Path) -> None:
    said: list[str] = []
    seen: dict[int, Mapping[str, float]] = {}
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            boss, rpc = await a_host(nursery)
            port = int(str(boss.listen_addrs[0]).split("/")[4])
            proxy = Proxy(port)
            listeners: list[Any] = await nursery.start(trio.serve_tcp, proxy.carry, 0)
            through = listeners[0].socket.getsockname()[1]
            clients = [await a_client(nursery, target) for target in (1.0, 2.0, 9.0)]
            for client in clients[:2]:
                await client.connect(boss.listen_addrs)
            await clients[2].connect([f"/ip4/127.0.0.1/tcp/{through}/p2p/{boss.peer_id}"])

            def report(number: int, figures: Mapping[str, float]) -> None:
                seen.setdefault(number, figures)
                proxy.corrupts = number >= 2

            async def first() -> tuple[Layout, Flat]:
                return LAYOUT, np.zeros(SIZE, np.float32)

            plan = Plan(Claim("job", 1), 5, RoundRules(quorum=2), make_strategy("fedavg"), evaluate_every=0)
            keep = FolderKeep(tmp_path)
            _, model = await Coordinator(boss, rpc, plan, keep, News(report, said.append)).run(first)
            nursery.cancel_scope.cancel()
    assert [seen[number]["clients"] for number in (1, 2)] == [3.0, 3.0]
    assert seen[5]["clients"] == 2.0
    assert np.array_equal(model, np.full(SIZE, 1.5, np.float32)), "of 1 and 2, to the bit"
    assert any(line.startswith(f"round 3, {clients[2].peer_id}: ") for line in said), said
