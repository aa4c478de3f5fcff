"""A training run obeys the guard (power, hours, budget, heat) and the wishes in its folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from charkha.store.control import Control
from charkha.store.runs import RunFolder
from real_nut import HERE, RealNut

MakeProject = Callable[..., Any]
MANY_STEPS = {"max_steps": 400, "eval_every": 1000, "batch_size": 8, "micro_batch_size": 8}


@pytest.fixture
def quick_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks ten times a second, pauses half a second into an outage, and trusts mains after a second."""
    from charkha.guard_limits import GuardLimits
    from charkha.training import guarding

    def limits(config: Any) -> GuardLimits:
        return GuardLimits(
            outage_pause_s=0.5,
            save_seconds=1.0,
            budget=guarding.parse_budget(config.guard.budget, config.cost.currency),
            windows=guarding.parse_windows(config.guard.windows),
        )

    monkeypatch.setattr(guarding, "guard_limits", limits)
    init = guarding.RunGuard.__init__
    monkeypatch.setattr(
        guarding.RunGuard,
        "__init__",
        lambda self, *args, **rest: init(self, *args, every_s=0.1, mains_stable_s=1.0, **rest),
    )


class Mains:
    """A mains that a test switches, seen by the run through a command."""

    def __init__(self, folder: Path) -> None:
        self._state = folder / "mains"
        self._probe = folder / "probe.py"
        self._probe.write_text(f"import sys; sys.exit(int(open({str(self._state)!r}).read()))")
        self.on()

    @property
    def setting(self) -> str:
        return f"command:{sys.executable} {self._probe}"

    def on(self) -> None:
        self._state.write_text("0")

    def off(self) -> None:
        self._state.write_text("1")

    def low(self) -> None:
        self._state.write_text("2")


@pytest.fixture
def mains(tmp_path: Path) -> Mains:
    return Mains(tmp_path)


