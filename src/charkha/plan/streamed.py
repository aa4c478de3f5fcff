"""A streamed base in bytes: one layer's slab, what the device holds of it, what waits on the host, and what moves.

The one formula for the plan, the preview of a run and the engine: how layers are laid out is backends/torch/slabs.py's,
which layers stay on the device is `hot_layers_of`, which the engine asks too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from charkha.plan.architecture import Architecture
from charkha.plan.memory_settings import FULL_BYTES, MemorySettings
from charkha.plan.weights import why_not_quantized

# As backends/torch/slabs.py lays layers out; a test compares whole files with these.
LAYER_ALIGNMENT, PIECE_ALIGNMENT = 4096, 512
_BLOCK, _NESTED_BLOCK = 64, 256
_SHARED_CODES_BYTES = FULL_BYTES * (16 + 256)  # values of 4-bit and of 8-bit codes, one tensor each for all layers
BOUNCE_BUFFERS = 2  # of one layer each, pinned, that layers pass through on their way from the disk
# Beside a base in pinned memory, for the system and for a checkpoint that is being written.
RAM_LEFT_BYTES = 4 << 30
STREAMED_METHODS = ("lora", "rslora", "dora")
_EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts")
_BESIDE_EXPERTS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
_TRANSPOSED = frozenset({"gpt2"})  # transformers' Conv1D
_OTHER_EXPERTS = frozenset({"gpt_oss"})  # with biases, gate and up interleaved
_EXPERT_SLOTS_BYTES = 1 << 30  # of all buffers of experts together
_USUAL_RAM_GIB = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


def slab_layer_bytes(architecture: Architecture, settings: MemorySettings) -> int:
    """Bytes of one layer in the slab, without experts: its matrices, packed or in the type of the products."""
    return _unit_bytes([(linear.outputs, linear.inputs) for linear in architecture.linears], settings)


def slab_expert_bytes(architecture: Architecture, settings: MemorySettings) -> int:
    """Bytes of one expert in the slab, which moves by itself; 0 where there are none."""
    experts = architecture.experts
    if experts is None:
        return 0
    inner, hidden = experts.intermediate_size, experts.hidden_size
    return _unit_bytes([(2 * inner, hidden), (hidden, inner)], settings)  # gate and up are one matrix


def _unit_bytes(matrices: Iterable[tuple[int, int]], settings: MemorySettings) -> int:
    """Of what moves at once: [rows, columns] of its matrices, each piece of them aligned."""
    pieces = (size for rows, columns in matrices for size in _pieces(rows, columns, settings))
    return _aligned(sum(_aligned(size, PIECE_ALIGNMENT) for size in pieces), LAYER_ALIGNMENT)


def _pieces(rows: int, columns: int, settings: MemorySettings) -> tuple[int, ...]:
    """Bytes of the parts of one matrix: itself; in int8 with an fp32 a row; in 4 bits codes, a byte a block, an fp32 a
    nested block, and an fp32 offset.
    """
    weights = rows * columns
    if settings.quantization == "none":
        return (weights * settings.activation_bytes,)
    if settings.quantization == "int8":
        return weights, FULL_BYTES * rows
    blocks = -(-weights // _BLOCK)
    return (weights + 1) // 2, blocks, FULL_BYTES * -(-blocks // _NESTED_BLOCK), FULL_BYTES


def _aligned(size: int, alignment: int) -> int:
    return size + -size % alignment


def why_not_streamed(
    config: Mapping[str, Any],
    method: str,
    quantization: str,
    targets: str | Sequence[str],
    *,
    processes: int,
    device: str,
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
    if (method, quantization) == ("dora", "int8"):
        return "DoRA on a streamed int8 base has not been tried"
    if any(config.get(key) for key in _EXPERT_KEYS):
        names = [targets] if isinstance(targets, str) else targets
        others = [name for name in names if name not in _BESIDE_EXPERTS]
        if config.get("model_type") in _OTHER_EXPERTS:
            return "experts of this architecture have biases, and such are not streamed"
        if quantization == "int8" or config.get("quantization_config"):
            return "experts in int8, or of a base stored in 4 or 8 bits, are not streamed"
        if others:
            return f"adapter.target_modules {others[0]} adapts experts, which are then needed all at once"
    if config.get("model_type") in _TRANSPOSED:
        return "this architecture's layers are no plain linear layers, so they are not streamed"
    return None


def why_not_resident(config: Mapping[str, Any], quantization: str) -> str | None:
    """Why a base cannot be held whole on the device; None where nothing is known against it.

    bitsandbytes packs no 3-D weight, in which transformers holds the experts of a layer.
    """
    if quantization == "none" or config.get("quantization_config") or not any(config.get(key) for key in _EXPERT_KEYS):
        return None
    return f"experts are packed in {quantization} only where they are streamed"


def is_possible(architecture: Architecture, settings: MemorySettings) -> bool:
    """Whether nothing is known against holding the base as these settings do, whatever memory there is."""
    shape = {"model_type": architecture.model_type, "num_experts": architecture.experts and architecture.experts.count}
    if not settings.streamed:
        return why_not_quantized(architecture, settings) is None
    why = why_not_streamed(
        shape,
        settings.method,
        settings.quantization,
        settings.target_modules,
        processes=settings.processes,
        device=settings.device,
    )
    return why is None


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
    """Bytes of the slots, those of experts too, and of the layers that stay, on the device."""
    cold = cold_layers(architecture, settings)
    slots = min(settings.streamed_slots, cold) * slab_layer_bytes(architecture, settings)
    experts = expert_slots(architecture, settings) * slab_expert_bytes(architecture, settings) if cold else 0
    return slots + experts + (architecture.layers - cold) * hot_layer_bytes(architecture, settings)


def hot_layer_bytes(architecture: Architecture, settings: MemorySettings) -> int:
    """Bytes of one layer with all its experts."""
    count = architecture.experts.count if architecture.experts else 0
    return slab_layer_bytes(architecture, settings) + count * slab_expert_bytes(architecture, settings)


def expert_slots(architecture: Architecture, settings: MemorySettings) -> int:
    """Buffers of one expert each: as many as a gigabyte holds, at least two, at most a layer's."""
    if architecture.experts is None:
        return 0
    return min(architecture.experts.count, max(2, _EXPERT_SLOTS_BYTES // slab_expert_bytes(architecture, settings)))


def streamed_base_bytes(architecture: Architecture, settings: MemorySettings) -> int:
    """Bytes of the base on the device: the buffers, and what is no streamed matrix (embedding, head, norms, biases)."""
    beside = architecture.parameters - architecture.layers * architecture.linear_weights
    beside -= table_weights(architecture, settings)
    codes = _SHARED_CODES_BYTES if settings.quantization != "none" else 0
    return buffer_bytes(architecture, settings) + settings.base_bytes * beside + codes


def table_weights(architecture: Architecture, settings: MemorySettings) -> int:
    """Elements of embedding and head that stay on the host; a tied pair is one table, which goes with the head."""
    table = architecture.vocab_size * architecture.hidden_size
    if settings.host_tables == "none" or not settings.streamed:
        return 0
    if architecture.tied_embeddings:
        return table if settings.host_tables == "both" else 0
    return 2 * table if settings.host_tables == "both" else table


def table_moved_bytes(architecture: Architecture, settings: MemorySettings) -> int:
    """Of tables on the host, what a micro step brings: the rows of its tokens, and the whole head twice."""
    if not table_weights(architecture, settings):
        return 0
    row = settings.activation_bytes * architecture.hidden_size
    head = 2 * architecture.vocab_size * row if settings.host_tables == "both" else 0
    return settings.positions * row + head


def waiting_bytes(architecture: Architecture, settings: MemorySettings) -> int:
    """Pinned host memory in which layers wait: the whole slab; two buffers where they come from the disk.

    None on a CPU, whose slots are host memory already and are filled from the disk's cache. One range is registered
    whole, so nothing is rounded up but to a page.
    """
    if settings.device == "cpu":
        return 0
    if settings.streamed_from == "ram":
        return slab_bytes(architecture, settings)
    units = slab_layer_bytes(architecture, settings), slab_expert_bytes(architecture, settings)
    return BOUNCE_BUFFERS * max(units)


def slab_bytes(architecture: Architecture, settings: MemorySettings) -> int:
    """Bytes of the slab on the disk."""
    return architecture.layers * hot_layer_bytes(architecture, settings)


def moved_bytes(architecture: Architecture, settings: MemorySettings) -> int:
    """Bytes copied to the device in one micro step, forward and backward.

    Every cold layer comes twice, but for those that lie in the slots at either turn and are used again. Its experts are
    counted as if tokens went to all of them: twice where a layer's have a slot each, else again in its backward.
    """
    cold = cold_layers(architecture, settings)
    layers = 2 * max(0, cold - settings.streamed_slots) * slab_layer_bytes(architecture, settings)
    return layers + cold * expert_passes(architecture, settings) * _experts_of_a_layer(architecture, settings)


def expert_passes(architecture: Architecture, settings: MemorySettings) -> int:
    """How often a layer's experts come in a micro step."""
    experts = architecture.experts
    return 2 if experts is None or expert_slots(architecture, settings) >= experts.count else 3


def _experts_of_a_layer(architecture: Architecture, settings: MemorySettings) -> int:
    return hot_layer_bytes(architecture, settings) - slab_layer_bytes(architecture, settings)


def usual_ram_bytes(needed: int) -> int:
    """The smallest amount of memory that computers are sold with which holds `needed` bytes beside a system."""
    held = needed + RAM_LEFT_BYTES
    return next((gib << 30 for gib in _USUAL_RAM_GIB if gib << 30 >= held), held)
