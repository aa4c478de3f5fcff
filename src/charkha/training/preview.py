"""The memory that the run's step will need, said before the base model is loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal, cast

import numpy as np

from charkha.backends.base import AdapterSpec, BaseModelSpec, StepPlan, Streaming
from charkha.data.shards import Shard
from charkha.errors import CharkhaError
from charkha.plan.architecture import Architecture, read_architecture
from charkha.plan.loss_memory import with_the_loss_that_runs
from charkha.plan.memory import MemoryPreview, preview_memory
from charkha.plan.memory_settings import MemorySettings, Method
from charkha.plan.packing_support import BY_MASK
from charkha.plan.weights import nf4_bytes
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


def preview(
    config: dict[str, Any],
    base: BaseModelSpec,
    adapter: AdapterSpec,
    plan: StepPlan,
    shard: Shard,
    row_tokens: int,
) -> Preview:
    """The closed form for this run's longest micro batch; never an error, since the run does not need it."""
    if base.quantization == "int8":
        return Preview(None, "what the products of an int8 base keep is not counted yet")
    settings = MemorySettings(
        dtype=base.dtype,
        rows=plan.micro_batch_size,
        tokens=row_tokens,
        method=cast(Method, {"rslora": "lora"}.get(adapter.method, adapter.method)),
        quantization=cast(Literal["none", "nf4", "fp4"], base.quantization),
        r=adapter.r,
        lora_dropout=adapter.lora_dropout,
        target_modules=adapter.target_modules,
        gradient_checkpointing=plan.gradient_checkpointing,
        accumulation_steps=-(-plan.batch_size // plan.micro_batch_size),
        loss_head="chunked" if plan.loss_head == "chunked" else "full",
        trained_positions=trained_positions(shard, plan.micro_batch_size) if plan.packing is None else None,
        optimizer=plan.optimizer,
        num_virtual_tokens=adapter.num_virtual_tokens if adapter.method == "prompt_tuning" else 0,
        modules_to_save=adapter.modules_to_save,
        device=cast(Literal["cpu", "cuda", "mps"], base.device),
        attention=base.attention,
        # Packed rows are given to the kernel by their documents' bounds, or have no padding: no mask either way.
        padded=False if plan.packing is not None and config.get("model_type") not in BY_MASK else None,
    )
    try:
        architecture = read_architecture(config)
        settings = with_the_loss_that_runs(settings, architecture)
    except CharkhaError as error:
        return Preview(None, error.message)
    if architecture.learned_positions:
        return Preview(None, f"the dropout and activation function of {architecture.model_type} are not counted yet")
    memory = preview_memory(architecture, settings)
    if base.streaming is not None:
        memory = _streamed(memory, architecture, settings, base.streaming)
    return Preview(memory, None)


_CODES_BYTES = 4 * (16 + 256)  # which nf4_bytes counts for every matrix; streamed layers share them


def _streamed(
    memory: MemoryPreview, architecture: Architecture, settings: MemorySettings, streaming: Streaming
) -> MemoryPreview:
    """The same step with `streaming.slots` and the hot layers on the device in the place of all layers."""
    matrices = [linear.weights for linear in architecture.linears]
    if settings.quantization != "none":  # fp4 is stored like nf4
        resident = sum(nf4_bytes(count) for count in matrices)
        moving = resident - _CODES_BYTES * len(matrices)
    else:
        resident = moving = settings.residual_bytes * sum(matrices)
    held = min(streaming.slots + streaming.hot_layers, architecture.layers)
    saved = architecture.layers * resident - held * moving
    breakdown = {**memory.breakdown, "base_weights": memory.breakdown["base_weights"] - saved}
    waiting = format_bytes(architecture.layers * moving)
    return replace(
        memory,
        peak_bytes=memory.peak_bytes - saved,
        breakdown=dict(sorted(breakdown.items(), key=lambda term: -term[1])),
        moments={name: size - saved for name, size in memory.moments.items()},
        notes=(
            *memory.notes,
            f"{held} layers of the base are on the device at once; all of them, {waiting}, wait beside",
        ),
    )


def trained_positions(shard: Shard, micro_batch_size: int) -> int:
    """Positions of the longest micro batch whose logits the loss takes: columns where some row is trained, in all rows.

    (The chunked head takes the trained tokens alone, which are at most as many.)
    """
    longest = np.argsort(shard.lengths, kind="stable")[-micro_batch_size:]
    columns = np.zeros(int(shard.lengths.max()), dtype=bool)
    for row in longest:
        trained = shard.trained(int(row))
        columns[: len(trained)] |= trained
    columns[0] = False  # nothing predicts the first token
    return int(columns.sum()) * len(longest)
