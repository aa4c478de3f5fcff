"""Time of a step: causes that must show, and published runs on cards of three generations."""

from __future__ import annotations

import dataclasses

import pytest

from charkha.hardware.catalog import find_gpu
from charkha.plan.architecture import read_architecture
from charkha.plan.memory_settings import MemorySettings
from charkha.plan.popular_models import popular_config
from charkha.plan.speed import active_matrix_weights, step_time

LLAMA_8B = read_architecture(popular_config("meta-llama/Llama-3.1-8B"))
A100 = find_gpu("A100 80GB")
QLORA = MemorySettings(dtype="bf16", quantization="nf4", rows=4, tokens=2048, gradient_checkpointing=True, padded=False)


def seconds(changes=(), gpu=A100, architecture=LLAMA_8B):
    return step_time(architecture, dataclasses.replace(QLORA, **dict(changes)), gpu).micro_batch_seconds


def test_frozen_weights_take_four_operations_a_weight_and_recomputing_two_more():
    settings = dataclasses.replace(QLORA, r=1, tokens=64, gradient_checkpointing=False)
    weights = LLAMA_8B.layers * active_matrix_weights(LLAMA_8B) + LLAMA_8B.head_parameters
    assert step_time(LLAMA_8B, settings, A100).flops_per_token == pytest.approx(4 * weights, rel=0.01)
    again = dataclasses.replace(settings, gradient_checkpointing=True)
    more = step_time(LLAMA_8B, again, A100).flops_per_token - step_time(LLAMA_8B, settings, A100).flops_per_token
    assert more == pytest.approx(2 * (weights - LLAMA_8B.head_parameters), rel=0.01)


@pytest.mark.parametrize(
    ("slower", "faster"),
    [
        ({"gradient_checkpointing": True}, {"gradient_checkpointing": False}),
        ({"quantization": "nf4"}, {"quantization": "none"}),
        ({"tokens": 4096}, {"tokens": 2048}),
        ({"attention": "eager"}, {"attention": "sdpa"}),
        ({"method": "full", "quantization": "none"}, {"quantization": "none"}),
        ({"upcast_unquantized": True}, {}),
        ({"strategy": "fsdp", "processes": 2, "rows": 1, "tokens": 128}, {"rows": 1, "tokens": 128}),
    ],
)
def test_what_costs_time_is_predicted_to(slower, faster):
    assert seconds(slower) > seconds(faster)


def test_a_mixture_works_with_the_experts_that_a_token_meets():
    mixtral = read_architecture(popular_config("mistralai/Mixtral-8x7B-v0.1"))
    flops = step_time(mixtral, QLORA, A100).flops_per_token
    assert flops < 0.4 * 6 * mixtral.parameters


def test_faster_cards_are_faster_and_throttled_ones_are_not_what_their_peak_says():
    assert seconds(gpu=find_gpu("H100")) < seconds() < seconds(gpu=find_gpu("RTX 3090")) < seconds(gpu=find_gpu("T4"))
    assert seconds(gpu=find_gpu("L4")) > 1.5 * seconds(gpu=find_gpu("RTX 3090 Ti"))  # 121 against 80 Tflops, but 72 W


@pytest.mark.parametrize(
    ("gpu", "model", "changes", "tokens_per_second"),
    [
        # IBM fms-acceleration, A100 80GB
        ("A100 80GB", "mistralai/Mistral-7B-v0.1", {"fused_norms": True, "loss_head": "chunked", "tokens": 4096,
         "target_modules": ("q_proj", "k_proj", "v_proj", "o_proj"), "quantization": "none"}, 3905),
        # Answer.AI fsdp_qlora, one RTX 4090 of two, replicated
        ("RTX 4090", "meta-llama/Llama-2-7b-hf", {"rows": 8, "trained_dtype": "bf16", "r": 64, "target_modules":
         ("q_proj", "k_proj", "v_proj", "up_proj", "gate_proj", "down_proj")}, 2330),
        # NVIDIA NeMo, H100, no checkpointing
        ("H100", "meta-llama/Llama-3.1-8B", {"rows": 2, "tokens": 4096, "gradient_checkpointing": False,
         "quantization": "none", "fused_norms": True, "fused_lora": True}, 12473),
    ],
)  # fmt: skip
def test_published_speeds(gpu, model, changes, tokens_per_second):
    settings = dataclasses.replace(QLORA, **changes)
    taken = step_time(read_architecture(popular_config(model)), settings, find_gpu(gpu)).step_seconds(1)
    assert settings.positions / taken == pytest.approx(tokens_per_second, rel=0.25)
