"""The guard's policy on invented readings and clocks, and its controller on a simulated GPU in a hot room."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest

from charkha.errors import DataError
from charkha.guard import Decision, GuardState, Readings, decide, limits_to_restore
from charkha.guard_limits import Budget, GuardLimits, next_opening, open_window, parse_budget, parse_windows
from charkha.guard_trace import changing, read_trace, run_trace, summarize_trace
from charkha.hardware.sensors import GpuLimits, GpuReading
from charkha.hardware.ups import MainsState, MainsWatch, UpsReading

CARD = GpuLimits("card", "uuid", 93.0, 98.0, None, 105.0, 350.0, 100.0, 350.0)
LIMITS = GuardLimits()
MAINS = MainsState(False, True, False, None, 0.0)


@dataclass
class Room:
    """One GPU in a room: heat capacity J/K, thermal resistance K/W, its fan's health, and what the guard set."""

    capacity: float = 900.0
    resistance: float = 0.15
    ambient_c: float = 40.0
    demand_w: float = 350.0
    whole_degrees: bool = False
    temperature_c: float = 45.0
    limit_w: float = 350.0
    pace: float = 0.0
    paused: bool = False
    power_w: float = 0.0
    index: int = 0

    def second(self) -> None:
        self.power_w = 30.0 if self.paused else min(self.limit_w, self.demand_w) * (1 - self.pace)
        flow_w = (self.temperature_c - self.ambient_c) / self.resistance
        self.temperature_c += (self.power_w - flow_w) / self.capacity

    def reading(self, **more) -> GpuReading:
        shown = math.floor(self.temperature_c) if self.whole_degrees else self.temperature_c
        return GpuReading(self.index, shown, None, self.power_w, self.limit_w, **more)

    def speed(self) -> float:
        """Of full speed: the last watts buy few clocks, idling costs what it takes."""
        return 0.0 if self.paused else (1 - self.pace) * (min(self.limit_w, self.demand_w) / self.demand_w) ** 0.4

    def best_constant_speed(self, target_c: float, may_set_power: bool) -> float:
        """Of the fastest constant setting that stays at or below the target, found by search."""
        found = []
        for step in range(1, 401):
            share = step / 400
            limit_w, pace = (max(share * 350, 100), 0.0) if may_set_power else (350, 1 - share)
            power_w = min(limit_w, self.demand_w) * (1 - pace)
            if self.ambient_c + power_w * self.resistance <= target_c:
                found.append(replace(self, limit_w=limit_w, pace=pace, paused=False).speed())
        return max(found)


class Driver:
    """Rooms driven second by second by the guard; keeps every decision."""

    def __init__(self, *rooms: Room, limits: GuardLimits = LIMITS, card: GpuLimits = CARD, **readings) -> None:
        self.rooms, self.limits, self.card, self.fixed = rooms, limits, card, {"may_set_power": True} | readings
        self.state, self.decisions, self.temperatures, self.speeds, self.watts = GuardState(), [], [], [], []

    def drive(self, seconds: int, **readings) -> list[Decision]:
        before = len(self.decisions)
        for _ in range(seconds):
            for room in self.rooms:
                room.second()
            gpus, cards = tuple(room.reading() for room in self.rooms), (self.card,) * len(self.rooms)
            now = Readings(float(len(self.decisions)), gpus=gpus, gpu_limits=cards, **(self.fixed | readings))
            decision, self.state = decide(now, self.limits, self.state)
            self.decisions.append(decision)
            self.temperatures.append(max(room.temperature_c for room in self.rooms))
            self.speeds.append(sum(room.speed() for room in self.rooms) / len(self.rooms))
            self.watts.append(sum(room.power_w for room in self.rooms))
            for room, watts in zip(self.rooms, decision.power_limits_w, strict=True):
                room.limit_w = room.limit_w if watts is None else watts
                room.pace, room.paused = decision.pace, decision.action != "run"
        return self.decisions[before:]


def changes(decisions: list[Decision]) -> int:
    """Of power limits and pace."""
    limits = sum(watts is not None for decision in decisions for watts in decision.power_limits_w)
    return limits + sum(a.pace != b.pace for a, b in pairwise(decisions))


