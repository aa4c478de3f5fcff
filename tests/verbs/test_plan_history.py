"""A finished run makes the next plan nearer to what it took."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from charkha.backends.base import Streaming
from charkha.cli.app import app
from charkha.config_file import load_config
from charkha.store.runs import RunFolder
from charkha.training.opening import open_session
from charkha.training.remembering import as_it_ran, remember_run, working_seconds


@pytest.fixture
def history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which runs are remembered; it does not exist yet."""
    monkeypatch.setenv("CHARKHA_HISTORY", str(tmp_path / "memory"))
    return tmp_path / "memory/runs.jsonl"


def plan(config: Path, *arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["plan", str(config), "--json", "--method", "closed_form", *arguments])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)  # type: ignore[no-any-return]


def test_the_second_plan_of_a_run_is_nearer_than_the_first(
    project: Callable[..., Any], history: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = project()
    first = plan(made.config)
    assert first["history"] == {"runs": 0, "ratio": 1.0, "damaged_lines": 0}
    trained, _ = made.train()
    second = plan(made.config)
    # Plans are rounded to a tenth of a second, about as long as this run takes: tokens per second say it exactly.
    errors = [abs(one["tokens_per_second"] / trained.tokens_per_second - 1) for one in (first, second)]
    assert errors[1] < errors[0] / 2
    assert second["history"]["runs"] == 1
    assert any("1 finished run like this on this processor took" in reason for reason in second["reasons"])
    ratio = second["history"]["ratio"]
    fastest = [next(one for one in answer["alternatives"] if one["name"] == "fastest") for answer in (first, second)]
    assert fastest[0]["tokens_per_second"] / fastest[1]["tokens_per_second"] == pytest.approx(ratio, rel=0.01)

    text = history.read_text()
    assert str(made.folder) not in text
    assert made.base.name not in text
    history.write_text(text.replace('"machine": "', '"machine": "other'))
    assert plan(made.config)["history"]["runs"] == 0
    history.write_text(text + "{damaged\n")
    damaged = plan(made.config)
    assert damaged["history"] == {"runs": 1, "ratio": ratio, "damaged_lines": 1}
    assert any("1 of 2 lines" in reason for reason in damaged["reasons"])
    assert plan(made.config, "--gpu", "rtx 4090")["history"]["runs"] == 0
    monkeypatch.setenv("CHARKHA_HISTORY", "off")
    assert plan(made.config)["seconds"] == first["seconds"]


def test_a_run_whose_history_cannot_be_written_is_finished_all_the_same(
    project: Callable[..., Any], history: Path
) -> None:
    history.parent.write_text("a file where the folder should be")
    trained, events = project(data={"eval": None}).train()
    assert trained.status == "done"
    assert any("next plan will not know of this run" in event.get("text", "") for event in events)


def test_a_run_that_gave_up_something_for_memory_is_remembered_as_it_ran(
    project: Callable[..., Any], history: Path
) -> None:
    made = project(training={"micro_batch_size": 8, "gradient_checkpointing": "none", "loss_head": "full"})
    session = open_session(load_config(made.config, []), RunFolder(made.run_folder()), lambda event: None)
    steps = [{"event": "step", "seconds": 1.0}] * 5
    changed = replace(session.plan, micro_batch_size=2, gradient_checkpointing=True, loss_head="chunked")
    for plan_ in (session.plan, changed):
        assert remember_run(replace(session, plan=plan_), steps, None) is None
    before, after = (json.loads(line) for line in history.read_text().splitlines())
    assert (before["shape"]["checkpointing"], after["shape"]["checkpointing"]) == (False, True)
    assert before["shape"]["positions"] == 4 * after["shape"]["positions"]
    assert after["planned_seconds"] > 1.2 * before["planned_seconds"]
    moved = replace(session, plan=replace(changed, offload_activations=True))
    bare = replace(moved, base=replace(session.base, streaming=Streaming(hot_layers=0)))
    assert session.planned is not None
    planned = replace(session.planned, settings=replace(session.planned.settings, streamed_resident_layers=3))
    assert as_it_ran(moved, planned).offload == {"activations"}
    assert as_it_ran(bare, planned).streamed_resident_layers == 0


def test_a_step_that_stood_still_counts_as_a_usual_one() -> None:
    assert working_seconds([1.0, 1.0, 500.0, 1.0, 3.0]) == 7.0
