"""Models whose linear layers are a subclass of nn.Linear that computes the same, built of nn.Linear instead.

transformers quantizes modules of exactly the type nn.Linear and passes over every other in silence. Falcon's layers are
FalconLinear: `input @ weight.T`, then `+ bias`, which is nn.Linear but for one rounding of the bias in 16 bits. Weight
names and shapes stay, so files, adapters and merges are those of the model as published.
"""

from __future__ import annotations

from typing import Any

SAME_AS_LINEAR = frozenset({"FalconLinear"})


def quantizable_class(model_type: str | None) -> Any:
    """The class whose `from_pretrained` quantizes every linear layer of this architecture."""
    from transformers import AutoModelForCausalLM, FalconForCausalLM

    if model_type != "falcon":
        return AutoModelForCausalLM

    class FalconOfPlainLinears(FalconForCausalLM):  # type: ignore[misc]  # transformers ships no types
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            make_linears_plain(self)

    return FalconOfPlainLinears


def make_linears_plain(model: Any) -> None:
    """Puts an empty nn.Linear in the place of every layer of a class in SAME_AS_LINEAR; meant for unfilled models."""
    import torch

    for name, module in list(model.named_modules()):
        if type(module).__name__ not in SAME_AS_LINEAR:
            continue
        weight = module.weight
        with torch.device(weight.device):
            plain = torch.nn.Linear(
                module.in_features, module.out_features, bias=module.bias is not None, dtype=weight.dtype
            )
        model.set_submodule(name, plain)
