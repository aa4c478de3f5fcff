"""What a plan must know of prepared rows, added up from their lengths and masks."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from charkha.backends.base import Packing
from charkha.data.shards import Shard
from charkha.plan.rows import Rows

_LARGEST_MICRO_BATCH = 1024  # that a plan looks at


def rows_of(shard: Shard, packing: Packing | None, batch_size: int, micro_batch_size: int | None) -> Rows:
    """Facts of the rows as they will be trained; `micro_batch_size` is what the config fixes, None for auto."""
    if packing is not None:
        tokens = int(shard.lengths.sum())
        return Rows(packing.row_tokens, tokens / packing.rows, packing.rows, known=True, packed=True)
    most = min(batch_size, _LARGEST_MICRO_BATCH)
    sizes = {size for size in range(1, most + 1) if batch_size % size == 0} | {micro_batch_size or 1}
    return Rows(
        longest=int(shard.lengths.max()),
        mean=float(shard.lengths.mean()),
        count=len(shard.lengths),
        trained_positions=trained_positions(shard, sizes),
        known=True,
    )


def trained_positions(shard: Shard, sizes: Iterable[int]) -> dict[int, int]:
    """Positions of the longest micro batch of each size whose logits the loss takes.

    These are the columns where some row is trained, in all rows. (The chunked head takes the trained tokens alone,
    which are at most as many.)
    """
    order = np.argsort(shard.lengths, kind="stable")[::-1]
    columns = np.zeros(int(shard.lengths.max()), dtype=bool)
    found, rows = {}, 0
    for size in sorted(sizes):
        for row in order[rows:size]:
            trained = shard.trained(int(row))
            columns[: len(trained)] |= trained
        rows = min(size, len(order))
        columns[0] = False  # nothing predicts the first token
        found[size] = int(columns.sum()) * rows
    return found
