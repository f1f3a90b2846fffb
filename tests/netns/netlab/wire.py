"""The internet between the sites: a program that carries packets from one TUN device to another, later.

Every site's way out is a TUN device whose other end this program holds. What a site sends arrives here as an
IP packet; by its destination it goes to another device's queue, due after the two sites' distances, and is
written there in time. A packet to an address that nobody has is dropped and counted. Queues never
overflow and never reorder: this is a wire, not a model of congestion.

Packets carry the kernel's offload header (IFF_VNET_HDR with TSO), so a bulk transfer crosses in pieces of up
to 64 KiB and a checksum is filled in only where somebody looks. The kernel's own delay queue (netem) is not
there on many machines; that is why this exists.

Run as `python wire.py`: after one line of JSON on standard input, {"ends": [{"fd", "addrs", "distance_s"}]},
it works until its input ends, and answers every further line with what it has counted. It asks for a
real-time priority, for the world must not slow down because the players in it are busy.
"""

from __future__ import annotations

import contextlib
import gc
import heapq
import ipaddress
import json
import os
import select
import sys
import time
from collections import Counter
from dataclasses import dataclass

VNET_HEADER_BYTES = 10
READ_BYTES = VNET_HEADER_BYTES + 65536
BATCH = 64
"""Packets taken from one device before the due ones are looked after again."""
UNKNOWN_MAX = 256
"""Destinations that nobody has and that are still told apart."""


@dataclass(frozen=True, slots=True)
class End:
    """One TUN device."""

    fd: int
    distance_s: float


class Wire:
    """Packets under way."""

    def __init__(self, ends: dict[bytes, End]) -> None:
        """`ends`: which device leads to an IP address (4 or 16 bytes)."""
        self._ends = ends
        self._distance_s = {end.fd: end.distance_s for end in ends.values()}
        self._due: list[tuple[float, int, int, bytes]] = []
        self._count = 0
        self.unknown: Counter[str] = Counter()
        """Packets by destination that nobody has, as ADDRESS/PROTOCOL NUMBER."""

    @property
    def fds(self) -> list[int]:
        """The devices."""
        return list(self._distance_s)

    def take(self, fd: int) -> None:
        """Read what a site has sent and queue it."""
        now = time.monotonic()
        for _ in range(BATCH):
            try:
                packet = os.read(fd, READ_BYTES)
            except BlockingIOError:
                return
            to, protocol = destination(packet)
            end = self._ends.get(to)
            if end is None:
                self._drop(to, protocol)
                continue
            self._count += 1
            heapq.heappush(
                self._due, (now + self._distance_s[fd] + end.distance_s, self._count, end.fd, packet)
            )

    def _drop(self, to: bytes, protocol: int) -> None:
        name = f"{ipaddress.ip_address(to)}/{protocol}" if to else "not IP"
        if name in self.unknown or len(self.unknown) < UNKNOWN_MAX:
            self.unknown[name] += 1

    def deliver(self) -> float | None:
        """Write what is due; seconds until the next is, None when nothing is under way."""
        while self._due:
            wait = self._due[0][0] - time.monotonic()
            if wait > 0:
                return wait
            _, _, fd, packet = heapq.heappop(self._due)
            # A full device queue or a device that is down drops the packet, as a router does.
            with contextlib.suppress(OSError):
                os.write(fd, packet)
        return None

    def tell(self) -> str:
        """What was counted, as a line of JSON."""
        return json.dumps({"carried": self._count, "unknown": self.unknown})


def destination(packet: bytes) -> tuple[bytes, int]:
    """(destination address, protocol) of an IPv4 or IPv6 packet behind its offload header."""
    start = VNET_HEADER_BYTES
    version = packet[start] >> 4 if len(packet) > start else 0
    if version == 4:
        return packet[start + 16 : start + 20], packet[start + 9]
    if version == 6:
        return packet[start + 24 : start + 40], packet[start + 6]
    return b"", 0


def main() -> None:
    """Carry until standard input ends."""
    told = json.loads(sys.stdin.readline())
    ends = {
        ipaddress.ip_address(addr).packed: End(one["fd"], one["distance_s"])
        for one in told["ends"]
        for addr in one["addrs"]
    }
    wire = Wire(ends)
    for fd in wire.fds:
        os.set_blocking(fd, False)
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    gc.disable()
    control = sys.stdin.fileno()
    watched = [*wire.fds, control]
    print("{}", flush=True)
    while True:
        # select, not epoll: its timeout counts in microseconds.
        for fd in select.select(watched, (), (), wire.deliver())[0]:
            if fd != control:
                wire.take(fd)
            elif not os.read(control, 4096):
                print(wire.tell(), flush=True)
                return
            else:
                print(wire.tell(), flush=True)


if __name__ == "__main__":
    main()
