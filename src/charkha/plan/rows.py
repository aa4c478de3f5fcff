"""What a plan knows of the training rows: finished ones, or only how many there are, or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from charkha.plan.memory_settings import HeldOutBatch


@dataclass(frozen=True)
class MicroBatches:
    """Some micro batches of an epoch that are about equally long once padded."""

    count: int
    positions: float  # of one on average, padding counted
    tokens: float  # that attention looks over: of a row, padding counted; of a document where rows are packed


@dataclass(frozen=True)
class Rows:
    """Lengths in tokens; rows that are packed are counted as packed rows."""

    longest: int
    mean: float
    count: int | None
    trained_positions: Mapping[int, int] = field(default_factory=dict)  # of the longest micro batch, by its rows
    known: bool = False  # whether lengths were counted, not taken as max_length
    packed: bool = False
    shapes: Mapping[int, tuple[MicroBatches, ...]] = field(default_factory=dict)  # of an epoch, by the micro batch size
    held_out: tuple[HeldOutBatch, ...] = ()  # the largest batches of the held-out loss

    def micro_batches(self, size: int, batch_size: int) -> tuple[MicroBatches, ...]:
        """Those of an epoch of micro batches of `size` rows; of full-length rows where lengths are not known.

        One step's where nobody knows how many rows there are.
        """
        if size in self.shapes:
            return self.shapes[size]
        rows = batch_size if self.count is None else self.count
        full, rest = divmod(rows, size)
        whole = MicroBatches(full, size * self.longest, self.longest)
        return (whole, MicroBatches(1, rest * self.longest, self.longest)) if rest else (whole,)

    def steps(self, batch_size: int) -> int:
        """Optimizer steps of an epoch; 1 where nobody knows how many rows there are."""
        return 1 if self.count is None else max(1, -(-self.count // batch_size))

    @property
    def tokens(self) -> float | None:
        """Of an epoch, without padding; None where nobody knows how many rows there are."""
        return None if self.count is None else self.mean * self.count
