"""What is proposed fits, is better at what it is named for, and keeps batch and method; fallbacks change no result."""

from __future__ import annotations

import dataclasses

import pytest

from charkha.hardware.catalog import find_gpu
from charkha.hardware.machine import Machine
from charkha.plan.architecture import read_architecture
from charkha.plan.memory_settings import MemorySettings
from charkha.plan.popular_models import popular_config
from charkha.plan.search import evaluate, fallbacks, machines_that_fit, propose, variations
from charkha.training.fallback import _changed, _Step

LLAMA_8B = read_architecture(popular_config("meta-llama/Llama-3.1-8B"))
LLAMA_70B = read_architecture(popular_config("meta-llama/Llama-3.1-70B"))
QLORA = MemorySettings(
    dtype="bf16", quantization="nf4", rows=1, tokens=2048, accumulation_steps=16, gradient_checkpointing=True
)


def machine(card: str, count: int = 1) -> Machine:
    return Machine(card, (find_gpu(card),) * count, None)


@pytest.mark.parametrize("card", ["RTX 3060", "RTX 4090", "H100"])
def test_proposals_fit_and_keep_the_batch(card: str) -> None:
    for proposal in propose(LLAMA_8B, QLORA, machine(card)):
        found = proposal.candidate
        assert found.fits
        if proposal.name != "longest_context":
            assert found.settings.rows * found.settings.accumulation_steps * found.settings.processes == 16
            assert found.settings.tokens == 2048


def test_each_proposal_is_best_at_what_it_is_named_for() -> None:
    fastest, safest, longest = (one.candidate for one in propose(LLAMA_8B, QLORA, machine("RTX 4090")))
    assert fastest.tokens_per_second >= safest.tokens_per_second
    assert safest.memory.least <= 0.85 * safest.limit_bytes
    assert longest.settings.tokens > 2048
    longer = dataclasses.replace(longest.settings, tokens=int(longest.settings.tokens * 1.05))
    at_the_end = longest.settings.tokens == LLAMA_8B.max_positions
    assert at_the_end or not evaluate(LLAMA_8B, longer, machine("RTX 4090")).fits


def test_a_base_is_streamed_only_where_nothing_else_fits() -> None:
    small = propose(LLAMA_8B, QLORA, machine("RTX 4090"))
    assert not any(one.candidate.settings.streamed for one in small)
    large = propose(LLAMA_70B, QLORA, machine("RTX 4090"))
    assert all(one.candidate.settings.streamed for one in large)
    assert large[0].changes["model.placement"] == "streamed"


def test_nothing_is_proposed_where_nothing_fits() -> None:
    full = dataclasses.replace(QLORA, method="full", quantization="none")
    assert propose(LLAMA_70B, full, machine("RTX 4090")) == ()
    machines = machines_that_fit(LLAMA_70B, full)
    assert min(count for count, _ in machines) >= 8
    assert (16, "H100 PCIe") in machines


def test_whole_copies_are_tried_before_shards() -> None:
    strategies = [one.strategy for one in variations(QLORA, machine("RTX 4090", 2))]
    assert {"ddp", "fsdp", "single"} == set(strategies)


def test_when_memory_runs_out_selective_checkpointing_gives_way_to_a_full_one() -> None:
    asked = dataclasses.replace(QLORA, selective=True, gradient_checkpointing=True)
    steps = [step for step in fallbacks(asked) if "training.gradient_checkpointing" in step]
    assert steps == [{"training.gradient_checkpointing": "full"}]
    now = _Step(micro_batch_size=1, gradient_checkpointing=True, selective=True)
    assert _changed(now, steps[0]) == dataclasses.replace(now, selective=False)
    assert _changed(now, {"training.loss_head": "chunked"}).selective


def test_selective_checkpointing_is_looked_at_only_where_it_was_asked_for() -> None:
    asked = dataclasses.replace(QLORA, selective=True)
    kinds = [
        {(one.gradient_checkpointing, one.selective) for one in variations(settings, machine("RTX 4090"))}
        for settings in (QLORA, asked)
    ]
    assert kinds == [{(False, False), (True, False)}, {(False, False), (True, False), (True, True)}]


def test_fallbacks_only_change_how_a_step_is_computed() -> None:
    steps = fallbacks(dataclasses.replace(QLORA, rows=8, gradient_checkpointing=False))
    assert steps == (
        {"training.loss_head": "chunked"},
        {"training.gradient_checkpointing": "full"},
        {"training.micro_batch_size": 4},
        {"training.micro_batch_size": 2},
        {"training.micro_batch_size": 1},
    )


def test_machines_are_named_smallest_first_and_one_large_card_before_several_small_ones() -> None:
    machines = machines_that_fit(LLAMA_70B, QLORA)
    assert machines[0][0] == 1
    assert find_gpu(machines[0][1]).memory_bytes > 44 * 2**30
    assert any(count == 4 and find_gpu(name).memory_bytes < 25 * 2**30 for count, name in machines)
    for count in {count for count, _ in machines}:
        sizes = [find_gpu(name).memory_bytes for there, name in machines if there == count]
        assert sizes == sorted(sizes)
