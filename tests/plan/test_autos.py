"""What `auto` becomes: the fastest way that fits with room to spare, and nothing that the user wrote changes."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from charkha.hardware.catalog import find_gpu
from charkha.hardware.machine import Machine
from charkha.plan.architecture import read_architecture
from charkha.plan.autos import (
    CHECKPOINTING,
    LOSS_HEAD,
    MICRO_BATCH,
    OPTIMIZER,
    PUBLISHED_ERROR,
    SMALL_OPTIMIZER,
    Free,
    Picked,
    pick,
    ways,
)
from charkha.plan.memory_settings import MemorySettings
from charkha.plan.pace import epoch_seconds
from charkha.plan.popular_models import popular_config
from charkha.plan.rows import MicroBatches, Rows
from charkha.plan.search import evaluate, limit_of

GIB = 2**30
LLAMA_8B = read_architecture(popular_config("meta-llama/Llama-3.1-8B"))
TINY = read_architecture(
    {
        "model_type": "llama", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 6, "vocab_size": 1024,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512, "tie_word_embeddings": True,
    }
)  # fmt: skip
ALL = frozenset({MICRO_BATCH, CHECKPOINTING, LOSS_HEAD, OPTIMIZER})
ROWS = Rows(longest=2048, mean=1024.0, count=1600)
QLORA = MemorySettings(
    dtype="bf16",
    quantization="nf4",
    rows=1,
    tokens=2048,
    accumulation_steps=16,
    gradient_checkpointing=True,
    loss_head="chunked",
    lengths_vary=True,
)
FULL = replace(QLORA, method="full", quantization="none")


def card(name: str, free: int | None = None) -> Machine:
    return Machine(name, (find_gpu(name),), None, free_bytes=() if free is None else (free,))


def picked(machine: Machine, settings: MemorySettings = QLORA, keys: frozenset[str] = ALL, **more: Any) -> Picked:
    rows = more.get("rows", ROWS)
    return pick(LLAMA_8B, settings, Free(keys, more.get("small", True)), machine, rows, 16)


@pytest.mark.parametrize("name", ["RTX 3060", "RTX 4090", "H100", "H200"])
def test_what_is_picked_leaves_the_published_error_free_and_keeps_the_batch(name: str) -> None:
    way = picked(card(name)).way
    assert way.fit == "roomy"
    assert (1 + PUBLISHED_ERROR) * way.needs <= find_gpu(name).memory_bytes
    assert way.settings.rows * way.settings.accumulation_steps == 16
    assert (way.settings.tokens, way.settings.quantization) == (2048, "nf4")


def test_the_margin_is_at_least_the_error_that_is_published() -> None:
    text = (Path(__file__).parents[2] / "docs/plan-accuracy.md").read_text(encoding="utf-8")
    row = re.search(r"\| class A, allocated \| \d+ \| [\d.]+% \| ([\d.]+)% \|", text)
    assert row is not None
    assert float(row[1]) / 100 <= PUBLISHED_ERROR


def test_a_larger_card_is_never_slower_and_stops_recomputing() -> None:
    found = [picked(card(name)).way for name in ("RTX 3060", "RTX 4090", "H200")]
    assert found[0].settings.gradient_checkpointing
    assert not found[2].settings.gradient_checkpointing
    assert found[0].seconds > found[1].seconds > found[2].seconds


def test_no_way_that_fits_as_well_is_more_than_a_shade_faster() -> None:
    machine = card("RTX 4090")
    found = picked(machine)
    for way in ways(QLORA, Free(ALL, True), ROWS, 16):
        other = pick(LLAMA_8B, way, Free(frozenset(), True), machine, ROWS, 16).way
        assert other.fit != "roomy" or other.seconds * 1.03 >= found.way.seconds


def test_what_the_user_wrote_stays() -> None:
    wrote = replace(QLORA, rows=4, accumulation_steps=4, gradient_checkpointing=False)
    found = picked(card("RTX 4090"), wrote, frozenset({LOSS_HEAD, OPTIMIZER}))
    assert (found.way.settings.rows, found.way.settings.gradient_checkpointing) == (4, False)
    assert set(found.reasons) == {LOSS_HEAD, OPTIMIZER}
    assert found.way.fit == "too_much"


def test_what_others_hold_of_the_card_is_not_counted_on() -> None:
    alone, beside = picked(card("H100")), picked(card("H100", free=20 * GIB))
    assert not alone.way.settings.gradient_checkpointing
    assert beside.way.settings.gradient_checkpointing
    assert beside.way.candidate.limit_bytes == 20 * GIB


def test_reasons_have_figures() -> None:
    reasons = picked(card("RTX 4090")).reasons
    assert re.search(r"[\d.]+ GiB without, [\d.]+ GiB with, of 23.6 GiB", reasons[CHECKPOINTING])
    assert re.search(r"[\d.]+ GiB of 23.6 GiB for rows of up to 2048 tokens", reasons[MICRO_BATCH])
    assert re.search(r"[\d.]+ GiB with all logits, [\d.]+ GiB in chunks", reasons[LOSS_HEAD])


def test_states_in_8_bits_only_where_full_training_fits_no_other_way() -> None:
    tight, wide = picked(card("A100 80GB"), FULL), picked(card("B200"), FULL)
    assert tight.way.settings.optimizer == SMALL_OPTIMIZER
    assert "other rounding" in tight.reasons[OPTIMIZER]
    assert wide.way.settings.optimizer == "adamw_torch_fused"
    assert picked(card("A100 80GB"), FULL, small=False).way.fit == "too_much"
    assert picked(card("RTX 3060"), QLORA).way.settings.optimizer == "adamw_torch_fused"


def test_where_nothing_fits_the_leanest_way_is_told() -> None:
    found = picked(card("RTX 3050"), replace(QLORA, quantization="none"))
    assert found.way.fit == "too_much"
    assert (found.way.settings.rows, found.way.settings.gradient_checkpointing) == (1, True)


def test_a_need_within_the_error_above_the_limit_is_near() -> None:
    needs = picked(card("RTX 3060")).way.needs
    assert picked(card("RTX 3060", free=int(needs / 1.05))).way.fit == "near"
    assert picked(card("RTX 3060", free=int(needs / 1.2))).way.fit == "too_much"
    assert picked(card("RTX 3060", free=int(needs * 1.05))).way.fit == "bare"


def test_a_loss_of_the_models_own_is_not_cut_into_chunks() -> None:
    own = replace(QLORA, loss_head="full", loss_kernel="transformers_alone")
    assert {way.loss_head for way in ways(own, Free(ALL, True), ROWS, 16)} == {"full"}


def test_a_cpu_takes_large_micro_batches_of_a_small_model_and_little_memory_makes_them_small() -> None:
    rows = Rows(longest=128, mean=96.0, count=1600)
    settings = replace(QLORA, dtype="fp32", quantization="none", device="cpu", tokens=128)
    free = Free(ALL, True)
    large = pick(TINY, settings, free, Machine("CPU", (), 16 * GIB), rows, 16).way.settings
    small = pick(TINY, settings, free, Machine("CPU", (), GIB, free_bytes=(850 * 2**20,)), rows, 16).way
    assert large.rows >= 8
    assert not large.gradient_checkpointing
    assert small.settings.gradient_checkpointing or small.settings.rows < large.rows
    assert small.fit == "roomy"


def test_processes_of_a_cpu_share_its_memory() -> None:
    machine = Machine("CPU", (), 16 * GIB, free_bytes=(8 * GIB,))
    settings = replace(QLORA, device="cpu", dtype="fp32", quantization="none")
    one, two = (limit_of(TINY, replace(settings, processes=count), machine) for count in (1, 2))
    assert one is not None
    assert two is not None
    assert two < one / 2 < 4 * GIB
    assert evaluate(TINY, settings, Machine("CPU", (), None)).fits  # nothing known, nothing refused


def test_an_epoch_of_skewed_lengths_takes_less_than_one_of_full_rows() -> None:
    full = Rows(longest=2048, mean=2048.0, count=1600)
    shapes = {1: (MicroBatches(1584, 200.0, 200.0), MicroBatches(16, 2048.0, 2048.0))}
    skewed = replace(full, mean=220.0, shapes=shapes)
    settings = replace(QLORA, rows=1)
    machine = card("RTX 4090")
    slow, fast = (epoch_seconds(LLAMA_8B, settings, machine, rows, 16) for rows in (full, skewed))
    assert 0.08 < fast / slow < 0.25  # positions alone: 0.11
    micro = evaluate(LLAMA_8B, settings, machine).time
    assert slow == pytest.approx(100 * micro.step_seconds(16), rel=0.01)
