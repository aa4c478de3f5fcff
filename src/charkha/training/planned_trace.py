"""The one place where a plan asks the backend to trace the run's own step; says why where it cannot be asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from charkha.backends.base import TraceRequest, TraceResult
from charkha.backends.torch.trace import remembered_memory, trace_memory
from charkha.config import Config
from charkha.errors import CharkhaError
from charkha.hardware.machine import Machine
from charkha.plan.memory import MemoryPreview
from charkha.plan.memory_settings import MemorySettings
from charkha.plan.search import Candidate
from charkha.training.choices import adapter_spec

_WITHIN_REACH = 0.9  # of the step's peak: a closed form and a trace are at most 5 % apart


@dataclass(frozen=True)
class Traced:
    """What a trace of two steps found, in bytes; or, with nothing in the rest, why there is none."""

    why_not: str | None
    allocated_bytes: int = 0
    reserved_bytes: int = 0
    breakdown: Mapping[str, int] | None = None
    peak_moment: str | None = None


def traced_peak(found: Candidate, config: Config, base_config: Mapping[str, Any], machine: Machine) -> Traced:
    """The peak of the run's own step on fake tensors. Takes the backend's time: seconds to minutes the first time."""
    why_not = _out_of_reach(found.settings)
    if why_not is not None:
        return Traced(why_not)
    try:
        result = trace_memory(_request(found, config, base_config, machine))
    except CharkhaError as error:
        return Traced(f"the step could not be traced: {error.message}")
    return _traced(result)


def remembered_peak(found: Candidate, config: Config, base_config: Mapping[str, Any], machine: Machine) -> Traced:
    """The same, where this very step was traced before on this computer; takes no time."""
    why_not = _out_of_reach(found.settings)
    result = None if why_not else remembered_memory(_request(found, config, base_config, machine))
    if result is None:
        return Traced(why_not or "this step was not traced before; `charkha plan` traces it")
    return _traced(result)


def _traced(result: TraceResult) -> Traced:
    return Traced(
        None,
        allocated_bytes=result.peak_allocated_bytes,
        reserved_bytes=result.peak_reserved_bytes,
        breakdown=dict(result.breakdown),
        peak_moment=result.peak_moment,
    )


def _out_of_reach(settings: MemorySettings) -> str | None:
    """What only the closed form can count."""
    if settings.processes > 1:
        return "several devices are counted in closed form"
    if settings.device == "mps":
        return "Apple GPUs are counted in closed form"
    if settings.streamed:
        return "a streamed base is counted in closed form"
    if settings.offload - {"activations"}:
        return "offloaded optimizers and parameters are counted in closed form"
    if settings.fused_norms or settings.fused_mlp:
        return "fused kernels are counted in closed form"
    return None


def _request(found: Candidate, config: Config, base_config: Mapping[str, Any], machine: Machine) -> TraceRequest:
    gpu, settings = machine.gpu, found.settings
    checkpointing: Literal["none", "full", "selective"] = "full" if settings.gradient_checkpointing else "none"
    trained = settings.trained_positions
    # Rows that differ in length bring a mask; by how much they differ changes nothing else.
    shorter = (settings.tokens, *[max(1, settings.tokens - 1)] * (settings.rows - 1))
    return TraceRequest(
        config=dict(base_config),
        adapter=adapter_spec(config),
        micro_batch_size=settings.rows,
        sequence_length=settings.tokens,
        dtype=settings.dtype,
        attention=settings.attention,
        quantization=settings.quantization,
        double_quantization=settings.double_quantization,
        upcast_unquantized=settings.upcast_unquantized,
        trainable_dtype=settings.trained_dtype,
        row_lengths=shorter if settings.has_padding else (),
        trained_tokens_per_row=None if trained is None else -(-trained // settings.rows),
        accumulation_steps=settings.accumulation_steps,
        gradient_checkpointing="selective" if settings.selective else checkpointing,
        offload_activations="activations" in settings.offload,
        loss_head=settings.loss_head,
        optimizer=settings.optimizer,
        weight_decay=config.training.weight_decay,
        max_grad_norm=config.training.max_grad_norm,
        device="cpu" if settings.device == "cpu" else "cuda",
        compute_capability=(gpu.capability if gpu and gpu.capability else (8, 0)),
        held_out_lengths=_held_out_lengths(found.preview),
    )


def _held_out_lengths(preview: MemoryPreview) -> tuple[int, ...]:
    """The rows of the largest held-out batch where it may be the peak; a trace of it would else change nothing."""
    if preview.held_out is None or preview.held_out_bytes < _WITHIN_REACH * preview.step_bytes:
        return ()
    batch = preview.held_out.batch
    return (batch.tokens, *[max(1, batch.tokens - batch.padded)] * (batch.rows - 1))
