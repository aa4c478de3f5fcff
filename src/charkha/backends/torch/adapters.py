"""Adapters through PEFT: which config an adapter section means, and what PEFT would silently pass over on this model.

LoRA https://arxiv.org/abs/2106.09685, rsLoRA https://arxiv.org/abs/2312.03732, DoRA https://arxiv.org/abs/2402.09353,
IA3 https://arxiv.org/abs/2205.05638, prompt tuning https://arxiv.org/abs/2104.08691. Everything here works on a model
of meta tensors as well, so that a wrong wish is refused before any weight is read.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from charkha.backends.base import AdapterSpec
from charkha.errors import UsageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

LORA_METHODS = frozenset({"lora", "dora", "rslora"})
# Layers whose input is the feed-forward block's inner activation: IA3 scales that input, elsewhere the output.
_FEEDFORWARD = ("down_proj", "fc2", "dense_4h_to_h", "fc_out", "w2")


def attach_adapter(model: PreTrainedModel, spec: AdapterSpec, gradient_checkpointing: bool) -> Any:
    """The model with a fresh adapter (in fp32, on frozen weights), or every weight trainable for `full`.

    Raises UsageError for names that match no layer of this model, and for what PEFT or TRL cannot train on it.
    """
    if spec.method == "full":
        model.requires_grad_(True)
        return model
    from peft import get_peft_model

    _require_savable(model, spec)
    _require_layers(model, spec)
    model.requires_grad_(False)
    try:
        peft_model = get_peft_model(model, _peft_config(model, spec), autocast_adapter_dtype=True)
    except (ValueError, re.error) as error:
        raise _refusal(model, spec, error) from None
    if spec.method != "prompt_tuning":
        _require_nothing_passed_over(model, spec)
    if spec.method == "dora":
        _require_directions(peft_model)
    if gradient_checkpointing:
        # Checkpointing re-runs a layer from its input, which must ask for gradients although nothing below is trained.
        peft_model.enable_input_require_grads()
    return peft_model


def _require_directions(model: Any) -> None:
    """DoRA divides each row of a weight by its length; a row of zeros has no direction, and the loss would be NaN."""
    for name, parameter in model.named_parameters():
        if "lora_magnitude_vector" not in name or parameter.is_meta or "Fake" in type(parameter.data).__name__:
            continue
        zeros = int((parameter == 0).sum())
        if zeros:
            layer = name.partition(".lora_magnitude_vector")[0].removeprefix("base_model.model.")
            raise UsageError(
                f"dora cannot train this model: {zeros} of {parameter.numel()} rows of {layer} are all zeros",
                where="adapter.method",
                remedy="use method lora or rslora, or leave that layer out of adapter.target_modules",
            )


def _peft_config(model: PreTrainedModel, spec: AdapterSpec) -> Any:
    from peft import IA3Config, LoraConfig, PromptTuningConfig

    if spec.method == "prompt_tuning":
        # Real embeddings are a far better start than random ones (section 3.2 of the paper).
        return PromptTuningConfig(
            num_virtual_tokens=spec.num_virtual_tokens, prompt_tuning_init="SAMPLE_VOCAB", task_type="CAUSAL_LM"
        )
    saved = _saved_modules(model, spec) or None
    targets = spec.target_modules if isinstance(spec.target_modules, str) else list(spec.target_modules)
    by_name = spec.method == "ia3" or spec.layers_to_transform is not None
    if targets == "all-linear" and by_name:
        targets = _linear_names(model)  # PEFT takes layer numbers and feed-forward layers beside a list of names only
    if spec.method == "ia3":
        feedforward = [name for name in _FEEDFORWARD if name in targets]
        return IA3Config(
            target_modules=targets, feedforward_modules=feedforward, modules_to_save=saved, task_type="CAUSAL_LM"
        )
    return LoraConfig(
        r=spec.r,
        lora_alpha=spec.lora_alpha,
        lora_dropout=spec.lora_dropout,
        target_modules=targets,
        layers_to_transform=None if spec.layers_to_transform is None else list(spec.layers_to_transform),
        rank_pattern=dict(spec.rank_pattern),
        alpha_pattern=dict(spec.alpha_pattern),
        modules_to_save=saved,
        use_rslora=spec.method == "rslora",
        use_dora=spec.method == "dora",
        bias="none",
        task_type="CAUSAL_LM",
    )


def _saved_modules(model: PreTrainedModel, spec: AdapterSpec) -> list[str]:
    """Whole names of the modules to save: by PEFT's own rule `norm` would name `input_layernorm` as well."""
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    return [
        name for name in names if any(name == wanted or name.endswith(f".{wanted}") for wanted in spec.modules_to_save)
    ]


