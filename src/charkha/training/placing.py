"""Where the base is held: resident where it fits, else its layers streamed, with the micro batch that moves them least.

The rules decide the same for a plan and for a run. Nothing here changes what is learned: losses and adapters of a
streamed base are those of a resident one, whatever the slots, the layers that stay, and where the others wait.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

from charkha.backends.base import Streaming
from charkha.config import Config
from charkha.hardware.machine import Machine
from charkha.plan.architecture import Architecture
from charkha.plan.device_memory import host_memory_bytes
from charkha.plan.loss_memory import with_the_loss_that_runs
from charkha.plan.memory_settings import MemorySettings
from charkha.plan.rows import Rows
from charkha.plan.search import Candidate, evaluate, limit_of
from charkha.plan.streamed import RAM_LEFT_BYTES, moved_bytes, slab_layer_bytes
from charkha.plan.streamed_time import copying, link_of
from charkha.training.choices import Chooser
from charkha.units import format_bytes

_KEY = "model.placement"
# Python, torch and its libraries in a process that trains on a CPU; 0.45 GB were measured beside the live tensors.
_CPU_PROCESS_BYTES = 512 << 20
_HEADROOM = 0.05  # of the card, that layers which stay leave free: they buy nothing but speed
_SLOTS = (2, 3, 4)  # that are looked at on a GPU; more of them even out layers of which some have hot ones between
_MOST_ROWS = 1024


@dataclass(frozen=True)
class Placed:
    """Settings with their placement, and what a person is told of it."""

    settings: MemorySettings
    reasons: tuple[str, ...] = ()


def streaming_of(architecture: Architecture, settings: MemorySettings, machine: Machine) -> Streaming | None:
    """The settings' part that the engine takes; None for a resident base. Of a CPU no share is expected."""
    if not settings.streamed:
        return None
    expected = None
    if machine.gpu is not None:
        rate = link_of(machine, settings).bytes_per_second
        expected = copying(architecture, settings, machine, rate).hidden_share
    return Streaming(settings.streamed_slots, settings.streamed_resident_layers, expected_hidden_share=expected)


def unplanned_streaming(config: Config, chooser: Chooser) -> Streaming | None:
    """For a base that the planner does not know: resident, unless streaming is asked for; then no layer stays."""
    asked = config.model.placement
    if asked == "auto":
        chooser.choose(_KEY, "resident", "what this base needs is not known")
    return Streaming() if asked == "streamed" else None


def place(
    config: Config,
    chooser: Chooser,
    settings: MemorySettings,
    architecture: Architecture,
    machine: Machine,
    rows: Rows,
    cannot_stream: str | None,
) -> Placed:
    """`settings`, which are of a resident base, with the placement that is asked for or found.

    `cannot_stream` is why this base cannot be streamed; asked for all the same, that is refused elsewhere.
    """
    asked = config.model.placement
    if asked == "resident" or settings.is_full:
        return _resident(chooser, asked, settings, "every weight is trained" if settings.is_full else "")
    if asked == "auto":
        leanest = evaluate(architecture, _leanest(config, settings), machine)
        if fits(leanest, machine):
            return _resident(chooser, asked, settings, "it fits")
        if config.training.gradient_checkpointing in ("none", False):
            cannot_stream = (
                cannot_stream or "a streamed base runs each layer twice, which gradient_checkpointing rules out"
            )
        if cannot_stream is not None:
            return _resident(chooser, asked, settings, f"it does not fit, but {cannot_stream}")
    found = _best_streamed(config, chooser, settings, architecture, machine, rows)
    if asked == "auto":
        if not fits(found, machine):
            return _resident(chooser, asked, settings, "neither that nor a streamed base fits")
        least, limit = format_bytes(leanest.memory.least), format_bytes(limit_of(machine))
        chooser.choose(_KEY, "streamed", f"resident it needs {least} at the least, {machine.name} has {limit}")
    return Placed(_chosen(chooser, found, rows, architecture.vocab_size), (_told(found, architecture),))


def fits(candidate: Candidate, machine: Machine) -> bool:
    """Whether it fits the device; on a CPU beside the process itself. A machine of unknown memory has room."""
    if not limit_of(machine):
        return True
    if machine.gpu is not None:
        return candidate.fits
    return candidate.memory.least + _CPU_PROCESS_BYTES <= candidate.limit_bytes


def _resident(chooser: Chooser, asked: str, settings: MemorySettings, why: str) -> Placed:
    if asked == "auto":
        chooser.choose(_KEY, "resident", f"the whole base is held on the device: {why}")
    return Placed(replace(settings, streamed=False))


