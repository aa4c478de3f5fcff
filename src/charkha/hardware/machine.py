"""A machine to plan for: its cards, its memory and its disk; and this computer as one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from charkha.caches import own_cache
from charkha.hardware.catalog import APPLE_SHARE, Gpu, UnknownGpu, find_gpu, is_about
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
        """The card that decides. Of unlike ones, which wait for one another in every step, the least of each figure."""
        if not self.gpus:
            return None
        oldest = min(self.gpus, key=lambda gpu: (gpu.capability or (0, 0), gpu.memory_bytes))
        figures = ("memory_bytes", "flops", "bandwidth_bytes_per_s", "power_w", "link_bytes_per_s", "pcie_bytes_per_s")
        least = {name: min(getattr(gpu, name) for gpu in self.gpus) for name in figures}
        return replace(oldest, **least)

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
        """The cards that so many processes train on: the first ones. What the others draw is not counted."""
        return self.only(range(min(processes, len(self.gpus)))) if self.gpus else self

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
    """The card as the table knows it, with the power limit, the slot, and where names say too little the memory that
    it itself reports.
    """
    limits = nvml.limits(index)
    memory = nvml.memory_bytes(index)
    try:
        gpu = _of_that_memory(find_gpu(limits.name or ""), limits.name or "", memory)
    except UnknownGpu:
        # Nothing is known of its speed, so time is a guess of a card of that memory; memory is what the card says.
        gpu = replace(find_gpu("RTX 3060 12GB"), name=limits.name or "GPU", memory_bytes=memory or UNKNOWN_BYTES)
    link = nvml.link(index).most_bytes_per_s  # of this slot; the table's is of the card's best one
    pcie = min(gpu.pcie_bytes_per_s, _REACHED_OF_LINK * link) if link else gpu.pcie_bytes_per_s
    return replace(gpu, power_w=limits.power_default_w or gpu.power_w, pcie_bytes_per_s=pcie)


def _of_that_memory(gpu: Gpu, name: str, memory: int | None) -> Gpu:
    """`gpu`, or its namesake with the memory that the driver reports: an RTX 4060 Ti has 8 or 16 GB by one name."""
    if memory is None or is_about(gpu.memory_bytes, memory):
        return gpu
    try:
        return find_gpu(f"{name} {round(memory / 2**30)}GB")
    except UnknownGpu:
        return replace(gpu, memory_bytes=memory)


def _apple_here(processor: str, ram_bytes: int) -> tuple[Gpu, ...]:
    try:
        gpu = find_gpu(processor)
    except UnknownGpu:
        return ()
    return (replace(gpu, memory_bytes=int(ram_bytes * APPLE_SHARE)),)
