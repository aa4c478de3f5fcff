"""What a run should do about heat, watts, power cuts, money and hours: `decide(readings, limits, state)`.

Pure: no clock, no thread, nothing read or set. The session asks about once a second, obeys at step boundaries, and
keeps the state that comes back. One rule a function; each gives a verdict, and the strictest wins.

    lost GPU    stop at once
    heat        a controller holds the target (guard_heat.py); 4 degrees above it for 10 s, or the card's own hardware
                slowdown: pause; still so after 120 s, or near its shutdown: stop
    power       on battery: save once an outage, least power, pause; low, or less than three saves left: stop
    budget      used up: stop
    windows     outside: pause
    speed       a fall that nothing here explains: a note

A reading that is None is unknown: it is said after a while and moves nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from charkha.guard_heat import (
    Control,
    Wishes,
    back_off,
    begin_control,
    core_target_c,
    excess_c,
    fallen_speed,
    hardware_slowdowns,
    hottest,
    limited,
    near_shutdown,
    recent_speeds,
    slowdown_cause,
    steer,
)
from charkha.guard_limits import GuardLimits, next_opening, open_window
from charkha.hardware.sensors import GpuLimits, GpuReading
from charkha.hardware.ups import MainsState, UpsReading
from charkha.units import format_seconds

Action = Literal["run", "pause", "stop"]
StopKind = Literal["power", "heat", "budget", "window", "gpu_lost"]

_HOT_C = 4.0  # degrees above the target: what the controller cannot hold
_HOT_S = 10.0
_COOL_C = 8.0  # degrees below the target from which a paused run goes on
_HOT_PAUSE_S = 120.0
_SAVES_LEFT = 3
_LONGEST_STEP_S = 10.0  # a gap in the readings (machine asleep) counts as no more
_NEARLY_SPENT = 0.8
_UNKNOWN_S = 60.0
_SPEED_EVERY_S = 5.0
_CALM_C = -3.0
_UPS_WORDS = {
    "BYPASS": "protects from nothing now (bypass)",
    "OFF": "is off",
    "OVER": "is overloaded",
    "RB": "wants a new battery",
    "ALARM": "sounds an alarm",
}
_UNKNOWN_GPU = GpuLimits(None, None, None, None, None, None, None, None, None)


@dataclass(frozen=True)
class Readings:
    """What is known at one moment. `weekday` counts from Monday = 0; `energy_kwh` and `money` are the run's so far."""

    time_s: float  # monotonic
    local_minute_of_day: int = 0
    weekday: int = 0
    gpus: tuple[GpuReading, ...] = ()
    gpu_limits: tuple[GpuLimits, ...] = ()
    mains: MainsState | None = None  # None: no UPS to ask
    ups: UpsReading | None = None
    energy_kwh: float | None = None
    money: float | None = None
    tokens_per_second: float | None = None
    may_set_power: bool = False


@dataclass(frozen=True)
class GuardState:
    """What the guard remembers from one call to the next. A run begins with `GuardState()`."""

    time_s: float | None = None
    control: Control = field(default_factory=Control)
    causes: frozenset[str] = frozenset()  # that go on now; each has been told and saved for
    hot_since_s: float | None = None
    heat_paused_since_s: float | None = None
    unknown_since_s: tuple[tuple[str, float], ...] = ()
    speeds: tuple[tuple[float, float], ...] = ()  # (time_s, tokens per second) while nothing slowed the run
    stop_kind: StopKind | None = None


@dataclass(frozen=True)
class Decision:
    """What to do now. `reasons` tell what changed; `notes` what the owner should know."""

    action: Action = "run"
    save: bool = False  # at the next step boundary
    pace: float = 0.0  # share of the time to idle between steps
    power_limits_w: tuple[float | None, ...] = ()  # per GPU; None: leave it
    reasons: tuple[str, ...] = ()
    stop_kind: StopKind | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Verdict:
    """What one rule says."""

    action: Action = "run"
    save: bool = False
    reasons: tuple[str, ...] = ()
    stop_kind: StopKind | None = None
    notes: tuple[str, ...] = ()


_Ruled = tuple[_Verdict, GuardState]


