"""A file gone through once for what a split needs to know, without keeping its rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from charkha.data.formats import FileTally, ReadFile, ReadOptions, RowBlock, RowTask, open_rows
from charkha.data.masking import masked_rows
from charkha.data.personal_rows import RowFinds, Value, find_in_rows, joined_finds, numbers_of
from charkha.data.splits import SplitKeys, SplitWish, joined, split_keys
from charkha.data.workers import map_ordered
from charkha.errors import DataError


@dataclass(frozen=True, eq=False)
class IndexedFile:
    """`kinds` are the names of the row types in the file; `block_rows` counts the rows of each block.

    `finds` is the personal data in its rows, `block_values` the values of each block; empty where none was looked for.
    """

    read: ReadFile
    keys: SplitKeys
    kinds: frozenset[str]
    block_rows: tuple[int, ...]
    finds: RowFinds
    block_values: tuple[tuple[Value, ...], ...]


@dataclass(frozen=True)
class IndexWish:
    """What the rows are looked through for: a split, and personal data of all kinds but those left alone.

    `kept_kinds` None looks for no personal data.
    """

    split: SplitWish
    kept_kinds: tuple[str, ...] | None = None
    masked: bool = False  # rows that are the same once masked are then the same


def index_file(
    path: Path,
    options: ReadOptions,
    wish: SplitWish,
    workers: int,
    progress: Callable[[Path, int], None] = lambda path, rows: None,
    kept_kinds: tuple[str, ...] | None = None,
    masked: bool = False,
) -> IndexedFile:
    """What a split needs to know of a file. Problems are in the result.

    Raises DataError where the file as a whole cannot be used, or lacks the column to split by.
    """
    opened = open_rows(path, replace(options, keep=wish.columns))
    tally = FileTally(opened)
    parts: list[SplitKeys] = []
    kinds: set[str] = set()
    finds: list[RowFinds] = []
    asked = IndexWish(wish, kept_kinds, masked)
    for block, keys, of_block, found in map_ordered(_index_block, opened.tasks, asked, workers):
        tally.add(block, rows=len(keys.hashes))
        parts.append(keys)
        kinds |= of_block
        finds.append(found)
        progress(path, tally.rows)
    read = tally.finish()
    missing = [name for name in wish.columns if name not in read.columns]
    if missing and read.row_count:
        raise DataError(
            f"there is no column {missing[0]!r} to split by; the file has: {', '.join(read.columns)}",
            where=str(path),
            remedy="correct data.group_by or data.time_by",
        )
    rows = tuple(len(part.hashes) for part in parts)
    values = tuple(found.values for found in finds)
    return IndexedFile(read, joined(parts), frozenset(kinds), rows, joined_finds(finds), values)


def _index_block(wish: IndexWish, task: RowTask) -> tuple[RowBlock, SplitKeys, set[str], RowFinds]:
    """Runs in any process."""
    block = task.run()
    kinds = {type(row).__name__ for row in block.rows}
    kept = wish.kept_kinds or ()
    finds = find_in_rows(str(task.path), () if wish.kept_kinds is None else block.rows, kept)
    if wish.masked and finds.values:
        block = replace(block, rows=masked_rows(block.rows, finds.found, numbers_of(finds.values), kept))
    keys, problems = split_keys(block, wish.split)
    return replace(block, rows=(), kept=(), problems=block.problems + problems), keys, kinds, finds
