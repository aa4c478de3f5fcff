"""A few optimizer steps on a base with an adapter, resident or streamed, and whether two such runs are the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from charkha.backends.base import AdapterSpec, BaseModelSpec, Streaming

ALL_LINEAR = AdapterSpec("lora", 4, 8, 0.1, "all-linear")


@dataclass(frozen=True)
class Steps:
    """What a run of a few steps left: losses, every gradient of every step, the adapter, logits without gradients."""

    losses: list[float]
    gradients: list[Any]
    weights: dict[str, Any]
    logits: Any
    model: Any
    offload: Any = None  # what moved layer inputs, where they were moved


def run_steps(
    folder: Path,
    *,
    streaming: Streaming | None = None,
    adapter: AdapterSpec = ALL_LINEAR,
    quantization: str = "nf4",
    dtype: Any = "fp32",
    reentrant: bool = False,
    selective: bool = False,
    offload: bool = False,
    tokens: int = 12,
    steps: int = 2,
    prepare: Callable[[Any], None] = lambda engine: None,
) -> Steps:
    """Two micro batches a step; `prepare` is called with the engine of a streamed base before the first."""
    import torch

    from charkha.backends.torch.activation_offload import copies_for, offload_activations
    from charkha.backends.torch.adapters import attach_adapter
    from charkha.backends.torch.model import load_base
    from charkha.backends.torch.streamed_model import engine_of

    base = load_base(BaseModelSpec(folder, dtype, "sdpa", quantization, "cpu", streaming))
    torch.manual_seed(1)
    model = attach_adapter(base, adapter, True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    moved = offload_activations(model, copies_for("cpu")) if offload else None
    if selective:
        from trl.models.selective_activation_checkpointing import enable_selective_activation_checkpointing

        enable_selective_activation_checkpointing(model)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    if streaming is not None:
        prepare(engine_of(model))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    torch.manual_seed(2)
    losses, gradients = [], []
    for _ in range(steps):
        for _ in range(2):
            ids = torch.randint(3, 300, (2, tokens))
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            losses.append(loss.item())
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in trained]))
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    weights = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    return Steps(losses, gradients, weights, logits, model, moved)


def same(left: Steps, right: Steps) -> bool:
    """Bit for bit."""
    import torch

    return (
        left.losses == right.losses
        and all(torch.equal(a, b) for a, b in zip(left.gradients, right.gradients, strict=True))
        and left.weights.keys() == right.weights.keys()
        and all(torch.equal(value, right.weights[name]) for name, value in left.weights.items())
        and torch.equal(left.logits, right.logits)
    )
