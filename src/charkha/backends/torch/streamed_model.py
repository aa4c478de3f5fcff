"""Loads a base whose decoder layers are streamed: everything but their linear weights is loaded by transformers.

The model's class is subclassed so that it is built with streamed layers in the place of plain ones. They have no
weight while the files are loaded, so transformers passes over those, and embedding, norms, biases, head, buffers and
ties are loaded exactly as for a resident base. Then each layer's weights become views into the engine's buffers.

A base whose files are in 4 or 8 bits already is streamed as it is stored; which of its layers are whole, the files say.
What is small beside a layer (norms, routers) stays on the device.

Not covered, and refused: GPT-2's transposed layers, experts other than `streamed_experts.py` knows, adapters on
experts, models whose layers transformers does not checkpoint, several devices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from charkha.backends.base import AdapterSpec, BaseModelSpec
from charkha.backends.torch.plain_linear import SAME_AS_LINEAR, quantizable_class
from charkha.backends.torch.slab_making import DTYPE_NAMES, LayerShape, ensure_slab, stored_weights
from charkha.backends.torch.slab_parts import (
    LinearShape,
    Weights,
    is_stored_quantized,
    stored_in_8_bits,
    stored_state,
)
from charkha.backends.torch.slabs import Slab
from charkha.backends.torch.streamed_tables import bind_tables, has_tied_table_on_host, keep_tables_on_host
from charkha.backends.torch.tensor_files import torch_dtype_of
from charkha.errors import UsageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from charkha.backends.torch.streaming import Engine

ADAPTERS = ("lora", "rslora", "dora")
_ENGINE = "streaming_engine"
_SMALL = 50  # a weight of less than a 50th of its layer stays on the device


def require_streamable(skeleton: PreTrainedModel, base: BaseModelSpec, adapter: AdapterSpec, processes: int) -> None:
    """Raises UsageError naming what keeps this base from being streamed. `skeleton` is the model on meta tensors."""
    if adapter.method not in ADAPTERS:
        trained = "trains every weight" if adapter.method == "full" else "has not been tried beside a streamed base"
        raise _refused(f"adapter.method {adapter.method} {trained}", f"use {', '.join(ADAPTERS)}, or resident")
    if processes > 1:
        raise _refused(f"{processes} processes would each stream the base on their own", "use devices.processes 1")
    if base.device == "mps":
        raise _refused("an Apple GPU shares its memory with the CPU, so nothing is gained", "use resident")
    if (adapter.method, base.quantization) == ("dora", "int8"):
        raise _refused("DoRA on a streamed int8 base has not been tried", "use lora or rslora, or nf4")
    layers = decoder_layers(skeleton)
    if not layers:
        raise _refused("this architecture has no layers that transformers checkpoints", "use resident")
    _require_known_layers(layers)
    if any(expert_layers(module) for _, module in layers):
        _require_experts_streamable(skeleton, layers, base, adapter)
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


def _require_experts_streamable(
    skeleton: PreTrainedModel, layers: list[tuple[str, torch.nn.Module]], base: BaseModelSpec, adapter: AdapterSpec
) -> None:
    """Experts go through whole or in 4 bits, and without adapters: PEFT's add to all experts' weights at once."""
    if base.quantization == "int8" or getattr(skeleton.config, "quantization_config", None):
        kind = "int8" if base.quantization == "int8" else "a base stored in 4 or 8 bits"
        raise _refused(f"experts of {kind} are not streamed yet", "use nf4, fp4 or none on the base as published")
    plain = sorted({name.rpartition(".")[2] for _, layer in layers for name in streamed_names(layer)})
    wanted = [adapter.target_modules] if isinstance(adapter.target_modules, str) else list(adapter.target_modules)
    others = [name for name in wanted if name not in plain]
    if others:
        raise _refused(
            f"adapter.target_modules {others[0]!r} adapts the experts or their router, of which every weight would be "
            "needed at once",
            f"use target_modules: [{', '.join(plain)}], or resident",
        )


def load_streamed(base: BaseModelSpec, load: Any) -> PreTrainedModel:
    """The base with its engine. `load(kind)` loads the files into a model class as for a resident base."""
    import torch

    from charkha.backends.torch.streaming import open_engine

    assert base.streaming is not None
    weights = stored_weights(base.path)
    kind = _streamed_class(base, weights)
    slab = ensure_slab(
        base.path,
        _shapes(kind, base, weights),
        quantization=base.quantization,
        dtype=base.dtype,
        device=base.device,
    )
    model: PreTrainedModel = load(kind)
    settings = base.streaming
    device = torch.device("cuda", 0) if base.device == "cuda" else torch.device(base.device)
    engine = open_engine(
        slab,
        slots=settings.slots,
        hot_layers=settings.hot_layers,
        tier=settings.tier,
        device=device,
        expert_slots=settings.expert_slots,
    )
    _bind(model, engine, slab)
    bind_tables(model, weights, base, device)
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


def expert_layers(layer: torch.nn.Module) -> list[str]:
    """Names, within a decoder layer, of the layers of fused experts that can be streamed."""
    from charkha.backends.torch.streamed_experts import is_experts

    return [name for name, module in layer.named_modules() if is_experts(module)]


def _require_known_layers(layers: list[tuple[str, torch.nn.Module]]) -> None:
    """Whatever is large and neither a plain linear layer nor experts would stay on the device unsaid."""
    for layer, module in layers:
        known = {*(f"{name}.weight" for name in streamed_names(module))}
        known |= {f"{name}.{part}" for name in expert_layers(module) for part in ("gate_up_proj", "down_proj")}
        total = sum(parameter.numel() for parameter in module.parameters())
        for name, parameter in module.named_parameters():
            if parameter.dim() < 2 or name in known or parameter.numel() * _SMALL < total:
                continue
            kind = "experts of a kind" if parameter.dim() == 3 else "no plain linear layer"
            raise _refused(f"{layer}.{name} is {kind}, which is not streamed yet", "use resident")


def _streamed_class(base: BaseModelSpec, weights: Weights) -> Any:
    """The model's own class, built with streamed layers in its decoder layers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(base.path, local_files_only=True, trust_remote_code=False)
    stand_in = _stand_in_maker(base, weights, getattr(config, "quantization_config", None))
    found = quantizable_class(config.model_type) if base.quantization != "none" else AutoModelForCausalLM
    parent = AutoModelForCausalLM._model_mapping[type(config)] if found is AutoModelForCausalLM else found
    dtype = torch_dtype_of(DTYPE_NAMES[base.dtype])

    class Streamed(parent):  # type: ignore[valid-type, misc]  # a class found at run time
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            for layer_name, layer in decoder_layers(self):
                for name in streamed_names(layer):
                    layer.set_submodule(name, stand_in(f"{layer_name}.{name}", layer.get_submodule(name)))
                for name in expert_layers(layer):
                    from charkha.backends.torch.streamed_experts import stream_experts

                    stream_experts(layer.get_submodule(name), dtype, base.quantization)
            keep_tables_on_host(self, base)

        def tie_weights(self, *args: Any, **kwargs: Any) -> None:
            if not has_tied_table_on_host(self):
                super().tie_weights(*args, **kwargs)

    Streamed.__name__ = Streamed.__qualname__ = parent.__name__  # config.json and PEFT name the class
    return Streamed


