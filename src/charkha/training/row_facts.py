"""What a plan must know of prepared rows, added up from their lengths and masks."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from charkha.backends.base import Packing
from charkha.config import Config
from charkha.data.order import batches_by_length, padded_micro_batches
from charkha.data.shards import Shard
from charkha.plan.held_out_memory import HELD_OUT_TOKENS, largest_batches
from charkha.plan.memory_settings import HeldOutBatch
from charkha.plan.packing_support import BY_MASK
from charkha.plan.rows import MicroBatches, Rows
from charkha.training.dataset import PreparedData
from charkha.training.planned_settings import ModelChoices

_LARGEST_MICRO_BATCH = 1024  # that a plan looks at
_LENGTH_GROUPS = 8  # in which micro batches of like length are timed together


def rows_of(data: PreparedData, packing: Packing | None, config: Config, model: ModelChoices) -> Rows:
    """Facts of the rows as they will be trained, for every micro batch size that a plan may take."""
    shard, training = data.train, config.training
    most = min(training.batch_size, _LARGEST_MICRO_BATCH)
    sizes = {size for size in range(1, most + 1) if training.batch_size % size == 0}
    sizes |= set() if training.micro_batch_size == "auto" else {training.micro_batch_size}
    if packing is not None:
        mean = float(shard.lengths.sum()) / packing.rows
        shapes = {size: _packed_shapes(data, packing, size, model) for size in sizes}
        held_out = held_out_batches(data.eval)
        return Rows(packing.row_tokens, mean, packing.rows, known=True, packed=True, shapes=shapes, held_out=held_out)
    return Rows(
        longest=int(shard.lengths.max()),
        mean=float(shard.lengths.mean()),
        count=len(shard.lengths),
        trained_positions=trained_positions(shard, sizes),
        known=True,
        shapes={size: _shapes(data, size, config) for size in sizes},
        held_out=held_out_batches(data.eval),
    )


def held_out_batches(shard: Shard | None) -> tuple[HeldOutBatch, ...]:
    """Of the batches that the held-out loss is taken over, those that may need most."""
    if shard is None:
        return ()
    batches = [shard.lengths[rows] for rows in batches_by_length(shard.lengths, HELD_OUT_TOKENS)]
    return largest_batches(
        HeldOutBatch(len(lengths), int(lengths.max()), padded=bool(lengths.min() < lengths.max()))
        for lengths in batches
    )


def _packed_shapes(data: PreparedData, packing: Packing, size: int, model: ModelChoices) -> tuple[MicroBatches, ...]:
    """All alike; attention looks over a document where the kernel is told its bounds, else over the whole row."""
    lengths = data.train.lengths.astype(float)
    by_mask = model.model_type in BY_MASK or model.attention == "eager"
    looked_over = packing.row_tokens if by_mask else float((lengths**2).sum() / lengths.sum())
    full, rest = divmod(packing.rows, size)
    counts = [(full, size), (1, rest)] if rest else [(full, size)]
    return tuple(MicroBatches(count, rows * packing.row_tokens, looked_over) for count, rows in counts)


def _shapes(data: PreparedData, size: int, config: Config) -> tuple[MicroBatches, ...]:
    """The first epoch's micro batches of `size` rows, from short to long in groups of like count."""
    rows, longest = padded_micro_batches(
        data.train.lengths,
        batch_size=config.training.batch_size,
        micro_batch_size=size,
        seed=config.training.seed,
        fingerprint=data.fingerprint,
    )
    groups = np.array_split(np.argsort(longest, kind="stable"), min(_LENGTH_GROUPS, len(longest)))
    return tuple(
        MicroBatches(len(group), float((rows[group] * longest[group]).mean()), float(longest[group].mean()))
        for group in groups
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