class Watcher:
    """The events of a run that trains in this thread, with a script that acts on them from another."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def __call__(self, event: dict[str, Any]) -> None:
        self.events.append(event | {"seen_s": time.monotonic()})

    def wait_for(self, what: Callable[[dict[str, Any]], bool], after: int = 0) -> int:
        """The number of the first such event from `after` on; fails after half a minute."""
        for _ in range(1500):
            for number in range(after, len(self.events)):
                if what(self.events[number]):
                    return number
            time.sleep(0.02)
        raise AssertionError(f"not seen; the last: {self.events[-3:]}")


def train_with(work: Any, script: Callable[[Watcher], None], *overrides: str) -> tuple[Any, Watcher]:
    from charkha.training.session import train

    watcher = Watcher()
    failures: list[BaseException] = []

    def acting() -> None:
        try:
            script(watcher)
        except BaseException as failure:  # noqa: BLE001  # told below; the run must end either way
            failures.append(failure)
            os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=acting)
    thread.start()
    result = train(work.config, [*overrides, "output=run"], watcher)
    thread.join()
    if failures:
        raise failures[0]
    return result, watcher


def is_step(event: dict[str, Any]) -> bool:
    return bool(event["event"] == "step")


def is_status(status: str) -> Callable[[dict[str, Any]], bool]:
    return lambda event: bool(event["event"] == "status" and event["status"] == status)


@pytest.mark.usefixtures("quick_guard")
def test_an_outage_saves_pauses_and_goes_on_and_a_low_battery_stops_with_everything_saved(
    project: MakeProject, mains: Mains
) -> None:
    work = project(training=MANY_STEPS, checkpoint={"every": "1000 steps"}, guard={"ups": mains.setting})
    times: dict[str, float] = {}

    def script(seen: Watcher) -> None:
        place = seen.wait_for(is_step)
        mains.off()
        times["off"] = time.monotonic()
        place = seen.wait_for(lambda event: event["event"] == "checkpoint", place)
        times["saved"] = seen.events[place]["seen_s"]
        place = seen.wait_for(is_status("waiting"), place)
        steps = sum(map(is_step, seen.events))
        time.sleep(0.5)
        assert sum(map(is_step, seen.events)) == steps, "it works on although it waits"
        mains.on()
        place = seen.wait_for(is_status("running"), place)
        place = seen.wait_for(is_step, place)
        mains.low()
        seen.wait_for(is_status("paused"), place)

    result, seen = train_with(work, script)
    assert result.status == "paused"
    assert times["saved"] - times["off"] < 2 + 1
    checkpoints = [event["step"] for event in seen.events if event["event"] == "checkpoint"]
    assert checkpoints[-1] == result.steps
    (paused,) = [event for event in seen.events if is_status("paused")(event)]
    assert "battery" in paused["reason"]
    mains.on()
    resumed, _ = train_with(work, lambda seen: None, "training.max_steps=400")
    assert (resumed.status, resumed.steps, resumed.resumes) == ("done", 400, 1)


@pytest.mark.usefixtures("quick_guard")
def test_a_real_ups_daemon_makes_a_real_run_save_wait_go_on_and_stop(project: MakeProject, nut: RealNut) -> None:
    """NUT: OL, OB, OL, OB LB. The driver looks at its file once a second."""
    nut.set("home", "OL", 100)
    nut.until("home", "online")
    work = project(
        training=MANY_STEPS, checkpoint={"every": "1000 steps"}, guard={"ups": f"nut:home@{HERE}:{nut.port}"}
    )
    seconds: dict[str, float] = {}

    def script(seen: Watcher) -> None:
        place = seen.wait_for(is_step)
        nut.set("home", "OB DISCHRG", 80)
        nut.until("home", "on_battery")
        began = time.monotonic()
        place = seen.wait_for(lambda event: event["event"] == "checkpoint", place)
        seconds["to save"] = max(0.0, seen.events[place]["seen_s"] - began)
        place = seen.wait_for(is_status("waiting"), place)
        nut.set("home", "OL CHRG", 70)
        place = seen.wait_for(is_step, seen.wait_for(is_status("running"), place))
        nut.set("home", "OB LB", 19)
        nut.until("home", "on_battery")
        began = time.monotonic()
        place = seen.wait_for(is_status("paused"), place)
        seconds["to stop"] = max(0.0, seen.events[place]["seen_s"] - began)

    result, seen = train_with(work, script)
    assert (result.status, result.resumes) == ("paused", 0)
    longest_step = max(event["seconds"] for event in seen.events if is_step(event))
    assert seconds["to save"] < longest_step + 2
    assert seconds["to stop"] < longest_step + 2
    nut.set("home", "OL", 100)
    nut.until("home", "online")
    resumed, _ = train_with(work, lambda seen: None)
    assert (resumed.status, resumed.resumes) == ("done", 1)


@pytest.mark.usefixtures("quick_guard")
def test_mains_that_flap_cause_one_save(project: MakeProject, mains: Mains) -> None:
    work = project(training=MANY_STEPS, checkpoint={"every": "1000 steps"}, guard={"ups": mains.setting})

    def script(seen: Watcher) -> None:
        seen.wait_for(is_step)
        for _ in range(6):
            mains.off()
            time.sleep(0.4)
            mains.on()
            time.sleep(0.3)
        seen.wait_for(is_status("running"), seen.wait_for(is_status("waiting")))
        os.kill(os.getpid(), signal.SIGTERM)

    _, seen = train_with(work, script)
    asked = [event for event in seen.events if event["event"] == "guard" and event["save"]]
    assert len(asked) == 1


@pytest.mark.usefixtures("quick_guard")
def test_outside_its_hours_a_run_waits_and_says_when_it_goes_on(project: MakeProject) -> None:
    soon = time.localtime(time.time() + 7200)
    later = time.localtime(time.time() + 10800)
    window = f"{soon.tm_hour:02}:{soon.tm_min:02}-{later.tm_hour:02}:{later.tm_min:02}"
    work = project(training=MANY_STEPS, guard={"windows": [window], "ups": "none"})

    def script(seen: Watcher) -> None:
        seen.wait_for(is_status("waiting"))
        os.kill(os.getpid(), signal.SIGTERM)

    result, seen = train_with(work, script)
    assert (result.status, result.steps) == ("paused", 1)
    (waiting,) = [event for event in seen.events if is_status("waiting")(event)]
    assert f"{soon.tm_hour:02}:{soon.tm_min:02}" in waiting["reason"]


@pytest.mark.usefixtures("quick_guard")
def test_a_run_stops_when_its_budget_is_used_up(project: MakeProject, monkeypatch: pytest.MonkeyPatch) -> None:
    from charkha.training import guarding

    monkeypatch.setattr(guarding.CpuPower, "watts", lambda self: 360_000.0)  # 0.1 kWh a second, ten in money
    work = project(training=MANY_STEPS, guard={"budget": 6, "ups": "none"})
    result, seen = train_with(work, lambda seen: None)
    assert result.status == "paused"
    assert 0 < result.steps < 400
    (paused,) = [event for event in seen.events if is_status("paused")(event)]
    assert "6 INR" in paused["reason"]
    notes = [event["text"] for event in seen.events if event["event"] == "note"]
    assert any("% of the budget of 6 INR is used" in text for text in notes)


@pytest.mark.parametrize("wish", ["pause", "stop"])
def test_a_run_is_steered_through_its_folder(project: MakeProject, wish: Any) -> None:
    work = project(training=MANY_STEPS, checkpoint={"every": "1000 steps"}, guard={"ups": "none"})
    control = Control(work.run_folder())

    def script(seen: Watcher) -> None:
        place = seen.wait_for(is_step)
        command = [sys.executable, "-m", "charkha", wish, str(work.run_folder()), "--json"]
        told = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        assert told["wish"] == wish
        if wish == "pause":
            place = seen.wait_for(is_status("waiting"), place)
            control.set_wish("run")
            place = seen.wait_for(is_status("running"), place)
            seen.wait_for(is_step, place)
            control.set_wish("stop")

    result, seen = train_with(work, script)
    assert result.status == "paused"
    assert [event["step"] for event in seen.events if event["event"] == "checkpoint"][-1] == result.steps
    assert control.wish() == "stop"
    train_with(work, lambda seen: control.set_wish("stop") if seen.wait_for(is_step) else None)
    assert RunFolder(work.run_folder()).events()[-1]["status"] == "paused", "a new start begins without an old wish"


@pytest.mark.usefixtures("quick_guard")
def test_a_guard_that_fails_ends_the_run_instead_of_leaving_it_unguarded(
    project: MakeProject, mains: Mains, monkeypatch: pytest.MonkeyPatch
) -> None:
    from charkha.hardware import ups

    work = project(training=MANY_STEPS, guard={"ups": mains.setting})
    read = ups.CommandUps.read
    answers: list[int] = []

    def breaks(self: Any) -> Any:
        answers.append(1)
        if len(answers) > 20:
            raise ZeroDivisionError("a bug in the guard")
        return read(self)

    monkeypatch.setattr(ups.CommandUps, "read", breaks)
    with pytest.raises(ZeroDivisionError, match="a bug in the guard"):
        train_with(work, lambda seen: None)


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A guard that sees one GPU whose readings a test sets; a real process over the stand-in is in tests/hardware."""
    from charkha.hardware.sensors import GpuLimits, GpuReading
    from charkha.training import guarding

    seen: dict[str, Any] = {"temperature_c": 60.0, "power_limit_w": 350.0, "set": [], "permitted": True}

    class OneGpu:
        count = 1

        def read(self, index: int) -> GpuReading:
            return GpuReading(
                index, temperature_c=seen["temperature_c"], power_w=300.0, power_limit_w=seen["power_limit_w"]
            )

        def limits(self, index: int) -> GpuLimits:
            return GpuLimits("card", "GPU-1", 98, 103, 93, None, 350, 100, 400)

        def set_power_limit(self, index: int, watts: float) -> None:
            if not seen["permitted"]:
                raise guarding.NotPermitted("only root")
            seen["power_limit_w"] = watts
            seen["set"].append(watts)

    from charkha.training import session

    monkeypatch.setattr(guarding, "open_nvml", OneGpu)
    monkeypatch.setattr(session, "_gpu_indices", lambda nvml, processes: [0])
    return seen


