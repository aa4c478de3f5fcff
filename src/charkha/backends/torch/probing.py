"""A few real optimizer steps of a run on this device, measured: its longest micro batch and a median one.

The trainer, model, adapter, loss and optimizer are those of the run (trainer.build), over micro batches of the run in
another order; nothing is recorded, evaluated or saved. Memory is measured in steps of their own, since on a CPU the
profiler that hears the allocator slows them down:

    first    the run's first step, which has the longest row, before the optimizer has states
    later    the step of those after it with the longest row, beside the states
    median   a micro batch of median size

Then steps of the longest micro batches and of those of about median size take turns and are timed. A step has two micro
batches where the run's have several: beside the second one the gradients of the first are alive, and no further one
changes that.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainerCallback

from charkha.backends.base import AdapterSpec, BaseModelSpec, ProbedStep, ProbeResult, StepPlan
from charkha.backends.torch.batches import ChosenMicroBatches, MicroBatchPlan
from charkha.backends.torch.device_errors import device_errors_told
from charkha.backends.torch.memory import CpuPeak
from charkha.backends.torch.trainer import build
from charkha.data.shards import Shard
from charkha.plan.schedule import EMPTY

# Steps of each kind are timed until both numbers are reached, and no longer than the third says.
_LEAST_TIMED, _LEAST_SECONDS, _MOST_TIMED = 3, 4.0, 24
Kind = Literal["first", "later", "median", "worst"]


@dataclass(frozen=True)
class _Chosen:
    """One step of the probe: which micro batches of the run, by number from 0, and what is measured."""

    kind: Kind
    elements: tuple[int, ...]
    timed: bool = False


def probe(
    base: BaseModelSpec,
    adapter: AdapterSpec,
    plan: StepPlan,
    *,
    train_shard: Shard,
    fingerprint: str,
    pad_id: int,
    staging: Path,
) -> ProbeResult:
    """Trains some of the run's micro batches on one device and measures them; what was trained is dropped.

    Raises DoesNotFit where memory is too little, and what training raises before its first step.
    """
    chosen: list[_Chosen] = []

    def choose(whole: MicroBatchPlan) -> MicroBatchPlan:
        chosen.extend(_chosen(whole, plan.total_steps))
        return ChosenMicroBatches(whole, [step.elements for step in chosen])

    built = build(
        base,
        adapter,
        plan,
        train_shard=train_shard,
        fingerprint=fingerprint,
        pad_id=pad_id,
        staging=staging,
        record=lambda name, **fields: None,
        choose=choose,
    )
    meter = _CudaMeter() if base.device == "cuda" else _CpuMeter() if base.device == "cpu" else _Meter()
    loading = meter.loading_peak_bytes()
    watch = _Watch(chosen, built.micro_batches, train_shard, meter)
    built.trainer.add_callback(watch)
    try:
        with device_errors_told():
            built.trainer.train()
    finally:
        meter.close()
    return ProbeResult(tuple(watch.steps), loading)


def _chosen(whole: MicroBatchPlan, total_steps: int) -> list[_Chosen]:
    count = whole.micro_batches_per_step
    together = min(2, count)
    later = whole.largest_step_after_first(total_steps)
    ranked = _by_size(whole, min(total_steps, whole.steps_per_epoch) * count)
    middle = len(ranked) // 2
    steps = [_Chosen("first", tuple(range(together)))]
    if later is not None:
        steps.append(_Chosen("later", tuple(range(later * count, later * count + together))))
    steps.append(_Chosen("median", (ranked[middle],) * together))
    for turn in range(_MOST_TIMED):
        # No micro batch twice, as in the run: one that is repeated finds memory and caches as it left them.
        places = range(turn * together, (turn + 1) * together)
        steps.append(_Chosen("worst", tuple(ranked[place % len(ranked)] for place in places), timed=True))
        around = (middle + (place + 1) // 2 * (-1) ** place for place in places)
        steps.append(_Chosen("median", tuple(ranked[place % len(ranked)] for place in around), timed=True))
    return steps


def _by_size(whole: MicroBatchPlan, elements: int) -> list[int]:
    """Numbers of the micro batches that have rows, the one of most positions first."""
    shapes = {element: whole.shape_of(element) for element in range(elements)}
    filled = [element for element, shape in shapes.items() if shape != EMPTY] or [0]
    return sorted(filled, key=lambda element: (-shapes[element][0] * shapes[element][1], element))


class _Meter:
    """Measures nothing: devices without a counter of live tensors."""

    def loading_peak_bytes(self) -> int | None:
        """The most live tensor bytes so far, on devices that count them always."""
        return None

    def begin(self, model: Any, optimizer: Any) -> None:
        """A step whose memory is measured begins."""

    def between(self) -> None:
        """One of its micro batches is done, another follows."""

    def end(self) -> tuple[int | None, int | None]:
        """(allocated, reserved) bytes at that step's peak."""
        return None, None

    def settle(self) -> None:
        """Returns when the device has done what it was given."""

    def close(self) -> None:
        """Ends a measurement that was cut short."""


