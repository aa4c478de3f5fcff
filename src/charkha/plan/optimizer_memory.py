"""Bytes of optimizer states per trained parameter, and what the step needs for a moment.

Sources: torch.optim (states follow the parameter's type), bitsandbytes 0.50 (8-bit states with an fp32 constant per
256 values; tensors under 4096 elements stay in 32 bits; paged states lie in CUDA managed memory, outside torch's
allocator), transformers 5.23 for the names.
"""

from __future__ import annotations

from dataclasses import dataclass

_EIGHT_BIT_BLOCK = 256
_STATES = {"adamw": 2, "ademamix": 3, "lion": 1, "rmsprop": 1, "adagrad": 1, "sgd": 0, "adafactor": 0}


@dataclass(frozen=True)
class OptimizerMemory:
    """Per trained parameter, in bytes. `temporary` is beside the gradients, for all tensors at once."""

    states: float
    paged_states: float  # of `states`, those outside the allocator, which move to host memory when it is short
    temporary: float
    per_tensor: float  # bytes for one element of the largest tensor, one tensor after another
    known: bool = True


def optimizer_memory(name: str, trained_bytes: int, device: str) -> OptimizerMemory:
    """What the optimizer of that transformers name holds and needs beside weights and gradients."""
    family = next((family for family in _STATES if family in name), None)
    states = float(_STATES.get(family or "adamw", 2))
    if "8bit" in name:
        width = 1 + 4 / _EIGHT_BIT_BLOCK
    elif "4bit" in name:
        width = 0.5 + 4 / 128  # torchao's AdamW4bit: two states a byte, a constant per 128
    elif name in ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", "adafactor"):
        width = float(trained_bytes)
    else:
        width = 4.0  # bitsandbytes keeps 32-bit states whatever the parameter's type
    held = states * width
    if family == "adafactor":
        # Row and column means are small; one tensor's squared gradient and update exist in fp32.
        return OptimizerMemory(0.02 * trained_bytes, 0, 0, 8)
    bitsandbytes = "bit" in name or "bnb" in name or family in ("lion", "ademamix")
    fused = "fused" in name or bitsandbytes or "ao" in name
    on_gpu = device == "cuda"
    foreach = 0.0 if fused or not on_gpu or family in ("sgd", "adagrad") else float(trained_bytes)
    per_tensor = (
        0.0 if fused or on_gpu or family == "sgd" else 2.0 * trained_bytes
    )  # the loop on a CPU makes two for one tensor
    return OptimizerMemory(held, held if "paged" in name else 0.0, foreach, per_tensor, family is not None)
