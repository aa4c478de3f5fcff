"""Which rows are held out: by share or count, by groups that must not be torn apart, or by time.

A split is a pure function of what the rows say, the wish and the seed: neither their order nor the number of processes
matters. Rows that say the same always stand on one side. 40 bytes a row are held in memory.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

import numpy as np

from charkha.data.duplicates import hash_rows
from charkha.data.eval_share import held_out_count
from charkha.data.formats import RowBlock
from charkha.data.minhash import mixed
from charkha.errors import DataError, Problem

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class SplitWish:
    """`eval_` is a share (`"5%"`, 0.05) or a count (200, "200"); None or 0 hold nothing out.

    `group_by` and `time_by` are columns; with `time_by` the latest rows are held out.
    """

    eval_: str | int | float | None = 0
    seed: int = 42
    group_by: str | None = None
    time_by: str | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns whose values a split needs."""
        return tuple(name for name in (self.group_by, self.time_by) if name is not None)


@dataclass(frozen=True, eq=False)
class SplitKeys:
    """What decides on which side rows stand: hashes uint64 [rows, 2], groups uint64 [rows], times float64 [rows].

    Groups are hashes of the group's name, 0 for a row that names none; times count seconds.
    """

    hashes: NDArray[np.uint64]
    groups: NDArray[np.uint64]
    times: NDArray[np.float64]

    def of(self, rows: NDArray[np.bool_]) -> SplitKeys:
        """The keys of the rows that are marked, bool [rows]."""
        return SplitKeys(self.hashes[rows], self.groups[rows], self.times[rows])


def split_keys(block: RowBlock, wish: SplitWish) -> tuple[SplitKeys, tuple[Problem, ...]]:
    """The keys of a block whose columns were kept, and a problem for every row without a readable time."""
    count = len(block.rows)
    groups = np.zeros(count, dtype=np.uint64)
    times = np.zeros(count, dtype=np.float64)
    problems: list[Problem] = []
    names = wish.columns
    for index, values in enumerate(block.kept if names else ()):
        by_name = dict(zip(names, values, strict=True))
        group = by_name.get(wish.group_by or "")
        groups[index] = 0 if group is None else _group_hash(group)
        if wish.time_by is not None:
            time = _time_s(by_name[wish.time_by])
            times[index] = np.nan if time is None else time
            if time is None:
                reason = "no time: the value is neither ISO 8601 nor a number of seconds"  # it may be personal
                problems.append(Problem(reason, block.rows[index].line, wish.time_by))
    return SplitKeys(hash_rows(block.rows), groups, times), tuple(problems)


def _group_hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=8).digest(), "little") or 1


def _time_s(text: str | None) -> float | None:
    """Seconds since 1970 of an ISO 8601 time (UTC unless it says otherwise) or a Unix time in s, ms, us or ns."""
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        try:
            moment = datetime.fromisoformat(text.strip())
        except ValueError:
            return None
        return (moment - (_EPOCH if moment.tzinfo is None else _EPOCH_UTC)).total_seconds()
    if not math.isfinite(value):
        return None
    while abs(value) > 1e11:
        value /= 1000
    return value


_EPOCH = datetime(1970, 1, 1)
_EPOCH_UTC = datetime.fromisoformat("1970-01-01T00:00:00+00:00")


def joined(parts: Sequence[SplitKeys]) -> SplitKeys:
    """The keys of all blocks, in their order."""
    if not parts:
        return SplitKeys(np.empty((0, 2), np.uint64), np.empty(0, np.uint64), np.empty(0, np.float64))
    return SplitKeys(
        np.concatenate([part.hashes for part in parts]),
        np.concatenate([part.groups for part in parts]),
        np.concatenate([part.times for part in parts]),
    )


