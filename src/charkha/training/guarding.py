"""The thread that feeds the guard and hands its decisions on: sensors, UPS, energy and the hour in; orders out.

`guard.decide` is pure; this file reads, sets power limits, and records every decision that changes something. The
training loop asks for its order at step boundaries and never waits for a sensor.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from charkha.backends.base import Order, Recorder
from charkha.config import Config
from charkha.errors import ConfigError, ConfigProblem
from charkha.guard import Decision, GuardState, Readings, decide, limits_to_restore
from charkha.guard_limits import GuardLimits, parse_budget, parse_windows
from charkha.hardware.sensors import CpuPower, GpuReading, NotPermitted, Nvml, open_nvml
from charkha.hardware.ups import MainsState, MainsWatch, Ups, UpsReading, open_ups
from charkha.training.power_limit import FoundLimit

_EVERY_S = 1.0
MAINS_STABLE_S = 30.0


def guard_limits(config: Config) -> GuardLimits:
    """What the owner allows, as the policy takes it. Raises ConfigError for a budget in another currency."""
    guard = config.guard
    try:
        budget = parse_budget(guard.budget, config.cost.currency)
    except ValueError as error:
        raise ConfigError("config", [ConfigProblem("guard.budget", str(error))]) from None
    return GuardLimits(
        target_temperature_c=guard.max_gpu_temperature_c,
        max_power_w=guard.max_power_w,
        budget=budget,
        windows=parse_windows(guard.windows),
    )


class RunGuard:
    """Watches one run from `start` to `close`; with nothing to watch it does nothing."""

    def __init__(
        self,
        config: Config,
        record: Recorder,
        *,
        gpu_indices: Callable[[Nvml], list[int]],
        run_folder: Path,
        energy_kwh_before: float = 0.0,
        every_s: float = _EVERY_S,
        mains_stable_s: float = MAINS_STABLE_S,
    ) -> None:
        self._limits = guard_limits(config)
        self._price = config.cost.electricity_per_kwh
        self._record = record
        self._every_s = every_s
        self._ups: Ups | None = open_ups(config.guard.ups)
        self._mains = MainsWatch(mains_stable_s) if self._ups is not None else None
        nvml = open_nvml()
        indices = [] if nvml is None else gpu_indices(nvml)
        self._gpus = [] if nvml is None else [_Gpu(nvml, index, run_folder) for index in indices]
        self._cpu_power = CpuPower() if not self._gpus else None
        self._joules = energy_kwh_before * 3.6e6
        self._energy_known = True
        self._felt_at: float | None = None
        self._state = GuardState()
        self._decision = Decision()
        self._save_wanted = False
        self._tokens_per_second: float | None = None
        self._lock = threading.Lock()
        self._failure: Exception | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="guard", daemon=True)

    def start(self) -> None:
        """Begins to watch, where there is anything: a GPU, a UPS, a budget or hours."""
        self._tell_notes()
        watched = (self._gpus or None, self._ups, self._limits.budget, self._limits.windows or None)
        if any(part is not None for part in watched):
            self._look()  # the first order is there before the first step
            self._thread.start()

    def close(self) -> None:
        """Ends watching and puts the power limits back as they were."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)
        for gpu, watts in zip(self._gpus, limits_to_restore(self._state), strict=False):
            if watts is not None:
                gpu.put_back(watts)

    def saw_save(self, blocked_seconds: float) -> None:
        """Told what a save cost: the battery must last for three of them."""
        with self._lock:
            self._limits = replace(self._limits, save_seconds=max(1.0, blocked_seconds))

    def saw_step(self, tokens_per_second: float) -> None:
        """Told how fast the run goes: a fall without a visible cause is told."""
        self._tokens_per_second = tokens_per_second

    def order(self, step_seconds: float) -> Order:
        """The guard's order of now. Raises what ended the guard, if anything did."""
        if self._failure is not None:
            raise self._failure
        with self._lock:
            decision, save, self._save_wanted = self._decision, self._save_wanted, False
        reason = "; ".join(decision.reasons) or None
        idle = decision.pace / (1 - decision.pace) * step_seconds if decision.pace < 1 else step_seconds
        return Order(
            save=save,
            pause=decision.action == "pause",
            stop=decision.action == "stop",
            idle_seconds=idle,
            reason=reason or decision.stop_kind or "the guard",
        )

    def _watch(self) -> None:
        try:
            while not self._ended.wait(self._every_s):
                self._look()
        except Exception as failure:  # noqa: BLE001  # raised again on the training thread: no run without its guard
            self._failure = failure

    def _look(self) -> None:
        readings = self._readings()
        with self._lock:
            decision, self._state = decide(readings, self._limits, self._state)
            reasons = decision.reasons or self._decision.reasons  # why it still waits
            before, self._decision = self._decision, replace(decision, reasons=reasons)
            self._save_wanted = self._save_wanted or decision.save
        for gpu, watts in zip(self._gpus, decision.power_limits_w, strict=False):
            if watts is not None:
                gpu.set_limit(watts)
        self._tell_notes()
        if decision.reasons or decision.action != before.action or decision.save:
            self._tell(decision, readings)
        for text in decision.notes:
            self._record("note", text=text)

    def _tell_notes(self) -> None:
        for gpu in self._gpus:
            while gpu.notes:
                self._record("note", text=gpu.notes.pop(0))

    def _tell(self, decision: Decision, readings: Readings) -> None:
        gpu = readings.gpus[0] if readings.gpus else None
        self._record(
            "guard",
            action=decision.action,
            save=decision.save,
            pace=round(decision.pace, 3),
            power_limit_w=next((watts for watts in decision.power_limits_w if watts is not None), None),
            temperature_c=gpu.temperature_c if gpu else None,
            power_w=gpu.power_w if gpu else None,
            reasons=list(decision.reasons),
        )

    def _readings(self) -> Readings:
        now = time.monotonic()
        here = time.localtime()
        reading = self._ups.read() if self._ups is not None else None
        gpus = tuple(gpu.nvml.read(gpu.index) for gpu in self._gpus)
        self._count_energy(now, self._watts(gpus))
        energy_kwh = self._joules / 3.6e6 if self._energy_known else None
        return Readings(
            time_s=now,
            local_minute_of_day=here.tm_hour * 60 + here.tm_min,
            weekday=here.tm_wday,
            gpus=gpus,
            gpu_limits=tuple(gpu.limits for gpu in self._gpus),
            mains=self._mains_state(reading, now),
            ups=reading,
            energy_kwh=energy_kwh,
            money=None if energy_kwh is None else energy_kwh * self._price,
            tokens_per_second=self._tokens_per_second,
            may_set_power=bool(self._gpus) and all(gpu.may_set_power for gpu in self._gpus),
        )

    def _watts(self, gpus: tuple[GpuReading, ...]) -> float | None:
        """What the run draws; None where a card does not say."""
        if not gpus:
            return self._cpu_power.watts() if self._cpu_power else None
        known = [gpu.power_w for gpu in gpus if gpu.power_w is not None]
        return sum(known) if len(known) == len(gpus) else None

    def _mains_state(self, reading: UpsReading | None, now: float) -> MainsState | None:
        return None if reading is None or self._mains is None else self._mains.update(reading, now)

    def _count_energy(self, now: float, watts: float | None) -> None:
        """Adds up power over time. A moment without a reading makes the sum unknown, not smaller."""
        if self._felt_at is not None:
            if watts is None:
                self._energy_known = False
            else:
                self._joules += watts * (now - self._felt_at)
        self._felt_at = now


