"""Whether a new run is begun at all, by what its plan says of memory; what would fit where it does not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from charkha.config import Config
from charkha.errors import DoesNotFit
from charkha.hardware.machine import Machine
from charkha.plan.architecture import Architecture
from charkha.plan.autos import Way
from charkha.plan.device_memory import host_memory_bytes
from charkha.plan.rows import Rows
from charkha.plan.search import longest_that_fits, machines_that_fit, propose
from charkha.training.planned_settings import PlannedSettings
from charkha.units import format_bytes

_MACHINES_NAMED = 4


def require_memory(
    config: Config, architecture: Architecture, machine: Machine, rows: Rows, planned: PlannedSettings
) -> None:
    """Returns where the run fits, or might by the planner's own error. Raises DoesNotFit with what would fit."""
    if planned.way.fit != "too_much":
        return
    raise DoesNotFit(
        f"the plan says that this run does not fit: {_figures(architecture, planned.way, machine)}",
        where="training",
        remedy="\n  ".join(["one of these:", *_remedies(config, architecture, machine, rows, planned)]),
    )


def fit_note(architecture: Architecture, planned: PlannedSettings, machine: Machine) -> str | None:
    """What to say of a run that is begun with little room, or none by its plan."""
    if planned.way.fit in ("unknown", "roomy", "spare"):
        return None
    candidate = planned.way.candidate
    if candidate.device_fits and not candidate.host_fits:
        host = format_bytes(host_memory_bytes(architecture, planned.settings, 0))
        ram = format_bytes(machine.ram_bytes or 0)
        return f"host memory is short: about {host} are needed, and this computer has {ram}"
    figures = _figures(architecture, planned.way, machine)
    if planned.way.fit == "bare":
        return f"memory is short: {figures}; that is less room than a plan may be off by"
    wrong = "a plan may be off by that much" if planned.way.fit == "near" else "by more than a plan is usually off by"
    return f"the plan says that this run does not fit: {figures}; {wrong}"


def disk_note(record: Mapping[str, Any], machine: Machine) -> list[str]:
    """What to say of a run whose `record` is of more than the disk has free: it is begun, for a disk can be cleared."""
    needed, free = record.get("disk_bytes"), machine.disk_free_bytes
    if needed is None or free is None or needed <= free:
        return []
    sizes = f"{format_bytes(needed)} by the plan, and {format_bytes(free)} are free"
    return [f"the disk is short: the run writes {sizes}; a checkpoint that finds no room waits until there is some"]


def _figures(architecture: Architecture, way: Way, machine: Machine) -> str:
    needs, settings = format_bytes(way.needs), way.settings
    if not machine.gpus:
        each = f"{settings.processes} processes of " if settings.processes > 1 else ""
        program = format_bytes(host_memory_bytes(architecture, settings, 0) // settings.processes)
        free, all_of_it = format_bytes(machine.limit_bytes or 0), format_bytes(machine.ram_bytes or 0)
        return f"it needs at least {each}{needs} beside {program} of the program, and {free} of {all_of_it} are free"
    limit, whole = way.candidate.limit_bytes or 0, machine.gpus[0].memory_bytes
    of = f" of {format_bytes(whole)}" if whole > limit else ""
    return f"it needs at least {needs}, and {machine.name} has {format_bytes(limit)}{of} free"


def _remedies(
    config: Config, architecture: Architecture, machine: Machine, rows: Rows, planned: PlannedSettings
) -> Iterator[str]:
    settings = planned.settings
    told = set()
    stored = planned.is_stored_quantized
    for proposal in propose(architecture, settings, machine, rows, is_stored_quantized=stored):
        changes = {key: value for key, value in proposal.changes.items() if not _is_auto(config, key)}
        text = " ".join(f"--set {key}={value}" for key, value in changes.items())
        if text and text not in told and proposal.name != "longest_context":
            told.add(text)
            yield f"{text} (needs {format_bytes(proposal.candidate.memory.least)})"
    tokens = longest_that_fits(architecture, settings, machine)
    if tokens:
        yield f"rows of at most {tokens} tokens: data.max_length: {tokens}, with data.overlong: drop or split"
    machines = machines_that_fit(architecture, settings)[:_MACHINES_NAMED]
    if machines:
        yield f"a larger machine: {', '.join(f'{count} x {gpu}' for count, gpu in machines)}"
    yield "free memory that other programs hold" if machine.here else "another machine"
    yield "--ignore-plan, which begins all the same"


def _is_auto(config: Config, key: str) -> bool:
    section, name = key.split(".")
    return bool(getattr(getattr(config, section), name) == "auto")
