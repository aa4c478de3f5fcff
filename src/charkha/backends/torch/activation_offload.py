"""What gradient checkpointing keeps, kept in host memory: each decoder layer's input leaves the device and comes back.

torch's checkpoint saves a layer's positional arguments (`CheckpointFunction` in a context, the newer way as
`SavedTensor`s), and both go through the hooks of `torch.autograd.graph.saved_tensors_hooks` that are in effect where
the layer is called. Inside it checkpoint's own hooks are; and a layer that runs again in backward is called by
`forward`, past module hooks. So a hook around each layer sees its arguments and nothing else, of which it takes the
first, the residual stream: masks and positions are shared among layers.

    forward    layer i's input is copied out while layer i runs, and dropped when layer i + 1 begins
    last layer its input stays: backward begins there
    backward   layer i's input arrives when layer i runs again; that of layer i - 1 is sent for at the same moment

So the device holds one input from forward to backward, and two while gradients of a layer are taken. What comes back is
the same tensor bit for bit, and no random number is drawn: losses and gradients are those of a run without this.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from charkha.backends.torch.host_copies import Copy, CudaCopies, HostCopies
from charkha.errors import TrainingFailed, UsageError


class InputChanged(TrainingFailed):
    """A layer's input was changed in place while it was on its way: what would come back is not what was."""

    kind = "input_changed"


class _Kept:
    """One layer's input in host memory, for as long as autograd may ask for it."""

    def __init__(self, copies: HostCopies, copy: Copy) -> None:
        self.copy = copy
        self._copies = copies
        self._arriving: torch.Tensor | None = None

    def send_for(self) -> None:
        """Begins to bring it, if nobody has."""
        if self._arriving is None:
            self._arriving = self._copies.bring(self.copy)

    def arrive(self) -> torch.Tensor:
        """The tensor on its device, for whom computes next."""
        self.send_for()
        tensor, self._arriving = self._arriving, None
        self._copies.arrived(self.copy)
        assert tensor is not None
        return tensor

    def __del__(self) -> None:
        if self._arriving is not None:
            self._copies.arrived(self.copy)  # sent for and never used: its memory is not free before the copy is done
        self._copies.forget(self.copy)


class ActivationOffload:
    """Moves what checkpointed layers keep. Everything is called by the thread that computes, forward or backward."""

    def __init__(self, copies: HostCopies) -> None:
        self.copies = copies
        self.moved = 0  # inputs that left so far
        self._entering: torch.Tensor | None = None
        self._open: dict[nn.Module, Any] = {}
        self._leaving: tuple[torch.Tensor, int, Copy] | None = None
        self._in_order: list[weakref.ref[_Kept]] = []  # as the layers ran; the last one is asked for first

    def watch(self, layers: Sequence[nn.Module]) -> None:
        """Has the inputs of all these checkpointed layers but the last moved, from the next forward pass on."""
        for layer in layers[:-1]:
            layer.register_forward_pre_hook(self._enter)
            layer.register_forward_hook(self._leave, always_call=True)
        for layer in layers[-1:]:
            layer.register_forward_pre_hook(lambda _layer, _arguments: self._drop_what_left())

    def _enter(self, layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        self._drop_what_left()
        if not (layer.training and torch.is_grad_enabled() and getattr(layer, "gradient_checkpointing", False)):
            return  # nothing is kept
        if not arguments:
            raise UsageError(
                f"layers of {type(layer).__name__} take their input by name, which checkpointing itself then holds",
                where="devices.offload",
                remedy="use devices.offload none with this architecture",
            )
        self._entering = arguments[0]
        hooks = saved_tensors_hooks(self._pack, self._unpack)
        hooks.__enter__()
        self._open[layer] = hooks

    def _leave(self, layer: nn.Module, _arguments: Any, _output: Any) -> None:
        self._entering = None
        hooks = self._open.pop(layer, None)
        if hooks is not None:
            hooks.__exit__(None, None, None)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | _Kept:
        is_input = tensor is self._entering
        if not is_input or isinstance(tensor, nn.Parameter) or not _is_dense(tensor):
            return tensor
        alone: torch.Tensor = tensor.detach()  # without its graph, which is not ours to hold
        with torch.no_grad():
            copy = self.copies.leave(alone)
        self._leaving = (alone, alone._version, copy)
        kept = _Kept(self.copies, copy)
        self._in_order.append(weakref.ref(kept))
        self.moved += 1
        return kept

    def _drop_what_left(self) -> None:
        """The device's tensor of the layer before; what is computed next may use its memory."""
        if self._leaving is None:
            return
        (tensor, version, copy), self._leaving = self._leaving, None
        self.copies.left(copy)
        if tensor._version != version:
            raise InputChanged(
                "a decoder layer changes its input in place, so the copy in host memory may be of either",
                where="devices.offload",
                remedy="use devices.offload none with this architecture; the newest checkpoint is good",
            )

    def _unpack(self, kept: torch.Tensor | _Kept) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        self._drop_what_left()
        with torch.no_grad():
            kept.send_for()
            before = self._before(kept)
            if before is not None:
                before.send_for()
            return kept.arrive()

    def _before(self, kept: _Kept) -> _Kept | None:
        """What backward asks for next, once `kept` is asked for; what comes after it in the order is done with."""
        while self._in_order and self._in_order.pop()() is not kept:
            pass
        while self._in_order:
            before = self._in_order[-1]()
            if before is not None:
                return before
            self._in_order.pop()  # its graph was dropped without a backward pass
        return None


def offload_activations(model: Any, copies: HostCopies) -> ActivationOffload:
    """Has the inputs of `model`'s decoder layers kept in host memory wherever they are checkpointed.

    Raises UsageError for an architecture whose layers transformers does not checkpoint.
    """
    from charkha.backends.torch.streamed_model import decoder_layers

    layers = [layer for _name, layer in decoder_layers(model)]
    if not layers:
        raise UsageError(
            "this architecture has no layers that transformers checkpoints",
            where="devices.offload",
            remedy="use devices.offload none",
        )
    offload = ActivationOffload(copies)
    offload.watch(layers)
    _begin_without_a_leaf(model.get_input_embeddings())
    return offload


def copies_for(device: str) -> HostCopies:
    """The copies of a device by its type."""
    return CudaCopies() if device == "cuda" else HostCopies()


def _begin_without_a_leaf(embedding: nn.Module) -> None:
    """Has what a frozen embedding gives ask for gradients without being a leaf of the graph.

    PEFT and transformers make it a leaf (`enable_input_require_grads`), which the graph holds to its end, with a
    gradient of the same size that nobody reads. Ours comes before theirs, which then find nothing to do.
    """
    anchors: dict[torch.device, torch.Tensor] = {}

    def begin(_embedding: nn.Module, _arguments: Any, output: torch.Tensor) -> torch.Tensor | None:
        if output.requires_grad or not torch.is_grad_enabled():
            return None
        anchor = anchors.setdefault(output.device, torch.zeros((), device=output.device, requires_grad=True))
        beginning: torch.Tensor = _Beginning.apply(output, anchor)
        return beginning

    embedding.register_forward_hook(begin, prepend=True)


class _Beginning(torch.autograd.Function):  # type: ignore[misc]  # its base is untyped
    """The same numbers, with a place in the graph; gradients end here."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, None]:
        return None, None


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether its elements fill one stretch of memory, each once, in any order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return bool(tensor.numel())