def decide(readings: Readings, limits: GuardLimits, state: GuardState) -> tuple[Decision, GuardState]:
    """What to do now, and the state for the next call. A stop is final: a new run begins with a new state."""
    untouched: tuple[float | None, ...] = (None,) * len(readings.gpus)
    if state.stop_kind is not None:
        return Decision("stop", power_limits_w=untouched, stop_kind=state.stop_kind), state
    readings = _complete(readings)
    seconds = min(max(0.0, readings.time_s - _first(state.time_s, readings.time_s)), _LONGEST_STEP_S)
    found, state = _begin(readings, replace(state, time_s=readings.time_s))
    verdicts = [found]
    for rule in (_lost_gpu, _power, _heat, _budget, _window, _sensors_known):
        verdict, state = rule(readings, limits, state)
        verdicts.append(verdict)
    actions = {verdict.action for verdict in verdicts}
    action: Action = "stop" if "stop" in actions else "pause" if "pause" in actions else "run"
    stop_kind = next((verdict.stop_kind for verdict in verdicts if verdict.stop_kind is not None), None)
    state = replace(state, stop_kind=stop_kind)
    limits_w, told = untouched, tuple[str, ...]()
    if action != "stop":
        # A paused GPU cools, which says nothing about the share that it may draw when it works.
        wishes = _wishes(readings, limits, seconds if action == "run" else 0.0, "outage" in state.causes)
        control, limits_w, told = steer(state.control, readings.gpus, readings.gpu_limits, wishes)
        fall, state = _speed(readings, limits, replace(state, control=control), action)
        verdicts.append(fall)
    decision = Decision(
        action=action,
        save=stop_kind != "gpu_lost" and any(verdict.save for verdict in verdicts),
        pace=0.0 if action == "stop" else state.control.pace,
        power_limits_w=limits_w,
        reasons=tuple(text for verdict in verdicts for text in verdict.reasons) + told,
        stop_kind=stop_kind,
        notes=tuple(text for verdict in verdicts for text in verdict.notes),
    )
    return decision, state


def limits_to_restore(state: GuardState) -> tuple[float | None, ...]:
    """Power limits to set when the guard ends, as they were found; None where it changed nothing."""
    return tuple(None if one.set_w in (None, one.full_w) else one.full_w for one in state.control.gpus)


def _complete(readings: Readings) -> Readings:
    """The readings with limits for every GPU; a GPU of which nothing is known has unknown ones."""
    count, known = len(readings.gpus), readings.gpu_limits
    if count == len(known):
        return readings
    return replace(readings, gpu_limits=(known + (_UNKNOWN_GPU,) * count)[:count])


def _begin(readings: Readings, state: GuardState) -> _Ruled:
    """On the first call the controller is made, and a limit found below the default is told."""
    if len(state.control.gpus) == len(readings.gpus):
        return _Verdict(), state
    control = begin_control(readings.gpus, readings.gpu_limits)
    notes = [
        f"GPU {gpu.index} came with a power limit of {one.full_w:.0f} W (default {limit.power_default_w:.0f} W): "
        "the guard does not raise it"
        for one, gpu, limit in zip(control.gpus, readings.gpus, readings.gpu_limits, strict=True)
        if one.full_w is not None and limit.power_default_w is not None and one.full_w < limit.power_default_w - 1
    ]
    return _Verdict(notes=tuple(notes)), replace(state, control=control)


def _wishes(readings: Readings, limits: GuardLimits, seconds: float, outage: bool) -> Wishes:
    return Wishes(
        time_s=readings.time_s,
        seconds=seconds,
        excesses_c=_excesses(readings, limits),
        ceiling_w=limits.max_power_w,
        least_power=outage,
        may_set_power=readings.may_set_power,
    )


def _excesses(readings: Readings, limits: GuardLimits) -> tuple[float | None, ...]:
    pairs = zip(readings.gpus, readings.gpu_limits, strict=True)
    return tuple(excess_c(gpu, limit, limits.target_temperature_c) for gpu, limit in pairs)


def _turn(state: GuardState, cause: str, on: bool) -> tuple[bool, bool, GuardState]:
    """Whether the cause begins now, whether it ends now, and the state that knows."""
    was = cause in state.causes
    if on == was:
        return False, False, state
    return on, was, replace(state, causes=state.causes ^ {cause})


def _lost_gpu(readings: Readings, _limits: GuardLimits, state: GuardState) -> _Ruled:
    lost = ", ".join(str(gpu.index) for gpu in readings.gpus if gpu.lost)
    if not lost:
        return _Verdict(), state
    text = f"GPU {lost} has fallen off the bus: it needs a cold restart (switch the machine off, wait, reboot)"
    return _Verdict("stop", False, (text,), "gpu_lost"), state  # what it held cannot be saved any more


