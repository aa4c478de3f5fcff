"""What CUDA allocates where a CPU does otherwise, for a training step that runs on fake CPU tensors.

Two parts. `CudaStandIns` puts the operators that torch would choose on a GPU (attention kernels, fused dropout,
autocast's list of fp32 operators) in the place of those it chooses for CPU tensors; their outputs, and what autograd
keeps of them, then come from torch's own shape functions. `cuda_temporaries` names what a kernel takes and returns
inside itself, which no shape function shows. Each figure says where in torch 2.13 or bitsandbytes 0.50 it is from.

Not covered: math attention for another reason than heads that differ in number, sort buffers of index and embedding
gradients (some bytes a token), cuBLAS's own allocations beyond its workspace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_aten = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)
_LARGEST_FLASH_HEAD = 256
_KERNEL_ROWS = 128  # above, bitsandbytes unpacks a 4-bit weight (always above 512 rows, for most shapes above 128)

# aten/src/ATen/autocast_mode.h, AT_FORALL_FP32 and AT_FORALL_FP32_SET_OPT_DTYPE, without what a CPU's list has too.
_FP32_OPERATORS = frozenset(
    {"layer_norm", "group_norm", "norm", "pow", "__pow__", "rsqrt", "exp", "log", "logsumexp", "softplus", "tan",
     "cosine_similarity", "reciprocal"}
)  # fmt: skip
_FP32_RESULTS = frozenset({"softmax", "log_softmax", "sum", "prod", "cumsum", "cumprod"})

# torch gives cuBLAS one workspace for each thread that multiplies matrices: the caller's, and autograd's
# (aten/src/ATen/cuda/CublasHandlePool.cpp, CUBLAS_WORKSPACE_CONFIG); cuBLASLt shares it.
_HOPPER_WORKSPACE_BYTES = 4096 * 8 * 1024
_WORKSPACE_BYTES = 4096 * 1024 * 2 + 16 * 1024 * 8


def workspace_bytes(capability: tuple[int, int]) -> int:
    """CuBLAS's workspace for one thread."""
    return _HOPPER_WORKSPACE_BYTES if capability in ((9, 0), (10, 0)) else _WORKSPACE_BYTES


@contextmanager
def cuda_autocast_shown(dtype: torch.dtype) -> Iterator[None]:
    """While entered, torch.is_autocast_enabled(), which asks about CUDA, says yes.

    PEFT's adapters on quantized layers ask it and do not cast their input to fp32 then. CPU tensors are not affected.
    """
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


def use_cuda_int8(model: nn.Module) -> None:
    """Has bitsandbytes' int8 layers multiply in int8, as on a GPU; for CPU tensors it would unpack the weight."""
    for module in model.modules():
        if type(getattr(module, "state", None)).__name__ == "MatmulLtState":
            module.forward = partial(_int8_forward, module)


def _int8_forward(module: Any, activations: torch.Tensor) -> torch.Tensor:
    """Linear8bitLt.forward without the choice by device in bitsandbytes.matmul."""
    from bitsandbytes.autograd._functions import MatMul8bitLt

    module.state.is_training = module.training
    out: torch.Tensor = MatMul8bitLt.apply(activations, module.weight, None, module.bias, module.state)
    return out


