"""A trace of readings, recorded or written by hand, and what the guard would have decided on it.

A trace is JSONL: one object a line with the fields of `Readings` (guard.py), in time order, for example
    {"time_s": 0, "gpus": [{"index": 0, "temperature_c": 71, "power_w": 341}], "may_set_power": true}
Lines without `gpu_limits` keep those of the line before.

Not covered: the readings of a trace do not answer to the decisions, as a real GPU does.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from pydantic import TypeAdapter, ValidationError

from charkha.errors import DataError, FileProblems, Problem
from charkha.guard import Decision, GuardState, Readings, decide
from charkha.guard_limits import GuardLimits
from charkha.hardware.sensors import GpuLimits, GpuReading
from charkha.hardware.ups import MainsState, UpsReading
from charkha.units import format_seconds

_READINGS = TypeAdapter(Readings)
_NESTED: dict[str, type] = {"gpus": GpuReading, "gpu_limits": GpuLimits, "mains": MainsState, "ups": UpsReading}
_UNKNOWN_LIMITS = {field.name: None for field in fields(GpuLimits)}  # a trace names those it knows


@dataclass(frozen=True)
class TraceSummary:
    """What the guard did over a trace. Times are between its first and last reading."""

    readings: int
    seconds: float
    paused_seconds: float
    saves: int
    pauses: int
    power_limit_changes: int
    highest_pace: float
    highest_temperature_c: float | None
    stop_kind: str | None
    stopped_at_s: float | None


def read_trace(path: Path) -> list[Readings]:
    """The readings of a trace. Raises DataError with file and line for what is none, or goes back in time."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        message = f"it cannot be read as a trace: {error}"
        raise DataError(message, where=str(path), remedy="give a JSONL file of readings") from None
    trace: list[Readings] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        readings = _parse_line(line, path, number)
        if trace and readings.time_s < trace[-1].time_s:
            _refuse(path, number, f"time_s {readings.time_s:g} lies before {trace[-1].time_s:g} of the line before")
        if trace and not readings.gpu_limits:
            readings = replace(readings, gpu_limits=trace[-1].gpu_limits)
        trace.append(readings)
    if not trace:
        raise DataError("it holds no readings", where=str(path), remedy="give a JSONL file of readings")
    return trace


def run_trace(trace: list[Readings], limits: GuardLimits) -> list[tuple[float, Decision]]:
    """`time_s` and decision of every reading; the last is the one that stops, if any does."""
    state, decisions = GuardState(), list[tuple[float, Decision]]()
    for readings in trace:
        decision, state = decide(readings, limits, state)
        decisions.append((readings.time_s, decision))
        if decision.action == "stop":
            break
    return decisions


def changing(decisions: list[tuple[float, Decision]]) -> list[tuple[float, Decision]]:
    """The decisions that changed something: action, a save, or something to tell."""
    kept: list[tuple[float, Decision]] = []
    action = "run"
    for time_s, decision in decisions:
        if decision.action != action or decision.save or decision.reasons or decision.notes:
            kept.append((time_s, decision))
        action = decision.action
    return kept


def summarize_trace(trace: list[Readings], decisions: list[tuple[float, Decision]]) -> TraceSummary:
    """The decisions in numbers."""
    actions = ["run", *(decision.action for _, decision in decisions)]
    steps = pairwise(decisions)
    temperatures = [gpu.temperature_c for readings in trace for gpu in readings.gpus if gpu.temperature_c is not None]
    last_s, last = decisions[-1]
    return TraceSummary(
        readings=len(trace),
        seconds=trace[-1].time_s - trace[0].time_s,
        paused_seconds=sum(after - before for (before, decision), (after, _) in steps if decision.action == "pause"),
        saves=sum(decision.save for _, decision in decisions),
        pauses=sum(now == "pause" != before for before, now in pairwise(actions)),
        power_limit_changes=sum(watts is not None for _, decision in decisions for watts in decision.power_limits_w),
        highest_pace=max(decision.pace for _, decision in decisions),
        highest_temperature_c=max(temperatures, default=None),
        stop_kind=last.stop_kind,
        stopped_at_s=last_s if last.action == "stop" else None,
    )


def describe(summary: TraceSummary) -> str:
    """The summary in one sentence."""
    hottest = summary.highest_temperature_c
    parts = [
        f"{summary.readings} readings over {format_seconds(summary.seconds)}",
        "no temperature known" if hottest is None else f"at most {hottest:g} °C",
        f"{summary.pauses} pauses ({format_seconds(summary.paused_seconds)})",
        f"{summary.saves} saves",
        f"{summary.power_limit_changes} changes of a power limit",
        f"idle at most {summary.highest_pace:.0%}",
    ]
    end = "" if summary.stop_kind is None else f"; stopped at {summary.stopped_at_s:g} s ({summary.stop_kind})"
    return ", ".join(parts) + end


def _parse_line(line: str, path: Path, number: int) -> Readings:
    try:
        record = json.loads(line, parse_constant=_no_constant)
        json.dumps(record, allow_nan=False)  # 1e999 reads as infinity
    except (ValueError, RecursionError) as error:
        _refuse(path, number, f"it is no JSON: {error}")
    unknown = _unknown_field(record)
    if unknown is not None:
        _refuse(path, number, f"{unknown} is no field of a reading")
    limits = record.get("gpu_limits")
    if isinstance(limits, list):
        record["gpu_limits"] = [_UNKNOWN_LIMITS | each if isinstance(each, dict) else each for each in limits]
    try:
        return _READINGS.validate_json(json.dumps(record), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        _refuse(path, number, f"{place}: {first['msg']}" if place else first["msg"])


def _unknown_field(record: Any) -> str | None:
    """The first name that is no field; "a value that is no object" where a line holds none."""
    if not isinstance(record, dict):
        return "a value that is no object"
    for name, value in record.items():
        if name not in {field.name for field in fields(Readings)}:
            return repr(name)
        known = {field.name for field in fields(_NESTED[name])} if name in _NESTED else set()
        for each in value if isinstance(value, list) else [value]:
            strange = sorted(set(each) - known) if isinstance(each, dict) else []
            if strange:
                return f"{strange[0]!r} in {name}"
    return None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number; write null for what is unknown")


def _refuse(path: Path, line: int, reason: str) -> NoReturn:
    problems = FileProblems(str(path), "jsonl", "utf-8", line - 1, (Problem(reason, line),))
    remedy = "each line is one object with the fields of a reading, such as time_s and gpus"
    raise DataError(reason, where=f"{path}, line {line}", remedy=remedy, files=(problems,))
