"""What a run amounts to, read from its events: the result that `charkha train` prints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from charkha.backends.base import StepPlan
from charkha.store.runs import RunFolder


@dataclass(frozen=True)
class TrainResult:
    """The JSON contract of `charkha train`; None where not known here. Seconds and tokens add up over resumes."""

    run: str
    status: Literal["done", "paused", "failed"]
    steps: int
    total_steps: int
    tokens: int
    tokens_per_second: float | None
    seconds: float
    energy_kwh: float | None
    loss_first: float | None
    loss_last: float | None
    eval_loss_before: float | None
    eval_loss_after: float | None
    resumes: int
    adapter: str | None
    checkpoints: list[str]
    peak_memory_bytes: int | None
    peak_rss_bytes: int


def result_of(
    run: RunFolder,
    plan: StepPlan,
    *,
    status: Literal["done", "paused"],
    peak_memory_bytes: int | None,
    peak_rss_bytes: int,
) -> TrainResult:
    """Adds up the events in effect: steps undone by a resume count once."""
    events = run.events()
    steps = [event for event in events if event["event"] == "step"]
    evals = {event["step"]: event["eval_loss"] for event in events if event["event"] == "eval"}
    seconds = sum(event["seconds"] for event in steps)
    tokens = sum(event["tokens"] for event in steps)
    last_step = steps[-1]["step"] if steps else 0
    final = run.adapter if run.adapter.is_dir() else run.path / "model"
    return TrainResult(
        run=str(run.path),
        status=status,
        steps=last_step,
        total_steps=plan.total_steps,
        tokens=tokens,
        tokens_per_second=round(tokens / seconds, 1) if seconds else None,
        seconds=round(seconds, 2),
        energy_kwh=energy_kwh_of(events),
        loss_first=_loss(steps, 0),
        loss_last=_loss(steps, -1),
        eval_loss_before=evals.get(0),
        eval_loss_after=evals.get(last_step) if status == "done" else None,
        resumes=sum(event["event"] == "resume" for event in events),
        adapter=str(final) if status == "done" and final.is_dir() else None,
        checkpoints=sorted(str(path) for path in (run.path / "checkpoints").glob("step-*")),
        peak_memory_bytes=peak_memory_bytes,
        peak_rss_bytes=peak_rss_bytes,
    )


def energy_kwh_of(events: list[dict[str, Any]]) -> float | None:
    """Power of the device that trains, as read at each step, over the steps' seconds; None where a step has none."""
    steps = [event for event in events if event["event"] == "step"]
    if not steps or any(event.get("power_w") is None for event in steps):
        return None
    return float(round(sum(event["power_w"] * event["seconds"] for event in steps) / 3.6e6, 6))


def _loss(steps: list[dict[str, Any]], place: int) -> float | None:
    return steps[place]["loss"] if steps else None
