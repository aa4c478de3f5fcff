"""A run that is out of memory goes on with the plan's fallbacks; one that cannot fit is not begun."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from charkha.cli.app import app
from charkha.errors import DoesNotFit, TrainingFailed
from charkha.store.runs import RunFolder
from charkha.training.fallback import next_fallback

MakeProject = Callable[..., Any]
MIB = 2**20
AUTO = {"training": {"micro_batch_size": "auto"}}


def short_of_memory(monkeypatch: pytest.MonkeyPatch, from_step: int) -> None:
    """From that step on there is memory for chunked logits, recomputed layers and micro batches of four rows alone."""
    import torch

    from charkha.backends.torch import trainer

    computed = trainer.training_loss
    seen: dict[str, int] = {}

    def loss(model: Any, inputs: Any, count: Any, way: str) -> Any:
        seen["rows"] = seen.get("rows", 0) + len(inputs["input_ids"])
        recomputes = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        fits = way == "chunked" and recomputes and len(inputs["input_ids"]) <= 4
        if seen["rows"] > 8 * from_step and not fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return computed(model, inputs, count, way)

    monkeypatch.setattr(trainer, "training_loss", loss)


def test_three_fallbacks_one_after_another_end_with_the_weights_of_an_undisturbed_run(
    project: MakeProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    work = project(
        adapter={"lora_dropout": 0.0}, training={"micro_batch_size": "auto", "max_steps": 4}, data={"eval": None}
    )
    work.train(output="whole")
    short_of_memory(monkeypatch, from_step=2)
    run = RunFolder(work.run_folder("cut"))
    taken = []
    for _ in range(3):
        with pytest.raises(DoesNotFit, match="out of GPU memory"):
            work.train(output="cut")
        taken.append(next_fallback(run))
    result, events = work.train(output="cut")
    assert taken == json.loads((run.path / "plan.json").read_text())["fallbacks"][:3]
    assert taken == [
        {"training.loss_head": "chunked"},
        {"training.gradient_checkpointing": "full"},
        {"training.micro_batch_size": 4},
    ]
    assert (result.status, result.resumes) == ("done", 3)
    assert any("since memory ran out: training.loss_head: chunked" in str(event.get("text")) for event in events)
    whole = work.weights("whole")
    for name, tensor in work.weights("cut").items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-3, atol=2e-5)


def leave_free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr("charkha.hardware.machine.free_host_bytes", lambda: size)


def test_a_run_that_cannot_fit_is_not_begun_and_is_told_what_would(
    project: MakeProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"micro_batch_size": 8, "gradient_checkpointing": "none", "loss_head": "full"}
    work = project(training=asked)
    leave_free(monkeypatch, 771 * MIB)
    monkeypatch.setattr("charkha.backends.torch.trainer.load_base", lambda base: pytest.fail("the base was loaded"))
    result = CliRunner().invoke(app, ["train", str(work.config), "--json"])
    assert result.exit_code == 3
    error = json.loads(result.stdout)["error"]
    assert error["kind"] == "does_not_fit"
    assert "it needs at least" in error["message"]
    for remedy in (
        "--set training.micro_batch_size=",
        "tokens: data.max_length",
        "--ignore-plan",
        "a larger machine: 1 x",
    ):
        assert remedy in error["remedy"]
    assert not RunFolder(work.run_folder()).exists


def test_it_is_begun_all_the_same_when_told_so_or_when_it_has_begun_before(
    project: MakeProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = project(training={"max_steps": 2, "micro_batch_size": "auto", "eval_every": "auto"}, data={"eval": None})
    leave_free(monkeypatch, 768 * MIB + 500_000)
    result = CliRunner().invoke(app, ["train", str(work.config), "--ignore-plan"])
    assert result.exit_code == 0, result.output
    assert "the plan says that this run does not fit" in result.output
    frozen = json.loads((work.run_folder() / "manifest.json").read_text())["plan"]
    assert (frozen["micro_batch_size"], frozen["gradient_checkpointing"]) == (1, True)
    assert json.loads((work.run_folder() / "plan.json").read_text())["fits"] is False
    leave_free(monkeypatch, 8 * 1024 * MIB)
    again, events = work.train()
    assert again.status == "done"
    chosen = [event["text"] for event in events if "chose training" in event.get("text", "")]
    assert not chosen  # more memory is free now, and what was decided stands


def test_accepted_changes_decide_anew_but_for_the_optimizer_whose_state_was_saved(project: MakeProject) -> None:
    work = project(training={"max_steps": 2, "micro_batch_size": "auto"}, data={"eval": None})
    work.train(stop_at=1)
    frozen = work.run_folder() / "charkha.yaml"
    text = frozen.read_text()
    assert "optimizer: adamw_torch_fused" in text
    frozen.write_text(text.replace("optimizer: adamw_torch_fused", "optimizer: adamw_torch"))
    result = CliRunner().invoke(app, ["train", str(work.config), "--accept-changes"])
    assert result.exit_code == 0, result.output
    assert "optimizer: adamw_torch\n" in frozen.read_text()


def test_plan_json_is_the_record_of_the_plan_command(project: MakeProject, monkeypatch: pytest.MonkeyPatch) -> None:
    work = project(training={"max_steps": 1, "micro_batch_size": "auto"})
    leave_free(monkeypatch, 8 * 1024 * MIB)
    result = CliRunner().invoke(app, ["plan", str(work.config), "--method", "closed_form", "--json"])
    printed = json.loads(result.stdout)
    work.train()
    kept = json.loads((work.run_folder() / "plan.json").read_text())
    same = set(printed) - {"reasons", "alternatives", "choices", "disk_bytes"}
    assert {key: kept[key] for key in same} == {key: printed[key] for key in same}
    assert set(printed["fallbacks"][0]) == {"training.loss_head"}


def test_a_remembered_trace_is_the_authority_and_none_is_made(
    project: MakeProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    figures = SimpleNamespace(
        peak_allocated_bytes=7 * MIB, peak_reserved_bytes=7 * MIB, breakdown={"x": 7 * MIB}, peak_moment="loss"
    )
    asked = []

    def remembered(request: Any) -> Any:
        asked.append(request)
        return figures

    monkeypatch.setattr("charkha.training.planned_trace.remembered_memory", remembered)
    monkeypatch.setattr("charkha.training.planned_trace.trace_memory", lambda request: pytest.fail("a trace was made"))
    work = project(training={"max_steps": 1})
    work.train()
    kept = json.loads((work.run_folder() / "plan.json").read_text())
    assert (kept["method"], kept["peak_allocated_bytes"]) == ("trace", 7 * MIB)
    assert asked[0].device == "cpu"


def test_layers_of_a_streamed_base_that_stay_on_the_device_are_given_up_first(tmp_path: Path) -> None:
    from charkha.backends.base import Streaming
    from charkha.plan.memory_settings import MemorySettings
    from charkha.plan.search import fallbacks
    from charkha.training.fallback import fallbacks_note, without_hot_layers

    settings = MemorySettings(
        dtype="bf16", rows=2, tokens=2048, gradient_checkpointing=True, loss_head="chunked", streamed=True
    )
    assert fallbacks(settings) == ({"training.micro_batch_size": 1},)
    planned = fallbacks(replace(settings, streamed_resident_layers=10))
    run = RunFolder(tmp_path)
    began = {"micro_batch_size": 2, "gradient_checkpointing": True, "loss_head": "chunked", "selective": False}
    run.write_json(run.manifest_path, {"plan": began})
    run.write_json(run.path / "plan.json", {"fallbacks": list(planned), "streaming": {"hot_layers": 10}})
    streaming = Streaming(slots=3, hot_layers=9)
    assert without_hot_layers(streaming, run) == streaming
    assert next_fallback(run) == {"streaming.hot_layers": 0}
    assert without_hot_layers(streaming, run) == Streaming(slots=3)
    assert without_hot_layers(None, run) is None
    assert fallbacks_note(run) == ["since memory ran out: streaming.hot_layers: 0"]
    assert next_fallback(run) == {"training.micro_batch_size": 1}
    with pytest.raises(TrainingFailed):
        next_fallback(run)