class CudaStandIns(TorchFunctionMode):  # type: ignore[misc]  # its base is untyped
    """While entered, attention, dropout and autocast do on CPU tensors what they do on a GPU of `capability`."""

    def __init__(self, capability: tuple[int, int]) -> None:
        super().__init__()
        self._capability = capability

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func is nn.functional.dropout:
            return _dropout(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if torch.is_autocast_enabled("cpu") and args and _is_half(args[0]):
            if name in _FP32_OPERATORS:
                args = tuple(value.float() if _is_half(value) else value for value in args)
            elif name in _FP32_RESULTS and kwargs.get("dtype") is None:
                kwargs = {**kwargs, "dtype": torch.float32}
        return func(*args, **kwargs)

    def _attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """[batch, heads, tokens, head] through the kernel that sdp_utils.cpp would choose."""
        query, key, value = (_as_autocast(tensor) for tensor in (query, key, value))
        bias = None if attn_mask is None else _as_bias(attn_mask, query)
        if query.shape[1] != key.shape[1] and not enable_gqa:  # no kernel takes it (sdp_utils_cpp.h)
            with torch.autocast("cpu", enabled=False):
                made = _aten._scaled_dot_product_attention_math(
                    query, key, value, bias, dropout_p, is_causal, scale=scale
                )
            return made[0]
        chosen = self.kernel(query, value, masked=bias is not None)
        if chosen == "flash":
            return _flash(query, key, value, dropout_p, is_causal, scale)
        if enable_gqa and query.shape[1] != key.shape[1]:
            groups = query.shape[1] // key.shape[1]
            if chosen != "cudnn":
                key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
        if chosen == "cudnn":
            made = _aten._scaled_dot_product_cudnn_attention(
                query, key, value, bias, True, dropout_p, is_causal, False, scale=scale
            )
            return made[0]
        aligned = None if bias is None else _aligned(bias, query, key)
        made = _aten._scaled_dot_product_efficient_attention(
            query, key, value, aligned, True, dropout_p, is_causal, scale=scale
        )
        return made[0]

    def kernel(self, query: torch.Tensor, value: torch.Tensor, *, masked: bool) -> str:
        """Flash | cudnn | efficient, by select_sdp_backend: cuDNN first on Hopper and B200, flash never with a mask."""
        head = query.shape[-1]
        fits = query.dtype in _HALF and head == value.shape[-1] and head <= _LARGEST_FLASH_HEAD
        if fits and self._capability in ((9, 0), (10, 0)) and head % 8 == 0:
            return "cudnn"
        if fits and not masked and self._capability >= (8, 0):
            return "flash"
        return "efficient"


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float, causal: bool, scale: float | None
) -> torch.Tensor:
    """Heads are padded to a multiple of 8 and the answer cut back, as attention.cpp does."""
    head = query.shape[-1]
    if head % 8:
        query, key, value = (nn.functional.pad(tensor, [0, 8 - head % 8]) for tensor in (query, key, value))
    made = _aten._scaled_dot_product_flash_attention(
        query, key, value, dropout, causal, False, scale=scale or head**-0.5
    )
    return made[0][..., :head] if head % 8 else made[0]


