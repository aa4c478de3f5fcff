"""Experiment trackers as readers of the run's events: numbers of steps and evaluations, into files on this machine.

    tensorboard   RUN/trackers/tensorboard
    wandb         RUN/trackers/wandb, always offline; `wandb sync` is the user's own step
    mlflow        MLFLOW_TRACKING_URI where it is set, else RUN/trackers/mlflow.db
    trackio       its local database (TRACKIO_DIR)

events.jsonl stays the record; a tracker gets what the events say and is never read back.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from charkha.config import Config
from charkha.errors import ConfigError, ConfigProblem, EnvironmentProblem

_NUMBERS = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_bytes", "eval_loss")


class Tracker(Protocol):
    """Takes named numbers of one step."""

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Records the numbers."""

    def close(self) -> None:
        """Flushes and ends."""


class TensorBoard:
    """Scalars in TensorBoard's event files."""

    def __init__(self, folder: Path, config: Config) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))
        self._writer.add_text("config", f"```\n{config.model_dump_json(indent=1)}\n```")

    def log(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A wandb run in offline mode; the same folder is the same run after a resume."""

    def __init__(self, folder: Path, config: Config) -> None:
        wandb = importlib.import_module("wandb")
        settings = wandb.Settings(console="off", silent=True)
        self._run = wandb.init(
            project="charkha", id=_identity(folder), resume="allow", dir=str(folder), mode="offline",
            config=config.model_dump(mode="json"), settings=settings,
        )  # fmt: skip

    def log(self, numbers: dict[str, float], step: int) -> None:
        self._run.log(numbers, step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """Metrics of one MLflow run."""

    def __init__(self, folder: Path, config: Config) -> None:
        self._mlflow = importlib.import_module("mlflow")
        if "MLFLOW_TRACKING_URI" not in os.environ:
            self._mlflow.set_tracking_uri(f"sqlite:///{(folder / 'mlflow.db').resolve()}")
            if self._mlflow.get_experiment_by_name("charkha") is None:
                # Artifacts would otherwise go to a folder mlruns/ wherever the command was started.
                self._mlflow.create_experiment("charkha", artifact_location=(folder / "mlflow").resolve().as_uri())
        self._mlflow.set_experiment("charkha")
        self._mlflow.start_run(run_name=folder.parent.name, log_system_metrics=False)
        self._mlflow.log_dict(config.model_dump(mode="json"), "charkha.json")

    def log(self, numbers: dict[str, float], step: int) -> None:
        self._mlflow.log_metrics(numbers, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


class Trackio:
    """A trackio run in its local database."""

    def __init__(self, folder: Path, config: Config) -> None:
        self._trackio = importlib.import_module("trackio")
        self._trackio.init(
            project="charkha", name=folder.parent.name, config=config.model_dump(mode="json"), resume="allow"
        )

    def log(self, numbers: dict[str, float], step: int) -> None:
        self._trackio.log(numbers, step=step)

    def close(self) -> None:
        self._trackio.finish()


KINDS: dict[str, Callable[[Path, Config], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
    "trackio": Trackio,
}


class Trackers:
    """All trackers of a run; takes its events."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = trackers

    def __call__(self, event: dict[str, Any]) -> None:
        """Passes on the numbers of step and eval events; others are not a tracker's matter."""
        if event["event"] not in ("step", "eval"):
            return
        numbers = {name: float(event[name]) for name in _NUMBERS if event.get(name) is not None}
        for tracker in self._trackers:
            tracker.log(numbers, event["step"])

    def close(self) -> None:
        """Ends every tracker."""
        for tracker in self._trackers:
            tracker.close()


def require_trackers(report_to: str | list[str]) -> tuple[str, ...]:
    """The names asked for. Raises ConfigError for an unknown one, EnvironmentProblem for one that is not installed."""
    names = [report_to] if isinstance(report_to, str) else report_to
    names = [name for name in names if name != "none"]
    if unknown := [name for name in names if name not in KINDS]:
        remedy = f"one of {', '.join(KINDS)}, none"
        problem = ConfigProblem("report_to", f"{unknown[0]!r} is not a tracker", remedy=remedy)
        raise ConfigError("config", [problem])
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise EnvironmentProblem(
                f"report_to {name} needs the package {name}, which is not installed",
                where="report_to",
                remedy=f".venv/bin/python -m pip install {name}, or report_to: none",
            )
    return tuple(names)


def open_trackers(names: Sequence[str], run_folder: Path, config: Config) -> Trackers:
    """Opens the trackers below `run_folder`/trackers."""
    folder = run_folder / "trackers"
    if names:
        folder.mkdir(exist_ok=True)
    return Trackers([KINDS[name](folder, config) for name in names])


def _identity(folder: Path) -> str:
    return hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]
