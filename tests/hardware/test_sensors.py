"""Sensors through the real NVML binding over a compiled stand-in for the driver's library, and RAPL's files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from charkha.hardware.sensors import CpuPower, reason_names

SOURCE = Path(__file__).with_name("nvml_stand_in.c")
AN_ADA_CARD = {
    "count": 1,
    "name": "NVIDIA GeForce RTX 4090",
    "uuid": "GPU-1",
    "temperature_c": 67,
    "power_mw": 312500,
    "power_limit_mw": 450000,
    "power_default_mw": 450000,
    "power_minimum_mw": 150000,
    "power_maximum_mw": 600000,
    "energy_mj": 123456,
    "clock_mhz": 2520,
    "event_reasons": 0x4,
    "shutdown_c": 100,
    "slowdown_c": 97,
    "maximum_c": 90,
}
ASK = """
import json, sys
from dataclasses import asdict
from charkha.hardware import sensors
nvml = sensors.open_nvml()
if nvml is None:
    print(json.dumps(None)); sys.exit()
record = {"count": nvml.count, "readings": [], "limits": []}
for index in range(nvml.count):
    reading = asdict(nvml.read(index))
    reading["event_reasons"] = sorted(reading["event_reasons"])
    record["readings"].append(reading)
    if not reading["lost"]:
        record["limits"].append(asdict(nvml.limits(index)))
record["index_of_2"] = nvml.index_of("2")
for watts in json.loads(sys.argv[1]):
    try:
        nvml.set_power_limit(0, watts)
        record["limit_w"] = nvml.read(0).power_limit_w
    except (sensors.NotPermitted, ValueError) as error:
        record["refused"] = f"{type(error).__name__}: {error}"
print(json.dumps(record))
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("nvml")
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-Wall", "-Werror", "-o", folder / "libnvidia-ml.so.1", SOURCE], check=True
    )
    return folder


@pytest.fixture
def ask(library: Path, tmp_path: Path) -> Callable[..., Any]:
    """`ask({"count": 1, ...}, limits=[300])`: what a fresh process reads of GPUs in that state."""

    def run(state: dict[str, Any], limits: tuple[float, ...] = ()) -> Any:
        path = tmp_path / "state"
        path.write_text("".join(f"{key}={value}\n" for key, value in state.items()))
        finished = subprocess.run(
            [sys.executable, "-c", ASK, json.dumps(limits)],
            env=os.environ | {"LD_LIBRARY_PATH": str(library), "NVML_STAND_IN": str(path)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert finished.returncode == 0, finished.stderr
        return json.loads(finished.stdout)

    return run


def test_a_card_is_read_in_units_of_the_names(ask: Callable[..., Any]) -> None:
    seen = ask(AN_ADA_CARD)
    assert seen["readings"] == [
        {
            "index": 0, "temperature_c": 67, "memory_temperature_c": None, "power_w": 312.5, "power_limit_w": 450,
            "energy_j": 123.456, "clock_mhz": 2520, "event_reasons": ["sw_power_cap"], "lost": False,
        }
    ]  # fmt: skip
    assert seen["limits"] == [
        {
            "name": "NVIDIA GeForce RTX 4090", "uuid": "GPU-1", "slowdown_c": 97, "shutdown_c": 100, "maximum_c": 90,
            "memory_maximum_c": None, "power_default_w": 450, "power_minimum_w": 150, "power_maximum_w": 600,
        }
    ]  # fmt: skip


def test_a_card_that_gives_margins_only_has_the_same_thresholds(ask: Callable[..., Any]) -> None:
    """The margin is 30 now at 57 degrees; it slows down at a margin of -2 and shuts down at -5."""
    state = {key: value for key, value in AN_ADA_CARD.items() if key not in ("slowdown_c", "shutdown_c", "maximum_c")}
    margins = {"temperature_c": 57, "margin_c": 30, "field194": -2, "field193": -5, "field196": 0, "field82": 71}
    seen = ask(state | margins)
    limits = seen["limits"][0]
    assert (limits["slowdown_c"], limits["shutdown_c"], limits["maximum_c"]) == (89, 92, 87)
    assert seen["readings"][0]["memory_temperature_c"] == 71


def test_an_older_driver_tells_reasons_by_their_older_name(ask: Callable[..., Any]) -> None:
    state = {key: value for key, value in AN_ADA_CARD.items() if key != "event_reasons"}
    assert ask(state | {"throttle_reasons": 0x48})["readings"][0]["event_reasons"] == [
        "hw_slowdown",
        "hw_thermal_slowdown",
    ]


def test_a_reading_that_fails_is_unknown_and_a_lost_card_is_lost(ask: Callable[..., Any]) -> None:
    cards = {"count": 3, "uuid.1": "GPU-2", "temperature_c.1": "error:999", "power_mw.2": "error:15"}
    first, second, third = ask(AN_ADA_CARD | cards)["readings"]
    assert (first["temperature_c"], first["lost"]) == (67, False)
    assert (second["temperature_c"], second["power_w"], second["lost"]) == (None, 312.5, False)
    assert third["lost"]
    assert ask(AN_ADA_CARD | {"handle.0": "error:15"})["readings"][0]["lost"]


def test_a_card_is_found_by_its_uuid(ask: Callable[..., Any]) -> None:
    assert ask(AN_ADA_CARD | {"count": 2, "uuid.1": "GPU-2"})["index_of_2"] == 1
    assert ask(AN_ADA_CARD)["index_of_2"] is None


def test_a_power_limit_is_set_where_permitted_and_told_otherwise(ask: Callable[..., Any]) -> None:
    assert ask(AN_ADA_CARD | {"set_limit": 0}, limits=(300.4,))["limit_w"] == 300.4
    assert ask(AN_ADA_CARD, limits=(300,))["refused"].startswith("NotPermitted: ")
    assert "9000 W was refused" in ask(AN_ADA_CARD | {"set_limit": 2}, limits=(9000,))["refused"]


def test_without_a_driver_there_are_no_gpus(ask: Callable[..., Any]) -> None:
    assert ask({"count": 1, "init": 9}) is None


def test_bits_of_a_newer_driver_are_reported_by_number() -> None:
    assert reason_names(0) == frozenset()
    assert reason_names(0x204) == {"sw_power_cap", "bit_0x200"}


def rapl(folder: Path, *counters: int) -> Path:
    for number, counter in enumerate(counters):
        package = folder / f"intel-rapl:{number}"
        package.mkdir(parents=True, exist_ok=True)
        (package / "energy_uj").write_text(f"{counter}\n")
        (package / "max_energy_range_uj").write_text("262143328850\n")
        (folder / f"intel-rapl:{number}:0").mkdir(exist_ok=True)  # a part of the package: not counted twice
    return folder


def test_cpu_power_is_the_packages_energy_over_time_and_survives_a_wrap(tmp_path: Path) -> None:
    now = [10.0]
    power = CpuPower(rapl(tmp_path, 1_000_000, 262_143_328_850 - 1_000_000), lambda: now[0])
    assert power.watts() is None, "no time has gone by"
    now[0] = 12.0
    rapl(tmp_path, 101_000_000, 39_000_000 - 1)
    assert power.watts() == pytest.approx(70)
    (tmp_path / "intel-rapl:0/energy_uj").unlink()
    assert power.watts() is None


def test_a_machine_without_counters_has_no_cpu_power(tmp_path: Path) -> None:
    assert CpuPower(tmp_path).watts() is None
