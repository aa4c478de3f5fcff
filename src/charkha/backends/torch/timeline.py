"""A recorded step summed up: where its peak is, and what is alive there by kind."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

from charkha.backends.torch.allocator import round_size
from charkha.backends.torch.recorder import Recorder


@dataclass(frozen=True)
class Peak:
    """The event after which most bytes are alive; `breakdown` sums to `allocated_bytes`, largest first."""

    allocated_bytes: int
    moment: str
    breakdown: dict[str, int]
    end_bytes: int  # alive when the record ends


def find_peak(record: Recorder, *, rounded: bool) -> Peak:
    """The first moment with the most live bytes; `rounded` to the CUDA allocator's units of 512 B."""
    sizes = [round_size(size) if rounded and size else size for size in record.sizes]
    live = most = 0
    place = -1
    for index, event in enumerate(record.events):
        live += sizes[event] if event > 0 else -sizes[-event]
        if live > most:
            most, place = live, index
    return Peak(most, _phase_at(record, place), _breakdown(record, sizes, place), live)


def _breakdown(record: Recorder, sizes: list[int], place: int) -> dict[str, int]:
    deaths = {-event: index for index, event in enumerate(record.events) if event < 0}
    phase_end = _phase_end(record, place)
    by_kind: dict[str, int] = {}
    for event in record.events[: place + 1]:
        if event > 0 and deaths.get(event, len(record.events)) > place:
            kind = _kind(record, event, deaths.get(event), phase_end)
            by_kind[kind] = by_kind.get(kind, 0) + sizes[event]
    return {kind: size for kind, size in sorted(by_kind.items(), key=lambda entry: -entry[1]) if size}


def _kind(record: Recorder, number: int, death: int | None, phase_end: int) -> str:
    """What outlives the forward pass it was born in is kept for the backward pass: an activation."""
    kind = record.kinds[number]
    if kind != "temporaries" or not record.phases[number].endswith("forward"):
        return kind
    return "activations" if death is None or death >= phase_end else kind


def _phase_at(record: Recorder, place: int) -> str:
    starts = [start for start, _phase in record.phase_starts]
    found = bisect.bisect_right(starts, place) - 1
    return record.phase_starts[found][1] if found >= 0 else ""


def _phase_end(record: Recorder, place: int) -> int:
    """Index of the first event beyond the phase that `place` is in; in a backward pass `place` itself."""
    if not _phase_at(record, place).endswith("forward"):
        return place
    starts = [start for start, _phase in record.phase_starts]
    following = bisect.bisect_right(starts, place)
    return starts[following] if following < len(starts) else len(record.events)
