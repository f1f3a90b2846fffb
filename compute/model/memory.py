"""Telling the end of memory from other errors: it comes in three classes, by who ran out."""

from __future__ import annotations

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is Python's MemoryError, a GPU's out-of-memory, or that of torch's CPU allocator.

    The last is a plain RuntimeError and known by its text only ("can't allocate memory").
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)
