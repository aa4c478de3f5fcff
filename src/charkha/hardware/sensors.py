"""What the machine feels now: GPUs through NVML, the processor through psutil and RAPL. None is "cannot be read".

NVML is asked by the names of its current reference, with the older call where a driver lacks the new one: thresholds
come from the card, never from a table. Where only margins are given (temperature still free before a limit, data-centre
parts from Hopper on) they are turned into temperatures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_RAPL = Path("/sys/class/powercap")
_CPU_SENSORS = ("coretemp", "k10temp", "zenpower", "cpu_thermal", "acpitz")
# Reasons for which a card runs below its clocks; newer drivers may set further bits, which are reported by number.
EVENT_REASONS = {
    0x001: "gpu_idle",
    0x002: "applications_clocks_setting",
    0x004: "sw_power_cap",
    0x008: "hw_slowdown",
    0x010: "sync_boost",
    0x020: "sw_thermal_slowdown",
    0x040: "hw_thermal_slowdown",
    0x080: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
}


@dataclass(frozen=True)
class GpuReading:
    """One GPU at one moment."""

    index: int
    temperature_c: float | None = None
    memory_temperature_c: float | None = None  # GeForce cards on Linux do not tell it
    power_w: float | None = None
    power_limit_w: float | None = None
    energy_j: float | None = None  # since the driver was loaded
    clock_mhz: float | None = None
    event_reasons: frozenset[str] = frozenset()
    lost: bool = False  # fallen off the bus: only a cold restart of the machine brings it back


@dataclass(frozen=True)
class GpuLimits:
    """What a card says of itself."""

    name: str | None
    uuid: str | None
    slowdown_c: float | None
    shutdown_c: float | None
    maximum_c: float | None  # the highest temperature of normal work
    memory_maximum_c: float | None
    power_default_w: float | None
    power_minimum_w: float | None
    power_maximum_w: float | None


_READ_PEER = 0  # NVML_P2P_CAPS_INDEX_READ, which pynvml 13 has as a tuple
_LANE_BYTES_PER_S = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.563e9}  # after line coding


@dataclass(frozen=True)
class PcieLink:
    """A card's link to the host, now and at most (of the card in its slot). A card at rest slows its link down."""

    generation: int | None = None
    width: int | None = None
    most_generation: int | None = None
    most_width: int | None = None
    nvlinks: int = 0  # to other cards, that are up

    @property
    def most_bytes_per_s(self) -> float | None:
        """What its lanes could carry one way; None where the card does not tell."""
        lane = _LANE_BYTES_PER_S.get(self.most_generation or 0)
        return lane * self.most_width if lane and self.most_width else None


class NotPermitted(Exception):
    """The driver lets only root change this."""


