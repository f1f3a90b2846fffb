"""By what peers know that they mean the same model: a fingerprint of its files, and the name it goes by.

The fingerprint is sha256 over config.json, and the names and sizes of the weight files: it is told in a
moment, also where not one weight is here yet. A directory made of blocks has other files, and perhaps not all
layers; it carries what its original was called, in `FINGERPRINT_FILE`. No torch here: the daemon asks too.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

from mycel.protocol.blockstore import FINGERPRINT_FILE


def fingerprint_of(directory: Path, file_bytes: Mapping[str, int]) -> str:
    """The fingerprint of the model in `directory`, whose weight files have these sizes. Raises `OSError`."""
    told = _told(directory)
    if told:
        return told[0][:64]
    digest = sha256((directory / "config.json").read_bytes())
    for name in sorted(file_bytes):
        digest.update(f"\n{name} {file_bytes[name]}".encode())
    return digest.hexdigest()


def name_of(directory: Path) -> str:
    """What the model in `directory` is called. Raises `OSError`."""
    told = _told(directory)
    return told[1] if len(told) > 1 else directory.absolute().name


def _told(directory: Path) -> list[str]:
    """What a directory made of blocks says of its original: fingerprint, name."""
    path = directory / FINGERPRINT_FILE
    return path.read_text("utf-8").splitlines() if path.is_file() else []
