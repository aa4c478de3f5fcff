"""A plan's time, energy and money corrected by what finished runs of this machine took."""

from __future__ import annotations

from typing import Any

from charkha.caches import history_folder
from charkha.config import Config
from charkha.hardware.machine import Machine
from charkha.plan.architecture import Architecture
from charkha.plan.history import KEPT, RUNS, correction, runs_of, shape_here
from charkha.plan.memory_settings import MemorySettings
from charkha.store.jsonl import read_lines
from charkha.training.plan_record import with_time


def corrected_by_history(
    record: dict[str, Any], config: Config, architecture: Architecture, settings: MemorySettings, machine: Machine
) -> float:
    """Corrects time, energy and money in `record` by what finished runs of this machine took; returns the ratio.

    Writes `seconds_p90` in any case: from the scatter of those runs, or of published ones where there are none.
    """
    folder = history_folder() if machine.here else None
    lines = [] if folder is None else read_lines(folder / RUNS)[-2 * KEPT :]  # no more are ever kept
    runs, damaged = runs_of(lines)
    shape = shape_here(architecture, settings, machine)
    found = correction(runs, shape, settings.device, record["peak_allocated_bytes"])
    seconds = None if record["seconds"] is None else record["seconds"] * found.ratio
    p90 = None if seconds is None else seconds * found.p90
    with_time(record, config, machine, seconds, p90, record["tokens_per_second"] / found.ratio)
    record["history"] = {"runs": found.runs, "ratio": round(found.ratio, 3), "damaged_lines": damaged}
    record["reasons"] += found.reasons
    if damaged:
        record["reasons"].append(
            f"history: {damaged} of {len(lines)} lines in {folder} cannot be read, or cannot be true, and are left out"
        )
    return found.ratio


def scaled(alternatives: list[dict[str, Any]], ratio: float) -> list[dict[str, Any]]:
    """Alternatives with their time multiplied like that of the plan itself."""
    for one in alternatives:
        for name in ("seconds", "energy_kwh", "electricity"):
            if one.get(name) is not None:
                one[name] = round(one[name] * ratio, 3)
        if "tokens_per_second" in one:
            one["tokens_per_second"] = round(one["tokens_per_second"] / ratio, 1)
    return alternatives
