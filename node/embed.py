"""A node inside a script: `mycel.join(ticket)`, for training loops of one's own.

The node is a whole one (it connects, is introduced, punches through NATs) and lives in a thread with trio's
loop; the script's thread calls and waits. It lends nothing and takes no jobs. Its key is drawn anew and
forgotten: whoever runs the script again is another peer with the same rights.

    with mycel.join(ticket) as swarm, swarm.group("my-run") as peers:
        diloco = mycel.DiLoCo(model, peers)
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from mycel.node import daemon
from mycel.node.config import PRESETS, Config
from mycel.node.running import Node
from mycel.node.tcp import TcpNetwork
from mycel.node.together import socket_lanes
from mycel.node.transports import Transports
from mycel.protocol.errors import DeadlineExceeded, LocalProtocolError, single_failure
from mycel.protocol.keys import OwnKey
from mycel.protocol.membership import Credentials
from mycel.protocol.ticket import parse_ticket

if TYPE_CHECKING:
    from mycel.compute.train.grouped import GroupPeers

JOIN_S = 30.0
"""How long to look for a first member."""


class Swarm:
    """A swarm, as a script is in it. Made by `join`."""

    def __init__(self, node: Node, nursery: trio.Nursery) -> None:
        self._node = node
        self._nursery = nursery
        self._trio = trio.lowlevel.current_trio_token()

    @property
    def peer_id(self) -> str:
        """This script's peer id."""
        return self._node.host.peer_id

    @property
    def peers(self) -> list[str]:
        """Ids of the members that it is connected with, ordered."""
        return sorted(self._node.host.peers)

    @contextmanager
    def group(self, name: str, *, least: int = 1, quorum: str = "majority") -> Iterator[GroupPeers]:
        """Be in the group `name` as long as the block lasts; whoever names the same group is in it too.

        With fewer than `least` members nothing begins. `quorum` "majority": of two parts that do not see each
        other the larger goes on; "any": both do, and the longer history counts when they meet.
        """
        entered: Future[tuple[GroupPeers, trio.Event]] = Future()
        left: Future[None] = Future()
        hold = partial(self._hold_group, name, least, quorum, entered, left)
        trio.from_thread.run_sync(self._nursery.start_soon, hold, trio_token=self._trio)
        peers, leave = entered.result()
        try:
            yield peers
        finally:
            with contextlib.suppress(trio.RunFinishedError):  # the node has ended, and its groups with it
                trio.from_thread.run_sync(leave.set, trio_token=self._trio)
            left.result()

    async def _hold_group(
        self,
        name: str,
        least: int,
        quorum: str,
        entered: Future[tuple[GroupPeers, trio.Event]],
        left: Future[None],
    ) -> None:
        from mycel.compute.train.grouped import GroupPeers

        try:
            together = self._node.together.group(name, least=least, quorum=quorum)
            async with together as (group, state), trio.open_nursery() as nursery:
                leave = trio.Event()
                entered.set_result((GroupPeers(group, state, nursery), leave))
                await leave.wait()
                nursery.cancel_scope.cancel()
        except BaseException as error:  # why: the script's thread waits for one of the two; raised again
            if not entered.done():
                entered.set_exception(error)
            raise
        finally:
            left.set_result(None)


@contextmanager
def join(ticket: str, *, label: str = "script", **settings: Any) -> Iterator[Swarm]:
    """Be a member of the ticket's swarm as long as the block lasts.

    `settings` are those of `mycel.node.config.Config`, `preset` among them. Raises `TicketError`,
    `ConfigError`; `DeadlineExceeded` where no member answers within 30 s.
    """
    preset = PRESETS.get(settings.get("preset", "lan"), {})
    with tempfile.TemporaryDirectory(prefix="mycel-") as home:
        chosen = {**preset, "assign": False, "jobs": False, "probe": "off", "label": label, **settings}
        config = Config(**{**chosen, "home": Path(home)}).validate()
        begun: Future[tuple[Swarm, trio.Event]] = Future()
        main = partial(_be_node, config, ticket, begun)
        thread = threading.Thread(target=_run, args=(main, begun), name="mycel", daemon=True)
        thread.start()
        try:
            swarm, stop = begun.result()
            try:
                yield swarm
            finally:
                with contextlib.suppress(trio.RunFinishedError):  # it has ended by itself
                    trio.from_thread.run_sync(stop.set, trio_token=swarm._trio)
        finally:
            thread.join()


def _run(main: Any, begun: Future[tuple[Swarm, trio.Event]]) -> None:
    try:
        trio.run(main)
    except BaseException as error:  # boundary: the script's thread hears of it, whatever it is
        if begun.done():
            raise
        begun.set_exception(single_failure(error) or error)


async def _be_node(config: Config, text: str, begun: Future[tuple[Swarm, trio.Event]]) -> None:
    ticket = parse_ticket(text)
    network = Transports(TcpNetwork())
    key = OwnKey(network.entropy(32))
    credentials = Credentials(key.peer_id, ticket.root, ticket.chain_for(key.peer_id))
    lanes = socket_lanes(config.lane_bytes_per_s)
    papers = daemon.Papers(key, credentials, bootstrap=ticket.bootstrap, open_lanes=lanes)
    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        node: Node = await nursery.start(daemon.run, config, network, _lends_nothing, papers)
        with trio.move_on_after(JOIN_S):
            await node.gather.joined.wait()
        if not node.gather.joined.is_set():
            raise node.gather.refused or DeadlineExceeded(
                f"no member of the swarm answered within {JOIN_S:.0f} s: is a node of it running, and can "
                "this machine reach it? A fresh ticket has fresh addresses (`mycel ticket`)"
            )
        begun.set_result((Swarm(node, nursery), stop))
        await stop.wait()
        node.stop()
        await node.ended.wait()
        nursery.cancel_scope.cancel()


def _lends_nothing() -> Any:
    raise LocalProtocolError("a node in a script lends no layers: run `mycel serve` beside it")
