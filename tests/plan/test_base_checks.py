"""Which base models are taken, from their config.json."""

from __future__ import annotations

import ast
import importlib.util
import json
from pathlib import Path

import pytest

from charkha.errors import EnvironmentProblem
from charkha.plan.base_checks import KNOWN_MODEL_TYPES, check_base_config

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
SHARED_CONFIGS = Path(__file__).resolve().parents[3] / "shared/model_configs"


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"quantization_config": None},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"quantization_config": {"load_in_8bit": True}},
        {"vision_config": None},
        {"auto_map": {"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"}},
        {"architectures": None},
        {"architectures": ["MistralModel"], "model_type": "mistral"},
        {"model_type": "made_next_year", "architectures": ["MadeNextYearForCausalLM"]},
    ],
)
def test_a_text_model_passes(more):
    check_base_config(LLAMA | more, "khadi")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized with gptq"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized with awq"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized with fp8"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "quantized with compressed-tensors"),
        ({"compression_config": {"format": "dense"}}, "an unknown method"),
        ({"quantization_config": ["gptq"]}, "an unknown method"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "quantized with awq"),
        (
            {"architectures": ["Gemma3ForConditionalGeneration"], "vision_config": {"hidden_size": 1152}},
            "Gemma3ForConditionalGeneration is a vision model",
        ),
        ({"audio_config": {"d_model": 8}}, "an? audio model"),
        ({"is_encoder_decoder": True, "architectures": ["T5ForConditionalGeneration"]}, "encoder-decoder"),
        ({"architectures": ["BertForMaskedLM"]}, "BertForMaskedLM is an encoder"),
        ({"model_type": "own", "auto_map": {"AutoModel": "modeling_own.Own"}}, "Python code of its own"),
        ({"model_type": None, "architectures": None}, "no transformers model"),
        ({"model_type": ["llama"], "auto_map": {"AutoModel": "x.Y"}}, "Python code of its own"),
    ],
)
def test_what_cannot_be_trained_is_named_with_what_works_instead(more, message):
    with pytest.raises(EnvironmentProblem, match=message) as caught:
        check_base_config(LLAMA | more, "khadi")
    assert caught.value.where == "khadi"
    assert "take" in caught.value.remedy


def test_the_known_model_types_are_those_of_the_installed_transformers():
    package = importlib.util.find_spec("transformers").submodule_search_locations[0]
    tree = ast.parse((Path(package) / "models/auto/modeling_auto.py").read_text())
    [mapping] = [
        node.value.args[0]
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
    ]
    assert {pair.elts[0].value for pair in mapping.elts} == KNOWN_MODEL_TYPES


@pytest.mark.skipif(not SHARED_CONFIGS.is_dir(), reason="the collection of model configs is not here")
def test_published_configs_are_judged_by_what_they_are():
    configs = {path.parent.name: json.loads(path.read_text()) for path in SHARED_CONFIGS.glob("*/config.json")}
    unfit = {name for name, config in configs.items() if "vision_config" in config or "quantization_config" in config}
    assert {name for name, config in configs.items() if _is_refused(config)} == unfit


def _is_refused(config) -> bool:
    try:
        check_base_config(config, "khadi")
    except EnvironmentProblem:
        return True
    return False


@pytest.mark.parametrize(
    "extra",
    [
        {"_attn_implementation_internal": "somebody/kernel"},
        {"_attn_implementation": "somebody/kernel"},
        {"attn_implementation": "kernels-community/flash"},
        {"text_config": {"_experts_implementation_internal": "somebody/kernel"}},
        {"nested": {"deeper": {"trust_remote_code": True}}},
        {"model_file": "modeling.py"},
    ],
)
def test_a_config_that_names_code_to_run_is_refused(extra):
    with pytest.raises(EnvironmentProblem, match="code of its own"):
        check_base_config({"model_type": "llama", "architectures": ["LlamaForCausalLM"], **extra}, "model")


def test_kernels_of_torch_in_a_config_are_no_reason_to_refuse():
    check_base_config(
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "_attn_implementation": "sdpa"}, "model"
    )
