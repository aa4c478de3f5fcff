"""Bytes that one decoder layer keeps for the backward pass, and what it needs for a moment.

Counted from the tensors that autograd saves in transformers 5.23 and PEFT 0.21 (torch.autograd.graph.
saved_tensors_hooks), each storage once. Widths: products of matrices in `activation_bytes`, norms in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

from charkha.plan.architecture import Architecture
from charkha.plan.layers import Linear, Stream
from charkha.plan.memory_settings import FULL_BYTES, HALF_BYTES, MemorySettings
from charkha.plan.weights import adapter_targets, weight_copy_bytes

_EVERY_STREAM: tuple[Stream, ...] = ("attention_in", "attention_out", "mlp_in", "mlp_inner")


@dataclass(frozen=True)
class LayerMemory:
    """Bytes of one layer for one micro batch."""

    saved: int  # kept from forward to backward, 16-bit copies of weights with it
    input: int  # the residual that enters the layer: all that checkpointing keeps
    input_is_saved: bool  # whether `saved` already has that very tensor
    weight_copies: int  # of `saved`
    forward_temporaries: int  # beside `saved`, where the layer's forward needs most
    backward_temporaries: int

    kept: int  # of the layer by checkpointing: its input, and with selective checkpointing some of what was made

    @property
    def recomputed(self) -> int:
        """Bytes beside the checkpoint while the layer is run again and its gradients are taken."""
        again = self.saved - (self.kept if self.input_is_saved else self.kept - self.input)
        return again + max(self.forward_temporaries, self.backward_temporaries)


def layer_memory(architecture: Architecture, settings: MemorySettings) -> LayerMemory:
    """What one layer keeps and needs."""
    copies = weight_copy_bytes(architecture, settings)
    saved = (
        _norms(architecture, settings)
        + _attention(architecture, settings)
        + _mlp(architecture, settings)
        + _linear_inputs(architecture, settings)
        + _adapter_outputs(architecture, settings)
        + copies
    )
    entering = settings.positions * architecture.hidden_size * settings.residual_bytes
    return LayerMemory(
        saved=saved,
        input=entering,
        kept=entering + (_selectively_kept(architecture, settings) if settings.selective else 0),
        input_is_saved=norm_bytes(architecture, settings) == settings.residual_bytes,
        weight_copies=copies,
        forward_temporaries=_forward_temporaries(architecture, settings),
        backward_temporaries=_backward_temporaries(architecture, settings),
    )


def norm_bytes(architecture: Architecture, settings: MemorySettings) -> int:
    """Per element of a norm's input as it is kept: RMSNorm upcasts by itself, LayerNorm under CUDA's autocast."""
    if settings.fused_norms:
        return settings.residual_bytes
    upcasts = architecture.final_norm.kind == "rms" or (settings.autocast and settings.device == "cuda")
    return FULL_BYTES if upcasts else settings.residual_bytes


def _selectively_kept(architecture: Architecture, settings: MemorySettings) -> int:
    """What the attention kernel gives, which then need not run again: its output and a sum per row and head."""
    row_sums = architecture.heads * FULL_BYTES
    return settings.positions * (architecture.query_size * settings.activation_bytes + row_sums)


def _adapter_outputs(architecture: Architecture, settings: MemorySettings) -> int:
    """What DoRA and IA3 keep of every adapted product: they scale it by a trained vector."""
    targets = adapter_targets(architecture, settings)
    if settings.method == "dora":
        # The base's product and the adapter's, both multiplied by the magnitude; of what was dropped out, again.
        products = 3 if settings.lora_dropout > 0 else 2
        return settings.positions * sum(linear.outputs for linear in targets) * products * settings.activation_bytes
    if settings.method == "ia3":  # products as they were; before the MLP's last linear the scaled input, in fp32
        scaled = sum(linear.outputs for linear in targets if linear.reads != "mlp_inner") * settings.activation_bytes
        inner = sum(linear.inputs for linear in targets if linear.reads == "mlp_inner") * FULL_BYTES
        return settings.positions * (scaled + inner)
    return 0


def _scaling_gradients(architecture: Architecture, settings: MemorySettings) -> int:
    """Gradients in fp32 of what DoRA and IA3 multiply by their fp32 vectors, while the MLP's are made."""
    count = {"dora": 3, "ia3": 2}.get(settings.method, 0) if settings.autocast else 0
    return count * settings.positions * architecture.intermediate_size * FULL_BYTES


