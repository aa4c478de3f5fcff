"""The closed form of memory: sums, hand-computed terms, what makes it larger, what it refuses."""

from __future__ import annotations

import dataclasses

import pytest

from charkha.plan.architecture import read_architecture
from charkha.plan.device_memory import device_memory, host_memory_bytes
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


MIXTRAL = read_architecture(
    {
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }
)


def test_a_mixture_holds_every_expert_and_keeps_activations_of_those_that_a_token_meets():
    settings = dataclasses.replace(QLORA, target_modules=("q_proj", "v_proj"), gradient_checkpointing=False)
    dense = dataclasses.replace(MIXTRAL, experts=None, linears=(*MIXTRAL.linears, *_mlp(4096, 14336)))
    mixture, alone = preview_memory(MIXTRAL, settings), preview_memory(dense, settings)
    assert mixture.breakdown["base_weights"] > 0.5 * 45e9
    assert 1.3 < mixture.breakdown["activations"] / alone.breakdown["activations"] < 2.5
    assert any("experts" in note for note in mixture.notes)


def test_4_bit_weights_without_double_quantization_take_half_a_byte_and_a_sixteenth():
    assert nf4_bytes(2**20, double_quantization=False) == 2**19 + 2**16 + 64


@pytest.mark.parametrize(("quantization", "bytes_a_weight"), [("int8", 1.0), ("fp4", 0.516), ("nf4", 0.516)])
def test_each_quantizer_has_its_constants(quantization, bytes_a_weight):
    linears = LLAMA_8B.layers * LLAMA_8B.linear_weights
    held = base_weight_bytes(LLAMA_8B, dataclasses.replace(QLORA, quantization=quantization))
    assert (held - 2 * (LLAMA_8B.parameters - linears)) / linears == pytest.approx(bytes_a_weight, abs=0.002)


def test_upcasting_what_is_not_quantized_doubles_it_and_the_stream():
    more = preview_memory(LLAMA_8B, dataclasses.replace(QLORA, upcast_unquantized=True)).moments
    less = preview_memory(LLAMA_8B, QLORA).moments
    unquantized = LLAMA_8B.parameters - LLAMA_8B.layers * LLAMA_8B.linear_weights
    kept = LLAMA_8B.layers * 2048 * 4096 * 2
    assert more["optimizer step"] - less["optimizer step"] == 2 * unquantized
    assert more["loss"] - less["loss"] >= 2 * unquantized + kept


@pytest.mark.parametrize(
    ("optimizer", "states"),
    [
        ("adamw_torch_fused", 8), ("adamw_8bit", 2.03), ("paged_adamw_8bit", 0), ("paged_adamw_32bit", 0),
        ("sgd", 0), ("lion_32bit", 4), ("ademamix", 12), ("adafactor", 0.08), ("rmsprop", 4),
    ],
)  # fmt: skip
def test_states_of_each_optimizer(optimizer, states):
    breakdown = preview_memory(LLAMA_8B, dataclasses.replace(FULL, optimizer=optimizer)).breakdown
    assert breakdown.get("optimizer_states", 0) / LLAMA_8B.parameters == pytest.approx(states, abs=0.01)


def test_shards_hold_their_part_and_gather_a_layer_at_a_time():
    alone = preview_memory(LLAMA_8B, FULL)
    for strategy, parts in (("fsdp", 8), ("deepspeed_zero3", 8)):
        sharded = preview_memory(LLAMA_8B, dataclasses.replace(FULL, strategy=strategy, processes=parts))
        assert sharded.breakdown["optimizer_states"] <= alone.breakdown["optimizer_states"] // parts * 1.5 + 8
        assert sharded.peak_bytes < alone.peak_bytes / 3
    pure = dataclasses.replace(FULL, trained_dtype="bf16", mixed_precision=False, optimizer="adamw_torch")
    step = preview_memory(LLAMA_8B, dataclasses.replace(pure, strategy="fsdp", processes=2)).moments["optimizer step"]
    assert step == pytest.approx(5 * LLAMA_8B.parameters, rel=0.002)  # 10 bytes a parameter, by two


