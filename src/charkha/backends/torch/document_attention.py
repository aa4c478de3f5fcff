"""Attention over the documents of one packed row, each seeing itself alone, at the cost of each alone.

A mask would make a packed row cost the square of its length, in time and in memory. Here the documents' bounds reach
the kernel instead: torch's variable-length kernel on CUDA (FlashAttention inside torch, no package needed), elsewhere
torch's scaled_dot_product_attention document by document. It joins transformers through its public registry of
attention functions, under NAME, and is used for packed rows where attention is sdpa.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "charkha_documents"
LARGEST_HEAD = 256  # of FlashAttention's kernels
_AMPERE = (8, 0)


def use_document_attention(model: PreTrainedModel) -> bool:
    """Switches a model from sdpa; False, and nothing changed, where its attention does not go through the registry.

    Whether the bounds reach the attention is another question: see packing_proof.py.
    """
    if model.config._attn_implementation != "sdpa":
        return False
    model.set_attn_implementation(NAME)
    return bool(model.config._attn_implementation == NAME)


def leave_document_attention(model: PreTrainedModel) -> None:
    """Back to plain sdpa."""
    model.set_attn_implementation("sdpa")


def documents_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each document; without bounds it is transformers' sdpa over rows with a mask.

    query [1, heads, tokens, head], key and value [1, key-value heads, tokens, head], cu_seq_lens_q int32
    [documents + 1]. Returns [1, tokens, heads, head]. `sliding_window` counts the tokens that one sees, with itself.
    """
    if cu_seq_lens_q is None:
        if attention_mask is None and query.shape[2] == key.shape[2]:
            attention_mask = _window_mask(query.shape[2], sliding_window, query.device)
        whole, _weights = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **rest
        )
        return whole, None
    if torch.is_autocast_enabled(query.device.type):  # rotary embeddings leave fp32 behind where weights are fp32
        narrow = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(narrow), key.to(narrow), value.to(narrow)
    if dropout == 0.0 and _has_kernel(query, value):
        return attend_by_kernel(query, key, value, scaling, sliding_window, cu_seq_lens_q, int(max_length_q or 0)), None
    parts = []
    # On a GPU without the kernel this waits for the device, once a layer.
    for start, end in itertools.pairwise(cu_seq_lens_q.tolist()):
        mask = _window_mask(end - start, sliding_window, query.device)
        own = (tensor[:, :, start:end] for tensor in (query, key, value))
        part, _weights = sdpa_attention_forward(module, *own, mask, dropout=dropout, scaling=scaling, is_causal=True)
        parts.append(part)
    return torch.cat(parts, dim=1), None


def _has_kernel(query: torch.Tensor, value: torch.Tensor) -> bool:
    return bool(
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] <= LARGEST_HEAD
        and query.shape[-1] % 8 == 0
        and query.shape[-1] == value.shape[-1]
        and torch.cuda.get_device_capability(query.device) >= _AMPERE
    )


def attend_by_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    sliding_window: int | None,
    bounds: torch.Tensor,
    longest: int,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # [tokens, heads, head]
    out: torch.Tensor = varlen_attn(
        query,
        key,
        value,
        bounds,
        bounds,
        longest,
        longest,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out[None]


def _window_mask(tokens: int, sliding_window: int | None, device: torch.device) -> torch.Tensor | None:
    """True [1, 1, tokens, tokens] where a token is seen; None where the window covers the whole document."""
    if sliding_window is None or tokens <= sliding_window:
        return None
    place = torch.arange(tokens, device=device)
    back = place[:, None] - place[None, :]
    return ((back >= 0) & (back < sliding_window))[None, None]


def document_mask(*args: Any, attention_mask: torch.Tensor | None = None, **rest: Any) -> torch.Tensor | None:
    """No mask for packed rows, the only ones that come without one: theirs would be of the row's square."""
    if attention_mask is None:
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, **rest)


AttentionInterface.register(NAME, documents_attention)
AttentionMaskInterface.register(NAME, document_mask)
