"""The micro batches of a whole run by their shapes: what a time measured or predicted for some is added up over.

Rows come in the order of data/order.py. A part of an epoch is counted step by step; of whole epochs the first one is
counted for all, since they differ in nothing but who stands beside whom.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from charkha.data.order import plan_epoch
from charkha.data.packing import pack

if TYPE_CHECKING:
    from numpy.typing import NDArray

EMPTY = (1, 2)  # what a micro batch without rows is given to the model as: one row of padding


@dataclass(frozen=True)
class Schedule:
    """`shapes`: (rows, tokens of the longest row, how many such micro batches); `tokens` are those without padding."""

    shapes: tuple[tuple[int, int, int], ...]
    steps: int  # optimizer steps
    tokens: int

    @property
    def micro_batches(self) -> int:
        """Of the whole run, empty ones included."""
        return sum(count for _rows, _longest, count in self.shapes)

    def seconds(self, of_micro_batch: Callable[[int, int], float], of_step: float) -> float:
        """The run's, from those of a micro batch of (rows, longest row) and those beside them in each step."""
        return sum(count * of_micro_batch(rows, longest) for rows, longest, count in self.shapes) + self.steps * of_step


def schedule_of(
    lengths: NDArray[np.int64],
    *,
    batch_size: int,
    micro_batch_size: int,
    total_steps: int,
    seed: int,
    fingerprint: str,
    packed_row_tokens: int | None = None,
) -> Schedule:
    """The run's micro batches; with `packed_row_tokens` rows are packed, and both sizes count packed rows."""
    filled = lengths if packed_row_tokens is None else pack(lengths, packed_row_tokens).tokens
    steps_per_epoch = -(-len(filled) // batch_size)
    epochs, rest = divmod(total_steps, steps_per_epoch)
    planned = [
        plan_epoch(
            filled,
            batch_size=batch_size,
            micro_batch_size=micro_batch_size,
            seed=seed,
            epoch=epoch,
            fingerprint=fingerprint,
        )
        for epoch in sorted({0} if not rest else {0, epochs})
    ]
    counted = _counted(planned[0], filled, epochs) + _counted(planned[-1][:rest], filled, 1)
    return Schedule(
        shapes=tuple((*shape, count) for shape, count in sorted(counted.items())),
        steps=total_steps,
        tokens=int(
            epochs * filled.sum() + sum(int(filled[rows].sum()) for step in planned[-1][:rest] for rows in step)
        ),
    )


def _counted(
    steps: Sequence[Sequence[NDArray[np.int64]]], lengths: NDArray[np.int64], times: int
) -> Counter[tuple[int, int]]:
    shapes = Counter((len(rows), int(lengths[rows].max())) if len(rows) else EMPTY for step in steps for rows in step)
    return Counter({shape: times * count for shape, count in shapes.items() if times})