def _norms(architecture: Architecture, settings: MemorySettings) -> int:
    count = len(architecture.norms)
    distinct = 1 if architecture.parallel else count  # in a parallel layer every norm reads the same residual
    hidden = settings.positions * architecture.hidden_size
    saved = distinct * hidden * norm_bytes(architecture, settings) + count * settings.positions * 2 * FULL_BYTES
    heads = settings.positions * (architecture.query_size + architecture.key_value_size)
    if architecture.query_key_norms:
        saved += heads * FULL_BYTES
    trains_norms = settings.method in ("full", "norms")
    if trains_norms and architecture.final_norm.kind == "rms" and not settings.fused_norms:
        # A scale's gradient needs what it scales.
        saved += count * hidden * settings.residual_bytes
        saved += heads * settings.activation_bytes if architecture.query_key_norms else 0
    return saved


def _attention(architecture: Architecture, settings: MemorySettings) -> int:
    """Query, key and value, then what the kernel keeps: its output and a sum per row, or whole score matrices."""
    width = settings.activation_bytes * settings.positions
    query, key = width * architecture.query_size, width * architecture.key_value_size
    masked = settings.attention == "sdpa" and settings.has_padding
    repeats = masked or settings.attention == "eager" or settings.keys_repeated
    repeated = architecture.heads != architecture.kv_heads and repeats
    value = query if repeated else key
    if architecture.fused_projections and not repeated:
        value = query + 2 * key  # the value is a view of the whole projection, which stays alive with it
    saved = query + (query if repeated else key) + value
    if settings.attention == "eager":
        return saved + _scores(architecture, settings)
    row_sums = settings.positions * architecture.heads * FULL_BYTES
    mask = settings.positions * settings.tokens * settings.activation_bytes if masked else 0
    return saved + query + row_sums + mask


def _scores(architecture: Architecture, settings: MemorySettings) -> int:
    """Eager attention keeps probabilities in fp32, their 16-bit copy, and capped scores where there is a cap."""
    elements = settings.positions * settings.tokens * architecture.heads
    copy = HALF_BYTES if settings.autocast else 0
    capped = settings.activation_bytes if architecture.attention_softcap else 0
    return elements * (FULL_BYTES + copy + capped)


def _mlp(architecture: Architecture, settings: MemorySettings) -> int:
    """Gate, its activation and up; without a gate what enters the activation. The inner product is a linear's input.

    A mixture keeps that for every expert that a token is sent to, and each expert's output, which is weighted.
    """
    kept = (2 if settings.fused_mlp else 3) if architecture.gated_mlp else 1
    inner = kept * architecture.intermediate_size * settings.activation_bytes
    if not architecture.experts:
        return settings.positions * inner
    outputs = architecture.hidden_size * settings.activation_bytes
    return settings.positions * architecture.experts.per_token * (inner + outputs)


def _linear_inputs(
    architecture: Architecture, settings: MemorySettings, streams: tuple[Stream, ...] = _EVERY_STREAM
) -> int:
    """Inputs of linear layers that are trained or have an adapter, dropout masks, and what lies between A and B."""
    targets = [linear for linear in adapter_targets(architecture, settings) if linear.reads in streams]
    every = [linear for linear in architecture.linears if linear.reads in streams]
    trained = every if settings.is_full else targets if settings.method in ("lora", "dora") else []
    own = [linear for linear in trained if _has_own_copy(linear, settings)]
    shared = {linear.reads: linear.inputs for linear in trained if linear not in own}
    if settings.quantization != "none" and settings.quantized_keeps_inputs:
        shared = {linear.reads: linear.inputs for linear in every}
    if settings.attention != "eager" and not architecture.fused_projections:
        shared.pop("attention_out", None)  # the attention kernel keeps that tensor already
    between = settings.r * len(targets) if settings.method in ("lora", "dora") else 0
    elements = sum(linear.inputs for linear in own) * _copy_bytes(settings)
    if settings.fused_lora:  # one function of query, key and value keeps what enters it beside each adapter's copy
        shared["attention_in"] = architecture.hidden_size
    elements += (sum(shared.values()) + between) * settings.activation_bytes
    if settings.is_full and architecture.experts and "mlp_in" in streams:
        per_token = architecture.experts.per_token
        elements += per_token * (architecture.hidden_size + architecture.intermediate_size) * settings.activation_bytes
    masks = sum(linear.inputs for linear in targets) * _mask_bytes(settings)
    return settings.positions * (elements + masks)


def _has_own_copy(linear: Linear, settings: MemorySettings) -> bool:
    """Whether the input is copied for this linear alone: cast (autocast keeps no casts, PEFT casts to fp32 adapters),
    or dropped out.
    """
    if settings.is_full:
        return settings.autocast and linear.reads in ("attention_in", "mlp_in")  # outputs of norms are fp32
    casts = settings.is_narrow and settings.trained_dtype == "fp32"
    return settings.autocast or casts or settings.lora_dropout > 0