class _Gpu:
    """A GPU that trains, and whether its power limit may be set. `notes` are for the record, taken out when told."""

    def __init__(self, nvml: Nvml, index: int, run_folder: Path) -> None:
        self.nvml = nvml
        self.index = index
        self.limits = nvml.limits(index)
        self.may_set_power = True
        self.notes: list[str] = []
        self._found_w = nvml.read(index).power_limit_w
        self._kept = FoundLimit(run_folder, self.limits.uuid)
        self._is_kept = False
        left_w = self._kept.left()
        if left_w is not None and self._found_w is not None:
            self._repair(self._found_w, left_w)
        # Set as it is: only the right is tried.
        self.may_set_power = self._found_w is not None and self.set_limit(self._found_w)

    def _repair(self, found_w: float, left_w: float) -> None:
        if found_w >= left_w:  # somebody has put it back, and what he sets from now on is his wish
            self._forget()
            return
        how = f"GPU {self.index} still had the power limit of {found_w:.0f} W that a killed process of this run had set"
        if self.set_limit(left_w):
            self._found_w = left_w
            self._forget()
            self.notes.append(f"{how}; it has its {left_w:.0f} W again")
        else:
            self.notes.append(f"{how}; `sudo nvidia-smi -i {self.index} -pl {left_w:.0f}` puts it back")

    def set_limit(self, watts: float) -> bool:
        """Whether the card took the limit."""
        if self._found_w is not None and watts < self._found_w and not self._is_kept:
            self._keep(self._found_w)
        try:
            self.nvml.set_power_limit(self.index, watts)
        except (NotPermitted, ValueError):
            self.may_set_power = False
            return False
        return True

    def put_back(self, watts: float) -> None:
        """The limit as it was found."""
        if self.set_limit(watts):
            self._forget()

    def _keep(self, found_w: float) -> None:
        """Heat does not wait for a disk that takes nothing: the limit is lowered all the same."""
        self._is_kept = True
        try:
            self._kept.keep(found_w)
        except OSError as error:
            self.notes.append(
                f"the power limit of GPU {self.index}, {found_w:.0f} W, could not be written down ({error}): after a "
                "kill it would stay lowered until the machine restarts"
            )

    def _forget(self) -> None:
        try:
            self._kept.forget()
        except OSError as error:
            self.notes.append(f"the kept power limit of GPU {self.index} could not be removed ({error})")
