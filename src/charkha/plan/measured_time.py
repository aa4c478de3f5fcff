"""From the seconds of a few real steps to those of a whole run.

    seconds of a micro batch = a + b * predicted seconds        seconds of a step = its micro batches + c

The prediction is the closed form's (plan/speed.py) for that many rows of that length, so what grows with positions and
what grows with the square of a row's length keep their proportion; `a` is what every micro batch costs whatever its
size (starting kernels, unpacking weights), and `c` what a step costs beside them (collating rows, clipping, the
optimizer). Two sizes, the longest micro batches and those about the median, give a and b; where both are as long as
each other, or shorter ones took longer, a is 0.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from charkha.hardware.machine import Machine
from charkha.plan.architecture import Architecture
from charkha.plan.memory_settings import MemorySettings
from charkha.plan.schedule import Schedule
from charkha.plan.speed import step_time

Shape = tuple[int, int]  # rows, tokens of the longest one


@dataclass(frozen=True)
class TimedStep:
    """One real optimizer step over one or two micro batches, of which other steps of its kind have the like."""

    kind: str
    shapes: tuple[Shape, ...]
    first_seconds: float  # forward and backward of the first micro batch; of the only one with what follows it
    seconds: float  # of the whole step


@dataclass(frozen=True)
class StepModel:
    """The three numbers of this file's head."""

    per_micro_batch: float
    per_predicted_second: float
    per_step: float

    def step_seconds(self, shapes: Iterable[Shape], predicted: Callable[[int, int], float]) -> float:
        """Of one step over micro batches of these shapes."""
        return self.per_step + sum(
            self.per_micro_batch + self.per_predicted_second * predicted(*shape) for shape in shapes
        )

    def run_seconds(self, schedule: Schedule, predicted: Callable[[int, int], float]) -> float:
        """Of all optimizer steps of the run; evaluation and saving are not in it."""
        return schedule.seconds(
            lambda rows, longest: self.per_micro_batch + self.per_predicted_second * predicted(rows, longest),
            self.per_step,
        )


def fitted(steps: Sequence[TimedStep], predicted: Callable[[int, int], float]) -> StepModel:
    """The model through the medians of each kind. `predicted` is of (rows, longest row), in seconds."""
    by_kind: dict[str, list[TimedStep]] = {}
    for step in steps:
        by_kind.setdefault(step.kind, []).append(step)
    points = [
        (
            statistics.median(predicted(*step.shapes[0]) for step in timed),
            statistics.median(step.first_seconds for step in timed),
        )
        for timed in by_kind.values()
    ]
    fixed, slope = _line(points)
    beside = [
        statistics.median(
            step.seconds - sum(fixed + slope * predicted(*shape) for shape in step.shapes) for step in timed
        )
        for timed in by_kind.values()
    ]
    return StepModel(fixed, slope, max(0.0, statistics.fmean(beside)))


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(a, b) of y = a + b x through the outermost points; through the origin where that would make either negative."""
    (low_x, low_y), (high_x, high_y) = min(points), max(points)
    if high_x > low_x:
        slope = (high_y - low_y) / (high_x - low_x)
        fixed = low_y - slope * low_x
        if slope > 0 and fixed >= 0:
            return fixed, slope
    return 0.0, sum(x * y for x, y in points) / sum(x * x for x, _y in points)


def predicted_seconds(
    architecture: Architecture, settings: MemorySettings, machine: Machine
) -> Callable[[int, int], float]:
    """The closed form's seconds of a micro batch of (rows, longest row) under settings otherwise those given."""
    whole = settings.rows * settings.tokens

    @cache
    def seconds(rows: int, longest: int) -> float:
        trained = settings.trained_positions
        share = None if trained is None else max(1, round(trained * rows * longest / whole))
        shaped = replace(settings, rows=rows, tokens=longest, trained_positions=share)
        return step_time(architecture, shaped, machine.gpu, cpu_flops=machine.cpu_flops).micro_batch_seconds

    return seconds
