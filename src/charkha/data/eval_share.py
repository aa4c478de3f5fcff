"""How many rows `data.eval` means as a share or a count, by numbers alone."""

from __future__ import annotations

from charkha.errors import UsageError


def held_out_count(eval_: str | int | float, rows: int) -> int:
    """The number of held-out rows that a share or count means, at least 1 unless it is 0. Raises UsageError."""
    share, count = _share_or_count(eval_)
    if share is not None:
        return 0 if share == 0 else max(1, round(share * rows))
    return count


def is_share_or_count(eval_: str | int | float | None) -> bool:
    """Whether `data.eval` names no file."""
    return not isinstance(eval_, str) or eval_.rstrip().endswith("%")


def _share_or_count(eval_: str | int | float) -> tuple[float | None, int]:
    try:
        if isinstance(eval_, str) and eval_.strip().endswith("%"):
            share = float(eval_.strip()[:-1]) / 100
        elif isinstance(eval_, int) or (isinstance(eval_, str) and eval_.strip().isdigit()):
            if int(eval_) < 0:
                raise ValueError
            return None, int(eval_)
        else:
            share = float(eval_)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise UsageError(
            f"data.eval: {eval_!r} is no share or count of rows", remedy="write for example 5%, 0.05 or 200"
        )
    return share, 0
