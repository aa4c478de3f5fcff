"""A streamed base by arithmetic: bytes of a 70B model, what hides behind computing, and from which micro batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from charkha.hardware.catalog import find_gpu
from charkha.hardware.machine import Machine
from charkha.plan.architecture import read_architecture
from charkha.plan.loss_memory import head_memory
from charkha.plan.memory_settings import MemorySettings
from charkha.plan.popular_models import popular_config
from charkha.plan.speed import step_time
from charkha.plan.streamed import (
    hot_layers_of,
    is_possible,
    moved_bytes,
    slab_bytes,
    slab_layer_bytes,
    table_weights,
    usual_ram_bytes,
    waiting_bytes,
)
from charkha.plan.streamed_time import (
    copying,
    exposed_seconds,
    free_from_rows,
    free_from_tokens,
    link_of,
    streamed_step_time,
)

LLAMA_70B = read_architecture(popular_config("meta-llama/Llama-3.1-70B"))
RTX_4090 = Machine("RTX 4090", (find_gpu("RTX 4090"),), None)
STREAMED = MemorySettings(
    dtype="bf16",
    quantization="nf4",
    rows=1,
    tokens=2048,
    accumulation_steps=16,
    gradient_checkpointing=True,
    loss_head="chunked",
    streamed=True,
)
GB = 1e9


def test_a_70b_model_is_35_gb_of_which_69_pass_in_a_micro_step():
    assert slab_layer_bytes(LLAMA_70B, STREAMED) == pytest.approx(0.4414e9, rel=0.001)
    assert slab_bytes(LLAMA_70B, STREAMED) == pytest.approx(35.31e9, rel=0.001)
    assert moved_bytes(LLAMA_70B, STREAMED) == 156 * slab_layer_bytes(LLAMA_70B, STREAMED)
    assert usual_ram_bytes(waiting_bytes(LLAMA_70B, STREAMED)) == 48 << 30


def test_hot_layers_neither_move_nor_wait_and_the_disk_needs_two_buffers():
    hot = replace(STREAMED, streamed_resident_layers=24)
    layer = slab_layer_bytes(LLAMA_70B, hot)
    assert moved_bytes(LLAMA_70B, hot) == 2 * (56 - 2) * layer
    assert waiting_bytes(LLAMA_70B, hot) == 80 * layer
    assert waiting_bytes(LLAMA_70B, replace(hot, streamed_from="disk")) == 2 * layer
    assert waiting_bytes(LLAMA_70B, replace(hot, device="cpu")) == 0
    assert moved_bytes(LLAMA_70B, replace(hot, streamed_resident_layers=79)) == 0


def test_a_head_on_the_host_comes_in_blocks_unless_the_models_own_loss_wants_all_logits():
    chunked = replace(STREAMED, host_tables="both")
    own = replace(chunked, loss_kernel="transformers_alone", loss_head="full")
    logits = STREAMED.positions * LLAMA_70B.vocab_size
    assert head_memory(LLAMA_70B, chunked).loss_forward < 2 * logits
    assert head_memory(LLAMA_70B, own).loss_forward >= 12 * logits
    assert table_weights(LLAMA_70B, own) == 2 * LLAMA_70B.vocab_size * LLAMA_70B.hidden_size


@pytest.mark.parametrize("count", range(10))
def test_hot_layers_are_spread_and_as_many_as_asked_for(count):
    hot = hot_layers_of(9, count)
    assert len(set(hot)) == count == len(hot)
    assert set(hot) <= set(range(9))
    if count == 3:
        assert hot == (1, 4, 7)


@pytest.mark.parametrize(
    ("slots", "copy", "expected"),
    [
        (2, 1.0, 0.0),  # as long as computing a layer
        (2, 1.5, 8 * 0.5),  # the first two lie there, each of eight others is waited for
        (3, 1.5, 7 * 1.5 - 8),  # seven copies one after another, beside eight layers
        (3, 1.1, 0.0),
        (10, 99.0, 0.0),
    ],
)
def test_what_copying_exposes_in_a_pass_of_ten_layers(slots, copy, expected):
    assert exposed_seconds([True] * 10, slots, copy, 1.0) == pytest.approx(expected)


def test_hot_layers_between_cold_ones_give_their_copies_time():
    alternating = [number % 2 == 0 for number in range(20)]
    together = [number < 10 for number in range(20)]
    assert exposed_seconds(alternating, 2, 2.0, 1.0) == 0
    assert exposed_seconds(together, 2, 2.0, 1.0) == pytest.approx(8)


def test_forward_is_where_copying_is_waited_for():
    """Its computing is a third and its copying a half, so all of a step's seconds cannot be set against each other."""
    moved = copying(LLAMA_70B, STREAMED, RTX_4090, 7 * GB)
    assert moved.copy_seconds == pytest.approx(68.86 / 7, rel=0.001)
    # A little less than a third: the head is no layer, and attention's backward costs more than twice its forward.
    least, most = (moved.copy_seconds / 2 - share * moved.compute_seconds for share in (1 / 3, 1 / 4))
    assert least < moved.exposed_seconds < most
    assert 0.7 < moved.hidden_share < 0.9
    assert not moved.is_free


