from __future__ import annotations

import itertools

import numpy as np
import pytest

from charkha.data.order import padded_micro_batches, plan_epoch
from charkha.errors import UsageError

Steps = list[list[np.ndarray]]


def lengths(rows: int) -> np.ndarray:
    return np.random.default_rng(rows).integers(1, 500, rows)


def plan(rows: int, batch: int = 16, micro: int = 4, **options: object) -> Steps:
    settings = {"seed": 42, "epoch": 0, "fingerprint": "data", **options}
    return plan_epoch(lengths(rows), batch_size=batch, micro_batch_size=micro, **settings)


def flat(steps: Steps) -> list[int]:
    return [int(row) for step in steps for micro in step for row in micro]


@pytest.mark.parametrize(
    ("rows", "batch", "micro", "shuffle"),
    list(itertools.product([1, 5, 16, 17, 100, 1000], [1, 7, 16], [1, 3, 16, 64], [True, False])),
)
def test_each_row_stands_once_in_steps_of_equal_shape(rows: int, batch: int, micro: int, shuffle: bool) -> None:
    steps = plan(rows, batch, micro, shuffle=shuffle)
    assert sorted(flat(steps)) == list(range(rows))
    assert {len(step) for step in steps} == {-(-batch // micro)}
    assert all(len(part) <= micro for step in steps for part in step)
    sizes = [sum(len(part) for part in step) for step in steps]
    assert sizes == [batch] * (rows // batch) + ([rows % batch] if rows % batch else [])


def test_the_plan_is_a_function_of_seed_epoch_and_data() -> None:
    first = flat(plan(1000))
    assert flat(plan(1000)) == first
    for other in ({"epoch": 1}, {"seed": 43}, {"fingerprint": "other"}):
        assert flat(plan(1000, **other)) != first


def test_the_plan_is_the_same_on_every_machine() -> None:
    steps = plan_epoch(np.arange(12) % 5, batch_size=4, micro_batch_size=2, seed=1, epoch=2, fingerprint="data")
    assert [[part.tolist() for part in step] for step in steps] == PLANNED


PLANNED = [[[4, 9], [8, 3]], [[11, 5], [0, 10]], [[7, 2], [6, 1]]]


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_rows_of_a_step_do_not_depend_on_the_micro_batch(shuffle: bool) -> None:
    plans = [plan(333, 16, micro, shuffle=shuffle) for micro in (1, 3, 8, 16, 99)]
    rows = [[sorted(flat([step])) for step in steps] for steps in plans]
    assert all(one == rows[0] for one in rows)


def test_rows_of_like_length_stand_together_and_the_longest_comes_first() -> None:
    sizes = lengths(1000)
    steps = plan(1000)
    padded = sum(int(sizes[part].max()) * len(part) for step in steps for part in step if len(part))
    assert padded < 1.15 * sizes.sum()
    assert int(sizes[steps[0][0][0]]) == int(sizes[flat(steps[:-1])].max())
    means = [sizes[flat([step])].mean() for step in steps[1:-1]]
    assert means != sorted(means)


def test_without_shuffling_steps_follow_the_file() -> None:
    assert [sorted(flat([step])) for step in plan(20, 8, shuffle=False)] == [
        list(range(8)),
        list(range(8, 16)),
        list(range(16, 20)),
    ]


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(UsageError, match="at least 1"):
        plan(10, 0)


@pytest.mark.parametrize(
    ("rows", "batch", "micro"), list(itertools.product([1, 5, 17, 1000], [1, 7, 16], [1, 3, 16, 64]))
)
def test_padded_micro_batches_are_those_of_the_first_epoch(rows: int, batch: int, micro: int) -> None:
    planned = [part for step in plan(rows, batch, micro) for part in step if len(part)]
    expected = sorted((len(part), int(lengths(rows)[part].max())) for part in planned)
    counts, longest = padded_micro_batches(
        lengths(rows), batch_size=batch, micro_batch_size=micro, seed=42, fingerprint="data"
    )
    assert sorted(zip(counts.tolist(), longest.tolist(), strict=True)) == expected
