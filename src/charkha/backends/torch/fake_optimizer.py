"""The run's optimizer over fake parameters, by transformers' own choice of class and settings."""

from __future__ import annotations

import tempfile
from typing import Any

import torch

from charkha.backends.base import TraceRequest

_TORCH_LOOPS = frozenset({"adamw_torch", "sgd", "adagrad", "rmsprop"})
_PAGED_FROM = 100_000  # elements; bitsandbytes/optim/optimizer.py, get_state_buffer


def make_optimizer(model: Any, request: TraceRequest) -> torch.optim.Optimizer:
    """As trainer.create_optimizer makes it. On a GPU torch's optimizers work on all tensors at once by default."""
    from transformers import Trainer, TrainingArguments

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, optim=request.optimizer, use_cpu=True, report_to="none", save_strategy="no"
        )
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    if request.device == "cuda" and request.optimizer in _TORCH_LOOPS:
        settings["foreach"] = True
    if request.adapter.loraplus_ratio is not None:
        from peft.optimizers import create_loraplus_optimizer

        ratio = request.adapter.loraplus_ratio
        made: torch.optim.Optimizer = create_loraplus_optimizer(
            model, kind, loraplus_lr_ratio=ratio, loraplus_weight_decay=request.weight_decay, **settings
        )
        return made
    decaying = set(Trainer.get_decay_parameter_names(None, model))
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for name, p in named if name in decaying], "weight_decay": request.weight_decay},
        {"params": [p for name, p in named if name not in decaying], "weight_decay": 0.0},
    ]
    optimizer: torch.optim.Optimizer = kind(groups, **settings)
    return optimizer


def paged_states(optimizer: torch.optim.Optimizer, request: TraceRequest) -> set[int]:
    """Ids of state tensors that do not lie in the device's own memory: paged ones, and step counters on the host."""
    if request.device == "cpu":
        return set()
    on_host: set[int] = set()
    paged = request.optimizer.startswith("paged_")
    counters_on_host = request.optimizer in _TORCH_LOOPS  # only the fused kernel keeps them on the device
    for parameter, entries in optimizer.state.items():
        for name, value in entries.items():
            if not isinstance(value, torch.Tensor):
                continue
            if (paged and name.startswith("state") and parameter.numel() >= _PAGED_FROM) or (
                counters_on_host and name == "step"
            ):
                on_host.add(id(value))
    return on_host
