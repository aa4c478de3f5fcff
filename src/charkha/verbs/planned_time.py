"""Seconds of a run with what follows from them, energy and money, in the record of a plan."""

from __future__ import annotations

from typing import Any

from charkha.config import Config
from charkha.hardware.machine import Machine
from charkha.plan.cost import Cost, run_cost


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
        "wall_w": round(cost.wall_w),
        "ups_minutes": cost.ups_minutes,
        "ups_wh": round(cost.ups_wh, 1),
    }
