"""One request traced: fake model, recorded steps, replay through the planned device's allocator."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from charkha.backends.base import TraceRequest, TraceResult
from charkha.backends.torch.allocator import AllocatorSettings, OutOfDeviceMemory, replay
from charkha.backends.torch.cuda_kernels import cpu_temporaries, cuda_temporaries
from charkha.backends.torch.expandable import allocator_for
from charkha.backends.torch.fake_model import build_fake_model
from charkha.backends.torch.fake_step import run_steps
from charkha.backends.torch.quiet import quiet_libraries
from charkha.backends.torch.recorder import Recorder
from charkha.backends.torch.stand_ins import STAND_INS
from charkha.backends.torch.timeline import find_peak

_METHOD = "the run's own training step on fake tensors, two optimizer steps"


def trace_step(request: TraceRequest) -> TraceResult:
    """The result without its seconds; see trace.py."""
    quiet_libraries()
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    on_gpu = request.device == "cuda"
    recorder = Recorder(fake_mode, cuda_temporaries if on_gpu else cpu_temporaries, STAND_INS)
    model = build_fake_model(request, fake_mode)
    trained = run_steps(model, request, recorder)
    peak = find_peak(recorder, rounded=on_gpu)
    reserved, fits = _reserve(request, recorder) if on_gpu else (peak.allocated_bytes, None)
    return TraceResult(
        peak_allocated_bytes=peak.allocated_bytes,
        peak_reserved_bytes=reserved,
        breakdown=peak.breakdown,
        peak_moment=peak.moment,
        between_steps_bytes=peak.end_bytes,
        fits=fits,
        trainable_parameters=trained,
        operators=recorder.operators,
        seconds=0.0,
        notes=_notes(request),
    )


def _reserve(request: TraceRequest, recorder: Recorder) -> tuple[int, bool | None]:
    """Peak of reserved bytes, and whether everything found room; None where there is no limit."""
    limit = request.device_limit_bytes
    settings = AllocatorSettings(expandable_segments=request.expandable_segments, limit_bytes=limit)
    allocator = allocator_for(settings)
    try:
        replay(allocator, recorder.events, recorder.sizes)
    except OutOfDeviceMemory:
        return allocator.peak_reserved_bytes, False
    return allocator.peak_reserved_bytes, None if limit is None else True


def _notes(request: TraceRequest) -> tuple[str, ...]:
    notes = [f"{_METHOD}, torch {torch.__version__}"]
    if request.device == "cuda":
        notes.append("reserved by a simulation of torch's CUDA caching allocator; the CUDA context comes on top")
        notes.append("CUDA kernels by their documented allocations, for compute capability " + _dotted(request))
    if request.accumulation_steps > 2:
        notes.append("from the third micro batch of a step on, memory is as in the second")
    if "num_local_experts" in request.config or "num_experts" in request.config:
        notes.append("tokens are dealt to experts evenly; an uneven router needs more")
    return tuple(notes)


def _dotted(request: TraceRequest) -> str:
    return ".".join(str(part) for part in request.compute_capability)