def _as_bias(mask: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """What is added to the scores: attention.cpp makes it of a boolean mask, in the query's type, at every call."""
    if mask.dtype != torch.bool:
        return _as_autocast(mask).to(query.dtype)
    bias = torch.empty(mask.shape, dtype=query.dtype, device=mask.device)
    bias.fill_(0.0)
    return bias


def _aligned(bias: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The bias of the memory-efficient kernel: rows padded to a multiple of 16 elements, seen by every head."""
    short = -bias.shape[-1] % 16
    if short:
        bias = nn.functional.pad(bias, [0, short])[..., : bias.shape[-1]]
    return bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])


def _dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """On a GPU one kernel that keeps a mask of booleans; on a CPU torch keeps the scaled noise."""
    if not training or p == 0.0 or inplace:
        return nn.functional.dropout(input, p, training, inplace)
    return torch.native_dropout(input, p, True)[0]


def _is_half(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in _HALF


def _as_autocast(tensor: torch.Tensor) -> torch.Tensor:
    if torch.is_autocast_enabled("cpu") and tensor.is_floating_point():
        return tensor.to(torch.get_autocast_dtype("cpu"))
    return tensor


def cuda_temporaries(func: Any, args: tuple[Any, ...], result: Any) -> Iterable[int]:
    """Bytes of each allocation that the CUDA kernel of this operator makes and returns inside itself."""
    inside = _INSIDE.get(str(func))
    return inside(args, result) if inside is not None else ()


def cpu_temporaries(func: Any, args: tuple[Any, ...], result: Any) -> Iterable[int]:
    """The same on a CPU."""
    inside = _INSIDE_ON_CPU.get(str(func))
    return inside(args, result) if inside is not None else ()


def _flash_backward(args: tuple[Any, ...], result: Any) -> Iterable[int]:
    """flash_api.cpp, mha_bwd: a sum a row and the query's gradient in fp32; keys' and values' for every query head."""
    query, key = args[1], args[2]  # [batch, heads, tokens, head]
    batch, heads, tokens, head = query.shape
    rows = batch * heads * _multiple(tokens, 128)
    yield 4 * rows
    yield 4 * rows * _multiple(head, 32)
    if key.shape[1] != heads:
        expanded = key.numel() // key.shape[1] * heads * key.element_size()
        yield expanded
        yield expanded


def _varlen_backward(args: tuple[Any, ...], result: Any) -> Iterable[int]:
    """flash_api.cpp, mha_varlen_bwd: as above, with 128 rows more for each document."""
    query, key, documents = args[1], args[2], args[6].numel() - 1  # [tokens, heads, head]
    tokens, heads, head = query.shape
    rows = heads * (tokens + 128 * documents)
    yield 4 * rows
    yield 4 * rows * _multiple(head, 32)
    if key.shape[1] != heads:
        expanded = key.numel() // key.shape[1] * heads * key.element_size()
        yield expanded
        yield expanded


def _efficient_backward(args: tuple[Any, ...], result: Any) -> Iterable[int]:
    """kernel_backward.h: delta, and the query's gradient in fp32 by blocks of 64 rows and 128 columns at most."""
    query = args[1]
    batch, heads, tokens, head = query.shape
    rows = batch * heads * _multiple(tokens, 64)
    yield 4 * rows
    if query.dtype in _HALF:
        yield 4 * rows * _multiple(head, 64)


def _cudnn_backward(args: tuple[Any, ...], result: Any) -> Iterable[int]:
    """MHA.cpp asks cuDNN for its workspace; taken as flash's: a sum a row and the query's gradient in fp32."""
    yield from _flash_backward(args, result)


def _unpacked(args: tuple[Any, ...], copies_of_constants: int) -> Iterable[int]:
    """The weight in the input's type, and its blocks' constants in fp32 where they were nested."""
    activations, shape, blocksize = args[0], args[2], args[4]
    weights = shape[0] * shape[1]
    nested = len(args) > 7 and args[7] is not None
    return [4 * -(-weights // blocksize)] * (copies_of_constants * nested) + [weights * activations.element_size()]


def _gemm_4bit(args: tuple[Any, ...], result: Any) -> Iterable[int]:
    """bitsandbytes/backends/cuda/ops.py, _dequant_linear_fallback; its own kernel for few rows takes nothing."""
    activations = args[0]
    rows = activations.numel() // activations.shape[-1]
    return _unpacked(args, copies_of_constants=2) if rows > _KERNEL_ROWS else ()


def _int8_quantization(args: tuple[Any, ...], result: Any) -> Iterable[int]:
    """bitsandbytes/backends/cuda/ops.py: |A| in fp16 and whether it is an outlier."""
    return (2 * args[0].numel(), args[0].numel())


def _int8_product(args: tuple[Any, ...], result: Any) -> Iterable[int]:
    """int8_linear_matmul and int8_mm_dequant: products in int32, then in fp16."""
    return (4 * result[0].numel(), 2 * result[0].numel())


def _safe_softmax(args: tuple[Any, ...], result: Any) -> Iterable[int]:
    """native/SoftMax.cpp: which scores are minus infinity, in booleans."""
    yield args[0].numel()


def _logsumexp(args: tuple[Any, ...], result: Any) -> Iterable[int]:
    """native/ReduceOps.cpp: the exponentials."""
    yield args[0].numel() * args[0].element_size()


def _gemm_4bit_on_cpu(args: tuple[Any, ...], result: Any) -> Iterable[int]:
    return _unpacked(args, copies_of_constants=1)


def _int8_quantization_on_cpu(args: tuple[Any, ...], result: Any) -> Iterable[int]:
    """bitsandbytes/backends/default/ops.py: outliers in booleans, rows scaled and rounded in fp32, then the result."""
    count = args[0].numel()
    return (count, 4 * count, 3 * count)


def _int8_product_on_cpu(args: tuple[Any, ...], result: Any) -> Iterable[int]:
    """bitsandbytes/backends/default/ops.py, when nothing is trained: int32 products; they, scales, and both in fp32."""
    made = result[0]
    return (*[4 * made.numel()] * 3, (4 - made.element_size()) * made.numel())


_INSIDE_ON_CPU: dict[str, Callable[[tuple[Any, ...], Any], Iterable[int]]] = {
    "aten._safe_softmax.default": _safe_softmax,
    "aten.logsumexp.default": _logsumexp,
    "bitsandbytes.gemm_4bit.default": _gemm_4bit_on_cpu,
    "bitsandbytes.int8_vectorwise_quant.default": _int8_quantization_on_cpu,
    "bitsandbytes.int8_mixed_scaled_mm.default": _int8_product_on_cpu,
}
_INSIDE: dict[str, Callable[[tuple[Any, ...], Any], Iterable[int]]] = {
    "aten._scaled_dot_product_flash_attention_backward.default": _flash_backward,
    "torch_attn._varlen_attn_backward.default": _varlen_backward,
    "aten._scaled_dot_product_efficient_attention_backward.default": _efficient_backward,
    "aten._scaled_dot_product_cudnn_attention_backward.default": _cudnn_backward,
    "aten._safe_softmax.default": _safe_softmax,
    "aten.logsumexp.default": _logsumexp,
    "bitsandbytes.gemm_4bit.default": _gemm_4bit,
    "bitsandbytes.int8_vectorwise_quant.default": _int8_quantization,
    "bitsandbytes.int8_mixed_scaled_mm.default": _int8_product,
}


def _multiple(count: int, of: int) -> int:
    return -(-count // of) * of
