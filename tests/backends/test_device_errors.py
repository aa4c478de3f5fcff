"""Too little device memory: told as such by whatever name it comes, and worked around where that is possible."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from charkha.errors import DoesNotFit

MESSAGES = [
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "MPS backend out of memory (MPS allocated: 18.00 GB, other allocations: 100.00 MB, max allowed: 18.13 GB).",
    "NCCL Error 1: unhandled cuda error, Cuda failure 2 'out of memory'",
]


@pytest.mark.parametrize("message", [*MESSAGES, None])
def test_every_name_of_it_is_out_of_memory(message: str | None) -> None:
    import torch

    from charkha.backends.torch.device_errors import OutOfMemory, device_errors_told

    error = RuntimeError(message) if message else torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    with pytest.raises(OutOfMemory), device_errors_told():
        raise error
    with pytest.raises(DoesNotFit, match="the base model does not fit"), device_errors_told(loading=True):
        raise error


def test_other_errors_stay_what_they_are() -> None:
    from charkha.backends.torch.device_errors import device_errors_told, in_parts_that_fit

    with pytest.raises(RuntimeError, match="shape"), device_errors_told():
        raise RuntimeError("shape mismatch")

    def wrong(rows: np.ndarray) -> None:
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape"):
        in_parts_that_fit(np.arange(4), wrong)


def test_work_that_does_not_fit_is_done_in_parts_and_told_where_one_row_is_too_much() -> None:
    import torch

    from charkha.backends.torch.device_errors import in_parts_that_fit

    tried: list[int] = []

    def fits(most: int) -> Callable[[np.ndarray], int]:
        def work(rows: np.ndarray) -> int:
            tried.append(len(rows))
            if len(rows) > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return int(rows.sum())

        return work

    parts = in_parts_that_fit(np.arange(7), fits(2))
    assert [part.tolist() for part, _ in parts] == [[0, 1], [2, 3], [4, 5], [6]]
    assert [result for _, result in parts] == [1, 5, 9, 6]
    assert tried == [7, 4, 2, 2, 3, 2, 1]
    with pytest.raises(DoesNotFit, match="a single row at a time") as caught:
        in_parts_that_fit(np.arange(3), fits(0))
    assert caught.value.kind == "does_not_fit"  # the supervisor would halve the micro batch, of no use here


def test_answers_are_the_same_in_smaller_parts(
    model_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from charkha.backends.base import BaseModelSpec
    from charkha.backends.torch.generate import generate_greedy
    from charkha.backends.torch.model import load_base

    model: Any = load_base(BaseModelSpec(model_folder("llama"), "fp32", "sdpa", "none", "cpu"))
    prompts = [np.arange(3, 3 + length, dtype=np.int32) for length in (4, 7, 5)]
    settings: dict[str, Any] = {"max_new_tokens": 4, "end_ids": frozenset({1}), "pad_id": 2}
    whole = generate_greedy(model, prompts, **settings)
    generate = model.generate

    def one_row_at_a_time(**inputs: Any) -> Any:
        if len(inputs["input_ids"]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return generate(**inputs)

    monkeypatch.setattr(model, "generate", one_row_at_a_time)
    assert generate_greedy(model, prompts, **settings) == whole
