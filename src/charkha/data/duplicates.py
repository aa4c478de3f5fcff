"""Rows that say the same, exactly or nearly, and held-out rows that stand in the training data.

Exact is decided by a 128-bit hash. Near is a Jaccard similarity of at least 0.8 as MinHash estimates it: candidates
share one of 21 bands of six bins (a pair of similarity 0.8 is found with probability 1 - (1 - 0.8^6)^21 = 0.998, one
of 0.9 practically always) and are then compared over all 128 bins.

Signatures and bands are spilled to files; in memory stand one part of one band at a time and two bytes a row.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from charkha.data.formats import ReadOptions, RowTask, open_rows
from charkha.data.minhash import BINS, signatures
from charkha.data.rows import ChatRow, Row, content_hash, texts_of
from charkha.data.workers import map_ordered, worker_count

if TYPE_CHECKING:
    from numpy.typing import NDArray

THRESHOLD = 0.8
_BANDS = 21
_BINS_A_BAND = 6
_ROWS_AT_ONCE = 1 << 22  # of one part of a band: 32 MiB of hashes, and as much for their order
_PAIRS_AT_ONCE = 1 << 15
_KEPT_PAIRS = 1000
_BATCH_ROWS = 2048


@dataclass(frozen=True)
class Pair:
    """Row number `row` says what row `earlier` says; numbers from 0. `similarity` is 1.0 for exact repetitions."""

    row: int
    earlier: int
    similarity: float


@dataclass(frozen=True)
class DuplicateReport:
    """`exact` rows repeat an earlier one, `near` others are nearly like an earlier one; `pairs` are the first 1000."""

    rows: int
    exact: int
    near: int
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class LeakageReport:
    """Held-out rows that are in the training data, exactly or nearly. In `pairs` `earlier` counts training rows."""

    rows: int
    exact: int
    near: int
    pairs: tuple[Pair, ...]


@dataclass(frozen=True, eq=False)
class RowMarks:
    """What is compared of some rows: hashes uint64 [rows, 2] and signatures uint32 [rows, 128]."""

    hashes: NDArray[np.uint64]
    signatures: NDArray[np.uint32]


def mark_rows(rows: Sequence[Row]) -> RowMarks:
    """The marks of rows; can be made in another process than the one that compares."""
    return RowMarks(hash_rows(rows), signatures([compared_text(row) for row in rows]))


def hash_rows(rows: Sequence[Row]) -> NDArray[np.uint64]:
    """128 bits of each row's content hash, uint64 [rows, 2]."""
    data = b"".join(bytes.fromhex(content_hash(row)[:32]) for row in rows)
    return np.frombuffer(data, dtype="<u8").reshape(-1, 2)


def compared_text(row: Row) -> str:
    """All words of a row, in order."""
    texts = [text for _, text in texts_of(row)]
    if isinstance(row, ChatRow):
        texts += [call.arguments for turn in row.turns for call in turn.calls]
    return "\n".join(texts)


