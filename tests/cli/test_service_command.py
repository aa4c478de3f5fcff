"""`charkha service` as typed: what it prints, as JSON and for a person, and its exit codes."""

from __future__ import annotations

import json
import os

import pytest
from typer.testing import CliRunner

from charkha.cli.service import app
from charkha.store.runs import RunFolder


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))  # no systemctl
    monkeypatch.delenv("EXIT_STATUS", raising=False)
    path = tmp_path / "charkha.yaml"
    path.write_text("model: {base: starter}\ndata: {train: [a.jsonl]}\noutput: runs/a\nguard: {ups: none}\n")
    return path


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_install_status_and_remove_as_json(config):
    installed = json.loads(invoke("install", config, "--json").stdout)
    assert (installed["enabled"], installed["started"], installed["linger"]) == (False, False, None)
    assert os.path.isfile(installed["unit"])
    status = json.loads(invoke("status", config, "--json").stdout)
    assert (status["installed"], status["active"], status["run_status"]) == (True, "unknown", "not started")
    removed = json.loads(invoke("remove", config, "--json").stdout)
    assert removed["units"] == [installed["unit"]]
    assert not os.path.exists(installed["unit"])


def test_a_person_is_told_what_is_left_to_do(config):
    result = invoke("install", config, "--now")
    assert result.exit_code == 0, result.output
    for line in ("systemctl is not installed", "  systemctl --user enable charkha-a-", "  loginctl enable-linger "):
        assert line in result.stderr
    assert "not started" in invoke("status", config).stdout
    assert "removed " in invoke("remove", config).stderr
    assert "not installed" in invoke("status", config).stdout


def test_with_systemctl_a_person_is_told_how_to_start_and_look(config):
    folder = config.parent / "bin"
    folder.mkdir()
    for name, answer in {"systemctl": "", "loginctl": "Linger=no"}.items():
        (folder / name).write_text(f"#!/bin/sh\necho {answer}\n")
        (folder / name).chmod(0o755)
    told = invoke("install", config).stderr
    for line in ("starts at the next boot", "only when you log in", "  loginctl enable-linger ", "journalctl --user"):
        assert line in told
    assert "enabled and started" in invoke("install", config, "--now").stderr


def test_errors_have_the_exit_codes_of_the_house(config):
    missing = invoke("remove", config, "--json")
    assert (missing.exit_code, json.loads(missing.stdout)["error"]["kind"]) == (2, "usage")
    config.write_text("lerning: 1\n")
    broken = invoke("install", config, "--json")
    assert (broken.exit_code, json.loads(broken.stdout)["error"]["kind"]) == (2, "config")


def test_wait_mains_goes_on_at_once_without_a_ups_and_says_so_with_a_silent_one(config):
    assert json.loads(invoke("wait-mains", config, "--json").stdout)["outcome"] == "no_ups"
    config.write_text(config.read_text().replace("ups: none", "ups: 'command:/no/such/program'"))
    silent = invoke("wait-mains", config, "--stable", 0.1, "--unknown", 0.2, "--poll", 0.05)
    assert silent.exit_code == 0
    assert "does not tell" in silent.stderr
    assert "going on without it" in silent.stderr


def test_after_exit_fails_only_after_a_low_battery(config, monkeypatch):
    run = RunFolder(config.parent / "runs/a")
    run.path.mkdir(parents=True)
    monkeypatch.setenv("EXIT_STATUS", "75")
    run.append("status", status="paused", reason="`charkha stop`")
    assert invoke("after-exit", config).exit_code == 0
    run.append("status", status="paused", reason="the battery is low: saving and stopping")
    result = invoke("after-exit", config, "--json")
    assert (result.exit_code, json.loads(result.stdout)) == (69, {"resumes": True})


@pytest.mark.parametrize("command", ["install", "status", "remove", "wait-mains", "after-exit"])
def test_help_has_an_example(command):
    assert f"Example: charkha service {command} charkha.yaml" in " ".join(invoke(command, "--help").stdout.split())
