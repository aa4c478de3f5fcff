"""Trackers get the numbers of steps and evaluations, into files below the run folder."""

from __future__ import annotations

import json
import sqlite3

import pytest

from charkha.backends.trackers import KINDS, open_trackers, require_trackers
from charkha.config import Config
from charkha.errors import ConfigError, EnvironmentProblem

CONFIG = Config.model_validate({"model": {"base": "starter"}, "data": {"train": ["a.jsonl"]}, "output": "runs/a"})
EVENTS = [
    {"event": "status", "status": "running"},
    {"event": "step", "step": 1, "loss": 2.5, "learning_rate": 1e-3, "tokens": 10, "memory_bytes": None},
    {"event": "eval", "step": 1, "eval_loss": 2.25, "eval_tokens": 5},
]


def track(name, folder):
    pytest.importorskip(name)
    trackers = open_trackers(require_trackers(name), folder, CONFIG)
    for event in EVENTS:
        trackers(event)
    trackers.close()


def test_tensorboard_files_hold_the_numbers(tmp_path):
    track("tensorboard", tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(tmp_path / "trackers/tensorboard"))
    read.Reload()
    assert [(point.step, point.value) for point in read.Scalars("loss")] == [(1, 2.5)]
    assert [point.value for point in read.Scalars("eval_loss")] == [2.25]


def test_wandb_stays_offline_and_writes_below_the_run(tmp_path):
    track("wandb", tmp_path)
    assert list((tmp_path / "trackers/wandb").glob("offline-run-*/*.wandb"))


def test_mlflow_database_holds_the_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    track("mlflow", tmp_path)
    with sqlite3.connect(tmp_path / "trackers/mlflow.db") as database:
        rows = dict(database.execute("select key, value from metrics").fetchall())
    assert rows["loss"] == 2.5
    assert rows["eval_loss"] == 2.25
    assert not (tmp_path / "mlruns").exists()


def test_trackio_database_holds_the_numbers(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    track("trackio", tmp_path)
    stored = b"".join(path.read_bytes() for path in (tmp_path / "trackio").rglob("*") if path.is_file())
    assert b"eval_loss" in stored


def test_a_tracker_that_is_not_installed_names_its_install_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match="pip install mlflow") as caught:
        require_trackers("mlflow")
    assert caught.value.exit_code == 5


def test_an_unknown_tracker_is_a_config_problem():
    with pytest.raises(ConfigError, match="tensorboard, wandb, mlflow, trackio"):
        require_trackers(["comet"])
    assert require_trackers("none") == ()
    assert set(KINDS) == {"tensorboard", "wandb", "mlflow", "trackio"}
    assert json.dumps(CONFIG.model_dump(mode="json"))
