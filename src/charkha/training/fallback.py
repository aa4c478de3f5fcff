"""Smaller micro batches after a run was out of GPU memory: the same rows in every step, in smaller helpings."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from charkha.backends.base import StepPlan
from charkha.errors import TrainingFailed
from charkha.store.runs import RunFolder

_FILE = "fallback.json"


def micro_batch_limit(run: RunFolder) -> int | None:
    """The largest micro batch that this run may still try; None where it was never out of memory."""
    try:
        return max(1, int(json.loads((run.path / _FILE).read_bytes())["micro_batch_size"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def apply_limit(plan: StepPlan, run: RunFolder) -> StepPlan:
    """The plan with micro batches no larger than the limit; batch_size, and with it every optimizer step, stays."""
    limit = micro_batch_limit(run)
    if limit is None or limit >= plan.micro_batch_size:
        return plan
    return dataclasses.replace(plan, micro_batch_size=limit)


def halve_micro_batch(run: RunFolder) -> int:
    """Halves the micro batch for the next start and returns it. Raises TrainingFailed where it is one row already."""
    size = micro_batch_limit(run) or _planned(run.read_manifest())
    if size <= 1:
        raise TrainingFailed(
            "out of GPU memory with one row in memory at a time",
            where=str(run.path),
            remedy="use gradient_checkpointing: full, a smaller data.max_length, quantization nf4, an 8-bit optimizer",
        )
    half = size // 2
    run.write_json(run.path / _FILE, {"micro_batch_size": half, "reason": f"out of GPU memory at {size}"})
    return half


def _planned(manifest: dict[str, Any]) -> int:
    return int(manifest["plan"]["micro_batch_size"])
