"""What the planner promises about published runs, wherever their table is at hand: off by little, never a false fit."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
MEASUREMENTS = ROOT.parent / "shared/measurements/measurements.csv"
ROW = {
    "id": "x-1", "source": "someone/somewhere", "model": "mistralai/Mistral-7B-v0.1", "params_b": "7",
    "method": "qlora",
    "base_dtype": "nf4 double-quant", "compute_dtype": "bf16", "lora_r": "16", "lora_targets": "q_proj v_proj",
    "batch": "2", "seq_len": "2048", "seq_kind": "packed", "grad_accum": "4", "grad_checkpointing": "full (HF)",
    "optimizer": "adamw_torch", "attention": "flash_attention_2", "kernels": "none", "n_gpus": "1", "gpu": "RTX 4090",
    "sharding_offload": "none", "peak_mem_gib": "9.5", "mem_unit": "GiB; torch max_memory_allocated",
    "mem_as_published": "9.5", "tokens_per_s": "2000", "tokens_basis": "per GPU", "seconds_per_step_or_total": "",
    "notes": "torch 2.4.1, transformers 4.48.1", "completeness": "A", "family": "x",
}  # fmt: skip


@pytest.fixture(scope="module")
def tools() -> tuple[ModuleType, ModuleType]:
    sys.path.insert(0, str(ROOT / "benchmarks/plan"))
    try:
        import published
        import score
    finally:
        sys.path.pop(0)
    return published, score


def test_a_row_is_expressed_by_what_it_says(tools: tuple[ModuleType, ModuleType]) -> None:
    published, _ = tools
    run = published.express(ROW)
    settings = run.settings
    assert (settings.rows, settings.tokens, settings.quantization, settings.r) == (2, 2048, "nf4", 16)
    assert settings.target_modules == ("self_attn.q_proj", "self_attn.v_proj")
    assert (run.counter, run.gpu.name, run.out_of_memory) == ("allocated", "RTX 4090", False)
    assert not settings.lengths_vary


def test_the_measured_number_changes_nothing_that_is_asked(tools: tuple[ModuleType, ModuleType]) -> None:
    published, _ = tools
    other = published.express({**ROW, "peak_mem_gib": "30", "tokens_per_s": "7", "id": "y-2"})
    assert other.settings == published.express(ROW).settings


@pytest.mark.parametrize(
    "change", [{"batch": "not in table"}, {"seq_len": ""}, {"model": "nobody/nothing"}, {"method": "vera"}]
)
def test_what_is_not_said_is_not_guessed(tools: tuple[ModuleType, ModuleType], change: dict[str, str]) -> None:
    published, _ = tools
    with pytest.raises(published.NotExpressible):
        published.express({**ROW, **change})


@pytest.mark.skipif(not MEASUREMENTS.exists(), reason="the table of published measurements is not here")
def test_published_runs_are_predicted_within_the_stated_errors(tools: tuple[ModuleType, ModuleType]) -> None:
    published, score = tools
    expressed, _ = published.read_published(MEASUREMENTS)
    rows = [score.score(run) for run in expressed]
    complete = [row for row in rows if row.row["completeness"] == "A"]
    memory = [abs(row.memory_error) for row in complete if row.memory_error is not None]
    speed = [abs(row.speed_error) for row in complete if row.speed_error is not None]
    assert len(expressed) > 300
    assert statistics.median(memory) < 0.05
    assert statistics.median(speed) < 0.15
    judged = [row for row in rows if row.fits is not None]
    assert not [row.row["id"] for row in judged if row.published.out_of_memory and row.fits]
    ran = [row for row in judged if not row.published.out_of_memory and row.memory_error is not None]
    assert sum(not row.fits for row in ran) <= 0.05 * len(ran)
    page = (ROOT / "docs/plan-accuracy.md").read_text(encoding="utf-8")
    assert page == score.report(rows, published.read_published(MEASUREMENTS)[1]), "run benchmarks/plan/score.py"
