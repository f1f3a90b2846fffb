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
    held = torch.frombuffer(bytearray(tensor.data), dtype=found).view(1, *tensor.shape)
    return held if held.device == device and found == dtype else held.to(device=device, dtype=dtype)


def tensor_to_wire(hidden: torch.Tensor) -> Tensor:
    """[rows, hidden] as bytes; on the CPU they are the tensor's own memory."""
    held = hidden.detach() if hidden.requires_grad else hidden
    held = (held if held.is_cpu else held.cpu()).contiguous()
    name = NAMES.get(held.dtype)
    if name is None:
        raise ValueError(f"hidden states of dtype {held.dtype} have no form on the wire")
    plain: Any = held if held.dtype == torch.float32 else held.view(torch.uint8)  # numpy knows no bfloat16
    return Tensor(name, tuple(held.shape), memoryview(plain.numpy()).cast("B"))
