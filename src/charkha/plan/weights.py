"""Bytes of weights: the base in its storage type, NF4 with its constants, and what an adapter adds."""

from __future__ import annotations

import re

from charkha.plan.architecture import Architecture
from charkha.plan.layers import Linear
from charkha.plan.memory_settings import FULL_BYTES, HALF_BYTES, MemorySettings

_HEADS = ("lm_head", "embed_out")


def nf4_bytes(weights: int) -> int:
    """Bytes of one NF4 matrix with double quantization, 4.127 bits a weight when it is large.

    Two weights a byte; an 8-bit constant per 64 weights; an fp32 constant per 256 of those; per matrix the codes of
    16 and 256 fp32 values and an fp32 offset. Layout: bitsandbytes 0.50, QuantState with state2.
    """
    blocks = -(-weights // 64)
    return (weights + 1) // 2 + blocks + FULL_BYTES * (-(-blocks // 256) + 16 + 256 + 1)


def base_weight_bytes(architecture: Architecture, settings: MemorySettings) -> int:
    """Bytes of the base on its device: `full` holds fp32, NF4 only covers the linear layers, not head or embedding."""
    width = settings.residual_bytes
    if settings.quantization == "none":
        return width * architecture.parameters
    in_4_bits = architecture.layers * sum(linear.weights for linear in architecture.linears)
    packed = architecture.layers * sum(nf4_bytes(linear.weights) for linear in architecture.linears)
    return packed + width * (architecture.parameters - in_4_bits)


def adapter_targets(architecture: Architecture, settings: MemorySettings) -> tuple[Linear, ...]:
    """The linear layers of one layer that get an adapter, by PEFT's rules for `target_modules`; none for `full`."""
    if settings.method == "full":
        return ()
    wanted = settings.target_modules
    if wanted == "all-linear":
        return architecture.linears
    if isinstance(wanted, str):  # a regular expression over the whole name, as PEFT reads one string
        path = f"{architecture.layers_path}.0."
        return tuple(linear for linear in architecture.linears if re.fullmatch(wanted, path + linear.name))
    return tuple(linear for linear in architecture.linears if _is_named(linear.name, wanted))


def _is_named(name: str, wanted: tuple[str, ...]) -> bool:
    return any(name == target or name.endswith("." + target) for target in wanted)


def targets_outside_layers(architecture: Architecture, settings: MemorySettings) -> tuple[str, ...]:
    """Names in `target_modules` that are no linear layer of a decoder layer, such as lm_head."""
    if settings.method == "full" or isinstance(settings.target_modules, str):
        return ()
    return tuple(
        target
        for target in settings.target_modules
        if not any(_is_named(linear.name, (target,)) for linear in architecture.linears)
    )


def adapter_parameters(architecture: Architecture, settings: MemorySettings) -> int:
    """Parameters of the LoRA matrices A [r, inputs] and B [outputs, r] over all layers; 0 for `full`."""
    targets = adapter_targets(architecture, settings)
    in_layers = architecture.layers * sum(settings.r * (linear.inputs + linear.outputs) for linear in targets)
    on_head = any(target in _HEADS for target in targets_outside_layers(architecture, settings))
    return in_layers + (settings.r * (architecture.hidden_size + architecture.vocab_size) if on_head else 0)


def trainable_parameters(architecture: Architecture, settings: MemorySettings) -> int:
    """Parameters that get a gradient."""
    if settings.method == "full":
        return architecture.parameters
    return adapter_parameters(architecture, settings)


def weight_copy_bytes(architecture: Architecture, settings: MemorySettings) -> int:
    """Bytes per layer of the 16-bit copies that autocast makes of fp32 trained matrices and backward keeps."""
    if not settings.autocast:
        return 0
    if settings.method == "full":
        return HALF_BYTES * sum(linear.weights for linear in architecture.linears)
    targets = adapter_targets(architecture, settings)
    return HALF_BYTES * sum(settings.r * (linear.inputs + linear.outputs) for linear in targets)