ROOMS = {
    "a usual card at 40 degrees": {},
    "whole degrees": {"whole_degrees": True},
    "a card that warms in seconds": {"capacity": 150.0, "resistance": 0.14, "whole_degrees": True},
    "a heavy heatsink": {"capacity": 2000.0},
    "a dusty heatsink in a very hot room": {"ambient_c": 45.0, "resistance": 0.25, "whole_degrees": True},
    "less demand than the limit": {"demand_w": 300.0},
}


@pytest.mark.parametrize("may_set_power", [True, False])
@pytest.mark.parametrize("room", ROOMS.values(), ids=ROOMS.keys())
def test_holds_the_target_without_oscillation_at_nearly_the_best_speed(room, may_set_power):
    room = Room(**room)
    driver = Driver(room, may_set_power=may_set_power)
    driver.drive(1500)
    settled = driver.temperatures[600:]
    assert min(settled) > 81
    assert max(settled) < 85
    assert max(driver.temperatures) < 87
    best = room.best_constant_speed(83, may_set_power)
    assert sum(driver.speeds[600:]) / len(settled) > 0.95 * best
    assert changes(driver.decisions) < 60
    assert changes(driver.decisions[600:]) < 15
    assert {decision.action for decision in driver.decisions} == {"run"}
    used = any(watts is not None for decision in driver.decisions for watts in decision.power_limits_w)
    assert used == may_set_power
    assert (driver.decisions[-1].pace > 0) != may_set_power


def test_follows_a_room_that_warms_and_cools_through_the_day():
    room = Room(whole_degrees=True)
    driver = Driver(room)
    driver.drive(600)
    for minute in range(40):
        room.ambient_c = 40 + 5 * math.sin(minute / 20)
        driver.drive(60)
    assert 81 < min(driver.temperatures[600:]) < max(driver.temperatures[600:]) < 85
    assert changes(driver.decisions[600:]) < 40


def test_a_cool_card_is_left_alone():
    driver = Driver(Room(resistance=0.1))
    driver.drive(900)
    assert changes(driver.decisions) == 0
    assert not any(decision.reasons or decision.notes for decision in driver.decisions)
    assert limits_to_restore(driver.state) == (None,)


def test_below_the_least_power_limit_it_idles_too():
    driver = Driver(Room(resistance=0.5))
    driver.drive(1800)
    assert 81 < min(driver.temperatures[900:]) < max(driver.temperatures[900:]) < 85
    assert driver.rooms[0].limit_w == 100
    assert 0 < driver.decisions[-1].pace <= 0.9


def test_the_target_is_clipped_below_the_slowdown_of_the_card():
    driver = Driver(Room(), limits=GuardLimits(90.0), card=replace(CARD, slowdown_c=85.0))
    driver.drive(1200)
    assert 80 < min(driver.temperatures[600:]) < max(driver.temperatures[600:]) < 84


def test_hot_memory_is_held_like_a_hot_core():
    state, limits = GuardState(), []
    for second in range(120):
        now = Readings(second, gpus=(GpuReading(0, 60.0, 101.5, 340.0, 350.0),), gpu_limits=(CARD,), may_set_power=True)
        decision, state = decide(now, LIMITS, state)
        limits += [watts for watts in decision.power_limits_w if watts is not None]
    assert limits
    assert limits == sorted(limits, reverse=True)
    paused, state = decide(hot_memory(200), LIMITS, state)
    paused, state = decide(hot_memory(211), LIMITS, state)
    assert (paused.action, paused.save) == ("pause", True)
    assert any("memory of GPU 0 at 105" in reason for reason in paused.reasons)


def hot_memory(second: float) -> Readings:
    return Readings(second, gpus=(GpuReading(0, 60.0, 105.0),), gpu_limits=(CARD,))


def test_a_limit_that_the_owner_set_is_never_exceeded_and_what_was_found_is_given_back():
    driver = Driver(Room(limit_w=300.0, resistance=0.18))
    first, *_ = driver.drive(1200)
    assert any("300 W" in note for note in first.notes)
    set_w = [watts for decision in driver.decisions for watts in decision.power_limits_w if watts is not None]
    assert max(set_w) <= 300
    assert limits_to_restore(driver.state) == (300.0,)


def gpu(temperature_c: float | None, *bits: str, memory_c: float | None = None, **more) -> tuple[GpuReading, ...]:
    return (GpuReading(0, temperature_c, memory_c, 300.0, 350.0, event_reasons=frozenset(bits), **more),)


