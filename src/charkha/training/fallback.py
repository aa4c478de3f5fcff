"""After a run was out of memory: the next of the plan's fallbacks, none of which changes what is learned.

plan.json holds them in order; fallback.json what was applied, and why. Each comes on top of those before it.
"""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any, TypeVar

from charkha.backends.base import StepPlan
from charkha.errors import TrainingFailed
from charkha.plan.search import fallback_steps
from charkha.store.runs import RunFolder

Step = TypeVar("Step", StepPlan, "_Step")
_FILE = "fallback.json"
_FIELDS = {
    "training.loss_head": "loss_head",
    "training.gradient_checkpointing": "gradient_checkpointing",
    "training.micro_batch_size": "micro_batch_size",
}


def applied_fallbacks(run: RunFolder) -> dict[str, Any]:
    """Config key to value, of all that this run gave up for memory; empty where it was never out of it."""
    record = _read(run, _FILE)
    if isinstance(record.get("micro_batch_size"), int):  # as earlier versions wrote it
        return {"training.micro_batch_size": record["micro_batch_size"]}
    changes = record.get("changes")
    return changes if isinstance(changes, dict) else {}


def apply_fallbacks(plan: StepPlan, run: RunFolder) -> StepPlan:
    """The plan with what was given up for memory; batch_size, and with it every optimizer step, stays."""
    return _changed(plan, applied_fallbacks(run))


def fallbacks_note(run: RunFolder) -> list[str]:
    """One line of what was given up, where anything was."""
    changes = ", ".join(f"{key}: {value}" for key, value in applied_fallbacks(run).items())
    return [f"since memory ran out: {changes}"] if changes else []


def next_fallback(run: RunFolder) -> dict[str, Any]:
    """The first fallback of the plan that changes anything, which is recorded for the next start and returned.

    Raises TrainingFailed where none is left.
    """
    began = _read(run, "manifest.json")["plan"]
    names = [field.name for field in dataclasses.fields(_Step)]
    now = _changed(_Step(**{name: began[name] for name in names if name in began}), applied_fallbacks(run))
    for change in _planned(run, now):
        if _changed(now, change) != now:
            _record(run, change, now)
            return change
    raise TrainingFailed(
        "out of GPU memory with one row in memory at a time, layers recomputed, and logits in chunks",
        where=str(run.path),
        remedy="use a smaller data.max_length, quantization nf4, or an 8-bit optimizer; `charkha plan` says what fits",
    )


@dataclasses.dataclass(frozen=True)
class _Step:
    """What of a step plan the fallbacks touch."""

    micro_batch_size: int = 1
    gradient_checkpointing: bool = False
    loss_head: str = "full"
    selective: bool = False


def _planned(run: RunFolder, now: _Step) -> list[dict[str, Any]]:
    """The list in plan.json; of a run from before there was one, what would have stood there."""
    planned = _read(run, "plan.json").get("fallbacks")
    if isinstance(planned, list):
        return planned
    recomputes = now.gradient_checkpointing and not now.selective
    return list(fallback_steps(now.loss_head, recomputes, now.micro_batch_size))


def _changed(step: Step, changes: dict[str, Any]) -> Step:
    """A step or a step plan with the changes; a micro batch is never made larger."""
    values: dict[str, Any] = {_FIELDS[key]: value for key, value in changes.items() if key in _FIELDS}
    if "micro_batch_size" in values:
        values["micro_batch_size"] = max(1, min(int(values["micro_batch_size"]), step.micro_batch_size))
    if "gradient_checkpointing" in values:
        recomputes = values["gradient_checkpointing"] == "full"
        values["gradient_checkpointing"] = recomputes or step.gradient_checkpointing
        values["selective"] = step.selective and not recomputes
    return dataclasses.replace(step, **values)


def _record(run: RunFolder, change: dict[str, Any], now: _Step) -> None:
    before = _read(run, _FILE)
    at = ", ".join(
        f"{name} {getattr(now, name)}" for name in ("micro_batch_size", "gradient_checkpointing", "loss_head")
    )
    step = {"change": change, "reason": f"out of memory at {at}", "time_unix_s": round(time.time())}
    steps = [*before.get("steps", []), step]
    run.write_json(run.path / _FILE, {"changes": applied_fallbacks(run) | change, "steps": steps})


def _read(run: RunFolder, name: str) -> dict[str, Any]:
    """A record of the run; empty where it is not there or cannot be read, which a power cut may leave."""
    try:
        record = json.loads((run.path / name).read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
