"""Held-out loss: the mean over all trained held-out tokens, whatever the batch size, never holding all logits."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from charkha.backends.base import HeldOutLoss
from charkha.backends.torch.batches import IGNORED, collate
from charkha.backends.torch.device_errors import in_parts_that_fit
from charkha.backends.torch.loss import choose_loss, losses_in_chunks
from charkha.backends.torch.ranks import ALONE, Ranks
from charkha.data.order import batches_by_length
from charkha.data.shards import Shard
from charkha.plan.held_out_memory import HELD_OUT_TOKENS


def held_out_loss(
    model: Any,
    shard: Shard,
    pad_id: int,
    on_batch: Callable[[], None] = lambda: None,
    ranks: Ranks = ALONE,
    *,
    way: str | None = None,
) -> HeldOutLoss:
    """Mean negative log-likelihood per trained token, and per row.

    `way` is training's (loss.py): `chunked` makes no more logits here either. None: chunks wherever the model allows.

    The model's mode and the random numbers are as before afterwards; nothing is sampled. `on_batch` is called after
    each batch. Several processes take turns with the batches, and each returns the whole result.
    """
    began = time.monotonic()
    was_training = model.training
    way = way or choose_loss(model, "chunked")
    model.eval()
    sums = np.zeros(len(shard.lengths))
    counts = np.zeros(len(shard.lengths), dtype=np.int64)

    def row_sums(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return _row_sums(model, collate(shard, rows, pad_id), way)

    try:
        with torch.no_grad():
            for rows in batches_by_length(shard.lengths, HELD_OUT_TOKENS)[ranks.rank :: ranks.count]:
                for part, found in in_parts_that_fit(rows, row_sums):
                    sums[part], counts[part] = found
                on_batch()
    finally:
        model.train(was_training)
    sums, counts = ranks.add_up(sums), ranks.add_up(counts)
    tokens = int(counts.sum())
    return HeldOutLoss(
        loss=float(sums.sum() / max(tokens, 1)),
        tokens=tokens,
        seconds=time.monotonic() - began,
        row_losses=tuple(float(value) for value in sums / np.maximum(counts, 1)),
    )


def _row_sums(model: Any, batch: dict[str, torch.Tensor], way: str) -> tuple[np.ndarray, np.ndarray]:
    """Per row: the summed negative log-likelihood of its labelled tokens (float64) and how many there are."""
    targets = batch["labels"][:, 1:].to(next(model.parameters()).device)
    sums = row_losses(model, batch, targets, way)
    return sums.double().cpu().numpy(), (targets != IGNORED).sum(dim=1).cpu().numpy()


def row_losses(model: Any, batch: dict[str, torch.Tensor], targets: torch.Tensor, way: str) -> torch.Tensor:
    """Summed negative log-likelihoods [rows] in fp32; `targets` [rows, tokens - 1] are the labels of next tokens."""
    inputs = {name: batch[name].to(targets.device) for name in ("input_ids", "attention_mask")}
    if way == "chunked":
        return torch.stack([losses.sum() for losses in losses_in_chunks(model, inputs, targets)])
    logits = model(**inputs, use_cache=False).logits
    logits = logits[:, logits.shape[1] - batch["labels"].shape[1] :]  # prompt tuning: virtual tokens stand before
    # Rows one at a time: log-probabilities in fp32 exist for one row, not for the batch.
    sums = [
        torch.nn.functional.cross_entropy(logits[row, :-1].float(), targets[row], ignore_index=IGNORED, reduction="sum")
        for row in range(len(targets))
    ]
    return torch.stack(sums)
