"""Micro batches as tensors: one element of the trainer's dataset is one planned micro batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from charkha.backends.base import StepPlan
from charkha.data.order import plan_epoch
from charkha.data.packing import PackedShapes, pack
from charkha.data.shards import Shard
from charkha.plan.schedule import EMPTY

if TYPE_CHECKING:
    import torch

IGNORED = -100  # the label that transformers' losses leave out


def collate(shard: Shard, rows: np.ndarray, pad_id: int) -> dict[str, torch.Tensor]:
    """The rows padded on the right to the longest of them.

    Returns input_ids, attention_mask and labels, each int64 [rows, tokens]; labels are IGNORED on prompts and padding.
    No rows (the rest of an epoch's last step) become one row of padding without a label: its loss and gradient are 0.
    """
    import torch

    width = int(shard.lengths[rows].max()) if len(rows) else 2
    shape = (max(len(rows), 1), width)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    attention_mask = np.zeros(shape, dtype=np.int64)
    labels = np.full(shape, IGNORED, dtype=np.int64)
    if not len(rows):
        attention_mask[:] = 1
    for place, row in enumerate(rows):
        ids = shard.input_ids(int(row))
        input_ids[place, : len(ids)] = ids
        attention_mask[place, : len(ids)] = 1
        labels[place, : len(ids)] = np.where(shard.trained(int(row)), ids, IGNORED)
    return {
        "input_ids": torch.from_numpy(input_ids),
        "attention_mask": torch.from_numpy(attention_mask),
        "labels": torch.from_numpy(labels),
    }


def collate_packed(
    shard: Shard, packed_rows: Sequence[Sequence[int] | np.ndarray], pad_id: int, *, one_row: bool
) -> dict[str, Any]:
    """Several documents a row, which see each other nowhere: positions begin at 0 with each of them.

    Returns input_ids, labels and position_ids, each int64 [packed rows, tokens], and no attention_mask: transformers
    reads the documents' bounds from the positions only where no mask is given, and a mask of ones would let every
    document see those before it. A document's first token has no label, since nothing before it predicts it; what
    fills a row up is one more document without labels.

    With `one_row` all of them stand in one row without padding, [1, tokens], with the bounds in the arguments of
    FlashAttention's variable-length kernel (cu_seq_lens_* int32 [documents + 1], max_length_*): transformers looks
    for bounds in the positions of a single row only, and reading them there waits for the GPU in every layer.
    """
    import torch

    rows = [_packed_row(shard, documents) for documents in packed_rows] or [_padding(2, pad_id)]
    if one_row:
        rows = [_joined(rows)]
    else:
        width = max(len(ids) for ids, _labels, _positions in rows)
        rows = [_joined([row, _padding(width - len(row[0]), pad_id)]) for row in rows]
    names = ("input_ids", "labels", "position_ids")
    batch: dict[str, Any] = {
        name: torch.from_numpy(np.stack([row[part] for row in rows])) for part, name in enumerate(names)
    }
    return {**batch, **_kernel_bounds(batch["position_ids"])} if one_row else batch


_Row = tuple[np.ndarray, np.ndarray, np.ndarray]  # input_ids, labels, position_ids; each int64 [tokens]


def _packed_row(shard: Shard, documents: Sequence[int] | np.ndarray) -> _Row:
    return _joined([_document(shard.input_ids(int(row)), shard.trained(int(row))) for row in documents])


def _document(ids: np.ndarray, trained: np.ndarray) -> _Row:
    labels = np.where(trained, ids, IGNORED).astype(np.int64)
    labels[0] = IGNORED
    return ids.astype(np.int64), labels, np.arange(len(ids), dtype=np.int64)


def _padding(count: int, pad_id: int) -> _Row:
    return (
        np.full(count, pad_id, dtype=np.int64),
        np.full(count, IGNORED, dtype=np.int64),
        np.arange(count, dtype=np.int64),
    )


def _joined(rows: Sequence[_Row]) -> _Row:
    ids, labels, positions = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    return ids, labels, positions


def _kernel_bounds(position_ids: torch.Tensor) -> dict[str, Any]:
    """FlashAttentionKwargs of transformers for one row of documents, from positions [1, tokens]."""
    import torch

    starts = (position_ids[0] == 0).nonzero().flatten()
    bounds = torch.cat([starts, torch.tensor([position_ids.shape[1]])]).to(torch.int32)
    longest = int(bounds.diff().max())
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def plan_micro_batches(
    plan: StepPlan, shard: Shard, fingerprint: str, *, one_row: bool, processes: int = 1
) -> MicroBatchPlan:
    """The micro batches of a run; `one_row` is the layout of `collate_packed`, where rows are packed."""
    return MicroBatchPlan(
        shard,
        batch_size=plan.batch_size,
        micro_batch_size=plan.micro_batch_size,
        seed=plan.seed,
        fingerprint=fingerprint,
        packed=None if plan.packing is None else pack(shard.lengths, plan.packing.row_tokens),
        one_row=one_row,
        processes=processes,
    )


class MicroBatchPlan:
    """Which rows stand in which micro batch: a pure function of (seed, epoch, step) and the shard's fingerprint.

    With `packed`, steps and micro batches count packed rows. `one_row` is the layout of `collate_packed`. The number of
    micro batches in a step is a multiple of `processes`, which take turns; those that it lacks are empty. Epochs are
    planned when they are first asked for; only the current one is kept.
    """

    def __init__(
        self,
        shard: Shard,
        *,
        batch_size: int,
        micro_batch_size: int,
        seed: int,
        fingerprint: str,
        packed: PackedShapes | None = None,
        one_row: bool = False,
        processes: int = 1,
    ) -> None:
        self._shard = shard
        self._batch_size = batch_size
        self._micro_batch_size = micro_batch_size
        self._seed = seed
        self._fingerprint = fingerprint
        self._packed = packed
        self._one_row = one_row
        self._epoch = -1
        self._steps: list[list[np.ndarray]] = []
        self._documents: list[np.ndarray] = []  # of each packed row of the epoch
        self._lengths = shard.lengths if packed is None else packed.tokens
        self.steps_per_epoch = -(-len(self._lengths) // batch_size)
        self.micro_batches_per_step = -(-batch_size // micro_batch_size // processes) * processes

    def batch_of(self, element: int, pad_id: int) -> dict[str, Any]:
        """Micro batch number `element`, counted from the start of training, as the model takes it."""
        planned = self._planned(element)
        if self._packed is None:
            return collate(self._shard, planned, pad_id)
        packed_rows = [self._documents[row] for row in planned]
        return collate_packed(self._shard, packed_rows, pad_id, one_row=self._one_row)

    def rows_of(self, element: int) -> np.ndarray:
        """Numbers of the shard's rows in micro batch number `element`, counted from the start of training."""
        planned = self._planned(element)
        if self._packed is None:
            return planned
        return np.concatenate([np.empty(0, dtype=np.int64), *(self._documents[row] for row in planned)])

    def shape_of(self, element: int) -> tuple[int, int]:
        """(rows, tokens of the longest one) of a micro batch; packed rows count as rows."""
        planned = self._planned(element)
        return (len(planned), int(self._lengths[planned].max())) if len(planned) else EMPTY

    def largest_step_after_first(self, total_steps: int) -> int | None:
        """Number (from 0) of the step, from the second on, with the longest row: the optimizer's states exist there.

        The first step of every epoch holds the epoch's longest row. None for a run of one step.
        """
        if total_steps > self.steps_per_epoch:
            return self.steps_per_epoch
        count = self.micro_batches_per_step
        later = range(1, total_steps)
        return max(later, key=lambda step: self.shape_of(step * count)[1], default=None)

    def _planned(self, element: int) -> np.ndarray:
        step, place = divmod(element, self.micro_batches_per_step)
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._plan(epoch)
        planned = self._steps[step_in_epoch]
        return planned[place] if place < len(planned) else np.empty(0, dtype=np.int64)

    def _plan(self, epoch: int) -> None:
        self._steps = plan_epoch(
            self._lengths,
            batch_size=self._batch_size,
            micro_batch_size=self._micro_batch_size,
            seed=self._seed,
            epoch=epoch,
            fingerprint=self._fingerprint,
        )
        if self._packed is not None:
            lengths = self._shard.lengths
            self._documents = self._packed.deal(lengths, seed=self._seed, epoch=epoch, fingerprint=self._fingerprint)
        self._epoch = epoch


class ChosenMicroBatches(MicroBatchPlan):
    """Some micro batches of a run, in steps of an order of their own: `steps` are the numbers of each step's."""

    def __init__(self, whole: MicroBatchPlan, steps: Sequence[Sequence[int]]) -> None:
        self._whole = whole
        self._elements = [element for step in steps for element in step]
        self.steps_per_epoch = len(steps)
        self.micro_batches_per_step = len(steps[0])

    def batch_of(self, element: int, pad_id: int) -> dict[str, Any]:
        return self._whole.batch_of(self._elements[element], pad_id)

    def rows_of(self, element: int) -> np.ndarray:
        return self._whole.rows_of(self._elements[element])

    def shape_of(self, element: int) -> tuple[int, int]:
        return self._whole.shape_of(self._elements[element])
