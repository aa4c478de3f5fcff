"""The controller of heat and watts: which power limit each GPU gets, and which share of the time all of them idle.

Each GPU has a `share`: the part of its full power that it may draw. A proportional-integral controller moves the share
so that the hotter of core and memory, measured from its own target, settles at the target. A share above the card's
least power limit becomes a power limit, which costs the least speed (the last watts buy few clocks); what lies below
it, or all of it where limits may not be set, becomes idling between steps.

Gains. A card at full power would settle 30 to 90 K above the room, with a time constant of 20 to 300 s. A gain of
0.05 per K and 90 s of integration keep the loop damped over that whole range (tests/test_guard.py drives it).

Not covered: pacing holds the mean of the watts, never their peak within a step; only power limits do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from charkha.hardware.sensors import GpuLimits, GpuReading

_GAIN_PER_K = 0.05
_INTEGRATION_S = 90.0
_ENGAGE_C = 5.0  # degrees below the target from which a rise is answered, and earlier
_LOOK_AHEAD_S = 40.0  # by the degrees that it rises in this time
_CALM_C = 1.0  # within this band of the target nothing small is changed: readings are whole degrees, with noise
_SMOOTHING_S = 5.0
_SLEW_PER_S = 0.03
_UNUSED = 0.03  # share by which a limit may lie above what the card draws when heat comes
_DEMAND_MEMORY_S = 120.0
_LEAST_CHANGE = 0.02  # of full power or of time; less is not worth a call
_LEAST_CHANGE_CALM = 0.06
_TELL_CHANGE = 0.1
_MOST_PACE = 0.9
_CEILING_AIM = 0.97  # cards overshoot a limit for moments
_CEILING_GRACE_S = 5.0  # limits take a few readings to work before pacing helps them
_CEILING_MEMORY_S = 20.0
_BEFORE_SHUTDOWN_C = 5.0
_MEMORY_MARGIN_C = 5.0
_SLOWDOWN_MARGIN_C = 3.0
_HARDWARE_BITS = frozenset({"hw_thermal_slowdown", "hw_power_brake_slowdown"})
_SPEED_RECENT_S, _SPEED_LEAST_S, _SPEED_MEMORY_S = 60.0, 240.0, 600.0
_SPEED_FALL = 0.15
_AFTER_PAUSE = 0.8  # share of the share that was too much


@dataclass(frozen=True)
class GpuControl:
    """What the controller remembers of one GPU."""

    full_w: float | None  # power limit found at the start, at most the default; never exceeded
    share: float = 1.0
    excess_c: float | None = None  # smoothed
    demand_w: float | None = None  # highest draw of the last minutes
    set_w: float | None = None  # limit asked for last; None: untouched
    told_w: float | None = None


@dataclass(frozen=True)
class Control:
    """What the controller remembers of the machine."""

    gpus: tuple[GpuControl, ...] = ()
    pace: float = 0.0
    told_pace: float = 0.0
    demand_w: float | None = None  # of all GPUs without pacing; None while the ceiling needs no pacing
    over_since_s: float | None = None


@dataclass(frozen=True)
class Wishes:
    """What the power may be just now. `excesses_c` are degrees above the target per GPU, None where unknown."""

    time_s: float
    seconds: float
    excesses_c: tuple[float | None, ...]
    ceiling_w: float | None
    least_power: bool  # on battery
    may_set_power: bool


def excess_c(reading: GpuReading, limits: GpuLimits, target_c: float) -> float | None:
    """Degrees above the target, of core or memory, whichever is worse; None where neither can be read.

    The core's target is clipped to 3 degrees below the card's own slowdown, the memory's is 5 below its maximum.
    """
    return max((excess for excess, _ in _measured(reading, limits, target_c)), default=None)


def _measured(reading: GpuReading, limits: GpuLimits, target_c: float) -> list[tuple[float, str]]:
    """Degrees above the target, with a name and the reading, of core and memory where they are known."""
    found = []
    core_c, memory_c, maximum_c = reading.temperature_c, reading.memory_temperature_c, limits.memory_maximum_c
    if core_c is not None:
        found.append((core_c - core_target_c(limits, target_c), f"GPU {reading.index} at {core_c:.0f} °C"))
    if memory_c is not None and maximum_c is not None:
        name = f"the memory of GPU {reading.index} at {memory_c:.0f} °C"
        found.append((memory_c - (maximum_c - _MEMORY_MARGIN_C), name))
    return found


def core_target_c(limits: GpuLimits, target_c: float) -> float:
    """The target, clipped to what the card itself allows."""
    return target_c if limits.slowdown_c is None else min(target_c, limits.slowdown_c - _SLOWDOWN_MARGIN_C)


def hottest(gpus: Sequence[GpuReading], limits: Sequence[GpuLimits], target_c: float) -> str:
    """What is furthest above its target, as `GPU 0 at 87 °C`."""
    known = [found for gpu, limit in zip(gpus, limits, strict=True) for found in _measured(gpu, limit, target_c)]
    return max(known)[1] if known else "a GPU whose temperature cannot be read"


def near_shutdown(gpus: Sequence[GpuReading], limits: Sequence[GpuLimits]) -> str | None:
    """The GPU that will soon switch itself off, as a sentence; None where there is none."""
    for gpu, limit in zip(gpus, limits, strict=True):
        if gpu.temperature_c is None or limit.shutdown_c is None:
            continue
        if gpu.temperature_c >= limit.shutdown_c - _BEFORE_SHUTDOWN_C:
            return (
                f"GPU {gpu.index} at {gpu.temperature_c:.0f} °C is near the {limit.shutdown_c:.0f} °C at which it "
                "switches itself off: saving and stopping"
            )
    return None


def hardware_slowdowns(gpus: Sequence[GpuReading]) -> frozenset[str]:
    """The event reasons by which the hardware itself asks for help."""
    return _HARDWARE_BITS & {reason for gpu in gpus for reason in gpu.event_reasons}


def slowdown_cause(bits: frozenset[str]) -> str | None:
    """The hardware's reason in words."""
    if "hw_thermal_slowdown" in bits:
        return "its hardware slows it for heat"
    return "a power brake slows it (power supply or cable)" if bits else None


