"""Real processes on loopback, all stopped at the end: `mycel` daemons, each with a home of its own, and
js-libp2p nodes (their program is js/node.mjs)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from mycel.compute.model.tiny import tiny_model
from mycel.compute.tokenizer import byte_level_tokenizer_files

UP_S = 60.0
JS = Path(__file__).parent / "js"


def environment() -> dict[str, str]:
    """This process's, without settings of a node."""
    return {key: value for key, value in os.environ.items() if not key.startswith("MYCEL_")}


class Machine:
    """A home, and the commands that are run on it."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.process: subprocess.Popen[str] | None = None

    def run(self, *command: str, rc: int = 0, text: str | None = None) -> subprocess.CompletedProcess[str]:
        """`mycel COMMAND --home HOME`, which must exit with `rc`; its output."""
        done = subprocess.run(
            [sys.executable, "-m", "mycel", *command, "--home", str(self.home)],
            input=text,
            capture_output=True,
            text=True,
            timeout=90,
            env=environment(),
        )
        assert done.returncode == rc, done.stderr
        assert "Traceback" not in done.stderr
        return done

    def json(self, *command: str) -> Any:
        """The JSON that a command prints."""
        return json.loads(self.run(*command, "--json").stdout)

    def start(self, *command: str) -> dict[str, Any]:
        """Start `mycel up` or `join`; what it says once it is up."""
        options = ("--home", str(self.home), "--preset", "local", "--threads", "1", "--json")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mycel", *command, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        event: dict[str, Any] = json.loads(line)
        assert event["event"] == "up"
        return event

    def stop(self) -> int:
        """SIGTERM, then what it exited with."""
        if self.process is None:
            return 0
        self.process.terminate()
        try:
            self.process.communicate(timeout=15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
        return self.process.returncode


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Callable[[str], Machine]]:
    """`machine("a")`: a machine with a home of that name."""
    machines: dict[str, Machine] = {}

    def get(name: str) -> Machine:
        return machines.setdefault(name, Machine(tmp_path / name))

    yield get
    for one in machines.values():
        one.stop()


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 4 layers that reads and writes bytes."""
    folder = tiny_model(
        tmp_path_factory.mktemp("models") / "tiny",
        seed=3,
        vocab_size=257,
        max_position_embeddings=512,
        eos_token_id=256,
    )
    for name, content in byte_level_tokenizer_files().items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def poll() -> Callable[[Callable[[], Any]], Any]:
    """Ask until the answer is true, at most a minute; returns it."""

    def ask_until(ask: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + UP_S
        while time.monotonic() < deadline:
            if answer := ask():
                return answer
            time.sleep(0.1)
        raise AssertionError("it did not come true within a minute")

    return ask_until


class JsNode:
    """A running js-libp2p node."""

    def __init__(self, process: trio.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._stdin = process.stdin
        self._stdout = process.stdout
        self._held = b""
        self.addr = ""

    async def answer(self) -> Any:
        """The next line it prints."""
        while b"\n" not in self._held:
            piece = await self._stdout.receive_some()
            assert piece, "the js node ended"
            self._held += piece
        line, _, self._held = self._held.partition(b"\n")
        return json.loads(line)

    async def ask(self, command: dict[str, Any]) -> Any:
        """Its answer to `command`."""
        await self._stdin.send_all(json.dumps(command).encode() + b"\n")
        answer = await self.answer()
        assert "error" not in answer, answer["error"]
        return answer


@pytest.fixture(scope="session")
def js_node() -> Callable[..., AbstractAsyncContextManager[JsNode]]:
    """`async with js_node(...) as js`: a js-libp2p node, with the options of js/node.mjs.

    Skips where node or npm is missing, or the packages of package-lock.json are not there and do not come.
    """
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are needed for the interop test with js-libp2p; install node 20 or newer")
    installed, wanted = JS / "node_modules" / ".package-lock.json", JS / "package-lock.json"
    if not installed.exists() or installed.stat().st_mtime < wanted.stat().st_mtime:
        done = subprocess.run(
            ["npm", "ci", "--no-audit", "--no-fund"], cwd=JS, capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"npm ci failed in {JS.name}/: {done.stderr.strip()[-300:]}")

    @asynccontextmanager
    async def start(**options: Any) -> AsyncIterator[JsNode]:
        process = await trio.lowlevel.open_process(
            ["node", str(JS / "node.mjs"), json.dumps(options)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            node = JsNode(process)
            node.addr = (await node.answer()).get("listen", "")
            yield node
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()

    return start
