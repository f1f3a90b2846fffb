"""All-reduce over lanes against gloo (torch.distributed), in one run: averages of float32 on loopback.

    SIZE.N.encrypted   gloo's seconds / Mycel's, SIZE of data, N processes, AES-128-GCM (the default); the
                       result goes into memory of its own, the input stays as it is
    SIZE.N.in_place    the same, the result in the input's place, which is kept aside until all have voted
    SIZE.N.int8        as encrypted, quantized to 8 bits in blocks of 512
    SIZE.N.plain       as encrypted, without encryption
    SIZE.N.gloo_gb_s   what gloo made of it: gigabytes of the array per second

Mycel's time includes the vote after which a result stands, and keeping every input until then; gloo has
neither. All members must end with the same bytes, in every round of every way, or the benchmark fails. An
operation takes as long as its slowest member; figures are medians of rounds in turns.
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

import trio
from measure import compare, report

WAYS = ("gloo", "encrypted", "in_place", "int8", "plain")
SIZES_MIB = (4, 64, 256)
MEMBERS = (2, 4)
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


async def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--mib", type=int, nargs="*", default=SIZES_MIB)
    parser.add_argument("--members", type=int, nargs="*", default=MEMBERS)
    parser.add_argument("--ways", nargs="*", default=WAYS)
    options = parser.parse_args()
    figures: dict[str, float | int | str | bool | None] = {}
    for count in options.members:
        with members(count) as together:
            for mib in options.mib:
                ways = {way: lambda way=way, mib=mib: together.measure(way, mib) for way in options.ways}
                found = await compare(ways, rounds=ROUNDS.get(mib, 5))
                print(f"{mib} MiB over {count}:\n{found.table('ms', 1e3)}")
                for way in options.ways[1:]:
                    figures[f"{mib}MB.{count}.{way}"] = found.ratio("gloo", way)
                figures[f"{mib}MB.{count}.gloo_gb_s"] = (mib << 20) / found.median("gloo") / 1e9
    report("allreduce", figures)


if __name__ == "__main__":
    trio.run(main)
