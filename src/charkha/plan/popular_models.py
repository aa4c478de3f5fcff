"""Shapes of popular models, so that a plan needs neither network nor download: popular_models.jsonl beside this file.

Numbers only, under the keys of config.json; checked against the hub's files and the parameter counts of transformers.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("popular_models.jsonl")


def popular_config(hub_id: str) -> dict[str, Any] | None:
    """What config.json says about the shape of that model; None for a model that is not in the table."""
    row = _table().get(hub_id.lower())
    if row is not None and "same_as" in row:
        row = _table()[str(row["same_as"]).lower()]
    return None if row is None else {key: value for key, value in row.items() if key != "id"}


def popular_ids() -> list[str]:
    """Every hub id of the table."""
    return [str(row["id"]) for row in _table().values()]


@cache
def _table() -> dict[str, dict[str, Any]]:
    rows = [json.loads(line) for line in TABLE.read_text(encoding="utf-8").splitlines()]
    return {str(row["id"]).lower(): row for row in rows}
