"""Which settings fit a machine, and which of them are fastest, safest, or allow the longest rows.

Every candidate goes through the same closed form and the same speed model as the plan itself. What is varied: storage
of the base, micro batch, checkpointing, loss head, optimizer, resident or streamed base, how cards share the work.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from charkha.hardware.catalog import Gpu, catalog
from charkha.hardware.machine import Machine
from charkha.plan.architecture import Architecture
from charkha.plan.device_memory import DeviceMemory, device_memory, host_memory_bytes, room_for_tensors
from charkha.plan.memory import MemoryPreview, preview_memory
from charkha.plan.memory_settings import MemorySettings
from charkha.plan.pace import epoch_seconds
from charkha.plan.rows import Rows
from charkha.plan.speed import StepTime
from charkha.plan.streamed_time import streamed_step_time

_HEADROOM = 0.15  # of the card, that the safest settings leave free
_LONGEST_LOOKED_AT = 2**20
_CARDS_NAMED = 2
_MOST_ROWS = 1024  # of a micro batch, that are looked at


@dataclass(frozen=True)
class Candidate:
    """Settings with what they need and reach on one machine."""

    settings: MemorySettings
    preview: MemoryPreview
    memory: DeviceMemory
    time: StepTime
    limit_bytes: int | None  # None: not known
    fits: bool
    host_fits: bool = True  # of that, the host's memory

    @property
    def tokens_per_second(self) -> float:
        """Of all cards together, padding counted, the optimizer's step shared out over its micro batches."""
        settings = self.settings
        tokens = settings.accumulation_steps * settings.positions * settings.processes
        return tokens / self.time.step_seconds(settings.accumulation_steps)


@dataclass(frozen=True)
class Proposal:
    """One answer of the search: what to change in the config, and why."""

    name: str  # fastest | safest | longest_context
    changes: dict[str, Any]  # config key -> value
    candidate: Candidate
    reason: str


def evaluate(architecture: Architecture, settings: MemorySettings, machine: Machine) -> Candidate:
    """What these settings need and reach there."""
    limit = limit_of(architecture, settings, machine)
    preview = preview_memory(architecture, settings, room_for_tensors(settings, limit))
    memory = device_memory(preview, settings, limit)
    time = streamed_step_time(architecture, settings, machine)
    host = host_memory_bytes(architecture, settings, 0) if machine.ram_bytes and machine.gpu else 0
    host_fits = host <= (machine.ram_bytes or host)
    fits = (limit is None or memory.least <= limit) and host_fits
    return Candidate(settings, preview, memory, time, limit, fits, host_fits)


