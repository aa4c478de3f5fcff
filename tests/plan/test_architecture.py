"""Parameter counts and shapes from config.json, against the models that transformers builds from the same files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from charkha.errors import EnvironmentProblem
from charkha.plan.architecture import UnknownArchitecture, read_architecture

SHARED_CONFIGS = Path(__file__).resolve().parents[3] / "shared/model_configs"
NOT_COVERED = {"gemma3", "gpt_oss"}  # with a vision tower; sinks and packed experts
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 1000,
}


def real_configs():
    if not SHARED_CONFIGS.exists():
        return {}
    found = {path.parent.name: json.loads(path.read_text()) for path in SHARED_CONFIGS.glob("*/config.json")}
    return {name: config for name, config in sorted(found.items()) if config["model_type"] not in NOT_COVERED}


@pytest.mark.skipif(not SHARED_CONFIGS.exists(), reason="the shared model configs are not here")
def test_parameter_counts_equal_the_models_built_by_transformers():
    expected = json.loads((SHARED_CONFIGS / "expected_params.json").read_text())
    configs = real_configs()
    counted = {name: read_architecture(config).parameters for name, config in configs.items()}
    assert len(counted) >= 50
    assert counted == {name: expected[name]["parameters"] for name in counted}


@pytest.mark.skipif(not SHARED_CONFIGS.exists(), reason="the shared model configs are not here")
def test_real_configs_give_the_heads_and_widths_of_the_model():
    falcon = read_architecture(real_configs()["tiiuae--falcon-7b"])
    assert (falcon.kv_heads, falcon.head_dim, falcon.intermediate_size) == (1, 64, 4 * 4544)
    qwen = read_architecture(real_configs()["Qwen--Qwen3-0.6B"])
    assert (qwen.head_dim, qwen.query_size, qwen.key_value_size) == (128, 2048, 1024)
    gemma = read_architecture(real_configs()["google--gemma-2-2b"])
    assert gemma.tied_embeddings
    assert gemma.attention_softcap
    assert gemma.logit_softcap


def test_parts_sum_to_the_whole():
    model = read_architecture(LLAMA)
    assert model.layer_parameters == 4 * 64 * 64 + 3 * 64 * 128 + 2 * 64
    assert model.embedding_parameters == model.head_parameters == 1000 * 64
    assert model.parameters == 2 * model.layer_parameters + 2 * 64000 + 64


def test_a_tied_head_has_no_parameters_of_its_own():
    model = read_architecture(LLAMA | {"tie_word_embeddings": True})
    assert model.head_parameters == 0
    assert read_architecture(LLAMA).parameters - model.parameters == 64000


@pytest.mark.parametrize(
    ("more", "added"),
    [
        ({"attention_bias": True}, 4 * 64),
        ({"mlp_bias": True}, 2 * 128 + 64),
        ({"num_key_value_heads": 2}, -2 * 64 * 32),
        ({"head_dim": 32}, 4 * 64 * 64),
        ({"model_type": "qwen2"}, 3 * 64),
        ({"model_type": "mistral", "attention_bias": True}, 0),
        ({"model_type": "qwen3"}, 2 * 16),
    ],
)
def test_options_that_change_a_layer(more, added):
    assert read_architecture(LLAMA | more).layer_parameters - read_architecture(LLAMA).layer_parameters == added


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "mamba2"}, "'mamba2' is not one"),
        ({}, "'None' is not one"),
        (LLAMA | {"hidden_size": "64"}, "hidden_size is '64'"),
        (LLAMA | {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        (LLAMA | {"num_attention_heads": True}, "num_attention_heads is True"),
        (LLAMA | {"num_attention_heads": 5}, "no multiple of 5 heads"),
        ({"model_type": "llama"}, "hidden_size is None"),
        (LLAMA | {"model_type": "falcon", "alibi": True}, "ALiBi"),
        (LLAMA | {"model_type": "qwen3_moe", "mlp_only_layers": [0]}, "mixed"),
    ],
)
def test_what_cannot_be_described_is_refused_by_name(config, message):
    with pytest.raises(UnknownArchitecture, match=message) as caught:
        read_architecture(config)
    assert isinstance(caught.value, EnvironmentProblem)
