"""The small JSON files of a model folder, read as plain data."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from charkha.errors import EnvironmentProblem


@dataclass(frozen=True)
class SpecialTokens:
    """A tokenizer's special tokens as text; None where it has none.

    `prepends_bos` and `appends_eos` say what its own post-processor puts around a text when asked to.
    """

    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    unk: str | None = None
    prepends_bos: bool = False
    appends_eos: bool = False


def read_model_json(model_dir: Path, name: str) -> dict[str, object]:
    """The object in `model_dir/name`, empty where there is no such file. Raises EnvironmentProblem if it is broken."""
    path = model_dir / name
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise EnvironmentProblem(f"the file cannot be read: {error}", where=str(path), remedy=_FETCH_AGAIN) from error
    if not isinstance(value, dict):
        raise EnvironmentProblem("the file holds no JSON object", where=str(path), remedy=_FETCH_AGAIN)
    return cast(dict[str, object], value)


_FETCH_AGAIN = "bring the model again: `charkha fetch MODEL`"


def special_token_text(model_dir: Path, name: str) -> str | None:
    """The text of `bos_token`, `eos_token`, ... from tokenizer_config.json or special_tokens_map.json."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        value = read_model_json(model_dir, file).get(name)
        if isinstance(value, dict):  # an AddedToken written out
            value = value.get("content")
        if isinstance(value, str) and value:
            return value
    return None


def configured_ids(model_dir: Path, key: str) -> tuple[int, ...]:
    """The ids under `key` (such as `eos_token_id`) in config.json, then generation_config.json; a list counts whole."""
    ids: dict[int, None] = {}
    for file in ("config.json", "generation_config.json"):
        value = read_model_json(model_dir, file).get(key)
        values = value if isinstance(value, list) else [value]
        ids.update(dict.fromkeys(item for item in values if isinstance(item, int) and not isinstance(item, bool)))
    return tuple(ids)
