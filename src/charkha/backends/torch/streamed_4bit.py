"""A streamed layer of 4-bit weights: bitsandbytes' Linear4bit in all but where its weight lies.

Forward and backward are the operations of bitsandbytes 0.50's MatMul4Bit, in its order. That class keeps packed weight
and constants alive in `ctx.tensors` and `ctx.state`, where checkpointing does not see them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import bitsandbytes
import torch
from bitsandbytes import functional as bnb

from charkha.backends.torch.slab_parts import BLOCK_SIZE, NESTED_BLOCK_SIZE, StoredState
from charkha.backends.torch.streamed_linear import Streamed, require_still_there


class StreamedLinear4bit(Streamed, bitsandbytes.nn.Linear4bit):  # type: ignore[misc]  # bitsandbytes ships no types
    """A frozen NF4 or FP4 layer."""

    stored: StoredState | None = None  # how the base's files have it, where they are in 4 bits already

    def _take(self, parts: dict[str, torch.Tensor]) -> None:
        state = quant_state(parts, self.four_bit_type, (self.out_features, self.in_features), self.compute_dtype)
        if self.stored is not None:
            state.blocksize, state.dtype = self.stored.block_size, getattr(torch, self.stored.dtype)
            if state.state2 is not None:
                state.state2.blocksize = self.stored.nested_block_size
        self.quant_state = state
        weight = bitsandbytes.nn.Params4bit(
            parts["packed"],
            requires_grad=False,
            quant_state=state,
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=self.four_bit_type,
            bnb_quantized=True,
            module=self,
        )
        self.register_parameter("weight", weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., inputs] -> [..., outputs]."""
        assert self.engine is not None
        self.engine.require(self.layer)  # out here, where grad mode says whether a backward pass will come
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        result: torch.Tensor = _Product4bit.apply(x.to(self.compute_dtype), bias, self)
        return result.to(x.dtype)


class _Product4bit(torch.autograd.Function):  # type: ignore[misc]  # torch is not typed here
    """bitsandbytes.matmul_4bit without keeping the weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, module: StreamedLinear4bit) -> torch.Tensor:
        ctx.module = module
        result: torch.Tensor = bitsandbytes.matmul_4bit(x, module.weight, bias=bias, quant_state=module.quant_state)
        require_still_there(module)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        weight, (grad,) = ctx.module.weight, grads
        whole = bnb.dequantize_4bit(weight.data.view(-1, 1), ctx.module.quant_state).to(grad.dtype)
        result = torch.matmul(grad, whole)
        require_still_there(ctx.module)
        return result, None, None


def quant_state(parts: dict[str, torch.Tensor], quant_type: str, shape: tuple[int, int], dtype: torch.dtype) -> Any:
    """The record that bitsandbytes keeps of a packed weight: constants, code tables; block sizes are its own."""
    device = parts["packed"].device
    nested = None
    if "nested_absmax" in parts:
        nested = bnb.QuantState(
            absmax=parts["nested_absmax"],
            blocksize=NESTED_BLOCK_SIZE,
            code=parts.get("nested_code", _nested_code(device)),
            dtype=torch.float32,
        )
    return bnb.QuantState(
        absmax=parts["absmax"],
        shape=torch.Size(shape),
        code=parts.get("code", _code(quant_type, device)),
        blocksize=BLOCK_SIZE,
        quant_type=quant_type,
        dtype=dtype,
        offset=parts.get("nested_offset"),
        state2=nested,
    )


def unpacked_into(target: torch.Tensor, parts: dict[str, torch.Tensor], quant_type: str) -> None:
    """Fills `target` [rows, columns] with the values of a packed weight."""
    state = quant_state(parts, quant_type, (target.shape[0], target.shape[1]), target.dtype)
    target.copy_(bnb.dequantize_4bit(parts["packed"].view(-1, 1), state))  # a CPU has no unpacking in place


@cache
def _code(quant_type: str, device: torch.device) -> torch.Tensor:
    """The 16 values that 4 bits stand for; one tensor for all layers."""
    code: torch.Tensor = bnb.get_4bit_type(quant_type, device=device)
    return code


@cache
def _nested_code(device: torch.device) -> torch.Tensor:
    """The 256 values of the 8-bit code in which the block constants are stored, as quantize_blockwise has it."""
    code: torch.Tensor = bnb.create_dynamic_map().to(device)
    return code


def four_bit_stand_in(
    module: torch.nn.Linear, quant_type: str, dtype: torch.dtype, stored: StoredState | None = None
) -> StreamedLinear4bit:
    """A StreamedLinear4bit of the same shape, without a weight, on the meta device; `dtype` is computed in."""
    made = StreamedLinear4bit(
        module.in_features,
        module.out_features,
        bias=module.bias is not None,
        compute_dtype=dtype,
        compress_statistics=True,
        quant_type=quant_type,
        device="meta",
    )
    made.four_bit_type, made.stored = quant_type, stored
    made.forget_weight()
    return made
