"""Where the base is held: resident where it fits, else its layers streamed, with the micro batch that moves them least.

Nothing here changes what is learned: losses and adapters of a streamed base are those of a resident one, whatever the
slots, the layers that stay, and where the others wait.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from charkha.config import Config
from charkha.hardware.machine import Machine
from charkha.plan.architecture import Architecture
from charkha.plan.autos import FITTING, PUBLISHED_ERROR, Free, Picked, pick
from charkha.plan.device_memory import host_memory_bytes
from charkha.plan.memory_settings import MemorySettings
from charkha.plan.rows import Rows
from charkha.plan.search import Candidate, evaluate
from charkha.plan.streamed import RAM_LEFT_BYTES, hot_layer_bytes, moved_bytes
from charkha.units import format_bytes

_SLOTS = (2, 3, 4)  # that are looked at on a GPU; more of them even out layers of which some have hot ones between
_AS_FAST = 0.995  # of the fastest number of slots; of those, what moves least


@dataclass(frozen=True)
class Placed:
    """What was picked, and why its placement is what it is; `reason` None where the config says it."""

    picked: Picked
    reason: str | None


def place(
    config: Config,
    architecture: Architecture,
    settings: MemorySettings,
    free: Free,
    machine: Machine,
    rows: Rows,
    cannot_stream: str | None,
) -> Placed:
    """The best way with the placement that is asked for or found. `settings` hold what is not free, resident.

    `cannot_stream` is why this base cannot be streamed; asked for all the same, that is refused elsewhere.
    """
    batch, asked = config.training.batch_size, config.model.placement
    if asked == "streamed" and not settings.is_full:
        return Placed(_streamed(architecture, settings, free, machine, rows, batch), None)
    resident = pick(architecture, settings, free, machine, rows, batch)
    if asked != "auto":
        return Placed(resident, None)
    if resident.way.fit in FITTING:
        return Placed(resident, "the whole base fits on the device")
    if not settings.gradient_checkpointing:
        cannot_stream = cannot_stream or "a streamed base runs each layer twice, which the config rules out"
    if cannot_stream is not None:
        return Placed(resident, f"the whole base does not fit, but {cannot_stream}")
    streamed = _streamed(architecture, settings, free, machine, rows, batch)
    if streamed.way.fit not in FITTING:
        return Placed(resident, "neither the whole base nor a streamed one fits")
    limit = format_bytes(resident.way.candidate.limit_bytes or 0)
    return Placed(streamed, f"resident it needs {format_bytes(resident.way.needs)} at the least, of {limit}")


def _streamed(
    architecture: Architecture, settings: MemorySettings, free: Free, machine: Machine, rows: Rows, batch: int
) -> Picked:
    there = replace(settings, streamed=True, gradient_checkpointing=True, selective=False)
    return pick(architecture, there, free, machine, rows, batch, lambda way: filled(architecture, way, machine))


def filled(architecture: Architecture, settings: MemorySettings, machine: Machine) -> MemorySettings:
    """The same step of a streamed base with the slots that are fastest and the layers that stay where there is room."""
    bare = replace(settings, streamed_resident_layers=0)
    found = []
    for slots in _SLOTS if machine.gpu else _SLOTS[:1]:
        there = _waiting_where_there_is_room(replace(bare, streamed_slots=slots), architecture, machine)
        hot = _layers_that_stay(evaluate(architecture, there, machine), architecture, machine)
        found.append(evaluate(architecture, replace(there, streamed_resident_layers=hot), machine))
    most = max(candidate.tokens_per_second for candidate in found)
    fast = [candidate.settings for candidate in found if candidate.tokens_per_second >= _AS_FAST * most]
    return min(fast, key=lambda way: (moved_bytes(architecture, way), way.streamed_slots))


def _waiting_where_there_is_room(
    settings: MemorySettings, architecture: Architecture, machine: Machine
) -> MemorySettings:
    """In host memory where that holds them and the rest, else on the disk."""
    in_ram = replace(settings, streamed_from="ram")
    needed = host_memory_bytes(architecture, in_ram, 0) + RAM_LEFT_BYTES
    if settings.device == "cpu" or machine.ram_bytes is None or needed <= machine.ram_bytes:
        return in_ram
    return replace(settings, streamed_from="disk")


def _layers_that_stay(bare: Candidate, architecture: Architecture, machine: Machine) -> int:
    """As many as leave room for what the plan may be off by; none on a CPU, where the page cache does the same."""
    if machine.gpu is None or bare.limit_bytes is None:
        return 0
    left = bare.limit_bytes / (1 + PUBLISHED_ERROR) - bare.memory.least
    most = architecture.layers - bare.settings.streamed_slots
    return max(0, min(int(left // hot_layer_bytes(architecture, bare.settings)), most))
