"""Memory that can be had now: what the kernel says, within what a container or a service allows."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from charkha.hardware.free_memory import free_host_bytes
from charkha.hardware.machine import this_machine, visible_cards
from charkha.hardware.sensors import PcieLink

GIB = 2**30


@pytest.fixture(autouse=True)
def eight_gib_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=8 * GIB, total=16 * GIB))


def group(folder: Path, **files: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")
    return folder


def test_without_a_group_it_is_what_the_kernel_says(tmp_path: Path) -> None:
    root = group(tmp_path / "cgroup", memory__max="max", memory__current=GIB)
    assert free_host_bytes(root, tmp_path / "nothing") == 8 * GIB


def test_a_containers_limit_counts_less_what_it_uses_and_idle_file_pages_give_way(tmp_path: Path) -> None:
    stat = f"anon 5\ninactive_file {GIB}\nactive_file 7"
    root = group(tmp_path / "cgroup", memory__max=4 * GIB, memory__current=3 * GIB, memory__stat=stat)
    assert free_host_bytes(root, tmp_path / "nothing") == 2 * GIB


def test_the_nearest_limit_of_all_groups_above_a_service_counts(tmp_path: Path) -> None:
    root = group(tmp_path / "cgroup")
    group(root / "user.slice", memory__max=3 * GIB, memory__current=GIB)
    group(root / "user.slice/charkha.service", memory__max=6 * GIB, memory__current=GIB)
    own = tmp_path / "own"
    own.write_text("0::/user.slice/charkha.service\n")
    assert free_host_bytes(root, own) == 2 * GIB


def test_a_group_of_version_one_below_the_root(tmp_path: Path) -> None:
    root = group(tmp_path / "cgroup")
    group(root / "memory/jobs/one", memory__limit_in_bytes=3 * GIB, memory__usage_in_bytes=GIB)
    own = tmp_path / "own"
    own.write_text("7:cpu,cpuacct:/other\n5:memory:/jobs/one\n1:name=systemd:/init.scope\n")
    assert free_host_bytes(root, own) == 2 * GIB


def test_version_one_and_a_group_over_its_limit(tmp_path: Path) -> None:
    root = group(tmp_path / "cgroup")
    group(root / "memory", memory__limit_in_bytes=GIB, memory__usage_in_bytes=2 * GIB)
    assert free_host_bytes(root, tmp_path / "nothing") == 0


@pytest.mark.parametrize(
    ("wish", "cards"),
    [
        (None, [0, 1, 2]),
        ("2,0", [2, 0]),
        ("", []),
        ("-1", []),
        ("1,9,0", [1]),
        ("GPU-b", [1]),
        ("GPU-", []),  # which of them is not clear
    ],
)
def test_cards_that_cuda_is_told_to_show(wish: str | None, cards: list[int]) -> None:
    assert visible_cards(["GPU-a1", "GPU-b2", "GPU-c3"], wish) == cards


class TwoCards:
    """NVML of a machine whose first card another program fills."""

    count = 2

    def limits(self, index: int) -> Any:
        return SimpleNamespace(name="NVIDIA GeForce RTX 4090", uuid=f"GPU-{index}", power_default_w=450.0)

    def memory_bytes(self, index: int) -> int:
        return 24 * GIB

    def free_bytes(self, index: int) -> int:
        return (5, 23)[index] * GIB

    def link(self, index: int) -> PcieLink:
        return PcieLink()


def test_a_plan_counts_on_what_is_free_on_the_cards_that_are_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("charkha.hardware.machine.open_nvml", TwoCards)
    assert this_machine(tmp_path).limit_bytes == 5 * GIB
    assert this_machine(tmp_path).only([1]).limit_bytes == 23 * GIB
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert (len(this_machine(tmp_path).gpus), this_machine(tmp_path).limit_bytes) == (1, 23 * GIB)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert (this_machine(tmp_path).gpus, this_machine(tmp_path).limit_bytes) == ((), 8 * GIB)
