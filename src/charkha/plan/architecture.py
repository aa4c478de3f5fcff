"""What a base model is made of, read from its config.json: shapes and exact parameter counts, no weights, no torch.

Covered: Llama and everything of that type (Yi, SmolLM2, TinyLlama), Mistral, Qwen2/2.5/3, Gemma 1-3, Phi-3 and phi-4,
Falcon, GPT-NeoX, GPT-2, Mixtral, Qwen3-MoE, gpt-oss, and the dialects of dialects.py. Key names and defaults are those
of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from charkha.plan.config_keys import (
    UnknownArchitecture,
    experts_of,
    has_softcap,
    head_dim_of,
    is_tied,
    positions_of,
    whole,
    windows_of,
)
from charkha.plan.dialects import DIALECTS, in_known_words
from charkha.plan.layers import Experts, Linear, Norm


@dataclass(frozen=True)
class Architecture:
    """A decoder-only transformer of equal layers."""

    model_type: str
    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_positions: int | None
    tied_embeddings: bool
    layers_path: str  # where the layers are in the model, such as model.layers
    linears: tuple[Linear, ...]  # of one layer
    norms: tuple[Norm, ...]  # of one layer, on the residual stream
    final_norm: Norm
    query_key_norms: tuple[Norm, ...] = ()  # of one layer, over each head
    gated_mlp: bool = True  # act(gate) * up rather than act(up)
    fused_projections: bool = False  # query, key and value come out of one linear layer
    parallel: bool = False  # attention and MLP read the same residual
    attention_softcap: bool = False
    logit_softcap: bool = False
    learned_positions: int = 0
    experts: Experts | None = None
    attention_sinks: int = 0  # of one layer, a learned number per head
    head_bias: bool = False
    activation: str = ""  # of the MLP where it is made of several operators: gelu_new
    dropout: bool = False  # after embedding, attention and MLP, and on attention's probabilities, while training
    window: int = 0  # positions that some layers look back, where they do not look back to the first
    windowed_layers: int = 0
    frozen_beside: int = 0  # parameters of a tower that text does not pass, such as vision

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Width of all key heads together; the value heads are as wide."""
        return self.kv_heads * self.head_dim

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer."""
        return self._dense_layer_parameters + (self.experts.parameters if self.experts else 0)

    @property
    def _dense_layer_parameters(self) -> int:
        parts: tuple[Linear | Norm, ...] = (*self.linears, *self.norms, *self.query_key_norms)
        return sum(part.parameters for part in parts) + self.attention_sinks

    @property
    def linear_weights(self) -> int:
        """Elements of one layer's matrices, all experts counted."""
        experts = self.experts.count * self.experts.weights if self.experts else 0
        return sum(linear.weights for linear in self.linears) + experts

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the token (and learned position) embeddings; a tied head is counted here."""
        return (self.vocab_size + self.learned_positions) * self.hidden_size

    @property
    def head_parameters(self) -> int:
        """Parameters of the head that are not the embedding's."""
        bias = self.vocab_size if self.head_bias else 0
        return bias if self.tied_embeddings else self.vocab_size * self.hidden_size + bias

    @property
    def parameters(self) -> int:
        """Parameters of the whole model, tied weights once."""
        layers = self.layers * self.layer_parameters
        return layers + self._outside_layers + self.frozen_beside

    @property
    def active_parameters(self) -> int:
        """Parameters that one token meets: of the experts only those that it is sent to."""
        active = self.experts.active_parameters if self.experts else 0
        return self.layers * (self._dense_layer_parameters + active) + self._outside_layers

    @property
    def _outside_layers(self) -> int:
        return self.embedding_parameters + self.head_parameters + self.final_norm.parameters


