"""Parameter counts and shapes from config.json, against the models that transformers builds from the same files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from charkha.errors import EnvironmentProblem
from charkha.plan.architecture import read_architecture
from charkha.plan.config_keys import UnknownArchitecture
from charkha.plan.popular_models import popular_config, popular_ids

SHARED_CONFIGS = Path(__file__).resolve().parents[3] / "shared/model_configs"
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
    return dict(sorted(found.items()))


@pytest.mark.skipif(not SHARED_CONFIGS.exists(), reason="the shared model configs are not here")
def test_parameter_counts_equal_the_models_built_by_transformers():
    expected = json.loads((SHARED_CONFIGS / "expected_params.json").read_text())
    configs = real_configs()
    counted = {name: read_architecture(config).parameters for name, config in configs.items()}
    assert len(counted) == len(expected)
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


@pytest.mark.skipif(not SHARED_CONFIGS.exists(), reason="the shared model configs are not here")
@pytest.mark.parametrize(
    ("name", "billions"),
    [("mistralai--Mixtral-8x7B-v0.1", 12.9), ("Qwen--Qwen3-30B-A3B", 3.35), ("openai--gpt-oss-20b", 4.2)],
)
def test_a_token_meets_only_the_experts_that_it_is_sent_to(name, billions):
    model = read_architecture(real_configs()[name])
    assert model.active_parameters / 1e9 == pytest.approx(billions, abs=0.05)


def test_a_dense_model_is_active_as_a_whole():
    model = read_architecture(LLAMA)
    assert model.active_parameters == model.parameters


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("Qwen/Qwen-14B-Chat", 14_167_290_880),
        ("THUDM/chatglm3-6b", 6_243_584_000),
        ("baichuan-inc/Baichuan2-7B-Chat", 7_505_973_248),
        ("meta-llama/Llama-3.1-405B-Instruct", 405_853_388_800),
        ("google/gemma-7b", 8_537_680_896),
        ("gpt2", 124_439_808),
    ],
)
def test_popular_models_are_known_without_a_download(name, published):
    config = popular_config(name.upper())
    assert config is not None
    assert read_architecture(config).parameters == published


def test_every_popular_model_can_be_read():
    assert all(read_architecture(popular_config(name)).parameters > 10**6 for name in popular_ids())
    assert popular_config("nobody/nothing") is None


@pytest.mark.skipif(not SHARED_CONFIGS.exists(), reason="the shared model configs are not here")
def test_the_table_of_popular_models_counts_as_the_configs_do():
    for name, config in real_configs().items():
        known = popular_config(name.replace("--", "/"))
        if known is not None:
            assert read_architecture(known).parameters == read_architecture(config).parameters, name
