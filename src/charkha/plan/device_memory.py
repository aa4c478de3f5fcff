"""From live tensor bytes to what the card, the host and the disk must hold.

Sources: torch's CUDACachingAllocator (blocks of 2 MiB and more; a split block is whole again only when every part is
free), nvidia-smi beside torch's counters in published runs, sizes of files that a run writes.
"""

from __future__ import annotations

from dataclasses import dataclass

from charkha.plan.architecture import Architecture
from charkha.plan.memory import MemoryPreview
from charkha.plan.memory_settings import FULL_BYTES, HALF_BYTES, MemorySettings
from charkha.plan.optimizer_memory import optimizer_memory
from charkha.plan.streamed import slab_bytes, table_weights, waiting_bytes
from charkha.plan.weights import adapter_parameters, base_weight_bytes, trainable_parameters

_GIB = 2**30
CONTEXT_BYTES = int(0.45 * _GIB)  # driver, kernels and libraries of one process, outside the allocator
NCCL_BYTES = int(0.5 * _GIB)  # channels and buffers of one process that talks to others
# Gradients and states that the first step makes lie in blocks that the logits had used, so that the next step's logits
# find no block whole: what layers need meanwhile stays reserved beside them, but for the part that still fits.
_SPLIT_SHARE = 0.7
# Holes, as a share of what comes and goes in a step, which cannot be had back when the allocator frees its cache before
# it gives up: only segments free as a whole are. Beside frozen weights little that lasts is made between activations;
# gradients of whole weights are, and gathered weights of sharded layers on a stream of their own. The larger shares are
# what published runs near the limit did not get by with; what is reserved far from it is less.
_HOLES_FROZEN, _HOLES_TRAINED, _HOLES_SHARDED = 0.09, 0.19, 0.24
_USUAL_HOLES, _USUAL_HOLES_RECOMPUTED = 0.06, 0.13  # by simulating the allocator at one length, 8B to 70B
# Where lengths vary, a longer row finds the blocks of every earlier longest row too small, and they stay reserved: in
# published runs over two model widths, three depths and five caps about two outgrown sets lie beside the one in use.
_OUTGROWN_SETS = 2.0
_PYTHON_BYTES = 3 * _GIB  # interpreter, torch and its libraries with CUDA, tokens of a batch
_PYTHON_CPU_BYTES = 3 * _GIB // 4  # without CUDA: resident memory beside tensors, measured 570 to 750 MiB


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes. `least` is what a card must have: below it the run ends out of memory, above it the cache shrinks."""

    allocated: int
    reserved: int
    device: int  # what nvidia-smi shows
    least: int
    fragmentation: int
    context: int


def device_memory(preview: MemoryPreview, settings: MemorySettings, limit_bytes: int | None) -> DeviceMemory:
    """What the card holds at the peak. On a CPU and on Apple's GPUs there is no cache to be counted."""
    allocated = preview.peak_bytes
    if settings.device != "cuda":
        return DeviceMemory(allocated, allocated, allocated, allocated, 0, 0)
    context = _context(settings)
    step = preview.step_bytes
    comes_and_goes = max(0, step - preview.held_bytes)
    recomputes = settings.gradient_checkpointing and settings.strategy != "fsdp"  # FSDP keeps what enters every layer
    share = _USUAL_HOLES_RECOMPUTED if recomputes else _USUAL_HOLES
    fragmentation = int(share * comes_and_goes)
    if settings.loss_head == "full":
        fragmentation += int(_SPLIT_SHARE * min(preview.layer_phase_bytes, preview.loss_phase_bytes))
    if settings.lengths_vary:
        fragmentation += int(_OUTGROWN_SETS * (preview.layer_phase_bytes + preview.loss_phase_bytes))
    holes = _holes_share(settings)
    evaluating = preview.held_out_least_bytes
    least = context + max(
        step + int(holes * comes_and_goes), evaluating + int(holes * max(0, evaluating - preview.resting_bytes))
    )
    # A run evaluates before its first step, so training finds the blocks that the held-out logits lay in.
    passing = max(0, preview.held_out_bytes - preview.resting_bytes)
    reserved = max(step + fragmentation, preview.held_out_bytes + int(_USUAL_HOLES * passing))
    if limit_bytes is not None and allocated + context <= limit_bytes:  # no card reserves more than it has
        reserved = max(allocated, min(reserved, limit_bytes - context))
    return DeviceMemory(allocated, reserved, reserved + context, least, reserved - allocated, context)


def room_for_tensors(settings: MemorySettings, limit_bytes: int | None) -> int | None:
    """What a limit leaves for live tensors; None where there is none, and on a CPU, which never says it is full."""
    if limit_bytes is None or settings.device != "cuda":
        return None
    return limit_bytes - _context(settings)


def _context(settings: MemorySettings) -> int:
    return CONTEXT_BYTES + (NCCL_BYTES if settings.processes > 1 else 0)


def _holes_share(settings: MemorySettings) -> float:
    if settings.shards_parameters or settings.strategy == "fsdp":
        return _HOLES_SHARDED
    return _HOLES_TRAINED if settings.is_full else _HOLES_FROZEN


def host_memory_bytes(architecture: Architecture, settings: MemorySettings, dataset_tokens: int) -> int:
    """Host memory of all processes of one machine: each reads weights through a file map, one tensor at a time.

    A copy of what is being saved is not counted: it is made only where there is room.
    Where training itself is on the CPU, tensors are host memory and are added by the caller.
    """
    trained = trainable_parameters(architecture, settings)
    program = _PYTHON_CPU_BYTES if settings.device == "cpu" else _PYTHON_BYTES
    total = settings.processes * (program + 12 * dataset_tokens // max(1, settings.processes))
    if "parameters" in settings.offload and not settings.is_full:
        total += base_weight_bytes(architecture, settings)
    if {"parameters", "optimizer"} & settings.offload:
        optimizer = optimizer_memory(settings.optimizer, settings.trained_bytes, settings.device)
        total += int(trained * (optimizer.states + 2 * settings.trained_bytes))
    if "activations" in settings.offload:
        kept = architecture.layers * settings.positions * architecture.hidden_size * settings.residual_bytes
        total += settings.processes * kept
    if settings.streamed:
        total += waiting_bytes(architecture, settings)
        if settings.device == "cuda":  # a map of the base's files, which must be cached not to be read in every step
            total += settings.base_bytes * table_weights(architecture, settings)
    return total


def checkpoint_bytes(architecture: Architecture, settings: MemorySettings) -> int:
    """One checkpoint: trained weights in fp32 and the optimizer's states."""
    trained = trainable_parameters(architecture, settings)
    states = optimizer_memory(settings.optimizer, settings.trained_bytes, settings.device).states
    return int(trained * (settings.trained_bytes + states))


def disk_bytes(
    architecture: Architecture, settings: MemorySettings, *, dataset_tokens: int, checkpoints_kept: int
) -> int:
    """What the run writes: checkpoints (one more than is kept, while it is being written), tokens, adapter or model,
    and the slab of a streamed base, which other runs of the same base use too.
    """
    final = adapter_parameters(architecture, settings) * FULL_BYTES
    if settings.is_full:
        final = architecture.parameters * (HALF_BYTES if settings.is_narrow else FULL_BYTES)
    slab = slab_bytes(architecture, settings) if settings.streamed else 0
    return (checkpoints_kept + 1) * checkpoint_bytes(architecture, settings) + 5 * dataset_tokens + final + slab