class Clock:
    """Calls `decide` at invented times."""

    def __init__(self, limits: GuardLimits = LIMITS, **fixed) -> None:
        self.limits, self.state = limits, GuardState()
        self.fixed = {"gpus": gpu(70.0), "gpu_limits": (CARD,)} | fixed
        self.decisions: list[Decision] = []

    def at(self, time_s: float, **readings) -> Decision:
        decision, self.state = decide(Readings(time_s, **(self.fixed | readings)), self.limits, self.state)
        self.decisions.append(decision)
        return decision

    @property
    def saves(self) -> int:
        return sum(decision.save for decision in self.decisions)


def test_four_degrees_above_the_target_for_ten_seconds_pauses_until_it_is_cool():
    clock = Clock()
    assert [clock.at(second, gpus=gpu(88)).action for second in range(10)] == ["run"] * 10
    began = clock.at(10, gpus=gpu(88))
    assert (began.action, began.save, began.stop_kind) == ("pause", True, None)
    assert "88" in began.reasons[0]
    for second, temperature_c in [(20, 83), (40, 80), (60, 76), (70, 75)]:
        assert clock.at(second, gpus=gpu(temperature_c)).action == "pause"
    assert clock.at(80, gpus=gpu(None)).action == "pause"
    assert clock.at(90, gpus=gpu(74)).action == "run"
    assert clock.at(91, gpus=gpu(80)).action == "run"
    assert clock.saves == 1


def test_a_short_peak_does_not_pause():
    clock = Clock()
    for second in range(60):
        assert clock.at(second, gpus=gpu(88 if second % 8 else 86)).action == "run"


@pytest.mark.parametrize("bit", ["hw_thermal_slowdown", "hw_power_brake_slowdown"])
def test_the_hardware_slowing_itself_pauses_at_once_until_the_bit_is_clear(bit):
    clock = Clock()
    began = clock.at(0, gpus=gpu(70, bit))
    assert (began.action, began.save) == ("pause", True)
    assert clock.at(20, gpus=gpu(60, bit)).action == "pause"
    assert clock.at(30, gpus=gpu(78)).action == "pause"
    assert clock.at(40, gpus=gpu(60)).action == "run"
    assert clock.saves == 1


def test_bits_that_are_normal_or_unknown_do_nothing():
    clock = Clock()
    assert clock.at(0, gpus=gpu(70, "sw_power_cap", "gpu_idle", "sw_thermal_slowdown", "bit_0x200")).action == "run"


def test_a_failed_fan_pauses_then_stops():
    room = Room()
    driver = Driver(room, card=replace(CARD, slowdown_c=None, shutdown_c=None))
    driver.drive(600)
    room.resistance, room.ambient_c = 2.0, 70.0
    later = driver.drive(900)
    actions = [decision.action for decision in later]
    assert actions.index("run") < actions.index("pause") < actions.index("stop")
    stop = later[actions.index("stop")]
    assert (stop.stop_kind, stop.save) == ("heat", True)
    assert actions.index("stop") - actions.index("pause") == 120
    assert sum(decision.save for decision in later) == 2
    assert {decision.action for decision in later[actions.index("stop") :]} == {"stop"}
    assert not any(decision.reasons for decision in later[actions.index("stop") + 1 :])


def test_a_power_brake_that_stays_stops_for_power():
    clock = Clock()
    clock.at(0, gpus=gpu(50, "hw_power_brake_slowdown"))
    stop = clock.at(121, gpus=gpu(50, "hw_power_brake_slowdown"))
    assert (stop.action, stop.save, stop.stop_kind) == ("stop", True, "power")


def test_near_its_shutdown_a_card_is_stopped_at_once():
    stop = Clock().at(0, gpus=gpu(93))
    assert (stop.action, stop.save, stop.stop_kind) == ("stop", True, "heat")
    assert "98" in stop.reasons[0]


def test_after_a_pause_it_goes_on_with_less():
    clock = Clock(may_set_power=True)
    clock.at(0)
    clock.at(1, gpus=gpu(70, "hw_thermal_slowdown"))
    assert clock.state.control.gpus[0].set_w == 280