class DuplicateIndex:
    """Marks of rows on disk, in the order they come. A context manager: leaving it removes the files."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="charkha-duplicates-", dir=folder)
        root = Path(self._folder.name)
        self.rows = 0
        self._files = [(root / name).open("wb") for name in ("hashes", "signatures", *map(str, range(_BANDS)))]

    def __enter__(self) -> DuplicateIndex:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()
        self._folder.cleanup()

    def add(self, marks: RowMarks) -> None:
        """Takes in more rows."""
        hashes, signed, *bands = self._files
        hashes.write(marks.hashes.astype("<u8").tobytes())
        signed.write(marks.signatures.astype("<u2").tobytes())  # 16 of 31 bits: 1 in 65,536 unequal bins look equal
        for number, file in enumerate(bands):
            part = marks.signatures[:, number * _BINS_A_BAND : (number + 1) * _BINS_A_BAND]
            file.write(_band_hash(part).tobytes())
        self.rows += len(marks.hashes)

    def duplicates(self) -> DuplicateReport:
        """What is in it twice."""
        exact, pairs = self._exact_repetitions()
        near = np.zeros(self.rows, dtype=np.bool_)
        for row, earlier, similarity in self._similar(self._band_pairs()):
            news = ~(near[row] | exact[row])
            _keep(pairs, row[news], earlier[news], similarity[news])
            near[row] = True
        count = int((near & ~exact).sum())
        return DuplicateReport(self.rows, int(exact.sum()), count, tuple(pairs))

    def leakage(self, training_rows: int) -> LeakageReport:
        """Which of the rows from number `training_rows` on are like one before it."""
        pairs: list[Pair] = []
        exact = np.zeros(self.rows, dtype=np.bool_)
        for group in self._groups(self._open("hashes", np.dtype("<u8"), 2)):
            first = _first_training(group, training_rows)
            leaked = (first >= 0) & (group.rows >= training_rows)
            _keep(pairs, group.rows[leaked] - training_rows, first[leaked], np.ones(int(leaked.sum())))
            exact[group.rows[leaked]] = True
        near = np.zeros(self.rows, dtype=np.bool_)
        for row, earlier, similarity in self._similar(self._leak_pairs(training_rows)):
            news = ~(near[row] | exact[row])
            _keep(pairs, row[news] - training_rows, earlier[news], similarity[news])
            near[row] = True
        count = int((near & ~exact).sum())
        return LeakageReport(self.rows - training_rows, int(exact.sum()), count, tuple(pairs))

    def _exact_repetitions(self) -> tuple[NDArray[np.bool_], list[Pair]]:
        exact = np.zeros(self.rows, dtype=np.bool_)
        pairs: list[Pair] = []
        for group in self._groups(self._open("hashes", np.dtype("<u8"), 2)):
            repeats = ~group.starts
            _keep(pairs, group.rows[repeats], group.first[repeats], np.ones(int(repeats.sum())))
            exact[group.rows[repeats]] = True
        return exact, pairs

    def _band_pairs(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """(row, earlier row) of every candidate: the first row of its band's bucket, and the one just before it."""
        for number in range(_BANDS):
            for group in self._groups(self._open(str(number), np.dtype("<u8"), 1)):
                later = np.flatnonzero(~group.starts)
                yield group.rows[later], group.first[later]
                distant = later[group.rows[later - 1] != group.first[later]]
                yield group.rows[distant], group.rows[distant - 1]

    def _leak_pairs(self, training_rows: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """(held-out row, training row) of every candidate: the first and the last training row of its bucket."""
        for number in range(_BANDS):
            for group in self._groups(self._open(str(number), np.dtype("<u8"), 1)):
                held_out = group.rows >= training_rows
                for training in (_first_training(group, training_rows), _last_training(group, training_rows)):
                    found = held_out & (training >= 0)
                    yield group.rows[found], training[found]

    def _similar(
        self, candidates: Iterable[tuple[NDArray[np.int64], NDArray[np.int64]]]
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]]:
        """The candidates that are alike, with how much."""
        signed = self._open("signatures", np.dtype("<u2"), BINS)
        for rows, earlier in candidates:
            for start in range(0, len(rows), _PAIRS_AT_ONCE):
                one, other = rows[start : start + _PAIRS_AT_ONCE], earlier[start : start + _PAIRS_AT_ONCE]
                similarity = (signed[one] == signed[other]).mean(axis=1)
                alike = similarity >= THRESHOLD
                yield one[alike], other[alike], similarity[alike]

    def _open(self, name: str, dtype: np.dtype[np.generic], width: int) -> NDArray[Any]:
        for file in self._files:
            file.flush()
        if self.rows == 0:
            return np.empty((0, width), dtype=dtype)
        return np.memmap(Path(self._folder.name) / name, dtype=dtype, mode="r").reshape(-1, width)

    def _groups(self, keys: NDArray[Any]) -> Iterator[_Groups]:
        """Rows in the order of their keys, part by part; equal keys stand in one part, in the order of the rows."""
        parts = max(1, -(-len(keys) // _ROWS_AT_ONCE))
        for part in range(parts):
            rows = _rows_of_part(keys, part, parts)
            chosen = keys[rows]
            order = np.lexsort(tuple(chosen.T)) if chosen.shape[1] > 1 else np.argsort(chosen[:, 0], kind="stable")
            rows, chosen = rows[order], chosen[order]
            if len(rows):
                starts = np.ones(len(rows), dtype=np.bool_)
                starts[1:] = (chosen[1:] != chosen[:-1]).any(axis=1)
                yield _Groups(rows, starts)


@dataclass(frozen=True, eq=False)
class _Groups:
    """Row numbers sorted by key; `starts[i]`: a new key begins at i."""

    rows: NDArray[np.int64]
    starts: NDArray[np.bool_]

    @property
    def first(self) -> NDArray[np.int64]:
        """For each place the first row of its group."""
        return self.rows[np.maximum.accumulate(np.where(self.starts, np.arange(len(self.rows)), 0))]


def _first_training(group: _Groups, training_rows: int) -> NDArray[np.int64]:
    """For each place the first training row of its group, -1 where it has none. Groups are in the order of rows."""
    first = group.first
    return np.where(first < training_rows, first, -1)


def _last_training(group: _Groups, training_rows: int) -> NDArray[np.int64]:
    """For each place the last training row before it in its group, -1 where there is none."""
    places = np.arange(len(group.rows))
    start = np.maximum.accumulate(np.where(group.starts, places, 0))
    last = np.maximum.accumulate(np.where(group.rows < training_rows, places, -1))
    return np.where(last >= start, group.rows[np.maximum(last, 0)], -1)


def _rows_of_part(keys: NDArray[Any], part: int, parts: int) -> NDArray[np.int64]:
    if parts == 1:
        return np.arange(len(keys), dtype=np.int64)
    found = [
        start + np.flatnonzero(keys[start : start + _ROWS_AT_ONCE, 0] % np.uint64(parts) == part)
        for start in range(0, len(keys), _ROWS_AT_ONCE)
    ]
    return np.concatenate(found)


def _band_hash(part: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """One number for the bins of a band, uint64 [rows]."""
    result = np.zeros(len(part), dtype=np.uint64)
    for column in part.T.astype(np.uint64):
        result = (result ^ column) * np.uint64(0x100000001B3F4A7D)
        result ^= result >> np.uint64(29)
    return result


def _keep(
    pairs: list[Pair], rows: NDArray[np.int64], earlier: NDArray[np.int64], similarity: NDArray[np.float64]
) -> None:
    room = _KEPT_PAIRS - len(pairs)
    for row, before, alike in zip(rows[:room], earlier[:room], similarity[:room], strict=True):
        pairs.append(Pair(int(row), int(before), round(float(alike), 2)))


def find_duplicates(rows: Iterable[Row]) -> DuplicateReport:
    """Exact and near repetitions among rows, which may be a stream."""
    with DuplicateIndex() as index:
        for batch in _batches(rows):
            index.add(mark_rows(batch))
        return index.duplicates()


def find_leakage(train: Iterable[Row], held_out: Iterable[Row]) -> LeakageReport:
    """Held-out rows that stand in the training data, exactly or nearly; both may be streams."""
    with DuplicateIndex() as index:
        for batch in _batches(train):
            index.add(mark_rows(batch))
        training_rows = index.rows
        for batch in _batches(held_out):
            index.add(mark_rows(batch))
        return index.leakage(training_rows)


def duplicates_in_files(
    paths: Sequence[Path],
    options: ReadOptions | None = None,
    *,
    workers: int | None = None,
    folder: Path | None = None,
    progress: Callable[[Path, int], None] = lambda path, rows: None,
) -> DuplicateReport:
    """Exact and near repetitions among the rows of files, in several processes; spills into `folder`.

    Rows are numbered through all files. Raises DataError for a file that cannot be used; bad rows are passed over.
    """
    with DuplicateIndex(folder) as index:
        _add_files(index, paths, options, worker_count(paths, workers), progress)
        return index.duplicates()


def leakage_in_files(
    train: Sequence[Path],
    held_out: Sequence[Path],
    options: ReadOptions | None = None,
    *,
    workers: int | None = None,
    folder: Path | None = None,
    progress: Callable[[Path, int], None] = lambda path, rows: None,
) -> LeakageReport:
    """As `find_leakage`, over files and in several processes."""
    processes = worker_count([*train, *held_out], workers)
    with DuplicateIndex(folder) as index:
        _add_files(index, train, options, processes, progress)
        training_rows = index.rows
        _add_files(index, held_out, options, processes, progress)
        return index.leakage(training_rows)


def _add_files(
    index: DuplicateIndex,
    paths: Sequence[Path],
    options: ReadOptions | None,
    workers: int,
    progress: Callable[[Path, int], None],
) -> None:
    for path in paths:
        rows = 0
        for marks in map_ordered(
            _mark_block, open_rows(path, replace(options or ReadOptions(), warn=False)).tasks, None, workers
        ):
            index.add(marks)
            rows += len(marks.hashes)
            progress(path, rows)


def _mark_block(_: None, task: RowTask) -> RowMarks:
    """Runs in any process."""
    return mark_rows(task.run().rows)


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == _BATCH_ROWS:
            yield batch
            batch = []
    if batch:
        yield batch