def begin_control(gpus: Sequence[GpuReading], limits: Sequence[GpuLimits]) -> Control:
    """A controller that has done nothing yet. A limit that the owner set below the default is full power here."""
    fulls = []
    for reading, limit in zip(gpus, limits, strict=True):
        known = [watts for watts in (reading.power_limit_w, limit.power_default_w) if watts is not None]
        fulls.append(min(known, default=None))
    return Control(tuple(GpuControl(full_w) for full_w in fulls))


def steer(
    control: Control, gpus: Sequence[GpuReading], limits: Sequence[GpuLimits], wishes: Wishes
) -> tuple[Control, tuple[float | None, ...], tuple[str, ...]]:
    """The controller after these readings, the power limits to set now (None: leave), and what there is to tell."""
    may_set = wishes.may_set_power
    least_w = tuple(
        _least_limit(one, limit) if may_set else None for one, limit in zip(control.gpus, limits, strict=True)
    )
    regulated = tuple(
        _regulate(one, reading, least, excess, control.pace, wishes.seconds)
        for one, reading, least, excess in zip(control.gpus, gpus, least_w, wishes.excesses_c, strict=True)
    )
    control = replace(control, gpus=regulated)
    parts_w = _split_ceiling(control, least_w, wishes.ceiling_w)
    control, ceiling_pace = _pace_under_ceiling(control, gpus, parts_w, wishes)
    heat_pace = max((_pace_of(one, least) for one, least in zip(regulated, least_w, strict=True)), default=0.0)
    control, told_pace = _set_pace(control, heat_pace, ceiling_pace, wishes)
    set_now, limits_w, told = [], [], list(told_pace)
    for index, (one, least) in enumerate(zip(control.gpus, least_w, strict=True)):
        after, limit_w, text = _set_limit(one, gpus[index], least, parts_w[index], wishes.least_power)
        set_now.append(after)
        limits_w.append(limit_w)
        told += text
    return replace(control, gpus=tuple(set_now)), tuple(limits_w), tuple(told)


def back_off(control: Control) -> Control:
    """The controller after a pause for heat began: it goes on later with less than what was too much."""
    return replace(control, gpus=tuple(replace(one, share=one.share * _AFTER_PAUSE) for one in control.gpus))


def limited(control: Control) -> bool:
    """Whether the run is slowed by this controller."""
    lowered = (one.set_w is not None and one.full_w is not None and one.set_w < one.full_w for one in control.gpus)
    return control.pace > 0 or any(lowered)


