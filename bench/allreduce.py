"""All-reduce over lanes against gloo (torch.distributed), in one run: averages of float32 on loopback.

    SIZE.N.encrypted   gloo's seconds / Mycel's, SIZE of data, N processes, AES-128-GCM (the default); the
                       result goes into memory of its own, the input stays as it is
    SIZE.N.in_place    the same, the result in the input's place, which is kept aside until all have voted
    SIZE.N.int8        as encrypted, quantized to 8 bits in blocks of 512
    SIZE.N.plain       as encrypted, without encryption
    SIZE.N.gloo_gb_s   what gloo made of it: gigabytes of the array per second
    sim_100ms_fill     two members reduce 256 MiB over simulated lines of 1 Gbit/s and 100 ms, over streams:
                       what a member must send, against what the line carries meanwhile     target >= 0.9

Mycel's operations are those of a `Group`: the time includes the vote after which a result stands, and every
input is kept until then; gloo has neither. All members must end with the same bytes, in every round of every
way, or the benchmark fails. An operation takes as long as its slowest member; figures are medians of rounds
in turns.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import trio
from measure import compare, report

from mycel.compute.collective.mover import RingMover
from mycel.compute.collective.policy import Policy
from mycel.compute.collective.service import Group
from mycel.compute.collective.streams import StreamLanes
from mycel.node.host import Host
from mycel.protocol.keys import OwnKey
from mycel.protocol.limits import MIB
from mycel.protocol.mesh import Access
from mycel.protocol.rpc import Rpc
from mycel.simnet import clock
from mycel.simnet.internet import InternetOptions, internet
from mycel.simnet.link import GIGABIT, LinkOptions
from mycel.simnet.network import SimNetwork

WAYS = ("gloo", "encrypted", "in_place", "int8", "plain")
SIZES_MIB = (4, 64, 256)
MEMBERS = (2, 4)
SIM_MIB = 256
RTT_S = 0.1
Figures = dict[str, float | int | str | bool | None]
ROUNDS = {4: 15, 64: 7, 256: 3}


class Members:
    """Processes that do things together."""

    def __init__(self, processes: list[subprocess.Popen[str]]) -> None:
        self._processes = processes

    def say(self, line: str) -> None:
        """One line to each."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(line + "\n")
            process.stdin.flush()

    def hear(self) -> list[dict[str, Any]]:
        """One line from each."""
        lines = []
        for process in self._processes:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                sys.exit("a member ended; what it said stands above")
            lines.append(json.loads(line))
        return lines

    async def measure(self, way: str, mib: int) -> float:
        """Seconds of one operation, at its slowest member."""
        self.say(json.dumps({"way": way, "mib": mib}))
        heard = self.hear()
        if len({member["sha256"] for member in heard}) != 1:
            sys.exit(f"the members hold different bytes after {way} of {mib} MiB")
        return float(max(member["s"] for member in heard))


@contextmanager
def members(count: int) -> Iterator[Members]:
    """`count` processes, connected with each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    far = str(Path(__file__).with_name("allreduce_far.py"))
    commands = [[sys.executable, far, str(rank), str(count), str(port)] for rank in range(count)]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for command in commands
    ]
    try:
        together = Members(processes)
        addrs = together.hear()
        together.say(json.dumps({name: [addr[name] for addr in addrs] for name in addrs[0]}))
        together.hear()
        yield together
    finally:
        for process in processes:
            assert process.stdin is not None
            process.stdin.close()
            process.terminate()
            process.wait()


async def long_fat_line() -> Figures:
    """Two members over simulated lines of 1 Gbit/s and 100 ms, in virtual time, once windows have grown."""
    line = LinkOptions(latency_s=RTT_S / 4, up_bytes_per_s=GIGABIT, down_bytes_per_s=GIGABIT)
    items = SIM_MIB * MIB // 4
    async with internet(InternetOptions(seed=1, link=line)) as net, trio.open_nursery() as nursery:
        hosts, groups = [], []
        for number in (1, 2):
            machine = net.add(f"n{number}")
            address = f"/ip4/{machine.ips[0]}/tcp/4001"
            key = OwnKey(bytes([number]) * 32)
            host = Host(SimNetwork(machine), key, listen=[address], default_access=Access.MEMBER)
            rpc, lanes = Rpc(host), StreamLanes(host)
            mover = RingMover(host, lanes)
            group = Group(host, rpc, mover, "bench", Policy(least=2, founds=number == 1))
            for service in (host.run, rpc.run, lanes.run, mover.run, group.run):
                await nursery.start(service)
            hosts.append(host)
            groups.append(group)
        await hosts[1].connect(hosts[0].listen_addrs)
        arrays = [np.full(items, number, np.float32) for number in (1, 2)]
        for _ in range(2):
            began = trio.current_time()
            async with trio.open_nursery() as both:
                for group, array in zip(groups, arrays, strict=True):
                    await group.gather_members(2)
                    both.start_soon(group.all_reduce, array)
            took = trio.current_time() - began
        assert (arrays[0] == 1.5).all()
        assert (arrays[1] == 1.5).all()
        nursery.cancel_scope.cancel()
    fill = SIM_MIB * MIB / took / GIGABIT
    print(
        f"{SIM_MIB} MiB over simulated lines of 1 Gbit/s, 100 ms: {took:.2f} s, {fill:.0%} of it", flush=True
    )
    return {"sim_100ms_fill": fill}


async def on_real_sockets() -> Figures:
    """All against gloo; the command line may name a part of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--mib", type=int, nargs="*", default=SIZES_MIB)
    parser.add_argument("--members", type=int, nargs="*", default=MEMBERS)
    parser.add_argument("--ways", nargs="*", default=WAYS)
    options = parser.parse_args()
    figures: Figures = {}
    for count in options.members:
        with members(count) as together:
            for mib in options.mib:
                ways = {way: lambda way=way, mib=mib: together.measure(way, mib) for way in options.ways}
                found = await compare(ways, rounds=ROUNDS.get(mib, 5))
                print(f"{mib} MiB over {count}:\n{found.table('ms', 1e3)}")
                for way in options.ways[1:]:
                    figures[f"{mib}MB.{count}.{way}"] = found.ratio("gloo", way)
                figures[f"{mib}MB.{count}.gloo_gb_s"] = (mib << 20) / found.median("gloo") / 1e9
    return figures


if __name__ == "__main__":
    report("allreduce", {**clock.run(long_fat_line, 1), **trio.run(on_real_sockets)})