class Nvml:
    """The NVIDIA GPUs of this machine. Made by `open_nvml`; calls take microseconds to some milliseconds."""

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        self.count = int(nvml.nvmlDeviceGetCount())
        self._handles: dict[int, Any] = {}

    def read(self, index: int) -> GpuReading:
        """What GPU `index` (NVML's order, that of the PCI bus) feels now."""
        nvml = self._nvml
        try:
            handle = self._handle(index)
        except nvml.NVMLError as error:
            if _is_lost(nvml, error):
                return GpuReading(index, lost=True)
            raise
        lost = False

        def ask(call: Callable[..., Any], *arguments: Any) -> Any:
            nonlocal lost
            try:
                return call(handle, *arguments)
            except nvml.NVMLError as error:
                lost = lost or _is_lost(nvml, error)
                return None

        reasons = ask(nvml.nvmlDeviceGetCurrentClocksEventReasons)
        if reasons is None:
            reasons = ask(nvml.nvmlDeviceGetCurrentClocksThrottleReasons)
        return GpuReading(
            index=index,
            temperature_c=_number(ask(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU)),
            memory_temperature_c=self._field(handle, nvml.NVML_FI_DEV_MEMORY_TEMP),
            power_w=_thousandth(ask(nvml.nvmlDeviceGetPowerUsage)),
            power_limit_w=_thousandth(ask(nvml.nvmlDeviceGetEnforcedPowerLimit)),
            energy_j=_thousandth(ask(nvml.nvmlDeviceGetTotalEnergyConsumption)),
            clock_mhz=_number(ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM)),
            event_reasons=reason_names(int(reasons or 0)),
            lost=lost,
        )

    def memory_bytes(self, index: int) -> int | None:
        """All memory of GPU `index`, as the driver counts it; None where it does not say."""
        try:
            return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle(index)).total)
        except self._nvml.NVMLError:
            return None

    def free_bytes(self, index: int) -> int | None:
        """Memory of GPU `index` that no program holds now; None where the driver does not say."""
        try:
            return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle(index)).free)
        except self._nvml.NVMLError:
            return None

    def limits(self, index: int) -> GpuLimits:
        """What GPU `index` says of its temperatures and its power."""
        nvml, handle = self._nvml, self._handle(index)

        def ask(call: Callable[..., Any], *arguments: Any) -> Any:
            try:
                return call(handle, *arguments)
            except nvml.NVMLError:
                return None

        power = ask(nvml.nvmlDeviceGetPowerManagementLimitConstraints) or (None, None)
        return GpuLimits(
            name=_text(ask(nvml.nvmlDeviceGetName)),
            uuid=_text(ask(nvml.nvmlDeviceGetUUID)),
            slowdown_c=self._threshold(handle, "SLOWDOWN"),
            shutdown_c=self._threshold(handle, "SHUTDOWN"),
            maximum_c=self._threshold(handle, "GPU_MAX"),
            memory_maximum_c=self._threshold(handle, "MEM_MAX"),
            power_default_w=_thousandth(ask(nvml.nvmlDeviceGetPowerManagementDefaultLimit)),
            power_minimum_w=_thousandth(power[0]),
            power_maximum_w=_thousandth(power[1]),
        )

    def link(self, index: int) -> PcieLink:
        """How GPU `index` is connected."""
        nvml, handle = self._nvml, self._handle(index)

        def ask(call: Callable[..., Any], *arguments: Any) -> Any:
            try:
                return call(handle, *arguments)
            except nvml.NVMLError:
                return None

        return PcieLink(
            generation=ask(nvml.nvmlDeviceGetCurrPcieLinkGeneration),
            width=ask(nvml.nvmlDeviceGetCurrPcieLinkWidth),
            most_generation=ask(nvml.nvmlDeviceGetMaxPcieLinkGeneration),
            most_width=ask(nvml.nvmlDeviceGetMaxPcieLinkWidth),
            nvlinks=sum(bool(ask(nvml.nvmlDeviceGetNvLinkState, place)) for place in range(nvml.NVML_NVLINK_MAX_LINKS)),
        )

    def reads_peer(self, index: int, other: int) -> bool | None:
        """Whether GPU `index` may read the memory of `other` itself; None where the driver does not say."""
        nvml = self._nvml
        try:
            status = nvml.nvmlDeviceGetP2PStatus(self._handle(index), self._handle(other), _READ_PEER)
        except nvml.NVMLError:
            return None
        return bool(status == nvml.NVML_P2P_STATUS_OK)

    def set_power_limit(self, index: int, watts: float) -> None:
        """Raises NotPermitted where only root may, ValueError where the card refuses the number."""
        nvml = self._nvml
        try:
            nvml.nvmlDeviceSetPowerManagementLimit(self._handle(index), round(watts * 1000))
        except nvml.NVMLError as error:
            if error.value in (nvml.NVML_ERROR_NO_PERMISSION, nvml.NVML_ERROR_NOT_SUPPORTED):
                raise NotPermitted(str(error)) from None
            raise ValueError(f"a power limit of {watts:g} W was refused: {error}") from None

    def index_of(self, uuid: str) -> int | None:
        """NVML's number of the GPU with this UUID, with or without its `GPU-`; None when there is none."""
        wanted = uuid.removeprefix("GPU-")
        for index in range(self.count):
            try:
                found = _text(self._nvml.nvmlDeviceGetUUID(self._handle(index)))
            except self._nvml.NVMLError:
                continue  # a lost card has no name; the others do
            if found is not None and found.removeprefix("GPU-") == wanted:
                return index
        return None

    def _handle(self, index: int) -> Any:
        if index not in self._handles:
            self._handles[index] = self._nvml.nvmlDeviceGetHandleByIndex(index)
        return self._handles[index]

    def _field(self, handle: Any, field: int) -> float | None:
        """A field value; drivers hand them out in several integer types."""
        nvml = self._nvml
        try:
            (answer,) = nvml.nvmlDeviceGetFieldValues(handle, [field])
        except nvml.NVMLError:
            return None
        if answer.nvmlReturn != nvml.NVML_SUCCESS:
            return None
        members = {
            nvml.NVML_VALUE_TYPE_DOUBLE: "dVal",
            nvml.NVML_VALUE_TYPE_UNSIGNED_INT: "uiVal",
            nvml.NVML_VALUE_TYPE_UNSIGNED_LONG: "ulVal",
            nvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG: "ullVal",
            nvml.NVML_VALUE_TYPE_SIGNED_LONG_LONG: "sllVal",
            nvml.NVML_VALUE_TYPE_SIGNED_INT: "siVal",
        }
        member = members.get(answer.valueType)
        return None if member is None else float(getattr(answer.value, member))

    def _threshold(self, handle: Any, name: str) -> float | None:
        """The threshold in degrees; from the margin before it where the card gives only that."""
        nvml = self._nvml
        try:
            old = nvml.nvmlDeviceGetTemperatureThreshold(handle, getattr(nvml, f"NVML_TEMPERATURE_THRESHOLD_{name}"))
            if old:
                return float(old)
        except nvml.NVMLError:
            pass  # a newer card: the margins below take its place
        limit = self._field(handle, getattr(nvml, f"NVML_FI_DEV_TEMPERATURE_{name}_TLIMIT"))
        try:
            margin = nvml.nvmlDeviceGetMarginTemperature(handle)
            now = nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)
        except nvml.NVMLError:
            return None
        # The margin falls as the card warms; the limit is the margin at which it acts (0 or a few degrees below).
        return None if limit is None else float(now + margin - limit)


