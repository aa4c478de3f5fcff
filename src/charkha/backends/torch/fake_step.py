"""Two optimizer steps of a run on fake tensors, recorded: the batch, loss, autocast and optimizer of trainer.py.

What TRL's and transformers' trainers do around them that holds memory is repeated here in their order: all micro
batches of a step are made first, the model's forward runs under accelerate's autocast and answers in fp32, gradients
are clipped, and they are dropped after the optimizer has used them.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import _engine_run_backward

from charkha.backends.base import TraceRequest
from charkha.backends.torch.activation_offload import offload_activations
from charkha.backends.torch.base_config import torch_dtype
from charkha.backends.torch.batches import IGNORED
from charkha.backends.torch.cuda_kernels import (
    CudaStandIns,
    cuda_autocast_shown,
    use_cuda_int8,
    workspace_bytes,
)
from charkha.backends.torch.fake_attention import use_planned_attention
from charkha.backends.torch.fake_model import weight_tensors
from charkha.backends.torch.fake_optimizer import make_optimizer, paged_states
from charkha.backends.torch.held_out import row_losses
from charkha.backends.torch.host_copies import Copy, HostCopies, PageableMemory
from charkha.backends.torch.loss import causal_model, choose_loss, training_loss
from charkha.backends.torch.recorder import Recorder
from charkha.plan.memory import EVALUATION

STEPS = 2  # from the second on, optimizer states exist
# The third micro batch of a step finds what the second found: gradients to add to.
_MICRO_BATCHES = 2


def run_steps(model: Any, request: TraceRequest, recorder: Recorder) -> int:
    """Records the model as it is loaded and two optimizer steps; returns how many parameters are trained."""
    gc.collect()
    one_row = use_planned_attention(model, request)
    _hold_weights(model, request, recorder)
    _autocast(model, request)
    if request.offload_activations:
        offload_activations(model, _FakeCopies(recorder))
    way = choose_loss(model, request.loss_head, head_alone=_head_alone)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(model, request)
    with ExitStack() as stack:
        _mark_head(model, recorder, stack)
        if request.device == "cuda":
            use_cuda_int8(model)
            if request.dtype != "fp32":
                stack.enter_context(cuda_autocast_shown(torch_dtype(request.dtype)))
            stack.enter_context(CudaStandIns(request.compute_capability))
        stack.enter_context(recorder)
        step = _Step(model, request, recorder, way, one_row)
        step.evaluate()
        for number in range(STEPS):
            step.run(f"step {number + 1}", optimizer, trained)
        step.evaluate()
    return _count(trained)


class _FakeCopies(HostCopies):
    """What leaves the device is gone, and what comes back is counted; host memory is not the device's."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder
        self._fake_mode: Any = None

    def leave(self, tensor: torch.Tensor) -> Copy:
        self._fake_mode = getattr(tensor, "fake_mode", self._fake_mode)
        return Copy(PageableMemory(0), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, 0)

    def bring(self, copy: Copy) -> torch.Tensor:
        with self._fake_mode:
            made = torch.empty_strided(copy.shape, copy.stride, dtype=copy.dtype, device=copy.device)
        self._recorder.hold(made, "activations")
        return made

    def forget(self, copy: Copy) -> None:
        """There is nothing to forget."""


