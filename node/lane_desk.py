"""Has lanes set up with peers: asks for them, is asked, dials, listens. `mycel.node.lanes` has the use."""

from __future__ import annotations

import hmac
import logging
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from mycel.node import lane_setup as setup
from mycel.node.lane_wire import SHARE_BYTES, TOKEN_BYTES, LaneKeys, derive_keys
from mycel.protocol.address import endpoint_of
from mycel.protocol.errors import AddressError, LimitExceeded, MycelError, Refused, RemoteProtocolError
from mycel.protocol.limits import LaneLimits
from mycel.protocol.mesh import Mesh, PathKind, PeerId
from mycel.protocol.rpc import Call, Rpc

if TYPE_CHECKING:
    from trio._core._run import TaskStatus

log = logging.getLogger("mycel.lanes")

LaneTaker = Callable[[PeerId, socket.socket, bytes | None], None]
"""Gets a peer, a socket that is a lane, not blocking,, and the key it is sealed with (None: not)."""


class LaneDesk:
    """See above. `run` must be running while it is used."""

    def __init__(
        self, mesh: Mesh, rpc: Rpc, limits: LaneLimits, *, is_plain: bool, on_out: LaneTaker, on_in: LaneTaker
    ) -> None:
        """`on_out` gets lanes that this node sends over, `on_in` those that the peer does."""
        self._mesh = mesh
        self._rpc = rpc
        self._limits = limits
        self._is_plain = is_plain
        self._on_out = on_out
        self._on_in = on_in
        self._coming: dict[bytes, setup.Coming] = {}
        self._nursery: trio.Nursery | None = None
        self.port = 0
        rpc.serve(setup.OPEN, self._on_open)
        rpc.serve(setup.INVITE, self._on_invite)

    async def run(
        self, host: str, port: int, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Take lanes at `port` (0: any free one) until cancelled. Raises `AddressError` where it is taken."""
        listener = setup.listen(host, port)
        self.port = int(listener.getsockname()[1])
        gate = trio.CapacityLimiter(setup.HELLOS_MAX)
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                task_status.started()
                while True:
                    await gate.acquire_on_behalf_of(sock := (await listener.accept())[0])
                    nursery.start_soon(self._take_dial, sock, gate)
        finally:
            self._nursery = None
            listener.close()

    def host_of(self, peer: PeerId) -> str | None:
        """The IP address at which `peer` is connected directly, None where it is not."""
        info = self._mesh.peers.get(peer)
        if info is None or info.path is not PathKind.DIRECT:
            return None
        try:
            endpoint = endpoint_of(info.addr)
        except AddressError:  # a web address, say
            return None
        return None if endpoint.is_name else endpoint.host

    async def ask(self, peer: PeerId, host: str, count: int) -> None:
        """Get `count` lanes towards `peer`; those that it dials itself come later.

        Raises `MycelError`, `OSError` or `trio.TooSlowError` where there are none.
        """
        own = self._mesh.peer_id
        share = self._mesh.entropy(SHARE_BYTES)
        request = setup.OpenLanes(share, count, self._is_plain)
        reply = await self._rpc.call(peer, setup.OPEN, request, deadline_s=self._limits.setup_s)
        setup.check_share(reply.share, reply.token)
        keys = self._keys((share, reply.share), own, peer, count)
        dialled = 0
        try:
            with trio.fail_after(self._limits.setup_s / 2):
                for lane, key in enumerate(keys):
                    sock = await setup.dial(host, reply.port, key, reply.token, lane)
                    dialled += 1
                    self._on_out(peer, sock, self._cipher(key))
        except (OSError, RemoteProtocolError, trio.TooSlowError) as error:
            if dialled:
                return
            log.info("cannot dial %s for lanes (%s); asking it to dial", peer, error or "too slow")
            await self._invite(peer, count)

    async def _invite(self, peer: PeerId, count: int) -> None:
        own = self._mesh.peer_id
        share, token = self._mesh.entropy(SHARE_BYTES), self._mesh.entropy(TOKEN_BYTES)
        request = setup.InviteLanes(share, token, self.port, count, self._is_plain)
        coming = self._expect(token)
        reply = await self._rpc.call(peer, setup.INVITE, request, deadline_s=self._limits.setup_s)
        setup.check_share(reply.share)
        keys = self._keys((share, reply.share), own, peer, count)
        coming.settle(setup.Expected(peer, keys, is_incoming=False))

    def _keys(
        self, shares: tuple[bytes, bytes], sender: PeerId, receiver: PeerId, lanes: int
    ) -> tuple[LaneKeys, ...]:
        return tuple(derive_keys(shares, sender, receiver, lane) for lane in range(lanes))

    def _cipher(self, keys: LaneKeys) -> bytes | None:
        return None if self._is_plain else keys.cipher

    # What others ask

    async def _on_open(self, call: Call, request: setup.OpenLanes) -> setup.LanesOpen:
        self._check(request.share, request.lanes, request.is_plain)
        share, token = self._mesh.entropy(SHARE_BYTES), self._mesh.entropy(TOKEN_BYTES)
        keys = self._keys((request.share, share), call.peer, self._mesh.peer_id, request.lanes)
        self._expect(token).settle(setup.Expected(call.peer, keys, is_incoming=True))
        return setup.LanesOpen(share, token, self.port)

    async def _on_invite(self, call: Call, request: setup.InviteLanes) -> setup.LanesInvited:
        self._check(request.share, request.lanes, request.is_plain)
        setup.check_share(request.share, request.token)
        host = self.host_of(call.peer)
        if host is None or self._nursery is None:
            raise Refused("there is no direct path to dial back on", reason="relayed")
        share = self._mesh.entropy(SHARE_BYTES)
        keys = self._keys((request.share, share), call.peer, self._mesh.peer_id, request.lanes)
        self._nursery.start_soon(self._dial_back, call.peer, host, request, keys)
        return setup.LanesInvited(share)

    async def _dial_back(
        self, peer: PeerId, host: str, request: setup.InviteLanes, keys: tuple[LaneKeys, ...]
    ) -> None:
        try:
            with trio.fail_after(self._limits.setup_s):
                for lane, key in enumerate(keys):
                    sock = await setup.dial(host, request.port, key, request.token, lane)
                    self._on_in(peer, sock, self._cipher(key))
        except (OSError, MycelError, trio.TooSlowError) as error:
            log.info("could not dial %s back for lanes: %s", peer, error or "too slow")

    def _check(self, share: bytes, lanes: int, is_plain: bool) -> None:
        setup.check_share(share)
        if not 0 < lanes <= setup.LANES_MAX:
            raise Refused(f"ask for 1 to {setup.LANES_MAX} lanes, not {lanes}", reason="limit")
        if is_plain != self._is_plain:
            raise Refused("the two ends differ in whether lanes are encrypted", reason="encryption")

    # What is dialled here

    def _expect(self, token: bytes) -> setup.Coming:
        if len(self._coming) >= setup.EXPECTED_MAX or self._nursery is None:
            raise LimitExceeded(f"{setup.EXPECTED_MAX} calls for lanes wait for their sockets; ask later")
        coming = self._coming[token] = setup.Coming()
        self._nursery.start_soon(self._forget, token)
        return coming

    async def _forget(self, token: bytes) -> None:
        await trio.sleep(self._limits.setup_s)
        self._coming.pop(token, None)

    async def _take_dial(self, sock: trio.socket.SocketType, gate: trio.CapacityLimiter) -> None:
        try:
            with trio.fail_after(self._limits.setup_s):
                token, lane, mark = await setup.read_hello(sock)
                coming = self._coming.get(token)
                if coming is None:
                    raise RemoteProtocolError("nobody is expected with this token")
                expected = await coming.known()
                if lane >= len(expected.keys):
                    raise RemoteProtocolError(f"lane {lane} of {len(expected.keys)}")
                keys = expected.keys[lane]
                if not hmac.compare_digest(mark, keys.mark(b"dial", token)):
                    raise RemoteProtocolError("the mark does not hold")
                await setup.send_all(sock, keys.mark(b"take", token))
        except (OSError, RemoteProtocolError, trio.TooSlowError) as error:
            log.debug("a socket at the lane port was closed: %s", error)
            sock.close()
            return
        except BaseException:  # why: a cancelled hello closes its socket too; raised again
            sock.close()
            raise
        finally:
            gate.release_on_behalf_of(sock)
        take = self._on_in if expected.is_incoming else self._on_out
        take(expected.peer, setup.detached(sock), self._cipher(keys))
