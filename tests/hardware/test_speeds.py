"""Measured speeds: read from a disk, remembered by cards and disk, and read into a plan's machine."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from charkha.caches import own_cache
from charkha.hardware.machine import this_machine
from charkha.hardware.machine_file import machine_record, read_machine
from charkha.hardware.sensors import GpuLimits, PcieLink
from charkha.hardware.speeds import (
    Speeds,
    disk_read_bytes_per_s,
    mount_point,
    remembered_speeds,
    speeds_file,
    speeds_record,
)

SPEEDS = Speeds(host_to_device_bytes_per_s=24e9, device_to_host_bytes_per_s=22e9, disk_read_bytes_per_s=3.5e9)


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of what is remembered; it does not exist yet."""
    monkeypatch.setenv("CHARKHA_HISTORY", str(tmp_path / "memory"))
    return tmp_path / "memory"


def remember(memory: Path, text: str) -> None:
    memory.mkdir(exist_ok=True)
    (memory / "speeds.json").write_text(text)


def test_a_disk_is_read_in_whole_pieces(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(20 << 20))
    rate = disk_read_bytes_per_s(path)
    assert rate is not None
    assert 1e6 < rate < 1e12
    path.write_bytes(b"short")
    assert disk_read_bytes_per_s(path) is None
    with pytest.raises(FileNotFoundError):
        disk_read_bytes_per_s(tmp_path / "missing")


def test_speeds_are_remembered_by_cards_and_disk(memory: Path, tmp_path: Path) -> None:
    assert remembered_speeds(["RTX 4090"], tmp_path) == Speeds()
    remember(memory, json.dumps(speeds_record(None, ["RTX 4090"], tmp_path, SPEEDS)))
    assert remembered_speeds(["RTX 4090"], tmp_path / "not/there/yet") == SPEEDS
    other = remembered_speeds(["RTX 3090"], tmp_path)
    assert (other.host_to_device_bytes_per_s, other.disk_read_bytes_per_s) == (None, 3.5e9)
    assert remembered_speeds(["RTX 4090"], Path("/proc")).disk_read_bytes_per_s is None


def test_what_was_not_measured_again_stays(tmp_path: Path) -> None:
    first = speeds_record("damaged", ["RTX 4090"], tmp_path, SPEEDS)
    second = speeds_record(first, ["RTX 4090"], tmp_path, Speeds(disk_read_bytes_per_s=1e9))
    assert second["links"] == first["links"]
    assert second["disks"] == {str(mount_point(tmp_path)): 1e9}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        '{"links": [], "disks": 3}',
        '{"disks": {"/": "fast"}}',
        '{"links": {"": 1}}',
        '{"disks": {"/": Infinity}}',
        "[" * 100_000,
    ],
)
def test_a_damaged_file_is_no_file(memory: Path, text: str) -> None:
    remember(memory, text)
    assert remembered_speeds([], Path("/")) == Speeds()


def test_a_machine_told_to_remember_nothing_has_no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CHARKHA_HISTORY", "off")
    assert speeds_file() is None
    assert remembered_speeds([], tmp_path) == Speeds()


@pytest.mark.parametrize(
    ("link", "gb_s"), [(PcieLink(), 22), (PcieLink(1, 16, 4, 16), 22), (PcieLink(4, 4, 4, 4), 6.3)]
)
def test_a_card_in_a_narrow_slot_is_planned_with_that_slot(
    link: PcieLink, gb_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = GpuLimits("RTX 4090", None, None, None, None, None, None, None, None)
    nothing = {"memory_bytes": lambda index: None, "free_bytes": lambda index: None}
    told = {"limits": lambda index: limits, "link": lambda index: link, **nothing}
    monkeypatch.setattr("charkha.hardware.machine.open_nvml", lambda: SimpleNamespace(count=1, **told))
    (gpu,) = this_machine(tmp_path).gpus
    assert gpu.pcie_bytes_per_s == pytest.approx(gb_s * 1e9, rel=0.01)


@pytest.mark.parametrize(
    ("name", "gib", "card"),
    [
        ("NVIDIA GeForce RTX 4060 Ti", 15.99, "RTX 4060 Ti 16GB"),
        ("NVIDIA GeForce RTX 4060 Ti", 8.0, "RTX 4060 Ti 8GB"),
        ("NVIDIA GeForce RTX 3080", 12.0, "RTX 3080 12GB"),
        ("NVIDIA GeForce RTX 4090", 48.0, "RTX 4090"),  # with memory that somebody put in
    ],
)
def test_of_cards_of_one_name_the_memory_tells_which(
    name: str, gib: float, card: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = GpuLimits(name, None, None, None, None, None, None, None, None)
    memory = int(gib * 2**30)
    told = {"limits": lambda index: limits, "link": lambda index: PcieLink(), "free_bytes": lambda index: memory}
    nvml = SimpleNamespace(count=1, memory_bytes=lambda index: memory, **told)
    monkeypatch.setattr("charkha.hardware.machine.open_nvml", lambda: nvml)
    machine = this_machine(tmp_path)
    assert machine.gpus[0].name == card
    assert machine.limit_bytes == pytest.approx(memory, rel=0.05)


def test_a_machine_file_carries_what_was_measured_here(memory: Path, tmp_path: Path) -> None:
    cards = [gpu.name for gpu in this_machine(tmp_path).gpus]
    remember(memory, json.dumps(speeds_record(None, cards, own_cache(), SPEEDS)))
    here = this_machine(tmp_path)
    assert (here.host_to_device_bytes_per_s, here.disk_read_bytes_per_s) == (24e9, 3.5e9)
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(machine_record(here)))
    there = read_machine(path)
    assert (there.host_to_device_bytes_per_s, there.disk_read_bytes_per_s) == (24e9, 3.5e9)
