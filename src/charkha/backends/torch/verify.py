"""Logits of a merged model against base + adapter on real prompts, and how much of the gap rounding explains."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from charkha.backends.base import BaseModelSpec
from charkha.backends.torch.model import load_adapter, load_base
from charkha.backends.torch.tensor_files import tensors_of_folder

_UNIT_ROUNDOFF = {"F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-9, "F64": 2.0**-53}


@dataclass(frozen=True)
class MergeCheck:
    """Gap between merged model and base + adapter, in logits."""

    max_logit_difference: float
    allowed_logit_difference: float
    max_abs_logit: float
    prompts: int
    tokens: int

    @property
    def verified(self) -> bool:
        return self.max_logit_difference <= self.allowed_logit_difference


def check_merge(base: BaseModelSpec, adapter: Path, merged: Path, prompts: Sequence[np.ndarray]) -> MergeCheck:
    """Both models' logits at every position of `prompts`, in the arithmetic of `base.dtype`, one in memory at a time.

    What rounding explains is measured, not assumed: every merged weight is moved at random by up to half a unit in the
    last place of its stored type, and the logits' change is the yardstick; four times that is allowed, plus the
    rounding of the arithmetic itself (W x + s B A x is summed in another order than (W + s B A) x).
    """
    reference = _logits(load_adapter(_reference(base), adapter), prompts)
    _free_memory()
    model = load_base(replace(base, path=merged, quantization="none", streaming=None))
    own = _logits(model, prompts)
    _nudge_weights(model, merged)
    nudged = _logits(model, prompts)
    largest = max(float(np.abs(logits).max()) for logits in reference)
    arithmetic = {"fp32": 2.0**-24, "bf16": 2.0**-9, "fp16": 2.0**-11}[base.dtype]
    depth = 8 * (getattr(model.config, "num_hidden_layers", 1) + 2)  # sums in sequence, each rounding once
    return MergeCheck(
        max_logit_difference=_largest_difference(reference, own),
        allowed_logit_difference=4 * _largest_difference(own, nudged) + depth * arithmetic * largest,
        max_abs_logit=largest,
        prompts=len(prompts),
        tokens=sum(len(prompt) for prompt in prompts),
    )


def _reference(base: BaseModelSpec) -> Any:
    """The base as trained beside; int8 with its dequantized weights, since int8 layers round activations as well."""
    model = load_base(base)
    return model.dequantize() if base.quantization == "int8" else model


def _logits(model: Any, prompts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """fp32 logits [tokens, vocabulary] of each prompt."""
    model.eval()
    device = next(model.parameters()).device
    with torch.no_grad():
        return [
            model(input_ids=torch.from_numpy(prompt.astype(np.int64))[None].to(device), use_cache=False)
            .logits[0].float().cpu().numpy()
            for prompt in prompts
        ]  # fmt: skip


def _largest_difference(left: list[np.ndarray], right: list[np.ndarray]) -> float:
    # A NaN anywhere makes the maximum NaN, and NaN <= allowed is false: not verified.
    return max(float(np.abs(a - b).max()) for a, b in zip(left, right, strict=True))


def _nudge_weights(model: torch.nn.Module, folder: Path) -> None:
    stored = {tensor.name: tensor.dtype for tensors in tensors_of_folder(folder).values() for tensor in tensors}
    usual = Counter(stored.values()).most_common(1)[0][0]  # of weights that are stored under another name
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            roundoff = _UNIT_ROUNDOFF.get(stored.get(name, usual), 0.0)
            if parameter.dim() not in (2, 3):
                continue
            for rows in parameter.flatten(0, -2).split(
                4096
            ):  # a few rows at a time: the noise of a whole head would double it
                noise = torch.rand(rows.shape, generator=generator).mul_(2).sub_(1).mul_(roundoff)
                rows.mul_(1 + noise.to(rows.device, torch.float32))


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