@pytest.mark.parametrize("may_set_power", [True, False])
@pytest.mark.parametrize("count", [1, 2])
def test_the_watts_of_all_gpus_stay_under_the_ceiling_within_a_few_readings(may_set_power, count):
    rooms = [Room(resistance=0.05, index=index, demand_w=340.0 - 60 * index) for index in range(count)]
    ceiling_w = 250.0 * count
    driver = Driver(*rooms, limits=GuardLimits(max_power_w=ceiling_w), may_set_power=may_set_power)
    driver.drive(600)
    assert max(driver.watts[5:]) <= ceiling_w
    assert sum(driver.watts[60:]) / len(driver.watts[60:]) > 0.9 * min(
        ceiling_w, sum(min(r.demand_w, 250) for r in rooms)
    )
    assert changes(driver.decisions) < 12
    assert any(f"{ceiling_w:g} W" in r or "its part" in r for decision in driver.decisions for r in decision.reasons)


def test_a_ceiling_below_the_least_limits_is_held_by_idling_too():
    rooms = [Room(resistance=0.05, index=index) for index in range(2)]
    driver = Driver(*rooms, limits=GuardLimits(max_power_w=150.0))
    driver.drive(120)
    assert max(driver.watts[10:]) <= 150
    assert [room.limit_w for room in rooms] == [100, 100]


def test_demand_that_grows_under_a_ceiling_is_answered():
    room = Room(resistance=0.05, demand_w=150.0)
    driver = Driver(room, limits=GuardLimits(max_power_w=200.0), may_set_power=False)
    driver.drive(60)
    assert driver.decisions[-1].pace == 0
    room.demand_w = 340.0
    driver.drive(60)
    assert max(driver.watts[65:]) <= 200
    room.demand_w = 150.0
    driver.drive(120)
    assert driver.decisions[-1].pace == 0


def test_limits_that_do_not_work_are_helped_by_idling():
    state, seen = GuardState(), Decision()
    for second in range(20):
        power_w = 340.0 * (1 - seen.pace)
        now = Readings(
            second, gpus=(GpuReading(0, 60.0, None, power_w, 350.0),), gpu_limits=(CARD,), may_set_power=True
        )
        seen, state = decide(now, GuardLimits(max_power_w=250.0), state)
    assert 340 * (1 - seen.pace) <= 250


def outage(seconds: float, **more) -> dict:
    return {"mains": replace(MainsState(True, False, False, None, seconds), **more)}


def ups(state: str = "on_battery", **more) -> UpsReading:
    return UpsReading("nut ups", state, **more)


def test_on_battery_it_saves_once_lowers_power_waits_and_goes_on_when_mains_are_stable():
    clock = Clock(may_set_power=True, mains=MAINS)
    assert clock.at(0).action == "run"
    began = clock.at(1, **outage(0))
    assert (began.action, began.save, began.power_limits_w) == ("run", True, (100.0,))
    assert [clock.at(1 + second, **outage(second)).action for second in (5, 19)] == ["run", "run"]
    assert clock.at(21, **outage(20)).action == "pause"
    assert clock.at(60, **outage(59)).action == "pause"
    assert clock.at(61, mains=MainsState(False, False, False, None, 0.0)).action == "pause"
    back = clock.at(90, mains=MAINS)
    assert (back.action, back.power_limits_w) == ("run", (350.0,))
    assert any("stable" in reason for reason in back.reasons)
    assert clock.saves == 1
    assert clock.at(200, **outage(0)).save


def test_ten_seconds_on_battery_only_save():
    clock = Clock(mains=MAINS)
    watch = MainsWatch()
    for second in range(120):
        state = "on_battery" if 50 <= second < 60 else "online"
        decision = clock.at(second, mains=watch.update(ups(state), second), ups=ups(state))
        assert decision.action == "run"
    assert clock.saves == 1


@pytest.mark.parametrize(("on_s", "off_s"), [(20, 20), (5, 5), (1, 1), (29, 3)])
def test_mains_that_flap_for_ten_minutes_cost_one_save(on_s, off_s):
    clock, watch, actions = Clock(), MainsWatch(), []
    for second in range(900):
        flapping = 60 <= second < 660
        state = "on_battery" if flapping and (second - 60) % (on_s + off_s) < off_s else "online"
        decision = clock.at(second, mains=watch.update(ups(state), second), ups=ups(state))
        actions.append(decision.action)
    assert clock.saves == 1
    assert sum(a != b for a, b in pairwise(actions)) == 2
    assert actions[-1] == "run"


