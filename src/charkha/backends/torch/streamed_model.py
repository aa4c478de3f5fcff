"""Loads a base whose decoder layers are streamed: everything but their linear weights is loaded by transformers.

The model's class is subclassed so that it is built with streamed layers in the place of plain ones. They have no
weight while the files are loaded, so transformers passes over those, and embedding, norms, biases, head, buffers and
ties are loaded exactly as for a resident base. Then each layer's weights become views into the engine's buffers.

Not covered, and refused: int8, bases stored in 4 or 8 bits, expert weights in one 3-D tensor, GPT-2's transposed
layers, models whose layers transformers does not checkpoint, several devices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from charkha.backends.base import AdapterSpec, BaseModelSpec
from charkha.backends.torch.plain_linear import SAME_AS_LINEAR, quantizable_class
from charkha.backends.torch.slabs import DTYPE_NAMES, LinearShape, Slab, ensure_slab
from charkha.backends.torch.tensor_files import torch_dtype_of
from charkha.errors import UsageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from charkha.backends.torch.streaming import Engine

ADAPTERS = ("lora", "rslora", "dora")
_ENGINE = "streaming_engine"


def require_streamable(skeleton: PreTrainedModel, base: BaseModelSpec, adapter: AdapterSpec, processes: int) -> None:
    """Raises UsageError naming what keeps this base from being streamed. `skeleton` is the model on meta tensors."""
    if adapter.method not in ADAPTERS:
        trained = "trains every weight" if adapter.method == "full" else "has not been tried beside a streamed base"
        raise _refused(f"adapter.method {adapter.method} {trained}", f"use {', '.join(ADAPTERS)}, or resident")
    if processes > 1:
        raise _refused(f"{processes} processes would each stream the base on their own", "use devices.processes 1")
    if base.device == "mps":
        raise _refused("an Apple GPU shares its memory with the CPU, so nothing is gained", "use resident")
    if base.quantization not in ("none", "nf4", "fp4"):
        raise _refused(f"quantization {base.quantization} is not streamed yet", "use nf4, fp4 or none")
    if getattr(skeleton.config, "quantization_config", None):
        raise _refused("the base's files are stored in 4 or 8 bits", "use the base as it was published, or resident")
    layers = decoder_layers(skeleton)
    if not layers:
        raise _refused("this architecture has no layers that transformers checkpoints", "use resident")
    _require_plain_layers(layers)
    streamed = [f"{layer}.{name}" for layer, module in layers for name in streamed_names(module)]
    for wanted in adapter.modules_to_save:
        inside = [name for name in streamed if f".{wanted}." in f".{name}."]
        if inside:
            raise _refused(
                f"adapter.modules_to_save {wanted!r} would train {inside[0]}, which is frozen", "leave it out"
            )


def why_refused(
    skeleton: PreTrainedModel, base: BaseModelSpec, adapter: AdapterSpec, processes: int
) -> UsageError | None:
    """What `require_streamable` raises for it; None where it can be streamed."""
    try:
        require_streamable(skeleton, base, adapter, processes)
    except UsageError as refusal:
        return refusal
    return None


def load_streamed(base: BaseModelSpec, load: Any) -> PreTrainedModel:
    """The base with its engine. `load(kind)` loads the files into a model class as for a resident base."""
    import torch

    from charkha.backends.torch.streaming import open_engine

    assert base.streaming is not None
    kind = _streamed_class(base)
    slab = ensure_slab(
        base.path,
        _shapes(kind, base),
        quantization=base.quantization,
        dtype=base.dtype,
        device=base.device,
    )
    model: PreTrainedModel = load(kind)
    settings = base.streaming
    device = torch.device("cuda", 0) if base.device == "cuda" else torch.device(base.device)
    engine = open_engine(slab, slots=settings.slots, hot_layers=settings.hot_layers, tier=settings.tier, device=device)
    _bind(model, engine, slab)
    setattr(model, _ENGINE, engine)
    return model


def engine_of(model: Any) -> Engine | None:
    """The engine of a model, with or without an adapter; None for a resident one."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    engine: Engine | None = getattr(base, _ENGINE, None)
    return engine


