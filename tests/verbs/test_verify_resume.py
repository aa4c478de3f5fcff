"""The proof that a user runs: it holds on a sound machine, and it can fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from typer.testing import CliRunner

from charkha.cli.app import app
from charkha.store.runs import RunFolder
from charkha.verbs import verify_resume

MakeProject = Callable[..., Any]


def test_a_killed_run_of_the_users_config_is_proved_to_end_the_same(project: MakeProject) -> None:
    work = project(data={"packing": True}, training={"micro_batch_size": 1, "batch_size": 2, "max_steps": 100})
    before = sorted(path.name for path in work.folder.iterdir())
    result = CliRunner().invoke(app, ["verify-resume", str(work.config), "--steps", "4", "--kills", "1", "--json"])
    assert result.exit_code == 0, result.output
    proof = json.loads(result.stdout)
    assert (proof["identical"], proof["steps"], len(proof["kills"]), proof["differences"]) == (True, 4, 1, [])
    assert sorted(path.name for path in work.folder.iterdir()) == before


def test_other_bits_and_other_losses_are_told(project: MakeProject) -> None:
    work = project(training={"max_steps": 2})
    work.train(output="whole")
    work.train("training.seed=7", output="cut")
    whole, cut = (RunFolder(work.run_folder(name)) for name in ("whole", "cut"))
    differences = verify_resume._differences(whole, cut)
    assert any(text.startswith("step 1: ") for text in differences)
    assert any("adapter_model.safetensors has other bytes" in text for text in differences)
    assert verify_resume._differences(whole, whole) == []


def test_a_broken_config_is_refused_before_anything_runs(project: MakeProject) -> None:
    result = CliRunner().invoke(app, ["verify-resume", str(project(training={"epoch": 2}).config), "--json"])
    assert result.exit_code == 2
