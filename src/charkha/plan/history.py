"""What finished runs of this machine say about the next plan's time and memory.

A record holds shapes and numbers, nothing of the data, no path and no name of a model. Of runs on the same device, with
the same method, kind of weights and number of devices, those of the nearest shapes count:

    correction = exp(n / (n + 1/4) * median of ln(measured / planned))

One run says most of it, since runs of one machine and shape differ by a few percent while machines differ by more. How
far the runs scatter around that median, beside what published runs do, gives the time that nine of ten runs keep to.
Memory is a measured fact only of the very same settings: it is said, not corrected.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from charkha.hardware.catalog import TABLE
from charkha.hardware.machine import Machine
from charkha.hardware.probe import cpu_threads, machine_identity
from charkha.plan.architecture import Architecture
from charkha.plan.memory_settings import MemorySettings
from charkha.units import format_bytes

RUNS = "runs.jsonl"  # in the folder of what this machine remembers
KEPT = 500  # runs; the oldest go when there are twice as many
# Of published runs on GPUs nine of ten take at most this times the planned time (docs/plan-accuracy.md). Nobody
# publishes runs on CPUs: there it is the 90th percentile of benchmarks/results/probe.json, on cores that were shared.
PUBLISHED_P90 = {"cuda": 1.23, "mps": 1.23, "cpu": 2.75}
_PRIOR_RUNS_RATIO, _PRIOR_RUNS_SPREAD = 0.25, 3.0
_ONE_IN_TEN = 1.2816  # standard deviations above the mean that a tenth of a normal distribution lies beyond
_FARTHEST, _NEAREST_COUNT = math.log(8), 9
_WORTH_SAYING = 1.02  # of the planned memory
_FARTHEST_OFF = 100.0  # times the planned time, or that part of it, that a finished run is believed


@dataclass(frozen=True)
class RunShape:
    """What makes two runs alike. `machine`, `planner` and `settings` are hashes."""

    machine: str
    device: str  # names of cards, or the processor and its threads
    processes: int
    dtype: str
    method: str  # full | adapter
    quantization: str
    streamed: bool
    checkpointing: bool
    parameters: int
    positions: int  # of the longest micro batch
    longest: int  # row, in tokens
    settings: str
    planner: str  # the speed model that planned the time


@dataclass(frozen=True)
class FinishedRun:
    """One run to its end: planned and measured."""

    shape: RunShape
    steps: int
    planned_seconds: float
    measured_seconds: float
    planned_bytes: int | None
    measured_bytes: int | None
    finished_unix_s: int


@dataclass(frozen=True)
class Correction:
    """`ratio` is what a planned time is multiplied with, `p90` what the result is for nine of ten runs."""

    runs: int
    ratio: float
    p90: float
    reasons: tuple[str, ...]


def shape_here(architecture: Architecture, settings: MemorySettings, machine: Machine) -> RunShape:
    """The shape of a run of these settings on this computer."""
    return shape_of(architecture, settings, machine=machine_identity(), device=machine.name, threads=cpu_threads())


def shape_of(
    architecture: Architecture, settings: MemorySettings, *, machine: str, device: str, threads: int
) -> RunShape:
    """The shape of a run of these settings on the device of that name."""
    told = asdict(settings) | {"offload": sorted(settings.offload), "trained_positions": None}
    del told["held_out"]  # how the data was split is nothing of the step
    return RunShape(
        machine=machine,
        device=device if settings.device != "cpu" else f"{device}, {threads} threads",
        processes=settings.processes,
        dtype=settings.dtype,
        method="full" if settings.is_full else "adapter",
        quantization=settings.quantization,
        streamed=settings.streamed,
        checkpointing=settings.gradient_checkpointing,
        parameters=architecture.parameters,
        positions=settings.positions,
        longest=settings.tokens,
        settings=_hash(json.dumps([told, architecture.parameters, architecture.layers], sort_keys=True).encode()),
        planner=planner_fingerprint(),
    )


def planner_fingerprint() -> str:
    """A hash of the source that plans time: what another version planned says nothing about this one's error."""
    names = ("speed.py", "pace.py", "rows.py", "streamed.py", "streamed_time.py", "measured_time.py", "schedule.py")
    sources = [Path(__file__).with_name(name) for name in names]
    return _hash(b"".join(path.read_bytes() for path in (*sources, TABLE)))  # of figures of cards, which it rests on


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def line_of(run: FinishedRun) -> str:
    """One line of the history file."""
    return json.dumps({"version": 1, **asdict(run)})


