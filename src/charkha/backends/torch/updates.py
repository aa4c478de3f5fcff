"""What an adapter does to each weight of its base, as something that can be applied a block of rows at a time.

With s = lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA (https://arxiv.org/abs/2312.03732):
LoRA W + s B A; DoRA m (W + s B A) / |W + s B A| by output row (https://arxiv.org/abs/2402.09353, equation 5); IA3 one
factor for each input of a feed-forward layer, elsewhere for each output and its bias (https://arxiv.org/abs/2205.05638);
a module that was trained whole takes the place of the base's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from charkha.backends.torch.tensor_files import StoredTensor, read_rows, tensors_of_file
from charkha.errors import EnvironmentProblem, UsageError

if TYPE_CHECKING:
    import torch

_PREFIX = "base_model.model."
_PARTS = (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector", ".ia3_l")


class WeightUpdate(Protocol):
    """The change of one weight."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight it belongs to."""
        ...

    def apply(self, block: torch.Tensor, first: int) -> torch.Tensor:
        """Rows `first` onwards of the weight, in fp32, as they are with the adapter; `block` may be changed."""
        ...


@dataclass(frozen=True)
class LowRank:
    """LoRA and rsLoRA, and DoRA where there is a magnitude [out]: B [out, r], A [r, in], in fp32."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    magnitude: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.b.shape[0], self.a.shape[1]

    def apply(self, block: torch.Tensor, first: int) -> torch.Tensor:
        rows = slice(first, first + len(block))
        summed = block + self.scale * (self.b[rows] @ self.a)
        if self.magnitude is None:
            return summed
        return summed * (self.magnitude[rows] / summed.norm(dim=1))[:, None]


@dataclass(frozen=True)
class Scaled:
    """IA3: `factors` [1, in] on the inputs, [out, 1] on the outputs; a bias [out] is scaled as the outputs are."""

    factors: torch.Tensor
    shape: tuple[int, ...]

    def apply(self, block: torch.Tensor, first: int) -> torch.Tensor:
        if self.factors.shape[0] == 1:
            return block * self.factors
        rows = self.factors[first : first + len(block)]
        return block * (rows if block.dim() > 1 else rows[:, 0])


@dataclass(frozen=True)
class Replaced:
    """A weight that was trained whole."""

    values: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def apply(self, block: torch.Tensor, first: int) -> torch.Tensor:
        return read_rows(self.values, first, len(block)).float()


def read_adapter_config(adapter: Path) -> dict[str, Any]:
    """adapter_config.json. Raises EnvironmentProblem when it cannot be read, UsageError for what no merge can do."""
    try:
        config: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EnvironmentProblem(f"adapter_config.json cannot be read: {error}", where=str(adapter)) from None
    if config.get("peft_type") == "PROMPT_TUNING":
        raise UsageError(
            "prompt tuning changes no weight: its virtual tokens stand before every row, so there is nothing to merge",
            where=str(adapter),
            remedy="use the adapter folder with PEFT, or `charkha chat` and `charkha eval`; lora can be merged",
        )
    if config.get("peft_type") not in ("LORA", "IA3"):
        raise UsageError(
            f"the adapter is of type {config.get('peft_type')}, which cannot be merged", where=str(adapter)
        )
    return config


def why_only_in_memory(config: dict[str, Any]) -> str | None:
    """What of the adapter is no matter of single stored weights; None where `read_updates` reads it all."""
    if config.get("target_parameters"):
        return "it adapts 3-D expert weights"
    names = [key for key in ("fan_in_fan_out", "lora_bias", "use_qalora", "use_bdlora") if config.get(key)]
    if config.get("bias", "none") != "none":
        names.append(f"bias {config['bias']}")
    return f"it uses {', '.join(names)}" if names else None


def read_updates(adapter: Path, base_names: Iterable[str]) -> dict[str, WeightUpdate]:
    """Name of a base weight -> its update. Raises UsageError for a tensor that is no part of a known adapter.

    `base_names` are the weights that the base has: an IA3 layer's bias is scaled where there is one.
    """
    config = read_adapter_config(adapter)
    modules: dict[str, dict[str, StoredTensor]] = {}
    updates: dict[str, WeightUpdate] = {}
    for tensor in tensors_of_file(adapter / "adapter_model.safetensors"):
        name = tensor.name.removeprefix(_PREFIX)
        part = next((part for part in _PARTS if name.endswith(part)), None)
        if part is not None:
            modules.setdefault(name.removesuffix(part), {})[part] = tensor
        elif _is_saved(name, config):
            updates[name] = Replaced(tensor)
        else:
            raise UsageError(f"the adapter holds {tensor.name}, which this merge does not cover", where=str(adapter))
    known = set(base_names)
    for module, parts in modules.items():
        updates |= _module_updates(module, parts, config, adapter, known)
    return updates


def _module_updates(
    module: str, parts: dict[str, StoredTensor], config: dict[str, Any], adapter: Path, known: set[str]
) -> dict[str, WeightUpdate]:
    tensors = {part: read_rows(tensor, 0, tensor.shape[0]).float() for part, tensor in parts.items()}
    if ".ia3_l" in tensors:
        factors = tensors[".ia3_l"]
        return _scaled(module, factors, known)
    if not {".lora_A.weight", ".lora_B.weight"} <= set(tensors):
        raise EnvironmentProblem(f"the adapter lacks half of {module}", where=str(adapter))
    a, b = tensors[".lora_A.weight"], tensors[".lora_B.weight"]
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):  # PEFT's own rule; the first pattern that matches counts
            alpha = value
            break
    rank = a.shape[0]  # rank patterns are in the shapes
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    return {f"{module}.weight": LowRank(a, b, scale, tensors.get(".lora_magnitude_vector"))}


def _scaled(module: str, factors: torch.Tensor, known: set[str]) -> dict[str, WeightUpdate]:
    weight, bias = f"{module}.weight", f"{module}.bias"
    on_inputs = factors.shape[0] == 1
    found: dict[str, WeightUpdate] = {
        weight: Scaled(factors, (-1, factors.shape[1]) if on_inputs else (len(factors), -1))
    }
    if bias in known and not on_inputs:
        found[bias] = Scaled(factors, (len(factors),))
    return found


def _is_saved(name: str, config: dict[str, Any]) -> bool:
    """Whether a tensor belongs to a module of modules_to_save, by PEFT's rule: the end of the module's name."""
    return any(f".{wanted}." in f".{name}" for wanted in config.get("modules_to_save") or ())
