"""Private keys on disk: a node's identity and a swarm's root key.

A key file is two lines of text, what it is and the seed:

    mycel ed25519 private key 1: identity
    <base58 of 32 seed bytes and 4 bytes of sha256 over them>

It is made whole or not at all: written under another name with O_EXCL and mode 0600, fsynced, then linked to
its own name, which fails if something is there. It is read through one descriptor whose owner and mode are
checked before a byte is believed. What is wrong is said with the command that puts it right; a broken key
is never replaced silently, since a new identity is a new peer.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import base58

from mycel.protocol.errors import MycelError
from mycel.protocol.identity import SEED_BYTES

HEADER = "mycel ed25519 private key 1: "
FILE_BYTES_MAX = 512
IDENTITY = "identity"
SWARM_ROOT = "swarm root"


class KeyFileError(MycelError):
    """A key file that cannot be used; the text names the file, what is wrong, and what to do."""


def load_or_create_seed(path: Path, purpose: str, entropy: Callable[[int], bytes]) -> bytes:
    """The seed in the key file at `path`, made from `entropy` if there is no file yet.

    Two nodes that start at once on one empty directory end up with the same key. Raises `KeyFileError`.
    """
    with contextlib.suppress(FileNotFoundError):
        return load_seed(path, purpose)
    with contextlib.suppress(FileExistsError):  # somebody else was faster: theirs counts
        create_key(path, purpose, entropy(SEED_BYTES))
    return load_seed(path, purpose)


def load_seed(path: Path, purpose: str) -> bytes:
    """The 32-byte seed in the key file at `path`.

    Raises `FileNotFoundError` when there is none, `KeyFileError` when it is readable by others, owned by
    somebody else, broken, or a key for another purpose.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise KeyFileError(f"cannot read the {purpose} key {path}: {error.strerror}") from None
    try:
        _check_guarded(path, purpose, os.fstat(descriptor))
        content = os.read(descriptor, FILE_BYTES_MAX + 1)
    finally:
        os.close(descriptor)
    return _parse(path, purpose, content)


def create_key(path: Path, purpose: str, seed: bytes) -> None:
    """Write `seed` to a new key file at `path` with mode 0600, making its directory (0700) if need be.

    Raises `FileExistsError` when something is there already, `KeyFileError` when it cannot be written.
    """
    text = HEADER + purpose + "\n" + base58.b58encode(seed + _checksum(seed)).decode("ascii") + "\n"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(path, text.encode("ascii"), replace=False)
    except OSError as error:
        if isinstance(error, FileExistsError) and path.exists():
            raise
        raise KeyFileError(f"cannot write the {purpose} key {path}: {error.strerror}") from None


def write_private(path: Path, data: bytes, *, replace: bool) -> None:
    """Write a file of mode 0600 that is there whole or not at all, also after a crash.

    With `replace` it takes the place of what was there; without, it raises `FileExistsError`. Other
    failures raise `OSError`.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    partial = Path(name)  # opened with O_EXCL and mode 0600
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        if replace:
            os.replace(partial, path)
        else:
            os.link(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _check_guarded(path: Path, purpose: str, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise KeyFileError(f"the {purpose} key {path} is not a regular file")
    if status.st_uid != os.geteuid():
        raise KeyFileError(
            f"the {purpose} key {path} belongs to user {status.st_uid}, this process is user {os.geteuid()}: "
            f"whoever owns it knows the key; run as that user, or chown it if it is yours"
        )
    if status.st_mode & 0o077:
        raise KeyFileError(
            f"the {purpose} key {path} can be read by others (mode {stat.S_IMODE(status.st_mode):04o}): "
            f"run `chmod 600 {path}`; if somebody may have read it, delete it to get a new one"
        )


def _parse(path: Path, purpose: str, content: bytes) -> bytes:
    broken = KeyFileError(
        f"the {purpose} key {path} is broken or cut short: restore it from a backup, "
        "or delete it and get a new one (which other peers do not know)"
    )
    if len(content) > FILE_BYTES_MAX:
        raise broken
    try:
        lines = content.decode("ascii").splitlines()
    except UnicodeDecodeError:
        raise broken from None
    if len(lines) != 2 or not lines[0].startswith(HEADER):
        raise broken
    found = lines[0].removeprefix(HEADER)
    try:
        raw = base58.b58decode(lines[1])
    except ValueError:
        raise broken from None
    seed = raw[:SEED_BYTES]
    if len(raw) != SEED_BYTES + 4 or raw[SEED_BYTES:] != _checksum(seed):
        raise broken
    if found != purpose:
        raise KeyFileError(f"{path} holds the {found} key, not the {purpose} key: check the file names")
    return seed


def _checksum(seed: bytes) -> bytes:
    return hashlib.sha256(seed).digest()[:4]
