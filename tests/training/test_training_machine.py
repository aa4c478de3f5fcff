"""The machine that a run is planned for is the one that torch will train on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from charkha.hardware.catalog import find_gpu
from charkha.hardware.machine import UNKNOWN_BYTES, Machine
from charkha.training.machine import training_machine

GIB = 2**30
CARDS = ("RTX 3060", "RTX 4090")
TWO_CARDS = Machine(
    "desk",
    tuple(find_gpu(name) for name in CARDS),
    64 * GIB,
    free_bytes=(11 * GIB, 20 * GIB),
    uuids=("GPU-a", "GPU-b"),
    here=True,
)


def seen_by_torch(monkeypatch: pytest.MonkeyPatch, uuids: list[str], machine: Machine = TWO_CARDS) -> Any:
    """What training would use where torch shows cards of these UUIDs, and none where there is none."""
    device = ("cuda", "NVIDIA GeForce RTX 4090", True, (8, 9), len(uuids)) if uuids else ("cpu", "CPU", True, None, 1)
    monkeypatch.setattr("charkha.training.machine.this_machine", lambda folder: machine)
    monkeypatch.setattr("charkha.backends.torch.device.find_device", lambda: device)
    monkeypatch.setattr("charkha.backends.torch.device.gpu_uuids", lambda: uuids)
    return training_machine(Path())


def test_cards_are_in_torchs_order_with_their_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    found = seen_by_torch(monkeypatch, ["b", "a"])
    assert [gpu.name for gpu in found.machine.gpus] == [find_gpu(name).name for name in reversed(CARDS)]
    assert found.machine.free_bytes == (20 * GIB, 11 * GIB)
    assert (found.facts.device, found.facts.count) == ("cuda", 2)


def test_a_card_that_torch_does_not_show_is_not_counted_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert seen_by_torch(monkeypatch, ["b"]).machine.limit_bytes == 20 * GIB


def test_one_process_is_planned_for_the_card_it_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = seen_by_torch(monkeypatch, ["b", "a"]).machine
    assert machine.used_by(1).limit_bytes == 20 * GIB
    assert machine.used_by(2).limit_bytes == 11 * GIB


def test_a_torch_without_cuda_trains_on_the_cpu_beside_any_card(monkeypatch: pytest.MonkeyPatch) -> None:
    found = seen_by_torch(monkeypatch, [])
    assert (found.machine.gpus, found.machine.device, found.facts.device) == ((), "cpu", "cpu")
    assert found.machine.limit_bytes is not None


def test_a_card_that_nvml_does_not_know_is_taken_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    blind = Machine("desk", (), 64 * GIB, here=True)
    found = seen_by_torch(monkeypatch, ["x"], blind)
    assert found.machine.limit_bytes == find_gpu("RTX 4090").memory_bytes < UNKNOWN_BYTES


@pytest.mark.gpu
def test_the_limit_on_a_gpu_is_what_the_driver_calls_free(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    limit = training_machine(tmp_path).machine.only([0]).limit_bytes
    free, total = torch.cuda.mem_get_info(0)
    assert limit is not None
    assert limit <= total
    assert abs(limit - free) < GIB  # a context may have been made between
