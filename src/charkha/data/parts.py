"""Rows to tokens in several processes, in parts that stay when the work is interrupted.

A part is a fixed number of blocks, whatever the number of processes. It is two small shards (training and held-out
rows) and a record of them, which is written last: a part with a record is whole and is not made again.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from charkha.data.encoded import EncodedRow
from charkha.data.formats import RowTask
from charkha.data.masking import masked_rows
from charkha.data.personal_rows import Value
from charkha.data.shards import StoredRows, TokenRows, rows_of_shard, token_rows, write_token_rows
from charkha.data.tokenize import EncodeSettings, encode_block
from charkha.data.workers import map_ordered
from charkha.errors import DataError, Problem, RunDamaged
from charkha.store.durable import write_durably

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCKS_A_PART = 16  # about 16 MiB of text


@dataclass(frozen=True, eq=False)
class EncodeTask:
    """A block and what becomes of its rows: how often each is trained, int64 [rows], and which are held out, bool.

    `mask` has the numbers of the stand-ins for personal data in those of `found`, bool; None where nothing is masked.
    """

    source: str
    rows: RowTask
    repeats: NDArray[np.int64]
    held_out: NDArray[np.bool_]
    mask: Mapping[Value, int] | None = None
    found: NDArray[np.bool_] | None = None
    kept_kinds: tuple[str, ...] = ()

    @classmethod
    def of_all(cls, source: str, rows: RowTask, count: int) -> EncodeTask:
        """The block with each of its rows trained once."""
        return cls(source, rows, np.ones(count, dtype=np.int64), np.zeros(count, dtype=np.bool_))


@dataclass(frozen=True, eq=False)
class EncodedPart:
    """Tokens of some blocks. `problems` pairs a file with what is wrong in it."""

    train: TokenRows | StoredRows
    held_out: TokenRows | StoredRows
    tally: Counter[str]
    problems: tuple[tuple[str, Problem], ...]


def encode_parts(
    tasks: Iterable[EncodeTask],
    blocks: int,
    settings: EncodeSettings,
    folder: Path,
    workers: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[EncodedPart]:
    """All blocks as parts, those of before from `folder`; call `remove_parts` when they are merged.

    Data of a single part leaves no files. `progress(blocks done, blocks)` is called as they come.
    """
    parts = -(-blocks // BLOCKS_A_PART)
    if parts <= 1:
        return [_encode_part(list(tasks), settings, 1)]
    folder.mkdir(parents=True, exist_ok=True)
    there = {number: part for number in range(parts) if (part := _read_part(folder, number)) is not None}
    wanted = _wanted(tasks, there)
    made = map_ordered(encode_task, wanted, settings, workers)
    result: list[EncodedPart] = []
    for number in range(parts):
        if number not in there:
            some = list(itertools.islice(made, min(BLOCKS_A_PART, blocks - number * BLOCKS_A_PART)))
            there[number] = _keep_part(folder, number, joined_parts(some))
        result.append(there[number])
        progress(min((number + 1) * BLOCKS_A_PART, blocks), blocks)
    return result


def remove_parts(folder: Path) -> None:
    """Removes the files of the parts."""
    shutil.rmtree(folder, ignore_errors=True)


def _wanted(tasks: Iterable[EncodeTask], there: dict[int, EncodedPart]) -> Iterator[EncodeTask]:
    """The blocks of parts that are not there. `there` grows meanwhile, by parts that were asked for already."""
    known = frozenset(there)
    for index, task in enumerate(tasks):
        if index // BLOCKS_A_PART not in known:
            yield task


def _encode_part(tasks: Sequence[EncodeTask], settings: EncodeSettings, workers: int) -> EncodedPart:
    return joined_parts(list(map_ordered(encode_task, tasks, settings, workers)))


def encode_task(settings: EncodeSettings, task: EncodeTask) -> EncodedPart:
    """The tokens of one block; runs in any process."""
    rows = task.rows.run().rows
    if len(rows) != len(task.repeats):
        raise DataError("the file changed while it was read", where=task.source, remedy="run the same command again")
    used = [index for index in range(len(rows)) if task.repeats[index] or task.held_out[index]]
    if task.mask is not None and task.found is not None:
        rows = masked_rows(rows, task.found, task.mask, task.kept_kinds)
    encoded = encode_block([rows[index] for index in used], settings)
    train: list[EncodedRow] = []
    held_out: list[EncodedRow] = []
    for index, pieces in zip(used, encoded.rows, strict=True):
        if task.held_out[index]:
            held_out.extend(pieces)
        else:
            train.extend(pieces * int(task.repeats[index]))
    problems = tuple((task.source, problem) for problem in encoded.problems)
    return EncodedPart(token_rows(train), token_rows(held_out), encoded.tally, problems)


def joined_parts(parts: Sequence[EncodedPart]) -> EncodedPart:
    """The parts one after the other as one."""
    tally: Counter[str] = Counter()
    for part in parts:
        tally.update(part.tally)
    problems = tuple(problem for part in parts for problem in part.problems)
    return EncodedPart(
        _joined([part.train for part in parts]), _joined([part.held_out for part in parts]), tally, problems
    )


def _joined(rows: Sequence[TokenRows | StoredRows]) -> TokenRows:
    if not rows:
        return token_rows(())
    return TokenRows(
        np.concatenate([part.ids for part in rows]),
        np.concatenate([part.trained for part in rows]),
        np.concatenate([part.lengths for part in rows]),
        np.concatenate([part.lines for part in rows]),
    )


def _keep_part(folder: Path, number: int, part: EncodedPart) -> EncodedPart:
    """Writes the part, the record last, and opens it again from the disk, so that it leaves the memory."""
    names = {
        side: write_token_rows(folder, f"part-{number:06d}-{side}", [rows]).name if rows.rows else None
        for side, rows in (("train", part.train), ("held_out", part.held_out))
    }
    problems = [[source, asdict(problem)] for source, problem in part.problems]
    record = {**names, "tally": dict(part.tally), "problems": problems}
    write_durably(_record_path(folder, number), json.dumps(record, ensure_ascii=False).encode("utf-8"))
    kept = _read_part(folder, number)
    assert kept is not None
    return kept


def _record_path(folder: Path, number: int) -> Path:
    return folder / f"part-{number:06d}.json"


def _read_part(folder: Path, number: int) -> EncodedPart | None:
    """A part of before, None where it is not whole or its files do not match their hashes."""
    path = _record_path(folder, number)
    try:
        record = json.loads(path.read_bytes())
        sides = [
            rows_of_shard(folder / record[side]) if record[side] else token_rows(()) for side in ("train", "held_out")
        ]
    except (FileNotFoundError, ValueError, KeyError, RunDamaged):
        return None
    problems = tuple((source, Problem(**problem)) for source, problem in record["problems"])
    return EncodedPart(sides[0], sides[1], Counter(record["tally"]), problems)
