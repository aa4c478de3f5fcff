"""The part of a plan that is about a streamed base: where its layers are, what moves, and what of that is hidden."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from charkha.hardware.machine import Machine
from charkha.plan.architecture import Architecture
from charkha.plan.memory_settings import MemorySettings
from charkha.plan.search import Candidate
from charkha.plan.streamed import (
    buffer_bytes,
    moved_bytes,
    slab_bytes,
    slab_layer_bytes,
    table_moved_bytes,
    usual_ram_bytes,
    waiting_bytes,
)
from charkha.plan.streamed_time import copying, free_from_rows, free_from_tokens, link_of
from charkha.units import format_bytes

OTHER_SPEEDS = (7e9, 12e9, 25e9)  # an NVMe disk, PCIe 4.0 x8 or 3.0 x16, PCIe 4.0 x16: bytes per second
_WELL_HIDDEN = 0.9


@dataclass(frozen=True)
class StreamedPlan:
    """The record of `charkha plan`'s JSON, and what is said of it in words."""

    record: dict[str, Any]
    reasons: tuple[str, ...]


def streamed_plan(
    architecture: Architecture, found: Candidate, machine: Machine, host_ram_bytes: int
) -> StreamedPlan | None:
    """None for a resident base. `host_ram_bytes` is what the whole run needs of it."""
    settings = found.settings
    if not settings.streamed:
        return None
    link = link_of(machine, settings)
    on_disk = settings.streamed_from == "disk" or settings.device == "cpu"
    record = {
        "layers": architecture.layers,
        "hot_layers": settings.streamed_resident_layers,
        "slots": settings.streamed_slots,
        "host_tables": settings.host_tables,
        "waits_in": "disk" if on_disk else "ram",
        "layer_bytes": slab_layer_bytes(architecture, settings),
        "slab_bytes": slab_bytes(architecture, settings),
        "device_buffer_bytes": buffer_bytes(architecture, settings),
        "pinned_bytes": waiting_bytes(architecture, settings),
        "enough_ram_bytes": usual_ram_bytes(host_ram_bytes),
        "micro_batch_rows": settings.rows,
        "micro_batch_tokens": settings.positions,
        "moved_bytes_per_micro_step": moved_bytes(architecture, settings) + table_moved_bytes(architecture, settings),
        **_at_speed(architecture, found, machine, link.bytes_per_second),
        "bytes_per_second_source": link.source,
        "at_other_speeds": [_at_speed(architecture, found, machine, speed) for speed in OTHER_SPEEDS],
    }
    return StreamedPlan(record, tuple(_said(record, machine)))


def _at_speed(
    architecture: Architecture, found: Candidate, machine: Machine, bytes_per_second: float
) -> dict[str, Any]:
    """One micro step with layers coming at that speed, and from which micro batch copying costs nothing."""
    settings: MemorySettings = found.settings
    copies = copying(architecture, settings, machine, bytes_per_second)
    time = replace(found.time, exposed_copy_seconds=copies.exposed_seconds)
    return {
        "bytes_per_second": bytes_per_second,
        "copy_seconds": round(copies.copy_seconds, 4),
        "compute_seconds": round(copies.compute_seconds, 4),
        "exposed_seconds": round(copies.exposed_seconds, 4),
        "hidden_share": round(copies.hidden_share, 4),
        "tokens_per_second": round(replace(found, time=time).tokens_per_second, 1),
        "free_from_tokens": free_from_tokens(architecture, settings, machine, bytes_per_second),
        "free_from_rows": free_from_rows(architecture, settings, machine, bytes_per_second),
    }


def _said(record: dict[str, Any], machine: Machine) -> list[str]:
    rate, share = record["bytes_per_second"] / 1e9, record["hidden_share"]
    moved = f"{record['moved_bytes_per_micro_step'] / 1e9:.1f} GB a micro step at {rate:.1f} GB/s"
    said = [
        f"streaming: {moved} ({record['bytes_per_second_source']}), {share:.0%} of it hidden behind computing; "
        f"{_free(record)}"
    ]
    if share < _WELL_HIDDEN:
        said.append("streaming: larger micro batches, or longer or packed rows, hide more of the copying")
    enough = format_bytes(record["enough_ram_bytes"])
    if record["waits_in"] == "ram" and machine.ram_bytes is None:
        said.append(f"streaming: a computer with {enough} of RAM is enough; with less, layers come from the disk")
    elif record["waits_in"] == "disk" and machine.gpu is not None:
        base = format_bytes(record["slab_bytes"])
        said.append(f"streaming: {base} do not fit in RAM beside the rest, so layers come from the disk in every step")
    return said


def _free(record: dict[str, Any]) -> str:
    tokens, rows = record["free_from_tokens"], record["free_from_rows"]
    if tokens is None:
        return "no micro batch hides all of it"
    in_rows = "" if rows is None else f" ({rows} row{'s' if rows > 1 else ''} as long as the longest)"
    return f"all of it from {tokens} tokens a micro batch{in_rows}"
