"""Network namespaces that are held by descriptors, not by names.

`ip netns add` leaves a name behind when its maker dies; these namespaces have none. A `Space` is an open
descriptor: when the process that made it ends, however it ends, the kernel takes the namespace down with
all that is in it (interfaces, rules, connections). There is nothing to clean up after a crash, and two labs
at a time cannot meet.

A namespace belongs to a thread, so whatever is to happen inside one happens in a short thread of its own
that never comes back out, or in a child that enters before it becomes the program. A child dies with this
process (`PR_SET_PDEATHSIG`); since the kernel counts the *thread* that started it as the parent, `start` is
for threads that live as long as the lab.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

CLONE_NEWNET = 0x40000000
PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None, use_errno=True)


class LabError(Exception):
    """The lab could not be built. The text holds what the kernel or the tool said."""


class Space:
    """One network namespace. Closing it lets the kernel take it down once its processes have ended."""

    def __init__(self, name: str) -> None:
        """A new namespace with its loopback up and nothing else. `name` is for people. Raises `LabError`."""
        self.name = name
        self.fd = _in_thread(_unshared)
        self.command("ip", "link", "set", "lo", "up")

    def __repr__(self) -> str:
        return f"<Space {self.name} nsenter --net={self.path}>"

    @property
    def path(self) -> str:
        """Where other programs of this user find the namespace while it is open."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    def close(self) -> None:
        """Let go of the namespace."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def do(self, act: Callable[[], T]) -> T:
        """`act()` in a thread inside; what it returns or raises."""

        def inside() -> T:
            enter(self.fd)
            return act()

        return _in_thread(inside)

    def command(self, *command: str, text: str | None = None) -> str:
        """Run a program inside to its end; its output. Raises `LabError` where it fails."""
        return self.do(lambda: _command(self.name, command, text))

    def sysctl(self, values: Mapping[str, str], *, where_there: bool = False) -> None:
        """Set switches below /proc/sys/net, as in {"ipv4/ip_forward": "1"}.

        With `where_there` a switch that this kernel does not have is left out.
        """

        def write() -> None:
            for name, value in values.items():
                path = f"/proc/sys/net/{name}"
                if where_there and not os.path.exists(path):
                    continue
                with open(path, "w", encoding="ascii") as file:
                    file.write(value)

        self.do(write)

    def socket(self, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
        """An IPv4 socket that lives inside; it may be used from anywhere."""
        return self.do(lambda: socket.socket(socket.AF_INET, kind))

    def start(self, command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """Start a program inside that dies with this thread. `options` are `subprocess.Popen`'s."""
        fd = self.fd

        def before() -> None:
            enter(fd)
            die_with_parent()

        return subprocess.Popen(command, preexec_fn=before, text=True, **options)


def enter(fd: int) -> None:
    """Move this thread into the namespace behind `fd`. Raises `OSError`."""
    if _libc.setns(fd, CLONE_NEWNET):
        number = ctypes.get_errno()
        raise OSError(number, f"setns: {os.strerror(number)}")


def die_with_parent() -> None:
    """Have the kernel end this process when the thread that forked it ends."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def missing() -> str | None:
    """Why no lab can be built on this machine; None where one can."""
    if os.name != "posix" or not os.path.exists("/proc/self/ns/net"):
        return "network namespaces are a thing of Linux"
    if os.geteuid() != 0:
        return "building network namespaces takes root"
    for tool, package in (("ip", "iproute2"), ("nft", "nftables")):
        if not any(os.access(f"{folder}/{tool}", os.X_OK) for folder in _folders()):
            return f"{tool} is not installed (Debian: apt-get install {package})"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "/dev/net/tun cannot be opened, and the latency between sites comes from it"
    try:
        space = Space("trial")
    except (LabError, OSError) as error:
        return f"this machine does not let root make network namespaces: {error}"
    try:
        space.command("nft", "add", "table", "ip", "trial")
    except LabError as error:
        return f"this kernel does not take nft's rules: {error}"
    finally:
        space.close()
    return None


def _folders() -> list[str]:
    return [*os.environ.get("PATH", "").split(os.pathsep), "/usr/sbin", "/sbin"]


def _unshared() -> int:
    if _libc.unshare(CLONE_NEWNET):
        number = ctypes.get_errno()
        raise LabError(f"unshare: {os.strerror(number)}")
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _command(name: str, command: Sequence[str], text: str | None) -> str:
    environment = {**os.environ, "PATH": os.pathsep.join(_folders())}
    done = subprocess.run(command, input=text, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise LabError(f"{' '.join(command)} in {name}: {done.stderr.strip()}\n{text or ''}")
    return done.stdout


def _in_thread(act: Callable[[], T]) -> T:
    """`act()` in a thread of its own, which ends there and takes its namespace with it."""
    with ThreadPoolExecutor(1, "netlab") as thread:
        return thread.submit(act).result()
