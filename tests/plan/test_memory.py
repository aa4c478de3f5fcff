"""The closed form of memory: sums, hand-computed terms, what makes it larger, what it refuses."""

from __future__ import annotations

import dataclasses

import pytest

from charkha.plan.architecture import UnknownArchitecture, read_architecture
from charkha.plan.memory import preview_memory
from charkha.plan.memory_settings import MemorySettings
from charkha.plan.weights import adapter_parameters, base_weight_bytes, nf4_bytes

LLAMA_8B = read_architecture(
    {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    }
)
QLORA = MemorySettings(dtype="bf16", quantization="nf4", rows=1, tokens=2048, gradient_checkpointing=True)
FULL = dataclasses.replace(QLORA, method="full", quantization="none")


@pytest.mark.parametrize("settings", [QLORA, FULL, dataclasses.replace(QLORA, rows=4, loss_head="chunked")])
def test_the_breakdown_sums_to_the_peak_and_the_peak_is_the_largest_moment(settings):
    preview = preview_memory(LLAMA_8B, settings)
    assert sum(preview.breakdown.values()) == preview.peak_bytes == max(preview.moments.values())
    assert preview.moments[preview.peak_moment] == preview.peak_bytes
    assert list(preview.breakdown.values()) == sorted(preview.breakdown.values(), reverse=True)
    assert min(preview.breakdown.values()) > 0


def test_nf4_with_double_quantization_takes_4_127_bits_a_weight():
    assert nf4_bytes(4096 * 4096) * 8 / 4096**2 == pytest.approx(4.127, abs=0.001)
    # 64 weights: 32 bytes of codes, one 8-bit constant, one fp32 constant of constants, 16 + 256 values, an offset.
    assert nf4_bytes(64) == 32 + 1 + 4 + 16 * 4 + 256 * 4 + 4


def test_embedding_head_and_norms_stay_in_16_bits_beside_a_4_bit_base():
    in_4_bits = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    rest = LLAMA_8B.parameters - in_4_bits
    assert base_weight_bytes(LLAMA_8B, QLORA) == pytest.approx(in_4_bits * 4.127 / 8 + 2 * rest, rel=1e-4)


def test_adapters_count_four_bytes_for_weight_and_gradient_and_eight_for_states():
    lora = adapter_parameters(LLAMA_8B, QLORA)
    assert lora == 32 * 16 * (2 * 2 * 4096 + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    breakdown = preview_memory(LLAMA_8B, QLORA).breakdown
    assert (breakdown["adapter_weights"], breakdown["optimizer_states"]) == (4 * lora, 8 * lora)


def test_full_training_holds_fp32_weights_whatever_the_dtype():
    breakdown = preview_memory(LLAMA_8B, FULL).breakdown
    assert breakdown["base_weights"] == 4 * LLAMA_8B.parameters
    assert breakdown["optimizer_states"] == 8 * LLAMA_8B.parameters


@pytest.mark.parametrize(
    ("targets", "linears_per_layer"),
    [
        ("all-linear", 7),
        (("q_proj", "v_proj"), 2),
        (("self_attn.q_proj",), 1),
        ((r"proj",), 0),
        (r".*\.(q|k)_proj", 2),
        (r"model\.layers\.\d+\.mlp\..*", 3),
    ],
)
def test_target_modules_are_read_as_peft_reads_them(targets, linears_per_layer):
    from charkha.plan.weights import adapter_targets

    settings = dataclasses.replace(QLORA, target_modules=targets)
    assert len(adapter_targets(LLAMA_8B, settings)) == linears_per_layer


def test_a_target_outside_the_layers_is_told():
    settings = dataclasses.replace(QLORA, target_modules=("q_proj", "lm_head"))
    more = adapter_parameters(LLAMA_8B, settings) - adapter_parameters(
        LLAMA_8B, dataclasses.replace(QLORA, target_modules=("q_proj",))
    )
    assert more == 16 * (4096 + 128256)
    assert any("lm_head" in note for note in preview_memory(LLAMA_8B, settings).notes)


@pytest.mark.parametrize(
    ("more", "less"),
    [
        ({"rows": 2, "padded": False}, {}),
        ({"tokens": 4096}, {}),
        ({"gradient_checkpointing": False}, {}),
        ({"quantization": "none"}, {}),
        ({"r": 64}, {}),
        ({"padded": True, "gradient_checkpointing": False}, {"padded": False, "gradient_checkpointing": False}),
        ({"lora_dropout": 0.1, "gradient_checkpointing": False}, {"gradient_checkpointing": False}),
        ({"attention": "eager", "loss_head": "chunked"}, {"loss_head": "chunked"}),
        ({}, {"loss_head": "chunked"}),
        ({}, {"trained_positions": 256}),
        ({"accumulation_steps": 2}, {}),
    ],
)
def test_settings_that_need_more_memory_are_predicted_to(more, less):
    larger = preview_memory(LLAMA_8B, dataclasses.replace(QLORA, **more)).peak_bytes
    assert larger > preview_memory(LLAMA_8B, dataclasses.replace(QLORA, **less)).peak_bytes


def test_the_fused_optimizer_needs_nothing_beside_the_gradients():
    def at_the_step(optimizer):
        settings = dataclasses.replace(FULL, tokens=16, optimizer=optimizer)
        return preview_memory(LLAMA_8B, settings).moments["optimizer step"]

    assert at_the_step("adamw_torch") - at_the_step("adamw_torch_fused") == 4 * LLAMA_8B.parameters


def test_agrees_with_the_trace_of_the_real_model():
    """8B, LoRA r 16 on bf16, checkpointing, 2048 tokens: traced on fake tensors, the step peaks at 19.384 GiB.

    That step held on to the 16-bit logits in the loss's backward, which the trainer does not, and had no workspace.
    """
    preview = preview_memory(LLAMA_8B, dataclasses.replace(QLORA, quantization="none"))
    logits = 2 * 2048 * LLAMA_8B.vocab_size
    assert preview.peak_bytes - preview.breakdown["workspace"] + logits == pytest.approx(19.384 * 2**30, rel=0.002)


@pytest.mark.parametrize("changes", [{"model_type": "mixtral", "num_local_experts": 4}, {"model_type": "qwen3_moe"}])
def test_mixtures_of_experts_have_no_preview(changes):
    config = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 1000,
    }
    with pytest.raises(UnknownArchitecture, match="no memory preview"):
        preview_memory(read_architecture(config | changes), QLORA)