def recent_speeds(speeds: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
    """The last minutes of (time_s, tokens per second): what the usual speed is taken from."""
    return tuple(pair for pair in speeds if pair[0] > speeds[-1][0] - _SPEED_MEMORY_S)


def fallen_speed(speeds: tuple[tuple[float, float], ...]) -> str | None:
    """That the last minute is slower than the median of all, in words; None where it is not, or too little is known."""
    now_s = speeds[-1][0]
    usual = median(speed for _, speed in speeds)
    recent = median(speed for time_s, speed in speeds if time_s > now_s - _SPEED_RECENT_S)
    if usual <= 0 or now_s - speeds[0][0] < _SPEED_LEAST_S or recent > (1 - _SPEED_FALL) * usual:
        return None
    return f"{recent:.0f} tokens/s where {usual:.0f} were usual"


def _least_limit(one: GpuControl, limits: GpuLimits) -> float | None:
    """The lowest power limit that the card takes; None where there is no room to limit it."""
    least_w = limits.power_minimum_w
    return least_w if least_w is not None and one.full_w is not None and 0 < least_w < one.full_w else None


def _regulate(
    one: GpuControl, reading: GpuReading, least_w: float | None, excess: float | None, pace: float, seconds: float
) -> GpuControl:
    """The GPU after one step of the proportional-integral controller.

    In its incremental form: clipping the share is all the anti-windup it needs.
    """
    demand_w = _recent_peak(one.demand_w, reading.power_w, seconds)
    if excess is None or one.excess_c is None or seconds <= 0:
        return replace(one, excess_c=one.excess_c if excess is None else excess, demand_w=demand_w)
    smoothed = one.excess_c + (excess - one.excess_c) * (1 - math.exp(-seconds / _SMOOTHING_S))
    rise = smoothed - one.excess_c
    if smoothed < -_ENGAGE_C - _LOOK_AHEAD_S * max(rise, 0.0) / seconds:
        rise = min(rise, 0.0)
    pull = smoothed if abs(smoothed) > _CALM_C / 2 else 0.0
    step = -_GAIN_PER_K * (rise + pull * seconds / _INTEGRATION_S)
    most = _SLEW_PER_S * seconds
    # A limit above what the card draws does nothing: when heat comes, the share starts from what is drawn.
    start = min(one.share, _drawn_share(one, least_w, demand_w, pace) + _UNUSED) if smoothed > -1 else one.share
    share = min(max(start + min(max(step, -most), most), _least_share(one, least_w)), 1.0)
    return replace(one, share=share, excess_c=smoothed, demand_w=demand_w)


def _recent_peak(before_w: float | None, power_w: float | None, seconds: float) -> float | None:
    """The highest draw, slowly forgotten, so that a save or an evaluation is not taken for small demand."""
    if power_w is None or before_w is None:
        return before_w if power_w is None else power_w
    return max(power_w, before_w * math.exp(-seconds / _DEMAND_MEMORY_S))


def _drawn_share(one: GpuControl, least_w: float | None, demand_w: float | None, pace: float) -> float:
    if least_w is None:
        return 1 - pace
    return 1.0 if demand_w is None or one.full_w is None else demand_w / one.full_w


def _least_share(one: GpuControl, least_w: float | None) -> float:
    floor = 1 - _MOST_PACE
    return floor if least_w is None or not one.full_w else floor * min(least_w / one.full_w, 1)


def _pace_of(one: GpuControl, least_w: float | None) -> float:
    """The idle share that brings a GPU from its least limit, or from full power without one, to its share."""
    if least_w is None or one.full_w is None:
        return 1 - one.share
    return max(0.0, 1 - one.share * one.full_w / least_w)


def _split_ceiling(
    control: Control, least_w: Sequence[float | None], ceiling_w: float | None
) -> tuple[float | None, ...]:
    """Each GPU's part of the ceiling in proportion to its full power, none below its least; None: no limit needed.

    None for all where a card cannot be limited: pacing holds the ceiling then.
    """
    fulls = [one.full_w for one in control.gpus]
    nothing: tuple[float | None, ...] = (None,) * len(fulls)
    if ceiling_w is None or any(full is None for full in fulls) or any(least is None for least in least_w):
        return nothing
    full, least = [watts or 0.0 for watts in fulls], [watts or 0.0 for watts in least_w]
    if sum(full) <= ceiling_w:
        return nothing
    left_w, at_least = ceiling_w * _CEILING_AIM, set[int]()
    while True:
        free = [index for index in range(len(full)) if index not in at_least]
        scale = max(0.0, left_w - sum(least[index] for index in at_least)) / (sum(full[index] for index in free) or 1)
        short = {index for index in free if full[index] * scale < least[index]}
        if not short:
            return tuple(least[i] if i in at_least else full[i] * scale for i in range(len(full)))
        at_least |= short


def _pace_under_ceiling(
    control: Control, gpus: Sequence[GpuReading], parts_w: Sequence[float | None], wishes: Wishes
) -> tuple[Control, float]:
    """The idle share that holds the watts of all GPUs under the ceiling where limits do not.

    Demand is what they would draw unpaced: believed at once when it grows, bounded by the limits in force (a reading
    within a step shows the peak, not the mean), and forgotten slowly.
    """
    total_w = _sum_known([reading.power_w for reading in gpus])
    if wishes.ceiling_w is None or total_w is None:
        return replace(control, demand_w=None, over_since_s=None), 0.0
    over_since_s = None
    if total_w > wishes.ceiling_w:
        over_since_s = wishes.time_s if control.over_since_s is None else control.over_since_s
    control = replace(control, over_since_s=over_since_s)
    held = bool(parts_w) and None not in parts_w and sum(part or 0 for part in parts_w) <= wishes.ceiling_w
    patient = over_since_s is None or wishes.time_s - over_since_s < _CEILING_GRACE_S
    if held and patient and control.demand_w is None:
        return control, 0.0
    bound_w = _sum_known([reading.power_limit_w for reading in gpus])
    unpaced_w = min(total_w / (1 - control.pace), max(total_w, bound_w or math.inf))
    demand_w = unpaced_w
    if control.demand_w is not None and unpaced_w < control.demand_w:
        forgotten = 1 - math.exp(-wishes.seconds / _CEILING_MEMORY_S)
        demand_w = control.demand_w + (unpaced_w - control.demand_w) * forgotten
    pace = max(0.0, 1 - _CEILING_AIM * wishes.ceiling_w / demand_w) if demand_w > 0 else 0.0
    return replace(control, demand_w=demand_w if pace > 0 else None), pace


def _sum_known(watts: Sequence[float | None]) -> float | None:
    known = [each for each in watts if each is not None]
    return sum(known) if known and len(known) == len(watts) else None


def _set_pace(control: Control, heat: float, ceiling: float, wishes: Wishes) -> tuple[Control, tuple[str, ...]]:
    """The pace in whole percent; small changes wait, except more of it for the ceiling's sake."""
    wanted = min(math.ceil(max(heat, ceiling) * 100 - 1e-6) / 100, _MOST_PACE)
    urgent = wanted > control.pace and ceiling >= heat
    excess = max((one.excess_c for one in control.gpus if one.excess_c is not None), default=0.0)
    small = abs(wanted - control.pace) < _worth_a_change(excess) and wanted > 0
    pace = control.pace if small and not urgent else wanted
    if abs(pace - control.told_pace) < _TELL_CHANGE and not (pace == 0 < control.told_pace):
        return replace(control, pace=pace), ()
    if pace == 0:
        text = "no idling between steps any more"
    elif ceiling > heat:
        allowed = f"the GPUs together may draw {wishes.ceiling_w:g} W"
        text = f"idling {pace:.0%} of the time: {allowed} (peaks within a step remain)"
    else:
        text = f"idling {pace:.0%} of the time: the hottest GPU is {_from_target(excess)}"
    return replace(control, pace=pace, told_pace=pace), (text,)


def _set_limit(
    one: GpuControl, reading: GpuReading, least_w: float | None, part_w: float | None, least_power: bool
) -> tuple[GpuControl, float | None, tuple[str, ...]]:
    """The GPU's memory, its new power limit or None, and a sentence when the limit has moved far."""
    if least_w is None or one.full_w is None:
        return one, None, ()
    by_cause = {"heat": max(one.share * one.full_w, least_w), "ceiling": part_w, "battery": None}
    by_cause["battery"] = least_w if least_power else None
    cause, watts = min(((name, w) for name, w in by_cause.items() if w is not None), key=lambda found: found[1])
    wanted = float(round(min(watts, one.full_w)))
    now = one.full_w if one.set_w is None else one.set_w
    at_an_end = wanted in (round(one.full_w), round(least_w))
    if wanted == round(now) or (abs(wanted - now) < _worth_a_change(one.excess_c or 0) * one.full_w and not at_an_end):
        return one, None, ()
    told_w = one.full_w if one.told_w is None else one.told_w
    untold = abs(wanted - told_w) < _TELL_CHANGE * one.full_w and one.told_w is not None and not at_an_end
    if untold:
        return replace(one, set_w=wanted), wanted, ()
    why = {
        "heat": _from_target(one.excess_c or 0.0) if wanted < round(one.full_w) else "all that it may draw",
        "ceiling": "its part of what the GPUs together may draw",
        "battery": "its least, while on battery",
    }[cause]
    text = f"GPU {reading.index}: power limit {told_w:.0f} -> {wanted:.0f} W, {why}"
    return replace(one, set_w=wanted, told_w=wanted), wanted, (text,)


def _worth_a_change(excess: float) -> float:
    """The least change that is made; a larger one near the target, where a small one would only answer its own echo."""
    return _LEAST_CHANGE_CALM if abs(excess) < _CALM_C else _LEAST_CHANGE


def _from_target(excess: float) -> str:
    side = "above" if excess >= 0 else "below"
    return f"{abs(excess):.1f} °C {side} its target"
