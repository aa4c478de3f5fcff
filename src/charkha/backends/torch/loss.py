"""The training loss, computed only where a token is trained, and for large vocabularies without holding all logits.

Three ways, all the same number up to the rounding of sums:

- own      the model's own loss over every position (models that add terms of their own, such as expert routers)
- full     logits of the columns in which some row has a trained token, one cross-entropy over them
- chunked  hidden states of the trained tokens only; logits of a few at a time, whose gradient is taken at once
           (as in Liger and TRL's fused head), so no more than one chunk of logits exists

Not covered by `chunked`: models whose logits are more than a plain linear head of the last hidden state; a trial at the
start finds them, and they take `full`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from charkha.backends.torch.batches import IGNORED
from charkha.backends.torch.head_loss import StreamedHeadLoss, streamed_losses
from charkha.backends.torch.host_tables import HostHead

_CHUNK_BYTES = 64 << 20  # fp32 logits of one chunk


def choose_loss(model: Any, wanted: str, head_alone: Callable[[Any], bool] | None = None) -> str:
    """`own`, `full` or `chunked` for this model; `wanted` is the config's training.loss_head.

    `head_alone` answers whether the head alone makes the logits, where the model cannot be tried.
    """
    causal = causal_model(model)
    config = causal.config.get_text_config()
    if _has_virtual_tokens(model) or hasattr(config, "router_aux_loss_coef"):
        return "own"
    if "logits_to_keep" not in inspect.signature(causal.forward).parameters:
        return "own"
    if isinstance(causal.get_output_embeddings(), HostHead):
        wanted = "chunked"
    return "chunked" if wanted == "chunked" and (head_alone or _head_alone_makes_logits)(causal) else "full"


def _head_alone_makes_logits(causal: Any) -> bool:
    """Whether head(last hidden state), soft-capped, is what the model answers: tried on a few tokens.

    Some models do more between body and head, or after it, and name it in ways that no list keeps up with.
    """
    head = causal.get_output_embeddings()
    if type(head) is not torch.nn.Linear and not isinstance(head, HostHead):
        return False
    caught: list[Any] = []
    hook = causal.get_decoder().register_forward_hook(lambda module, args, output: caught.append(output[0]))
    was_training = causal.training
    causal.eval()  # dropout would draw random numbers
    try:
        with torch.no_grad():
            ids = torch.arange(4, device=next(causal.parameters()).device)[None]
            logits = causal(input_ids=ids, use_cache=False).logits.float()
            if not caught or caught[0].shape[-1] != head.in_features:
                return False
            dtype = head.table.dtype if isinstance(head, HostHead) and head.table else head.weight.dtype
            own = head(caught[0].to(dtype)).float()
    finally:
        hook.remove()
        causal.train(was_training)
    softcap = _softcap(causal)
    own = softcap * torch.tanh(own / softcap) if softcap else own
    # The softcap is rounded in the head's type by the model and in fp32 here.
    slack = 4 * torch.finfo(dtype).eps
    return bool(
        own.shape == logits.shape and torch.allclose(own, logits, rtol=slack, atol=slack * float(logits.abs().max()))
    )


def _softcap(causal: Any) -> float | None:
    return getattr(causal.config.get_text_config(), "final_logit_softcapping", None)


def training_loss(
    model: Any, inputs: dict[str, torch.Tensor], token_count: torch.Tensor | int, way: str
) -> torch.Tensor:
    """Summed negative log-likelihood of the labelled tokens over `token_count`, those of the whole optimizer step.

    `inputs` as `batches.collate` makes them: labels [rows, tokens] with IGNORED where nothing is trained.
    """
    if way == "own":
        outputs = model(**inputs, use_cache=False, num_items_in_batch=token_count)
        # A router's own loss is not 0 for the padding that stands where a step has no rows left.
        return outputs.loss * (inputs["labels"] != IGNORED).any()
    inputs = dict(inputs)
    labels = inputs.pop("labels")
    if way == "chunked":
        return _chunked(model, inputs, labels) / token_count
    columns = (labels[:, 1:] != IGNORED).any(dim=0).nonzero().flatten()
    logits = model(**inputs, use_cache=False, logits_to_keep=columns).logits
    targets = labels[:, columns + 1]
    summed = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return summed / token_count


def _chunked(model: Any, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    hidden = _last_hidden_states(model, inputs)
    rows, columns = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    causal = causal_model(model)
    head = causal.get_output_embeddings()
    if isinstance(head, HostHead):
        return StreamedHeadLoss.apply(hidden[rows, columns], head, labels[rows, columns + 1], _softcap(causal))
    return _HeadLoss.apply(hidden[rows, columns], head.weight, head.bias, labels[rows, columns + 1], _softcap(causal))


def losses_in_chunks(model: Any, inputs: dict[str, torch.Tensor], targets: torch.Tensor) -> list[torch.Tensor]:
    """Negative log-likelihoods of each row's labelled tokens in fp32, without gradients; for a model of way `chunked`.

    `targets` [rows, tokens - 1] are the labels of what comes next. Logits exist for a chunk of tokens at a time.
    """
    hidden = _last_hidden_states(model, inputs)
    wanted = targets != IGNORED
    rows, columns = wanted.nonzero(as_tuple=True)
    causal = causal_model(model)
    head, softcap = causal.get_output_embeddings(), _softcap(causal)
    kept, labels = hidden[rows, columns], targets[rows, columns]
    del hidden
    if isinstance(head, HostHead):
        losses = streamed_losses(kept, head, labels, softcap)
    else:
        step = max(1, _CHUNK_BYTES // (4 * head.weight.shape[0]))
        pairs = zip(kept.split(step), labels.split(step), strict=True)
        losses = torch.cat([kept.new_zeros(0).float(), *(_head_losses(*pair, head, softcap) for pair in pairs)])
    return list(losses.split(wanted.sum(dim=1).tolist()))


def _head_losses(hidden: torch.Tensor, labels: torch.Tensor, head: Any, softcap: float | None) -> torch.Tensor:
    """Of hidden states [tokens, hidden] through a linear head, in the type of its weight, as in _HeadLoss."""
    logits = torch.nn.functional.linear(hidden.to(head.weight.dtype), head.weight, head.bias).float()
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.logsumexp(logits, dim=-1) - logits.gather(1, labels[:, None]).squeeze(1)


def _last_hidden_states(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the head would be given, [rows, tokens, hidden]; the head itself runs on no position."""
    caught: list[torch.Tensor] = []
    body = causal_model(model).get_decoder()
    hook = body.register_forward_hook(lambda module, args, output: caught.append(output[0]))
    try:
        none = torch.empty(0, dtype=torch.long, device=inputs["input_ids"].device)
        model(**inputs, use_cache=False, logits_to_keep=none)
    finally:
        hook.remove()
    return caught[0]


