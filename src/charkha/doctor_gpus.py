"""What `charkha doctor` asks of the NVIDIA driver and its cards, through NVML alone."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

from charkha.doctor_checks import Check
from charkha.hardware.sensors import GpuLimits, GpuReading, NotPermitted, Nvml, PcieLink
from charkha.units import format_bytes

_CUDA_13 = 13000  # what torch's builds speak now; driver series 580 is the first that does
_HOT_REASONS = {
    "hw_slowdown": "the card halves its clocks: heat, its power supply, or an external brake",
    "hw_thermal_slowdown": "too hot: clean it, give it air, or set a lower power limit",
    "hw_power_brake_slowdown": "the power supply calls for less: check its cables and its watts",
    "sw_thermal_slowdown": "the driver holds its temperature: give it air, or set a lower power limit",
}
_COLD_RESTART = "cold restart: cut the power for half a minute; if it comes back check riser, cables, supply"
_SLOW_LINK_BYTES_PER_S = 8e9  # PCIe 3.0 x8; below it a streamed base waits for the link in every layer


def check_driver(nvml: Nvml | Exception | None, pci: Path = Path("/sys/bus/pci/devices")) -> Check:
    """Whether an NVIDIA driver answers, and whether a card is there for which none does."""
    name = "nvidia driver"
    if isinstance(nvml, Exception):
        return Check(name, f"the driver does not answer: {type(nvml).__name__}: {nvml}", "fail", _COLD_RESTART)
    if nvml is None or nvml.count == 0:
        seen = sum(_is_nvidia_gpu(device) for device in pci.glob("*"))
        if not seen:
            return Check(name, "none, and no NVIDIA GPU on the PCI bus", "ok")
        remedy = "install the driver, series 580 or newer, and restart (a container: start it with `--gpus all`)"
        return Check(name, f"{seen} NVIDIA GPU on the PCI bus, but the driver shows none", "fail", remedy)
    version, api = ask_nvml("nvmlSystemGetDriverVersion"), ask_nvml("nvmlSystemGetCudaDriverVersion")
    fact = f"{version or 'version unknown'}, {nvml.count} GPU{'s' * (nvml.count != 1)}"
    if api is None:
        return Check(name, fact, "ok")
    fact += f", speaks CUDA {api // 1000}.{api % 1000 // 10}"
    old = api < _CUDA_13
    return Check(name, fact, "warn" if old else "ok", "torch speaks CUDA 13: update the driver to 580" if old else None)


def _is_nvidia_gpu(device: Path) -> bool:
    vendor, kind = (path.read_text() if path.is_file() else "" for path in (device / "vendor", device / "class"))
    return vendor.strip() == "0x10de" and kind.startswith("0x03")  # NVIDIA; a display controller


def ask_nvml(call: str, *arguments: Any) -> Any:
    """What an NVML call that `sensors` does not make answers; None where it fails. NVML must have been opened."""
    import pynvml

    try:
        return getattr(pynvml, call)(*arguments)
    except pynvml.NVMLError:
        return None


def gpu_memory(index: int) -> tuple[int, int] | None:
    """(total, free) bytes of a card; None where it does not tell. NVML must have been opened."""
    told = ask_nvml("nvmlDeviceGetMemoryInfo", ask_nvml("nvmlDeviceGetHandleByIndex", index))
    return None if told is None else (int(told.total), int(told.free))


def check_gpu(nvml: Nvml, index: int) -> list[Check]:
    """The card with its memory and temperatures, its power limit, and why it runs below its clocks."""
    reading = nvml.read(index)
    if reading.lost:
        return [Check(f"gpu {index}", "lost: it has fallen off the bus", "fail", _COLD_RESTART)]
    limits = nvml.limits(index)
    return [
        _check_card(reading, limits, gpu_memory(index)),
        _check_memory_sensor(reading),
        _check_power(reading, limits, may_set_power(nvml, index)),
        _check_reasons(reading),
        check_link(index, nvml.link(index)),
    ]


def check_link(index: int, link: PcieLink) -> Check:
    """How the card is connected. Its speed falls while it rests, its number of lanes does not."""
    name = f"gpu {index} link"
    if link.most_generation is None or link.most_width is None:
        return Check(name, "the card does not tell its PCIe link", "unknown")
    fact = f"PCIe {link.most_generation}.0 x{link.most_width}"
    if link.generation is not None and link.width is not None and link.generation < link.most_generation:
        fact += f", {link.generation}.0 x{link.width} while it rests"
    fact += f", {link.nvlinks} NVLink up" if link.nvlinks else ""
    if link.width is not None and link.width < link.most_width:
        remedy = "seat the card anew, clean its contacts, try another slot or riser: lanes do not rest"
        return Check(name, f"{fact}, but {link.width} lanes now", "warn", remedy)
    if (link.most_bytes_per_s or _SLOW_LINK_BYTES_PER_S) < 0.95 * _SLOW_LINK_BYTES_PER_S:
        remedy = "fine for a base that stays on the card; for a streamed one use a slot with more lanes"
        return Check(name, fact, "warn", remedy)
    return Check(name, fact, "ok")


def check_peers(nvml: Nvml) -> Check:
    """Whether cards reach each other's memory without the host."""
    pairs = list(combinations(range(nvml.count), 2))
    told = {pair: nvml.reads_peer(*pair) for pair in pairs}
    direct = sum(bool(can) for can in told.values())
    fact = f"{direct} of {len(pairs)} pairs may read each other's memory"
    if None in told.values():
        return Check("gpu peers", f"{fact}; the driver does not say of all", "unknown")
    remedy = "usual for GeForce cards without NVLink: gradients pass through host memory, which DDP bears best"
    return Check("gpu peers", fact, "ok", None if direct == len(pairs) else remedy)


