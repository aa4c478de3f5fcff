"""Attention of a planned GPU on fake CPU tensors, where it goes through transformers' registry under a name.

FlashAttention 2's package is not needed: torch's own kernels have the same shapes (out, and a sum a row in fp32).
Masks and bounds are those that transformers makes for the real thing.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask

from charkha.backends.base import TraceRequest
from charkha.backends.torch.document_attention import (
    LARGEST_HEAD,
    attend_by_kernel,
    document_mask,
    documents_attention,
    use_document_attention,
)
from charkha.plan.packing_support import BY_MASK

_FLASH = "charkha_planned_kernel"  # transformers looks for a package behind any name with "flash" in it
_DOCUMENTS = "charkha_planned_documents"


def use_planned_attention(model: Any, request: TraceRequest) -> bool:
    """Switches the model to what `request` plans; returns whether packed rows stand in one row (see batches.py)."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    if request.attention == "flash_attention_2":
        causal.set_attn_implementation(_FLASH)
        return bool(request.document_lengths)
    if not request.document_lengths or request.config.get("model_type") in BY_MASK:
        return False
    if request.device == "cuda" and request.compute_capability >= (8, 0) and request.dtype != "fp32":
        if request.attention == "sdpa":
            causal.set_attn_implementation(_DOCUMENTS)
        return bool(causal.config._attn_implementation == _DOCUMENTS)
    return use_document_attention(causal)


def _planned_documents(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """document_attention.documents_attention on a GPU that has the variable-length kernel."""
    bounds = settings.get("cu_seq_lens_q")
    has_kernel = query.shape[-1] <= LARGEST_HEAD and query.shape[-1] % 8 == 0 and query.shape[-1] == value.shape[-1]
    if bounds is None or not has_kernel or settings.get("dropout"):
        return documents_attention(module, query, key, value, attention_mask, **settings)
    query, key, value = (_narrow(tensor) for tensor in (query, key, value))
    scaling, window = settings.get("scaling"), settings.get("sliding_window")
    return attend_by_kernel(query, key, value, scaling, window, bounds, settings["max_length_q"]), None


def _planned_flash(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' flash_attention_forward: by bounds where there are any, without the padding where rows have some.

    query [batch, heads, tokens, head]; attention_mask [batch, tokens] or None. Returns [batch, tokens, heads, head].
    """
    query, key, value = (_narrow(tensor) for tensor in (query, key, value))
    scaling, window = settings.get("scaling"), settings.get("sliding_window")
    bounds = settings.get("cu_seq_lens_q")
    if bounds is not None:
        return attend_by_kernel(query, key, value, scaling, window, bounds, settings["max_length_q"]), None
    if attention_mask is None:
        whole, _weights = sdpa_attention_forward(module, query, key, value, None, scaling=scaling, is_causal=True)
        return whole, None
    batch, heads, tokens, head = query.shape
    kept = attention_mask.flatten().nonzero().flatten()
    lengths = attention_mask.sum(dim=1, dtype=torch.int32)
    bounds = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    rows = [tensor.transpose(1, 2).reshape(batch * tokens, -1, head)[kept] for tensor in (query, key, value)]
    query, key, value = (tensor.transpose(0, 1)[None] for tensor in rows)
    out = attend_by_kernel(query, key, value, scaling, window, bounds, int(lengths.max()))
    padded = out.new_zeros((batch * tokens, heads, head)).index_copy(0, kept, out[0])
    return padded.view(batch, tokens, heads, head), None


def _narrow(tensor: torch.Tensor) -> torch.Tensor:
    """Rotary embeddings leave fp32 behind where weights are fp32; the kernels take 16 bits."""
    return tensor.to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else tensor


AttentionInterface.register(_FLASH, _planned_flash)
AttentionMaskInterface.register(_FLASH, flash_attention_mask)
AttentionInterface.register(_DOCUMENTS, _planned_documents)
AttentionMaskInterface.register(_DOCUMENTS, document_mask)