def _stand_in_maker(base: BaseModelSpec, weights: Weights, stored: Any) -> Callable[[str, torch.nn.Linear], Any]:
    """The function that makes the streamed layer for a plain one, by its name in the files.

    `stored` is the quantization_config of a base that is stored in 4 or 8 bits.
    """
    from charkha.backends.torch.streamed_linear import plain_stand_in

    dtype = torch_dtype_of(DTYPE_NAMES[base.dtype])
    quantization = "none" if is_stored_quantized(weights) else base.quantization

    def stand_in(name: str, module: torch.nn.Linear) -> Any:
        state = stored_state(weights, name)
        if quantization == "int8" or stored_in_8_bits(weights, name):
            from charkha.backends.torch.streamed_8bit import eight_bit_stand_in

            return eight_bit_stand_in(module)
        if state is None and quantization == "none":
            return plain_stand_in(module)
        from charkha.backends.torch.streamed_4bit import four_bit_stand_in

        if state is None:
            return four_bit_stand_in(module, quantization, dtype)
        return four_bit_stand_in(module, state.quant_type, _compute_dtype(stored), state)

    return stand_in


def _compute_dtype(stored: Any) -> torch.dtype:
    """The type that a base stored in 4 bits is computed in: its config.json says it, as for a resident base."""
    from transformers import BitsAndBytesConfig

    record = stored if isinstance(stored, dict) else stored.to_dict()
    dtype: torch.dtype = BitsAndBytesConfig.from_dict(record).bnb_4bit_compute_dtype
    return dtype


def _shapes(kind: Any, base: BaseModelSpec, weights: Weights) -> list[LayerShape]:
    """Of each decoder layer, what is streamed of it, by whole names."""
    import torch
    from transformers import AutoConfig

    from charkha.backends.torch.streamed_experts import expert_shapes

    config = AutoConfig.from_pretrained(base.path, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        skeleton = kind(config)
    return [
        LayerShape(
            tuple(
                LinearShape(f"{layer}.{name}", linear.out_features, linear.in_features)
                for name, linear in _streamed_modules(module)
            ),
            tuple(
                shape
                for name, experts in _streamed_experts(module)
                for shape in expert_shapes(f"{layer}.{name}", experts, weights, base.quantization != "none")
            ),
        )
        for layer, module in decoder_layers(skeleton)
    ]


def _streamed_modules(layer: torch.nn.Module) -> list[tuple[str, Any]]:
    from charkha.backends.torch.streamed_linear import Streamed

    return [(name, module) for name, module in layer.named_modules() if isinstance(module, Streamed)]


def _streamed_experts(layer: torch.nn.Module) -> list[tuple[str, Any]]:
    from charkha.backends.torch.streamed_experts import StreamedExperts

    return [(name, module) for name, module in layer.named_modules() if isinstance(module, StreamedExperts)]


def _bind(model: PreTrainedModel, engine: Engine, slab: Slab) -> None:
    from charkha.backends.torch.streamed_experts import bind_experts

    for number, (layer, module) in enumerate(decoder_layers(model)):
        for name, linear in _streamed_modules(module):
            pieces = {piece.part: piece for piece in slab.layers[number].pieces if piece.module == f"{layer}.{name}"}
            linear.bind(engine, number, pieces)
        for name, experts in _streamed_experts(module):
            assert engine.experts is not None
            bind_experts(experts, f"{layer}.{name}", engine.experts, slab.expert_units(number), slab.units)


def _refused(reason: str, remedy: str) -> UsageError:
    return UsageError(f"a streamed base cannot be used here: {reason}", where="model.placement", remedy=remedy)
