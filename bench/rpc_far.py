"""The far end of bench/rpc.py, a process of its own: what it measures against, and Mycel's node.

Prints one line of JSON with the ports, then serves until its input ends.
"""

from __future__ import annotations

import datetime
import ipaddress
import json
import ssl
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import psutil
import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from mycel.node.host import Host
from mycel.node.tcp import TcpNetwork
from mycel.protocol.keys import OwnKey
from mycel.protocol.mesh import Access, Stream
from mycel.protocol.rpc import Call, Kind, Method, Rpc

SINK = "/bench/sink/1"
MESSAGE_BYTES = 128


class Note(msgspec.Struct, array_like=True):
    """The typed message of 128 bytes: as an array it takes 3 bytes of framing and the number 1."""

    number: int
    data: bytes


NOTE = Note(1, bytes(MESSAGE_BYTES - 4))
ECHO = Method("bench.echo", Note, Note)
ECHO_INLINE = Method("bench.echo_inline", Note, Note)
MEET = Method("bench.meet", int, int)
BLOCK = Method("bench.block", float, float)
ITEMS = Method("bench.items", tuple[int, int], bytes, kind=Kind.SERVER_STREAM)
MEMORY = Method("bench.memory", bool, int)


async def echo(call: Call, request: Note) -> Note:
    """Answer with what came, from a task."""
    return request


def echo_inline(call: Call, request: Note) -> Note:
    """Answer with what came, in the connection's reader."""
    return request


def block(call: Call, seconds: float) -> float:
    """Hold a thread."""
    time.sleep(seconds)
    return seconds


async def produce(call: Call, request: tuple[int, int]) -> AsyncIterator[bytes]:
    """That many items of that many bytes."""
    count, size = request
    for _ in range(count):
        yield bytes(size)


class Meeting:
    """Holds every call until as many are here as each of them said, so that all are in flight at once."""

    def __init__(self) -> None:
        self._here = 0
        self._all = trio.Event()

    async def __call__(self, call: Call, wanted: int) -> int:
        self._here += 1
        meeting = self._all
        if self._here == wanted:
            self._here, self._all = 0, trio.Event()
            meeting.set()
        await meeting.wait()
        return wanted


class Memory:
    """Resident bytes: the largest since the last time asked."""

    def __init__(self) -> None:
        self.most = 0

    async def run(self) -> None:
        """Look often."""
        process = psutil.Process()
        while True:
            self.most = max(self.most, process.memory_info().rss)
            await trio.sleep(0.005)

    async def __call__(self, call: Call, forget: bool) -> int:
        most = self.most
        if forget:
            self.most = 0
        return most


async def sink(stream: Stream) -> None:
    """Take bytes to the end of the stream and answer with their number."""
    count = 0
    while data := await stream.receive_some():
        count += len(data)
    await stream.send(count.to_bytes(8, "big"))


async def echo_raw(stream: trio.SocketStream) -> None:
    """128 bytes there and back."""
    while data := await stream.receive_some(65536):
        await stream.send_all(data)


async def sink_raw(stream: trio.abc.Stream) -> None:
    """Announced by 8 bytes, so many bytes; answered with 8."""
    while head := await stream.receive_some(8):
        left = int.from_bytes(head, "big")
        while left:
            left -= len(await stream.receive_some(min(left, 1 << 20)))
        await stream.send_all(head)


def certificate(folder: Path) -> tuple[Path, Path]:
    """(certificate, key) for 127.0.0.1, self-signed."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bench")])
    now = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    paths = folder / "cert.pem", folder / "key.pem"
    paths[0].write_bytes(built.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return paths


async def serve_raw(nursery: trio.Nursery, folder: Path) -> dict[str, int | str]:
    """Raw TCP echo and sink, and a TLS 1.3 sink. Returns their ports."""
    cert, key = certificate(folder)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(cert, key)

    async def sink_tls(stream: trio.SocketStream) -> None:
        await sink_raw(trio.SSLStream(stream, context, server_side=True, https_compatible=True))

    ports: dict[str, int | str] = {"cert": str(cert)}
    for name, handler in (("echo", echo_raw), ("sink", sink_raw), ("tls", sink_tls)):
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, handler, listeners)
        ports[name] = listeners[0].socket.getsockname()[1]
    return ports


async def serve_mycel(nursery: trio.Nursery) -> str:
    """Mycel's node. Returns its address."""
    host = Host(
        TcpNetwork(), OwnKey(b"\2" * 32), listen=["/ip4/127.0.0.1/tcp/0"], default_access=Access.MEMBER
    )
    rpc = Rpc(host)
    memory = Memory()
    rpc.serve(ECHO, echo)
    rpc.serve(ECHO_INLINE, echo_inline, inline=True)
    rpc.serve(MEET, Meeting())
    rpc.serve(BLOCK, block)
    rpc.serve(ITEMS, produce)
    rpc.serve(MEMORY, memory)
    host.serve_stream(SINK, sink)
    await nursery.start(host.run)
    await nursery.start(rpc.run)
    nursery.start_soon(memory.run)
    return str(host.listen_addrs[0])


async def main() -> None:
    """Serve until standard input ends."""
    with tempfile.TemporaryDirectory() as folder:
        async with trio.open_nursery() as nursery:
            said: dict[str, int | str] = await serve_raw(nursery, Path(folder))
            said["mycel"] = await serve_mycel(nursery)
            print(json.dumps(said), flush=True)
            await trio.to_thread.run_sync(sys.stdin.read)
            nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main)
