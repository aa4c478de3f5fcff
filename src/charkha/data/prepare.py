"""Files of any format to JSON Lines: split, without repetitions on request, block by block."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from charkha.data.formats import ReadFile, ReadOptions, RowTask, open_rows, raise_for_problems
from charkha.data.indexing import IndexedFile, index_file
from charkha.data.masking import Action, TreatedFile, Treatment, masked_rows, treatment_report
from charkha.data.personal_rows import Value, numbered
from charkha.data.rows import Row, row_as_record
from charkha.data.splits import SplitWish, held_out, joined, repetitions
from charkha.data.workers import map_ordered, worker_count
from charkha.errors import DataError, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray


@contextmanager
def _told_as_usage(path: Path) -> Iterator[None]:
    """A place that takes no file, in one line."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"cannot be written: {error.strerror}", where=str(path), remedy="name another file") from error


class _Output:
    """A JSON Lines file that appears when it is whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._beside = path.with_name(path.name + ".part")

    def __enter__(self) -> _Output:
        with _told_as_usage(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
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
        with _told_as_usage(self._path):
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
    personal: dict[str, object]  # what was found and done, without values


def prepare_files(
    paths: Sequence[Path],
    *,
    out: Path,
    options: ReadOptions | None = None,
    split: SplitWish | None = None,
    deduplicate: bool = False,
    workers: int | None = None,
    personal: Action = "report",
    personal_report: Path | None = None,
) -> Prepared:
    """Reads files of any supported format and writes `out`, and `<out>.eval.jsonl` where rows are held out.

    `personal` says what is done about personal data: `mask` writes stand-ins, `drop` leaves rows out;
    `personal_report` is a Markdown file that tells what was found and done. The files are read twice, so that memory
    does not grow with them. Raises DataError with every problem of every file before anything is written, UsageError
    where the files hold rows of different kinds: one JSONL file mixes none.
    """
    options, split = options or ReadOptions(), split or SplitWish()
    if out.suffix.lower() != ".jsonl":
        raise UsageError(f"the output must be named *.jsonl, not {out.name}", where=str(out))
    if out.is_dir():
        raise UsageError("is a folder", where=str(out), remedy="name a file")
    processes = worker_count(paths, workers)
    masked = personal == "mask"
    files = [index_file(path, options, split, processes, kept_kinds=(), masked=masked) for path in paths]
    raise_for_problems([file.read for file in files])
    _refuse_mixture(files)
    keys = joined([file.keys for file in files])
    repeated = repetitions(keys.hashes)
    found = [TreatedFile(str(file.read.path), file.finds) for file in files]
    treatment = Treatment(personal, (), tuple(found))
    used = ~repeated if deduplicate else np.ones(len(repeated), dtype=np.bool_)
    if personal == "drop":
        used &= ~np.concatenate([file.finds.found for file in files])
    chosen = np.zeros(len(repeated), dtype=np.bool_)
    chosen[used] = held_out(keys.of(used), split)
    eval_path = out.with_name(out.stem + ".eval.jsonl") if chosen.any() else None
    plain = replace(options, keep=(), warn=False)
    _write(files, plain, used & ~chosen, chosen, out, eval_path, processes, masking=personal == "mask")
    reads = tuple(file.read for file in files)
    if personal_report is not None:
        _write_report(personal_report, treatment_report(treatment, reads))
    counts = int((used & ~chosen).sum()), int(chosen.sum())
    return Prepared(reads, out, counts[0], eval_path, counts[1], int(repeated.sum()), deduplicate, treatment.record())


def _write_report(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UsageError(f"the report cannot be written: {error.strerror}", where=str(path)) from error


def _write(
    files: Sequence[IndexedFile],
    options: ReadOptions,
    train: NDArray[np.bool_],
    evaluated: NDArray[np.bool_],
    out: Path,
    eval_path: Path | None,
    workers: int,
    *,
    masking: bool,
) -> None:
    masks = numbered([values for file in files for values in file.block_values])
    with ExitStack() as stack:
        outputs = [(stack.enter_context(_Output(out)), train)]
        if eval_path is not None:
            outputs.append((stack.enter_context(_Output(eval_path)), evaluated))
        first = 0
        for file in files:
            tasks = _masked_tasks(file, options, masks if masking else None)
            for rows in map_ordered(_rows_of, tasks, None, workers):
                for output, flags in outputs:
                    output.write(row for row, wanted in zip(rows, flags[first:], strict=False) if wanted)
                first += len(rows)
        if first != len(train):
            raise _changed(files[0].read.path)


_MaskedTask = tuple[RowTask, "NDArray[np.bool_]", Mapping[Value, int]]


def _masked_tasks(
    file: IndexedFile, options: ReadOptions, masks: Iterator[dict[Value, int]] | None
) -> Iterator[_MaskedTask]:
    """Every block with which of its rows hold finds, and the numbers of their stand-ins; none without `masks`."""
    first = 0
    counts = iter(file.block_rows)
    for task in open_rows(file.read.path, options).tasks:
        count = next(counts, 0)  # of a block that was not there before: told where its rows are counted
        yield task, file.finds.found[first : first + count], next(masks) if masks is not None else {}
        first += count


def _rows_of(_: None, task: _MaskedTask) -> tuple[Row, ...]:
    block, found, mask = task
    rows = block.run().rows
    if len(rows) != len(found):
        raise _changed(block.path)
    return masked_rows(rows, found, mask) if mask else rows


def _changed(path: Path) -> DataError:
    return DataError("the file changed while it was read", where=str(path), remedy="run the same command again")


def _refuse_mixture(files: Sequence[IndexedFile]) -> None:
    kinds = {kind: file.read.path for file in files for kind in file.kinds}
    if len(kinds) > 1:
        names = ", ".join(str(path) for path in kinds.values())
        raise UsageError(
            f"the files hold rows of different kinds: {names}", remedy="prepare each kind into its own file"
        )
