"""The record of a plan, for `charkha plan` to print and for a run to keep: what it needs, how long, and why."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from charkha.config import Config
from charkha.hardware.machine import Machine
from charkha.plan.architecture import Architecture
from charkha.plan.cost import Cost, run_cost
from charkha.plan.device_memory import disk_bytes, host_memory_bytes
from charkha.plan.history import PUBLISHED_P90
from charkha.plan.memory import EVALUATION
from charkha.plan.memory_settings import MemorySettings
from charkha.plan.pace import epoch_seconds
from charkha.plan.rows import Rows
from charkha.plan.search import Candidate, fallbacks
from charkha.training.planned_generation import generation_record
from charkha.training.planned_streaming import streamed_plan
from charkha.training.planned_trace import Traced
from charkha.units import format_bytes


def plan_record(
    config: Config, architecture: Architecture, machine: Machine, rows: Rows, found: Candidate, trace: Traced
) -> dict[str, Any]:
    """The JSON contract of a plan but for `alternatives`; `reasons` are those of the method; see `verdicts`."""
    settings, memory = found.settings, found.memory
    traced = None if trace.why_not else trace
    allocated = traced.allocated_bytes if traced else memory.allocated
    reserved = memory.reserved
    if traced:  # of rows of one length; what varying ones leave behind is the closed form's to say
        outgrown = memory.fragmentation if settings.lengths_vary and settings.device == "cuda" else 0
        reserved = max(traced.reserved_bytes, allocated + outgrown)
    tokens = int(rows.mean * (rows.count or 0))
    host = host_memory_bytes(architecture, settings, tokens) + (allocated if settings.device == "cpu" else 0)
    disk = disk_bytes(architecture, settings, dataset_tokens=tokens, checkpoints_kept=config.checkpoint.keep)
    seconds = run_seconds(config, architecture, machine, rows, found)
    record = {
        "fits": _fits(found, machine, allocated, host, disk),
        "method": "trace" if traced else "closed_form",
        "machine": machine.name,
        "devices": settings.processes,
        "peak_allocated_bytes": allocated,
        "peak_reserved_bytes": reserved,
        "peak_device_bytes": reserved + memory.context,
        "least_device_bytes": _least(found, allocated),
        "device_limit_bytes": found.limit_bytes,
        "breakdown": dict(traced.breakdown or {}) if traced else found.preview.breakdown,
        "peak_moment": traced.peak_moment if traced else found.preview.peak_moment,
        "moments": found.preview.moments,
        "evaluation": _evaluation(found),
        "generation": generation_record(architecture, found),
        "trainable_parameters": found.preview.trainable_parameters,
        "total_parameters": architecture.parameters,
        "active_parameters": architecture.active_parameters,
        "host_ram_bytes": host,
        "disk_bytes": disk,
        "settings": _settings_record(settings),
        "fallbacks": list(fallbacks(settings)),
    }
    streamed = streamed_plan(architecture, found, machine, host)
    record["streaming"] = streamed.record if streamed else None
    p90 = None if seconds is None else seconds * PUBLISHED_P90[settings.device]
    with_time(record, config, machine, seconds, p90, tokens_per_second(config, architecture, machine, rows, found))
    by = [f"method: closed_form ({trace.why_not})", *found.preview.notes] if trace.why_not else []
    return {**record, "reasons": [*by, *(streamed.reasons if streamed else ())]}


def run_seconds(
    config: Config, architecture: Architecture, machine: Machine, rows: Rows, found: Candidate
) -> float | None:
    """Of all optimizer steps, over the rows as they are; None where nobody knows how many there are."""
    training = config.training
    steps_an_epoch = rows.steps(training.batch_size)
    steps = training.max_steps
    if steps is None:
        if rows.count is None:
            return None
        steps = max(1, round(training.epochs * steps_an_epoch))
    return steps * epoch_seconds(architecture, found.settings, machine, rows, training.batch_size) / steps_an_epoch


def tokens_per_second(
    config: Config, architecture: Architecture, machine: Machine, rows: Rows, found: Candidate
) -> float:
    """Tokens without padding; where rows are not counted, of full-length ones."""
    settings = found.settings
    if rows.tokens is None or settings.tokens != rows.longest:
        return found.tokens_per_second
    return rows.tokens / epoch_seconds(architecture, settings, machine, rows, config.training.batch_size)


def _least(found: Candidate, allocated: int) -> int:
    """The smallest card that would do: the closed form's, by as much more or less as the trace finds alive."""
    return found.memory.least + allocated - found.memory.allocated


def _fits(found: Candidate, machine: Machine, allocated: int, host: int, disk: int) -> bool:
    least = _least(found, allocated)
    device = found.limit_bytes is None or least <= found.limit_bytes
    ram = machine.ram_bytes is None or host <= machine.ram_bytes
    return device and ram and (machine.disk_free_bytes is None or disk <= machine.disk_free_bytes)


def _evaluation(found: Candidate) -> dict[str, int] | None:
    """The held-out batch that needs most, in closed form; None where nothing is held out."""
    held_out = found.preview.held_out
    if held_out is None:
        return None
    rows, tokens = held_out.batch.rows, held_out.batch.tokens
    return {"rows": rows, "tokens": tokens, "peak_allocated_bytes": found.preview.held_out_bytes}


def _settings_record(settings: MemorySettings) -> dict[str, Any]:
    return asdict(settings) | {"offload": sorted(settings.offload)}


def verdicts(record: dict[str, Any], found: Candidate, machine: Machine) -> list[str]:
    """What does not fit, by how much; and host memory beside the usual rule where it is known."""
    said = []
    if record["peak_moment"] == EVALUATION and found.preview.held_out:
        batch, step = found.preview.held_out.batch, format_bytes(found.preview.step_bytes)
        together = f"{batch.rows} row{'s' * (batch.rows > 1)} of {batch.tokens} tokens"
        logits = "with all logits" if found.settings.loss_head == "full" else "logits in chunks"
        said.append(f"memory: the held-out loss is the peak ({together}, {logits}); a step needs {step}")
    if found.settings.lengths_vary and machine.device == "cuda":
        outgrown = format_bytes(found.memory.fragmentation)
        said.append(f"reserved counts {outgrown} of blocks that longer rows outgrow; they are given back when needed")
    least, limit = record["least_device_bytes"], found.limit_bytes
    if limit and least > limit:
        said.append(f"does not fit: {format_bytes(least)} is the least, {machine.name} has {format_bytes(limit)} each")
    if machine.ram_bytes is not None and record["host_ram_bytes"] > machine.ram_bytes:
        said.append(f"host memory: {format_bytes(record['host_ram_bytes'])} of {format_bytes(machine.ram_bytes)}")
    if machine.disk_free_bytes is not None and record["disk_bytes"] > machine.disk_free_bytes:
        said.append(f"disk: {format_bytes(record['disk_bytes'])} of {format_bytes(machine.disk_free_bytes)} free")
    return said


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