def read_architecture(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a parsed config.json describes.

    Raises UnknownArchitecture for a type not covered and for a key that is missing or not a positive whole number.
    """
    config = in_known_words(config)
    model_type = str(config.get("model_type"))
    reader = _READERS.get(model_type)
    if reader is None:
        raise UnknownArchitecture(
            f"model_type {model_type!r} is not one that charkha can plan for",
            where="config.json",
            remedy=f"covered are {', '.join(sorted({*_READERS, *DIALECTS}))}; training does not need a plan",
        )
    architecture = reader(config)
    window, layers = windows_of(config, architecture.layers)
    return replace(architecture, window=window, windowed_layers=layers)


def _read_llama_like(config: Mapping[str, Any]) -> Architecture:
    """Llama, Mistral, Qwen2, Qwen3 and Gemma 1: they differ in biases, head norms and defaults."""
    model_type = str(config["model_type"])
    attention_bias = bool(config.get("attention_bias", False))
    # Qwen2 always has biases on query, key and value and never on the output; Mistral has none.
    bias = {"qwen2": (True, False), "mistral": (False, False)}.get(model_type, (attention_bias, attention_bias))
    return _with_separate_projections(
        config,
        input_bias=bias[0],
        output_bias=bias[1],
        mlp_bias=model_type == "llama" and bool(config.get("mlp_bias", False)),
        norms=("input_layernorm", "post_attention_layernorm"),
        query_key_norms=model_type in ("qwen3", "qwen3_moe"),
        attention_sinks=model_type == "gpt_oss",
    )


def _read_gemma_2_or_3(config: Mapping[str, Any]) -> Architecture:
    bias = bool(config.get("attention_bias", False))
    return _with_separate_projections(
        config,
        input_bias=bias,
        output_bias=bias,
        mlp_bias=False,
        norms=(
            "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
        ),
        query_key_norms=config["model_type"] == "gemma3_text",
    )  # fmt: skip


def _read_mixture(config: Mapping[str, Any]) -> Architecture:
    """Mixtral, Qwen3-MoE and gpt-oss, whose every layer has experts."""
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise UnknownArchitecture("layers with and without experts are mixed in this model", where="config.json")
    return _read_llama_like(config)


def _with_separate_projections(
    config: Mapping[str, Any],
    *,
    input_bias: bool,
    output_bias: bool,
    mlp_bias: bool,
    norms: tuple[str, ...],
    query_key_norms: bool,
    attention_sinks: bool = False,
) -> Architecture:
    hidden, heads = whole(config, "hidden_size"), whole(config, "num_attention_heads")
    kv_heads = whole(config, "num_key_value_heads", heads)
    head_dim = head_dim_of(config, hidden, heads)
    experts = experts_of(config, hidden)
    inner = experts.intermediate_size if experts else whole(config, "intermediate_size")
    query, key = heads * head_dim, kv_heads * head_dim
    attention = (
        Linear("self_attn.q_proj", hidden, query, "attention_in", input_bias),
        Linear("self_attn.k_proj", hidden, key, "attention_in", input_bias),
        Linear("self_attn.v_proj", hidden, key, "attention_in", input_bias),
        Linear("self_attn.o_proj", query, hidden, "attention_out", output_bias),
    )
    mlp = (
        Linear("mlp.gate_proj", hidden, inner, "mlp_in", mlp_bias),
        Linear("mlp.up_proj", hidden, inner, "mlp_in", mlp_bias),
        Linear("mlp.down_proj", inner, hidden, "mlp_inner", mlp_bias),
    )
    head_norms = (Norm("self_attn.q_norm", head_dim), Norm("self_attn.k_norm", head_dim)) if query_key_norms else ()
    return Architecture(
        model_type=str(config["model_type"]),
        layers=whole(config, "num_hidden_layers"),
        hidden_size=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=inner,
        vocab_size=whole(config, "vocab_size"),
        max_positions=positions_of(config),
        tied_embeddings=is_tied(config),
        layers_path="model.layers",
        linears=attention if experts else attention + mlp,
        norms=tuple(Norm(name, hidden) for name in norms),
        final_norm=Norm("norm", hidden),
        query_key_norms=head_norms,
        attention_softcap=has_softcap(config, "attn_logit_softcapping"),
        logit_softcap=has_softcap(config, "final_logit_softcapping"),
        experts=experts,
        attention_sinks=heads if attention_sinks else 0,
        frozen_beside=int(config.get("frozen_beside", 0)),
    )


def _read_phi3(config: Mapping[str, Any]) -> Architecture:
    hidden, heads = whole(config, "hidden_size"), whole(config, "num_attention_heads")
    kv_heads, inner = whole(config, "num_key_value_heads", heads), whole(config, "intermediate_size")
    head_dim = head_dim_of(config, hidden, heads)
    query, key = heads * head_dim, kv_heads * head_dim
    return Architecture(
        model_type="phi3",
        layers=whole(config, "num_hidden_layers"),
        hidden_size=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=inner,
        vocab_size=whole(config, "vocab_size"),
        max_positions=positions_of(config),
        tied_embeddings=is_tied(config),
        layers_path="model.layers",
        linears=(
            Linear("self_attn.qkv_proj", hidden, query + 2 * key, "attention_in"),
            Linear("self_attn.o_proj", query, hidden, "attention_out"),
            Linear("mlp.gate_up_proj", hidden, 2 * inner, "mlp_in"),
            Linear("mlp.down_proj", inner, hidden, "mlp_inner"),
        ),
        norms=(Norm("input_layernorm", hidden), Norm("post_attention_layernorm", hidden)),
        final_norm=Norm("norm", hidden),
        fused_projections=True,
    )


def _read_falcon(config: Mapping[str, Any]) -> Architecture:
    heads, new = whole(config, "num_attention_heads"), bool(config.get("new_decoder_architecture", False))
    if config.get("alibi"):
        raise UnknownArchitecture("Falcon with ALiBi positions is not covered", where="config.json")
    # Falcon-7B says num_kv_heads 71 beside multi_query: outside the new architecture that means one shared head.
    shared = not new and bool(config.get("multi_query", True))
    parallel = new or bool(config.get("parallel_attn", True))
    norms: tuple[str, ...] = ("input_layernorm",)
    if new and config.get("num_ln_in_parallel_attn") in (None, 2):
        norms = ("ln_attn", "ln_mlp")
    elif not parallel:
        norms = ("input_layernorm", "post_attention_layernorm")
    hidden = whole(config, "hidden_size")
    return _with_fused_attention(
        config,
        kv_heads=1 if shared else whole(config, "num_kv_heads", heads),
        inner=whole(config, "ffn_hidden_size", 4 * hidden),
        names=("transformer.h", "self_attention.query_key_value", "self_attention.dense", "ln_f"),
        norms=norms,
        bias=(bool(config.get("bias", False)), bool(config.get("bias", False))),
        parallel=parallel,
    )


def _read_gpt_neox(config: Mapping[str, Any]) -> Architecture:
    """GPT-NeoX and Pythia; Phi 1 and 2 and MPT, with one norm or no biases."""
    return _with_fused_attention(
        config,
        kv_heads=whole(config, "num_attention_heads"),
        inner=whole(config, "intermediate_size"),
        names=("gpt_neox.layers", "attention.query_key_value", "attention.dense", "final_layer_norm"),
        norms=("input_layernorm",) if config.get("one_norm") else ("input_layernorm", "post_attention_layernorm"),
        bias=(bool(config.get("attention_bias", True)), bool(config.get("mlp_bias", True))),
        parallel=bool(config.get("use_parallel_residual", True)),
    )


def _with_fused_attention(
    config: Mapping[str, Any],
    *,
    kv_heads: int,
    inner: int,
    names: tuple[str, str, str, str],
    norms: tuple[str, ...],
    bias: tuple[bool, bool],
    parallel: bool,
    mlp: tuple[str, str] = ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    learned_positions: int = 0,
    activation: str = "",
    dropout: bool = False,
) -> Architecture:
    """LayerNorm, one projection to query, key and value, and an MLP without gate."""
    path, projection, output, final_norm = names
    hidden, heads = whole(config, "hidden_size"), whole(config, "num_attention_heads")
    head_dim = head_dim_of(config, hidden, heads)
    # With one norm in a parallel layer the MLP reads the very tensor that attention reads.
    mlp_reads: Any = "attention_in" if len(norms) == 1 else "mlp_in"
    return Architecture(
        model_type=str(config["model_type"]),
        layers=whole(config, "num_hidden_layers"),
        hidden_size=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=inner,
        vocab_size=whole(config, "vocab_size"),
        max_positions=learned_positions or positions_of(config),
        tied_embeddings=is_tied(config),
        layers_path=path,
        linears=(
            Linear(projection, hidden, (heads + 2 * kv_heads) * head_dim, "attention_in", bias[0]),
            Linear(output, heads * head_dim, hidden, "attention_out", bias[0]),
            Linear(mlp[0], hidden, inner, mlp_reads, bias[1]),
            Linear(mlp[1], inner, hidden, "mlp_inner", bias[1]),
        ),
        norms=tuple(Norm(name, hidden, "layer") for name in norms),
        final_norm=Norm(final_norm, hidden, "layer"),
        gated_mlp=False,
        fused_projections=True,
        parallel=parallel,
        learned_positions=learned_positions,
        head_bias=bool(config.get("head_bias", False)),
        activation=activation,
        dropout=dropout,
    )


def _read_gpt2(config: Mapping[str, Any]) -> Architecture:
    """GPT-2, and gpt_bigcode, whose heads may share one key and value."""
    hidden, heads, positions = (whole(config, key) for key in ("n_embd", "n_head", "n_positions"))
    words = {"hidden_size": hidden, "num_attention_heads": heads, "num_hidden_layers": whole(config, "n_layer")}
    return _with_fused_attention(
        {**config, **words},
        kv_heads=1 if config["model_type"] == "gpt_bigcode" and config.get("multi_query", True) else heads,
        inner=whole(config, "n_inner", 4 * hidden),
        names=("transformer.h", "attn.c_attn", "attn.c_proj", "ln_f"),
        norms=("ln_1", "ln_2"),
        bias=(True, True),
        parallel=False,
        mlp=("mlp.c_fc", "mlp.c_proj"),
        learned_positions=positions,
        activation=str(config.get("activation_function", "gelu_new")),
        dropout=any(config.get(f"{part}_pdrop", 0.1) > 0 for part in ("attn", "embd", "resid")),
    )


_READERS: dict[str, Callable[[Mapping[str, Any]], Architecture]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma"), _read_llama_like),
    **dict.fromkeys(("gemma2", "gemma3_text"), _read_gemma_2_or_3),
    **dict.fromkeys(("mixtral", "qwen3_moe", "gpt_oss"), _read_mixture),
    "phi3": _read_phi3,
    "falcon": _read_falcon,
    "gpt_neox": _read_gpt_neox,
    **dict.fromkeys(("gpt2", "gpt_bigcode"), _read_gpt2),
}
