"""The held-out loss as a moment of a run: which batch needs most, what is halved, what it makes of a plan."""

from __future__ import annotations

import dataclasses

import pytest

from charkha.plan.architecture import read_architecture
from charkha.plan.device_memory import device_memory
from charkha.plan.held_out_memory import HELD_OUT_TOKENS, full_batch, largest_batches
from charkha.plan.memory import EVALUATION, preview_memory
from charkha.plan.memory_settings import HeldOutBatch, MemorySettings

WORDS = 128256
LLAMA_8B = read_architecture(
    {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": WORDS,
        "tie_word_embeddings": False,
    }
)
QLORA = MemorySettings(dtype="bf16", quantization="nf4", rows=1, tokens=512, gradient_checkpointing=True)
EVALUATED = dataclasses.replace(QLORA, held_out=(full_batch(2048),))


def test_all_logits_of_a_batch_are_the_peak_where_held_out_rows_are_longer():
    alone, with_it = preview_memory(LLAMA_8B, QLORA), preview_memory(LLAMA_8B, EVALUATED)
    assert (with_it.peak_moment, with_it.step_bytes) == (EVALUATION, alone.peak_bytes)
    assert with_it.peak_bytes == sum(with_it.breakdown.values()) == with_it.moments[EVALUATION] > alone.peak_bytes
    # In 16 bits and, for accelerate copies what a model gives, in 32.
    assert with_it.breakdown["logits_and_loss"] == 6 * 4096 * WORDS
    assert with_it.breakdown["optimizer_states"] == alone.breakdown["optimizer_states"]
    assert "gradients" not in with_it.breakdown


def test_where_training_makes_logits_in_chunks_evaluation_does_too():
    chunked = dataclasses.replace(EVALUATED, loss_head="chunked", tokens=2048)
    preview = preview_memory(LLAMA_8B, chunked)
    assert preview.held_out
    assert preview.peak_moment != EVALUATION
    # A layer at work, hidden states and two chunks of 64 MiB; all logits would be 6 bytes for each of 4096 x 128256.
    assert preview.held_out.size < 2**30 < 6 * 4096 * WORDS


def test_nothing_held_out_is_no_moment():
    preview = preview_memory(LLAMA_8B, QLORA)
    assert EVALUATION not in preview.moments
    assert preview.held_out_bytes == preview.held_out_least_bytes == 0


def test_a_batch_that_does_not_fit_is_halved_as_training_halves_it():
    eight = dataclasses.replace(QLORA, held_out=(HeldOutBatch(8, 512, padded=True),))
    whole = preview_memory(LLAMA_8B, eight)
    halved = preview_memory(LLAMA_8B, eight, room=whole.peak_bytes - 1)
    least = preview_memory(LLAMA_8B, eight, room=1)
    batches = [preview.held_out.batch for preview in (whole, halved, least) if preview.held_out]
    assert [(batch.rows, batch.padded) for batch in batches] == [(8, True), (4, True), (1, False)]
    assert whole.peak_bytes > halved.moments[EVALUATION] > least.moments[EVALUATION]
    assert least.moments[EVALUATION] == least.held_out_least_bytes


def test_the_least_card_holds_a_step_and_one_held_out_row():
    rows = [device_memory(preview_memory(LLAMA_8B, one), one, None) for one in (QLORA, EVALUATED)]
    single = dataclasses.replace(QLORA, held_out=(HeldOutBatch(1, 2048, padded=False),))
    assert device_memory(preview_memory(LLAMA_8B, single), single, None).least == rows[1].least > rows[0].least
    assert rows[1].reserved >= rows[1].allocated > rows[0].allocated
    long_rows = dataclasses.replace(QLORA, rows=4, tokens=2048, held_out=EVALUATED.held_out)  # where steps need more
    without = dataclasses.replace(long_rows, held_out=())
    assert device_memory(preview_memory(LLAMA_8B, long_rows), long_rows, None) == device_memory(
        preview_memory(LLAMA_8B, without), without, None
    )


def test_layers_of_an_evaluation_keep_nothing_and_gradients_are_gone():
    few_words = dataclasses.replace(LLAMA_8B, vocab_size=512)
    one = dataclasses.replace(EVALUATED, method="full", quantization="none", accumulation_steps=4)
    preview = preview_memory(few_words, one)
    assert preview.held_out
    copies = 2 * few_words.layers * few_words.linear_weights  # autocast's, until the model's forward is over
    # The embedding's output, the layer's input, and gate, up and their product at the least; less than one layer keeps.
    layer = 4096 * (2 * 4 * 4096 + 3 * 2 * 14336)
    assert preview.held_out.terms["weight_copies"] == pytest.approx(copies, rel=0.01)
    assert layer < preview.held_out.terms["temporaries"] < 2 * layer
    assert preview.moments[EVALUATION] < preview.resting_bytes + copies + 3 * layer


@pytest.mark.parametrize(("longest", "rows"), [(8, 512), (2048, 2), (3000, 1), (3 * HELD_OUT_TOKENS, 1)])
def test_rows_that_are_not_known_make_full_batches_of_the_longest(longest, rows):
    assert full_batch(longest) == HeldOutBatch(rows, longest, padded=False)


def test_only_batches_that_may_need_most_are_looked_at():
    most, longest = HeldOutBatch(8, 512, padded=False), HeldOutBatch(1, 3000, padded=False)
    padded = HeldOutBatch(4, 500, padded=True)
    smaller = HeldOutBatch(7, 512, padded=False)
    assert largest_batches([smaller, padded, longest, most, most]) == (most, longest, padded)
    assert largest_batches([]) == ()


def test_shorter_rows_are_shorter_held_out_rows_too():
    assert EVALUATED.cut_to(512).held_out == (HeldOutBatch(2, 512, padded=False),)
    assert EVALUATED.cut_to(4096).held_out == EVALUATED.held_out