def _leanest(config: Config, settings: MemorySettings) -> MemorySettings:
    """What the config leaves open, as small as it gets."""
    training = config.training
    changed: dict[str, Any] = {}
    if training.micro_batch_size == "auto":
        changed |= _of_rows(settings, 1) | {"trained_positions": None}
    if training.gradient_checkpointing == "auto":
        changed |= {"gradient_checkpointing": True, "selective": False}
    if training.loss_head == "auto" and settings.loss_kernel == "own":
        changed |= {"loss_head": "chunked"}
    return replace(settings, **changed)


def _of_rows(settings: MemorySettings, rows: int) -> dict[str, Any]:
    batch = settings.rows * settings.accumulation_steps
    return {"rows": rows, "accumulation_steps": -(-batch // rows)}


def _best_streamed(
    config: Config, chooser: Chooser, settings: MemorySettings, architecture: Architecture, machine: Machine, rows: Rows
) -> Candidate:
    """The fastest that fits; of those as fast within half a per cent, the one that moves least in an optimizer step.

    What fits nowhere comes back as it needs least.
    """
    batch = min(settings.rows * settings.accumulation_steps, _MOST_ROWS)
    sizes = [settings.rows]
    if config.training.micro_batch_size == "auto":
        sizes = [size for size in range(1, batch + 1) if batch % size == 0]
    found = [
        candidate
        for size in sizes
        for candidate in _of_one_size(chooser.unrecorded(), settings, architecture, machine, rows, size)
    ]
    fitting = [candidate for candidate in found if fits(candidate, machine)]
    if not fitting:
        return min(found, key=lambda candidate: candidate.memory.least)
    most = max(candidate.tokens_per_second for candidate in fitting)
    fast = [candidate for candidate in fitting if candidate.tokens_per_second > 0.995 * most]
    return min(fast, key=lambda candidate: _moved_in_a_step(candidate, architecture))


def _moved_in_a_step(candidate: Candidate, architecture: Architecture) -> tuple[int, int]:
    settings = candidate.settings
    return settings.accumulation_steps * moved_bytes(architecture, settings), settings.streamed_slots


def _of_one_size(
    chooser: Chooser, settings: MemorySettings, architecture: Architecture, machine: Machine, rows: Rows, size: int
) -> list[Candidate]:
    """That micro batch with each number of slots, the rest of the card filled with layers that stay."""
    found = []
    for slots in _SLOTS if machine.gpu else _SLOTS[:1]:
        there = replace(
            settings,
            **_of_rows(settings, size),
            trained_positions=rows.trained_positions.get(size),
            gradient_checkpointing=True,
            selective=False,
            loss_head=cast(Any, chooser.loss_head(size, rows.longest, architecture.vocab_size)),
            streamed=True,
            streamed_slots=slots,
            streamed_resident_layers=0,
        )
        there = _waiting_where_there_is_room(with_the_loss_that_runs(there, architecture), architecture, machine)
        hot = _layers_that_stay(evaluate(architecture, there, machine), architecture, machine)
        found.append(evaluate(architecture, replace(there, streamed_resident_layers=hot), machine))
    return found


def _waiting_where_there_is_room(
    settings: MemorySettings, architecture: Architecture, machine: Machine
) -> MemorySettings:
    """In host memory where that holds them and the rest; else on the disk, with a slot more for when it stutters."""
    needed = host_memory_bytes(architecture, settings, 0) + RAM_LEFT_BYTES
    if settings.device == "cpu" or machine.ram_bytes is None or needed <= machine.ram_bytes:
        return settings
    return replace(settings, streamed_from="disk")


def _layers_that_stay(bare: Candidate, architecture: Architecture, machine: Machine) -> int:
    """As many as fit beside everything else; none on a CPU, where the page cache holds what there is room for."""
    if machine.gpu is None:
        return 0
    left = (1 - _HEADROOM) * bare.limit_bytes - bare.memory.least
    most = architecture.layers - bare.settings.streamed_slots
    return max(0, min(int(left // slab_layer_bytes(architecture, bare.settings)), most))


def _chosen(chooser: Chooser, found: Candidate, rows: Rows, vocabulary: int) -> MemorySettings:
    """The candidate's settings, its choices recorded in the place of those of a resident base."""
    settings = found.settings
    chooser.streamed_step(settings.rows, rows.longest, vocabulary)
    return settings


def _told(found: Candidate, architecture: Architecture) -> str:
    settings = found.settings
    stay, slots = settings.streamed_resident_layers, settings.streamed_slots
    waits = "on the disk" if settings.streamed_from == "disk" or settings.device == "cpu" else "in host memory"
    of = architecture.layers
    return f"streamed base: {stay} of {of} layers stay on the device, {slots} slots, the others wait {waits}"
