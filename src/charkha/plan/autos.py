"""What every `auto` of memory and speed becomes: all ways that are open are counted, and one is picked, with figures.

`ways` is where the candidates are, `pick` takes the fastest that fits with room to spare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

from charkha.hardware.machine import Machine
from charkha.plan.architecture import Architecture
from charkha.plan.device_memory import device_memory
from charkha.plan.memory_settings import MemorySettings
from charkha.plan.pace import epoch_seconds
from charkha.plan.rows import Rows
from charkha.plan.search import Candidate, evaluate
from charkha.plan.streamed import hot_layer_bytes, moved_bytes
from charkha.units import format_bytes

MICRO_BATCH, CHECKPOINTING = "training.micro_batch_size", "training.gradient_checkpointing"
LOSS_HEAD, OPTIMIZER = "training.loss_head", "training.optimizer"
USUAL_OPTIMIZER, SMALL_OPTIMIZER = "adamw_torch_fused", "paged_adamw_8bit"
# The closed form is off by less in nine of ten published runs whose settings are all known (docs/plan-accuracy.md:
# 6 % of what is allocated; what the allocator reserves is known more roughly): what is picked leaves this much free,
# and what needs less than this too much is tried.
PUBLISHED_ERROR = 0.12
_AS_FAST = 1.03  # within this the speed model tells nothing apart
_LARGEST_MICRO_BATCH = 1024  # of those looked at

# roomy: with blocks of the allocator that longer rows outgrow, and the published error; spare: with the error alone;
# bare: by the figures as they are; near: too much by less than the error; too_much: by more. unknown: no limit known.
Fit = Literal["roomy", "spare", "bare", "near", "too_much", "unknown"]
FITTING: tuple[Fit, ...] = ("unknown", "roomy", "spare", "bare")
WITH_ROOM: tuple[Fit, ...] = ("unknown", "roomy", "spare")
_ORDER: tuple[Fit, ...] = ("unknown", "roomy", "spare", "bare", "near", "too_much")


@dataclass(frozen=True)
class Free:
    """Which keys are `auto`, and what may be taken for them."""

    keys: frozenset[str]
    small_optimizer: bool  # whether the package of the 8-bit optimizer is there


@dataclass(frozen=True)
class Way:
    """One way to carry out a step, with what it needs and how long an epoch takes."""

    candidate: Candidate
    seconds: float
    fit: Fit
    spare_bytes: int = 0  # of layers of a streamed base that stay because there is room

    @property
    def settings(self) -> MemorySettings:
        return self.candidate.settings

    @property
    def needs(self) -> int:
        """Bytes that the device must have."""
        return self.candidate.memory.least - self.spare_bytes


@dataclass(frozen=True)
class Picked:
    """The way taken, and why each free key is what it is."""

    way: Way
    reasons: Mapping[str, str]


def pick(
    architecture: Architecture,
    settings: MemorySettings,
    free: Free,
    machine: Machine,
    rows: Rows,
    batch_size: int,
    completed: Callable[[MemorySettings], MemorySettings] = lambda way: way,
) -> Picked:
    """The fastest way that fits with room to spare, or with as much as there is; else the one that needs least.

    Only keys in `free` differ from `settings`; batch and rows are the same in all. Of ways that are as fast as one
    another the one that computes nothing twice is taken, then the one that streams least, then the one that needs
    least. `completed` decides what else a way holds (the layers of a streamed base that stay).
    """

    def judged(way: MemorySettings) -> Way:
        candidate = completed(way)
        found = evaluate(architecture, candidate, machine)
        seconds = epoch_seconds(architecture, candidate, machine, rows, batch_size)
        stays = hot_layer_bytes(architecture, candidate) * candidate.streamed_resident_layers
        return Way(found, seconds, _fit_of_way(found), stays)

    found = [judged(way) for way in ways(settings, free, rows, batch_size)]
    usual = [way for way in found if way.settings.optimizer != SMALL_OPTIMIZER or OPTIMIZER not in free.keys]
    open_ways = usual if any(_ORDER.index(way.fit) <= _ORDER.index("bare") for way in usual) else found
    best = min((way.fit for way in open_ways), key=_ORDER.index)
    equal = [way for way in open_ways if way.fit == best]
    if best in ("near", "too_much"):
        taken = min(equal, key=lambda way: (way.needs, way.candidate.preview.step_bytes, way.seconds))
    else:
        slowest = _AS_FAST * min(way.seconds for way in equal)
        as_fast = [way for way in equal if way.seconds <= slowest]
        taken = min(
            as_fast,
            key=lambda way: (way.settings.gradient_checkpointing, _streamed_bytes(architecture, way), way.needs),
        )
    return Picked(taken, _reasons(taken, found, free, judged))


def _streamed_bytes(architecture: Architecture, way: Way) -> int:
    """Copied in an optimizer step; nothing of a resident base."""
    settings = way.settings
    return settings.accumulation_steps * moved_bytes(architecture, settings) if settings.streamed else 0


def ways(settings: MemorySettings, free: Free, rows: Rows, batch_size: int) -> Iterator[MemorySettings]:
    """Every combination of what is free; the rest as it stands in `settings`."""
    per_device = max(1, batch_size // settings.processes)
    optimizers = [USUAL_OPTIMIZER]
    if settings.is_full and settings.device == "cuda" and free.small_optimizer:
        optimizers.append(SMALL_OPTIMIZER)
    choices: dict[str, list[Any]] = {
        MICRO_BATCH: divisors(per_device),
        CHECKPOINTING: [True] if settings.streamed else [False, True],
        LOSS_HEAD: _loss_heads(settings),
        OPTIMIZER: optimizers,
    }
    fields = {MICRO_BATCH: "rows", CHECKPOINTING: "gradient_checkpointing", LOSS_HEAD: "loss_head"}
    fields[OPTIMIZER] = "optimizer"
    open_keys = [key for key in choices if key in free.keys]
    for values in product(*(choices[key] for key in open_keys)):
        changed = replace(settings, **{fields[key]: value for key, value in zip(open_keys, values, strict=True)})
        yield with_rows(changed, changed.rows, rows, batch_size)


def _loss_heads(settings: MemorySettings) -> list[str]:
    """A loss of the model's own has no chunks; a head on the host has nothing else."""
    if settings.loss_kernel != "own":
        return ["full"]
    return ["chunked"] if settings.host_tables == "both" else ["full", "chunked"]


