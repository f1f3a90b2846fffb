"""Hidden states between torch and the wire's raw bytes: one copy in, none out."""

from __future__ import annotations

from typing import Any

import torch

from mycel.protocol.tensor import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def tensor_from_wire(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """[1, rows, hidden] on `device` in `dtype`, from [rows, hidden] of `tensor`.

    The bytes are copied once: the model may write into what it is given, and the caller may keep them for a
    replay. Raises `ValueError` for a dtype that hidden states do not have.
    """
    found = DTYPES.get(tensor.dtype)
    if found is None:
        raise ValueError(f"hidden states are float32, bfloat16 or float16, not {tensor.dtype}")
    held = torch.empty(1, *tensor.shape, dtype=found)
    raw_bytes(held)[:] = memoryview(tensor.data).cast("B")
    return held.to(device=device, dtype=dtype)


def tensor_to_wire(hidden: torch.Tensor) -> Tensor:
    """[rows, hidden] as bytes; on the CPU they are the tensor's own memory."""
    held = hidden.detach().to("cpu").contiguous()
    name = NAMES.get(held.dtype)
    if name is None:
        raise ValueError(f"hidden states of dtype {held.dtype} have no form on the wire")
    return Tensor(name, tuple(held.shape), raw_bytes(held))


def raw_bytes(held: torch.Tensor) -> memoryview:
    """A contiguous CPU tensor's own memory; the view keeps the tensor alive."""
    array: Any = held.view(-1).view(torch.uint8).numpy()
    return memoryview(array)
