"""What a finished run took, remembered for the next plan on this machine (plan/history.py)."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from typing import Any, cast

from charkha.caches import history_folder
from charkha.plan.autos import with_rows
from charkha.plan.history import KEPT, RUNS, FinishedRun, line_of, shape_here
from charkha.plan.memory_settings import MemorySettings
from charkha.plan.search import evaluate
from charkha.store.jsonl import add_line
from charkha.training.opening import Planned, Session
from charkha.training.plan_record import run_seconds

_STANDSTILL = 10.0  # a step that took so many times the median was not all work: the machine slept, or was stopped
_FEWEST_STEPS = 5  # of which the first ones warm up


def remember_run(session: Session, events: list[dict[str, Any]], peak_bytes: int | None) -> str | None:
    """Adds the finished run to this machine's history; returns why it could not, where the disk does not take it.

    Nothing is remembered of runs that are too short to say anything, or whose base the planner does not know.
    """
    folder, planned = history_folder(), session.planned
    seconds = [float(event["seconds"]) for event in events if event["event"] == "step"]
    if folder is None or planned is None or len(seconds) < _FEWEST_STEPS:
        return None
    settings = as_it_ran(session, planned)
    config, machine = session.loaded.config, planned.machine
    found = evaluate(planned.architecture, settings, machine)
    planned_seconds = run_seconds(config, planned.architecture, machine, planned.rows, found)
    if planned_seconds is None:
        return None
    run = FinishedRun(
        shape=shape_here(planned.architecture, settings, planned.machine),
        steps=len(seconds),
        planned_seconds=planned_seconds,
        measured_seconds=working_seconds(seconds),
        # On a CPU steps alone are measured; a GPU's own counter knows of evaluation too.
        planned_bytes=found.preview.peak_bytes if settings.device == "cuda" else found.preview.step_bytes,
        measured_bytes=peak_bytes,
        finished_unix_s=int(time.time()),
    )
    try:
        add_line(folder / RUNS, line_of(run), most=KEPT)
    except OSError as error:
        return f"the next plan will not know of this run: {folder} cannot be written: {error.strerror or error}"
    return None


def as_it_ran(session: Session, planned: Planned) -> MemorySettings:
    """The settings planned, with what was given up for memory since."""
    plan, streaming, moved = session.plan, session.base.streaming, {"activations"}
    step = replace(
        planned.settings,
        gradient_checkpointing=plan.gradient_checkpointing,
        selective=plan.selective,
        offload=planned.settings.offload - moved | (moved if plan.offload_activations else set()),
        streamed_resident_layers=streaming.hot_layers if streaming else 0,
        loss_head=cast(Any, plan.loss_head),
    )
    return with_rows(step, plan.micro_batch_size, planned.rows, plan.batch_size)


def working_seconds(seconds: list[float]) -> float:
    """All steps together, one that stood still counted as a usual one."""
    usual = statistics.median(seconds)
    return sum(usual if one > _STANDSTILL * usual else one for one in seconds)
