"""Bytes that one decoder layer keeps for the backward pass, and what it needs for a moment: read off its tape."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from charkha.plan.architecture import Architecture
from charkha.plan.layer_tape import LayerTape
from charkha.plan.memory_settings import FULL_BYTES, MemorySettings
from charkha.plan.tape import Tensor


@dataclass(frozen=True)
class LayerMemory:
    """Bytes of one layer for one micro batch."""

    saved: int  # kept from forward to backward, 16-bit copies of weights with it
    input: int  # the residual that enters the layer: all that checkpointing keeps
    stream_width: int  # bytes of one element of that residual
    weight_copies: int  # of `saved`
    kept: int  # of the layer by checkpointing: its input; what was made and stays with selective checkpointing, or int8
    forward: int  # at the most while the layer runs, `saved` included
    forward_kept: int  # the same with checkpointing, beside what `kept` has
    backward: int  # at the most while its gradients are taken, what is still saved and gradients from above included
    recomputed: int  # the same from a checkpoint, beside what `kept` has


@lru_cache(maxsize=256)
def layer_memory(architecture: Architecture, settings: MemorySettings) -> LayerMemory:
    """What one layer keeps and needs."""
    layer = _in_the_steady_stream(architecture, settings)
    tape = layer.tape
    attended = layer.attended if settings.selective else ()  # which then need not run again
    there = frozenset(tensor.owner for tensor in (layer.entering, *attended))
    kept = there | {tensor.owner for tensor in _outside_hooks(layer, settings)}
    again = tape.forward_peak(from_checkpoint=not settings.reentrant, already_there=there | {*layer.before})
    return LayerMemory(
        saved=sum(tensor.size for tensor in tape.saved() if not tensor.is_weight),
        input=layer.entering.size,
        stream_width=layer.entering.width,
        weight_copies=sum(copy.size for copy in layer.linears.copies),
        kept=sum(tensor.size for tensor in kept),
        forward_kept=tape.forward_peak(saving=False, already_there=kept),
        forward=tape.forward_peak(already_there=frozenset(layer.before)),  # which counts as saved already
        backward=tape.backward_peak(),
        recomputed=_recomputed(layer, settings, again, there),
    )


def forward_alone(architecture: Architecture, settings: MemorySettings) -> int:
    """Most bytes of one layer that runs without gradients, what enters it included; 16-bit copies of weights are not.

    Autocast keeps those of trained matrices until the model's forward is over.
    """
    layer = _in_the_steady_stream(architecture, settings)
    there = frozenset((layer.entering, *layer.linears.copies))
    return layer.entering.size + layer.tape.forward_peak(saving=False, already_there=there)


def _recomputed(layer: LayerTape, settings: MemorySettings, again: int, there: frozenset[Tensor]) -> int:
    if not settings.reentrant:
        return layer.tape.backward_peak(recompute=again, already_there=there)
    # The old checkpointing runs the layer as a whole first; its output stays until its gradients are taken.
    output = layer.leaving.size
    return output + max(again, layer.tape.backward_peak(already_there=there))


def _in_the_steady_stream(architecture: Architecture, settings: MemorySettings) -> LayerTape:
    """A layer whose residual leaves it as wide as it came: adapters in fp32 may have widened it in the first layer."""
    layer = LayerTape(architecture, settings, settings.residual_bytes)
    if layer.leaving.width != layer.entering.width:
        layer = LayerTape(architecture, settings, layer.leaving.width)
    return layer


def _outside_hooks(layer: LayerTape, settings: MemorySettings) -> list[Tensor]:
    """What stays whatever checkpointing lets go of, unless the first forward is run without gradients."""
    return [] if settings.reentrant else layer.tape.outside_hooks


def norm_bytes(architecture: Architecture, settings: MemorySettings, stream_width: int) -> int:
    """Per element of the final norm's input as it is kept: RMSNorm upcasts, LayerNorm under CUDA's autocast."""
    if settings.fused_norms:
        return stream_width
    upcasts = architecture.final_norm.kind == "rms" or (settings.autocast and settings.device == "cuda")
    return FULL_BYTES if upcasts else stream_width