def test_zero_stages_shard_more_and_more():
    peaks = [
        preview_memory(LLAMA_8B, dataclasses.replace(FULL, tokens=64, strategy=strategy, processes=4)).peak_bytes
        for strategy in ("ddp", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3")
    ]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == 4
    assert peaks[0] > preview_memory(LLAMA_8B, FULL).peak_bytes  # buckets


@pytest.mark.parametrize("offload", ["optimizer", "parameters", "activations"])
def test_what_is_offloaded_is_gone_from_the_card(offload):
    settings = dataclasses.replace(FULL, strategy="fsdp", processes=2, rows=8, padded=False)
    away = dataclasses.replace(settings, offload=frozenset({offload}))
    assert preview_memory(LLAMA_8B, away).peak_bytes < preview_memory(LLAMA_8B, settings).peak_bytes
    assert host_memory_bytes(LLAMA_8B, away, 0) > host_memory_bytes(LLAMA_8B, settings, 0)


@pytest.mark.parametrize("selective", [False, True])
def test_offloaded_inputs_are_counted_one_by_one(selective):
    usual = dataclasses.replace(QLORA, gradient_checkpointing=True, selective=selective, rows=2, tokens=4096)
    away = dataclasses.replace(usual, offload=frozenset({"activations"}))
    kept, left = preview_memory(LLAMA_8B, usual).moments, preview_memory(LLAMA_8B, away).moments
    an_input = 2 * 4096 * LLAMA_8B.hidden_size * 2  # rows, tokens, hidden, bf16
    layers = LLAMA_8B.layers
    assert kept["backward of the loss"] - left["backward of the loss"] == (layers - 1) * an_input
    assert kept["backward of the last layer"] - left["backward of the last layer"] == (layers - 2) * an_input
    assert kept["optimizer step"] == left["optimizer step"]
    host = host_memory_bytes(LLAMA_8B, away, 0) - host_memory_bytes(LLAMA_8B, usual, 0)
    assert host == (layers - 1) * an_input  # the last layer's stays


def test_without_checkpointing_no_input_is_offloaded():
    usual = dataclasses.replace(QLORA, gradient_checkpointing=False)
    away = dataclasses.replace(usual, offload=frozenset({"activations"}))
    assert preview_memory(LLAMA_8B, away).moments == preview_memory(LLAMA_8B, usual).moments


def test_a_streamed_base_leaves_two_layers_on_the_card():
    settings = dataclasses.replace(QLORA, streamed=True)
    held = preview_memory(LLAMA_8B, settings).breakdown["base_weights"]
    rest = 2 * (LLAMA_8B.embedding_parameters + LLAMA_8B.head_parameters + 4096)
    layer = LLAMA_8B.linear_weights * 4.127 / 8 + 2 * 2 * 4096
    assert held == pytest.approx(rest + 2 * layer, rel=0.001)


@pytest.mark.parametrize(
    ("changes", "published_gib"),
    [
        ({"rows": 4}, 24.87),
        ({"rows": 8}, 36.08),
        ({"rows": 4, "loss_kernel": "in_place", "fused_norms": True}, 22.79),
        ({"rows": 4, "quantization": "nf4"}, 15.25),
    ],
)
def test_published_runs_on_an_a100(changes, published_gib):
    """Mistral-7B, LoRA r 16 on attention, 4096 tokens: torch's peak as IBM's fms-acceleration published it."""
    settings = MemorySettings(
        **{
            "dtype": "bf16", "tokens": 4096, "padded": False, "attention": "flash_attention_2",
            "gradient_checkpointing": True, "reentrant": True, "mixed_precision": False, "lora_dropout": 0.05,
            "target_modules": ("q_proj", "k_proj", "v_proj", "o_proj"), "optimizer": "adamw_torch",
            "loss_kernel": "transformers", "workspace_bytes": 2 * 8_519_680, **changes,
        }
    )  # fmt: skip
    mistral = dataclasses.replace(MIXTRAL, experts=None, linears=(*MIXTRAL.linears, *_mlp(4096, 14336)))
    assert preview_memory(mistral, settings).peak_bytes / 2**30 == pytest.approx(published_gib, rel=0.005)


def _mlp(hidden, inner):
    from charkha.plan.layers import Linear

    return (
        Linear("mlp.gate_proj", hidden, inner, "mlp_in"),
        Linear("mlp.up_proj", hidden, inner, "mlp_in"),
        Linear("mlp.down_proj", inner, hidden, "mlp_inner"),
    )


def test_the_card_holds_more_than_live_tensors_and_the_cache_gives_way_at_the_limit():
    preview = preview_memory(LLAMA_8B, dataclasses.replace(QLORA, rows=4))
    free = device_memory(preview, QLORA, None)
    assert free.allocated < free.reserved < free.device
    tight = device_memory(preview, QLORA, free.least)
    assert tight.allocated <= tight.reserved < free.reserved
    assert tight.device <= free.least
    # A card that is too small for the holes reserves what it has, and no more.
    small = tight.allocated + tight.context + 2**20
    too_small = device_memory(preview, QLORA, small)
    assert too_small.device == small < too_small.least


def test_a_cpu_has_no_context_and_no_cache():
    settings = dataclasses.replace(QLORA, device="cpu")
    memory = device_memory(preview_memory(LLAMA_8B, settings), settings, None)
    assert memory.allocated == memory.device == memory.least
