"""Seconds of a run with what follows from them, energy and money, in the record of a plan."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from charkha.caches import history_folder
from charkha.config import Config
from charkha.hardware.machine import Machine
from charkha.plan.architecture import Architecture
from charkha.plan.cost import Cost, run_cost
from charkha.plan.history import RUNS, correction, runs_of, shape_here
from charkha.plan.memory_settings import MemorySettings
from charkha.plan.rows import Rows
from charkha.plan.search import Candidate
from charkha.store.jsonl import read_lines
from charkha.training.choices import steps_of_an_epoch

if TYPE_CHECKING:  # which imports NumPy
    from charkha.plan.schedule import Schedule


def _schedule(config: Config, rows: Rows, settings: MemorySettings) -> Schedule | None:
    """Every micro batch of the run; None where the lengths of the rows are not known."""
    if rows.lengths is None or settings.tokens != rows.longest:
        return None
    from charkha.plan.schedule import schedule_of

    return schedule_of(
        rows.lengths,
        batch_size=config.training.batch_size,
        micro_batch_size=settings.rows,
        total_steps=_steps(config, rows.count or 0),
        seed=config.training.seed,
        fingerprint=rows.fingerprint,
        packed_row_tokens=rows.longest if rows.packed else None,
    )


def _steps(config: Config, rows: int) -> int:
    epoch = steps_of_an_epoch(config, rows)
    return config.training.max_steps or max(1, round(config.training.epochs * epoch))


def planned_time(
    config: Config, architecture: Architecture, machine: Machine, rows: Rows, found: Candidate
) -> tuple[float | None, float]:
    """(seconds of all optimizer steps, tokens per second without padding); no seconds without a number of steps."""
    schedule = _schedule(config, rows, found.settings)
    if schedule is not None:
        from charkha.plan.measured_time import closed_form_seconds

        seconds = closed_form_seconds(architecture, found.settings, machine, schedule)
        return seconds, schedule.tokens / seconds
    filled = rows.mean / rows.longest if rows.known else 1.0
    rate = found.tokens_per_second * filled
    if config.training.max_steps is None and rows.count is None:
        return None, rate
    return _steps(config, rows.count or 0) * found.time.step_seconds(found.settings.accumulation_steps), rate


def corrected_by_history(
    record: dict[str, Any], config: Config, architecture: Architecture, settings: MemorySettings, machine: Machine
) -> float:
    """Corrects time, energy and money in `record` by what finished runs of this machine took; returns the ratio.

    Writes `seconds_p90` in any case: from the scatter of those runs, or of published ones where there are none.
    """
    folder = history_folder() if machine.here else None
    lines = [] if folder is None else read_lines(folder / RUNS)
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
            f"history: {damaged} of {len(lines)} lines in {folder} cannot be read and are left out"
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


def with_time(
    record: dict[str, Any],
    config: Config,
    machine: Machine,
    seconds: float | None,
    seconds_p90: float | None,
    tokens_per_second: float,
) -> None:
    """Writes time, energy and money into `record`; None where nobody knows how many steps there are."""
    cost = run_cost(
        machine,
        seconds or 0.0,
        currency=config.cost.currency,
        electricity_per_kwh=config.cost.electricity_per_kwh,
    )
    record |= {
        "tokens_per_second": round(tokens_per_second, 1),
        "seconds": None if seconds is None else round(seconds, 1),
        "seconds_p90": None if seconds_p90 is None else round(seconds_p90, 1),
        "energy_kwh": None if seconds is None else round(cost.energy_kwh, 3),
        "cost": _cost_record(cost, config, known=seconds is not None),
    }


def _cost_record(cost: Cost, config: Config, *, known: bool) -> dict[str, Any]:
    return {
        "currency": cost.currency,
        "electricity": round(cost.electricity, 2) if known else None,
        "electricity_per_kwh": config.cost.electricity_per_kwh,
        "rental_equivalent": round(cost.rental_equivalent, 2) if known and cost.rental_equivalent is not None else None,
        "rental_provider": cost.rental_provider,
        "rental_origin": None if cost.rental_origin is None else asdict(cost.rental_origin),
        "wall_w": round(cost.wall_w),
        "ups_minutes": cost.ups_minutes,
        "ups_wh": round(cost.ups_wh, 1),
    }