@pytest.mark.parametrize("rate", [7 * GB, 12 * GB, 25 * GB])
def test_from_the_micro_batch_that_is_said_copying_is_free(rate):
    tokens = free_from_tokens(LLAMA_70B, STREAMED, RTX_4090, rate)
    assert tokens is not None
    assert copying(LLAMA_70B, replace(STREAMED, tokens=tokens), RTX_4090, rate).is_free
    assert not copying(LLAMA_70B, replace(STREAMED, tokens=tokens - 1), RTX_4090, rate).is_free
    rows = free_from_rows(LLAMA_70B, replace(STREAMED, tokens=256), RTX_4090, rate)
    assert rows is not None
    assert abs(rows * 256 - tokens) < 0.15 * tokens + 256  # attention over short rows takes less


def test_what_is_not_hidden_is_in_the_steps_time():
    short = replace(STREAMED, tokens=128)
    resident = step_time(LLAMA_70B, short, RTX_4090.gpu)
    streamed = streamed_step_time(LLAMA_70B, short, RTX_4090)
    exposed = copying(LLAMA_70B, short, RTX_4090, link_of(RTX_4090, short).bytes_per_second).exposed_seconds
    assert streamed.step_seconds(16) == pytest.approx(resident.step_seconds(16) + 16 * exposed)
    assert exposed > resident.micro_batch_seconds
    assert streamed_step_time(LLAMA_70B, replace(short, streamed=False), RTX_4090) == resident


def test_measured_speeds_win_over_assumed_ones_and_the_slower_of_disk_and_slot_decides():
    assert link_of(RTX_4090, STREAMED).bytes_per_second == find_gpu("RTX 4090").pcie_bytes_per_s
    assert link_of(RTX_4090, STREAMED).source.startswith("assumed")
    measured = replace(RTX_4090, host_to_device_bytes_per_s=11 * GB, disk_read_bytes_per_s=3 * GB)
    assert link_of(measured, STREAMED).bytes_per_second == 11 * GB
    from_disk = replace(STREAMED, streamed_from="disk")
    assert link_of(measured, from_disk).bytes_per_second == 3 * GB
    assert link_of(measured, from_disk).source.startswith("measured")
    assert "charkha doctor" in link_of(RTX_4090, from_disk).source
    assert link_of(replace(measured, disk_read_bytes_per_s=20 * GB), from_disk).bytes_per_second == 11 * GB


ON_ATTENTION = ("q_proj", "v_proj")


