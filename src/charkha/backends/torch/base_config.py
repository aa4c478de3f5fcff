"""A base model's config.json, and our names of its types in torch's words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charkha.errors import EnvironmentProblem

if TYPE_CHECKING:
    import torch


def torch_dtype(name: str) -> torch.dtype:
    """`bf16` -> torch.bfloat16."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def read_base_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder. Raises EnvironmentProblem when there is none or it is not JSON."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EnvironmentProblem(
            "is not a model folder: it has no config.json",
            where=str(folder),
            remedy="give a folder in Hugging Face layout, or a hub id after `charkha fetch`",
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise EnvironmentProblem(f"config.json cannot be read: {error}", where=str(folder)) from None
    if not isinstance(config, dict):
        raise EnvironmentProblem("config.json holds no object", where=str(folder))
    return config
