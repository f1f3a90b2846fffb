"""What torch can use in this process."""

from __future__ import annotations

import psutil
import torch

from mycel.compute.pipe import TorchDevice


def see_devices() -> tuple[TorchDevice, ...]:
    """What torch can use here: GPUs first, then the CPU."""
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found.append(TorchDevice(f"cuda:{index}", torch.cuda.get_device_name(index), total, free))
    memory = psutil.virtual_memory()
    found.append(TorchDevice("cpu", f"{torch.get_num_threads()} threads", memory.total, memory.available))
    return tuple(found)