@pytest.mark.parametrize(
    ("base", "changes", "possible"),
    [
        ("meta-llama/Llama-3.1-70B", {}, True),
        ("meta-llama/Llama-3.1-70B", {"streamed": False}, True),
        ("meta-llama/Llama-3.1-70B", {"processes": 2, "strategy": "ddp"}, False),
        ("meta-llama/Llama-3.1-70B", {"method": "ia3"}, False),
        ("mistralai/Mixtral-8x7B-v0.1", {}, False),  # adapters on experts
        ("mistralai/Mixtral-8x7B-v0.1", {"target_modules": ON_ATTENTION}, True),
        ("mistralai/Mixtral-8x7B-v0.1", {"streamed": False}, False),  # bitsandbytes leaves the experts whole
        ("mistralai/Mixtral-8x7B-v0.1", {"streamed": False, "experts_in_turn": True}, True),
        ("mistralai/Mixtral-8x7B-v0.1", {"streamed": False, "quantization": "none"}, True),
        ("openai/gpt-oss-20b", {"target_modules": ON_ATTENTION, "quantization": "none"}, False),
    ],
)
def test_what_training_refuses_is_not_proposed(base, changes, possible):
    assert is_possible(read_architecture(popular_config(base)), replace(STREAMED, **changes)) is possible


@pytest.mark.parametrize(("gb_per_second", "tokens"), [(25, 853), (12, 2025), (7, 3570)])
def test_the_page_on_a_70b_says_what_the_plan_does(gb_per_second, tokens):
    assert free_from_tokens(LLAMA_70B, STREAMED, RTX_4090, gb_per_second * GB) == tokens
    page = Path(__file__).parents[2] / "docs" / "70b-on-24gb.md"
    assert f"{gb_per_second} GB/s" in page.read_text(encoding="utf-8")
    assert f"| {tokens} |" in page.read_text(encoding="utf-8")


def waited_and_brought(cold: list[bool], slots: int, copy: float, forward: float, backward: float) -> tuple[float, int]:
    """Seconds that computing waits and layers that come in a micro step, by the engine's rule played out."""
    order = [*((at, forward) for at in range(len(cold))), *((at, backward) for at in reversed(range(len(cold))))]
    places = {at: place for place, at in enumerate(at for at, is_cold in enumerate(cold) if is_cold)}
    holds: list[int | None] = [None] * slots
    arrives, freed = dict.fromkeys(places.values(), 0.0), [0.0] * slots
    clock, link, current, waited, brought = 0.0, 0.0, -1, 0.0, 0
    for _micro_step in range(4):
        waited, brought = 0.0, 0
        for at, seconds in order:
            place = places.get(at, current)
            if place != current:
                descends = current > place > 0
                freed[current % slots] = clock
                path = range(place - 1, -1, -1) if descends else range(place + 1, len(places))
                for wanted in (place, *path[: slots - 1]):
                    if holds[wanted % slots] != wanted:
                        link = arrives[wanted] = max(link, freed[wanted % slots]) + copy
                        holds[wanted % slots], brought = wanted, brought + 1
                waited, clock, current = waited + max(0.0, arrives[place] - clock), max(clock, arrives[place]), place
            clock += seconds
    return waited, brought


@pytest.mark.parametrize("slots", [2, 3, 4])
@pytest.mark.parametrize("hot", [0, 1, 4])
@pytest.mark.parametrize("copy", [0.3, 1.1, 2.7, 9.0])
def test_what_is_waited_for_is_what_the_engines_rule_comes_to(slots, hot, copy):
    stay = set(hot_layers_of(13, hot))
    cold = [number not in stay for number in range(13)]
    waited, brought = waited_and_brought(cold, slots, copy, 1.0, 2.0)
    planned = exposed_seconds(cold, slots, copy, 1.0) + exposed_seconds(cold[::-1], slots, copy, 2.0)
    assert waited == pytest.approx(planned, abs=1e-9)
    assert brought == 2 * (sum(cold) - slots)