class _CpuMeter(_Meter):
    """Live tensor bytes as the CPU's allocator reports them; nothing is reserved beyond."""

    _window: CpuPeak | None = None

    def begin(self, model: Any, optimizer: Any) -> None:
        self._window = CpuPeak(model, optimizer)
        self._window.__enter__()

    def between(self) -> None:
        if self._window is not None:
            self._window.cut()

    def end(self) -> tuple[int | None, int | None]:
        window, self._window = self._window, None
        if window is None:
            return None, None
        window.close()
        return window.peak_bytes, window.peak_bytes

    def close(self) -> None:
        self.end()


class _CudaMeter(_Meter):
    """torch's own counters of the current device; they cost nothing."""

    def loading_peak_bytes(self) -> int | None:
        return int(torch.cuda.max_memory_allocated())

    def begin(self, model: Any, optimizer: Any) -> None:
        torch.cuda.reset_peak_memory_stats()

    def end(self) -> tuple[int | None, int | None]:
        return int(torch.cuda.max_memory_allocated()), int(torch.cuda.max_memory_reserved())

    def settle(self) -> None:
        torch.cuda.synchronize()


class _Watch(TrainerCallback):  # type: ignore[misc]  # transformers ships no types
    """Measures each step as it was chosen for, and ends the training when enough of them are timed."""

    def __init__(self, chosen: list[_Chosen], micro_batches: MicroBatchPlan, shard: Shard, meter: _Meter) -> None:
        self.steps: list[ProbedStep] = []
        self._chosen = chosen
        self._micro_batches = micro_batches
        self._lengths = shard.lengths
        self._meter = meter
        self._ended_at = 0.0  # of the step before: what comes between steps is part of the next one
        self._began_at = 0.0
        self._first_at: float | None = None
        self._timed_seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._ended_at = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._first_at = None
        self._began_at = time.perf_counter()
        if not self._chosen[state.global_step].timed:
            self._meter.begin(kwargs["model"], kwargs["optimizer"])

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._meter.settle()
        self._first_at = time.perf_counter()
        self._meter.between()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._meter.settle()
        now = time.perf_counter()
        step = self._chosen[state.global_step - 1]
        peaks = (None, None) if step.timed else self._meter.end()
        seconds = now - self._ended_at
        first = seconds if self._first_at is None else self._first_at - self._began_at
        self._keep(state.global_step - 1, step, first, seconds, peaks)
        self._timed_seconds += seconds if step.timed else 0.0
        if self._is_enough():
            control.should_training_stop = True
        self._ended_at = time.perf_counter()

    def _is_enough(self) -> bool:
        kinds = [step.kind for step in self.steps if step.first_seconds is not None]
        even = kinds.count("worst") == kinds.count("median") >= _LEAST_TIMED
        return even and self._timed_seconds >= _LEAST_SECONDS

    def _keep(
        self, number: int, step: _Chosen, first: float, seconds: float, peaks: tuple[int | None, int | None]
    ) -> None:
        count = self._micro_batches.micro_batches_per_step
        elements = range(number * count, number * count + count)
        shapes = [self._micro_batches.shape_of(element) for element in elements]
        self.steps.append(
            ProbedStep(
                kind=step.kind,
                rows=tuple(rows for rows, _longest in shapes),
                longest=tuple(longest for _rows, longest in shapes),
                tokens=sum(int(self._lengths[self._micro_batches.rows_of(element)].sum()) for element in elements),
                first_seconds=first if step.timed else None,
                seconds=seconds,
                peak_allocated_bytes=peaks[0],
                peak_reserved_bytes=peaks[1],
            )
        )