class _HeadLoss(torch.autograd.Function):  # type: ignore[misc]  # its base is untyped
    """Summed cross-entropy of hidden states through a linear head; gradients are made chunk by chunk on the way."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        softcap: float | None,
    ) -> torch.Tensor:
        """Takes hidden [tokens, hidden], weight [vocabulary, hidden], targets [tokens]; gives a scalar in fp32."""
        compute = (
            torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else None
        )
        dtype = compute or weight.dtype
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        head = weight.to(dtype)
        hidden_gradient = torch.empty_like(hidden)
        weight_gradient = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        bias_gradient = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        step = max(1, _CHUNK_BYTES // (4 * weight.shape[0]))
        with torch.autocast(hidden.device.type, enabled=False):
            for first in range(0, len(hidden), step):
                part = hidden[first : first + step].to(dtype)
                logits = torch.nn.functional.linear(part, head, None if bias is None else bias.to(dtype)).float()
                if softcap:
                    logits = softcap * torch.tanh(logits / softcap)
                wanted = targets[first : first + step]
                logsum = torch.logsumexp(logits, dim=-1)
                total += (logsum - logits.gather(1, wanted[:, None]).squeeze(1)).sum()
                slope = torch.exp(logits - logsum[:, None])
                slope.scatter_add_(1, wanted[:, None], torch.full_like(wanted, -1, dtype=slope.dtype)[:, None])
                if softcap:
                    slope *= (logits / softcap).square_().neg_().add_(1)  # in place: no third tensor of this size
                narrow = slope.to(dtype)
                hidden_gradient[first : first + step] = narrow @ head
                if weight_gradient is not None:
                    weight_gradient += (narrow.T @ part).to(weight.dtype)
                if bias_gradient is not None:
                    bias_gradient += slope.sum(dim=0).to(bias_gradient.dtype)
        ctx.gradients = (hidden_gradient, weight_gradient, bias_gradient)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Scales what the forward pass made; it can be asked once."""
        hidden, weight, bias = ctx.gradients
        ctx.gradients = None
        scaled = [None if part is None else part.mul_(gradient.to(part.dtype)) for part in (hidden, weight, bias)]
        return (*scaled, None, None)


def causal_model(model: Any) -> Any:
    """The transformers model with the head, under whatever adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _has_virtual_tokens(model: Any) -> bool:
    """Whether the adapter puts tokens of its own in front, so that logits are longer than the rows."""
    return any(getattr(config, "num_virtual_tokens", 0) for config in getattr(model, "peft_config", {}).values())
