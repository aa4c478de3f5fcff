"""Which rows make up each optimizer step: a pure function of seed, epoch and data, so that resuming is exact.

Rows of like length stand together, so that little is padded; the steps of an epoch are shuffled. Which rows a step
holds does not depend on the micro batch size: a smaller card takes the same steps in smaller bites.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import numpy as np

from charkha.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_STEPS_SORTED_TOGETHER = 32  # more gives less padding, but batches of ever more uniform length


def plan_epoch(
    lengths: NDArray[np.int64],
    *,
    batch_size: int,
    micro_batch_size: int,
    seed: int,
    epoch: int,
    fingerprint: str,
    shuffle: bool = True,
) -> list[list[NDArray[np.int64]]]:
    """Per optimizer step exactly ceil(batch_size / micro_batch_size) arrays of row numbers, longest rows first.

    Every row stands in exactly one step of the epoch. The last step may be short; micro batches it lacks are empty.
    The step with the longest row comes first, so that settings that need too much memory fail at once, not after hours.
    """
    if batch_size < 1 or micro_batch_size < 1:
        raise UsageError(f"batch_size {batch_size} and micro_batch_size {micro_batch_size} must be at least 1")
    lengths = np.asarray(lengths, dtype=np.int64)
    if shuffle:
        steps = _shuffled_steps(lengths, batch_size, random_bits(seed, epoch, fingerprint))
    else:
        steps = _cut(np.arange(len(lengths), dtype=np.int64), batch_size)
    return [_micro_batches(rows, lengths, batch_size, micro_batch_size) for rows in steps]


def padded_micro_batches(
    lengths: NDArray[np.int64], *, batch_size: int, micro_batch_size: int, seed: int, fingerprint: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(rows, longest row) of each micro batch of `plan_epoch`'s first epoch, in no order; without a list of each step.

    The rows of a micro batch are padded to its longest.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    order = permutation(len(lengths), random_bits(seed, 0, fingerprint))
    full = len(order) - len(order) % batch_size
    stretches = _cut(order[:full], batch_size * _STEPS_SORTED_TOGETHER)
    sorted_steps = [-np.sort(-lengths[stretch]).reshape(-1, batch_size) for stretch in stretches]
    rows, longest = [], []
    for steps in (*sorted_steps, -np.sort(-lengths[order[full:]])[None]):
        firsts = np.arange(0, steps.shape[1], micro_batch_size)
        longest.append(steps[:, firsts].ravel())
        rows.append(np.tile(np.minimum(micro_batch_size, steps.shape[1] - firsts), len(steps)))
    return np.concatenate(rows), np.concatenate(longest)


def random_bits(seed: int, epoch: int, fingerprint: str) -> np.random.PCG64:
    """PCG64 seeded by a hash: seeds and epochs next to each other give unrelated orders."""
    digest = hashlib.sha256(json.dumps([seed, epoch, fingerprint]).encode("utf-8")).digest()
    return np.random.PCG64(int.from_bytes(digest[:16], "big"))


def permutation(count: int, bits: np.random.PCG64) -> NDArray[np.int64]:
    """A random order. NumPy keeps the raw bits the same between versions, but not `Generator.permutation`."""
    return np.argsort(bits.random_raw(count), kind="stable").astype(np.int64)


def _cut(rows: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _by_length(rows: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Longest first; equal lengths keep their order, on every platform."""
    return rows[np.argsort(-lengths[rows], kind="stable")]


def _shuffled_steps(lengths: NDArray[np.int64], batch_size: int, bits: np.random.PCG64) -> list[NDArray[np.int64]]:
    """Permute, sort inside stretches of 32 steps, cut, shuffle the steps. What fills no step is the last one."""
    order = permutation(len(lengths), bits)
    full = len(order) - len(order) % batch_size
    steps: list[NDArray[np.int64]] = []
    for stretch in _cut(order[:full], batch_size * _STEPS_SORTED_TOGETHER):
        steps += _cut(_by_length(stretch, lengths), batch_size)
    steps = [steps[index] for index in permutation(len(steps), bits)]
    _longest_first(steps, lengths)
    return [*steps, order[full:]] if full < len(order) else steps


def _longest_first(steps: list[NDArray[np.int64]], lengths: NDArray[np.int64]) -> None:
    """Swaps the step that holds the longest row to the front."""
    if steps:
        longest = max(range(len(steps)), key=lambda index: int(lengths[steps[index]].max()))
        steps[0], steps[longest] = steps[longest], steps[0]


def _micro_batches(
    rows: NDArray[np.int64], lengths: NDArray[np.int64], batch_size: int, micro_batch_size: int
) -> list[NDArray[np.int64]]:
    wanted = -(-batch_size // micro_batch_size)
    micro = _cut(_by_length(rows, lengths), micro_batch_size)
    return micro + [np.empty(0, dtype=np.int64)] * (wanted - len(micro))


def batches_by_length(lengths: NDArray[np.int64], tokens_per_batch: int) -> list[NDArray[np.intp]]:
    """Row indices in batches of like length whose padded size stays within the budget (one row at least)."""
    batches: list[NDArray[np.intp]] = []
    order = np.argsort(lengths, kind="stable")
    start = 0
    for end in range(1, len(order) + 1):
        full = end < len(order) and (end - start + 1) * int(lengths[order[end]]) > tokens_per_batch
        if end == len(order) or full:
            batches.append(order[start:end])
            start = end
    return batches