def runs_of(lines: Iterable[str]) -> tuple[list[FinishedRun], int]:
    """(runs, how many lines are damaged, of another version, or cannot be true)."""
    runs, damaged = [], 0
    for line in lines:
        run = _run_of(line)
        if run is None:
            damaged += 1
        else:
            runs.append(run)
    return runs, damaged


def _run_of(line: str) -> FinishedRun | None:
    try:
        record = json.loads(line)
        if record.pop("version") != 1:
            return None
        run = FinishedRun(**record | {"shape": RunShape(**record["shape"])})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    shape = run.shape
    numbers = (run.planned_seconds, run.measured_seconds, shape.parameters, shape.positions, shape.longest, run.steps)
    good = all(_is_positive(number) for number in (*numbers, run.finished_unix_s))
    sizes = all(size is None or _is_positive(size) for size in (run.planned_bytes, run.measured_bytes))
    words = all(isinstance(getattr(shape, one.name), str) for one in fields(RunShape) if one.type == "str")
    return run if good and sizes and words and _is_plausible(run) else None


def _is_plausible(run: FinishedRun) -> bool:
    """Whether it can be what a computer did: a clock that was set, or another unit, may not spoil the next plan."""
    return 1 / _FARTHEST_OFF <= run.measured_seconds / run.planned_seconds <= _FARTHEST_OFF


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def correction(runs: Sequence[FinishedRun], shape: RunShape, backend: str, planned_bytes: int) -> Correction:
    """What these runs say about a plan of that shape; `backend` is cpu, cuda or mps."""
    near = _nearest(runs, shape)
    logs = [math.log(run.measured_seconds / run.planned_seconds) for run in near]
    middle = statistics.median(logs) if logs else 0.0
    ratio = math.exp(middle * len(logs) / (len(logs) + _PRIOR_RUNS_RATIO))
    spread = _spread([value - middle for value in logs], math.log(PUBLISHED_P90[backend]) / _ONE_IN_TEN)
    return Correction(
        runs=len(near),
        ratio=ratio,
        p90=math.exp(_ONE_IN_TEN * spread),
        reasons=(*_time_reason(near, math.exp(middle), ratio, shape), *_memory_reason(near, shape, planned_bytes)),
    )


def _nearest(runs: Sequence[FinishedRun], shape: RunShape) -> list[FinishedRun]:
    same = ("machine", "device", "processes", "dtype", "method", "quantization", "streamed", "planner")
    alike = [run for run in runs if all(getattr(run.shape, key) == getattr(shape, key) for key in same)]
    told = [(_distance(run.shape, shape), -run.finished_unix_s, place) for place, run in enumerate(alike)]
    return [alike[place] for distance, _when, place in sorted(told)[:_NEAREST_COUNT] if distance <= _FARTHEST]


def _distance(one: RunShape, other: RunShape) -> float:
    """In natural logarithms: twice the parameters is 0.7 away, twice the positions or the length half of that."""
    size = abs(math.log(one.parameters / other.parameters))
    length = abs(math.log(one.positions / other.positions)) + abs(math.log(one.longest / other.longest))
    return size + length / 2 + (0.5 if one.checkpointing != other.checkpointing else 0.0)


def _spread(residuals: Sequence[float], published: float) -> float:
    """Standard deviation of the residuals, with that of published runs counted as three more."""
    squares = _PRIOR_RUNS_SPREAD * published**2 + sum(residual**2 for residual in residuals)
    return math.sqrt(squares / (_PRIOR_RUNS_SPREAD + len(residuals)))


def _time_reason(near: Sequence[FinishedRun], middle: float, ratio: float, shape: RunShape) -> list[str]:
    if not near:
        return []
    runs = f"{len(near)} finished run{'s' * (len(near) != 1)} like this on this {_device_word(shape)}"
    return [f"time: {runs} took {middle:.2f} times the planned time, so the plan is multiplied by {ratio:.2f}"]


def _device_word(shape: RunShape) -> str:
    return "processor" if shape.device.endswith("threads") else "GPU" if shape.processes == 1 else "machine"


def _memory_reason(near: Sequence[FinishedRun], shape: RunShape, planned_bytes: int) -> list[str]:
    """What the very same settings held; of other shapes only that they held more than was planned for them."""
    same = [run.measured_bytes for run in near if run.shape.settings == shape.settings and run.measured_bytes]
    if same:
        return [
            f"memory: runs of the same settings held {format_bytes(max(same))}, planned {format_bytes(planned_bytes)}"
        ]
    over = [run.measured_bytes / run.planned_bytes for run in near if run.measured_bytes and run.planned_bytes]
    if over and statistics.median(over) > _WORTH_SAYING:
        return [
            f"memory: runs like this held {statistics.median(over):.2f} times what was planned; leave that much room"
        ]
    return []
