"""On a real GPU: the doctor's self-tests, and a probe whose peak is what training reports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from charkha.doctor_children import ATTENTION, DEVICES, TRANSFERS, ask_child

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _needs_cuda() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")


def test_the_card_computes_right_and_its_build_has_kernels_for_it() -> None:
    told = ask_child(DEVICES, 120)
    assert told["built_for"]
    assert told["cudnn"]
    assert all(card["kind"] == "cuda" and card["error"] < 0.02 for card in told["cards"])


def test_flash_attention_agrees_with_plain_attention_where_it_runs() -> None:
    for card in ask_child(ATTENTION, 120)["cards"]:
        assert isinstance(card["torch"], str) or card["torch"] < 0.02
        assert not isinstance(card["package"], float) or card["package"] < 0.02


def test_copies_reach_at_least_a_gigabyte_a_second() -> None:
    assert all(min(card["to_device"], card["to_host"]) > 1e9 for card in ask_child(TRANSFERS, 120)["cards"])


def test_the_peak_of_a_probe_is_what_training_reports(project: Callable[..., Any], tmp_path: Path) -> None:
    from charkha.training.probing import probe_here

    made = project(training={"max_steps": 6, "batch_size": 16})
    (tmp_path / "scratch").mkdir()
    found = probe_here(made.config, [], tmp_path / "scratch").result
    peak = max([found.loading_peak_bytes or 0, *(step.peak_allocated_bytes or 0 for step in found.steps)])
    trained, _ = made.train()
    assert peak == pytest.approx(trained.peak_memory_bytes, rel=0.02)
