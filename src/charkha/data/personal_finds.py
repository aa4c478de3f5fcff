"""One piece of personal data in one text, and the kinds there are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Confidence = Literal["high", "medium"]

# Public facts about places: told and masked, but never a reason to refuse training.
NOT_A_PERSON = frozenset({"ifsc", "pin_code"})


@dataclass(frozen=True, slots=True)
class Find:
    """Characters start to end of a text are of this kind. The value itself is never kept."""

    kind: str
    start: int
    end: int
    confidence: Confidence

    @property
    def blocks(self) -> bool:
        """Whether training refuses such data until its user has decided."""
        return self.confidence == "high" and self.kind not in NOT_A_PERSON