def decoder_layers(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """(name, module) of the layers that transformers checkpoints, in the order in which they are run."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found = [(name, module) for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)]
    names = [name for name, _ in found]
    return [(name, module) for name, module in found if not any(name.startswith(f"{other}.") for other in names)]


def streamed_names(layer: torch.nn.Module) -> list[str]:
    """Names, within a decoder layer, of the linear layers whose weights are streamed."""
    return [name for name, module in layer.named_modules() if _is_plain(module)]


def _is_plain(module: torch.nn.Module) -> bool:
    import torch

    return type(module) is torch.nn.Linear or type(module).__name__ in SAME_AS_LINEAR


def _require_plain_layers(layers: list[tuple[str, torch.nn.Module]]) -> None:
    """Whatever is large and no plain linear layer would stay on the device unsaid."""
    others = [
        (f"{layer}.{name}", parameter.dim())
        for layer, module in layers
        for name, parameter in module.named_parameters()
        if parameter.dim() >= 2 and name.removesuffix(".weight") not in streamed_names(module)
    ]
    for name, dimensions in sorted(others, key=lambda other: -other[1]):
        kind = "expert weights in one 3-D tensor" if dimensions == 3 else "no plain linear layer"
        raise _refused(f"{name} is {kind}, which is not streamed yet", "use resident")


def _streamed_class(base: BaseModelSpec) -> Any:
    """The model's own class, built with streamed layers in its decoder layers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    stand_in = _stand_in_maker(base)
    config = AutoConfig.from_pretrained(base.path, local_files_only=True, trust_remote_code=False)
    found = quantizable_class(config.model_type) if base.quantization != "none" else AutoModelForCausalLM
    parent = AutoModelForCausalLM._model_mapping[type(config)] if found is AutoModelForCausalLM else found

    class Streamed(parent):  # type: ignore[valid-type, misc]  # a class found at run time
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            for _, layer in decoder_layers(self):
                for name in streamed_names(layer):
                    layer.set_submodule(name, stand_in(layer.get_submodule(name)))

    Streamed.__name__ = Streamed.__qualname__ = parent.__name__  # config.json and PEFT name the class
    return Streamed


def _stand_in_maker(base: BaseModelSpec) -> Callable[[torch.nn.Linear], Any]:
    """The function that makes the streamed layer for a plain one."""
    if base.quantization == "none":
        from charkha.backends.torch.streamed_linear import plain_stand_in

        return plain_stand_in
    from charkha.backends.torch.streamed_4bit import four_bit_stand_in

    dtype = torch_dtype_of(DTYPE_NAMES[base.dtype])
    return lambda module: four_bit_stand_in(module, base.quantization, dtype)


def _shapes(kind: Any, base: BaseModelSpec) -> list[list[LinearShape]]:
    """Of each decoder layer, its streamed linear layers by whole name."""
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base.path, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        skeleton = kind(config)
    return [
        [
            LinearShape(f"{layer}.{name}", linear.out_features, linear.in_features)
            for name, linear in _streamed_modules(module)
        ]
        for layer, module in decoder_layers(skeleton)
    ]


def _streamed_modules(layer: torch.nn.Module) -> list[tuple[str, Any]]:
    from charkha.backends.torch.streamed_linear import Streamed

    return [(name, module) for name, module in layer.named_modules() if isinstance(module, Streamed)]


def _bind(model: PreTrainedModel, engine: Engine, slab: Slab) -> None:
    for number, (layer, module) in enumerate(decoder_layers(model)):
        for name, linear in _streamed_modules(module):
            pieces = {piece.part: piece for piece in slab.layers[number].pieces if piece.module == f"{layer}.{name}"}
            linear.bind(engine, number, pieces)


def _refused(reason: str, remedy: str) -> UsageError:
    return UsageError(f"a streamed base cannot be used here: {reason}", where="model.placement", remedy=remedy)
