"""What two runs that should be the same are compared by."""

from __future__ import annotations

from typing import Any


def losses(events: list[dict[str, Any]]) -> dict[tuple[str, int], float]:
    """Of every step and evaluation, by its place."""
    names = {"step": "loss", "eval": "eval_loss"}
    return {
        (event["event"], event["step"]): event[names[event["event"]]] for event in events if event["event"] in names
    }


def all_equal(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Bit for bit."""
    import torch

    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
