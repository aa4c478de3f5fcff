"""The kinds of training row, whatever file they came from.

A row is immutable text plus the line it stood on, so that every later complaint can name its place.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, cast

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function the model calls. `arguments` is a JSON object as text, in the order it was written."""

    name: str
    arguments: str
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """One message. `weight` is None (trained if it is the assistant's), 0 (never trained) or 1, as OpenAI has it.

    `name` and `call_id` say which tool a tool turn comes from.
    """

    role: Role
    content: str
    weight: int | None = None
    calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    call_id: str | None = None

    @property
    def is_trained(self) -> bool:
        """Whether `train_on: responses` trains this turn."""
        return self.role == "assistant" and self.weight != 0


@dataclass(frozen=True, slots=True)
class ChatRow:
    """A conversation that ends with the assistant. `tools` is the JSON list of functions the model may call."""

    turns: tuple[Turn, ...]
    line: int | None = None
    tools: str | None = None


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


@dataclass(frozen=True, slots=True)
class PreferenceRow:
    """Two answers to one prompt. `prompt` ends with the user; `chosen` and `rejected` are what follows."""

    prompt: tuple[Turn, ...]
    chosen: tuple[Turn, ...]
    rejected: tuple[Turn, ...]
    line: int | None = None
    tools: str | None = None


@dataclass(frozen=True, slots=True)
class RatedRow:
    """A conversation whose last answer is wanted (`label` true) or not: unpaired preference, as KTO takes it."""

    turns: tuple[Turn, ...]
    label: bool
    line: int | None = None
    tools: str | None = None


Row = ChatRow | PromptRow | TextRow | PreferenceRow | RatedRow


def conversations_of(row: Row) -> Iterator[ChatRow | PromptRow | TextRow]:
    """The row as what a model would be shown: itself, the rated conversation, or both answers of a preference."""
    if isinstance(row, PreferenceRow):
        yield ChatRow((*row.prompt, *row.chosen), row.line, row.tools)
        yield ChatRow((*row.prompt, *row.rejected), row.line, row.tools)
    elif isinstance(row, RatedRow):
        yield ChatRow(row.turns, row.line, row.tools)
    else:
        yield row


def texts_of(row: Row) -> Iterator[tuple[str, str]]:
    """(field, text) of everything that is read or learned in a row, in its order."""
    if isinstance(row, ChatRow | RatedRow):
        yield from (
            (f"messages[{index}].content", turn.content) for index, turn in enumerate(row.turns) if turn.content
        )
    elif isinstance(row, PreferenceRow):
        for field, turns in (("prompt", row.prompt), ("chosen", row.chosen), ("rejected", row.rejected)):
            yield from ((f"{field}[{index}].content", turn.content) for index, turn in enumerate(turns))
    elif isinstance(row, PromptRow):
        yield "prompt", row.prompt
        yield "completion", row.completion
    else:
        yield "text", row.text


def row_as_record(row: Row) -> dict[str, object]:
    """The row in the layout of our own JSONL files: `messages`, `prompt` + `completion`, `text`, preferences."""
    if isinstance(row, PromptRow):
        return {"prompt": row.prompt, "completion": row.completion}
    if isinstance(row, TextRow):
        return {"text": row.text}
    if isinstance(row, PreferenceRow):
        record = {
            name: [turn_as_record(turn) for turn in turns]
            for name, turns in (("prompt", row.prompt), ("chosen", row.chosen), ("rejected", row.rejected))
        }
        return cast(dict[str, object], record) | _tools(row.tools)
    record = {"messages": [turn_as_record(turn) for turn in row.turns]}
    label = {"label": row.label} if isinstance(row, RatedRow) else {}
    return cast(dict[str, object], record) | label | _tools(row.tools)


def _tools(tools: str | None) -> dict[str, object]:
    return {} if tools is None else {"tools": json.loads(tools)}


def turn_as_record(turn: Turn) -> dict[str, object]:
    """A turn as OpenAI's API writes it."""
    record: dict[str, object] = {"role": turn.role, "content": turn.content}
    if turn.calls:
        record["tool_calls"] = [_call_as_record(call) for call in turn.calls]
    if turn.name is not None:
        record["name"] = turn.name
    if turn.call_id is not None:
        record["tool_call_id"] = turn.call_id
    if turn.weight is not None:
        record["weight"] = turn.weight
    return record


def _call_as_record(call: ToolCall) -> dict[str, object]:
    function = {"name": call.name, "arguments": call.arguments}
    record: dict[str, object] = {"type": "function", "function": function}
    return record if call.id is None else {"id": call.id, **record}


def content_hash(row: Row) -> str:
    """sha256 of what the row says, without the line it stood on: equal for exact duplicates."""
    text = json.dumps(row_as_record(row), ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
