"""A plan corrected by real steps on this device: what was measured takes the place of what was predicted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from charkha.backends.base import ProbedStep
from charkha.config_file import LoadedConfig
from charkha.errors import EnvironmentProblem, UsageError
from charkha.hardware.machine import Machine
from charkha.plan.architecture import Architecture
from charkha.plan.measured_time import StepModel, TimedStep, fitted, predicted_seconds
from charkha.plan.memory_settings import MemorySettings
from charkha.training.base_model import find_base
from charkha.training.probing import Probed, ProbeOutOfMemory, probe_run
from charkha.units import format_bytes, format_seconds

# Of the real runs in benchmarks/results/probe.json, on two cores that other work shared, the 90th percentile of what
# they took over what their probes said. On a computer of one's own less is to be expected; that was not measured.
PROBE_P90 = 1.55


@dataclass(frozen=True)
class Measured:
    """What a probe says of the whole run."""

    seconds: float
    tokens_per_second: float  # without padding
    allocated_bytes: int | None  # None on devices that count no live tensors
    reserved_bytes: int | None
    model: StepModel


def require_probe(loaded: LoadedConfig, gpus: Sequence[str]) -> None:
    """Raises UsageError where the run cannot be tried: on another machine, or without the base model's weights."""
    if gpus:
        raise UsageError(
            "a probe measures this device; it cannot stand beside --gpu",
            where="--probe",
            remedy="leave out --gpu to plan for this machine, or leave out --probe",
        )
    try:
        folder = find_base(loaded.config.model, loaded.folder)
    except EnvironmentProblem as problem:
        raise UsageError(
            f"a probe loads the base model: {problem.message}", where=problem.where, remedy=problem.remedy
        ) from None
    if not any(folder.glob("*.safetensors")):
        raise UsageError(
            "a probe loads the base model, and no safetensors weights are here",
            where=str(folder),
            remedy="`charkha fetch` brings them; or plan without --probe, for which config.json is enough",
        )


def with_probe(
    record: dict[str, Any],
    config: Path,
    overrides: Sequence[str],
    architecture: Architecture,
    settings: MemorySettings,
    machine: Machine,
) -> Measured | None:
    """Tries the run and writes the measured peaks into `record`, with a `probe` part; returns what it says of the run.

    None where memory is too little for it: then `fits` is false.
    """
    try:
        probed = probe_run(config, overrides)
    except ProbeOutOfMemory as problem:
        record["fits"] = False
        record["probe"] = {"out_of_memory": problem.message, "worst": None, "median": None, "corrected": None}
        record["reasons"].append(f"probe: {problem.message}; {problem.remedy}")
        return None
    measured = measured_run(probed, architecture, settings, machine)
    record["reasons"] += _sentences(record, measured, probed)
    _correct_memory(record, measured, machine)
    ram, disk = machine.ram_bytes, machine.disk_free_bytes  # the device has held it; these were not tried
    host_fits = ram is None or record["host_ram_bytes"] <= ram
    record["fits"] = host_fits and (disk is None or record["disk_bytes"] <= disk)
    record["probe"] = {
        "device": probed.device_name,
        "worst": _one(probed.result.steps, ("first", "later", "worst")),
        "median": _one(probed.result.steps, ("median",)),
        "predicted": {name: record[name] for name in ("seconds", "tokens_per_second")} | record.pop("predicted_peaks"),
        "loading_peak_bytes": probed.result.loading_peak_bytes,
    }
    return measured


def measured_run(probed: Probed, architecture: Architecture, settings: MemorySettings, machine: Machine) -> Measured:
    """The seconds of the whole run through the two-point model of plan/measured_time.py, and the peaks."""
    predicted = predicted_seconds(architecture, settings, machine)
    timed = [
        TimedStep(step.kind, tuple(zip(step.rows, step.longest, strict=True)), step.first_seconds, step.seconds)
        for step in probed.result.steps
        if step.first_seconds is not None
    ]
    model = fitted(timed, predicted)
    seconds = model.run_seconds(probed.schedule, predicted) + _beginning(probed, model, predicted)
    return Measured(
        seconds=seconds,
        tokens_per_second=probed.schedule.tokens / seconds,
        allocated_bytes=_most(
            [probed.result.loading_peak_bytes, *(step.peak_allocated_bytes for step in probed.result.steps)]
        ),
        reserved_bytes=_most(step.peak_reserved_bytes for step in probed.result.steps),
        model=model,
    )


