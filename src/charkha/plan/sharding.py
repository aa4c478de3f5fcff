"""What one process of several holds: shares of weights, gradients and states, and what it gathers for a while.

Sources: torch FSDP (a unit per decoder layer, the rest in the root unit, which stays whole from forward to the end of
backward), DeepSpeed 0.18 (16-bit weights, fp32 masters in the optimizer's share; stage 3 keeps up to 1e9 gathered
elements), torch DDP (gradients a second time in its buckets).
"""

from __future__ import annotations

from dataclasses import dataclass

from charkha.plan.architecture import Architecture
from charkha.plan.memory_settings import FULL_BYTES, HALF_BYTES, MemorySettings
from charkha.plan.optimizer_memory import OptimizerMemory, optimizer_memory
from charkha.plan.streamed import streamed_base_bytes
from charkha.plan.weights import (
    adapter_parameters,
    base_weight_bytes,
    layer_weight_bytes,
    quantized_layer_bytes,
    saved_module_parameters,
    trainable_parameters,
)

_LIVE_ELEMENTS = 10**9  # DeepSpeed's stage3_max_live_parameters and max_reuse_distance


@dataclass(frozen=True)
class Shares:
    """Bytes on one device; everything that is not asked for by a moment of the step is there all the time."""

    base_weights: int
    adapter_weights: int
    optimizer_states: int
    gradients: int  # of everything trained, once a backward pass is done
    optimizer_temporary: int
    gathered_root: int  # embedding, head and final norm, whole, from forward to the end of backward
    gathered_layer: int  # a layer's weights, whole, while it works
    head_gradient: int  # whole, until the end of backward
    buckets: int


def shares(architecture: Architecture, settings: MemorySettings) -> Shares:
    """What each process holds and gathers."""
    trained = trainable_parameters(architecture, settings)
    optimizer = optimizer_memory(settings.optimizer, settings.trained_bytes, settings.device)
    away = "parameters" in settings.offload
    gradient_share = settings.processes if settings.shards_gradients else 1
    gradients = trained * _gradient_bytes(settings) // gradient_share
    added = adapter_parameters(architecture, settings) + saved_module_parameters(architecture, settings)
    adapter = settings.trained_bytes * added // (settings.processes if settings.shards_parameters else 1)
    return Shares(
        base_weights=_base(architecture, settings),
        adapter_weights=0 if away else adapter,
        optimizer_states=_states(trained, settings, optimizer),
        gradients=0 if away else gradients,
        optimizer_temporary=_temporary(architecture, settings, optimizer),
        gathered_root=_root(architecture, settings) if settings.shards_parameters else 0,
        gathered_layer=_gathered_layer(architecture, settings) if settings.shards_parameters else 0,
        head_gradient=_head_gradient(architecture, settings),
        buckets=gradients if settings.strategy == "ddp" and settings.processes > 1 else 0,
    )


def _gradient_bytes(settings: MemorySettings) -> int:
    return HALF_BYTES if settings.is_deepspeed and settings.is_narrow else settings.trained_bytes


def _base(architecture: Architecture, settings: MemorySettings) -> int:
    whole = base_weight_bytes(architecture, settings)
    if settings.is_deepspeed and settings.is_full:
        whole = settings.activation_bytes * architecture.parameters
    if settings.streamed:
        return streamed_base_bytes(architecture, settings)
    if not settings.shards_parameters:
        return whole
    _, constants = quantized_layer_bytes(architecture, settings)
    beside = architecture.layers * constants  # of quantization: no parameters, so every process has them all
    if "parameters" in settings.offload:
        return beside
    return (whole - beside) // settings.processes + beside


def _states(trained: int, settings: MemorySettings, optimizer: OptimizerMemory) -> int:
    if {"optimizer", "parameters"} & settings.offload:
        return 0
    masters = FULL_BYTES if settings.is_deepspeed and settings.is_narrow else 0
    per_parameter = optimizer.states - optimizer.paged_states + masters
    if settings.is_deepspeed and settings.is_narrow:
        per_parameter = max(per_parameter, masters + optimizer.states * FULL_BYTES / settings.trained_bytes)
    return int(trained * per_parameter) // (settings.processes if settings.shards_optimizer else 1)


def _temporary(architecture: Architecture, settings: MemorySettings, optimizer: OptimizerMemory) -> int:
    """The step's: torch's default makes one per tensor at once on a GPU, two for one tensor on a CPU."""
    if {"optimizer", "parameters"} & settings.offload:
        return 0
    trained = trainable_parameters(architecture, settings)
    at_once = int(optimizer.temporary * trained) // (settings.processes if settings.shards_optimizer else 1)
    return at_once + int(optimizer.per_tensor * largest_trained(architecture, settings))


def largest_trained(architecture: Architecture, settings: MemorySettings) -> int:
    """Elements of the largest tensor that the optimizer moves."""
    linears = [linear.weights for linear in architecture.linears]
    if settings.is_full:
        return max(architecture.vocab_size * architecture.hidden_size, *linears)
    widest = max((max(linear.inputs, linear.outputs) for linear in architecture.linears), default=0)
    return max(settings.r * widest, saved_module_parameters(architecture, settings))


def _root(architecture: Architecture, settings: MemorySettings) -> int:
    width = settings.activation_bytes if settings.is_full else settings.base_bytes
    return width * (
        architecture.embedding_parameters + architecture.head_parameters + architecture.final_norm.parameters
    )


def _gathered_layer(architecture: Architecture, settings: MemorySettings) -> int:
    layer = layer_weight_bytes(architecture, settings)
    if settings.strategy != "deepspeed_zero3":
        return layer
    at_most = settings.activation_bytes * min(_LIVE_ELEMENTS, architecture.layers * architecture.layer_parameters)
    return max(layer, at_most)


def _head_gradient(architecture: Architecture, settings: MemorySettings) -> int:
    """Of the head's matrix, the first to be made; none beside frozen weights."""
    if not settings.is_full:
        return 0
    width = settings.activation_bytes if settings.shards_parameters else _gradient_bytes(settings)
    return width * architecture.vocab_size * architecture.hidden_size
