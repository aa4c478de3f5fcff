"""`charkha merge`: adapter into base, then proof that the result answers as base + adapter did."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from charkha.backends.base import BaseModelSpec
from charkha.errors import MergeNotVerified, RunFolderError, UsageError
from charkha.hardware.probe import peak_rss_bytes
from charkha.store import durable
from charkha.store.runs import RunFolder
from charkha.training.dataset import PreparedData
from charkha.training.opening import reopen
from charkha.units import format_bytes

Progress = Callable[[str], None]
_PROMPTS = 8
_PROMPT_TOKENS = 256


@dataclass(frozen=True)
class MergeResult:
    """The JSON contract of `charkha merge`. `peak_rss_bytes` is of the merge, before models are loaded to verify."""

    path: str
    onto: str
    verified: bool | None
    max_logit_difference: float | None
    allowed_logit_difference: float | None
    max_abs_logit: float | None
    bytes: int
    peak_rss_bytes: int
    note: str | None = None


def merge_run(
    path: Path,
    *,
    output: Path | None = None,
    onto: Literal["base", "dequantized"] = "base",
    verify: bool = True,
    on_progress: Progress = lambda text: None,
) -> MergeResult:
    """Merges a finished run into `output` (the run's merged/ folder) and verifies it.

    `onto` chooses the base as it was fetched, or the quantized base's dequantized weights that the adapter was
    trained beside (the only choice for a base stored in 4 or 8 bits). Raises MergeNotVerified, with the result kept
    beside under `.unverified`, when logits differ by more than rounding explains; RunFolderError for a run that is not
    finished; UsageError for prompt tuning, which changes no weight; DoesNotFit for a disk too small.
    """
    from charkha.backends.torch.base_config import read_base_config
    from charkha.backends.torch.merge import merge_adapter
    from charkha.backends.torch.skeleton import build_skeleton, layers_that_stay_whole

    run = RunFolder(path).require()
    config, base, data = reopen(run)
    if config.adapter.method == "full":
        return _already_standalone(run)
    if not any(run.adapter.glob("*.safetensors")):
        raise RunFolderError("the run is not finished: it has no adapter yet", where=str(path))
    if onto == "dequantized" and base.quantization == "none":
        raise UsageError(
            "the base of this run was not quantized", where=str(path), remedy="leave out --onto dequantized"
        )
    if onto == "dequantized" and layers_that_stay_whole(build_skeleton(base.path)):
        raise UsageError(
            "a streamed base packed each expert in 4 bits for itself, which this merge does not repeat",
            where=str(path),
            remedy="leave out --onto dequantized",
        )
    stored_quantized = "quantization_config" in read_base_config(base.path)
    if stored_quantized:
        onto = "dequantized"  # there are no other weights to add to
    target = output if output is not None else run.merged
    merged = merge_adapter(
        base.path,
        run.adapter,
        target,
        dequantize=_dequantize(run, base) if onto == "dequantized" and not stored_quantized else None,
        on_tensor=lambda name, done, total: on_progress(f"merging {done}/{total}: {name}"),
    )
    note = " ".join(part for part in (merged.note, _note_on_int8(base, onto)) if part) or None
    result = MergeResult(str(target), onto, None, None, None, None, merged.bytes, peak_rss_bytes(), note)
    if verify:
        result = _verified(result, run, _reference(base, onto), data, on_progress)
    record = json.dumps(asdict(result) | {"run": str(run.path)}, indent=1) + "\n"
    durable.write_durably(target / "charkha_merge.json", record.encode())
    return result


def _already_standalone(run: RunFolder) -> MergeResult:
    folder = run.path / "model"
    if not any(folder.glob("*.safetensors")):
        raise RunFolderError("the run is not finished: it has no trained model yet", where=str(run.path))
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    note = "full fine-tuning: the trained model is standalone already; nothing was merged"
    return MergeResult(str(folder), "full", None, None, None, None, size, peak_rss_bytes(), note)


def _dequantize(run: RunFolder, base: BaseModelSpec) -> Any:
    from charkha.backends.torch.packed import quantization_roundtrip

    modules = frozenset(run.read_manifest()["trained"]["quantized_modules"])
    return quantization_roundtrip(modules, base.dtype, base.quantization)


def _note_on_int8(base: BaseModelSpec, onto: str) -> str | None:
    if onto != "dequantized" or base.quantization != "int8":
        return None
    return (
        "on a GPU int8 layers round activations as well as weights; the merged model has the rounded weights only, and "
        "is compared with base + adapter on those"
    )


def _reference(base: BaseModelSpec, onto: str) -> BaseModelSpec:
    """What the merged model must equal: base + adapter in fp32 where memory allows, or the quantized base."""
    if onto == "dequantized":
        return base
    return replace(base, quantization="none", dtype=_arithmetic(base), streaming=None)


def _arithmetic(base: BaseModelSpec) -> Any:
    """fp32, in which only the rounding of the stored weights shows; the run's own dtype when fp32 would not fit."""
    import psutil

    from charkha.backends.torch.layerwise import can_run_layerwise

    if base.device == "cuda":
        return base.dtype
    weights = sum(os.stat(file).st_size for file in base.path.glob("*.safetensors"))
    fits = 2 * weights * 1.3 < psutil.virtual_memory().available
    return "fp32" if fits or can_run_layerwise(replace(base, quantization="none")) else base.dtype


def _verified(
    result: MergeResult, run: RunFolder, reference: BaseModelSpec, data: PreparedData, on_progress: Progress
) -> MergeResult:
    from charkha.backends.torch.verify import check_merge

    on_progress("verifying: logits of merged model against base + adapter")
    folder = Path(result.path)
    check = check_merge(reference, run.adapter, folder, _prompts(data))
    result = replace(
        result,
        verified=check.verified,
        max_logit_difference=check.max_logit_difference,
        allowed_logit_difference=check.allowed_logit_difference,
        max_abs_logit=check.max_abs_logit,
    )
    if check.verified:
        return result
    aside = folder.with_name(folder.name + ".unverified")
    if aside.exists():
        durable.remove_folder(aside)
    durable.rename_durably(folder, aside)
    raise MergeNotVerified(
        f"logits of the merged model differ from base + adapter by {check.max_logit_difference:.3g}, more than the "
        f"{check.allowed_logit_difference:.3g} that rounding explains (largest logit {check.max_abs_logit:.3g}, "
        f"{check.prompts} prompts)",
        where=str(aside),
        remedy=f"do not use this model ({format_bytes(result.bytes)} kept for inspection); merge again, and if it "
        "repeats, check that the base model's files are those of the run",
    )


def _prompts(data: PreparedData) -> list[np.ndarray]:
    """Real rows of the run: held-out ones where there are any."""
    shard = data.eval if data.eval is not None else data.train
    return [shard.input_ids(row)[:_PROMPT_TOKENS] for row in range(min(_PROMPTS, len(shard.lengths)))]
