"""Seconds of an epoch over the rows as they are: each micro batch padded to its own longest row, not to the longest."""

from __future__ import annotations

from dataclasses import replace

from charkha.hardware.machine import Machine
from charkha.plan.architecture import Architecture
from charkha.plan.memory_settings import MemorySettings
from charkha.plan.rows import Rows
from charkha.plan.speed import step_time
from charkha.plan.streamed_time import streamed_step_time


def epoch_seconds(
    architecture: Architecture, settings: MemorySettings, machine: Machine, rows: Rows, batch_size: int
) -> float:
    """Of all optimizer steps of one epoch, on all devices together; of one step where the rows are not counted.

    Micro batches of like length are taken together. The head works on the same share of positions in all of them.
    """
    share = settings.loss_positions / settings.positions
    seconds = 0.0
    for batches in rows.micro_batches(settings.rows, batch_size):
        if not batches.count:
            continue
        tokens = max(1, round(batches.tokens))
        shape = replace(settings, rows=max(1, round(batches.positions / tokens)), tokens=tokens, trained_positions=None)
        full = shape.rows * tokens
        shape = replace(shape, trained_positions=max(1, round(share * shape.positions)))
        time = streamed_step_time(architecture, shape, machine)
        seconds += batches.count * time.micro_batch_seconds * batches.positions / full
    optimizer = step_time(architecture, settings, machine.gpu, cpu_flops=machine.cpu_flops).optimizer_seconds
    return seconds / settings.processes + rows.steps(batch_size) * optimizer