@pytest.mark.usefixtures("quick_guard")
def test_heat_lowers_the_power_limit_where_permitted_and_the_limit_is_put_back(
    project: MakeProject, a_gpu: dict[str, Any]
) -> None:
    work = project(training=MANY_STEPS, guard={"ups": "none"})

    def script(seen: Watcher) -> None:
        place = seen.wait_for(is_step)
        a_gpu["temperature_c"] = 85.0
        for _ in range(300):
            if a_gpu["power_limit_w"] < 345:
                break
            time.sleep(0.02)
        assert a_gpu["power_limit_w"] < 345
        seen.wait_for(lambda event: event["event"] == "guard" and event["power_limit_w"] is not None, place)
        os.kill(os.getpid(), signal.SIGTERM)

    train_with(work, script)
    assert a_gpu["power_limit_w"] == 350


@pytest.mark.usefixtures("quick_guard")
def test_a_limit_that_a_killed_process_left_lowered_is_put_back_by_the_next_one(
    project: MakeProject, a_gpu: dict[str, Any]
) -> None:
    """What is on the disk while the limit is lowered is what a `kill -9` leaves."""
    work = project(training=MANY_STEPS, guard={"ups": "none"})
    left: list[bytes] = []
    kept = work.run_folder() / "power-limit-GPU-1.json"

    def heats_up(seen: Watcher) -> None:
        seen.wait_for(is_step)
        a_gpu["temperature_c"] = 85.0
        seen.wait_for(lambda event: event["event"] == "guard" and event["power_limit_w"] is not None)
        left.append(kept.read_bytes())
        os.kill(os.getpid(), signal.SIGTERM)

    train_with(work, heats_up)
    assert not kept.exists()
    kept.write_bytes(left[0])
    a_gpu.update(power_limit_w=210.0, temperature_c=60.0)

    def only_stops(seen: Watcher) -> None:
        seen.wait_for(lambda event: is_step(event) and event["step"] >= 2)
        os.kill(os.getpid(), signal.SIGTERM)

    _, seen = train_with(work, only_stops)
    assert any("power limit of 210 W that a killed process" in event.get("text", "") for event in seen.events)
    assert a_gpu["power_limit_w"] == 350
    assert not kept.exists()


