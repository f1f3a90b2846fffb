"""What SQLite keeps, of what was said to be kept."""

from __future__ import annotations

import random
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mycel.dht.doc.library import Library
from mycel.dht.doc.message import NOWHERE, Part
from mycel.dht.doc.store import SqliteStore
from mycel.protocol.errors import UsageProblem
from mycel.protocol.limits_doc import DocumentLimits

WRITER = Path(__file__).with_name("kill_writer.py")
KILLS = 8
SMALL = DocumentLimits(log_bytes=300)
Signers = Callable[[int], Any]


def open_library(path: Path, signer: Any) -> tuple[Library, SqliteStore]:
    store = SqliteStore(path)
    library = Library(signer, store, lambda *_: True, limits=SMALL)
    library.on_compared()
    return library, store


def whole_of(library: Library, signer: Any) -> Part:
    (part,) = library.since(signer.peer_id, NOWHERE)
    return part


def test_documents_come_back_as_they_were(tmp_path: Path, signer_of: Signers) -> None:
    a, b = signer_of(1), signer_of(2)
    ra, store_a = open_library(tmp_path / "a", a)
    rb, store_b = open_library(tmp_path / "b", b)
    for n in range(40):  # over several editions
        before = ra.write({f"k{n % 4}": b"%d" % n})
        assert before is not None
        for part in ra.since(a.peer_id, before):
            rb.take(part)
    rb.write({"own": b"1"})
    wholes = [whole_of(rb, signer) for signer in (a, b)]
    assert wholes[0] == whole_of(ra, a)
    store_a.close()
    store_b.close()
    again, store = open_library(tmp_path / "b", b)
    assert [whole_of(again, signer) for signer in (a, b)] == wholes
    assert again.refused == {}
    store.close()


def test_a_damaged_document_is_dropped_and_the_others_stay(tmp_path: Path, signer_of: Signers) -> None:
    a, b = signer_of(1), signer_of(2)
    ra, store_a = open_library(tmp_path / "a", a)
    rb, store_b = open_library(tmp_path / "b", b)
    ra.write({"k": b"1"})
    rb.write({"k": b"2"})
    rb.take(whole_of(ra, a))
    store_a.close()
    store_b.close()
    with sqlite3.connect(tmp_path / "b") as database:
        database.execute("UPDATE log SET content = x'00' WHERE author = ?", (a.peer_id,))
    database.close()
    again, store = open_library(tmp_path / "b", b)
    assert again.refused == {"damaged": 1}
    assert [fact.author for fact in again.read("")] == [b.peer_id]
    store.close()
    once_more, store = open_library(tmp_path / "b", b)
    assert once_more.refused == {}
    store.close()


def test_a_file_of_something_else_is_refused_with_advice(tmp_path: Path) -> None:
    (tmp_path / "words").write_bytes(b"these are words, and no database" * 50)
    with pytest.raises(UsageProblem, match="move it away"):
        SqliteStore(tmp_path / "words")
    newer = sqlite3.connect(tmp_path / "newer")
    newer.execute("PRAGMA user_version = 7")
    newer.close()
    with pytest.raises(UsageProblem, match="schema 7"):
        SqliteStore(tmp_path / "newer")


def test_a_failed_save_leaves_nothing_of_the_write(tmp_path: Path, signer_of: Signers) -> None:
    a = signer_of(1)
    ra, store = open_library(tmp_path / "a", a)
    ra.write({"k": b"1"})
    store.close()
    with pytest.raises(UsageProblem, match="room"):
        ra.write({"k": b"2"})
    assert [fact.value for fact in ra.read("")] == [b"1"]


def test_a_log_cut_off_at_any_byte_leaves_a_prefix_of_the_writes(tmp_path: Path, signer_of: Signers) -> None:
    signer = signer_of(1)
    ra, store = open_library(tmp_path / "a", signer)
    states = [{}, *({f"k{n % 4}": b"%d" % n for n in range(max(0, end - 4), end)} for end in range(1, 31))]
    for n in range(30):  # with two compactions
        ra.write({f"k{n % 4}": b"%d" % n})
    database = (tmp_path / "a").read_bytes()
    log = (tmp_path / "a-wal").read_bytes()
    store.close()
    draw = random.Random(5)
    reached = []
    for cut in sorted([0, len(log), *(draw.randrange(len(log)) for _ in range(60))]):
        (tmp_path / "cut").write_bytes(database)
        (tmp_path / "cut-wal").write_bytes(log[:cut])
        library, store = open_library(tmp_path / "cut", signer)
        assert library.refused == {}
        reached.append(states.index({fact.key: fact.value for fact in library.read("")}))
        store.close()
        for left in tmp_path.glob("cut*"):
            left.unlink()
    assert reached == sorted(reached)
    assert (reached[0], reached[-1]) == (0, 30)


@pytest.mark.slow
def test_every_acknowledged_write_survives_sigkill(tmp_path: Path, signer_of: Signers) -> None:
    path = tmp_path / "documents"
    signer = signer_of(1)
    draw = random.Random(11)
    acknowledged = 0
    for _ in range(KILLS):
        with subprocess.Popen([sys.executable, str(WRITER), str(path)], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            first = writer.stdout.readline()
            killer = threading.Timer(draw.uniform(0, 0.05), writer.kill)
            killer.start()
            lines = [first, *writer.stdout]
            killer.join()
        done = [int(line) for line in lines if line.endswith(b"\n")]
        assert done[0] > acknowledged
        acknowledged = done[-1]
        library, store = open_library(path, signer)
        held = {fact.key: int(fact.value or b"0") for fact in library.read("")}
        newest = max(held.values())
        assert newest in (acknowledged, acknowledged + 1)  # one may be kept and not yet said to be
        assert held == {f"k{n % 30}": n for n in range(max(1, newest - 29), newest + 1)}
        store.close()
    assert acknowledged > KILLS