def open_nvml() -> Nvml | None:
    """The NVIDIA GPUs, or None where no driver answers."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        return Nvml(pynvml)
    except pynvml.NVMLError:
        return None


def reason_names(bits: int) -> frozenset[str]:
    """Event reasons by name; a bit that is not known here by its number."""
    places = (1 << place for place in range(bits.bit_length()))
    return frozenset(EVENT_REASONS.get(bit, f"bit_{bit:#x}") for bit in places if bits & bit)


def cpu_temperature_c() -> float | None:
    """The hottest sensor of the processor; None where the system shows none (most virtual machines)."""
    import psutil

    read = getattr(psutil, "sensors_temperatures", None)
    groups = read() if read is not None else {}
    for name in _CPU_SENSORS:
        found = [entry.current for entry in groups.get(name, ()) if entry.current is not None]
        if found:
            return float(max(found))
    return None


class CpuPower:
    """Mean watts of the processor packages between two looks, from RAPL's counters (often readable by root only)."""

    def __init__(self, folder: Path = _RAPL, clock: Callable[[], float] = time.monotonic) -> None:
        self._packages = sorted(path for path in folder.glob("intel-rapl:*") if path.name.count(":") == 1)
        self._clock = clock
        self._before = self._look()

    def watts(self) -> float | None:
        """Since the last call; None where the counters cannot be read, or too little time has gone by."""
        before, self._before = self._before, self._look()
        now = self._before
        if before is None or now is None or now[0] <= before[0]:
            return None
        joules = sum(
            ((end - start) % wrap) / 1e6 for start, end, wrap in zip(before[1], now[1], self._wraps(), strict=True)
        )
        return joules / (now[0] - before[0])

    def _look(self) -> tuple[float, list[int]] | None:
        try:
            counters = [int((path / "energy_uj").read_text()) for path in self._packages]
        except (OSError, ValueError):
            return None
        return (self._clock(), counters) if counters else None

    def _wraps(self) -> list[int]:
        """The counters begin anew past these."""
        return [int((path / "max_energy_range_uj").read_text()) + 1 for path in self._packages]


@dataclass(frozen=True)
class DeviceFeel:
    """Temperature and power of the device that trains; None where they cannot be read."""

    temperature_c: float | None
    power_w: float | None


class DeviceSensors:
    """`feel()` of the devices of a run, at most once a second: sensors are slower than small steps."""

    def __init__(self, device: str, gpu_uuids: Sequence[str] = ()) -> None:
        self._nvml = open_nvml() if device == "cuda" else None
        found = [] if self._nvml is None else [self._nvml.index_of(uuid) for uuid in gpu_uuids]
        self._indices = [index for index in found if index is not None]
        self._cpu_power = CpuPower() if device == "cpu" else None
        self._felt_at = float("-inf")
        self._feel = DeviceFeel(None, None)

    def feel(self) -> DeviceFeel:
        """The latest reading: of several devices the hottest one's heat, and the power of all together."""
        now = time.monotonic()
        if now - self._felt_at >= 1.0:
            self._felt_at, self._feel = now, self._read()
        return self._feel

    def _read(self) -> DeviceFeel:
        if self._cpu_power is not None:
            return DeviceFeel(cpu_temperature_c(), self._cpu_power.watts())
        if self._nvml is None or not self._indices:
            return DeviceFeel(None, None)
        readings = [self._nvml.read(index) for index in self._indices]
        heat = [one.temperature_c for one in readings if one.temperature_c is not None]
        watts = [one.power_w for one in readings if one.power_w is not None]
        return DeviceFeel(max(heat, default=None), sum(watts) if len(watts) == len(readings) else None)


def _is_lost(nvml: Any, error: Any) -> bool:
    return error.value in (nvml.NVML_ERROR_GPU_IS_LOST, nvml.NVML_ERROR_GPU_NOT_FOUND)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _thousandth(value: Any) -> float | None:
    """Milliwatts to watts, millijoules to joules."""
    return None if value is None else float(value) / 1000


def _text(value: Any) -> str | None:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
