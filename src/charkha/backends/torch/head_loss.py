"""The chunked loss through a head that stays on the host: blocks of the vocabulary pass by twice.

The first pass finds each token's log of the sum over the vocabulary, block by block (the running maximum of online
softmax, https://arxiv.org/abs/1805.02867), the second the gradient of the hidden states. Logits of one block exist at a
time. Sums are made in another order than over a whole head: the same loss up to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from charkha.backends.torch.host_tables import HostHead
from charkha.plan.loss_memory import CHUNK_BYTES, LEAST_BLOCK_ROWS

_CHUNK_BYTES = CHUNK_BYTES  # fp32 logits of one block
_LEAST_ROWS = LEAST_BLOCK_ROWS  # of the vocabulary at once


class StreamedHeadLoss(torch.autograd.Function):  # type: ignore[misc]  # torch is not typed here
    """Summed cross-entropy of hidden states through a streamed head; the gradient is made on the way."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: HostHead, targets: torch.Tensor, softcap: float | None
    ) -> torch.Tensor:
        """Takes hidden [tokens, hidden] and targets [tokens]; gives a scalar in fp32."""
        assert head.table is not None
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else head.table.dtype
        rows = max(_LEAST_ROWS, _CHUNK_BYTES // (4 * max(1, len(hidden))))
        narrow = hidden.to(dtype)
        with torch.autocast(kind, enabled=False):
            logsum, wanted = _sums(narrow, head, rows, targets, softcap)
            ctx.gradient = _gradient(narrow, head, rows, targets, softcap, logsum).to(hidden.dtype)
        return (logsum - wanted).sum()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        """Scales what the forward pass made; it can be asked once."""
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(grads[0].to(gradient.dtype)), None, None, None


def streamed_losses(hidden: torch.Tensor, head: HostHead, targets: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Negative log-likelihoods [tokens] in fp32, without gradients: the first of the two passes alone."""
    assert head.table is not None
    rows = max(_LEAST_ROWS, _CHUNK_BYTES // (4 * max(1, len(hidden))))
    logsum, wanted = _sums(hidden.to(head.table.dtype), head, rows, targets, softcap)
    return logsum - wanted


def _logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, softcap: float | None) -> Any:
    narrow = None if bias is None else bias.to(hidden.dtype)
    logits = functional.linear(hidden, weight.to(hidden.dtype), narrow).float()
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def _sums(
    hidden: torch.Tensor, head: HostHead, rows: int, targets: torch.Tensor, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log of the sum of exponentials, logit of the target) of each token [tokens]."""
    logsum = torch.full((len(hidden),), -torch.inf, device=hidden.device)
    wanted = torch.zeros(len(hidden), device=hidden.device)
    for first, weight, bias in head.blocks(rows):
        logits = _logits(hidden, weight, bias, softcap)
        logsum = torch.logaddexp(logsum, torch.logsumexp(logits, dim=-1))
        places, inside = _places(targets, first, len(weight))
        wanted += torch.where(inside, logits.gather(1, places[:, None]).squeeze(1), 0.0)
        del logits  # before the next block's exist
    return logsum, wanted


def _gradient(
    hidden: torch.Tensor,
    head: HostHead,
    rows: int,
    targets: torch.Tensor,
    softcap: float | None,
    logsum: torch.Tensor,
) -> torch.Tensor:
    """[tokens, hidden] in fp32."""
    total = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    for first, weight, bias in head.blocks(rows):
        logits = _logits(hidden, weight, bias, softcap)
        slope = _slope(logits, *_places(targets, first, len(weight)), softcap, logsum)
        del logits
        total += slope.to(hidden.dtype) @ weight.to(hidden.dtype)
        del slope  # before the next block's logits exist
    return total


def _slope(
    logits: torch.Tensor,
    places: torch.Tensor,
    inside: torch.Tensor,
    softcap: float | None,
    logsum: torch.Tensor,
) -> torch.Tensor:
    """The loss's gradient of a block's logits, in fp32."""
    slope = (logits - logsum[:, None]).exp_()
    slope.scatter_add_(1, places[:, None], -inside[:, None].to(slope.dtype))
    if softcap:
        slope *= (logits / softcap).square_().neg_().add_(1)
    return slope


def _places(targets: torch.Tensor, first: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns of the targets in the block (0 for those elsewhere), and which are in it."""
    inside = (targets >= first) & (targets < first + count)
    return torch.where(inside, targets - first, 0), inside
