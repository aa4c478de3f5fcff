"""The cache of keys and values by architecture, and which models are told in a plan."""

from __future__ import annotations

import dataclasses

import pytest

from charkha.plan.architecture import Architecture, read_architecture
from charkha.plan.generation_memory import cache_bytes, generation_memory, merged, with_the_adapter
from charkha.plan.memory_settings import MemorySettings

QLORA = MemorySettings(dtype="bf16", quantization="nf4", rows=4, tokens=2048, gradient_checkpointing=True)
LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip
FALCON = {
    "model_type": "falcon", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "vocab_size": 65024, "alibi": False,
}  # fmt: skip
EVERY_TOKEN = 2 * 32 * 32 * 128 * 2  # keys and values of 32 heads of 128 elements in 32 layers, 16 bits


def one_row(config: dict[str, object], **changes: object) -> tuple[Architecture, MemorySettings]:
    return read_architecture({**config, **changes}), dataclasses.replace(merged(QLORA), rows=1)


def test_a_thousand_tokens_of_an_8b_llama_are_125_mib():
    architecture, settings = one_row(LLAMA)
    assert cache_bytes(architecture, settings, 1000) == 1000 * 2 * 32 * 8 * 128 * 2 == 125 * 2**20
    assert cache_bytes(architecture, dataclasses.replace(settings, rows=3), 1000) == 3 * 125 * 2**20
    assert cache_bytes(architecture, dataclasses.replace(settings, dtype="fp32"), 1000) == 250 * 2**20


def test_windowed_layers_keep_no_more_than_their_window():
    mistral, settings = one_row(LLAMA, model_type="mistral", sliding_window=4096)
    assert cache_bytes(mistral, settings, 4096) == cache_bytes(mistral, settings, 32768) == 4096 * 2**17
    gemma = {**LLAMA, "model_type": "gemma3_text", "head_dim": 128, "sliding_window": 512}
    kinds = [*["sliding_attention"] * 5, "full_attention"] * 5 + ["sliding_attention"] * 2
    architecture, settings = one_row(gemma, layer_types=kinds)
    a_layers_token = 2 * 8 * 128 * 2
    assert cache_bytes(architecture, settings, 8192) == a_layers_token * (5 * 8192 + 27 * 512)
    # The prompt's keys and values stay whole behind views until the first new token.
    found = generation_memory(architecture, settings, rows=1, prompt=8192, tokens=8192)
    assert (found.peak_moment, found.terms["cache"]) == ("prompt", a_layers_token * 32 * 8192)


@pytest.mark.parametrize(
    ("changes", "share"),
    [
        ({"multi_query": True, "new_decoder_architecture": False}, 1 / 32),
        ({"multi_query": False, "new_decoder_architecture": False}, 1.0),
        ({"new_decoder_architecture": True, "num_kv_heads": 8}, 1.0),  # which it repeats before they are kept
    ],
)
def test_falcons_keep_as_many_heads_as_their_code_gives_the_cache(changes, share):
    architecture, settings = one_row(FALCON, **changes)
    assert cache_bytes(architecture, settings, 1) == share * EVERY_TOKEN


def test_the_cache_is_as_wide_as_the_stream_beside_an_upcast_embedding():
    architecture, _ = one_row(LLAMA)
    wide = with_the_adapter(dataclasses.replace(QLORA, rows=1, upcast_unquantized=True))
    narrow = with_the_adapter(dataclasses.replace(QLORA, rows=1))
    assert cache_bytes(architecture, wide, 1000) == 2 * cache_bytes(architecture, narrow, 1000)


def test_the_last_token_joins_one_layer_anew_and_a_long_prompt_needs_its_activations():
    architecture, settings = one_row(LLAMA)
    long_answer = generation_memory(architecture, settings, rows=16, prompt=16, tokens=8192)
    assert long_answer.peak_moment == "last token"
    assert long_answer.terms["cache"] == 16 * 8192 * 2**17
    values = long_answer.terms["cache"] // 64
    logits = 16 * 128256
    assert long_answer.terms["temporaries"] == values + 4 * logits
    long_prompt = generation_memory(architecture, settings, rows=16, prompt=8192, tokens=8192)
    assert long_prompt.peak_moment == "prompt"
    assert long_prompt.cache_bytes == long_answer.cache_bytes
    assert sum(long_prompt.terms.values()) == long_prompt.peak_bytes > long_answer.peak_bytes


def test_4_bit_weights_are_unpacked_for_a_prompt_and_on_a_gpu_not_for_a_few_tokens():
    architecture, _ = one_row(LLAMA)

    def temporaries(device: str, prompt: int) -> int:
        settings = dataclasses.replace(with_the_adapter(QLORA), device=device)
        return generation_memory(architecture, settings, rows=1, prompt=prompt, tokens=prompt).terms["temporaries"]

    unpacked = 2 * 4096 * 14336
    assert temporaries("cuda", 64) < unpacked < temporaries("cpu", 64)
    assert temporaries("cuda", 256) > unpacked


def test_answering_holds_neither_gradients_nor_states_and_the_merged_model_no_adapter():
    architecture, _ = one_row(LLAMA)
    tuned, whole = (
        generation_memory(architecture, one, rows=1, prompt=64, tokens=64)
        for one in (with_the_adapter(QLORA), merged(QLORA))
    )
    assert {*tuned.terms} == {"base_weights", "adapter_weights", "workspace", "cache", "temporaries"}
    assert "adapter_weights" not in whole.terms
    assert whole.terms["base_weights"] == 2 * architecture.parameters
    sharded = dataclasses.replace(QLORA, strategy="fsdp", processes=8)
    assert with_the_adapter(sharded) == with_the_adapter(QLORA)