def limit_of(architecture: Architecture, settings: MemorySettings, machine: Machine) -> int | None:
    """Bytes that one device has for training now; None where that is not known.

    On a CPU what the programs themselves need is taken off, and processes share the rest.
    """
    limit = machine.limit_bytes
    if machine.gpus or limit is None:
        return limit
    return max(1, (limit - host_memory_bytes(architecture, settings, 0)) // settings.processes)


def propose(
    architecture: Architecture, settings: MemorySettings, machine: Machine, rows: Rows | None = None
) -> tuple[Proposal, ...]:
    """Fastest, safest and longest-context settings that fit; none where nothing does.

    With `rows` what is fastest is so over them as they are, not over rows that are all as long as the longest.
    """
    candidates = [evaluate(architecture, varied, machine) for varied in variations(settings, machine, rows)]
    fitting = [candidate for candidate in candidates if candidate.fits]
    # A streamed base costs time and host memory: it is proposed where nothing else fits, or where it was asked for.
    if not settings.streamed and any(not candidate.settings.streamed for candidate in fitting):
        fitting = [candidate for candidate in fitting if not candidate.settings.streamed]
    if not fitting:
        return ()
    batch = settings.rows * settings.accumulation_steps * settings.processes

    def pace(candidate: Candidate) -> float:
        if rows is None or candidate.settings.tokens != rows.longest:
            return candidate.tokens_per_second
        return 1 / epoch_seconds(architecture, candidate.settings, machine, rows, batch)

    fastest = max(fitting, key=pace)
    roomy = [one for one in fitting if one.memory.least <= (1 - _HEADROOM) * (one.limit_bytes or math.inf)]
    safest = max(roomy, key=pace, default=min(fitting, key=lambda one: one.memory.least))
    longest = _longest(architecture, fitting, machine)
    return (
        _proposal("fastest", fastest, settings, "the most tokens per second of all settings tried that fit"),
        _proposal("safest", safest, settings, _safe_reason(safest)),
        _proposal("longest_context", longest, settings, f"rows of up to {longest.settings.tokens} tokens fit"),
    )


def _safe_reason(candidate: Candidate) -> str:
    free = 1 - candidate.memory.least / (candidate.limit_bytes or math.inf)
    return f"the fastest that leaves {free:.0%} of the memory free for longer rows and other programs"


def variations(settings: MemorySettings, machine: Machine, known: Rows | None = None) -> Iterator[MemorySettings]:
    """Settings to try, all of the same batch, length and method."""
    batch = settings.rows * settings.accumulation_steps * settings.processes
    for strategy, processes in _strategies(settings, machine):
        for rows in _micro_batches(batch // processes):
            shared = replace(
                settings,
                strategy=strategy,
                processes=processes,
                rows=rows,
                accumulation_steps=max(1, batch // (rows * processes)),
                trained_positions=known.trained_positions.get(rows)
                if known and settings.loss_kernel == "own"
                else None,
            )
            yield from _of_one_shape(shared, machine)


def _of_one_shape(settings: MemorySettings, machine: Machine) -> Iterable[MemorySettings]:
    storages = ["none"] if settings.is_full else [settings.quantization, "none", "nf4"]
    optimizers = [settings.optimizer, "paged_adamw_8bit"] if settings.is_full and machine.gpu else [settings.optimizer]
    # What selective checkpointing costs beside what it saves is not measured: looked at only where it was asked for.
    kinds = [(False, False), (True, False), *([(True, True)] if settings.selective else [])]
    for storage in dict.fromkeys(storages):
        for checkpointing, selective in kinds:
            for head in ("full", "chunked"):
                for optimizer in dict.fromkeys(optimizers):
                    changed: dict[str, Any] = {
                        "quantization": storage,
                        "gradient_checkpointing": checkpointing,
                        "selective": selective,
                        "loss_head": head,
                        "optimizer": optimizer,
                        "upcast_unquantized": settings.upcast_unquantized and storage != "none",
                    }
                    yield replace(settings, **changed)
                    if not settings.is_full and machine.gpu and checkpointing and head == "chunked":
                        yield replace(settings, **changed, streamed=True)


def _strategies(settings: MemorySettings, machine: Machine) -> list[tuple[Any, int]]:
    count = max(1, len(machine.gpus))
    if count == 1:
        return [("single", 1)]
    return [("ddp", count), ("fsdp", count), ("single", 1)]


def _micro_batches(per_device: int) -> list[int]:
    sizes = [size for size in range(1, min(max(1, per_device), _MOST_ROWS) + 1) if per_device % size == 0]
    return sizes if len(sizes) <= 6 else [*sizes[:5], sizes[-1]]


def longest_that_fits(architecture: Architecture, settings: MemorySettings, machine: Machine) -> int | None:
    """Tokens of the longest row with which these settings fit, at most as many as they have; None where none does."""
    low, high = 0, settings.tokens
    while high - low > max(8, low // 50):
        middle = (low + high) // 2
        if evaluate(architecture, settings.cut_to(middle), machine).fits:
            low = middle
        else:
            high = middle
    return low - low % 8 or None


def _longest(architecture: Architecture, fitting: list[Candidate], machine: Machine) -> Candidate:
    """The longest rows, by halving, of the settings that need least when one row is long."""
    most = min(architecture.max_positions or _LONGEST_LOOKED_AT, _LONGEST_LOOKED_AT)
    single = dict.fromkeys(replace(one.settings, rows=1, tokens=min(8 * one.settings.tokens, most)) for one in fitting)
    leanest = min(single, key=lambda one: evaluate(architecture, one, machine).memory.least)
    base = replace(leanest, tokens=fitting[0].settings.tokens)
    low, high = min(base.tokens, most), most
    while high - low > max(64, low // 50):
        middle = (low + high) // 2
        if evaluate(architecture, replace(base, tokens=middle), machine).fits:
            low = middle
        else:
            high = middle
    tokens = most if evaluate(architecture, replace(base, tokens=most), machine).fits else low - low % 64
    return evaluate(architecture, replace(base, tokens=max(tokens, min(base.tokens, most))), machine)


# Which config key says what a setting holds, and how.
_KEYS: dict[str, str] = {
    "quantization": "model.quantization",
    "rows": "training.micro_batch_size",
    "tokens": "data.max_length",
    "loss_head": "training.loss_head",
    "optimizer": "training.optimizer",
    "strategy": "devices.strategy",
    "processes": "devices.processes",
}


def _proposal(name: str, candidate: Candidate, asked: MemorySettings, reason: str) -> Proposal:
    found = candidate.settings
    changes = {
        key: getattr(found, field) for field, key in _KEYS.items() if getattr(found, field) != getattr(asked, field)
    }
    if (found.gradient_checkpointing, found.selective) != (asked.gradient_checkpointing, asked.selective):
        kind = "selective" if found.selective else "full" if found.gradient_checkpointing else "none"
        changes["training.gradient_checkpointing"] = kind
    if found.streamed != asked.streamed:
        changes["model.placement"] = "streamed" if found.streamed else "resident"
    return Proposal(name, changes, candidate, reason)


def fallbacks(settings: MemorySettings) -> tuple[dict[str, Any], ...]:
    """Changes to make one after another when memory runs out all the same; none changes what is learned."""
    no_chunks = settings.loss_kernel != "own"
    head = "chunked" if no_chunks else settings.loss_head
    return fallback_steps(head, settings.gradient_checkpointing and not settings.selective, settings.rows)


def fallback_steps(loss_head: str, recomputes: bool, rows: int) -> tuple[dict[str, Any], ...]:
    """The same of a step whose memory is not counted; `recomputes` is whether all of a layer is run again already."""
    steps: list[dict[str, Any]] = []
    if loss_head == "full":
        steps.append({"training.loss_head": "chunked"})
    if not recomputes:
        steps.append({"training.gradient_checkpointing": "full"})
    while rows > 1:
        rows //= 2
        steps.append({"training.micro_batch_size": rows})
    return tuple(steps)


def machines_that_fit(architecture: Architecture, settings: MemorySettings) -> tuple[tuple[int, str], ...]:
    """(cards, name) of machines that would hold these settings, for 1 to 16 equal cards the two smallest each.

    Several cards hold shards, and every card works on one row; machines larger than the batch are not looked at.
    """
    found: list[tuple[int, str]] = []
    batch = settings.rows * settings.accumulation_steps * settings.processes
    for count in (1, 2, 4, 8, 16):
        if count > batch:
            break
        names = [gpu.name for gpu in _by_memory() if _holds(architecture, settings, gpu, count)]
        found += [(count, name) for name in names[:_CARDS_NAMED]]
    return tuple(found)


def _by_memory() -> list[Gpu]:
    kinds = ("desktop", "workstation", "datacenter")
    return sorted((gpu for gpu in catalog() if gpu.kind in kinds), key=lambda gpu: (gpu.memory_bytes, gpu.power_w))


def _holds(architecture: Architecture, settings: MemorySettings, gpu: Gpu, count: int) -> bool:
    there = replace(settings, device="cuda")
    if count != settings.processes or count > 1:
        strategy = settings.strategy if settings.strategy != "single" else "fsdp"
        batch = settings.rows * settings.accumulation_steps * settings.processes
        rows = min(settings.rows, batch // count) if count == settings.processes else 1
        there = replace(
            there,
            strategy=strategy if count > 1 else "single",
            processes=count,
            rows=rows,
            accumulation_steps=max(1, batch // (rows * count)),
        )
    return evaluate(architecture, there, Machine(gpu.name, (gpu,) * count, None)).fits
