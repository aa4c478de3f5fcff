"""Errors of the device in words: too little memory, or a GPU that is gone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch

from charkha.errors import DoesNotFit, EnvironmentProblem
from charkha.hardware.sensors import open_nvml

Result = TypeVar("Result")


class OutOfMemory(DoesNotFit):
    """The device had too little memory for a step. The supervisor starts the run again with smaller micro batches."""

    kind = "out_of_memory"


class GpuLost(EnvironmentProblem):
    """The GPU no longer answers; only a cold start of the machine brings it back."""

    kind = "gpu_lost"


@contextmanager
def device_errors_told(*, loading: bool = False) -> Iterator[None]:
    """Turns an out-of-memory error into OutOfMemory, and an error of a GPU that NVML calls lost into GpuLost.

    While `loading` the base, too little memory is DoesNotFit: smaller micro batches would not help.
    """
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if is_out_of_memory(error):
            raise _out_of_memory(str(error).splitlines()[0], loading) from error
        if "CUDA" not in str(error) or not _a_gpu_is_lost():
            raise
        raise GpuLost(
            f"the GPU is lost: {str(error).splitlines()[0]}",
            remedy="shut the machine down, wait, start it again, and run the same command again",
        ) from error


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the device had too little memory: torch's own class, and what cuBLAS, NCCL, MPS and CPUs call it."""
    text = str(error)
    return (
        isinstance(error, torch.OutOfMemoryError)
        or "CUBLAS_STATUS_ALLOC_FAILED" in text
        or "DefaultCPUAllocator: can't allocate memory" in text
        or ("out of memory" in text and ("CUDA" in text or "Cuda" in text or "MPS" in text))
    )


def in_parts_that_fit(rows: np.ndarray, work: Callable[[np.ndarray], Result]) -> list[tuple[np.ndarray, Result]]:
    """`work` on all rows at once or, where memory is too little for that, on halves, quarters and so on.

    For work without gradients, whose result does not depend on what stands together beyond rounding. Raises DoesNotFit
    where a single row is too much.
    """
    try:
        return [(rows, work(rows))]
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        if len(rows) == 1:
            raise DoesNotFit(
                f"out of GPU memory with a single row at a time, without gradients: {str(error).splitlines()[0]}",
                remedy="use a smaller data.max_length, model.quantization nf4, or close what else uses the GPU",
            ) from error
    # Out here the failed try's tensors are gone.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    middle = (len(rows) + 1) // 2
    return [part for half in (rows[:middle], rows[middle:]) for part in in_parts_that_fit(half, work)]


def _out_of_memory(first_line: str, loading: bool) -> DoesNotFit:
    if loading:
        return DoesNotFit(
            f"the base model does not fit into GPU memory: {first_line}",
            where="model",
            remedy="use model.quantization nf4, a smaller model, or close what else uses the GPU",
        )
    return OutOfMemory(
        f"out of GPU memory: {first_line}",
        remedy="a smaller training.micro_batch_size, gradient_checkpointing: full, or a smaller data.max_length",
    )


def _a_gpu_is_lost() -> bool:
    nvml = open_nvml()
    return nvml is not None and any(nvml.read(index).lost for index in range(nvml.count))
