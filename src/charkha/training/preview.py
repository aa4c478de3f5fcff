"""The memory that the run's step will need, said before the base model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any

from charkha.plan.architecture import Architecture
from charkha.plan.memory import MemoryPreview, preview_memory
from charkha.plan.memory_settings import MemorySettings
from charkha.units import format_bytes

_TERMS_SHOWN = 4


@dataclass(frozen=True)
class Preview:
    """What is written to plan.json; `memory` is None where the closed form does not cover the run, with the reason."""

    memory: MemoryPreview | None
    reason: str | None

    def sentence(self) -> str:
        """One line for the person watching."""
        if self.memory is None:
            return f"no memory preview: {self.reason}"
        terms = islice(self.memory.breakdown.items(), _TERMS_SHOWN)
        parts = ", ".join(f"{name.replace('_', ' ')} {format_bytes(size)}" for name, size in terms)
        peak = format_bytes(self.memory.peak_bytes)
        return f"memory preview: {peak} of live tensors at the {self.memory.peak_moment} ({parts}, ...)"

    def record(self) -> dict[str, Any]:
        """plan.json: keys as in the JSON contract of a plan; None where this version does not say."""
        memory = self.memory
        return {
            "method": "closed_form",
            "peak_allocated_bytes": memory.peak_bytes if memory else None,
            "peak_moment": memory.peak_moment if memory else None,
            "breakdown": memory.breakdown if memory else None,
            "trainable_parameters": memory.trainable_parameters if memory else None,
            "reasons": [self.reason] if self.reason else list(memory.notes if memory else ()),
        }


def preview(architecture: Architecture, settings: MemorySettings) -> Preview:
    """The closed form of the run's step."""
    if architecture.learned_positions:
        return Preview(None, f"the dropout and activation function of {architecture.model_type} are not counted yet")
    return Preview(preview_memory(architecture, settings), None)
