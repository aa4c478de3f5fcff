"""Where the base is held: resident where it fits, else its layers streamed, with the micro batch that moves them least.

Losses and adapters of a streamed base are those of a resident one bit for bit, whatever the slots, the layers that
stay, where the others wait, and where the embedding is. A head on the host adds up in another order: the same but for
rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from charkha.config import Config
from charkha.hardware.machine import Machine
from charkha.plan.architecture import Architecture
from charkha.plan.autos import FITTING, LOSS_HEAD, PUBLISHED_ERROR, WITH_ROOM, Free, Picked, pick
from charkha.plan.device_memory import host_memory_bytes
from charkha.plan.memory_settings import HostTables, MemorySettings
from charkha.plan.rows import Rows
from charkha.plan.search import Candidate, evaluate
from charkha.plan.streamed import RAM_LEFT_BYTES, hot_layer_bytes, moved_bytes
from charkha.plan.weights import targets_outside_layers
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
        return Placed(_streamed(config, architecture, settings, free, machine, rows), None)
    resident = pick(architecture, settings, free, machine, rows, batch)
    if asked != "auto":
        return Placed(resident, None)
    if resident.way.fit in FITTING:
        return Placed(resident, "the whole base fits on the device")
    if not settings.gradient_checkpointing:
        cannot_stream = cannot_stream or "a streamed base runs each layer twice, which the config rules out"
    if cannot_stream is not None:
        return Placed(resident, f"the whole base does not fit, but {cannot_stream}")
    streamed = _streamed(config, architecture, settings, free, machine, rows)
    if streamed.way.fit not in FITTING:
        least = format_bytes(streamed.way.needs)
        return Placed(resident, f"neither the whole base nor a streamed one fits, which needs {least} at the least")
    limit = format_bytes(resident.way.candidate.limit_bytes or 0)
    return Placed(streamed, f"resident it needs {format_bytes(resident.way.needs)} at the least, of {limit}")


def _streamed(
    config: Config,
    architecture: Architecture,
    settings: MemorySettings,
    free: Free,
    machine: Machine,
    rows: Rows,
) -> Picked:
    """Tables on the device, the embedding on the host, or both there: the first that fits with room to spare, else that
    which fits best.
    """
    batch, asked, found = config.training.batch_size, config.model.host_tables, []
    there = replace(settings, streamed=True, gradient_checkpointing=True)
    for tables in [asked] if asked != "auto" else open_tables(architecture, there, free):
        way = replace(there, host_tables=tables)
        if tables == "both" and way.loss_kernel == "own":
            way = replace(way, loss_head="chunked")
        done = partial(filled, architecture, machine=machine)
        found.append(pick(architecture, way, free, machine, rows, batch, done))
        if found[-1].way.fit in WITH_ROOM:
            return found[-1]
    fitting = [picked for picked in found if picked.way.fit in FITTING]
    return fitting[-1] if fitting else min(found, key=lambda picked: picked.way.needs)


def open_tables(architecture: Architecture, settings: MemorySettings, free: Free) -> list[HostTables]:
    """What may stay on the host, that which costs least first.

    Nothing that is trained; no head where its loss is to have all logits at once, or is the model's own.
    """
    found: list[HostTables] = ["none"]
    if settings.modules_to_save or targets_outside_layers(architecture, settings):
        return found
    if not architecture.tied_embeddings:
        found.append("embedding")
    if settings.loss_kernel == "own" and (LOSS_HEAD in free.keys or settings.loss_head == "chunked"):
        found.append("both")
    return found


def filled(architecture: Architecture, settings: MemorySettings, *, machine: Machine) -> MemorySettings:
    """The same step of a streamed base with the slots that are fastest and the layers that stay where there is room."""
    bare = replace(settings, streamed_resident_layers=0)
    found = []
    for slots in _SLOTS if machine.gpu else _SLOTS[:1]:
        there = _waiting_where_there_is_room(replace(bare, streamed_slots=slots), architecture, machine)
        hot = _layers_that_stay(evaluate(architecture, there, machine), architecture, machine)
        found.append(evaluate(architecture, replace(there, streamed_resident_layers=hot), machine))
    most = max(candidate.tokens_per_second for candidate in found)
    fast = [candidate for candidate in found if candidate.tokens_per_second >= _AS_FAST * most]

    def preference(candidate: Candidate) -> tuple[bool, int, int]:
        """Room for what the plan may be off by, then what moves least; with no such room, what needs least."""
        way, least, limit = candidate.settings, candidate.memory.least, candidate.limit_bytes
        is_tight = limit is not None and (1 + PUBLISHED_ERROR) * least > limit
        return is_tight, least if is_tight else moved_bytes(architecture, way), way.streamed_slots

    return min(fast, key=preference).settings


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
