"""The base model without its weights (meta tensors): what is refused before gigabytes are read.

Building it costs milliseconds for each block, whatever its width. Everything is asked of the class that will be
loaded, so a new architecture needs no entry in a table.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from charkha.backends.base import AdapterSpec, BaseModelSpec
from charkha.backends.torch.adapters import attach_adapter
from charkha.backends.torch.base_config import read_base_config
from charkha.backends.torch.plain_linear import SAME_AS_LINEAR
from charkha.backends.torch.quiet import quiet_libraries
from charkha.errors import EnvironmentProblem, UsageError
from charkha.plan.base_checks import check_base_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def build_skeleton(folder: Path) -> PreTrainedModel:
    """The model of a folder's config.json on the meta device.

    Raises EnvironmentProblem when the installed transformers cannot build it.
    """
    check_base_config(read_base_config(folder), str(folder))
    quiet_libraries()
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, attn_implementation="eager", trust_remote_code=False)
    except (ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EnvironmentProblem(
            f"the installed transformers cannot build this model: {first_line}",
            where=str(folder / "config.json"),
            remedy="take a causal language model that transformers supports, or a newer transformers",
        ) from None


def attention_kernels(skeleton: PreTrainedModel) -> frozenset[str]:
    """The values of model.attention that this architecture has."""
    named = {"sdpa": "_supports_sdpa", "flash_attention_2": "_supports_flash_attn"}
    return frozenset({"eager"} | {name for name, flag in named.items() if getattr(skeleton, flag, False)})


def require_fit(skeleton: PreTrainedModel, base: BaseModelSpec, adapter: AdapterSpec) -> None:
    """Raises UsageError when base, quantization and adapter do not go together. The skeleton is used up by this."""
    if base.quantization != "none":
        _require_quantizable(skeleton, base)
    if (adapter.method, base.quantization, base.device) == ("dora", "int8", "cpu"):
        raise UsageError(
            "PEFT's DoRA loses the scales of int8 weights on a CPU at the second step",
            where="adapter.method",
            remedy="use method lora or rslora, or model.quantization nf4",
        )
    attach_adapter(skeleton, adapter, False)


def _require_quantizable(skeleton: PreTrainedModel, base: BaseModelSpec) -> None:
    """Transformers replaces plain linear layers only; anything else would quietly stay whole."""
    whole = layers_that_stay_whole(skeleton)
    if base.streaming is not None:  # which packs each expert for itself, and refuses what it does not know
        whole = [(name, kind) for name, kind in whole if kind != "3-D"]
    if not whole:
        return
    name, what = whole[0]
    experts = base.quantization in ("nf4", "fp4") and all(kind == "3-D" for _, kind in whole)
    streamed = (
        "model.placement streamed, which packs experts beside adapters on attention alone, or " if experts else ""
    )
    raise UsageError(
        f"{base.quantization} was asked for, but {len(whole)} of this model's weights would stay whole (the first: "
        f"{name}, {what})",
        where="model.quantization",
        remedy=f"use {streamed}quantization none with this architecture; dtype bf16 halves its memory",
    )


def layers_that_stay_whole(model: PreTrainedModel) -> list[tuple[str, str]]:
    """(name, kind) of the large weights that bitsandbytes does not replace: other linear classes, 3-D expert weights.

    Head and embeddings stay whole everywhere and are not among them.
    """
    import torch

    head = model.get_output_embeddings()
    found = [
        (name, type(module).__name__)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and module is not head
        and type(module) is not torch.nn.Linear
        and type(module).__name__ not in SAME_AS_LINEAR
    ]
    found += [(name, f"{parameter.dim()}-D") for name, parameter in model.named_parameters() if _is_stack(parameter)]
    return found


def _is_stack(parameter: Any) -> bool:
    """Expert weights of one layer in one tensor [experts, out, in]; convolutions (Mamba) have a kernel of a few."""
    is_3d = bool(parameter.dim() == 3)
    return is_3d and parameter.shape[-1] > 16
