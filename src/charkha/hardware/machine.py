"""A machine to plan for: its cards, its memory and its disk; this one, a named one, or one described in a file."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from charkha.caches import own_cache
from charkha.errors import UsageError
from charkha.hardware.catalog import APPLE_SHARE, Gpu, UnknownGpu, find_gpu
from charkha.hardware.free_memory import free_host_bytes
from charkha.hardware.probe import cpu_has_bf16, probe_host
from charkha.hardware.sensors import Nvml, open_nvml
from charkha.hardware.speeds import remembered_speeds

# What the rest of a computer draws beside its cards, at the wall, and what its power supply loses (80 Plus Gold).
BASE_POWER_W = {
    "laptop": 25.0,
    "apple": 10.0,
    "datacenter": 250.0,
    "workstation": 120.0,
    "desktop": 100.0,
    "amd": 150.0,
}
SUPPLY_EFFICIENCY = 0.9
UNKNOWN_BYTES = 2**50  # of a card that does not say: nothing is refused for it
_REACHED_OF_LINK = 0.8  # by copies from pinned memory, of what the lanes carry
_FLOPS_PER_CORE = 50e9  # fp32, of a desktop or server core with AVX2


@dataclass(frozen=True)
class Machine:
    """What a run is planned for. Without cards it trains on the CPU."""

    name: str
    gpus: tuple[Gpu, ...]
    ram_bytes: int | None  # None: not known, so host memory is told but not judged
    disk_free_bytes: int | None = None
    cpu_flops: float = 100e9  # of a process on two cores, fp32; only used without cards
    cpu_bf16: bool = False  # whether the processor has instructions for it
    free_bytes: tuple[int, ...] = ()  # of each card, or of the host where there is none; (): as if nothing else ran
    uuids: tuple[str, ...] = ()  # of each card, where it is this computer
    here: bool = False  # this very computer, whose packages and libraries are what will run
    # As `charkha doctor` measured them (hardware/speeds.py); None: not known.
    host_to_device_bytes_per_s: float | None = None  # from pinned memory to the slowest card
    disk_read_bytes_per_s: float | None = None  # of the disk where a streamed base waits

    @property
    def gpu(self) -> Gpu | None:
        """The card that decides: the one with the least memory."""
        return min(self.gpus, key=lambda gpu: gpu.memory_bytes) if self.gpus else None

    @property
    def limit_bytes(self) -> int | None:
        """What training can have on the card that has least, or of the host without cards; None: not known."""
        if self.gpus:
            sizes = [gpu.memory_bytes for gpu in self.gpus]
            return min([*sizes, *self.free_bytes])
        return min([size for size in (self.ram_bytes, *self.free_bytes) if size is not None], default=None)

    def only(self, cards: Sequence[int]) -> Machine:
        """The same machine with these of its cards, by their places; with none of them it trains on the CPU."""
        if not cards:
            return replace(self, gpus=(), uuids=(), free_bytes=(free_host_bytes(),) if self.here else ())
        free = tuple(self.free_bytes[card] for card in cards) if self.free_bytes else ()
        uuids = tuple(self.uuids[card] for card in cards) if self.uuids else ()
        gpus = tuple(self.gpus[card] for card in cards)
        return replace(self, name=gpus[0].name if self.here else self.name, gpus=gpus, free_bytes=free, uuids=uuids)

    def used_by(self, processes: int) -> Machine:
        """The cards that so many processes train on: the first ones. A machine that is described is used whole."""
        return self.only(range(min(processes, len(self.gpus)))) if self.here and self.gpus else self

    @property
    def device(self) -> str:
        """cpu, cuda or mps."""
        return self.gpu.backend if self.gpu else "cpu"


def this_machine(disk: Path) -> Machine:
    """This computer, asked through NVML and psutil, never torch; `disk` is a folder on the disk that is written to.

    Of the cards those that CUDA_VISIBLE_DEVICES names, in its order (numbers are taken as NVML's).
    """
    host = probe_host()
    existing = next(folder for folder in (disk, *disk.parents) if folder.exists())
    nvml = open_nvml()
    gpus: tuple[Gpu, ...] = ()
    uuids: tuple[str, ...] = ()
    free: tuple[int, ...] = (free_host_bytes(),)
    if nvml and nvml.count:
        named = [nvml.limits(index).uuid or "" for index in range(nvml.count)]
        cards = visible_cards(named, os.environ.get("CUDA_VISIBLE_DEVICES"))
        gpus = tuple(_gpu_here(nvml, index) for index in cards)
        if gpus:
            uuids, free = tuple(named[index] for index in cards), tuple(_free_here(nvml, index) for index in cards)
    elif host.system.startswith("Darwin"):
        gpus = _apple_here(host.processor, host.ram_bytes)
    speeds = remembered_speeds([gpu.name for gpu in gpus], own_cache())
    return Machine(
        name=gpus[0].name if gpus else host.processor,
        gpus=gpus,
        ram_bytes=host.ram_bytes,
        disk_free_bytes=shutil.disk_usage(existing).free,
        cpu_flops=_FLOPS_PER_CORE * host.physical_cores,
        cpu_bf16=cpu_has_bf16(),
        free_bytes=free,
        uuids=uuids,
        here=True,
        host_to_device_bytes_per_s=speeds.host_to_device_bytes_per_s,
        disk_read_bytes_per_s=speeds.disk_read_bytes_per_s,
    )


def visible_cards(uuids: Sequence[str], wish: str | None) -> list[int]:
    """The places of the cards that CUDA would show under CUDA_VISIBLE_DEVICES `wish`: up to the first that is none."""
    if wish is None:
        return list(range(len(uuids)))
    found: list[int] = []
    for name in (part.strip() for part in wish.split(",")):
        if name.isdigit() and int(name) < len(uuids):
            found.append(int(name))
            continue
        places = [place for place, uuid in enumerate(uuids) if name.startswith("GPU-") and uuid.startswith(name)]
        if len(places) != 1:
            break
        found += places
    return found


def _free_here(nvml: Nvml, index: int) -> int:
    free = nvml.free_bytes(index)
    return free if free is not None else (nvml.memory_bytes(index) or UNKNOWN_BYTES)


def _gpu_here(nvml: Nvml, index: int) -> Gpu:
    """The card as the table knows it, with the power limit and memory that it itself reports."""
    limits = nvml.limits(index)
    memory = nvml.memory_bytes(index)
    try:
        gpu = find_gpu(limits.name or "")
    except UnknownGpu:
        # Nothing is known of its speed, so time is a guess of a card of that memory; memory is what the card says.
        gpu = replace(find_gpu("RTX 3060 12GB"), name=limits.name or "GPU", memory_bytes=memory or UNKNOWN_BYTES)
    link = nvml.link(index).most_bytes_per_s  # of this slot; the table's is of the card's best one
    pcie = min(gpu.pcie_bytes_per_s, _REACHED_OF_LINK * link) if link else gpu.pcie_bytes_per_s
    return replace(gpu, power_w=limits.power_default_w or gpu.power_w, pcie_bytes_per_s=pcie)


def _apple_here(processor: str, ram_bytes: int) -> tuple[Gpu, ...]:
    try:
        gpu = find_gpu(processor)
    except UnknownGpu:
        return ()
    return (replace(gpu, memory_bytes=int(ram_bytes * APPLE_SHARE)),)


def machine_of(names: Sequence[str]) -> Machine:
    """The machine that `--gpu` describes: one card for each time it is given, or one machine file.

    Raises UnknownGpu for a name in no table and UsageError for a file that is not of the form.
    """
    paths = [Path(name).expanduser() for name in names if name.endswith(".json")]
    if paths and len(names) > 1:
        raise UsageError(
            "a machine file describes a whole machine; it cannot stand beside other cards",
            where="--gpu",
            remedy="give the file alone, or the names of the cards",
        )
    if paths:
        return read_machine(paths[0])
    gpus = tuple(find_gpu(name) for name in names)
    counted = {gpu.name: sum(other.name == gpu.name for other in gpus) for gpu in gpus}
    return Machine(
        " + ".join(f"{count} x {name}" if count > 1 else name for name, count in counted.items()), gpus, None
    )


def read_machine(path: Path) -> Machine:
    """The machine in a JSON file: `{"gpus": ["RTX 4090", {"name": ..., "memory_bytes": ...}], "ram_bytes": ...}`."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"the machine file cannot be read: {error}", where=str(path), remedy=_FORM) from None
    if not isinstance(record, dict) or not isinstance(record.get("gpus"), list):
        raise UsageError("the machine file has no list `gpus`", where=str(path), remedy=_FORM)
    gpus = tuple(_gpu_of(entry, path) for entry in record["gpus"])
    return Machine(
        name=str(record.get("name") or path.stem),
        gpus=gpus,
        ram_bytes=_count(record, "ram_bytes", path),
        disk_free_bytes=_count(record, "disk_free_bytes", path),
        host_to_device_bytes_per_s=_count(record, "host_to_device_bytes_per_s", path),
        disk_read_bytes_per_s=_count(record, "disk_read_bytes_per_s", path),
    )


_FORM = 'write {"gpus": ["RTX 4090"], "ram_bytes": 68719476736}; `charkha plan --write-machine FILE` makes one'


def machine_record(machine: Machine) -> dict[str, Any]:
    """What `read_machine` reads back."""
    return {
        "name": machine.name,
        "gpus": [{"name": gpu.name, "memory_bytes": gpu.memory_bytes} for gpu in machine.gpus],
        "ram_bytes": machine.ram_bytes,
        "disk_free_bytes": machine.disk_free_bytes,
        "host_to_device_bytes_per_s": _whole(machine.host_to_device_bytes_per_s),
        "disk_read_bytes_per_s": _whole(machine.disk_read_bytes_per_s),
    }


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)


def _gpu_of(entry: Any, path: Path) -> Gpu:
    if isinstance(entry, str):
        return find_gpu(entry)
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise UsageError(f"{entry!r} is not a card", where=str(path), remedy=_FORM)
    memory = _count(entry, "memory_bytes", path)
    gpu = find_gpu(entry["name"])
    return replace(gpu, memory_bytes=memory) if memory else gpu


def _count(record: dict[str, Any], key: str, path: Path) -> int | None:
    value = record.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise UsageError(f"{key} is {value!r}, not a positive whole number", where=str(path), remedy=_FORM)
    return value
