"""Logits of several rows with one decoder layer in memory at a time: of a model that memory cannot hold.

The model is built without the weights of its decoder layers, and everything else is loaded as ever. Each row runs the
model's own forward pass in a thread of its own. Before a layer all wait for one another, its weights are read from the
safetensors, one thread at a time runs it, and they are dropped again: the base is read once for all rows, and what is
computed is what the whole model would compute. Works for whatever stores its layers' weights under the names that
transformers gives them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from charkha.backends.base import BaseModelSpec
from charkha.backends.torch.base_config import torch_dtype
from charkha.backends.torch.freed_memory import give_freed_memory_back
from charkha.backends.torch.model import load_base
from charkha.backends.torch.skeleton import build_skeleton
from charkha.backends.torch.slab_making import stored_weights
from charkha.backends.torch.streamed_model import decoder_layers, passing_for
from charkha.backends.torch.tensor_files import StoredTensor, read_rows

Change = Callable[[str, torch.Tensor], None]


@dataclass(frozen=True)
class _Weight:
    """A weight of a decoder layer: the module that holds it, and where it is stored."""

    module: torch.nn.Module
    name: str
    whole_name: str
    stored: StoredTensor


class LayersFromFiles:
    """A model whose decoder layers have no weights but while they are used."""

    def __init__(self, spec: BaseModelSpec) -> None:
        """Loads everything but the layers. See `can_run_layerwise` for which bases."""
        give_freed_memory_back()  # or dropped layers would stay with the process
        stored = stored_weights(spec.path)
        self._dtype, self._device = torch_dtype(spec.dtype), torch.device(spec.device)
        self._weights: list[list[_Weight]] = []
        self._change: Change = lambda _name, _weight: None
        self.model = load_base(spec, self._class_without_weights(spec))
        for name, layer in decoder_layers(self.model):
            self._weights.append([])
            for path, module in layer.named_modules():
                for own in module.__dict__.pop("_weights_in_files", ()):
                    whole = ".".join(part for part in (name, path, own) if part)
                    self._weights[-1].append(_Weight(module, own, whole, stored[whole]))
            self.drop(len(self._weights) - 1)

    @staticmethod
    def _class_without_weights(spec: BaseModelSpec) -> Any:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(spec.path, local_files_only=True, trust_remote_code=False)
        parent = AutoModelForCausalLM._model_mapping[type(config)]

        class Hollow(parent):  # type: ignore[valid-type, misc]  # a class found at run time
            def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
                super().__init__(config, *args, **kwargs)
                for _, layer in decoder_layers(self):
                    for module in layer.modules():
                        held = tuple(name for name, weight in module._parameters.items() if weight is not None)
                        module.__dict__["_weights_in_files"] = held
                        for name in held:
                            del module._parameters[name]
                        if held and not module._buffers:
                            module._is_hf_initialized = True  # or transformers would fill what is not there

        return passing_for(parent, Hollow)

    def bring(self, number: int) -> None:
        """Reads the layer's weights, and changes them as `running_with` says."""
        for weight in self._weights[number]:
            stored = weight.stored
            tensor = read_rows(stored, 0, stored.shape[0]).to(self._device, self._dtype)
            self._change(weight.whole_name, tensor)
            weight.module._parameters[weight.name] = torch.nn.Parameter(tensor, requires_grad=False)

    def drop(self, number: int) -> None:
        """Puts one element, seen as the whole, in the place of each weight: PEFT asks for its device and type."""
        nothing = torch.zeros(1, dtype=self._dtype, device=self._device)
        for weight in self._weights[number]:
            empty = nothing.expand(weight.stored.shape)
            weight.module._parameters[weight.name] = torch.nn.Parameter(empty, requires_grad=False)

    def running_with(self, change: Change) -> None:
        """From now on `change(name, weight)` is called for each weight: at once for what is loaded."""
        self._change = change
        in_layers = {id(weight.module._parameters[weight.name]) for layer in self._weights for weight in layer}
        for name, parameter in self.model.named_parameters():
            if id(parameter) not in in_layers:
                change(name, parameter.data)


def can_run_layerwise(spec: BaseModelSpec) -> bool:
    """Whether every weight of the decoder layers is in the files under its own name, in numbers."""
    if spec.quantization != "none":
        return False
    stored = stored_weights(spec.path)
    layers = decoder_layers(build_skeleton(spec.path))
    return bool(layers) and all(
        f"{name}.{own}" in stored and stored[f"{name}.{own}"].shape == tuple(parameter.shape)
        for name, layer in layers
        for own, parameter in layer.named_parameters()
    )


def in_lockstep(
    model: torch.nn.Module,
    layers: Sequence[torch.nn.Module],
    rows: Sequence[Any],
    run: Callable[[Any], Any],
    bring: Callable[[int], None] = lambda number: None,
    drop: Callable[[int], None] = lambda number: None,
) -> list[Any]:
    """`run(row)` of every row, which all pass each of `layers` together, between `bring` and `drop` of its number.

    One thread computes at a time. What goes wrong in one is raised.
    """
    gate = _Gate(len(rows), bring, drop)
    hooks = [
        hook
        for number, layer in enumerate(layers)
        for hook in (
            layer.register_forward_pre_hook(lambda *_args, number=number: gate.enter(number)),
            layer.register_forward_hook(lambda *_args, number=number: gate.leave(number)),
        )
    ]
    try:
        with ThreadPoolExecutor(len(rows), thread_name_prefix="charkha-row") as threads:
            futures = [threads.submit(gate.alone, run, row) for row in rows]
        errors = [future.exception() for future in futures]
        first = next((e for e in errors if e is not None and not isinstance(e, threading.BrokenBarrierError)), None)
        if first is not None:
            raise first
        return [future.result() for future in futures]
    finally:
        for hook in hooks:
            hook.remove()


class _Gate:
    """Where threads wait for one another before and after a layer."""

    def __init__(self, count: int, bring: Callable[[int], None], drop: Callable[[int], None]) -> None:
        self._number = 0
        self._computing = threading.Lock()
        self._before = threading.Barrier(count, action=lambda: bring(self._number))
        self._after = threading.Barrier(count, action=lambda: drop(self._number))

    def alone(self, run: Callable[[Any], Any], row: Any) -> Any:
        with self._computing, torch.no_grad():
            try:
                return run(row)
            except BaseException:
                self._before.abort()
                self._after.abort()
                raise

    def enter(self, number: int) -> None:
        self._wait(self._before, number)

    def leave(self, number: int) -> None:
        self._wait(self._after, number)

    def _wait(self, barrier: threading.Barrier, number: int) -> None:
        self._number = number  # the same in every thread
        self._computing.release()
        try:
            barrier.wait()
        finally:
            self._computing.acquire()