def _power(readings: Readings, limits: GuardLimits, state: GuardState) -> _Ruled:
    mains = readings.mains
    if mains is None:
        return _Verdict(), state
    flags, state = _ups_flags(readings.ups, state)
    unknown, state = _ups_unknown(mains, readings.ups, readings.time_s, state)
    outage = mains.on_battery or ("outage" in state.causes and not mains.stable)
    began, ended, state = _turn(state, "outage", outage)
    long = mains.seconds_on_battery >= limits.outage_pause_s or "outage_pause" in state.causes
    paused, _, state = _turn(state, "outage_pause", outage and long)
    notes = flags + unknown.notes
    end = _battery_end(mains, readings.ups, limits)
    if end is not None:
        return _Verdict("stop", True, (end,), "power", notes), state
    reasons = []
    if began:
        reasons.append(f"on battery: saving now, pausing after {limits.outage_pause_s:g} s")
    if paused:
        reasons.append(f"{mains.seconds_on_battery:.0f} s on battery: paused until the mains are stable")
    if ended:
        reasons.append("the mains are stable again: going on")
    action: Action = "pause" if "outage_pause" in state.causes else "run"
    save = began or (unknown.save and not outage)
    return _Verdict(action, save, (*reasons, *unknown.reasons), None, notes), state


def _battery_end(mains: MainsState, ups: UpsReading | None, limits: GuardLimits) -> str | None:
    """Why the battery will not do, or None."""
    if mains.low or (ups is not None and ups.low):
        return "the battery is low: saving and stopping"
    runtime_s = None if ups is None or ups.state == "online" else ups.runtime_s
    needed_s = _SAVES_LEFT * limits.save_seconds
    if mains.on_battery and runtime_s is not None and runtime_s < needed_s:
        return (
            f"the battery lasts {format_seconds(runtime_s)}, less than the {format_seconds(needed_s)} that "
            f"{_SAVES_LEFT} saves take: saving and stopping"
        )
    return None


def _ups_unknown(mains: MainsState, ups: UpsReading | None, now_s: float, state: GuardState) -> _Ruled:
    """Saves once when the UPS stops answering; the next time only after the mains were seen stable."""
    known = mains.unknown_since_s is None and (mains.stable or mains.on_battery)
    # One lost answer is no sign: from the second in a row on.
    since_s = mains.unknown_since_s
    unknown = since_s is not None and since_s < now_s and not mains.stable
    began, ended, state = _turn(state, "ups_unknown", unknown or ("ups_unknown" in state.causes and not known))
    if began:
        why = f" ({ups.reason})" if ups is not None and ups.reason else ""
        text = f"the UPS cannot be read{why}: saving once; a power cut may come unseen"
        return _Verdict(save=True, reasons=(text,)), state
    return _Verdict(notes=("the UPS answers again",) if ended else ()), state


def _ups_flags(ups: UpsReading | None, state: GuardState) -> tuple[tuple[str, ...], GuardState]:
    """A note for each word of the UPS that its owner should know, once while it lasts."""
    notes = []
    for word, meaning in _UPS_WORDS.items():
        began, _, state = _turn(state, f"ups_{word}", ups is not None and word in ups.flags)
        notes += [f"the UPS {meaning}"] if began else []
    return tuple(notes), state


def _heat(readings: Readings, limits: GuardLimits, state: GuardState) -> _Ruled:
    known = [excess for excess in _excesses(readings, limits) if excess is not None]
    worst = max(known, default=None)
    bits = hardware_slowdowns(readings.gpus)
    hot = worst is not None and worst >= _HOT_C
    since_s = _first(state.hot_since_s, readings.time_s) if hot else None
    if since_s != state.hot_since_s:
        state = replace(state, hot_since_s=since_s)
    near = near_shutdown(readings.gpus, readings.gpu_limits)
    if near is not None:
        return _Verdict("stop", True, (near,), "heat"), state
    if state.heat_paused_since_s is not None:
        return _while_paused_for_heat(readings, limits, state, worst, bits)
    if not bits and (since_s is None or readings.time_s - since_s < _HOT_S):
        return _Verdict(), state
    why = slowdown_cause(bits) or f"{worst or 0:.0f} °C above the target for {_HOT_S:.0f} s"
    text = f"{_hottest(readings, limits)}: {why}; saving and pausing until it is {_COOL_C:.0f} °C below the target"
    paused = replace(state, heat_paused_since_s=readings.time_s, control=back_off(state.control))
    return _Verdict("pause", True, (text,)), paused


def _while_paused_for_heat(
    readings: Readings, limits: GuardLimits, state: GuardState, worst: float | None, bits: frozenset[str]
) -> _Ruled:
    assert state.heat_paused_since_s is not None
    waited_s = readings.time_s - state.heat_paused_since_s
    if worst is not None and worst < -_COOL_C and not bits:
        text = f"{_hottest(readings, limits)}: cool again after {format_seconds(waited_s)}, going on"
        return _Verdict(reasons=(text,)), replace(state, heat_paused_since_s=None)
    hot = worst is not None and worst >= _HOT_C
    if waited_s < _HOT_PAUSE_S or not (hot or bits):
        return _Verdict("pause"), state
    why = slowdown_cause(bits) or f"still {worst or 0:.0f} °C above the target"
    text = f"{_hottest(readings, limits)}: {why} {waited_s:.0f} s after the pause; saving and stopping, see to its fans"
    kind: StopKind = "power" if not hot and bits == {"hw_power_brake_slowdown"} else "heat"
    return _Verdict("stop", True, (text,), kind), state