def held_out(keys: SplitKeys, wish: SplitWish) -> NDArray[np.bool_]:
    """Which rows are held out, bool [rows].

    Raises UsageError for a share that is none, DataError where one side would be empty.
    """
    rows = len(keys.hashes)
    wanted = 0 if wish.eval_ is None else held_out_count(wish.eval_, rows)
    if wanted == 0:
        return np.zeros(rows, dtype=np.bool_)
    _, contents = np.unique(keys.hashes, axis=0, return_inverse=True)
    contents = contents.reshape(-1)
    if wish.time_by is not None:
        chosen = _latest(keys.times, contents, wanted)
    else:
        sets = contents if wish.group_by is None else _whole_groups(contents, keys.groups)
        chosen = _chosen_sets(keys.hashes, sets, wanted, wish.seed)
    if chosen.all() or not chosen.any():
        different = len(np.unique(contents))
        raise DataError(
            f"{rows} rows ({different} different) cannot be split into training and {wish.eval_} held-out rows",
            remedy="give more rows, a smaller data.eval, or a file of its own",
        )
    return chosen


def _chosen_sets(hashes: NDArray[np.uint64], sets: NDArray[np.int64], wanted: int, seed: int) -> NDArray[np.bool_]:
    """Whole sets whose rows add up to `wanted` or just below, in an order that only seed and content decide."""
    bits = np.uint64(int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:8], "big"))
    keys = mixed(hashes[:, 0] ^ bits)
    count = int(sets.max()) + 1
    lowest = np.full(count, np.iinfo(np.uint64).max, dtype=np.uint64)
    np.minimum.at(lowest, sets, keys)  # a set's place is that of its lowest row, so the order of rows is nothing
    sizes = np.bincount(sets, minlength=count)
    taken = np.zeros(count, dtype=np.bool_)
    left = wanted
    for number in np.argsort(lowest, kind="stable"):
        if left == 0:
            break
        if 0 < sizes[number] <= left:
            taken[number] = True
            left -= int(sizes[number])
    return taken[sets]


def _whole_groups(contents: NDArray[np.int64], groups: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Sets of rows that share a group or a content, also through other rows, as numbers from 0."""
    named = groups != 0
    _, numbers = np.unique(groups, return_inverse=True)
    numbers = numbers.reshape(-1)
    labels = np.arange(len(contents), dtype=np.int64)
    while True:
        before = labels
        labels = _lowest_of(contents, labels)
        within = _lowest_of(numbers, labels)
        labels = np.where(named, within, labels)
        if (labels == before).all():
            break
    return np.unique(labels, return_inverse=True)[1].reshape(-1)


def _lowest_of(sets: NDArray[np.int64], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    lowest = np.full(int(sets.max()) + 1, len(labels), dtype=np.int64)
    np.minimum.at(lowest, sets, labels)
    return lowest[sets]


def _latest(times: NDArray[np.float64], contents: NDArray[np.int64], wanted: int) -> NDArray[np.bool_]:
    """Rows later than a moment, at most `wanted` of them; what was said before that moment stays in training."""
    ordered = np.sort(times)
    cut = ordered[max(len(ordered) - wanted - 1, 0)]
    chosen = times > cut
    early = np.zeros(int(contents.max()) + 1, dtype=np.bool_)
    early[contents[~chosen]] = True
    return np.asarray(chosen & ~early[contents], dtype=np.bool_)


def repeats(hashes: NDArray[np.uint64], weight: float, seed: int) -> NDArray[np.int64]:
    """How often each row stands in an epoch under a source's weight, int64 [rows].

    2 is twice, 0.5 is half of the rows, 1.5 is every row once and half of them twice; which half is decided by seed
    and content.
    """
    whole = int(weight)
    bits = np.uint64(int.from_bytes(hashlib.sha256(f"weight {seed}".encode()).digest()[:8], "big"))
    share = mixed(hashes[:, 1] ^ bits).astype(np.float64) / float(1 << 64)
    return whole + (share < weight - whole).astype(np.int64)


def repetitions(hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which rows say exactly what an earlier one said, bool [rows]."""
    _, first = np.unique(hashes, axis=0, return_index=True)
    result = np.ones(len(hashes), dtype=np.bool_)
    result[first] = False
    return result
