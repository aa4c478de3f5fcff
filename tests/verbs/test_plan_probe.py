"""`charkha plan --probe`: refusals, what its child may end with, how a plan is corrected, and one real probe."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from charkha.backends.base import ProbedStep, ProbeResult
from charkha.cli.app import app
from charkha.errors import CharkhaError, TrainingFailed
from charkha.plan.schedule import Schedule
from charkha.training.probing import Probed, ProbeOutOfMemory, probe_run
from charkha.verbs import planned_probe

MIB = 2**20


def plan(config: Path, *arguments: str, code: int = 0) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["plan", str(config), "--json", "--method", "closed_form", *arguments])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)  # type: ignore[no-any-return]


# What cannot be probed


def test_another_machine_cannot_be_probed(project: Callable[..., Any]) -> None:
    error = plan(project().config, "--probe", "--gpu", "rtx 4090", code=2)["error"]
    assert error["where"] == "--probe"
    assert "this device" in error["message"]


def test_a_base_without_weights_cannot_be_probed(project: Callable[..., Any], tmp_path: Path) -> None:
    made = project()
    (tmp_path / "shape").mkdir()
    (tmp_path / "shape/config.json").write_text((made.base / "config.json").read_text())
    error = plan(made.config, "--probe", "--set", f"model.base={tmp_path / 'shape'}", code=2)["error"]
    assert "no safetensors weights" in error["message"]
    error = plan(made.config, "--probe", "--set", "model.base=author/name", code=2)["error"]
    assert "charkha fetch author/name" in error["remedy"]


# The child


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def child(text: str) -> list[str]:
    return [sys.executable, "-c", f"import json, os, sys\nfrom pathlib import Path\n{text}"]


def test_a_child_killed_by_the_system_is_too_little_memory(temporary: Path) -> None:
    with pytest.raises(ProbeOutOfMemory, match="host memory"):
        probe_run(Path("x.yaml"), [], program=child("os.kill(os.getpid(), 9)"))
    assert not list(temporary.iterdir())


def test_what_a_child_says_went_wrong_is_raised_here(temporary: Path) -> None:
    text = "Path(sys.argv[2]).write_text(json.dumps({'error': {'message': 'm', 'where': 'w', 'remedy': 'r', %s}}))"
    with pytest.raises(ProbeOutOfMemory, match="m"):
        probe_run(Path("x.yaml"), [], program=child(text % "'exit_code': 3"))
    with pytest.raises(TrainingFailed):
        probe_run(Path("x.yaml"), [], program=child(text % "'exit_code': 7"))


@pytest.mark.parametrize("text", ["sys.exit('the last word')", "Path(sys.argv[2]).write_text('{}')"])
def test_a_child_without_an_answer_is_our_fault(temporary: Path, text: str) -> None:
    with pytest.raises(CharkhaError, match=r"last word|something else") as caught:
        probe_run(Path("x.yaml"), [], program=child(text))
    assert caught.value.exit_code == 1


def test_the_child_is_offline_and_is_told_what_to_try(temporary: Path) -> None:
    text = (
        "told = json.loads(Path(sys.argv[1]).read_text())\n"
        "sys.exit(f\"{os.environ['HF_HUB_OFFLINE']} {told['config']} {told['overrides']}\")"
    )
    with pytest.raises(CharkhaError, match=r"1 /.*x.yaml \['a.b=1'\]"):
        probe_run(Path("x.yaml"), ["a.b=1"], program=child(text))


def test_an_interrupted_probe_leaves_nothing_behind(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any, **settings: Any) -> None:
        assert list(temporary.glob("charkha-probe-*/request.json"))
        raise KeyboardInterrupt

    monkeypatch.setattr("subprocess.run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        probe_run(Path("x.yaml"), [])
    assert not list(temporary.iterdir())


KILLED = """
import sys, tempfile
from pathlib import Path
from charkha.training.probing import probe_run
tempfile.tempdir = sys.argv[1]
probe_run(Path("x.yaml"), [], program=[sys.executable, "-c", "import time; time.sleep(60)"])
"""


def test_a_killed_probe_takes_its_rows_and_its_child_along(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)])
    until = time.monotonic() + 30
    while not (requests := list(tmp_path.glob("*/request.json"))) and time.monotonic() < until:
        time.sleep(0.05)
    assert requests
    time.sleep(0.2)
    parent.terminate()
    assert parent.wait(30) == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())


# The plan


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Callable[[Probed | Exception], None]:
    """`answers(probed)`: what a probe says from now on."""

    def say(answer: Probed | Exception) -> None:
        def probe(config: Path, overrides: Any) -> Probed:
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(planned_probe, "probe_run", probe)

    return say


def probed(allocated: int = 30 * MIB) -> Probed:
    memory = ProbedStep("first", (4,), (60,), 200, 7.0, peak_allocated_bytes=allocated, peak_reserved_bytes=allocated)
    long = ProbedStep("worst", (4,), (60,), 200, 2.0, first_seconds=2.0)
    short = ProbedStep("median", (4,), (30,), 100, 1.0, first_seconds=1.0)
    small = replace(memory, kind="median", longest=(30,), tokens=100, peak_allocated_bytes=allocated // 2)
    return Probed(
        ProbeResult((memory, small, *(long, short) * 3), None),
        Schedule(((4, 30, 12_000),), 6000, 900_000),
        "cpu",
        "CPU",
    )


def test_measured_numbers_take_the_place_of_predicted_ones(project: Callable[..., Any], answers: Any) -> None:
    made = project()
    before = plan(made.config)
    answers(probed())
    after = plan(made.config, "--probe")
    assert after["peak_allocated_bytes"] == after["peak_reserved_bytes"] == 30 * MIB
    assert sum(after["breakdown"].values()) == 30 * MIB
    assert after["host_ram_bytes"] - before["host_ram_bytes"] == 30 * MIB - before["peak_allocated_bytes"]
    assert after["seconds"] == pytest.approx(12_000, rel=0.02)  # 12,000 micro batches of the size that took a second
    assert after["tokens_per_second"] == pytest.approx(75, rel=0.02)
    assert after["seconds_p90"] > after["seconds"]
    assert after["energy_kwh"] == pytest.approx(after["cost"]["wall_w"] * 12_000 / 3.6e6, rel=0.02)
    assert after["fits"]
    probe = after["probe"]
    assert probe["worst"] == {
        "rows": 4, "longest_row": 60, "tokens": 200, "micro_batches": 1, "seconds": 2.0, "steps": 3,
        "peak_allocated_bytes": 30 * MIB, "peak_reserved_bytes": 30 * MIB,
    }  # fmt: skip
    assert probe["median"]["peak_allocated_bytes"] == 15 * MIB
    assert probe["predicted"]["peak_allocated_bytes"] == before["peak_allocated_bytes"]
    assert probe["predicted"]["seconds"] == before["seconds"]
    assert probe["corrected"]["seconds"] == after["seconds"]
    said = " ".join(after["reasons"])
    assert "measured 30 MiB" in said
    assert "by the probe 3 h 20 min over 12,000 micro batches" in said


def test_too_little_memory_is_an_answer(project: Callable[..., Any], answers: Any) -> None:
    answers(ProbeOutOfMemory("out of GPU memory: tried to allocate 2 GiB", remedy="less"))
    record = plan(project().config, "--probe", code=3)
    assert record["fits"] is False
    assert record["probe"]["corrected"] is None
    assert any("tried to allocate 2 GiB; less" in reason for reason in record["reasons"])


def test_a_person_is_shown_what_was_measured(project: Callable[..., Any], answers: Any) -> None:
    answers(probed())
    shown = CliRunner().invoke(app, ["plan", str(project().config), "--method", "closed_form", "--probe"]).output
    assert "worst, 3 steps" in shown
    assert "probing: the base model is loaded" in shown


# A real one


@pytest.fixture
def real(project: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A run of two epochs whose largest micro batch comes again beside the optimizer's states."""
    from charkha.backends.torch import probing

    monkeypatch.setattr(probing, "_LEAST_SECONDS", 0.0)
    return project(adapter={"method": "full"}, training={"max_steps": 6, "batch_size": 16, "eval_every": 6})


def test_the_peak_of_a_probe_is_what_training_reports(real: Any, tmp_path: Path) -> None:
    from charkha.training.probing import probe_here

    (tmp_path / "scratch").mkdir()
    found = probe_here(real.config, [], tmp_path / "scratch")
    steps = found.result.steps
    assert [step.kind for step in steps] == ["first", "later", "median", *("worst", "median") * 3]
    assert all(len(step.rows) == 2 for step in steps)
    assert max(steps[0].longest) == max(steps[1].longest) >= max(steps[2].longest)
    assert steps[0].peak_allocated_bytes < steps[1].peak_allocated_bytes, "the optimizer's states lie beside"
    trained, _ = real.train()
    peak = max(step.peak_allocated_bytes or 0 for step in steps)
    assert trained.peak_memory_bytes == pytest.approx(peak, rel=0.005)
    assert found.schedule.steps == trained.steps
    assert found.schedule.tokens == pytest.approx(trained.tokens, rel=0.2)
