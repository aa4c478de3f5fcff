"""A run folder summed up for a reader: where it stands, how fast it goes, how long it takes; from its files alone."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from charkha.store.runs import RunFolder

_RECENT_STEPS = 20  # the rate is that of the last steps: lengths differ from batch to batch, machines from hour to hour


@dataclass(frozen=True)
class RunSummary:
    """Where a run stands. None where its events do not say (yet)."""

    run: str
    status: str  # running | paused | done | failed | interrupted: a process that ended without a word
    step: int
    total_steps: int | None
    loss: float | None
    eval_loss: float | None
    eval_loss_before: float | None
    tokens: int
    tokens_per_second: float | None
    seconds_left: float | None
    memory_bytes: int | None
    temperature_c: float | None  # of the device that trains, at the last step
    power_w: float | None
    resumes: int
    last_event_unix_s: float | None
    reason: str | None
    losses: tuple[float, ...]  # of every step in effect

    @property
    def quiet_seconds(self) -> float | None:
        """Time since the last event."""
        return None if self.last_event_unix_s is None else max(0.0, time.time() - self.last_event_unix_s)


def summarize(run: RunFolder) -> RunSummary:
    """The run as its events have it. Raises RunFolderError when the folder holds no run."""
    run.require()
    events = run.events()
    steps = [event for event in events if event["event"] == "step"]
    evals = [event for event in events if event["event"] == "eval"]
    states = [event for event in events if event["event"] == "status"]
    last = steps[-1] if steps else {}
    rate, step_seconds = _recent(steps)
    total = last.get("total_steps")
    status = _status(run, states)
    return RunSummary(
        run=str(run.path),
        status=status,
        step=last.get("step", 0),
        total_steps=total,
        loss=last.get("loss"),
        eval_loss=evals[-1]["eval_loss"] if evals else None,
        eval_loss_before=evals[0]["eval_loss"] if evals else None,
        tokens=sum(event["tokens"] for event in steps),
        tokens_per_second=rate,
        seconds_left=(total - last["step"]) * step_seconds if total and step_seconds and status == "running" else None,
        memory_bytes=last.get("memory_bytes"),
        temperature_c=last.get("temperature_c"),
        power_w=last.get("power_w"),
        resumes=sum(event["event"] == "resume" for event in events),
        last_event_unix_s=events[-1]["time_unix_s"] if events else None,
        reason=states[-1].get("reason") if states else None,
        losses=tuple(event["loss"] for event in steps if event["loss"] is not None),
    )


def find_runs(folder: Path) -> list[RunFolder]:
    """Run folders in `folder` and one level below, by name."""
    candidates = [folder, *sorted(path for path in folder.glob("*") if path.is_dir())]
    return [run for run in map(RunFolder, candidates) if run.exists]


def _status(run: RunFolder, states: list[dict[str, Any]]) -> str:
    if run.is_locked():
        return "running"
    said = states[-1]["status"] if states else "interrupted"
    return "interrupted" if said == "running" else str(said)


def _recent(steps: list[dict[str, Any]]) -> tuple[float | None, float | None]:
    """(tokens per second, median seconds of a step) over the last steps."""
    recent = steps[-_RECENT_STEPS:]
    seconds = [event["seconds"] for event in recent]
    if not recent or sum(seconds) <= 0:
        return None, None
    return sum(event["tokens"] for event in recent) / sum(seconds), statistics.median(seconds)
