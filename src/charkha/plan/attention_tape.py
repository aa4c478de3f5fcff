"""Attention on a tape: projections, rotary positions, and one kernel or whole score matrices."""

from __future__ import annotations

from charkha.plan.architecture import Architecture
from charkha.plan.layers import Linear
from charkha.plan.memory_settings import FULL_BYTES, MemorySettings
from charkha.plan.parts_tape import PartsTape
from charkha.plan.tape import Tape, Tensor


def attention(layer: PartsTape, normed: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The output projection's result; and what the kernel made, which selective checkpointing keeps."""
    architecture, settings, tape = layer.architecture, layer.settings, layer.tape
    query, key, value = _projections(layer, normed)
    if architecture.query_key_norms:
        of_query, of_key = architecture.query_key_norms
        query, key = layer.norm(query, of_query), layer.norm(key, of_key)
    if not architecture.learned_positions:
        stream = layer.entering.width
        query, key = (_rotated(tape, part, max(part.width, stream)) for part in (query, key))
    layer.cached_widths = key.width, value.width
    widths = _softmax_width(architecture, settings, normed), value.width
    if settings.autocast:
        query, key, value = (tape.cast(part, settings.activation_bytes) for part in (query, key, value))
    if _is_repeated(architecture, settings):
        key, value = (tape.operator((part,), query.elements, part.width) for part in (key, value))
    kernel = attention_kernel(architecture, settings)
    kept: tuple[Tensor, ...] = ()
    if kernel == "whole":
        attended = _scores(layer, query, key, value, widths)
    elif kernel == "math":
        attended = _math(layer, query, key, value)
    else:
        attended, sums = _kernel(layer, query, key, value)
        kept = (attended, sums)
    output = next(linear for linear in architecture.linears if linear.reads == "attention_out")
    return layer.linears.linear(attended, output), kept


def attention_kernel(architecture: Architecture, settings: MemorySettings) -> str:
    """Whole scores, torch's math, or one kernel. torch falls back to math where query and key differ in heads and
    nobody says that they may (sdp_utils_cpp.h), and on a CPU where attention drops out.
    """
    if settings.attention == "eager":
        return "whole"
    if settings.attention != "sdpa" or settings.keys_repeated:
        return "kernel"
    one_head = architecture.model_type == "falcon" and architecture.kv_heads == 1 and architecture.heads > 1
    drops_out = architecture.dropout and settings.device == "cpu"
    return "math" if one_head or drops_out else "kernel"


def is_masked(architecture: Architecture, settings: MemorySettings) -> bool:
    """Whether attention gets a mask of pairs: where rows are padded, and where most layers look back less far."""
    windowed = 2 * architecture.windowed_layers >= architecture.layers and 0 < architecture.window < settings.tokens
    return settings.attention == "sdpa" and (settings.has_padding or windowed)


def _softmax_width(architecture: Architecture, settings: MemorySettings, normed: Tensor) -> int:
    """Bytes of one of eager attention's probabilities: fp32, or as Falcon's and GPT-2's own code has it."""
    if architecture.model_type == "falcon":
        return normed.width
    on_cpu = settings.device == "cpu"  # where autocast leaves a softmax in 16 bits
    return settings.activation_bytes if architecture.dropout and on_cpu else FULL_BYTES


def _is_repeated(architecture: Architecture, settings: MemorySettings) -> bool:
    """Keys and values are copied for every query head: for whole scores, beside a mask, and in older models always."""
    if architecture.heads == architecture.kv_heads:
        return False
    if architecture.kv_heads == 1 and architecture.fused_projections:
        return settings.attention == "eager"
    return (
        is_masked(architecture, settings)
        or settings.attention == "eager"
        or settings.keys_repeated
        or architecture.model_type == "falcon"
    )


def _projections(layer: PartsTape, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    architecture, positions = layer.architecture, layer.settings.positions
    query, key = positions * architecture.query_size, positions * architecture.key_value_size
    linears = linears_around_attention(architecture)[0]
    if len(linears) == 1:
        whole = layer.linears.linear(normed, linears[0])
        parts = layer.tape.split(whole, (query, key, key))
        return parts[0], parts[1], parts[2]
    made = [layer.linears.linear(normed, linear) for linear in linears]
    return made[0], made[1], made[2]


def linears_around_attention(architecture: Architecture) -> tuple[tuple[Linear, ...], tuple[Linear, ...]]:
    """Those before the attention kernel, and the MLP's; the output projection stands between them."""
    place = [linear.reads for linear in architecture.linears].index("attention_out")
    return architecture.linears[:place], architecture.linears[place + 1 :]


def _rotated(tape: Tape, part: Tensor, width: int) -> Tensor:
    """Times cosine, and its halves rotated times sine: two products and the rotated halves beside the result."""
    size = part.elements * width
    return tape.operator((part,), part.elements, width, inside=2 * size, inside_backward=2 * size)


def _kernel(layer: PartsTape, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keeps what it reads, its output and a sum a row and head; a mask's bias is made anew in every layer."""
    architecture, settings, tape = layer.architecture, layer.settings, layer.tape
    sums = Tensor(settings.positions * architecture.heads, FULL_BYTES, needs_gradient=False)
    masked = is_masked(architecture, settings)
    bias = Tensor(settings.positions * settings.tokens, query.width, needs_gradient=False)
    saves = (query, key, value, sums, *((bias,) if masked else ()))
    inside = FULL_BYTES * query.elements if settings.device == "cuda" else 0  # the query's gradient is summed in fp32
    attended = tape.operator(
        (query, key, value), query.elements, query.width, saves=saves, inside_backward=inside, saves_output=True
    )
    return attended, sums


def _scores(layer: PartsTape, query: Tensor, key: Tensor, value: Tensor, widths: tuple[int, int]) -> Tensor:
    """Eager attention: scores, scaled, capped, masked, and their softmax, [heads, tokens, tokens].

    `widths`: of the softmax, and of what is made of it, which is that of the values before autocast.
    """
    architecture, settings, tape = layer.architecture, layer.settings, layer.tape
    width = settings.activation_bytes
    count = settings.positions * settings.tokens * architecture.heads
    scores = tape.operator((query, key), count, width, saves=(query, key))
    scores = tape.operator((scores,), count, width)
    if architecture.attention_softcap:
        scores = tape.operator((scores,), count, width)
        scores = tape.operator((scores,), count, width, saves_output=True)
        scores = tape.operator((scores,), count, width)
    masked = tape.operator((scores,), count, width, passes_gradient=True)
    wide = tape.cast(masked, widths[0])
    softmax = tape.operator((wide,), count, widths[0], saves_output=True)
    likely = softmax if architecture.model_type == "falcon" else tape.cast(softmax, widths[1])
    tape.alive_until_here(masked, *((scores,) if architecture.model_type == "falcon" else ()))
    if architecture.dropout:
        likely = layer.dropout(likely)
    layer.scores = (likely,)
    likely = tape.cast(likely, width)
    attended = tape.operator((likely, value), query.elements, width, saves=(likely, value))
    return tape.operator((attended,), attended.elements, width)  # heads beside each other


def _math(layer: PartsTape, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Of torch: _scaled_dot_product_attention_math, in fp32 for 16-bit inputs; keys and values for every head."""
    architecture, settings, tape = layer.architecture, layer.settings, layer.tape
    wide = [tape.cast(part, FULL_BYTES) for part in (query, key, value)]
    scaled = tape.operator((wide[0],), query.elements, FULL_BYTES)
    keys = tape.operator((wide[1],), query.elements, FULL_BYTES)
    count = settings.positions * settings.tokens * architecture.heads
    scores = tape.operator((scaled, keys), count, FULL_BYTES, saves=(scaled, keys))
    scores = tape.operator((scores,), count, FULL_BYTES, passes_gradient=True)
    # _safe_softmax looks for rows that hide everything, in a boolean a score.
    likely = tape.operator((scores,), count, FULL_BYTES, saves_output=True, inside=count)
    if architecture.dropout:
        likely = layer.dropout(likely)
    values = tape.operator((wide[2],), query.elements, FULL_BYTES)
    attended = tape.operator((likely, values), query.elements, FULL_BYTES, saves=(likely, values))
    tape.alive_until_here(query, key, value, *wide, scaled)
    return tape.cast(attended, query.width)
