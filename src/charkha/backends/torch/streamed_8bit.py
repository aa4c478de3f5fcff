"""A streamed layer of 8-bit weights: bitsandbytes' Linear8bitLt in all but where its weight lies.

LLM.int8(), https://arxiv.org/abs/2208.07339. Forward is bitsandbytes' own; its function keeps the whole state, weight
included, for the backward pass, so ours takes its place there, with the same operations in the same order.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes
import torch

from charkha.backends.torch.streamed_linear import Streamed, require_still_there

_THRESHOLD = 6.0  # of activations computed in 16 bits: transformers' default, as a resident base has


class StreamedLinear8bit(Streamed, bitsandbytes.nn.Linear8bitLt):  # type: ignore[misc]  # ships no types
    """A frozen int8 layer with one scale for each row."""

    def _take(self, parts: dict[str, torch.Tensor]) -> None:
        weight = bitsandbytes.nn.Int8Params(parts["int8"], requires_grad=False, has_fp16_weights=False)
        self.register_parameter("weight", weight)
        self.state.CB, self.state.SCB = parts["int8"], parts["row_maxima"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., inputs] -> [..., outputs]."""
        assert self.engine is not None
        self.engine.require(self.layer)  # out here, where grad mode says whether a backward pass will come
        self.state.is_training = self.training
        if self.bias is not None and self.bias.dtype != x.dtype:
            self.bias.data = self.bias.data.to(x.dtype)
        result: torch.Tensor = _Product8bit.apply(x, self.bias, self)
        return result


class _Product8bit(torch.autograd.Function):  # type: ignore[misc]  # torch is not typed here
    """bitsandbytes.matmul without keeping the state."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, module: StreamedLinear8bit) -> torch.Tensor:
        ctx.module, ctx.shape, ctx.dtype = module, x.shape, x.dtype
        result: torch.Tensor = bitsandbytes.matmul(x, module.weight, bias=bias, state=module.state)
        require_still_there(module)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad,) = grads
        module: StreamedLinear8bit = ctx.module
        assert module.engine is not None
        module.engine.require(module.layer)
        rows = grad.reshape(-1, grad.shape[-1]).contiguous()
        scales = module.state.SCB.unsqueeze(1).mul(1.0 / 127.0)
        whole = module.state.CB.to(ctx.dtype, copy=True).mul_(scales)
        result = torch.matmul(rows.to(ctx.dtype), whole).view(ctx.shape)
        require_still_there(module)
        return result, None, None


def eight_bit_stand_in(module: torch.nn.Linear) -> StreamedLinear8bit:
    """A StreamedLinear8bit of the same shape, without a weight, on the meta device."""
    made = StreamedLinear8bit(
        module.in_features,
        module.out_features,
        bias=module.bias is not None,
        has_fp16_weights=False,
        threshold=_THRESHOLD,
        device="meta",
    )
    made.forget_weight()
    return made
