"""The families of models that are supported, each with the settings that tell it from others of its class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """A class of transformers with the settings that tell its models from others of the class."""

    model_type: str
    settings: dict[str, Any]
    adapter: dict[str, Any]


def _family(model_type: str, *, lora_dropout: float = 0.1, **settings: Any) -> Family:
    return Family(model_type, settings, {"lora_dropout": lora_dropout})


FAMILIES = {
    "Llama 2": _family("llama", num_key_value_heads=4),
    "Llama 3": _family(
        "llama",
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        },
    ),
    "SmolLM": _family("llama", tie_word_embeddings=True, num_attention_heads=4, num_key_value_heads=4),
    "Mistral": _family("mistral", sliding_window=32),
    "Mixtral": _family("mixtral", num_local_experts=4, sliding_window=None, lora_dropout=0.0),
    "Falcon 7B": _family("falcon", multi_query=True, new_decoder_architecture=False, alibi=False, ffn_hidden_size=172),
    "Falcon 40B": _family("falcon", num_kv_heads=2, new_decoder_architecture=True, alibi=False, ffn_hidden_size=172),
    "Qwen 2 and 2.5": _family("qwen2", tie_word_embeddings=True),
    "Qwen 3": _family("qwen3", head_dim=16, tie_word_embeddings=True),
    "Gemma 1": _family("gemma", head_dim=16),
    "Gemma 2": _family("gemma2", head_dim=16, sliding_window=32),
    "Gemma 3": _family(
        "gemma3_text", head_dim=16, sliding_window=32, layer_types=["sliding_attention", "full_attention"]
    ),
    "Phi 1 and 2": _family("phi", num_key_value_heads=4),
    "Phi 3": _family("phi3"),
}  # fmt: skip