def _beginning(probed: Probed, model: StepModel, predicted: Callable[[int, int], float]) -> float:
    """Seconds that the first steps take beyond others like them: libraries warm up, and a CPU's memory is measured.

    Training measures its first two steps on a CPU, and the one that the probe calls later.
    """
    times = {"first": 1, "later": 2 if probed.device == "cpu" else 0}
    return sum(
        times[step.kind]
        * max(0.0, step.seconds - model.step_seconds(zip(step.rows, step.longest, strict=True), predicted))
        for step in probed.result.steps
        if step.kind in times
    )


def _most(values: Iterable[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


def _one(steps: Sequence[ProbedStep], kinds: Sequence[str]) -> dict[str, Any]:
    """The JSON of one size: the timed step of median seconds, the longest row, and the most memory."""
    chosen = [step for step in steps if step.kind in kinds]
    timed = sorted((step for step in chosen if step.first_seconds is not None), key=lambda step: step.seconds)
    usual = timed[len(timed) // 2]
    return {
        "rows": sum(usual.rows),
        "longest_row": max(max(step.longest) for step in chosen),
        "tokens": usual.tokens,
        "micro_batches": len(usual.rows),
        "seconds": round(usual.seconds, 4),
        "steps": len(timed),
        "peak_allocated_bytes": _most(step.peak_allocated_bytes for step in chosen),
        "peak_reserved_bytes": _most(step.peak_reserved_bytes for step in chosen),
    }


def _correct_memory(record: dict[str, Any], measured: Measured, machine: Machine) -> None:
    """Measured peaks at the top; a term in the breakdown says by how much the prediction differs."""
    names = ("peak_allocated_bytes", "peak_reserved_bytes")
    record["predicted_peaks"] = {name: record[name] for name in names}
    if measured.allocated_bytes is None or measured.reserved_bytes is None:
        return
    difference = measured.allocated_bytes - record["peak_allocated_bytes"]
    kept = record["peak_reserved_bytes"] - record["peak_allocated_bytes"]  # of rows of many lengths, in a long run
    context = record["peak_device_bytes"] - record["peak_reserved_bytes"]
    if machine.device == "cpu":
        kept, record["host_ram_bytes"] = 0, record["host_ram_bytes"] + difference
    reserved = max(measured.reserved_bytes, measured.allocated_bytes + kept)
    limit = record["device_limit_bytes"]
    if limit:  # it has run: the allocator gives blocks back before it gives up
        reserved = max(measured.reserved_bytes, min(reserved, limit - context))
        record["least_device_bytes"] = min(record["least_device_bytes"] + difference, max(limit, reserved + context))
    record |= {
        "peak_allocated_bytes": measured.allocated_bytes,
        "peak_reserved_bytes": reserved,
        "peak_device_bytes": reserved + context,
    }
    if difference:
        record["breakdown"] = {**record["breakdown"], "measured_minus_predicted": difference}


def _sentences(record: dict[str, Any], measured: Measured, probed: Probed) -> list[str]:
    """Predicted beside measured, as reasons."""
    count = sum(step.first_seconds is not None for step in probed.result.steps)
    said = [f"probe: {count} real steps of the longest and a median micro batch on this device"]
    if measured.allocated_bytes is not None:
        predicted = record["peak_allocated_bytes"]
        said.append(
            f"memory: predicted {format_bytes(predicted)} of live tensors, measured "
            f"{format_bytes(measured.allocated_bytes)} ({measured.allocated_bytes / predicted - 1:+.1%})"
        )
    if record["seconds"] is not None:
        before, after = format_seconds(record["seconds"]), format_seconds(measured.seconds)
        micro_batches = f"{probed.schedule.micro_batches:,} micro batches of their real lengths"
        said.append(f"time: predicted {before}, by the probe {after} over {micro_batches}")
    return said
