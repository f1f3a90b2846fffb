"""Key files: made whole, guarded, and never believed when something is wrong with them."""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mycel.node import keyfile
from mycel.node.keyfile import (
    IDENTITY,
    SWARM_ROOT,
    KeyFileError,
    create_key,
    load_or_create_seed,
    load_seed,
    write_private,
)

SEED = bytes(range(32))


def a_key(folder: Path) -> Path:
    path = folder / "identity.key"
    create_key(path, IDENTITY, SEED)
    return path


def test_key_file_there_and_back(tmp_path: Path) -> None:
    path = a_key(tmp_path)
    assert load_seed(path, IDENTITY) == SEED
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["identity.key"]


def test_home_is_made_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "new" / "home" / "identity.key"
    create_key(path, IDENTITY, SEED)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_umask_cannot_open_the_key_to_others(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        path = a_key(tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_existing_key_is_never_overwritten(tmp_path: Path) -> None:
    path = a_key(tmp_path)
    with pytest.raises(FileExistsError):
        create_key(path, IDENTITY, bytes(32))
    assert load_seed(path, IDENTITY) == SEED
    assert os.listdir(tmp_path) == ["identity.key"]


def test_key_is_made_once_and_loaded_ever_after(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    first = load_or_create_seed(path, IDENTITY, os.urandom)
    assert load_or_create_seed(path, IDENTITY, os.urandom) == first


def test_nodes_that_start_at_once_agree_on_the_key(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    gate = threading.Barrier(8)
    seeds: list[bytes] = []

    def start() -> None:
        gate.wait()
        seeds.append(load_or_create_seed(path, IDENTITY, os.urandom))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seeds == [load_seed(path, IDENTITY)] * 8


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666, 0o620])
def test_key_open_to_others_is_refused_with_the_command_that_helps(tmp_path: Path, mode: int) -> None:
    path = a_key(tmp_path)
    path.chmod(mode)
    with pytest.raises(KeyFileError, match=f"{mode:04o}.*chmod 600 {path}"):
        load_seed(path, IDENTITY)


def test_key_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = a_key(tmp_path)
    if os.geteuid() == 0:
        os.chown(path, 65534, 65534)
    else:
        owner = os.geteuid()
        monkeypatch.setattr(keyfile.os, "geteuid", lambda: owner + 1)
    with pytest.raises(KeyFileError, match="belongs to user"):
        load_seed(path, IDENTITY)


def test_root_key_in_the_place_of_the_identity_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    create_key(path, SWARM_ROOT, SEED)
    with pytest.raises(KeyFileError, match="swarm root key, not the identity key"):
        load_seed(path, IDENTITY)


def test_directory_and_pipe_are_no_key_files(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="not a regular file"):
        load_seed(tmp_path, IDENTITY)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(KeyFileError, match="not a regular file"):
        load_seed(tmp_path / "pipe", IDENTITY)


def test_unwritable_home_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KeyFileError, match="cannot write"):
        create_key(tmp_path / "file" / "identity.key", IDENTITY, SEED)


def test_missing_key_is_not_an_error_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_seed(tmp_path / "identity.key", IDENTITY)


def whole() -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return a_key(Path(folder)).read_bytes()


WHOLE = whole()


def load_bytes(folder: Path, content: bytes) -> bytes:
    path = folder / "identity.key"
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    os.write(descriptor, content)
    os.close(descriptor)
    return load_seed(path, IDENTITY)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys")


@given(cut=st.integers(0, len(WHOLE) - 2))
def test_every_truncated_key_is_broken(folder: Path, cut: int) -> None:
    with pytest.raises(KeyFileError, match="broken or cut short"):
        load_bytes(folder, WHOLE[:cut])


@given(bit=st.integers(0, 8 * len(WHOLE) - 1))
def test_no_flipped_bit_gives_another_key(folder: Path, bit: int) -> None:
    content = bytearray(WHOLE)
    content[bit // 8] ^= 1 << bit % 8
    with contextlib.suppress(KeyFileError):
        assert load_bytes(folder, bytes(content)) == SEED  # a line break may have become another


@given(content=st.binary(max_size=700))
def test_any_bytes_are_refused_as_broken(folder: Path, content: bytes) -> None:
    with pytest.raises(KeyFileError, match="broken or cut short"):
        load_bytes(folder, content)


def test_crash_in_the_middle_leaves_no_half_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(keyfile.os, "fsync", no_space)
    with pytest.raises(KeyFileError, match="No space left"):
        a_key(tmp_path)
    assert os.listdir(tmp_path) == []


def test_write_private_replaces_whole_files_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "membership"
    write_private(path, b"first", replace=False)
    with pytest.raises(FileExistsError):
        write_private(path, b"second", replace=False)
    write_private(path, b"third", replace=True)
    assert path.read_bytes() == b"third"
    assert os.listdir(tmp_path) == ["membership"]
