"""A streamed base in bytes: one layer's slab, what the device holds of it, what waits on the host, and what moves.

The one formula for the plan, the preview of a run and the engine: how layers are laid out is backends/torch/slabs.py's,
which layers stay on the device is `hot_layers_of`, which the engine asks too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from charkha.plan.architecture import Architecture
from charkha.plan.memory_settings import FULL_BYTES, MemorySettings
from charkha.units import format_bytes

# As backends/torch/slabs.py lays layers out; a test compares whole files with these.
LAYER_ALIGNMENT, PIECE_ALIGNMENT = 4096, 512
_BLOCK, _NESTED_BLOCK = 64, 256
_SHARED_CODES_BYTES = FULL_BYTES * (16 + 256)  # values of 4-bit and of 8-bit codes, one tensor each for all layers
BOUNCE_BUFFERS = 2  # of one layer each, pinned, that layers pass through on their way from the disk
# Beside a base in pinned memory, for the system and for a checkpoint that is being written.
RAM_LEFT_BYTES = 4 << 30
STREAMED_METHODS = ("lora", "rslora", "dora")
_EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts")
_TRANSPOSED = frozenset({"gpt2"})  # transformers' Conv1D
_USUAL_RAM_GIB = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


def slab_layer_bytes(architecture: Architecture, settings: MemorySettings) -> int:
    """Bytes of one layer in the slab: its matrices, packed or in the type of the products, each piece aligned.

    Experts are counted as part of their layer, a piece per matrix.
    """
    pieces = (size for weights in _matrices(architecture) for size in _pieces(weights, settings))
    return _aligned(sum(_aligned(size, PIECE_ALIGNMENT) for size in pieces), LAYER_ALIGNMENT)


def _matrices(architecture: Architecture) -> Iterator[int]:
    """Elements of every streamed matrix of a layer."""
    yield from (linear.weights for linear in architecture.linears)
    if architecture.experts:
        yield from [architecture.experts.weights // 3] * (3 * architecture.experts.count)


def _pieces(weights: int, settings: MemorySettings) -> tuple[int, ...]:
    """Bytes of the parts of one matrix: itself; or codes, a byte a block, an fp32 a nested block, an fp32 offset."""
    if settings.quantization == "none":
        return (weights * settings.activation_bytes,)
    blocks = -(-weights // _BLOCK)
    return (weights + 1) // 2, blocks, FULL_BYTES * -(-blocks // _NESTED_BLOCK), FULL_BYTES


def _aligned(size: int, alignment: int) -> int:
    return size + -size % alignment


def why_not_streamed(
    config: Mapping[str, Any], method: str, quantization: str, *, processes: int, device: str
) -> str | None:
    """Why a base cannot be streamed, by its config.json and the run's settings; None where nothing is known against it.

    Training asks the model's own class beside it (backends/torch/streamed_model.py).
    """
    if method not in STREAMED_METHODS:
        return f"adapter.method {method} does not go with a streamed base"
    if processes > 1:
        return f"{processes} processes would each stream the base on their own"
    if device == "mps":
        return "an Apple GPU shares its memory with the CPU, so nothing is gained by streaming"
    if quantization not in ("none", "nf4", "fp4"):
        return f"a base in {quantization} is not streamed"
    if config.get("quantization_config"):
        return "a base whose files are stored in 4 or 8 bits is not streamed"
    if any(config.get(key) for key in _EXPERT_KEYS):
        return "experts in one 3-D tensor are not streamed"
    if config.get("model_type") in _TRANSPOSED:
        return "this architecture's layers are no plain linear layers, so they are not streamed"
    return None


def cold_layers(architecture: Architecture, settings: MemorySettings) -> int:
    """Layers that take turns in the slots."""
    return max(0, architecture.layers - settings.streamed_resident_layers)


def hot_layers_of(layers: int, count: int) -> tuple[int, ...]:
    """Numbers of the `count` layers that stay on the device: spread evenly.

    While a hot layer computes, the next cold one is copied; all in one place they would hide nothing.
    """
    count = min(count, layers)
    return tuple((2 * turn + 1) * layers // (2 * count) for turn in range(count))


def buffer_bytes(architecture: Architecture, settings: MemorySettings) -> int:
    """Bytes of the slots and of the layers that stay, on the device."""
    slots = min(settings.streamed_slots, cold_layers(architecture, settings))
    held = min(architecture.layers, slots + settings.streamed_resident_layers)
    return held * slab_layer_bytes(architecture, settings)


def streamed_base_bytes(architecture: Architecture, settings: MemorySettings) -> int:
    """Bytes of the base on the device: the buffers, and what is no streamed matrix (embedding, head, norms, biases)."""
    beside = architecture.parameters - architecture.layers * architecture.linear_weights
    codes = _SHARED_CODES_BYTES if settings.quantization != "none" else 0
    return buffer_bytes(architecture, settings) + settings.base_bytes * beside + codes


def waiting_bytes(architecture: Architecture, settings: MemorySettings) -> int:
    """Pinned host memory in which layers wait: the whole slab; two buffers where they come from the disk.

    None on a CPU, whose slots are host memory already and are filled from the disk's cache. One range is registered
    whole, so nothing is rounded up but to a page.
    """
    if settings.device == "cpu":
        return 0
    if settings.streamed_from == "ram":
        return slab_bytes(architecture, settings)
    return BOUNCE_BUFFERS * slab_layer_bytes(architecture, settings)


def slab_bytes(architecture: Architecture, settings: MemorySettings) -> int:
    """Bytes of the slab on the disk."""
    return architecture.layers * slab_layer_bytes(architecture, settings)


def moved_bytes(architecture: Architecture, settings: MemorySettings) -> int:
    """Bytes copied to the device in one micro step, forward and backward.

    Every cold layer comes twice, but for those that lie in the slots at either turn and are used again.
    """
    cold = cold_layers(architecture, settings)
    return 2 * max(0, cold - settings.streamed_slots) * slab_layer_bytes(architecture, settings)


def usual_ram_bytes(needed: int) -> int:
    """The smallest amount of memory that computers are sold with which holds `needed` bytes beside a system."""
    held = needed + RAM_LEFT_BYTES
    return next((gib << 30 for gib in _USUAL_RAM_GIB if gib << 30 >= held), held)


def placement_note(architecture: Architecture, settings: MemorySettings) -> str:
    """What a reader of a memory figure must know of where the layers are."""
    held = format_bytes(buffer_bytes(architecture, settings))
    waiting = format_bytes(cold_layers(architecture, settings) * slab_layer_bytes(architecture, settings))
    return (
        f"a streamed base: {settings.streamed_resident_layers} of {architecture.layers} layers stay on the device, the "
        f"others pass through {settings.streamed_slots} slots ({held} together); {waiting} wait beside"
    )
