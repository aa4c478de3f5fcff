"""Files of any format to JSON Lines: split, without repetitions on request, block by block."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from charkha.data.duplicates import hash_rows
from charkha.data.formats import ReadFile, ReadOptions, RowTask, open_rows, raise_for_problems
from charkha.data.indexing import IndexedFile, index_file
from charkha.data.rows import Row, row_as_record
from charkha.data.splits import SplitKeys, SplitWish, held_out, joined, repetitions
from charkha.data.workers import map_ordered, worker_count
from charkha.errors import DataError, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray


def split_rows(rows: Sequence[Row], eval_: str | int | float, seed: int) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """(training rows, held-out rows), each in the order given; see `splits.held_out`."""
    nothing = np.zeros(len(rows))
    chosen = held_out(SplitKeys(hash_rows(rows), nothing.astype(np.uint64), nothing), SplitWish(eval_, seed))
    train = tuple(row for row, out in zip(rows, chosen, strict=True) if not out)
    return train, tuple(row for row, out in zip(rows, chosen, strict=True) if out)


def count_duplicates(rows: Sequence[Row]) -> int:
    """How many rows say exactly what an earlier row said."""
    return int(repetitions(hash_rows(rows)).sum()) if rows else 0


def without_duplicates(rows: Sequence[Row]) -> tuple[Row, ...]:
    """The rows without exact repetitions; the first of each stays."""
    repeated = repetitions(hash_rows(rows))
    return tuple(row for row, again in zip(rows, repeated, strict=True) if not again)


def write_jsonl(rows: Iterable[Row], path: Path) -> None:
    """Writes one JSON object a line (`messages`, `prompt` + `completion`, ...): the whole file or nothing."""
    with _Output(path) as output:
        output.write(rows)


class _Output:
    """A JSON Lines file that appears when it is whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._beside = path.with_name(path.name + ".part")
        path.parent.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> _Output:
        self._file: IO[str] = self._beside.open("w", encoding="utf-8", newline="\n")
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self._file.close()
            self._beside.unlink(missing_ok=True)
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._beside, self._path)

    def write(self, rows: Iterable[Row]) -> None:
        """Adds rows."""
        self._file.writelines(json.dumps(row_as_record(row), ensure_ascii=False) + "\n" for row in rows)


@dataclass(frozen=True)
class Prepared:
    """What was written. `duplicates` counts exact repetitions, removed or not."""

    files: tuple[ReadFile, ...]
    train_path: Path
    train_rows: int
    eval_path: Path | None
    eval_rows: int
    duplicates: int
    duplicates_removed: bool


def prepare_files(
    paths: Sequence[Path],
    *,
    out: Path,
    options: ReadOptions | None = None,
    split: SplitWish | None = None,
    deduplicate: bool = False,
    workers: int | None = None,
) -> Prepared:
    """Reads files of any supported format and writes `out`, and `<out>.eval.jsonl` where rows are held out.

    The files are read twice, so that memory does not grow with them. Raises DataError with every problem of every file
    before anything is written, UsageError where the files hold rows of different kinds: one JSONL file mixes none.
    """
    options, split = options or ReadOptions(), split or SplitWish()
    if out.suffix.lower() != ".jsonl":
        raise UsageError(f"the output must be named *.jsonl, not {out.name}", where=str(out))
    processes = worker_count(paths, workers)
    files = [index_file(path, options, split, processes) for path in paths]
    raise_for_problems([file.read for file in files])
    _refuse_mixture(files)
    keys = joined([file.keys for file in files])
    repeated = repetitions(keys.hashes)
    used = ~repeated if deduplicate else np.ones(len(repeated), dtype=np.bool_)
    chosen = np.zeros(len(repeated), dtype=np.bool_)
    chosen[used] = held_out(SplitKeys(keys.hashes[used], keys.groups[used], keys.times[used]), split)
    eval_path = out.with_name(out.stem + ".eval.jsonl") if chosen.any() else None
    _write(files, replace(options, keep=(), warn=False), used & ~chosen, chosen, out, eval_path, processes)
    reads = tuple(file.read for file in files)
    counts = int((used & ~chosen).sum()), int(chosen.sum())
    return Prepared(reads, out, counts[0], eval_path, counts[1], int(repeated.sum()), deduplicate)


def _write(
    files: Sequence[IndexedFile],
    options: ReadOptions,
    train: NDArray[np.bool_],
    evaluated: NDArray[np.bool_],
    out: Path,
    eval_path: Path | None,
    workers: int,
) -> None:
    with ExitStack() as stack:
        outputs = [(stack.enter_context(_Output(out)), train)]
        if eval_path is not None:
            outputs.append((stack.enter_context(_Output(eval_path)), evaluated))
        first = 0
        for file in files:
            for rows in map_ordered(_rows_of, open_rows(file.read.path, options).tasks, None, workers):
                for output, flags in outputs:
                    output.write(row for row, wanted in zip(rows, flags[first:], strict=False) if wanted)
                first += len(rows)
        if first != len(train):
            raise DataError("a file changed while it was read", where=str(files[0].read.path), remedy="run it again")


def _rows_of(_: None, task: RowTask) -> tuple[Row, ...]:
    return task.run().rows


def _refuse_mixture(files: Sequence[IndexedFile]) -> None:
    kinds = {kind: file.read.path for file in files for kind in file.kinds}
    if len(kinds) > 1:
        names = ", ".join(str(path) for path in kinds.values())
        raise UsageError(
            f"the files hold rows of different kinds: {names}", remedy="prepare each kind into its own file"
        )
