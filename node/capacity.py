"""What this machine can do, measured and told: its devices, its memory, its line.

- **Devices**: products in fp32 and bf16 and the reading of memory, by a child process at the lowest priority
  (`mycel.compute.capacity`); some time after the start, when nobody generates, and again when it is a week
  old or the machine is another one. A generation that begins meanwhile ends the child at once.
- **The line**: up and down, by a few megabytes to and from two neighbours (`mycel.node.throughput`), those
  outside this house first; every hour, and when this node's addresses change. The better of the two counts:
  a neighbour's line may be the narrower one. Round trips are those that the connections measure anyway.

A node that only this machine can reach measures nothing unless told to: where several share a machine, each
would measure the others. What was measured is remembered, stated in this node's document under `capacity/`
where it says something new, and shown of everybody by `mycel status` and `mycel peers`. Free memory changes
by the second; it is shown of this machine only.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, TypeVar

import msgspec
import trio

from mycel.compute.capacity import Measured
from mycel.compute.device import Machine, probe_machine
from mycel.compute.engine import EngineLost
from mycel.node.memory import Memory
from mycel.node.reach.outward import ip_of, is_outside
from mycel.node.throughput import Throughput
from mycel.node.views import CapacityView, DeviceView
from mycel.protocol.errors import MycelError
from mycel.protocol.mesh import Access, PathKind, PeerId

if TYPE_CHECKING:
    from mycel.node.running import Node

log = logging.getLogger("mycel.node")

PREFIX = "capacity/"
DEVICES_KEY = "capacity/devices"
LINE_KEY = "capacity/line"
REMEMBERED = "capacity"

FIRST_S = 30.0
"""After the start: most who start a node want to use it first."""
LOOK_S = 10.0
"""How often it is looked whether something is due."""
DEVICES_EVERY_S = 7 * 86400.0
LINE_EVERY_S = 3600.0
RETRY_S = 600.0
"""After a measurement that failed."""
BUSY_LOOK_S = 0.2
"""How often a running measurement is weighed against generations."""
NEIGHBOURS = 2
RTTS_MAX = 16
NEWS = 0.25
"""A line that changed by less than this share is the same for others."""

Measure = Callable[[int], Awaitable[Measured]]
"""Measures the devices with so many threads (`mycel.compute.capacity.measure`)."""
T = TypeVar("T")
_Text = Annotated[str, msgspec.Meta(max_length=128)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 60)]
_Rate = Annotated[float, msgspec.Meta(ge=0, le=1e15)]


class Device(msgspec.Struct, frozen=True, array_like=True):
    """As `mycel.compute.capacity.Speed`, without what is free."""

    device: _Text
    name: _Text
    memory_bytes: _Count
    fp32_gflops: _Rate
    bf16_gflops: _Rate
    read_gb_s: _Rate


class Devices(msgspec.Struct, frozen=True, array_like=True):
    """Stated under `capacity/devices`."""

    cores: _Count
    memory_bytes: _Count
    lends_bytes: _Count
    """Memory for weights that it lends."""
    devices: Annotated[tuple[Device, ...], msgspec.Meta(max_length=32)]
    at: _Rate
    """When it was measured, seconds since 1970."""


class Line(msgspec.Struct, frozen=True, array_like=True):
    """Stated under `capacity/line`."""

    up_bytes_per_s: _Rate
    down_bytes_per_s: _Rate
    rtts_ms: Annotated[tuple[tuple[_Text, _Rate], ...], msgspec.Meta(max_length=RTTS_MAX)]
    """Neighbours by their ids, the nearest first."""
    at: _Rate


_devices = msgspec.msgpack.Decoder(Devices)
_line = msgspec.msgpack.Decoder(Line)


class Capacity:
    """The service, over a running node."""

    def __init__(self, node: Node, memory: Memory) -> None:
        self._node = node
        self._memory = memory
        self.throughput = Throughput(node.host)
        self.devices: Devices | None = None
        self.line: Line | None = None
        self.machine: Machine | None = None
        """As last looked at, with what is free."""
        self._places: tuple[str, ...] = ()
        self._not_before = 0.0

    async def run(self, measure: Measure) -> None:
        """Measure what is due, until cancelled."""
        config = self._node.config
        if config.probe == "off" or (config.probe == "auto" and self._node.reach.is_local):
            return
        self._recall()
        await trio.sleep(0 if config.probe == "on" else FIRST_S)
        while True:
            self.machine = await probe_machine()
            if trio.current_time() >= self._not_before and not self.is_busy():
                try:
                    await self._measure_due(measure)
                except (MycelError, EngineLost, OSError) as error:
                    log.warning("capacity is not measured: %s", error)
                    self._not_before = trio.current_time() + RETRY_S
            self._state()
            await trio.sleep(LOOK_S)

    def is_busy(self) -> bool:
        """Whether this node has a part in a generation."""
        return any(stage.sessions for stage in self._node.stages.stages)

    async def _measure_due(self, measure: Measure) -> None:
        now, machine = self._node.host.wall(), self.machine
        assert machine is not None
        known = self.devices
        if (
            known is None
            or abs(now - known.at) > DEVICES_EVERY_S
            or (known.cores, known.memory_bytes) != (machine.cores, machine.memory_bytes)
        ):
            await self._measure_devices(measure, machine)
        places, line = tuple(map(str, self._node.host.told_addrs)), self.line
        if self.is_busy():
            return
        if line is None or abs(now - line.at) > LINE_EVERY_S or places != self._places:
            self._places = places
            await self.measure_line()

    async def _measure_devices(self, measure: Measure, machine: Machine) -> None:
        """Measure unless a generation begins; then later."""
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._give_way, nursery.cancel_scope)
            try:
                self.devices = self._devices_of(await measure(self._node.config.threads), machine)
            except (EngineLost, OSError) as error:
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        self._keep()

    def _devices_of(self, measured: Measured, machine: Machine) -> Devices:
        return Devices(
            machine.cores,
            machine.memory_bytes,
            self._node.config.memory_bytes,
            tuple(
                Device(
                    one.device,
                    one.name[:128],
                    one.memory_bytes if one.device != "cpu" else machine.memory_bytes,
                    one.fp32_gflops,
                    one.bf16_gflops,
                    one.read_gb_s,
                )
                for one in measured.speeds
            ),
            self._node.host.wall(),
        )

    async def _give_way(self, scope: trio.CancelScope) -> None:
        while not self.is_busy():  # noqa: ASYNC110 sessions have no event to offer
            await trio.sleep(BUSY_LOOK_S)
        scope.cancel()

    async def measure_line(self) -> Line | None:
        """Time the line to the best neighbours; None where there is nobody to ask, or nobody answers."""
        found = []
        neighbours = self._neighbours()
        for peer in neighbours:
            try:
                found.append(await self.throughput.measure(peer))
            except MycelError as error:
                log.info("the line to %s is not measured: %s", peer, error)
        if found:
            up, down = max(one[0] for one in found), max(one[1] for one in found)
            self.line = Line(round(up), round(down), self._rtts(), self._node.host.wall())
            self._keep()
        elif neighbours:
            self._not_before = trio.current_time() + RETRY_S
        return self.line

    def _neighbours(self) -> list[PeerId]:
        """Direct ones, those outside this house first, the nearest first."""
        host = self._node.host
        direct = [
            (not is_outside(ip_of(info.addr)), host.rtt(peer) or 1.0, peer)
            for peer, info in host.peers.items()
            if info.path is PathKind.DIRECT and info.access >= Access.MEMBER
        ]
        return [peer for _, _, peer in sorted(direct)[:NEIGHBOURS]]

    def _rtts(self) -> tuple[tuple[str, float], ...]:
        host = self._node.host
        known = [(rtt, peer) for peer in host.peers if (rtt := host.rtt(peer)) is not None]
        return tuple((peer, round(rtt * 1000, 2)) for rtt, peer in sorted(known)[:RTTS_MAX])

    # --- telling

    def _state(self) -> None:
        """Write into this node's document what others do not know yet. Who is no member writes nothing."""
        node = self._node
        if node.membership.own_grant().access < Access.MEMBER:
            return
        own = {
            fact.key: fact.value for fact in node.documents.read(PREFIX) if fact.author == node.host.peer_id
        }
        changes: dict[str, bytes | None] = {}
        if self.devices is not None and own.get(DEVICES_KEY) != (raw := msgspec.msgpack.encode(self.devices)):
            changes[DEVICES_KEY] = raw
        if self.line is not None and is_news(_read(_line, own.get(LINE_KEY)), self.line):
            changes[LINE_KEY] = msgspec.msgpack.encode(self.line)
        if changes:
            node.documents.write(changes)

    def view_of(self, peer: PeerId) -> CapacityView | None:
        """What `peer` states, or this node measured of itself; None where nothing is known."""
        is_own = peer == self._node.host.peer_id
        devices, line = self.devices, self.line
        if not is_own:
            facts = {
                fact.key: fact.value for fact in self._node.documents.read(PREFIX) if fact.author == peer
            }
            devices, line = _read(_devices, facts.get(DEVICES_KEY)), _read(_line, facts.get(LINE_KEY))
        if devices is None and line is None:
            return None
        free = {"cpu": self.machine.memory_free_bytes} if is_own and self.machine else {}
        if is_own and self.machine:
            free |= {one.device: one.memory_free_bytes for one in self.machine.accelerators}
        return CapacityView(
            cores=devices.cores if devices else 0,
            lends_bytes=devices.lends_bytes if devices else 0,
            devices=tuple(
                DeviceView(**msgspec.structs.asdict(one), memory_free_bytes=free.get(one.device))
                for one in (devices.devices if devices else ())
            ),
            up_bytes_per_s=line.up_bytes_per_s if line else None,
            down_bytes_per_s=line.down_bytes_per_s if line else None,
            measured=max(devices.at if devices else 0.0, line.at if line else 0.0),
        )

    # --- remembering

    def _keep(self) -> None:
        try:
            self._memory.put(REMEMBERED, msgspec.json.encode((self.devices, self.line)))
        except OSError as error:
            log.warning("what was measured is not remembered: %s", error)

    def _recall(self) -> None:
        raw = self._memory.get(REMEMBERED)
        try:
            kept = msgspec.json.decode(raw or b"[null,null]", type=tuple[Devices | None, Line | None])
        except (msgspec.MsgspecError, RecursionError):
            return
        self.devices, self.line = kept
        self._places = tuple(map(str, self._node.host.told_addrs))


def is_news(before: Line | None, now: Line) -> bool:
    """Whether a measurement of the line says something that others do not know."""
    if before is None:
        return True
    pairs = ((before.up_bytes_per_s, now.up_bytes_per_s), (before.down_bytes_per_s, now.down_bytes_per_s))
    return any(abs(new - old) > NEWS * max(old, 1.0) for old, new in pairs)


def _read(decoder: msgspec.msgpack.Decoder[T], raw: bytes | None) -> T | None:
    try:
        return None if raw is None else decoder.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
