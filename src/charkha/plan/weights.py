"""Bytes of weights: the base in its storage type, quantized with its constants, and what an adapter adds."""

from __future__ import annotations

import re
from functools import cache

from charkha.plan.architecture import Architecture
from charkha.plan.layers import Linear
from charkha.plan.memory_settings import FULL_BYTES, HALF_BYTES, MemorySettings

HEADS = ("lm_head", "embed_out")
LAYERS_LOOKED_AT = 4096  # one by one, for names that say which; no model has as many
EMBEDDINGS = ("embed_tokens", "embed_in", "wte", "word_embeddings")


def nf4_bytes(weights: int, *, double_quantization: bool = True) -> int:
    """Bytes of one NF4 or FP4 matrix: 4.127 bits a weight with double quantization when it is large, 4.5 without.

    Two weights a byte; a constant per 64 weights, in 8 bits with an fp32 constant per 256 of them and the codes of
    256 fp32 values and an offset, or in fp32; per matrix the 16 fp32 values of the 4-bit codes. Layout: bitsandbytes
    0.50, QuantState with state2.
    """
    return (weights + 1) // 2 + _nf4_constants(weights, double_quantization)


def _nf4_constants(weights: int, double_quantization: bool) -> int:
    blocks = -(-weights // 64)
    if not double_quantization:
        return FULL_BYTES * (blocks + 16)
    return blocks + FULL_BYTES * (-(-blocks // 256) + 16 + 256 + 1)


def quantized_layer_bytes(architecture: Architecture, settings: MemorySettings) -> tuple[int, int]:
    """(codes, constants) of one layer's quantized matrices; (0, 0) where nothing is quantized.

    Only linear layers are quantized: in transformers 5 the experts of a mixture are packed in 3-D parameters, which
    bitsandbytes passes by. Earlier versions, which ran experts in turn, had linear layers for each.
    """
    if settings.quantization == "none":
        return 0, 0
    matrices = [(linear.weights, linear.outputs) for linear in architecture.linears]
    if architecture.experts and settings.experts_in_turn:
        experts = architecture.experts
        one = (experts.hidden_size * experts.intermediate_size, experts.intermediate_size)
        matrices += [one] * (3 * experts.count)
    if settings.quantization == "int8":
        return sum(weights for weights, _ in matrices), FULL_BYTES * sum(outputs for _, outputs in matrices)
    constants = sum(_nf4_constants(weights, settings.double_quantization) for weights, _ in matrices)
    return sum((weights + 1) // 2 for weights, _ in matrices), constants


def why_not_quantized(architecture: Architecture, settings: MemorySettings) -> str | None:
    """Why training refuses a resident base of that storage; None where it does not."""
    if (settings.method, settings.quantization, settings.device) == ("dora", "int8", "cpu"):
        return "PEFT's DoRA loses the scales of int8 weights on a CPU"
    if settings.quantization == "none" or architecture.experts is None or settings.experts_in_turn:
        return None
    return "this model's experts are 3-D parameters, which would stay whole"


def base_weight_bytes(architecture: Architecture, settings: MemorySettings) -> int:
    """Bytes of the whole base, unsharded: `full` holds what is trained, 4 and 8 bits cover the linear layers only."""
    if settings.quantization == "none":
        return settings.base_bytes * architecture.parameters
    codes, constants = quantized_layer_bytes(architecture, settings)
    rest = architecture.parameters - architecture.layers * _quantized_weights(architecture, settings)
    return architecture.layers * (codes + constants) + settings.base_bytes * rest


def layer_weight_bytes(architecture: Architecture, settings: MemorySettings) -> int:
    """Bytes of one layer's weights as its arithmetic meets them: quantized, or in the type of the matrix products."""
    codes, constants = quantized_layer_bytes(architecture, settings)
    if not codes:
        return settings.activation_bytes * architecture.layer_parameters
    return (
        codes
        + constants
        + settings.base_bytes * (architecture.layer_parameters - _quantized_weights(architecture, settings))
    )


def _quantized_weights(architecture: Architecture, settings: MemorySettings) -> int:
    """Elements of one layer."""
    if architecture.experts and not settings.experts_in_turn:
        return sum(linear.weights for linear in architecture.linears)
    return architecture.linear_weights


def adapter_targets(architecture: Architecture, settings: MemorySettings) -> tuple[Linear, ...]:
    """The linear layers of one layer that get an adapter, by PEFT's rules for `target_modules`; none for `full`."""
    if settings.method not in ("lora", "dora", "ia3"):
        return ()
    wanted = settings.target_modules
    if wanted == "all-linear":
        return architecture.linears
    if isinstance(wanted, str):
        return tuple(linear for linear in architecture.linears if _adapted_layers(architecture, settings, linear))
    return tuple(linear for linear in architecture.linears if _is_named(linear.name, wanted))


def adapts_experts(architecture: Architecture, settings: MemorySettings) -> bool:
    """Whether PEFT's `all-linear` has LoRA on packed experts too, whose sum with the base is then made whole."""
    packed = architecture.experts is not None and not settings.experts_in_turn
    return packed and settings.method == "lora" and settings.target_modules == "all-linear"


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
    """Parameters that the adapter adds: LoRA's A [r, inputs] and B [outputs, r], DoRA's magnitudes with them; IA3's
    scales; prompt tuning's embeddings. 0 for `full`.
    """
    if settings.method == "prompt_tuning":
        return settings.num_virtual_tokens * architecture.hidden_size
    targets = adapter_targets(architecture, settings)
    if settings.method == "ia3":
        return sum(
            len(_adapted_layers(architecture, settings, linear))
            * (linear.inputs if linear.reads == "mlp_inner" else linear.outputs)
            for linear in targets
        )
    ranks = ((linear, _ranks_of_all_layers(architecture, settings, linear)) for linear in targets)
    in_layers = sum(rank * (linear.inputs + linear.outputs) for linear, rank in ranks)
    if settings.method == "dora":
        in_layers += sum(len(_adapted_layers(architecture, settings, linear)) * linear.outputs for linear in targets)
    if adapts_experts(architecture, settings) and architecture.experts:
        experts = architecture.experts  # gate and up are one matrix of twice the rank
        one = (
            2 * (experts.hidden_size + 2 * experts.intermediate_size) + experts.intermediate_size + experts.hidden_size
        )
        in_layers += architecture.layers * experts.count * settings.r * one
    on_head = any(target in HEADS for target in targets_outside_layers(architecture, settings))
    return in_layers + (settings.r * (architecture.hidden_size + architecture.vocab_size) if on_head else 0)


def _adapted_layers(architecture: Architecture, settings: MemorySettings, linear: Linear) -> range | tuple[int, ...]:
    """Numbers of the decoder layers in which that linear layer gets an adapter.

    One string is a regular expression over the whole name, as PEFT reads it.
    """
    chosen: range | tuple[int, ...] = range(architecture.layers)
    if settings.layers_to_transform is not None and settings.method != "ia3":
        chosen = settings.layers_to_transform
    wanted, path = settings.target_modules, architecture.layers_path
    if not isinstance(wanted, str) or wanted == "all-linear":
        return chosen
    return _matching(wanted, path, linear.name, tuple(chosen[:LAYERS_LOOKED_AT]))


@cache
def _matching(pattern: str, path: str, name: str, numbers: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(number for number in numbers if re.fullmatch(pattern, f"{path}.{number}.{name}"))


def _ranks_of_all_layers(architecture: Architecture, settings: MemorySettings, linear: Linear) -> int:
    """The ranks of that linear layer in every decoder layer with LoRA, added up."""
    adapted = _adapted_layers(architecture, settings, linear)
    if not settings.rank_pattern:
        return settings.r * len(adapted)
    path, first = architecture.layers_path, adapted[:LAYERS_LOOKED_AT]
    ranks = [_rank(f"{path}.{number}.{linear.name}", settings.r, settings.rank_pattern) for number in first]
    return sum(ranks) + settings.r * (len(adapted) - len(ranks))


@cache
def _rank(name: str, r: int, rank_pattern: tuple[tuple[str, int], ...]) -> int:
    """PEFT's rule: the first pattern that the end of the name matches."""
    return next((rank for pattern, rank in rank_pattern if re.match(rf"(.*\.)?({pattern})$", name)), r)


def largest_rank(architecture: Architecture, settings: MemorySettings, linear: Linear) -> int:
    """Of that linear layer in any decoder layer: what a closed form of equal layers counts in all of them."""
    if not settings.rank_pattern:
        return settings.r
    numbers, path = _adapted_layers(architecture, settings, linear)[:LAYERS_LOOKED_AT], architecture.layers_path
    ranks = (_rank(f"{path}.{number}.{linear.name}", settings.r, settings.rank_pattern) for number in numbers)
    return max(ranks, default=settings.r)


def saved_module_parameters(architecture: Architecture, settings: MemorySettings) -> int:
    """Parameters of `modules_to_save`: copies of embedding or head that are trained whole beside the adapter."""
    matrix = architecture.vocab_size * architecture.hidden_size
    return sum(matrix for name in settings.modules_to_save if name.rpartition(".")[2] in (*HEADS, *EMBEDDINGS))


def trainable_parameters(architecture: Architecture, settings: MemorySettings) -> int:
    """Parameters that get a gradient."""
    if settings.method == "full":
        return architecture.parameters - architecture.frozen_beside
    if settings.method == "norms":
        parts = (*architecture.norms, *architecture.query_key_norms)
        return architecture.layers * sum(norm.parameters for norm in parts) + architecture.final_norm.parameters
    return adapter_parameters(architecture, settings) + saved_module_parameters(architecture, settings)


def weight_copy_bytes(architecture: Architecture, settings: MemorySettings) -> int:
    """Bytes per layer of the 16-bit copies that autocast makes of fp32 trained matrices and backward keeps."""
    if not settings.autocast:
        return 0
    if settings.method == "full":
        return HALF_BYTES * architecture.linear_weights
    if settings.method not in ("lora", "dora"):
        return 0
    targets = adapter_targets(architecture, settings)
    ranks = [(largest_rank(architecture, settings, linear), linear) for linear in targets]
    return HALF_BYTES * sum(rank * (linear.inputs + linear.outputs) for rank, linear in ranks)
