"""The public side of the lab: who has which address, and the wire between them.

`attach` gives a namespace a device `wan` with a public address; `open` starts the wire over all of them. The
addresses look global (11.0.0.0/8), for what Mycel dials depends on that; no packet ever leaves the machine,
for the wire is no router and the namespaces have no other way out.
"""

from __future__ import annotations

import fcntl
import json
import os
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from netlab.space import LabError, Space, die_with_parent

TUNSETIFF = 0x400454CA
TUNSETOFFLOAD = 0x400454D0
TUNSETVNETHDRSZ = 0x400454D8
IFF_TUN, IFF_NO_PI, IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6 = 0x01, 0x02, 0x04
VNET_HEADER_BYTES = 10
QUEUE_PACKETS = 10_000

RTT_S = 0.040
"""Round trip between any two sites of the lab, unless told otherwise."""

WIRE = Path(__file__).with_name("wire.py")


class Internet:
    """Sites' ways out, and the program that joins them."""

    def __init__(self, rtt_s: float = RTT_S) -> None:
        """`rtt_s`: the round trip between any two sites; zero latency would hide every race."""
        if rtt_s <= 0:
            raise LabError("a lab without latency shows nothing: simultaneous opens would never cross")
        self._distance_s = rtt_s / 4
        self._ends: list[dict[str, Any]] = []
        self._process: subprocess.Popen[str] | None = None

    def attach(self, space: Space, addrs: Sequence[str]) -> None:
        """Give `space` a device `wan` with the first of `addrs`; packets to all of them go there."""
        if self._process is not None:
            raise LabError("the internet is open already: attach every site before")
        fd = space.do(_open_tun)
        self._ends.append({"fd": fd, "addrs": list(addrs), "distance_s": self._distance_s})
        batch = (
            f"link set wan txqueuelen {QUEUE_PACKETS} up\n"
            f"addr add {addrs[0]}/32 dev wan\n"
            "route add default dev wan\n"
        )
        space.command("ip", "-batch", "-", text=batch)

    def open(self) -> None:
        """Start the wire. Call it from a thread that lives as long as the lab. Raises `LabError`."""
        fds = [end["fd"] for end in self._ends]
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(WIRE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=fds,
            preexec_fn=die_with_parent,
        )
        self._ask(json.dumps({"ends": self._ends}))

    def unknown(self) -> dict[str, int]:
        """Packets so far to addresses that nobody has, by ADDRESS/PROTOCOL."""
        found: dict[str, int] = self._ask("")["unknown"]
        return found

    def close(self) -> None:
        """Stop the wire and let the devices go."""
        if self._process is not None:
            self._process.communicate()
            self._process = None
        for end in self._ends:
            os.close(end["fd"])
        self._ends.clear()

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process is not None, "open it first"
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise LabError("the wire has ended")
        told: dict[str, Any] = json.loads(answer)
        return told


def _open_tun() -> int:
    """A new TUN device `wan` in this thread's namespace; it goes when the descriptor is closed."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", b"wan", IFF_TUN | IFF_NO_PI | IFF_VNET_HDR))
        fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("i", VNET_HEADER_BYTES))
        fcntl.ioctl(fd, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6)
    except OSError:
        os.close(fd)
        raise
    return fd
