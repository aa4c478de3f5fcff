"""How many rows an epoch has by files and config alone: for a plan without a tokenizer, so without NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from charkha.config import Config
from charkha.data.eval_share import held_out_count, is_share_or_count
from charkha.data.formats import raise_for_problems, read_rows
from charkha.training.sources import Source, options_of


@dataclass(frozen=True)
class CountedRows:
    """Rows of an epoch, weighted, without held-out ones; and those."""

    train: int
    held_out: int
    leaves_none: bool = False  # whether the split would leave no row to train on, so that all are counted


def count_rows(config: Config, sources: Sequence[Source]) -> CountedRows:
    """Counts them as training does, but that rows which say the same are not told from others.

    Raises DataError for rows that cannot be read. Rows of which a split would leave none to train on are all counted:
    they may only stand for others.
    """
    files = [read_rows(source.path, options=options_of(config, source)) for source in sources]
    raise_for_problems(files)
    counts = [len(file.rows) for file in files]
    rows, wish = sum(counts), config.data.eval
    if wish is not None and not is_share_or_count(wish):
        return CountedRows(round(_weighted(counts, sources)), 1)  # in a file of their own, however many
    held_out = held_out_count(wish, rows) if wish else 0
    if held_out >= rows:
        return CountedRows(round(_weighted(counts, sources)), 0, leaves_none=True)
    return CountedRows(round(_weighted(counts, sources) * (1 - held_out / rows)), held_out)


def _weighted(counts: Sequence[int], sources: Sequence[Source]) -> float:
    return sum(count * source.weight for count, source in zip(counts, sources, strict=True))
