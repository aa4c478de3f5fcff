"""The shape of the base that a plan is for: from its folder, the hub's cache, or the table of popular models."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from charkha.config_file import LoadedConfig
from charkha.errors import EnvironmentProblem, UsageError
from charkha.plan.architecture import Architecture, read_architecture
from charkha.plan.base_checks import check_base_config
from charkha.plan.popular_models import popular_config
from charkha.training.base_model import find_base

_NO_CONFIG = "put the model's config.json there"
_COMPARE = "compare it with the config.json that the model's authors publish"


@dataclass(frozen=True)
class BaseShape:
    """A base model as its config.json tells it."""

    config: dict[str, Any]
    folder: Path | None  # None where only the shape is known
    where: str


def find_shape(loaded: LoadedConfig) -> BaseShape:
    """config.json of the base: in its folder, in the hub's cache, or from the table of popular models."""
    try:
        folder = find_base(loaded.config.model, loaded.folder)
    except EnvironmentProblem as problem:
        known = popular_config(loaded.config.model.base)
        if known is None:
            raise UsageError(
                f"the base model {loaded.config.model.base} is not here and not in the table of popular models",
                where=problem.where or "model.base",
                remedy=f"{problem.remedy}; a folder with nothing but its config.json is enough for a plan",
            ) from None
        return BaseShape(known, None, f"{loaded.config.model.base} (table of popular models)")
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            f"cannot be read: {error}", where=str(path), remedy="put the model's config.json there"
        ) from None
    if not isinstance(config, dict):
        raise UsageError("is not a JSON object", where=str(path), remedy=_NO_CONFIG)
    return BaseShape(config, folder, str(path))


def architecture_of(base: BaseShape) -> Architecture:
    """Refusals name the key or the reason, with exit code 2: nothing is wrong with this machine."""
    text_model = {key: value for key, value in base.config.items() if key != "vision_config"}
    try:
        if (
            base.config.get("model_type") != "gpt_oss"
        ):  # its published files are in MXFP4; a plan counts them in 16 bits
            check_base_config(text_model, base.where)
        return read_architecture(base.config)
    except EnvironmentProblem as problem:
        raise UsageError(problem.message, where=base.where, remedy=problem.remedy or _COMPARE) from None
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UsageError(
            f"cannot be understood: {type(error).__name__} {error}",
            where=base.where,
            remedy=_COMPARE,
        ) from None
