"""The lab itself: latency, bulk, isolation, and that nothing of it outlives its maker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trio
from netlab.internet import RTT_S
from netlab.lab import Lab, kind
from netlab.probe import echo, mapped, tcp
from netlab.space import LabError, Space

BULK_BYTES = 16 << 20

MAKER = """
import os
import sys
sys.path.insert(0, sys.argv[1])
from netlab.boxes import KINDS
from netlab.lab import Lab, kind
lab = Lab()
site = lab.site("doomed", KINDS[7])
lab.open()
child = site.home.start(["sleep", "600"])
spaces = [os.fstat(space.fd).st_ino for space in (site.home, *site.boxes)]
print(child.pid, lab._internet._process.pid, *spaces, flush=True)
sys.stdin.read()
"""


def namespaces() -> set[int]:
    """Inodes of the network namespaces that a process or a name of this machine holds."""
    found = set()
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            try:
                found.add(os.stat(process / "ns" / "net").st_ino)
            except OSError:
                continue
    named = Path("/run/netns")
    return found | {entry.stat().st_ino for entry in (named.iterdir() if named.exists() else ())}


async def test_the_wire_is_as_long_as_it_says() -> None:
    with Lab() as lab:
        one, two = lab.public("one"), lab.public("two")
        lab.open()
        async with trio.open_nursery() as nursery:
            await nursery.start(echo, one.home, 1)
            took = []
            for _ in range(9):
                with tcp(two.home) as sock:
                    began = trio.current_time()
                    await sock.connect((one.addr, 1))
                    took.append(trio.current_time() - began)
            nursery.cancel_scope.cancel()
        assert min(took) >= RTT_S
        assert min(took) < 1.5 * RTT_S


async def test_a_bulk_transfer_arrives_as_it_was_sent() -> None:
    sent = os.urandom(1 << 16) * (BULK_BYTES >> 16)
    with Lab() as lab:
        one, two = lab.public("one"), lab.site("home", kind("carrier"))
        lab.open()
        got = bytearray()
        listener = tcp(one.home, 5001)
        listener.listen(1)

        async def receive() -> None:
            peer, _ = await listener.accept()
            with peer:
                while data := await peer.recv(1 << 18):
                    got.extend(data)

        with listener, trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(receive)
                with tcp(two.home) as sock:
                    await sock.connect((one.addr, 5001))
                    await trio.SocketStream(sock).send_all(sent)
        assert got == sent


async def test_no_packet_leaves_and_strays_are_counted() -> None:
    with Lab() as lab:
        known, home = lab.public("known"), lab.site("home", kind("port"))
        lab.open()
        async with trio.open_nursery() as nursery:
            await nursery.start(echo, known.home, 1)
            addr, sock = await mapped(home.home, 0, (known.addr, 1))
            sock.close()
            nursery.cancel_scope.cancel()
        assert addr[0] == home.outer
        assert lab.unknown() == {}
        with tcp(home.home) as sock, trio.move_on_after(0.2):
            await sock.connect(("198.51.100.1", 80))
        assert list(lab.unknown()) == ["198.51.100.1/6"]
        assert home.home.do(lambda: os.listdir("/sys/class/net")) != []
        devices = home.home.command("ip", "-o", "link").splitlines()
        assert [line.split()[1].partition("@")[0] for line in devices] == ["lo:", "eth"]


def test_nothing_outlives_a_maker_that_is_killed() -> None:
    script = [sys.executable, "-c", MAKER, str(Path(__file__).parent)]
    with subprocess.Popen(script, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as maker:
        assert maker.stdout is not None
        child, wire, *made = map(int, maker.stdout.readline().split())
        assert len(set(made)) == 3
        assert made[0] in namespaces()  # the home's, where the child lives
        os.kill(maker.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}/ns/net").exists() for pid in (child, wire)):
        assert time.monotonic() < deadline, "a program of the lab lives on"
        time.sleep(0.05)
    assert not namespaces() & set(made)


def test_a_lab_says_what_is_wrong_with_it() -> None:
    with pytest.raises(LabError, match="without latency"):
        Lab(rtt_s=0.0)
    space = Space("bare")
    try:
        with pytest.raises(LabError, match=r"nft .* in bare: .*syntax error"):
            space.command("nft", "-f", "-", text="table ip {")
    finally:
        space.close()
