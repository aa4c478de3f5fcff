"""Frozen linear layers whose weight is a view into a buffer of the streaming engine: the same arithmetic as resident.

They are subclasses of the layers that transformers and PEFT know, so adapters attach as to any other. Reading
`weight`, whoever does it, brings the layer in first. The product is an autograd function of its own that keeps the
module and no weight: torch's and bitsandbytes' keep the weight they multiplied with, which by the time of the backward
pass is another layer's. No gradient of a weight or bias exists, since the base is frozen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from charkha.backends.torch.plain_linear import SAME_AS_LINEAR
from charkha.backends.torch.slabs import Piece
from charkha.backends.torch.streaming import Engine


class Streamed:
    """What both kinds share: the handle to the engine, and a `weight` that is there when it is read."""

    engine: Engine | None = None
    layer: int = -1
    _parameters: dict[str, torch.nn.Parameter | None]

    @property
    def weight(self) -> Any:
        """The parameter, its layer in its slot. Raises AttributeError before the layer is bound."""
        held = self.__dict__.get("_parameters", {})
        if "weight" not in held:
            raise AttributeError("a streamed layer has no weight before it is bound to an engine")
        if self.engine is not None:
            self.engine.require(self.layer)
        return held["weight"]

    def forget_weight(self) -> None:
        """No weight, not even of meta tensors: loading the model then passes over it in the files."""
        self._parameters.pop("weight", None)

    def bind(self, engine: Engine, layer: int, pieces: dict[str, Piece]) -> None:
        """Sets the weight as a view into the engine's buffer of `layer`."""
        self._take({part: engine.view(layer, piece) for part, piece in pieces.items()})
        self.engine, self.layer = engine, layer

    def _take(self, parts: dict[str, torch.Tensor]) -> None:
        raise NotImplementedError

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """The bias alone: a state dict of views would hold whatever layer lies in the buffers when it is read."""
        bias = self._parameters.get("bias")
        if bias is not None:
            destination[f"{prefix}bias"] = bias if keep_vars else bias.detach()


class StreamedLinear(Streamed, torch.nn.Linear):  # type: ignore[misc]  # `weight` is a property there
    """`x @ weight.T + bias` in the type of the base."""

    bias_apart = False  # Falcon's own layer adds the bias in a second rounding

    def _take(self, parts: dict[str, torch.Tensor]) -> None:
        self.register_parameter("weight", torch.nn.Parameter(parts["weight"], requires_grad=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., inputs] -> [..., outputs]."""
        assert self.engine is not None
        self.engine.require(self.layer)  # out here, where grad mode says whether a backward pass will come
        bias = self.bias
        kind = x.device.type
        if torch.is_autocast_enabled(kind):  # as autocast does for nn.Linear, outside the function that keeps no cast
            x = x.to(torch.get_autocast_dtype(kind))
            bias = None if bias is None else bias.to(x.dtype)
        if self.bias_apart and bias is not None:
            return _Product.apply(x, None, self) + bias
        return _Product.apply(x, bias, self)


class _Product(torch.autograd.Function):  # type: ignore[misc]  # torch is not typed here
    """functional.linear without keeping the weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, module: StreamedLinear) -> torch.Tensor:
        ctx.module = module
        result = functional.linear(x, module.weight, bias)
        require_still_there(module)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        weight, (grad,) = ctx.module.weight, grads
        # As torch's own: the gradient as one matrix, times the weight.
        rows = grad.reshape(-1, grad.shape[-1])
        result = rows.mm(weight.to(rows.dtype)).view(*grad.shape[:-1], weight.shape[1])
        require_still_there(ctx.module)
        return result, None, None


def require_still_there(module: Streamed) -> None:
    """Raises WeightsOverwritten when the layer was lost while it was read."""
    assert module.engine is not None
    module.engine.require_intact()


def plain_stand_in(module: torch.nn.Linear) -> StreamedLinear:
    """A StreamedLinear of the same shape, without a weight, on the same device."""
    made = StreamedLinear(
        module.in_features, module.out_features, bias=module.bias is not None, device="meta", dtype=module.weight.dtype
    )
    made.bias_apart = type(module).__name__ in SAME_AS_LINEAR
    made.forget_weight()
    return made