def with_rows(settings: MemorySettings, size: int, rows: Rows, batch_size: int) -> MemorySettings:
    """The same batch in micro batches of `size` rows."""
    return replace(
        settings,
        rows=size,
        accumulation_steps=-(-batch_size // (size * settings.processes)),
        trained_positions=rows.trained_positions.get(size) if settings.loss_kernel == "own" else None,
    )


def divisors(batch: int) -> list[int]:
    """Sizes that fill every micro batch of a step equally."""
    return [size for size in range(1, min(batch, _LARGEST_MICRO_BATCH) + 1) if batch % size == 0]


def _fit_of_way(candidate: Candidate) -> Fit:
    """Of a streamed base a larger micro batch is worth more than room for blocks that the allocator can give back."""
    fit = fit_of(candidate)
    return "spare" if candidate.settings.streamed and fit == "roomy" else fit


def fit_of(candidate: Candidate) -> Fit:
    """How well these settings fit the device."""
    limit, needs = candidate.limit_bytes, candidate.memory.least
    if limit is None:
        return "unknown"
    if not candidate.fits:  # what the host needs is known more roughly: too little of it stops nothing
        return "near" if needs <= (1 + PUBLISHED_ERROR) * limit else "too_much"
    if (1 + PUBLISHED_ERROR) * needs > limit:
        return "bare"
    unhindered = device_memory(candidate.preview, candidate.settings, None)
    return "roomy" if unhindered.device <= limit else "spare"


def _reasons(taken: Way, found: list[Way], free: Free, judged: Callable[[MemorySettings], Way]) -> dict[str, str]:
    reasons = {MICRO_BATCH: _why_rows(taken, found), CHECKPOINTING: _why_checkpointing(taken, judged)}
    reasons |= {LOSS_HEAD: _why_head(taken, judged), OPTIMIZER: _why_optimizer(taken, found)}
    return {key: reasons[key] for key in reasons if key in free.keys}


def _why_rows(taken: Way, found: list[Way]) -> str:
    """Against the next larger and the next smaller micro batch that are otherwise alike."""
    alike = {way.settings.rows: way for way in found if _beside_rows(way.settings) == _beside_rows(taken.settings)}
    rows = taken.settings.rows
    said = [f"{format_bytes(taken.needs)}{_of(taken)} for rows of up to {taken.settings.tokens} tokens"]
    larger = min((size for size in alike if size > rows), default=None)
    smaller = max((size for size in alike if size < rows), default=None)
    if larger is None:
        said.append("the whole batch of a device at once")
    elif _ORDER.index(alike[larger].fit) > _ORDER.index(taken.fit):
        said.append(f"{larger} need {format_bytes(alike[larger].needs)}")
    else:
        said.append(f"{larger} take {_compared(alike[larger], taken)}")
    if smaller is not None:
        said.append(f"{smaller} take {_compared(alike[smaller], taken)}")
    return ", ".join(said)


def _beside_rows(settings: MemorySettings) -> MemorySettings:
    shape = replace(settings, rows=1, accumulation_steps=1, trained_positions=None)
    return replace(shape, streamed_slots=2, streamed_resident_layers=0)  # as many as there is room for


def _compared(other: Way, taken: Way) -> str:
    ratio = other.seconds / taken.seconds - 1
    return "as long" if abs(ratio) < _AS_FAST - 1 else f"{abs(ratio):.0%} {'longer' if ratio > 0 else 'less time'}"


def _why_checkpointing(taken: Way, judged: Callable[[MemorySettings], Way]) -> str:
    if taken.settings.streamed:
        return "a streamed base runs each layer twice"
    on = taken.settings.gradient_checkpointing
    other = judged(replace(taken.settings, gradient_checkpointing=not on))
    without, with_it = (other, taken) if on else (taken, other)
    return (
        f"{format_bytes(without.needs)} without, {format_bytes(with_it.needs)} with{_of(taken, ', ')}; "
        f"recomputing takes {_compared(with_it, without)}"
    )


def _why_head(taken: Way, judged: Callable[[MemorySettings], Way]) -> str:
    if taken.settings.loss_kernel != "own":
        return "the model's own loss runs, which has no chunks"
    if taken.settings.host_tables == "both":
        return "a head on the host passes through the device in blocks"
    other = judged(replace(taken.settings, loss_head="chunked" if taken.settings.loss_head == "full" else "full"))
    full, chunked = (taken, other) if taken.settings.loss_head == "full" else (other, taken)
    return f"{format_bytes(full.needs)} with all logits, {format_bytes(chunked.needs)} in chunks{_of(taken, ', ')}"


def _why_optimizer(taken: Way, found: list[Way]) -> str:
    if taken.settings.optimizer != SMALL_OPTIMIZER:
        return "AdamW in 32 bits, one fused kernel"
    least = min(way.needs for way in found if way.settings.optimizer == USUAL_OPTIMIZER)
    return (
        f"AdamW in 32 bits needs at least {format_bytes(least)}{_of(taken, ', ')}; with states in 8 bits, paged to "
        f"host memory, {format_bytes(taken.needs)}: other rounding, so other weights"
    )


def _of(way: Way, before: str = " ") -> str:
    limit = way.candidate.limit_bytes
    return "" if limit is None else f"{before}of {format_bytes(limit)}"
