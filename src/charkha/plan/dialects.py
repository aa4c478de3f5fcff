"""config.json of families that say the same thing in other words, put into the words that architecture.py reads.

Shapes only: what does not change a parameter count or a tensor's size (rotary tables, activations) is left as it is.
Sources: the configuration classes of transformers 5.23; for the three with code of their own (qwen, baichuan, chatglm)
the published config.json and modelling files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Config = Mapping[str, Any]


def in_known_words(config: Config) -> Config:
    """The same model under keys that are read; a config of a known family is returned as it is."""
    translate = DIALECTS.get(str(config.get("model_type")))
    return translate(config) if translate else config


def _gemma3(config: Config) -> Config:
    """The text model of a model that also sees; the tower for images is frozen beside it."""
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        return {**config, "model_type": "gemma3_text"}
    vision = config.get("vision_config")
    tower = _siglip_parameters(vision, int(text["hidden_size"])) if isinstance(vision, Mapping) else 0
    return {**text, "model_type": "gemma3_text", "frozen_beside": tower}


def _siglip_parameters(vision: Config, text_width: int) -> int:
    """Parameters of a SigLIP tower without pooling head, and of Gemma 3's projection to the text model."""
    width, inner = int(vision["hidden_size"]), int(vision["intermediate_size"])
    patch, side = int(vision["patch_size"]), int(vision["image_size"]) // int(vision["patch_size"])
    patches = int(vision.get("num_channels", 3)) * patch * patch * width + width
    attention = 4 * (width * width + width)
    mlp = 2 * width * inner + inner + width
    layers = int(vision["num_hidden_layers"]) * (attention + mlp + 4 * width)
    return patches + side * side * width + layers + 2 * width + width * text_width + width


def _qwen(config: Config) -> Config:
    """The first Qwen: Llama's shape with biases on query, key and value; intermediate_size counts gate and up."""
    return {**config, "model_type": "qwen2", "intermediate_size": int(config["intermediate_size"]) // 2}


def _chatglm(config: Config) -> Config:
    """ChatGLM 2 and 3: groups of heads share keys; gate and up come out of one linear layer."""
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    return {
        **config,
        "model_type": "qwen2",
        "num_hidden_layers": config["num_layers"],
        "num_key_value_heads": config["multi_query_group_num"] if config.get("multi_query_attention") else heads,
        "head_dim": config.get("kv_channels", hidden // heads),
        "intermediate_size": config["ffn_hidden_size"],
        "vocab_size": config["padded_vocab_size"],
        "tie_word_embeddings": False,
    }


def _baichuan(config: Config) -> Config:
    return {**config, "model_type": "llama", "tie_word_embeddings": False}


def _phi(config: Config) -> Config:
    """Phi 1 and 2: attention and MLP side by side on one norm, biases everywhere, the head's too."""
    return {**config, "model_type": "gpt_neox", "use_parallel_residual": True, "one_norm": True, "head_bias": True}


def _mpt(config: Config) -> Config:
    """MPT: GPT-NeoX's shape without biases, attention before the MLP, the head tied."""
    ratio = int(config.get("expansion_ratio", 4))
    return {
        **config,
        "model_type": "gpt_neox",
        "hidden_size": config["d_model"],
        "num_attention_heads": config["n_heads"],
        "num_hidden_layers": config["n_layers"],
        "intermediate_size": ratio * int(config["d_model"]),
        "max_position_embeddings": config.get("max_seq_len"),
        "attention_bias": False,
        "mlp_bias": False,
        "use_parallel_residual": False,
        "tie_word_embeddings": True,
    }


def _mixtral(config: Config) -> Config:
    """Mixtral and gpt-oss: every expert is as wide as the key of dense models says."""
    default = {"mixtral": (8, 2), "gpt_oss": (32, 4)}[str(config["model_type"])]
    return {
        **config,
        "num_experts": config.get("num_local_experts", default[0]),
        "num_experts_per_tok": config.get("num_experts_per_tok", default[1]),
        "moe_intermediate_size": config.get("intermediate_size"),
    }


DIALECTS: dict[str, Callable[[Config], Config]] = {
    "gemma3": _gemma3,
    "mixtral": _mixtral,
    "gpt_oss": _mixtral,
    "qwen": _qwen,
    "chatglm": _chatglm,
    "baichuan": _baichuan,
    "phi": _phi,
    "phi-msft": _phi,
    "mpt": _mpt,
}
