"""Packed rows: every document once, never over the room, the same number of rows in every epoch."""

from __future__ import annotations

import numpy as np
import pytest

from charkha.data.packing import PackedShapes, pack
from charkha.errors import DataError


def some_lengths(number: int) -> tuple[np.ndarray, int]:
    """Documents and a row length: uniform, with a long tail, all alike, or as long as a row."""
    random = np.random.default_rng(number)
    room = int(random.integers(8, 400))
    count = int(random.integers(1, 200))
    kind = number % 4
    if kind == 0:
        return random.integers(1, room + 1, count), room
    if kind == 1:
        return np.clip(random.lognormal(2, 1, count).astype(int), 1, room), room
    if kind == 2:
        return np.full(count, int(random.integers(1, room + 1))), room
    return random.choice([1, room // 3, room // 2, room // 2 + 1, room], count), room


def deal(shapes: PackedShapes, lengths: np.ndarray, epoch: int = 0, seed: int = 1, fingerprint: str = "data") -> list:
    return [list(row) for row in shapes.deal(lengths, seed=seed, epoch=epoch, fingerprint=fingerprint)]


def best_fit_decreasing_one_by_one(lengths: np.ndarray, room: int) -> int:
    """Number of rows by the textbook: each document into the row where the least room stays."""
    rooms: list[int] = []
    for length in sorted(map(int, lengths), reverse=True):
        fitting = [(left, place) for place, left in enumerate(rooms) if left >= length]
        if fitting:
            rooms[min(fitting)[1]] -= length
        else:
            rooms.append(room - length)
    return len(rooms)


@pytest.mark.parametrize("number", range(60))
def test_every_document_stands_once_in_a_row_that_has_room_for_it(number: int) -> None:
    lengths, room = some_lengths(number)
    shapes = pack(lengths, room)
    for epoch in range(3):
        rows = deal(shapes, lengths, epoch)
        assert len(rows) == shapes.rows
        assert sorted(document for row in rows for document in row) == list(range(len(lengths)))
        assert [int(lengths[row].sum()) for row in rows] == shapes.tokens.tolist()
    assert shapes.tokens.max() <= room
    assert shapes.fill_rate == pytest.approx(lengths.sum() / (shapes.rows * room))


@pytest.mark.parametrize("number", range(60))
def test_as_many_rows_as_best_fit_decreasing_gives_one_by_one(number: int) -> None:
    lengths, room = some_lengths(number)
    assert pack(lengths, room).rows == best_fit_decreasing_one_by_one(lengths, room)


def test_short_documents_fill_their_rows() -> None:
    lengths = np.random.default_rng(0).integers(10, 200, 5000)
    assert pack(lengths, 2048).fill_rate > 0.99


def test_the_same_arguments_give_the_same_rows_and_others_give_others() -> None:
    lengths = np.random.default_rng(0).integers(5, 60, 400)
    shapes = pack(lengths, 256)
    first = deal(shapes, lengths)
    assert deal(pack(lengths, 256), lengths) == first
    for other in (
        deal(shapes, lengths, epoch=1),
        deal(shapes, lengths, seed=2),
        deal(shapes, lengths, fingerprint="other"),
    ):
        assert other != first
        together = {tuple(sorted(row)) for row in first} & {tuple(sorted(row)) for row in other}
        assert len(together) < len(first) / 10, "documents meet other documents"


def test_the_number_of_rows_depends_on_the_lengths_alone_not_on_their_order() -> None:
    lengths = np.random.default_rng(0).integers(5, 200, 1000)
    assert pack(lengths, 256).slots.tolist() == pack(lengths[::-1], 256).slots.tolist()


def test_the_rows_of_a_known_case_stay_as_they_are() -> None:
    """A run that is resumed after an upgrade must see the rows it was planned with."""
    lengths = np.array([5, 3, 9, 2, 4, 4, 1, 8, 5, 3])
    shapes = pack(lengths, 10)
    assert [shapes.slots[a:b].tolist() for a, b in zip(shapes.offsets[:-1], shapes.offsets[1:], strict=True)] == KNOWN
    assert deal(shapes, lengths, seed=42) == KNOWN_ROWS


KNOWN = [[5, 5], [4, 4, 2], [9, 1], [8], [3, 3]]
KNOWN_ROWS = [[8, 0], [5, 4, 3], [2, 6], [7], [1, 9]]


@pytest.mark.parametrize("lengths", [[], [3, 0], [3, 11]])
def test_no_documents_an_empty_one_and_one_that_is_too_long_are_refused(lengths: list[int]) -> None:
    with pytest.raises(DataError):
        pack(np.array(lengths, dtype=np.int64), 10)


def test_a_million_documents_are_planned_in_seconds() -> None:
    import time

    lengths = np.clip(np.random.default_rng(0).lognormal(5, 1, 1_000_000).astype(int), 5, 4096)
    began = time.process_time()
    shapes = pack(lengths, 4096)
    shapes.deal(lengths, seed=1, epoch=0, fingerprint="data")
    assert time.process_time() - began < 5
    assert shapes.fill_rate > 0.999
