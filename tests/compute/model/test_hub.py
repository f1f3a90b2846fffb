"""Models by hub id, from a hub on this machine: only what is needed is fetched, what is cached is used."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from mycel.compute.engine import Span, StageSpec
from mycel.compute.model import checkpoint
from mycel.compute.model.card import read_card
from mycel.compute.model.load import load_stage

REVISION = "0123456789abcdef0123456789abcdef01234567"
MODEL = "someone/tiny"


class Hub:
    """The few endpoints of the hub's HTTP API that downloads use, over a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.fetched: list[str] = []
        self.gone = False
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, *, body: bool) -> None:
                if hub.gone:
                    self.close_connection = True
                    return
                path = self.path.partition("?")[0]
                file = hub.directory / path.rpartition("/")[2]
                if path.startswith(f"/api/models/{MODEL}/tree/"):
                    self.reply(200, json.dumps(hub.tree()).encode(), body, {})
                elif path.startswith(f"/api/models/{MODEL}"):
                    self.reply(200, json.dumps(hub.listing()).encode(), body, {})
                elif path.startswith(f"/{MODEL}/resolve/") and file.is_file():
                    raw = file.read_bytes()
                    if body:
                        hub.fetched.append(file.name)
                    marks = {"ETag": f'"{sha256(raw).hexdigest()}"', "X-Repo-Commit": REVISION}
                    self.reply(200, raw, body, marks)
                else:
                    code = "EntryNotFound" if path.startswith(f"/{MODEL}/") else "RepoNotFound"
                    self.reply(404, b"", body, {"X-Error-Code": code})

            def reply(self, status: int, raw: bytes, body: bool, marks: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(raw)), **marks}.items():
                    self.send_header(name, value)
                self.end_headers()
                if body:
                    self.wfile.write(raw)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def tree(self) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": entry.name, "size": entry.stat().st_size, "oid": entry.name}
            for entry in sorted(self.directory.iterdir())
        ]

    def listing(self) -> dict[str, Any]:
        files = [
            {"rfilename": entry.name, "size": entry.stat().st_size}
            for entry in sorted(self.directory.iterdir())
        ]
        return {
            "id": MODEL,
            "modelId": MODEL,
            "sha": REVISION,
            "siblings": files,
            "tags": [],
            "private": False,
        }


@pytest.fixture
def hub(tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub(tiny("llama", layers=6, shard_size="20KB"))
    thread = threading.Thread(target=hub.server.serve_forever, args=(0.02,))
    thread.start()
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield hub
    hub.server.shutdown()
    thread.join()
    hub.server.server_close()


def weights(names: list[str]) -> set[str]:
    return {name for name in names if name.endswith(".safetensors")}


def test_only_the_files_of_the_stage_are_downloaded(hub: Hub) -> None:
    index = checkpoint.read_index(hub.directory / checkpoint.INDEX)
    card = read_card(MODEL)
    assert card.name == MODEL
    assert card.fingerprint == read_card(str(hub.directory)).fingerprint
    assert weights(hub.fetched) == set(), "a card needs no weights"
    stage = load_stage(StageSpec(MODEL, Span(2, 3), device="cpu", threads=1))
    assert weights(hub.fetched) == {index[name] for name in index if name.startswith("model.layers.2.")}
    assert stage.info.card.fingerprint == card.fingerprint
    before = len(hub.fetched)
    load_stage(StageSpec(MODEL, Span(2, 3), device="cpu", threads=1))
    assert weights(hub.fetched[before:]) == set(), "the second time they are here"


def test_a_model_of_one_file_is_downloaded_when_it_is_loaded(hub: Hub, tiny: Callable[..., Path]) -> None:
    hub.directory = tiny("llama")
    read_card(MODEL)
    assert weights(hub.fetched) == set()
    stage = load_stage(StageSpec(MODEL, Span(1, 2), device="cpu", threads=1))
    assert weights(hub.fetched) == {checkpoint.SINGLE}
    assert stage.info.card.fingerprint == read_card(str(hub.directory)).fingerprint


def test_what_is_cached_is_used_when_the_hub_is_gone(hub: Hub) -> None:
    load_stage(StageSpec(MODEL, None, device="cpu", threads=1))
    online = read_card(MODEL)
    hub.gone = True
    assert read_card(MODEL) == online
    load_stage(StageSpec(MODEL, Span(0, 2), device="cpu", threads=1))


def test_all_of_a_model_is_fetched_and_found_again_when_the_hub_is_gone(hub: Hub) -> None:
    directory = checkpoint.fetch_whole(MODEL)
    files = sorted(path.name for path in hub.directory.iterdir())
    assert sorted(path.name for path in directory.iterdir()) == files
    assert read_card(str(directory)).fingerprint == read_card(MODEL).fingerprint
    hub.gone = True
    assert checkpoint.fetch_whole(MODEL) == directory
    with pytest.raises(FileNotFoundError, match="reach the hub, or name a directory"):
        checkpoint.fetch_whole("someone/else")


def test_a_model_the_hub_does_not_have(hub: Hub) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"'someone/else' is no directory, the hub gave no such model"
    ):
        read_card("someone/else")
    with pytest.raises(FileNotFoundError, match="is neither a directory nor a hub id"):
        read_card("not a model!")