@pytest.mark.usefixtures("quick_guard")
def test_a_folder_that_takes_nothing_does_not_keep_the_limit_from_being_lowered(
    project: MakeProject, a_gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from charkha.training.power_limit import FoundLimit

    def full(self: FoundLimit, watts: float) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FoundLimit, "keep", full)
    work = project(training=MANY_STEPS, guard={"ups": "none"})

    def script(seen: Watcher) -> None:
        seen.wait_for(is_step)
        a_gpu["temperature_c"] = 85.0
        seen.wait_for(lambda event: event["event"] == "guard" and event["power_limit_w"] is not None)
        seen.wait_for(lambda event: "could not be written down" in event.get("text", ""))
        os.kill(os.getpid(), signal.SIGTERM)

    result, _ = train_with(work, script)
    assert result.status == "paused"
    assert a_gpu["power_limit_w"] == 350


def test_a_limit_that_its_owner_put_back_and_lowered_again_is_left_alone(tmp_path: Path, a_gpu: dict[str, Any]) -> None:
    from charkha.training import guarding
    from charkha.training.power_limit import FoundLimit

    FoundLimit(tmp_path, "GPU-1").keep(350)
    guarding._Gpu(guarding.open_nvml(), 0, tmp_path)
    a_gpu["power_limit_w"] = 250.0
    gpu = guarding._Gpu(guarding.open_nvml(), 0, tmp_path)
    assert (a_gpu["power_limit_w"], gpu.notes) == (250, [])


@pytest.mark.parametrize("change", ["boot", "gpu", "damage"])
def test_a_kept_limit_of_another_card_or_an_earlier_start_of_the_machine_is_not_believed(
    tmp_path: Path, change: str
) -> None:
    from charkha.training.power_limit import FoundLimit

    FoundLimit(tmp_path, "GPU-1").keep(350)
    assert FoundLimit(tmp_path, "GPU-1").left() == 350
    path = tmp_path / "power-limit-GPU-1.json"
    record = json.loads(path.read_bytes())
    path.write_text("{" if change == "damage" else json.dumps({**record, change: "other"}))
    assert FoundLimit(tmp_path, "GPU-1").left() is None


@pytest.mark.usefixtures("quick_guard")
def test_heat_slows_the_steps_down_without_the_right_to_set_limits(project: MakeProject, a_gpu: dict[str, Any]) -> None:
    a_gpu["permitted"] = False
    work = project(training=MANY_STEPS, guard={"ups": "none"})

    def script(seen: Watcher) -> None:
        seen.wait_for(is_step)
        a_gpu["temperature_c"] = 85.0
        seen.wait_for(lambda event: event["event"] == "guard" and event["pace"] > 0)
        os.kill(os.getpid(), signal.SIGTERM)

    _, seen = train_with(work, script)
    assert a_gpu["set"] == []
    assert any(event["event"] == "guard" and event["pace"] > 0 for event in seen.events)
