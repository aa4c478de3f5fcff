"""From the seconds of a few real steps to those of a whole run.

    seconds of a micro batch = a + b * predicted seconds        seconds of a step = its micro batches + c

The prediction is the closed form's (plan/speed.py) for that many rows of that length, so what grows with positions and
what grows with the square of a row's length keep their proportion; `a` is what every micro batch costs whatever its
size (starting kernels, unpacking weights), and `c` what a step costs beside them (collating rows, clipping, the
optimizer). Two sizes, the longest micro batches and those about the median, give a and b. Where the longer one took
more beyond the shorter than was predicted, `a` is negative, and what is shorter than both is scaled down from the
shorter one. Where both are as long as each other, or the shorter took longer, a is 0.
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
    """The three numbers of this file's head, and the least that a predicted second takes where `a` is negative."""

    per_micro_batch: float
    per_predicted_second: float
    per_step: float
    least_per_predicted_second: float = 0.0

    def micro_batch_seconds(self, predicted: float) -> float:
        """Of one micro batch of so many predicted seconds."""
        line = self.per_micro_batch + self.per_predicted_second * predicted
        return max(line, self.least_per_predicted_second * predicted)

    def step_seconds(self, shapes: Iterable[Shape], predicted: Callable[[int, int], float]) -> float:
        """Of one step over micro batches of these shapes."""
        return self.per_step + sum(self.micro_batch_seconds(predicted(*shape)) for shape in shapes)

    def run_seconds(self, schedule: Schedule, predicted: Callable[[int, int], float]) -> float:
        """Of all optimizer steps of the run; evaluation and saving are not in it."""
        return schedule.seconds(lambda rows, longest: self.micro_batch_seconds(predicted(rows, longest)), self.per_step)


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
    model = _line(points)
    beside = [
        statistics.median(step.seconds - model.step_seconds(step.shapes, predicted) for step in timed)
        for timed in by_kind.values()
    ]
    return replace(model, per_step=max(0.0, statistics.fmean(beside)))


def _line(points: Sequence[tuple[float, float]]) -> StepModel:
    """Y = a + b x through the outermost points; through the origin, in the least squares, where y does not grow."""
    (low_x, low_y), (high_x, high_y) = min(points), max(points)
    if high_x > low_x and high_y > low_y:
        slope = (high_y - low_y) / (high_x - low_x)
        fixed = low_y - slope * low_x
        return StepModel(fixed, slope, 0.0, low_y / low_x if fixed < 0 else 0.0)
    return StepModel(0.0, sum(x * y for x, y in points) / sum(x * x for x, _y in points), 0.0)


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
