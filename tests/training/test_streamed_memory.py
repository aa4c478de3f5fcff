"""Peak memory of streamed runs as measured on a CPU, against what was planned; and when `placement: auto` streams."""

from __future__ import annotations

import json
from itertools import product
from typing import Any

import pytest

LAYERS = 8
SHAPE = {
    "num_hidden_layers": LAYERS,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}


@pytest.fixture(autouse=True)
def slab_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CHARKHA_CACHE", str(tmp_path / "cache"))


def planned_and_measured(project, model_folder, monkeypatch, *, hot=0, slots=2, kind="llama", **settings: Any):
    """Peak bytes of an epoch, which meets the longest rows, by the plan in the run's folder and by the allocator."""
    monkeypatch.setattr("charkha.plan.placement._layers_that_stay", lambda *_: hot)
    monkeypatch.setattr("charkha.plan.placement._SLOTS", (slots,))
    chosen = {"quantization": "nf4", "dtype": "bf16", "method": "lora", "loss_head": "full", "micro": 1, **settings}
    work = project(
        model_folder(kind, **{**SHAPE, "vocab_size": chosen.get("vocabulary", 320)}),
        model={
            "quantization": chosen["quantization"],
            "dtype": chosen["dtype"],
            "placement": "streamed",
            "host_tables": chosen.get("tables", "none"),
        },
        adapter={"method": chosen["method"], "lora_dropout": chosen.get("dropout", 0.0)},
        training={
            "micro_batch_size": chosen["micro"],
            "batch_size": 4,
            "loss_head": chosen["loss_head"],
            "epochs": 1,
            "eval_every": "auto",
        },
        data={"eval": None},
    )
    result, _ = work.train()
    planned = json.loads((work.run_folder() / "plan.json").read_text())
    return planned["peak_allocated_bytes"], result.peak_memory_bytes


def test_the_peak_is_the_planned_one(project, model_folder, monkeypatch):
    planned, measured = planned_and_measured(project, model_folder, monkeypatch, hot=2, micro=4)
    assert measured == pytest.approx(planned, rel=0.05)


@pytest.mark.long
@pytest.mark.parametrize(
    ("quantization", "hot", "slots", "method", "micro"),
    list(product(("nf4", "none"), (0, 2, LAYERS // 2), (2, 3), ("lora", "dora"), (1, 4))),
)
def test_so_it_is_with_every_number_of_slots_and_hot_layers(
    project, model_folder, monkeypatch, quantization, hot, slots, method, micro
):
    planned, measured = planned_and_measured(
        project,
        model_folder,
        monkeypatch,
        hot=hot,
        slots=slots,
        quantization=quantization,
        method=method,
        micro=micro,
        loss_head="chunked" if micro == 4 else "full",
    )
    assert measured == pytest.approx(planned, rel=0.05)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["mistral", "qwen3", "gemma3_text", "falcon"])
@pytest.mark.parametrize(("quantization", "dtype"), [("nf4", "fp32"), ("fp4", "bf16"), ("none", "fp32")])
def test_so_it_is_for_other_families_and_types(project, model_folder, monkeypatch, kind, quantization, dtype):
    planned, measured = planned_and_measured(
        project, model_folder, monkeypatch, kind=kind, quantization=quantization, dtype=dtype, loss_head="chunked"
    )
    assert measured == pytest.approx(planned, rel=0.05)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "gemma2"])
@pytest.mark.parametrize("tables", ["embedding", "both"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_so_it_is_with_tables_on_the_host(project, model_folder, monkeypatch, kind, tables, dtype):
    planned, measured = planned_and_measured(
        project,
        model_folder,
        monkeypatch,
        kind=kind,
        tables=tables,
        dtype=dtype,
        micro=4,
        loss_head="chunked",
        vocabulary=8000,
    )
    assert measured == pytest.approx(planned, rel=0.05)


def test_auto_streams_where_memory_is_short_and_a_resumed_run_stays_so(project, model_folder, monkeypatch):
    work = project(
        model_folder("llama", **SHAPE),
        model={"quantization": "nf4"},
        training={"micro_batch_size": 2, "batch_size": 4, "max_steps": 3, "eval_every": "auto"},
        data={"eval": None},
    )
    plenty, short = 8 << 30, program_bytes() + needed_bytes(work, monkeypatch)
    monkeypatch.setattr("charkha.hardware.machine.free_host_bytes", lambda: short)
    paused, events = work.train(stop_at=2)
    assert paused.status == "paused"
    chosen = [event["text"] for event in events if "model.placement" in event.get("text", "")]
    assert any("streamed (resident it needs" in text for text in chosen)
    planned = json.loads((work.run_folder() / "plan.json").read_text())
    assert planned["streaming"]["waits_in"] == "disk"
    whole, _ = work.train(output="whole")  # long enough for the step that has the longest row beside optimizer states
    assert planned["peak_allocated_bytes"] == pytest.approx(whole.peak_memory_bytes, rel=0.05)
    monkeypatch.setattr("charkha.hardware.machine.free_host_bytes", lambda: plenty)
    done, events = work.train()
    assert done.status == "done"
    assert any("layers stay on the device" in event.get("text", "") for event in events)
    other, _ = work.train(output="resident")
    assert other.loss_last == done.loss_last


def program_bytes() -> int:
    from charkha.plan.device_memory import _PYTHON_CPU_BYTES

    return _PYTHON_CPU_BYTES


def needed_bytes(work, monkeypatch) -> int:
    """Between what the run needs streamed and what it needs at the least resident."""
    from charkha.verbs.planning import PlanWish, make_plan

    monkeypatch.setattr("charkha.hardware.machine.free_host_bytes", lambda: 8 << 30)
    least = [
        make_plan(PlanWish(work.config, (f"model.placement={kind}", *leanest), method="closed_form"))
        for kind, leanest in (("streamed", ()), ("resident", ("training.gradient_checkpointing=full",)))
    ]
    streamed, resident = (plan["least_device_bytes"] for plan in least)
    assert streamed < resident
    return (streamed + resident) // 2
