"""Prompt tuning's virtual tokens put before a row by hand, where PEFT's own way would do it at every call.

PEFT prepends them in every forward pass: right for a whole row, wrong for the second token of an answer. In a batch
padded on the left PEFT also puts them before the padding; here they stand next to the row, as they did in training.
"""

from __future__ import annotations

from typing import Any

import torch


def uses_virtual_tokens(model: Any) -> bool:
    """Whether rows get virtual tokens now (a prompt-tuned model whose adapter is not switched off)."""
    config = getattr(model, "active_peft_config", None)
    switched_off = getattr(model, "_adapters_disabled", False)  # PEFT has no public name for it
    return config is not None and bool(config.is_prompt_learning) and not switched_off


def embedded_rows(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(inputs_embeds, attention_mask) for the model beneath: padding, virtual tokens, row.

    `ids` and `mask` are [rows, tokens], padded on the left.
    """
    virtual = model.get_prompt(batch_size=len(ids))
    embedded = model.get_base_model().get_input_embeddings()(ids)
    count = virtual.shape[1]
    width = ids.shape[1] + count
    embeds = embedded.new_zeros((len(ids), width, embedded.shape[2]))
    wide_mask = mask.new_zeros((len(ids), width))
    for row, length in enumerate(mask.sum(dim=1).tolist()):
        embeds[row, width - length :] = embedded[row, ids.shape[1] - length :]
        embeds[row, width - length - count : width - length] = virtual[row].to(embedded.dtype)
        wide_mask[row, width - length - count :] = 1
    return embeds, wide_mask
