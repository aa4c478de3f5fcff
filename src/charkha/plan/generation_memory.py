"""Bytes while a model answers: its weights, the keys and values of what was said, and one layer at work.

As backends/torch/generate.py runs transformers 5.23: the cache grows by joining a layer's old and new keys, then its
values (cache_utils.DynamicLayer), a windowed layer's both at once; what the prompt left in a windowed layer is cut to
the window with the first new token, and until then is whole behind a view. Logits are made of the last token alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from charkha.plan.activations import forward_alone, layer_memory
from charkha.plan.architecture import Architecture
from charkha.plan.attention_tape import attention_kernel
from charkha.plan.layer_tape import LayerTape
from charkha.plan.memory_settings import FULL_BYTES, MemorySettings
from charkha.plan.sharding import shares

_KERNEL_ROWS = 128  # up to which bitsandbytes multiplies 4-bit weights as they are on a GPU
_THOUSAND = 1000


@dataclass(frozen=True)
class GenerationMemory:
    """Live tensor bytes of answering, by term at the moment that needs most; `terms` sum to `peak_bytes`."""

    peak_bytes: int
    peak_moment: str
    terms: dict[str, int]
    cache_bytes: int  # of all tokens
    thousand_tokens_bytes: int  # of the cache, for the first thousand tokens of one row


def with_the_adapter(settings: MemorySettings) -> MemorySettings:
    """How a run's model is loaded to answer: on one device, in the types of its weights, nothing trained."""
    return replace(
        settings,
        mixed_precision=False,
        lora_dropout=0.0,
        gradient_checkpointing=False,
        selective=False,
        fused_norms=False,
        fused_mlp=False,
        fused_lora=False,
        accumulation_steps=1,
        trained_positions=None,
        strategy="single",
        processes=1,
        offload=frozenset(),
        held_out=(),
    )


def merged(settings: MemorySettings) -> MemorySettings:
    """How the merged model, or one that was trained whole, is loaded: in the run's type, without an adapter."""
    narrow: dict[str, object] = {
        "method": "full",
        "quantization": "none",
        "trained_dtype": "bf16",
        "upcast_unquantized": False,
        "modules_to_save": (),
        "num_virtual_tokens": 0,
        "streamed": False,
    }
    return replace(with_the_adapter(settings), **narrow)  # type: ignore[arg-type]


def generation_memory(
    architecture: Architecture, settings: MemorySettings, *, rows: int, prompt: int, tokens: int, padded: bool = False
) -> GenerationMemory:
    """Answering `rows` prompts of `prompt` tokens at once until each has `tokens`; `padded`: prompts differ in length.

    `settings` are those of `with_the_adapter` or `merged`.
    """
    architecture = replace(architecture, dropout=False)
    at_prompt = replace(settings, rows=rows, tokens=prompt, padded=padded)
    held = _held(architecture, settings)
    moments = {
        "prompt": held | _prompt(architecture, at_prompt),
        "last token": held | _last_token(architecture, replace(at_prompt, tokens=1, num_virtual_tokens=0), tokens),
    }
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    terms = {name: size for name, size in sorted(moments[moment].items(), key=lambda term: -term[1]) if size}
    one = replace(at_prompt, rows=1)
    return GenerationMemory(
        peak_bytes=sum(terms.values()),
        peak_moment=moment,
        terms=terms,
        cache_bytes=cache_bytes(architecture, at_prompt, tokens),
        thousand_tokens_bytes=cache_bytes(architecture, one, _THOUSAND),
    )


def cache_bytes(architecture: Architecture, settings: MemorySettings, tokens: int) -> int:
    """Keys and values of `tokens` tokens a row, windowed layers holding no more than their window."""
    window = min(tokens, architecture.window) if architecture.window else tokens
    full = architecture.layers - architecture.windowed_layers
    return _a_layers_token(architecture, settings) * (full * tokens + architecture.windowed_layers * window)


def _a_layers_token(architecture: Architecture, settings: MemorySettings) -> int:
    """Bytes that one layer keeps of one position of all rows. Falcon of the second kind keeps keys for every head."""
    shared = architecture.model_type == "falcon" and architecture.kv_heads not in (1, architecture.heads)
    heads = architecture.heads if shared else architecture.kv_heads
    keys, values = LayerTape(architecture, settings, layer_memory(architecture, settings).stream_width).cached_widths
    return settings.rows * heads * architecture.head_dim * (keys + values)


def _held(architecture: Architecture, settings: MemorySettings) -> dict[str, int]:
    held = shares(architecture, settings)
    return {
        "base_weights": held.base_weights,
        "adapter_weights": held.adapter_weights,
        "workspace": settings.workspace_bytes if settings.device == "cuda" else 0,
    }


def _prompt(architecture: Architecture, settings: MemorySettings) -> dict[str, int]:
    """The last layer over all of the prompt, when every layer has kept its keys and values, none cut to a window."""
    positions = settings.tokens + settings.num_virtual_tokens
    embedded = layer_memory(architecture, settings).input if architecture.layers > 1 else 0
    return {
        "cache": _a_layers_token(architecture, settings) * architecture.layers * positions,
        "temporaries": max(_layer(architecture, settings) + embedded, _logits(architecture, settings)),
    }


def _layer(architecture: Architecture, settings: MemorySettings) -> int:
    """One layer at work; 4-bit weights are not unpacked for few positions on a GPU."""
    few = settings.device == "cuda" and settings.positions <= _KERNEL_ROWS
    packed = settings.quantization in ("nf4", "fp4")
    return forward_alone(architecture, replace(settings, quantization="none") if few and packed else settings)


def _last_token(architecture: Architecture, settings: MemorySettings, tokens: int) -> dict[str, int]:
    """One layer's cache joined anew beside the old one, and what attention makes of it."""
    token = _a_layers_token(architecture, settings)
    full = architecture.layers - architecture.windowed_layers
    joined = token * tokens // 2 if full else 0
    if architecture.windowed_layers:
        joined = max(joined, token * min(tokens, architecture.window))
    layer = max(joined + _attention(architecture, settings, tokens), _layer(architecture, settings))
    before = settings.rows * architecture.vocab_size * FULL_BYTES  # of the token before, until the next ones are there
    return {
        "cache": cache_bytes(architecture, settings, tokens),
        "temporaries": before + max(layer, _logits(architecture, settings)),
    }


def _attention(architecture: Architecture, settings: MemorySettings, tokens: int) -> int:
    """Copies of keys and values that a new token's attention makes: for every query head, in fp32 for torch's math."""
    kernel = attention_kernel(architecture, settings)
    every_head = settings.rows * tokens * architecture.query_size
    if kernel == "math":
        return FULL_BYTES * (every_head + 2 * settings.rows * tokens * architecture.key_value_size)
    repeats = kernel == "whole" and architecture.heads != architecture.kv_heads
    return 2 * every_head * settings.activation_bytes if repeats else 0


def _logits(architecture: Architecture, settings: MemorySettings) -> int:
    """Of one token a row: as the model makes them, and in fp32 to choose from."""
    return settings.rows * architecture.vocab_size * (settings.activation_bytes + FULL_BYTES)