def _backward(loss: torch.Tensor) -> None:
    """loss.backward() without the dispatch to torch's function modes, which would leave CudaStandIns meanwhile.

    Checkpointed layers run again in here and must find the same stand-ins.
    """
    _engine_run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def _count(trained: list[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in trained)


class _Step:
    """One optimizer step, and what stays from one to the next."""

    def __init__(self, model: Any, request: TraceRequest, recorder: Recorder, way: str, one_row: bool) -> None:
        self._model = model
        self._request = request
        self._recorder = recorder
        self._way = way
        self._one_row = one_row
        self._workspaces: set[str] = set()

    def run(self, name: str, optimizer: Any, trained: list[nn.Parameter]) -> None:
        recorder = self._recorder
        recorder.enter_phase(f"{name}: batch")
        batches = [self._batch() for _ in range(self._request.accumulation_steps)]
        count = sum((batch["labels"][..., 1:] != IGNORED).sum() for batch in batches)
        for batch in batches[:_MICRO_BATCHES]:
            recorder.enter_phase(f"{name}: forward")
            self._take_workspace("forward")
            loss = training_loss(self._model, batch, count, self._way)
            recorder.enter_phase(f"{name}: backward")
            self._take_workspace("backward")
            _backward(loss)
            recorder.kind = "temporaries"
            del loss
            _name_gradients(recorder, trained)
        recorder.enter_phase(f"{name}: optimizer step")
        self._update(optimizer, trained)
        recorder.enter_phase(f"{name}: end")

    def evaluate(self) -> None:
        """The held-out loss of one batch, as held_out.py takes it at step 0 and after the last one."""
        lengths = self._request.held_out_lengths
        if not lengths:
            return
        self._recorder.enter_phase(EVALUATION)
        self._take_workspace("forward")
        batch = padded_batch(lengths, None)
        targets = batch["labels"][:, 1:]
        self._count_batch(batch)
        self._model.eval()
        with torch.no_grad():
            row_losses(self._model, batch, targets, self._way)
        self._model.train()
        self._recorder.kind = "temporaries"
        self._recorder.enter_phase("between steps")

    def _update(self, optimizer: Any, trained: list[nn.Parameter]) -> None:
        if self._request.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(trained, self._request.max_grad_norm)
        optimizer.step()
        paged = paged_states(optimizer, self._request)
        for tensor in _state_tensors(optimizer):
            self._recorder.hold(tensor, "optimizer_states")
            if id(tensor) in paged:
                self._recorder.leave_out(tensor)
        self._model.zero_grad()

    def _take_workspace(self, thread: str) -> None:
        """cuBLAS's, for good, when a thread first multiplies matrices."""
        if self._request.device == "cuda" and thread not in self._workspaces:
            self._workspaces.add(thread)
            self._recorder.allocation(workspace_bytes(self._request.compute_capability), "workspace")

    def _batch(self) -> dict[str, Any]:
        batch = make_batch(self._request, one_row=self._one_row)
        self._count_batch(batch)
        return batch

    def _count_batch(self, batch: dict[str, Any]) -> None:
        for value in batch.values():
            if isinstance(value, torch.Tensor):
                self._recorder.hold(value, "batch")
                if self._request.device == "cpu":
                    self._recorder.leave_out(value)  # numpy's memory there, which torch's allocator does not count


def make_batch(request: TraceRequest, *, one_row: bool) -> dict[str, Any]:
    """One micro batch as batches.collate or collate_packed makes it; its tensors are real."""
    if request.document_lengths:
        return _packed_batch(request, one_row)
    lengths = request.row_lengths or (request.sequence_length,) * request.micro_batch_size
    return padded_batch(lengths, request.trained_tokens_per_row)


def padded_batch(lengths: tuple[int, ...], trained: int | None) -> dict[str, Any]:
    """Rows of these lengths, of which the last `trained` tokens carry loss; None: all."""
    shape = (len(lengths), max(lengths))
    mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORED)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
        labels[row, max(0, length - (trained or length)) : length] = 1
    return {"input_ids": torch.zeros(shape, dtype=torch.int64), "attention_mask": mask, "labels": labels}


def _packed_batch(request: TraceRequest, one_row: bool) -> dict[str, Any]:
    positions = torch.cat([torch.arange(length) for length in request.document_lengths])
    rows = request.micro_batch_size
    positions = positions.repeat(rows)[None] if one_row else positions.repeat(rows, 1)
    labels = torch.ones_like(positions)
    labels[positions == 0] = IGNORED
    batch = {"input_ids": torch.zeros_like(positions), "labels": labels, "position_ids": positions}
    if not one_row:
        return batch
    starts = (positions[0] == 0).nonzero().flatten()
    bounds = torch.cat([starts, torch.tensor([positions.shape[1]])]).to(torch.int32)
    longest = max(request.document_lengths)
    kernel = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
    return {**batch, **kernel}


def _hold_weights(model: Any, request: TraceRequest, recorder: Recorder) -> None:
    """On a GPU transformers first takes and frees one block for the whole base, from which its weights are cut."""
    recorder.enter_phase("model")
    held = weight_tensors(model)
    if request.device == "cuda":
        base = sum(tensor.untyped_storage().nbytes() for kind, tensor in held if kind == "base_weights")
        recorder.release(recorder.allocation(base, "temporaries"))
    for kind, tensor in held:
        recorder.hold(tensor, kind)


def _autocast(model: Any, request: TraceRequest) -> None:
    """Accelerate's prepare_model for mixed precision: autocast around forward, and an answer in fp32."""
    if request.dtype == "fp32":
        return
    from accelerate.utils.operations import convert_outputs_to_fp32

    autocast = torch.autocast("cpu", dtype=torch_dtype(request.dtype))
    model.forward = convert_outputs_to_fp32(autocast(model.forward))


def _head_alone(causal: Any) -> bool:
    """As loss.choose_loss tries it on a real model: a plain head, and nothing that scales its logits."""
    config = causal.config.get_text_config()
    scaled = any(getattr(config, name, None) not in (None, 1, 1.0) for name in ("logit_scale", "logits_scaling"))
    return type(causal.get_output_embeddings()) is nn.Linear and not scaled


def _mark_head(model: Any, recorder: Recorder, stack: ExitStack) -> None:
    """Has what is born between the last layer's output and its gradient counted as logits and loss."""

    def leave_body(module: Any, inputs: Any, output: Any) -> None:
        recorder.kind = "logits_and_loss"
        hidden = output[0]
        if hidden.requires_grad:
            hidden.register_hook(enter_body)

    def enter_body(gradient: torch.Tensor) -> None:
        recorder.kind = "temporaries"

    hook = causal_model(model).get_decoder().register_forward_hook(leave_body)
    stack.callback(hook.remove)


def _name_gradients(recorder: Recorder, trained: list[nn.Parameter]) -> None:
    for parameter in trained:
        if parameter.grad is not None:
            recorder.hold(parameter.grad, "gradients")


def _state_tensors(optimizer: Any) -> Iterator[torch.Tensor]:
    for entries in optimizer.state.values():
        yield from (value for value in entries.values() if isinstance(value, torch.Tensor))
