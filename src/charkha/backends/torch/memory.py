"""What the process holds now and held at most, by the counter that the plan predicts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any

import torch


def device_memory_bytes() -> int:
    """Live tensor bytes on the GPU; on a CPU the resident size of the process."""
    if torch.cuda.is_available():
        return int(torch.cuda.memory_allocated())
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_device_memory_bytes(device: str) -> int | None:
    """Most live tensor bytes so far on the GPU; None on a CPU, where `CpuPeak` measures a window."""
    return int(torch.cuda.max_memory_allocated()) if device == "cuda" else None


class CpuPeak:
    """Most live tensor bytes on the CPU in a window, as torch's CPU allocator reports them: `with CpuPeak(model) as p`.

    Temporaries inside kernels count. The allocator speaks only while torch's profiler listens, and only of what it
    hands out meanwhile; parameters, gradients, buffers, 4-bit constants and optimizer states that exist before are
    added. Numbers computed meanwhile are the same. One window at a time in a process, closed by the thread that opened
    it. The profiler keeps about 2 KiB an operator until `cut` or the end, so a window is for a few steps, with a cut
    after each micro batch.

    Not covered: other tensors that were made before. What was made before and is freed inside stays in the count, or
    is taken off it if it was made in an earlier window of this process.
    """

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        self._model = model
        self._optimizer = optimizer
        self._profiler: Any = None
        self._live_bytes = 0
        self._highest_bytes = 0
        self.peak_bytes: int | None = None  # set when the window closes

    def __enter__(self) -> CpuPeak:
        from charkha.backends.torch.streamed_model import engine_of

        # Kineto writes a line to stderr when profiling starts and when it ends; a level above its highest is silence.
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        engine = engine_of(self._model)
        self._live_bytes = _live_bytes(
            [*_model_tensors(self._model), *_optimizer_tensors(self._optimizer)], engine.buffers if engine else ()
        )
        self._highest_bytes = self._live_bytes
        self._listen()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        self.close()

    def cut(self) -> None:
        """Counts what was reported so far and lets the profiler forget it; the window stays open."""
        if self._profiler is not None:
            self._count()
            self._listen()

    def close(self) -> None:
        """Closes the window and sets `peak_bytes`; a window that is not open stays as it is."""
        if self._profiler is not None:
            self._count()
            self.peak_bytes = self._highest_bytes

    def _listen(self) -> None:
        from torch.autograd.profiler import profile

        self._profiler = profile(profile_memory=True)
        self._profiler.__enter__()

    def _count(self) -> None:
        profiler, self._profiler = self._profiler, None
        profiler.__exit__(None, None, None)
        for size in _reported_sizes(profiler.kineto_results.events()):
            self._live_bytes += size
            self._highest_bytes = max(self._highest_bytes, self._live_bytes)


def _reported_sizes(events: Iterable[Any]) -> list[int]:
    """Bytes that the CPU allocator handed out (positive) and took back (negative), in the order of time."""
    reports = [
        (event.start_ns(), event.nbytes())
        for event in events
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU
    ]
    reports.sort(key=lambda report: report[0])  # stable: what happened in one nanosecond stays in its order
    return [size for _when, size in reports]


def _live_bytes(tensors: Iterable[torch.Tensor], held: Iterable[torch.Tensor] = ()) -> int:
    """Bytes of the tensors, those that share memory once. A view of a mapped file counts by its own size.

    `held` count whole, and for all tensors that are views into them.
    """
    whole: dict[int, int] = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
    sizes: dict[int, int] = {}
    for tensor in tensors:
        if tensor.untyped_storage().data_ptr() in whole:
            continue
        size = tensor.numel() * tensor.element_size()
        sizes[tensor.data_ptr()] = max(size, sizes.get(tensor.data_ptr(), 0))
    return sum(sizes.values()) + sum(int(size) for size in whole.values())


def _model_tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from model.buffers()
    for parameter in model.parameters():
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
        yield from _quantization_constants(parameter)
    for module in model.modules():
        yield from _int8_scales(module)


def _int8_scales(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """A number a row, which bitsandbytes keeps beside the weight until the first forward pass, then in a state."""
    for holder in (getattr(module, "weight", None), getattr(module, "state", None)):
        scales = getattr(holder, "SCB", None)
        if isinstance(scales, torch.Tensor):
            yield scales


def _quantization_constants(parameter: torch.nn.Parameter) -> Iterator[torch.Tensor]:
    """Block constants and codes of a 4-bit weight, which bitsandbytes keeps beside the parameter."""
    state = getattr(parameter, "quant_state", None)
    for part in (state, getattr(state, "state2", None)):
        yield from (value for value in vars(part or object).values() if isinstance(value, torch.Tensor))


def _optimizer_tensors(optimizer: torch.optim.Optimizer | None) -> Iterator[torch.Tensor]:
    if optimizer is None:
        return
    for entries in optimizer.state.values():
        yield from (value for value in entries.values() if isinstance(value, torch.Tensor))
