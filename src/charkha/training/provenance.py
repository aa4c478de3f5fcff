"""Where a run came from: versions of what ran, and the identity of the base model's files."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from charkha.backends.torch.packed import is_part_of_packed, packed_weights
from charkha.backends.torch.tensor_files import tensors_of_folder
from charkha.plan.base_checks import check_base_config, stored_quantization

_PACKAGES = (
    "charkha", "torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets", "tokenizers",
    "safetensors",
)  # fmt: skip


@dataclass(frozen=True)
class BaseFacts:
    """What the headers say: parameters (4-bit weights counted unpacked) and in which quantization they are stored."""

    parameters: int
    positions: int | None
    vocabulary: int
    stored_quantization: str | None


def package_versions() -> dict[str, str | None]:
    """Installed versions of the packages that decide the numbers."""
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def base_facts(folder: Path) -> BaseFacts:
    """Facts of the base, read from config.json and the headers of the weight files only.

    Raises EnvironmentProblem for a folder that charkha cannot train on.
    """
    from charkha.backends.torch.base_config import read_base_config

    config = read_base_config(folder)
    check_base_config(config, str(folder))
    tensors = {tensor.name: tensor for part in tensors_of_folder(folder).values() for tensor in part}
    packed = packed_weights(tensors)
    plain = [tensor for name, tensor in tensors.items() if name not in packed and not is_part_of_packed(name)]
    shapes = [tensor.shape for tensor in plain] + [weight.shape for weight in packed.values()]
    parameters = sum(math.prod(shape) for shape in shapes)
    text = config.get("text_config") or config
    return BaseFacts(
        parameters=parameters,
        positions=text.get("max_position_embeddings"),
        vocabulary=int(text.get("vocab_size") or 0),
        stored_quantization=stored_quantization(config),
    )
