"""Which device torch would train on, as facts for the rules that choose."""

from __future__ import annotations

import torch


def find_device() -> tuple[str, str, bool, tuple[int, int] | None, int]:
    """(cpu | cuda | mps, its name, whether it computes in bf16, CUDA compute capability, how many there are)."""
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(0)
        # torch.cuda.is_bf16_supported() also says yes where bf16 is emulated; Ampere (8.0) first has units for it.
        return "cuda", torch.cuda.get_device_name(0), capability >= (8, 0), capability, torch.cuda.device_count()
    if torch.backends.mps.is_available():
        return "mps", "Apple GPU", True, None, 1
    return "cpu", "CPU", True, None, 1


def gpu_uuids() -> list[str]:
    """The UUIDs of the CUDA devices that training may use, in torch's order, by which NVML finds them."""
    if not torch.cuda.is_available():
        return []
    return [str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())]
