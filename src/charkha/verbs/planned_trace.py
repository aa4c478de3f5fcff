"""The one place where a plan asks a backend to trace the real step; None where there is none to ask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from charkha.config import Config
from charkha.plan.memory_settings import MemorySettings


@dataclass(frozen=True)
class TracedPeak:
    """What a trace of two steps found, in bytes; `breakdown` is None where it does not tell parts apart."""

    allocated_bytes: int
    reserved_bytes: int
    breakdown: Mapping[str, int] | None = None


def traced_peak(settings: MemorySettings, config: Config, base_folder: Path | None) -> TracedPeak | None:
    """The peak of the run's own step on fake tensors; None for several devices, without a base folder, and where no
    backend traces yet.
    """
    if settings.processes > 1 or base_folder is None or config.training.objective != "sft":
        return None
    return None
