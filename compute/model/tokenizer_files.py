"""The small files of a model's tokenizer, as `mycel.compute.tokenizer` reads them.

Most models bring a tokenizer.json. Those that do not (a SentencePiece model, a vocabulary and merges) are
converted by transformers, here in the worker; the daemon only ever sees the result.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from transformers import AutoTokenizer

from mycel.compute.engine import ModelUnsupported
from mycel.compute.model import checkpoint
from mycel.compute.tokenizer import FILES_BYTES_MAX, TOKENIZER_FILES


def read_tokenizer_files(model: str) -> dict[str, bytes]:
    """Files by name, tokenizer.json always among them.

    Raises `FileNotFoundError` (no such model), `ModelUnsupported` (no tokenizer in it, none that can be
    converted, or files larger than a tokenizer's are).
    """
    directory = checkpoint.find(model).directory
    files = _read(model, directory)
    if "tokenizer.json" in files:
        return files
    with tempfile.TemporaryDirectory() as converted:
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                str(directory), local_files_only=True, trust_remote_code=False
            )
            tokenizer.save_pretrained(converted)
        except Exception as error:  # boundary: converters raise whatever the missing file makes them raise
            raise ModelUnsupported(
                f"{model} has no tokenizer.json and transformers makes none of its files ({error}); "
                "save a fast tokenizer beside its config.json"
            ) from error
        files = _read(model, Path(converted)) | {
            name: content for name, content in files.items() if name == "generation_config.json"
        }
    if "tokenizer.json" not in files:
        raise ModelUnsupported(
            f"{model} has no tokenizer.json, and its tokenizer is of a kind without one; "
            "save a fast tokenizer beside its config.json"
        )
    return files


def _read(model: str, directory: Path) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    left = FILES_BYTES_MAX
    for name in TOKENIZER_FILES:
        path = directory / name
        if not path.is_file():
            continue
        left -= path.stat().st_size
        if left < 0:
            raise ModelUnsupported(
                f"{model}: its tokenizer's files are larger than {FILES_BYTES_MAX >> 20} MiB"
            )
        found[name] = path.read_bytes()
    return found
