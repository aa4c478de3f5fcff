"""Values of a config.json by their keys, with the defaults of each family in transformers 5.23."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from charkha.errors import EnvironmentProblem
from charkha.plan.layers import Experts


class UnknownArchitecture(EnvironmentProblem):
    """The base cannot be described from its config.json, so nothing is planned for it rather than guessed."""

    kind = "unknown_architecture"


_TIED_BY_DEFAULT = frozenset({"gemma", "gemma2", "gemma3_text", "falcon", "gpt2", "gpt_bigcode", "mpt"})
_HEAD_DIM_BY_DEFAULT = {"gemma": 256, "gemma2": 256, "gemma3_text": 256}


def whole(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """The positive whole number under `key`; `default` where the key is absent or null."""
    value = config.get(key)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UnknownArchitecture(f"{key} is {value!r}, not a positive whole number", where="config.json")
    return value


def head_dim_of(config: Mapping[str, Any], hidden: int, heads: int) -> int:
    """Width of one head: as stated, the family's own, or the hidden size shared out."""
    default = _HEAD_DIM_BY_DEFAULT.get(str(config["model_type"]))
    if default is None and hidden % heads and config.get("head_dim") is None:
        raise UnknownArchitecture(f"hidden_size {hidden} is no multiple of {heads} heads", where="config.json")
    return whole(config, "head_dim", default or hidden // heads)


def positions_of(config: Mapping[str, Any]) -> int | None:
    """The longest row the model was made for; None where it does not say."""
    return None if config.get("max_position_embeddings") is None else whole(config, "max_position_embeddings")


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the head is the embedding."""
    value = config.get("tie_word_embeddings")
    return config["model_type"] in _TIED_BY_DEFAULT if value is None else bool(value)


def has_softcap(config: Mapping[str, Any], key: str) -> bool:
    """Gemma 2 caps unless told otherwise (null); other models only where a number stands there."""
    return config.get(key, 1.0 if config["model_type"] == "gemma2" else None) is not None


def experts_of(config: Mapping[str, Any], hidden: int) -> Experts | None:
    """The expert block of a mixture; None for other models."""
    count = config.get("num_experts", config.get("num_local_experts"))
    if count is None or config["model_type"] not in ("mixtral", "qwen3_moe", "gpt_oss"):
        return None
    counts = (whole({"num_experts": count}, "num_experts"), whole(config, "num_experts_per_tok", 8))
    return Experts(*counts, hidden, whole(config, "moe_intermediate_size"), bias=config["model_type"] == "gpt_oss")


def windows_of(config: Mapping[str, Any], layers: int) -> tuple[int, int]:
    """(positions that a windowed layer looks back, how many layers do); (0, 0) where all look back to the first."""
    window, kinds = config.get("sliding_window"), config.get("layer_types")
    if not isinstance(window, int) or window < 1:
        return 0, 0
    if isinstance(kinds, list):
        return window, min(layers, sum(kind == "sliding_attention" for kind in kinds))
    model_type = config["model_type"]
    if model_type in ("mistral", "mixtral", "phi3"):
        return window, layers
    if model_type in ("gemma2", "gpt_oss"):  # every second, the first among them
        return window, (layers + 1) // 2
    if model_type == "gemma3_text":
        every = config.get("sliding_window_pattern") or 6
        return window, layers - layers // int(every)
    if config.get("use_sliding_window"):
        return window, max(0, layers - int(config.get("max_window_layers") or layers))
    return 0, 0
