"""A real node: the daemon over TCP, with its home on disk, workers for engines, faces and signals.

What `mycel.node.daemon` takes from its caller is made here: the network, keys and membership from the home,
worker processes. One node per home: a lock file sees to that. SIGINT and SIGTERM let the node leave in
order; a second one ends it at once.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import msgspec
import trio
from multiaddr import Multiaddr

from mycel.compute.capacity import measure
from mycel.compute.device import plan_budget, probe_machine
from mycel.compute.process import WorkerOptions
from mycel.compute.train.trainer import SERVE, start_trainer
from mycel.compute.worker import start_worker
from mycel.node import daemon
from mycel.node.blocks import store_in
from mycel.node.config import Config
from mycel.node.docdisk import DiskStore
from mycel.node.memory import FolderMemory, Memory
from mycel.node.running import Node
from mycel.node.tcp import TcpNetwork
from mycel.node.tls import server_context
from mycel.node.together import socket_lanes
from mycel.node.transports import Transports
from mycel.node.trust import Trust, join_swarm, open_trust
from mycel.node.web import serve_web
from mycel.protocol.errors import MycelError
from mycel.protocol.network import Network
from mycel.protocol.ticket import parse_ticket

log = logging.getLogger("mycel.node")

LOCK_FILE = "lock"
DOCUMENTS_FILE = "documents.db"
BLOCKS_FOLDER = "blocks"
BOOTSTRAP = "bootstrap"
"""What the ticket's addresses are remembered under."""
JOIN_S = 10.0
"""How long a joining node looks for its swarm before it says that nobody answers (and goes on looking)."""


class HomeInUse(MycelError):
    """Another node runs in this home."""


@dataclass(frozen=True, slots=True)
class Watcher:
    """Who hears how the start goes."""

    on_up: Callable[[Node], None]
    """The node listens, and its faces answer."""
    on_alone: Callable[[Node], None]
    """A joining node found nobody so far; it goes on looking."""
    on_leaving: Callable[[], None]
    """A signal, or `mycel down`."""


async def run(config: Config, watcher: Watcher, *, ticket: str | None = None, leave: bool = False) -> None:
    """Be a node until told to stop. With `ticket` its swarm is joined first; `leave` gives up another.

    Raises `HomeInUse`, `TicketError`, `TrustError`, `KeyFileError`, `ConfigError`, `AddressError`,
    `UsageProblem` for documents on disk that cannot be read; `Refused` for a ticket that is over, and when
    the swarm does not let a joining node in.
    """
    with locked(config.home):
        network = Transports(TcpNetwork(), server_tls=_server_tls(config))
        memory = FolderMemory(config.home)
        trust, bootstrap = _settle_trust(config, network, memory, ticket, leave)
        store = await DiskStore.open(config.home / DOCUMENTS_FILE)
        blocks = partial(store_in, config.home / BLOCKS_FOLDER, config.blocks_bytes_max)
        papers = daemon.Papers(
            trust.identity,
            trust.credentials,
            trust.keep,
            memory,
            bootstrap,
            store,
            blocks,
            socket_lanes(config.lane_bytes_per_s),
            partial(start_trainer, WorkerOptions(dict(os.environ), serve=SERVE, threads=config.threads)),
        )
        if not config.label:
            config = replace(config, label=socket.gethostname())
        if not config.memory_bytes:
            budget = plan_budget(await probe_machine(), device=config.device)
            config = replace(config, memory_bytes=budget.weight_bytes)
        options = WorkerOptions(environment=dict(os.environ))
        async with trio.open_nursery() as nursery:
            await nursery.start(store.run)
            node: Node = await nursery.start(
                daemon.run, config, network, partial(start_worker, options), papers
            )
            await nursery.start(serve_web, node, memory)
            await _start_neighbourly(node, nursery)
            nursery.start_soon(node.capacity.run, partial(measure, options.environment))
            watcher.on_up(node)
            nursery.start_soon(_heed_signals, node, nursery.cancel_scope)
            if ticket is not None:
                await _await_swarm(node, watcher)
            await node.stopping.wait()
            watcher.on_leaving()
            await node.ended.wait()
            nursery.cancel_scope.cancel()


@contextmanager
def locked(home: Path) -> Iterator[None]:
    """Hold the home for this process. Raises `HomeInUse`."""
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(home / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise HomeInUse(
            f"the home {home} cannot be written: {error.strerror}; name another by --home"
        ) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HomeInUse(
                f"a node is running in {home} already: see `mycel status`, stop it with `mycel down`, "
                "or give this one a home of its own with --home"
            ) from None
        yield
    finally:
        os.close(descriptor)


async def _start_neighbourly(node: Node, nursery: trio.Nursery) -> None:
    """The services that speak to the house this machine is in; their libraries are loaded when needed."""
    if node.reach.is_local:
        return
    if node.config.mdns:
        from mycel.node.reach.lan import Lan

        await nursery.start(Lan(node).run)
    if node.config.port_mapping:
        from mycel.node.reach.gateway import PortMapper

        await nursery.start(PortMapper(node).run)


def _server_tls(config: Config) -> ssl.SSLContext | None:
    if not config.web_certificate:
        return None
    return server_context(Path(config.web_certificate).expanduser(), Path(config.web_key).expanduser())


def _settle_trust(
    config: Config, network: Network, memory: Memory, ticket: str | None, leave: bool
) -> tuple[Trust, tuple[Multiaddr, ...]]:
    now, entropy = network.wall(), network.entropy
    if ticket is None:
        try:
            known = msgspec.json.decode(memory.get(BOOTSTRAP) or b"[]", type=list[str])
        except msgspec.DecodeError:
            known = []
        trust = open_trust(config.home, now=now, entropy=entropy)
        return trust, tuple(Multiaddr(addr) for addr in known)
    parsed = parse_ticket(ticket)
    trust = join_swarm(config.home, parsed, now=now, entropy=entropy, leave=leave)
    memory.put(BOOTSTRAP, msgspec.json.encode([str(addr) for addr in parsed.bootstrap]))
    return trust, parsed.bootstrap


async def _await_swarm(node: Node, watcher: Watcher) -> None:
    """Wait for the first member. Raises `Refused` when the swarm says no; says so when nobody answers."""
    with trio.move_on_after(JOIN_S) as scope:
        await node.gather.joined.wait()
    if scope.cancelled_caught:
        watcher.on_alone(node)
    elif node.gather.refused is not None and not node.status().peers:
        raise node.gather.refused


async def _heed_signals(node: Node, scope: trio.CancelScope) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            if node.stopping.is_set():
                scope.cancel()
                return
            node.stop()
