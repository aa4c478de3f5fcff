"""Logits of a merged model against base + adapter on real prompts, and how much of the gap rounding explains."""

from __future__ import annotations

import gc
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from charkha.backends.base import BaseModelSpec
from charkha.backends.torch.base_config import torch_dtype
from charkha.backends.torch.layerwise import Change, LayersFromFiles, can_run_layerwise, in_lockstep
from charkha.backends.torch.model import load_adapter, load_base
from charkha.backends.torch.slab_making import stored_weights
from charkha.backends.torch.streamed_model import decoder_layers
from charkha.backends.torch.tensor_files import BYTES_OF, tensors_of_folder
from charkha.backends.torch.updates import read_adapter_config

_ROOM = 1.3  # of a model's own bytes, which loading and running it take
_NUDGED_ROWS = 4096
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


def check_merge(
    base: BaseModelSpec, adapter: Path, merged: Path, prompts: Sequence[np.ndarray], *, layerwise: bool | None = None
) -> MergeCheck:
    """Both models' logits at every position of `prompts`, in the arithmetic of `base.dtype`, one in memory at a time.

    A model that memory does not hold is run layer by layer (`layerwise` decides otherwise), with the same logits.
    What rounding explains is measured, not assumed: every merged weight is moved at random by up to half a unit in the
    last place of its stored type, and the logits' change is the yardstick; four times that is allowed, plus the
    rounding of the arithmetic itself (W x + s B A x is summed in another order than (W + s B A) x).
    """
    reference = _reference_logits(base, adapter, prompts, layerwise)
    _free_memory()
    own, nudged, layers = _merged_logits(
        replace(base, path=merged, quantization="none", streaming=None), prompts, layerwise
    )
    largest = max(float(np.abs(logits).max()) for logits in reference)
    arithmetic = {"fp32": 2.0**-24, "bf16": 2.0**-9, "fp16": 2.0**-11}[base.dtype]
    depth = 8 * (layers + 2)  # sums in sequence, each rounding once
    return MergeCheck(
        max_logit_difference=_largest_difference(reference, own),
        allowed_logit_difference=4 * _largest_difference(own, nudged) + depth * arithmetic * largest,
        max_abs_logit=largest,
        prompts=len(prompts),
        tokens=sum(len(prompt) for prompt in prompts),
    )


def _reference_logits(
    base: BaseModelSpec, adapter: Path, prompts: Sequence[np.ndarray], layerwise: bool | None
) -> list[np.ndarray]:
    """Of base + adapter."""
    if _is_layerwise(base, layerwise) and not _trains_whole_modules(adapter):
        files = LayersFromFiles(base)
        return _layerwise_logits(load_adapter(files.model, adapter), files, prompts)
    model = load_adapter(_reference(base), adapter)
    if base.streaming is None or base.quantization == "int8":
        return _logits(model, prompts)
    model.eval()  # each layer is brought once for all rows
    layers = [layer for _, layer in decoder_layers(model)]
    return in_lockstep(model, layers, prompts, lambda prompt: _logits_of(model, prompt))


def _merged_logits(
    merged: BaseModelSpec, prompts: Sequence[np.ndarray], layerwise: bool | None
) -> tuple[list[np.ndarray], list[np.ndarray], int]:
    """(as merged, with its weights nudged, decoder layers)."""
    nudge = _nudger(merged.path)
    if _is_layerwise(merged, layerwise):
        files = LayersFromFiles(merged)
        own = _layerwise_logits(files.model, files, prompts)
        files.running_with(nudge)
        return own, _layerwise_logits(files.model, files, prompts), _depth(files.model)
    model = load_base(merged)
    own = _logits(model, prompts)
    for name, parameter in model.named_parameters():
        nudge(name, parameter.data)
    return own, _logits(model, prompts), _depth(model)


def _depth(model: Any) -> int:
    return int(getattr(model.config, "num_hidden_layers", 1))


def _is_layerwise(spec: BaseModelSpec, wanted: bool | None) -> bool:
    """As wanted where it can be; by itself, where the whole model does not fit into what memory is free."""
    if wanted is None:
        parameters = sum(tensor.byte_count // BYTES_OF[tensor.dtype] for tensor in stored_weights(spec.path).values())
        wanted = parameters * torch_dtype(spec.dtype).itemsize * _ROOM > _available_bytes(spec.device)
    return wanted and can_run_layerwise(spec)


def _available_bytes(device: str) -> int:
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    import psutil

    return int(psutil.virtual_memory().available)


def _trains_whole_modules(adapter: Path) -> bool:
    """Copies of modules of the base, for which the base's weights would have to be there."""
    return bool(read_adapter_config(adapter).get("modules_to_save"))


def _layerwise_logits(model: Any, files: LayersFromFiles, prompts: Sequence[np.ndarray]) -> list[np.ndarray]:
    model.eval()
    layers = [layer for _, layer in decoder_layers(model)]
    return in_lockstep(model, layers, prompts, lambda prompt: _logits_of(model, prompt), files.bring, files.drop)


def _reference(base: BaseModelSpec) -> Any:
    """The base as trained beside; int8 with its dequantized weights, since int8 layers round activations as well."""
    if base.quantization != "int8":
        return load_base(base)
    return load_base(replace(base, streaming=None)).dequantize()


def _logits(model: Any, prompts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """fp32 logits [tokens, vocabulary] of each prompt."""
    model.eval()
    with torch.no_grad():
        return [_logits_of(model, prompt) for prompt in prompts]


def _logits_of(model: Any, prompt: np.ndarray) -> np.ndarray:
    device = next(model.parameters()).device
    ids = torch.from_numpy(prompt.astype(np.int64))[None].to(device)
    logits: np.ndarray = model(input_ids=ids, use_cache=False).logits[0].float().cpu().numpy()
    return logits


def _largest_difference(left: list[np.ndarray], right: list[np.ndarray]) -> float:
    # A NaN anywhere makes the maximum NaN, and NaN <= allowed is false: not verified.
    return max(float(np.abs(a - b).max()) for a, b in zip(left, right, strict=True))


def _nudger(folder: Path) -> Change:
    """Moves a weight of the model in `folder`, by name, as far as the rounding to its stored type may have."""
    stored = {tensor.name: tensor.dtype for tensors in tensors_of_folder(folder).values() for tensor in tensors}
    usual = Counter(stored.values()).most_common(1)[0][0]  # of weights that are stored under another name

    def nudge(name: str, weight: torch.Tensor) -> None:
        if weight.dim() not in (2, 3):
            return
        roundoff = _UNIT_ROUNDOFF.get(stored.get(name, usual), 0.0)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))  # in whatever order weights come
        for rows in weight.flatten(0, -2).split(_NUDGED_ROWS):  # the noise of a whole head would double it
            noise = torch.rand(rows.shape, generator=generator).mul_(2).sub_(1).mul_(roundoff)
            rows.mul_(1 + noise.to(rows.device, torch.float32))

    return nudge


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