@pytest.mark.parametrize(
    ("mains", "reading"),
    [
        ({"low": True}, ups(low=True)),
        ({}, ups(low=True)),
        ({}, ups(runtime_s=29.0)),
    ],
)
def test_a_battery_that_will_not_last_stops_with_a_save(mains, reading):
    clock = Clock(mains=MAINS)
    clock.at(0)
    stop = clock.at(1, ups=reading, **outage(1, **mains))
    assert (stop.action, stop.save, stop.stop_kind) == ("stop", True, "power")
    assert not clock.at(2, ups=reading, **outage(2)).save


def test_the_battery_must_last_three_saves():
    clock = Clock(replace(LIMITS, save_seconds=60.0))
    assert clock.at(0, ups=ups(runtime_s=181.0), **outage(0)).action == "run"
    assert clock.at(1, ups=ups(runtime_s=179.0), **outage(1)).stop_kind == "power"
    assert Clock().at(0, ups=ups("online", runtime_s=1.0), mains=MAINS).action == "run"


def test_a_silent_ups_is_unknown_never_fine():
    clock, watch = Clock(), MainsWatch()
    for second in range(700):
        silent = 100 <= second < 400 or second % 7 == 0
        reading = ups("unknown", reason="data stale") if silent else ups("online")
        decision = clock.at(second, mains=watch.update(reading, second), ups=reading)
        assert decision.action == "run"
    told = [reason for decision in clock.decisions for reason in decision.reasons]
    assert clock.saves == 1
    assert len(told) == 1
    assert "data stale" in told[0]


def test_words_of_the_ups_are_noted_once():
    clock = Clock(mains=MAINS)
    for second in range(5):
        clock.at(second, ups=ups("online", flags=frozenset({"BYPASS", "TRIM"})))
    notes = [note for decision in clock.decisions for note in decision.notes]
    assert len(notes) == 1
    assert "bypass" in notes[0]


@pytest.mark.parametrize(("unit", "field"), [("INR", "money"), ("kWh", "energy_kwh")])
def test_a_budget_is_noted_at_80_percent_and_stops_at_100(unit, field):
    clock = Clock(replace(LIMITS, budget=Budget(10.0, unit)))
    assert not clock.at(0, **{field: 7.9}).notes
    assert "80%" in clock.at(1, **{field: 8.0}).notes[0]
    assert not clock.at(2, **{field: 9.9}).notes
    stop = clock.at(3, **{field: 10.0})
    assert (stop.action, stop.save, stop.stop_kind) == ("stop", True, "budget")


def test_a_budget_that_cannot_be_measured_is_said_once():
    clock = Clock(replace(LIMITS, budget=Budget(10.0, "kWh")))
    notes = [note for second in range(0, 300, 10) for note in clock.at(second).notes]
    assert len(notes) == 1
    assert "not watched" in notes[0]


def test_a_window_past_midnight_belongs_to_the_day_it_begins_on():
    windows = parse_windows(["Mon-Fri 21:00-07:00"])
    monday, saturday, sunday = 0, 5, 6
    assert not open_window(windows, monday, 6 * 60)  # Sunday's night is none
    assert open_window(windows, monday, 21 * 60)
    assert open_window(windows, saturday, 6 * 60 + 59)
    assert not open_window(windows, saturday, 7 * 60)
    assert not open_window(windows, saturday, 22 * 60)
    assert next_opening(windows, saturday, 8 * 60) == ("Mon 21:00", 2 * 1440 + 13 * 60)
    assert next_opening(windows, sunday, 23 * 60 + 59)[0] == "Mon 21:00"


def test_outside_its_hours_it_saves_waits_and_goes_on():
    clock = Clock(replace(LIMITS, windows=parse_windows(["22:00-06:00"])))
    assert clock.at(0, local_minute_of_day=23 * 60).action == "run"
    assert clock.at(1, local_minute_of_day=0, weekday=1).action == "run"
    closed = clock.at(2, local_minute_of_day=6 * 60, weekday=1)
    assert (closed.action, closed.save, closed.stop_kind) == ("pause", True, None)
    assert "Tue 22:00" in closed.reasons[0]
    assert "16 h" in closed.reasons[0]
    assert clock.at(3, local_minute_of_day=6 * 60 + 1, weekday=1).reasons == ()
    assert clock.at(4, local_minute_of_day=22 * 60, weekday=1).action == "run"
    assert clock.saves == 1


