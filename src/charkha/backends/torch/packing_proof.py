"""Proof on the loaded model that documents in one row do not see each other, before a step is trained.

An architecture keeps them apart only if its masks are made from the positions (Falcon's, for one, are not) and if
nothing else runs along the row (a recurrent layer does). Which ones do was measured (plan/packing_support.py), but
kernels and versions change, and a leak is silent: the loss looks fine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from charkha.backends.torch.batches import collate_packed
from charkha.backends.torch.document_attention import leave_document_attention, use_document_attention
from charkha.backends.torch.loss import causal_model
from charkha.data.shards import Shard
from charkha.plan.packing_support import PackingLeaks

_DOCUMENTS = 4  # in two rows, so that rows beside each other are looked at too
_TOKENS = 128  # of a document at most: bounds the logits, vocabulary wide, that are held

# Largest difference between logits, over the largest logit. The two forward passes add up the same numbers in other
# orders. Measured over 2 to 32 blocks: fp32 7e-7, bf16 2e-2 (some units of its 8-bit mantissa), as much as ordinary
# padding makes; leaks measured 0.13 to 1.6. int8 rounds activations by the largest of the whole batch.
_TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 6e-2}


@dataclass(frozen=True)
class PackingProof:
    """How far logits in packed rows are from those of each document alone, over the largest logit."""

    documents: int
    difference: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the difference is rounding. NaN is not."""
        return self.difference <= self.tolerance


def choose_packed_layout(
    model: Any, shard: Shard, pad_id: int, *, dtype: str, quantization: str, attention: str
) -> tuple[bool, PackingProof]:
    """(one_row of `collate_packed`, the proof that it keeps documents apart); the model is left ready for it.

    One row without padding where the kernel is given the documents' bounds: FlashAttention, or document_attention in
    place of sdpa. Where those bounds get lost on their way through the model, rows side by side under a mask. Raises
    PackingLeaks where that leaks too.
    """
    arguments = (model, shard, pad_id)
    causal = causal_model(model)
    if use_document_attention(causal):
        proof = prove_packing(*arguments, dtype=dtype, quantization=quantization, one_row=True)
        if proof.holds:
            return True, proof
        leave_document_attention(causal)
    one_row = attention.startswith("flash_attention")
    proof = prove_packing(*arguments, dtype=dtype, quantization=quantization, one_row=one_row)
    if not proof.holds:
        raise PackingLeaks(
            f"documents in one row see each other in this model ({type(causal).__name__}): its logits differ by "
            f"{proof.difference:.2g} of the largest from those of each document alone (rounding: {proof.tolerance:g})",
            where="data.packing",
            remedy="set data.packing: false",
        )
    return one_row, proof


def prove_packing(
    model: Any, shard: Shard, pad_id: int, *, dtype: str, quantization: str, one_row: bool
) -> PackingProof:
    """Compares packed rows of a few real documents with each document alone; dropout is off, nothing is sampled.

    `dtype` is that of the arithmetic, `one_row` the layout of `collate_packed` that training will use.
    """
    small = _some_documents(shard)
    numbers = np.arange(_DOCUMENTS)
    rows = [numbers[: _DOCUMENTS // 2], numbers[_DOCUMENTS // 2 :]]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), _arithmetic(model, dtype):
            together = _logits(model, collate_packed(small, rows, pad_id, one_row=one_row))
            alone = [_logits(model, _one_document(small, number)) for number in range(_DOCUMENTS)]
    finally:
        model.train(was_training)
    places = _places(small.lengths, rows, one_row)
    parts = [together[row, begin:end] for row, begin, end in places]
    largest = max(float(logits.abs().max()) for logits in alone)
    differences = [(part.float() - logits[0].float()).abs().max() for part, logits in zip(parts, alone, strict=True)]
    # torch's max keeps NaN, Python's may not.
    difference = float(torch.stack(differences).max()) / max(largest, torch.finfo(torch.float32).tiny)
    tolerance = _TOLERANCE["bf16" if quantization == "int8" else dtype]
    return PackingProof(_DOCUMENTS, difference, tolerance)


def _some_documents(shard: Shard) -> Shard:
    """The first tokens of documents spread over the shard; of fewer than four, some come twice."""
    chosen = np.linspace(0, shard.rows - 1, _DOCUMENTS).astype(int)
    ids = [shard.input_ids(int(row))[:_TOKENS] for row in chosen]
    trained = [shard.trained(int(row))[:_TOKENS] for row in chosen]
    offsets = np.cumsum([0, *(len(part) for part in ids)])
    return Shard(shard.path, np.concatenate(ids), np.concatenate(trained), offsets, shard.lines[chosen])


def _places(lengths: np.ndarray, rows: list[np.ndarray], one_row: bool) -> Iterator[tuple[int, int, int]]:
    """Row, first column and end column of each document in what `collate_packed` made of `rows`."""
    row = begin = 0
    for number, documents in enumerate(rows):
        if not one_row:
            row, begin = number, 0
        for document in documents:
            yield row, begin, begin + int(lengths[document])
            begin += int(lengths[document])


def _one_document(shard: Shard, number: int) -> dict[str, torch.Tensor]:
    ids = torch.from_numpy(shard.input_ids(number).astype(np.int64))[None]
    return {"input_ids": ids}


def _logits(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    device = next(model.parameters()).device
    inputs = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    inputs.pop("labels", None)
    # A cache object would switch off the documents' bounds; see transformers' masking_utils.
    return model(**inputs, use_cache=False).logits


def _arithmetic(model: Any, dtype: str) -> Any:
    """Autocast as training will use it, where fp32 weights compute in 16 bits."""
    from charkha.backends.torch.base_config import torch_dtype

    if dtype == "fp32":
        return nullcontext()
    return torch.autocast(next(model.parameters()).device.type, dtype=torch_dtype(dtype))