def _check_card(reading: GpuReading, limits: GpuLimits, memory: tuple[int, int] | None) -> Check:
    name, fact = f"gpu {reading.index}", limits.name or "name unknown"
    heat, slows = reading.temperature_c, limits.slowdown_c
    fact += f", {format_bytes(memory[0])}, {format_bytes(memory[1])} free" if memory else ", memory unknown"
    fact += ", temperature unknown" if heat is None else f", {heat:.0f} °C"
    fact += "" if slows is None else f" (slows down at {slows:.0f})"
    fact += "" if heat is None or slows is None else f", {slows - heat:.0f} of margin"
    if heat is not None and slows is not None and heat >= slows - 5:
        return Check(name, fact, "warn", "let it cool, clean it, give it air")
    if memory and memory[1] < 0.75 * memory[0]:
        return Check(name, fact, "warn", "another program holds its memory: `nvidia-smi` names it")
    return Check(name, fact, "unknown" if heat is None or memory is None else "ok")


def may_set_power(nvml: Nvml, index: int) -> bool:
    """Whether this user may set the power limit: it is set to what it is."""
    milliwatts = ask_nvml("nvmlDeviceGetPowerManagementLimit", ask_nvml("nvmlDeviceGetHandleByIndex", index))
    try:
        if milliwatts is not None:
            nvml.set_power_limit(index, milliwatts / 1000)
    except (NotPermitted, ValueError):
        return False
    return milliwatts is not None


def _check_power(reading: GpuReading, limits: GpuLimits, may_set: bool) -> Check:
    name, now, default = f"gpu {reading.index} power limit", reading.power_limit_w, limits.power_default_w
    if now is None:
        return Check(name, "the card does not tell its power limit", "unknown")
    fact = f"{now:.0f} W" if default is None else f"{now:.0f} W, {default:.0f} W as delivered"
    if may_set:
        return Check(name, f"{fact}; may be set by this user", "ok")
    remedy = f"the guard paces the run instead; to set it yourself: `sudo nvidia-smi -i {reading.index} -pl WATTS`"
    return Check(name, f"{fact}; only root may set it", "warn", remedy)


def _check_reasons(reading: GpuReading) -> Check:
    name = f"gpu {reading.index} slowdown"
    told = [text for reason, text in _HOT_REASONS.items() if reason in reading.event_reasons]
    fact = ", ".join(sorted(reading.event_reasons)) or "none"
    return Check(name, fact, "warn" if told else "ok", "; ".join(told) or None)


def _check_memory_sensor(reading: GpuReading) -> Check:
    name, heat = f"gpu {reading.index} memory temperature", reading.memory_temperature_c
    if heat is None:
        remedy = "watch tokens/s: memory that throttles shows there only"
        return Check(name, "the card does not tell it (a GeForce on Linux never does)", "unknown", remedy)
    return Check(name, f"{heat:.0f} °C", "warn" if heat >= 95 else "ok", "give it air" if heat >= 95 else None)