def _linear_names(model: PreTrainedModel) -> list[str]:
    """Last parts of the names of all linear layers but the head."""
    import torch
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    linear = (
        name
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head
    )
    return sorted({name.rpartition(".")[2] for name in linear})


def _require_savable(model: PreTrainedModel, spec: AdapterSpec) -> None:
    """PEFT passes over names that match nothing, parts a tied pair, and cannot train packed weights."""
    if spec.method == "prompt_tuning":
        return
    modules = dict(model.named_modules(remove_duplicate=False))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and embedding.weight is head.weight
    for name in spec.modules_to_save:
        found = [module for key, module in modules.items() if key == name or key.endswith(f".{name}")]
        if not found:
            raise _wrong("modules_to_save", f"{name!r} is no module of this model", "use a name such as lm_head")
        if tied and any(part in (embedding, head) for module in found for part in module.modules()):
            raise _wrong(
                "modules_to_save",
                f"{name!r} is the embedding or the head, which in this base are one and the same weight; training a "
                "copy of one would part them",
                "leave it out, use adapter.method full, or a base whose config.json says tie_word_embeddings: false",
            )
        if any(not parameter.dtype.is_floating_point for module in found for parameter in module.parameters()):
            raise _wrong(
                "modules_to_save",
                f"{name!r} holds quantized weights, which cannot be trained",
                "name norms, embedding or head only, or use model.quantization none",
            )


def _require_layers(model: PreTrainedModel, spec: AdapterSpec) -> None:
    layers = model.config.get_text_config().num_hidden_layers
    beyond = [number for number in spec.layers_to_transform or () if number >= layers]
    if beyond and spec.method in LORA_METHODS:
        raise _wrong(
            "layers_to_transform", f"there is no block {beyond[0]} in this model of {layers}", f"use 0 to {layers - 1}"
        )


def _require_nothing_passed_over(model: PreTrainedModel, spec: AdapterSpec) -> None:
    """`model` has its adapter now: head and embedding have none, and each pattern found its layer."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for part, layer in (("head", model.get_output_embeddings()), ("embedding", model.get_input_embeddings())):
        if isinstance(layer, BaseTunerLayer):
            raise _wrong(
                "target_modules",
                f"{spec.target_modules!r} names the {part} of the model, which gets no adapter here "
                "(TRL computes the loss from its weight directly)",
                f"leave it out; `modules_to_save: [{_name_of(model, layer)}]` trains it whole",
            )
    adapted = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    patterns = {"rank_pattern": [*spec.rank_pattern], "alpha_pattern": [*spec.alpha_pattern]}
    for key, wishes in patterns.items() if spec.method in LORA_METHODS else ():
        for wanted in wishes:
            if not any(re.match(rf"(.*\.)?({wanted})$", name) for name in adapted):
                raise _wrong(key, f"{wanted!r} matches no layer that has an adapter", "use a name such as down_proj")


def _name_of(model: torch.nn.Module, layer: torch.nn.Module) -> str:
    name: str = next(name for name, module in model.named_modules() if module is layer)
    return name.rpartition(".")[2]


def _refusal(model: PreTrainedModel, spec: AdapterSpec, error: Exception) -> UsageError:
    if "ParamWrapper" not in str(error):
        return _wrong(
            "target_modules",
            f"{spec.target_modules!r} does not fit this model: {error}",
            "use all-linear, or names of its linear layers such as q_proj",
        )
    layers = f"target_modules: [{', '.join(_linear_names(model))}]"
    experts = "the experts of this model are 3-D parameters, on which PEFT has LoRA only"
    if spec.method == "dora":
        return _wrong("method", f"{experts}, no DoRA", f"use method lora with lora_dropout 0, or {layers}")
    return _wrong("lora_dropout", f"{experts} without dropout", f"use lora_dropout 0, or {layers}")


def _wrong(key: str, reason: str, remedy: str) -> UsageError:
    return UsageError(reason, where=f"adapter.{key}", remedy=remedy)