def test_a_pause_ends_only_when_every_cause_has_ended():
    clock = Clock(replace(LIMITS, windows=parse_windows(["22:00-06:00"])))
    clock.at(0, local_minute_of_day=700, gpus=gpu(60, "hw_thermal_slowdown"))
    assert clock.at(10, local_minute_of_day=1320, gpus=gpu(60, "hw_thermal_slowdown")).action == "pause"
    assert clock.at(20, local_minute_of_day=700, gpus=gpu(60)).action == "pause"
    assert clock.at(30, local_minute_of_day=1320, gpus=gpu(60)).action == "run"


def test_a_lost_gpu_stops_at_once():
    stop = Clock().at(0, gpus=(GpuReading(0, 99.0), GpuReading(1, lost=True)))
    assert (stop.action, stop.save, stop.stop_kind) == ("stop", False, "gpu_lost")
    assert "GPU 1" in stop.reasons[0]
    assert "reboot" in stop.reasons[0]


def test_speed_that_falls_with_a_calm_core_is_noted_once():
    clock = Clock(gpus=gpu(62.0))
    for second in range(1200):
        speed = (1000 if second < 600 else 800) + 20 * math.sin(second)
        assert clock.at(second, tokens_per_second=speed).action == "run"
    notes = [note for decision in clock.decisions for note in decision.notes]
    assert len(notes) == 1
    assert "memory" in notes[0]


@pytest.mark.parametrize("why", ["hot core", "small fall", "one slow minute less", "capped"])
def test_speed_that_falls_for_a_visible_reason_is_not_noted(why):
    limits = GuardLimits(max_power_w=250.0) if why == "capped" else LIMITS
    clock = Clock(limits, may_set_power=True, gpus=gpu(81.0 if why == "hot core" else 62.0))
    for second in range(1200):
        falls = 600 <= second < (620 if why == "one slow minute less" else 1200)
        clock.at(second, tokens_per_second=(900 if why == "small fall" else 700) if falls else 1000)
    assert not any(decision.notes for decision in clock.decisions)


def test_unknown_readings_move_nothing_and_are_said_once():
    clock = Clock(GuardLimits(max_power_w=200.0), gpus=(GpuReading(0), GpuReading(1)), gpu_limits=())
    for second in range(300):
        decision = clock.at(second, may_set_power=True)
        assert (decision.action, decision.save, decision.pace) == ("run", False, 0.0)
        assert decision.power_limits_w == (None, None)
        assert len(decision.notes) == (2 if second == 60 else 0)  # temperature and power


def test_a_card_that_takes_no_lower_limit_idles_instead():
    for least_w in (0.0, 350.0, 400.0, None):
        driver = Driver(Room(), card=replace(CARD, power_minimum_w=least_w))
        driver.drive(900)
        assert 81 < driver.temperatures[-1] < 85
        assert driver.rooms[0].limit_w == 350


def test_without_a_gpu_nothing_is_to_be_guarded():
    clock = Clock(gpus=(), gpu_limits=())
    for second in range(0, 200, 10):
        assert clock.at(second) == Decision()


def test_deciding_changes_nothing_that_it_is_given():
    state = GuardState()
    for second in range(50):
        now = Readings(second, gpus=gpu(80 + second / 5), gpu_limits=(CARD,), may_set_power=True, **outage(second))
        before = copy.deepcopy((now, LIMITS, state))
        first, again = decide(now, LIMITS, state), decide(now, LIMITS, state)
        assert first == again
        assert (now, LIMITS, state) == before
        state = first[1]


@pytest.mark.parametrize(
    "text", ["", "25:00-06:00", "22:60-06:00", "Foo 21:00-07:00", "21-7", "Mon-", "10:00", "every day"]
)
def test_a_window_that_is_none_is_answered_with_the_forms(text):
    with pytest.raises(ValueError, match=r"22:00-06:00.*Mon-Fri 21:00-07:00.*Sat,Sun"):
        parse_windows([text])


