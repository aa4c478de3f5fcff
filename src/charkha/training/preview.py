"""The plan of a run: said before the base is loaded, kept in plan.json, and heeded when memory runs out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from charkha.config import Config
from charkha.hardware.machine import Machine
from charkha.plan.architecture import Architecture
from charkha.plan.rows import Rows
from charkha.plan.search import fallback_steps
from charkha.training.choices import Chooser, StepMemory
from charkha.training.plan_history import corrected_by_history
from charkha.training.plan_record import plan_record, verdicts
from charkha.training.planned_settings import PlannedSettings
from charkha.training.planned_trace import remembered_peak
from charkha.units import format_bytes, format_seconds

_TERMS_SHOWN = 4


@dataclass(frozen=True)
class Preview:
    """What is written to plan.json; `reason` says why there are no figures, where there are none."""

    record: dict[str, Any]
    reason: str | None = None

    def sentence(self) -> str:
        """One line for the person watching."""
        if self.reason is not None:
            return f"no memory preview: {self.reason}"
        terms = islice(self.record["breakdown"].items(), _TERMS_SHOWN)
        parts = ", ".join(f"{name.replace('_', ' ')} {format_bytes(size)}" for name, size in terms)
        peak = format_bytes(self.record["peak_allocated_bytes"])
        seconds = self.record["seconds"]
        taken = "" if seconds is None else f"; the steps will take about {format_seconds(seconds)}"
        return f"memory preview: {peak} of live tensors at the {self.record['peak_moment']} ({parts}, ...){taken}"


def preview(
    config: Config,
    chooser: Chooser,
    architecture: Architecture,
    machine: Machine,
    rows: Rows,
    planned: PlannedSettings,
    base_config: Mapping[str, Any],
) -> Preview:
    """The same record as `charkha plan` gives, by a trace where this very step was traced before; it makes none."""
    trace = remembered_peak(planned.way.candidate, config, base_config, machine)
    record = plan_record(config, architecture, machine, rows, planned.way.candidate, trace)
    said = [*(str(choice) for choice in chooser.choices), *planned.reasons]
    corrected_by_history(record, config, architecture, planned.settings, machine)
    said += [*record["reasons"], *verdicts(record, planned.way.candidate, machine)]
    return Preview(record | {"reasons": said, "alternatives": []})


def without_figures(step: StepMemory, reason: str) -> Preview:
    """The plan of a run whose base the planner does not cover: nothing but what to do when memory runs out."""
    nothing = dict.fromkeys(("fits", "peak_allocated_bytes", "peak_moment", "breakdown", "trainable_parameters"))
    fallbacks = fallback_steps(step.loss_head, step.gradient_checkpointing, step.micro_batch_size)
    record = {"method": None, **nothing, "reasons": [reason], "fallbacks": list(fallbacks), "alternatives": []}
    return Preview(record, reason)
