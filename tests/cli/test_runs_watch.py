"""`charkha runs` and `charkha watch` over run folders as a trainer writes them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from charkha.cli.app import app
from charkha.cli.watch import curve
from charkha.store.runs import RunFolder
from charkha.summary import summarize


@pytest.fixture
def run(tmp_path):
    folder = RunFolder(tmp_path / "runs/a")
    folder.path.mkdir(parents=True)
    folder.config_path.write_text("model: {base: starter}\n")
    folder.append("status", status="running")
    folder.append("eval", step=0, eval_loss=3.0, eval_tokens=10, seconds=0.1)
    for step in range(1, 5):
        folder.append(
            "step", step=step, total_steps=10, loss=3.0 - step / 10, tokens=100, seconds=0.5, tokens_per_second=200.0,
            memory_bytes=1 << 20, learning_rate=1e-3, grad_norm=1.0, temperature_c=71.0, power_w=312.4,
        )  # fmt: skip
    return folder


def test_a_run_whose_process_is_gone_is_interrupted_not_running(run):
    summary = summarize(run)
    assert (summary.status, summary.step, summary.total_steps, summary.seconds_left) == ("interrupted", 4, 10, None)
    assert summary.tokens == 400
    assert summary.tokens_per_second == pytest.approx(200.0)


def test_a_run_whose_lock_is_held_is_running_and_its_rest_is_told(run):
    holder = (
        "import sys\nfrom pathlib import Path\nfrom charkha.store.runs import RunFolder\n"
        f"with RunFolder(Path({str(run.path)!r})).lock():\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        summary = summarize(run)
        process.stdin.close()
    assert (summary.status, summary.seconds_left) == ("running", pytest.approx(3.0))
    assert summarize(run).status == "interrupted"


def test_looking_at_a_run_never_keeps_a_trainer_out(run):
    assert not run.is_locked()
    with run.lock():
        pass


def test_steps_undone_by_a_resume_are_not_counted(run):
    run.append("resume", from_step=2, path=None)
    assert summarize(run).step == 2
    assert summarize(run).resumes == 1


def test_runs_lists_every_run_folder_as_json_and_as_a_table(run):
    record = json.loads(CliRunner().invoke(app, ["runs", str(run.path.parent), "--json"]).stdout)
    assert [entry["step"] for entry in record["runs"]] == [4]
    assert "4/10" in CliRunner().invoke(app, ["runs", str(run.path.parent)]).stdout


def test_watch_shows_a_run_that_has_ended_once(run):
    run.append("status", status="failed", reason="the loss of step 5 is not finite")
    result = CliRunner().invoke(app, ["watch", str(run.path)])
    assert result.exit_code == 0
    assert "not finite" in result.stdout
    assert json.loads(CliRunner().invoke(app, ["watch", str(run.path), "--json"]).stdout)["status"] == "failed"


def test_heat_and_power_are_shown_where_a_step_has_them(run):
    shown = CliRunner().invoke(app, ["watch", str(run.path), "--once"]).stdout
    assert "71 °C" in shown
    assert "312 W" in shown
    run.append("step", step=5, total_steps=10, loss=2.0, tokens=100, seconds=0.5, tokens_per_second=1.0, memory_bytes=1)
    assert summarize(run).temperature_c is None


def test_watch_of_a_folder_without_a_run_says_so(tmp_path):
    result = CliRunner().invoke(app, ["watch", str(tmp_path), "--json"])
    assert result.exit_code == 6
    assert json.loads(result.stdout)["error"]["kind"] == "run_folder"


def test_a_curve_falls_from_the_highest_bar_to_the_lowest():
    assert curve((4.0, 3.0, 2.0, 1.0)) == "█▆▃▁"
    assert curve(()) == ""
    assert curve((2.0, 2.0)) == "▁▁"
