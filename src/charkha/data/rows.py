"""The three kinds of training row, whatever file they came from.

A row is immutable text plus the line it stood on, so that every later complaint can name its place.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Turn:
    """One message. `weight` is None (trained if it is the assistant's), 0 (never trained) or 1, as OpenAI has it."""

    role: Role
    content: str
    weight: int | None = None

    @property
    def is_trained(self) -> bool:
        """Whether `train_on: responses` trains this turn."""
        return self.role == "assistant" and self.weight != 0


@dataclass(frozen=True, slots=True)
class ChatRow:
    """A conversation that ends with the assistant."""

    turns: tuple[Turn, ...]
    line: int | None = None


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A prompt and its completion, joined exactly as they stand."""

    prompt: str
    completion: str
    line: int | None = None


@dataclass(frozen=True, slots=True)
class TextRow:
    """A document that is trained from its first to its last token."""

    text: str
    line: int | None = None


Row = ChatRow | PromptRow | TextRow


def row_as_record(row: Row) -> dict[str, object]:
    """The row in the layout of our own JSONL files: `messages`, `prompt` + `completion`, or `text`."""
    if isinstance(row, ChatRow):
        return {"messages": [_turn_as_record(turn) for turn in row.turns]}
    if isinstance(row, PromptRow):
        return {"prompt": row.prompt, "completion": row.completion}
    return {"text": row.text}


def _turn_as_record(turn: Turn) -> dict[str, object]:
    record: dict[str, object] = {"role": turn.role, "content": turn.content}
    if turn.weight is not None:
        record["weight"] = turn.weight
    return record


def content_hash(row: Row) -> str:
    """sha256 of what the row says, without the line it stood on: equal for exact duplicates."""
    text = json.dumps(row_as_record(row), ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def dataset_fingerprint(rows: Iterable[Row]) -> str:
    """sha256 over the rows in their order: the same data in another order is another data set."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(content_hash(row).encode("ascii"))
    return digest.hexdigest()
