"""Errors of the device in words: too little memory, or a GPU that is gone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from charkha.errors import DoesNotFit, EnvironmentProblem
from charkha.hardware.sensors import open_nvml


class OutOfMemory(DoesNotFit):
    """The device had too little memory for a step. The supervisor starts the run again with smaller micro batches."""

    kind = "out_of_memory"


class GpuLost(EnvironmentProblem):
    """The GPU no longer answers; only a cold start of the machine brings it back."""

    kind = "gpu_lost"


@contextmanager
def device_errors_told(*, loading: bool = False) -> Iterator[None]:
    """Turns torch's out-of-memory error into OutOfMemory, and an error of a GPU that NVML calls lost into GpuLost.

    While `loading` the base, too little memory is DoesNotFit: smaller micro batches would not help.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        first_line = str(error).splitlines()[0]
        if loading:
            raise DoesNotFit(
                f"the base model does not fit into GPU memory: {first_line}",
                where="model",
                remedy="use model.quantization nf4, a smaller model, or close what else uses the GPU",
            ) from error
        raise OutOfMemory(
            f"out of GPU memory: {first_line}",
            remedy="a smaller training.micro_batch_size, gradient_checkpointing: full, or a smaller data.max_length",
        ) from error
    except RuntimeError as error:
        if "CUDA" not in str(error) or not _a_gpu_is_lost():
            raise
        raise GpuLost(
            f"the GPU is lost: {str(error).splitlines()[0]}",
            remedy="shut the machine down, wait, start it again, and run the same command again",
        ) from error


def _a_gpu_is_lost() -> bool:
    nvml = open_nvml()
    return nvml is not None and any(nvml.read(index).lost for index in range(nvml.count))
