"""From a few timed steps to a run, and the shapes of all its micro batches."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from charkha.backends.torch.batches import MicroBatchPlan
from charkha.data.packing import pack
from charkha.data.shards import Shard
from charkha.hardware.machine import Machine
from charkha.plan.architecture import read_architecture
from charkha.plan.measured_time import TimedStep, fitted, predicted_seconds
from charkha.plan.memory_settings import MemorySettings
from charkha.plan.popular_models import popular_config
from charkha.plan.schedule import Schedule, schedule_of
from charkha.plan.speed import step_time

LONG, MEDIAN = (2, 100), (2, 40)


def size(rows: int, longest: int) -> float:
    return rows * longest + rows * longest**2 / 1000


def timed(shape: tuple[int, int], *, fixed: float, slope: float, beside: float, count: int = 2) -> TimedStep:
    one = fixed + slope * size(*shape)
    return TimedStep(str(shape), (shape,) * count, one, count * one + beside)


def test_the_three_numbers_of_exact_steps_are_found() -> None:
    steps = [timed(shape, fixed=0.5, slope=0.01, beside=0.2) for shape in (LONG, MEDIAN, LONG, MEDIAN)]
    model = fitted(steps, size)
    assert (model.per_micro_batch, model.per_predicted_second) == (pytest.approx(0.5), pytest.approx(0.01))
    assert model.per_step == pytest.approx(0.2)
    schedule = Schedule(((2, 100, 3), (2, 10, 5)), steps=4, tokens=0)
    by_hand = 3 * (0.5 + 0.01 * size(2, 100)) + 5 * (0.5 + 0.01 * size(2, 10)) + 4 * 0.2
    assert model.run_seconds(schedule, size) == pytest.approx(by_hand)
    assert model.step_seconds([LONG, MEDIAN], size) == pytest.approx(1.2 + 0.01 * (size(*LONG) + size(*MEDIAN)))


def test_one_slow_step_changes_nothing() -> None:
    steps = [timed(shape, fixed=0.5, slope=0.01, beside=0.2) for shape in (LONG, MEDIAN) * 3]
    steps[2] = replace(steps[2], first_seconds=60.0, seconds=120.0)
    assert fitted(steps, size).per_predicted_second == pytest.approx(0.01)


def test_rows_of_one_length_are_scaled_through_the_origin() -> None:
    model = fitted([timed(LONG, fixed=0.0, slope=0.02, beside=0.0)] * 3, size)
    assert (model.per_micro_batch, model.per_predicted_second) == (0.0, pytest.approx(0.02))


@pytest.mark.parametrize("median_seconds", [0.1, 99.0])
def test_no_number_is_negative_whatever_noise_did(median_seconds: float) -> None:
    steps = [TimedStep("worst", (LONG,), 3.0, 3.0), TimedStep("median", (MEDIAN,), median_seconds, median_seconds)]
    model = fitted(steps, size)
    assert all(model.step_seconds([(2, tokens)], size) > 0 for tokens in range(1, 2 * LONG[1]))
    assert model.per_step >= 0


def test_what_grows_faster_than_predicted_is_met_at_both_sizes_and_scaled_down_below() -> None:
    steps = [timed(shape, fixed=-0.3 * 0.01 * size(*MEDIAN), slope=0.01, beside=0.0) for shape in (LONG, MEDIAN)]
    model = fitted(steps, size)
    for step in steps:
        assert model.step_seconds(step.shapes, size) == pytest.approx(step.seconds)
    half = model.micro_batch_seconds(size(*MEDIAN) / 2)
    assert half == pytest.approx(steps[1].first_seconds / 2)


def test_the_closed_form_is_asked_for_every_shape_with_its_share_of_trained_positions() -> None:
    config = popular_config("meta-llama/Llama-3.1-8B-Instruct")
    assert config is not None
    architecture, machine = read_architecture(config), Machine("cpu", (), None)
    settings = MemorySettings("fp32", 4, 512, device="cpu", trained_positions=1024)
    predicted = predicted_seconds(architecture, settings, machine)
    whole = step_time(architecture, settings, None, cpu_flops=machine.cpu_flops).micro_batch_seconds
    assert predicted(4, 512) == pytest.approx(whole)
    assert predicted(4, 256) < whole / 2
    assert predicted(1, 512) == pytest.approx(whole / 4, rel=0.01)


def shard(lengths: np.ndarray) -> Shard:
    return type("Lengths", (), {"lengths": lengths})()  # type: ignore[return-value]


@pytest.mark.parametrize("total_steps", [1, 5, 7, 14, 17])
@pytest.mark.parametrize("packed", [False, True])
def test_the_shapes_of_a_run_are_those_of_its_micro_batches(total_steps: int, packed: bool) -> None:
    lengths = np.random.default_rng(0).integers(3, 40, 200 if packed else 53)
    row_tokens = 64 if packed else None
    shared = {"batch_size": 8, "micro_batch_size": 3, "seed": 1, "fingerprint": "x"}
    schedule = schedule_of(lengths, total_steps=total_steps, packed_row_tokens=row_tokens, **shared)
    plan = MicroBatchPlan(shard(lengths), packed=pack(lengths, 64) if packed else None, **shared)
    elements = range(total_steps * plan.micro_batches_per_step)
    shapes = Counter(plan.shape_of(element) for element in elements)
    if total_steps <= plan.steps_per_epoch:
        assert {(rows, longest): count for rows, longest, count in schedule.shapes} == shapes
        assert schedule.tokens == sum(int(lengths[plan.rows_of(element)].sum()) for element in elements)
    positions = sum(rows * longest * count for rows, longest, count in schedule.shapes)
    assert positions == pytest.approx(
        sum(rows * longest * count for (rows, longest), count in shapes.items()), rel=0.02
    )
    assert schedule.micro_batches == len(elements)
    assert schedule.steps == total_steps


def test_the_largest_step_beside_optimizer_states_is_the_next_epochs_first_or_the_largest_left() -> None:
    lengths = np.array([9, 8, 7, 6, 5, 4, 3, 2])
    plan = MicroBatchPlan(shard(lengths), batch_size=2, micro_batch_size=1, seed=3, fingerprint="x")
    assert plan.largest_step_after_first(1) is None
    assert plan.largest_step_after_first(5) == 4
    steps = {step: max(plan.shape_of(2 * step + place)[1] for place in (0, 1)) for step in range(1, 4)}
    assert plan.largest_step_after_first(4) == max(steps, key=lambda step: steps[step])