def test_windows_are_read_as_written():
    nights, week, weekend, wrapped = parse_windows(["22:00-06:00", "mon-Friday 9:00–17:30", "Sat,Sun", "Fri-Mon"])
    assert (nights.start_minute, nights.end_minute, len(nights.weekdays)) == (1320, 360, 7)
    assert (week.weekdays, week.start_minute, week.end_minute) == ({0, 1, 2, 3, 4}, 540, 1050)
    assert weekend.holds(5, 0)
    assert weekend.holds(6, 1439)
    assert not weekend.holds(0, 0)
    assert wrapped.weekdays == {4, 5, 6, 0}
    assert parse_windows(["00:00-24:00"])[0].holds(3, 720)
    assert open_window((), 0, 0)


@pytest.mark.parametrize(
    ("value", "budget"),
    [
        (None, None),
        (500, Budget(500.0, "INR")),
        ("500", Budget(500.0, "INR")),
        ("1,500.50 inr", Budget(1500.5, "INR")),
        ("₹1,00,000", Budget(100000.0, "INR")),
        ("Rs. 750", Budget(750.0, "INR")),
        ("12 kWh", Budget(12.0, "kWh")),
        ("500Wh", Budget(0.5, "kWh")),
    ],
)
def test_budgets_are_read_as_written(value, budget):
    assert parse_budget(value, "INR") == budget


@pytest.mark.parametrize(
    "value", [0, -1, float("nan"), float("inf"), True, "", "abc", "500 USD", "12 kW", "-5 kWh", "5 5"]
)
def test_a_budget_that_is_none_is_answered_with_the_forms(value):
    with pytest.raises(ValueError, match=r"500 INR.*12 kWh"):
        parse_budget(value, "INR")


def write_trace(path, rows) -> None:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")


def test_a_trace_runs_through_the_policy_and_ends_at_the_stop(tmp_path):
    card = {"shutdown_c": 98, "power_default_w": 350, "power_minimum_w": 100}
    rows = [{"time_s": t, "gpus": [{"index": 0, "temperature_c": 88 if t < 30 else 70}]} for t in range(60)]
    rows[0]["gpu_limits"] = [card]
    rows.append({"time_s": 60, "gpus": [{"index": 0, "event_reasons": ["gpu_idle"], "lost": True}]})
    rows.append({"time_s": 61})
    write_trace(tmp_path / "trace.jsonl", rows)
    trace = read_trace(tmp_path / "trace.jsonl")
    assert trace[5].gpu_limits[0].shutdown_c == 98
    decisions = run_trace(trace, LIMITS)
    summary = summarize_trace(trace, decisions)
    assert (summary.readings, summary.pauses, summary.saves, summary.paused_seconds) == (62, 1, 1, 20)
    assert (summary.stop_kind, summary.stopped_at_s, summary.highest_temperature_c) == ("gpu_lost", 60, 88)
    changed = changing(decisions)
    assert [decision.action for _, decision in changed if decision.action != "run"] == ["pause", "stop"]
    assert len(changed) < 10


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "no JSON"),
        ("[]", "no object"),
        ('{"time_s": NaN}', "NaN"),
        ('{"time_s": 1e999}', "no JSON"),
        ("{}", "time_s"),
        ('{"time_s": "1"}', "time_s"),
        ('{"time_s": 1, "gpu": []}', "'gpu'"),
        ('{"time_s": 1, "gpus": [{"index": 0, "temperature": 70}]}', "'temperature' in gpus"),
        ('{"time_s": 1, "gpus": [{"temperature_c": 70}]}', "gpus.0.index"),
        ('{"time_s": 1, "ups": {"source": "x", "state": "fine"}}', "ups.state"),
        ('{"time_s": -5}', "before"),
        ("[" * 100000, "no JSON"),
    ],
)
def test_a_bad_line_of_a_trace_is_named(tmp_path, line, reason):
    path = tmp_path / "trace.jsonl"
    path.write_text('{"time_s": 0}\n\n' + line + "\n")
    with pytest.raises(DataError) as caught:
        read_trace(path)
    assert str(caught.value.where) == f"{path}, line 3"
    assert reason in caught.value.message
    assert caught.value.files[0].problems[0].line == 3


def test_a_trace_that_is_missing_empty_or_no_text_is_a_data_error(tmp_path):
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("missing", "empty", "binary"):
        with pytest.raises(DataError):
            read_trace(tmp_path / name)
