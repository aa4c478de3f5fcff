"""What is proposed fits, is better at what it is named for, and keeps batch and method; fallbacks change no result."""

from __future__ import annotations

import dataclasses

import pytest

from charkha.hardware.catalog import find_gpu
from charkha.hardware.machine import Machine
from charkha.plan.architecture import Architecture, read_architecture
from charkha.plan.memory_settings import MemorySettings
from charkha.plan.popular_models import popular_config
from charkha.plan.rows import Rows
from charkha.plan.search import evaluate, fallbacks, host_has_room, machines_that_fit, propose, variations
from charkha.training.fallback import _changed, _Step

LLAMA_8B = read_architecture(popular_config("meta-llama/Llama-3.1-8B"))
LLAMA_70B = read_architecture(popular_config("meta-llama/Llama-3.1-70B"))
MIXTRAL = read_architecture(popular_config("mistralai/Mixtral-8x7B-v0.1"))
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


LONG = dataclasses.replace(QLORA, tokens=40960, loss_head="chunked")
MOVED = frozenset({"activations"})


def test_inputs_are_offloaded_only_where_nothing_else_fits_or_for_longer_rows() -> None:
    usual = {one.name: one for one in propose(LLAMA_8B, QLORA, machine("RTX 4090"))}
    assert not usual["fastest"].candidate.settings.offload
    assert not usual["safest"].candidate.settings.offload
    assert usual["longest_context"].changes["devices.offload"] == "activations"
    for one in propose(LLAMA_8B, LONG, machine("RTX 4090")):
        assert one.candidate.fits
        assert one.changes["devices.offload"] == "activations"


def test_inputs_are_offloaded_only_as_training_does_it() -> None:
    for card, count in (("RTX 4090", 2), ("RTX 4090", 1)):
        for one in variations(LONG, machine(card, count)):
            assert one.strategy in ("single", "ddp") or not one.offload
            assert one.gradient_checkpointing or not one.offload
    on_cpu = dataclasses.replace(LONG, device="cpu")
    assert not any(one.offload for one in variations(on_cpu, Machine("CPU", (), None)))


def test_asked_for_offloading_is_given_up_by_name() -> None:
    asked = dataclasses.replace(QLORA, offload=MOVED, gradient_checkpointing=True)
    without = [one for one in variations(asked, machine("RTX 4090")) if not one.gradient_checkpointing]
    assert without
    assert not any(one.offload for one in without)
    changes = [one.changes for one in propose(LLAMA_8B, asked, machine("H100"))]
    assert {"none"} == {change["devices.offload"] for change in changes if "devices.offload" in change}


def test_host_memory_decides_whether_inputs_are_a_fallback() -> None:
    small, large = (dataclasses.replace(machine("RTX 4090"), ram_bytes=size << 30) for size in (8, 64))
    assert [host_has_room(LLAMA_8B, LONG, one) for one in (small, large, machine("RTX 4090"))] == [False, True, False]
    two_rows = dataclasses.replace(LONG, rows=2)
    moved, halved = {"devices.offload": "activations"}, {"training.micro_batch_size": 1}
    assert fallbacks(two_rows, host_has_room=True) == (moved, halved)
    assert fallbacks(two_rows) == (halved,)
    assert fallbacks(dataclasses.replace(two_rows, offload=MOVED), host_has_room=True) == (halved,)
    assert fallbacks(dataclasses.replace(two_rows, device="cpu"), host_has_room=True) == (halved,)


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


@pytest.mark.parametrize(
    ("settings", "architecture"),
    [
        (dataclasses.replace(QLORA, method="ia3"), LLAMA_70B),
        (dataclasses.replace(QLORA, method="prompt_tuning", num_virtual_tokens=20), LLAMA_70B),
        (QLORA, LLAMA_70B),
        (dataclasses.replace(QLORA, quantization="none"), MIXTRAL),
    ],
)
@pytest.mark.parametrize("count", [1, 2])
def test_nothing_is_proposed_that_training_refuses(
    settings: MemorySettings, architecture: Architecture, count: int
) -> None:
    for proposal in propose(architecture, settings, machine("RTX 4090", count)):
        found = proposal.candidate.settings
        assert not (found.streamed and (found.processes > 1 or found.method in ("ia3", "prompt_tuning")))
        assert architecture is not MIXTRAL or found.quantization == "none" or found.streamed


def test_a_base_stored_in_4_bits_is_proposed_in_no_other_storage() -> None:
    proposals = propose(LLAMA_8B, QLORA, machine("H100"), is_stored_quantized=True)
    assert {one.candidate.settings.quantization for one in proposals} == {"nf4"}
    assert propose(LLAMA_8B, QLORA, machine("H100"))[0].candidate.settings.quantization == "none"


def test_the_longest_rows_fit_when_all_of_them_is_trained_and_the_batch_stays() -> None:
    known = Rows(512, 300.0, 100, trained_positions={size: 20 * size for size in (1, 2, 4, 8, 16)}, known=True)
    settings = dataclasses.replace(QLORA, tokens=512, trained_positions=20)
    longest = propose(LLAMA_8B, settings, machine("RTX 4090"), known)[2].candidate.settings
    assert longest.tokens > 8192
    assert evaluate(LLAMA_8B, dataclasses.replace(longest, trained_positions=None), machine("RTX 4090")).fits
    assert longest.rows * longest.accumulation_steps == 16