def _hottest(readings: Readings, limits: GuardLimits) -> str:
    return hottest(readings.gpus, readings.gpu_limits, limits.target_temperature_c)


def _budget(readings: Readings, limits: GuardLimits, state: GuardState) -> _Ruled:
    budget = limits.budget
    if budget is None:
        return _Verdict(), state
    spent = readings.energy_kwh if budget.unit == "kWh" else readings.money
    began, state = _long_unknown(state, "energy", spent is None, readings.time_s)
    if spent is None:
        text = f"the run's energy cannot be measured: its budget of {budget} is not watched"
        return _Verdict(notes=(text,) if began else ()), state
    if spent >= budget.amount:
        text = f"the budget of {budget} is used up ({spent:.2f} {budget.unit}): saving and stopping"
        return _Verdict("stop", True, (text,), "budget"), state
    began, _, state = _turn(state, "budget_nearly", spent >= _NEARLY_SPENT * budget.amount)
    text = f"{spent / budget.amount:.0%} of the budget of {budget} is used"
    return _Verdict(notes=(text,) if began else ()), state


def _window(readings: Readings, limits: GuardLimits, state: GuardState) -> _Ruled:
    weekday, minute = readings.weekday, readings.local_minute_of_day
    closed = not open_window(limits.windows, weekday, minute)
    began, ended, state = _turn(state, "window", closed)
    if not closed:
        return _Verdict(reasons=("inside the hours in which it may run: going on",) if ended else ()), state
    opens, wait = next_opening(limits.windows, weekday, minute)
    text = f"outside the hours in which it may run: saved and paused until {opens}, in {format_seconds(wait * 60)}"
    return _Verdict("pause", began, (text,) if began else ()), state


def _sensors_known(readings: Readings, limits: GuardLimits, state: GuardState) -> _Ruled:
    blind = bool(readings.gpus) and all(gpu.temperature_c is None for gpu in readings.gpus)
    unmetered = limits.max_power_w is not None and any(gpu.power_w is None for gpu in readings.gpus)
    blind_now, state = _long_unknown(state, "temperature", blind, readings.time_s)
    unmetered_now, state = _long_unknown(state, "power", unmetered, readings.time_s)
    notes = []
    if blind_now:
        notes.append(f"no GPU temperature could be read for {_UNKNOWN_S:.0f} s: nothing guards against heat")
    if unmetered_now:
        notes.append(f"GPU power cannot be read: nobody sees whether it stays under {limits.max_power_w:g} W")
    return _Verdict(notes=tuple(notes)), state


def _long_unknown(state: GuardState, what: str, unknown: bool, now_s: float) -> tuple[bool, GuardState]:
    """Whether it has now been unknown for a minute, told once, and the state that knows."""
    since_s = dict(state.unknown_since_s)
    if unknown != (what in since_s):
        since_s = since_s | {what: now_s} if unknown else {name: since_s[name] for name in since_s if name != what}
        state = replace(state, unknown_since_s=tuple(since_s.items()))
    began, _, state = _turn(state, f"unknown_{what}", unknown and now_s - since_s[what] >= _UNKNOWN_S)
    return began, state


def _first(since_s: float | None, now_s: float) -> float:
    return now_s if since_s is None else since_s


def _speed(readings: Readings, limits: GuardLimits, state: GuardState, action: Action) -> _Ruled:
    """A note when tokens/s fall and nothing visible explains it: memory heat that GeForce cards do not tell."""
    speed, now_s = readings.tokens_per_second, readings.time_s
    cores = [
        gpu.temperature_c - core_target_c(limit, limits.target_temperature_c)
        for gpu, limit in zip(readings.gpus, readings.gpu_limits, strict=True)
        if gpu.temperature_c is not None
    ]
    if action != "run" or limited(state.control) or not cores or max(cores) > _CALM_C:
        return _Verdict(), replace(state, speeds=()) if state.speeds else state
    if speed is None or (state.speeds and now_s - state.speeds[-1][0] < _SPEED_EVERY_S):
        return _Verdict(), state
    speeds = recent_speeds((*state.speeds, (now_s, speed)))
    fallen = fallen_speed(speeds)
    began, _, state = _turn(replace(state, speeds=speeds), "slow", fallen is not None)
    text = f"{fallen}, with a calm core and no limit of ours: probably heat of its memory, or the power supply"
    return _Verdict(notes=(text,) if began else ()), state