def _copy_bytes(settings: MemorySettings) -> int:
    """Per element of an input copied for one adapter: of the product's type, which is fp32 without autocast."""
    outside_autocast = settings.is_narrow and not settings.autocast and not settings.is_full
    return settings.trained_bytes if outside_autocast else settings.activation_bytes


def _mask_bytes(settings: MemorySettings) -> int:
    """Per element of a dropout mask: torch keeps booleans on a GPU, the input's own type (fp32) on a CPU."""
    if settings.method not in ("lora", "dora") or settings.lora_dropout == 0 or settings.fused_lora:
        return 0
    return FULL_BYTES if settings.device == "cpu" else 1


def _forward_temporaries(architecture: Architecture, settings: MemorySettings) -> int:
    """At the last linear of the MLP, when all else is saved: its input, PEFT's fp32 copy of it, and three hiddens."""
    inner = settings.positions * architecture.intermediate_size
    targets = adapter_targets(architecture, settings)
    has_adapter = settings.method in ("lora", "dora") and any(linear.reads == "mlp_inner" for linear in targets)
    hidden = 3 * settings.positions * architecture.hidden_size * settings.residual_bytes
    if settings.is_full:
        return hidden
    if architecture.experts:
        inner = _at_once(inner, architecture, settings)
    kept_as_it_is = has_adapter and not settings.autocast and settings.lora_dropout == 0
    cast = FULL_BYTES if has_adapter and settings.autocast else 0
    cast *= 2 if settings.lora_dropout > 0 else 1  # before and after dropout
    return hidden + inner * (cast + (0 if kept_as_it_is else settings.activation_bytes))


def _backward_temporaries(architecture: Architecture, settings: MemorySettings) -> int:
    """The larger of MLP and attention: gradients beside what is saved, an unpacked NF4 matrix, a weight's gradient."""
    width = settings.activation_bytes
    inner = settings.positions * architecture.intermediate_size * width
    if architecture.experts:
        inner = _at_once(inner, architecture, settings)
    hidden = settings.positions * architecture.hidden_size * width
    unpacked = width * max((linear.weights for linear in architecture.linears), default=0)
    # Gradients of the inner product, of gate's activation and of up; by then the product itself is gone if it was kept.
    at_product = (3 if architecture.gated_mlp else 2) * inner
    if _keeps_product(architecture, settings):
        at_product -= inner
    mlp = max(at_product, inner + hidden + (unpacked if settings.quantization != "none" else 0))
    if settings.is_full and not architecture.experts:
        mlp += width * architecture.intermediate_size * architecture.hidden_size
    mlp += _scaling_gradients(architecture, settings)
    if settings.method == "dora":  # the whole adapted matrix and its norm in fp32, to scale by, and its 16-bit copies
        copies = 2 * HALF_BYTES if settings.autocast else 0
        mlp += (2 * FULL_BYTES + copies) * max((linear.weights for linear in architecture.linears), default=0)
    # When attention's turn comes, what the MLP had kept is gone.
    freed = _mlp(architecture, settings) + _linear_inputs(architecture, settings, ("mlp_in", "mlp_inner"))
    return max(mlp, _attention_backward(architecture, settings) - freed)


def _attention_backward(architecture: Architecture, settings: MemorySettings) -> int:
    """Gradients of output, query, key and value; an fp32 sum for the query's on a GPU; scores where they are whole."""
    if settings.attention == "eager":
        return 2 * settings.positions * settings.tokens * architecture.heads * FULL_BYTES
    query, key = architecture.query_size, architecture.key_value_size
    fp32_sum = query * FULL_BYTES if settings.device == "cuda" else 0
    return settings.positions * ((2 * query + 2 * key) * settings.activation_bytes + fp32_sum)


def _at_once(inner: int, architecture: Architecture, settings: MemorySettings) -> int:
    """Bytes of an inner tensor of experts that work at the same time: all of them, or one after another."""
    experts = architecture.experts
    if experts is None:
        return inner
    together = inner * experts.per_token
    return together // experts.count if settings.experts_in_turn else together


def _keeps_product(architecture: Architecture, settings: MemorySettings) -> bool:
    """Whether the MLP's inner product is kept for the backward pass of what reads it."""
    if settings.is_full:
        return True
    targets = adapter_targets(architecture, settings)
    return settings.method in ("lora", "dora") and any(linear.reads == "mlp_inner" for linear in targets)
