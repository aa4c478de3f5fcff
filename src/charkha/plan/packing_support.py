"""Which architectures keep documents of one row apart, by the `model_type` of config.json.

Measured with transformers 5.23 on small models with random weights, sdpa and eager: logits of packed rows against
those of each document alone. tests/training/test_packed_rows.py measures both lists again.
"""

from __future__ import annotations

from charkha.errors import UsageError

KEEP_APART = frozenset(
    """
cohere cohere2 exaone4 gemma gemma2 gemma3_text glm glm4 gpt2 gpt_neox granite llama mistral mixtral olmo olmo2 phi phi3
qwen2 qwen3 qwen3_moe smollm3 stablelm starcoder2
""".split()  # noqa: SIM905
)

_NO_POSITIONS = "its attention mask does not look at positions"
_RECURRENT = "its recurrent layers run on from one document into the next"
LEAK: dict[str, str] = {
    **dict.fromkeys(("afmoe", "bloom", "biogpt", "falcon", "gpt_oss", "mpt", "opt", "xglm"), _NO_POSITIONS),
    **dict.fromkeys(("bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "mamba", "mamba2"), _RECURRENT),
}

# Of those that keep documents apart: only through a mask of the packed row's square, since the documents' bounds get
# lost on their way to the attention, or since it has kernels of its own only.
BY_MASK = frozenset({"gemma2", "stablelm"})


class PackingLeaks(UsageError):
    """Documents of one packed row see each other in this model."""

    kind = "packing_leaks"
