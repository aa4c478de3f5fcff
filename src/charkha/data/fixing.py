"""Repairs that cannot change what a row teaches, each of them listed; everything else stays a problem.

Taken out: control characters and byte order marks inside text, turns behind the last answer, a turn written twice in a
row, and rows that hold nothing to train. Line ends inside text become `\\n`. Not repaired: broken JSON or CSV, wrong
types and roles, turns out of order, since only their owner knows what was meant.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from charkha.data.fields import Fields
from charkha.data.records import Record
from charkha.errors import Problem

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff]")
_LINE_END = re.compile(r"\r\n?")
_ANSWERS = frozenset({"assistant", "gpt", "chatgpt", "bot", "model", "ai", "function_call"})
_NOTHING_TO_TRAIN = frozenset(
    {"missing answer", "missing prompt", "empty text", "no messages", "no assistant turn", "only a system turn"}
)


@dataclass
class Repairs:
    """What was done to one record."""

    line: int
    done: list[Problem] = field(default_factory=list)

    def tell(self, place: str | None, what: str) -> None:
        """Adds one repair, `kind: particulars`."""
        self.done.append(Problem(what, self.line, place))


def repaired(record: Record) -> tuple[Record, tuple[Problem, ...]]:
    """The record with the safe repairs, and what they were."""
    if not isinstance(record.value, dict):
        return record, ()
    repairs = Repairs(record.line)
    value = {name: _clean(part, name, repairs) for name, part in record.value.items()}
    for name in ("messages", "conversations"):
        messages = value.get(name)
        if isinstance(messages, list):
            value[name] = _whole_turns(messages, name, repairs)
    return (Record(value, record.line) if repairs.done else record), tuple(repairs.done)


def is_left_out(problem: Problem) -> bool:
    """Whether a row with this problem holds nothing to train, so that leaving it out loses nothing."""
    return problem.reason.split(":", 1)[0] in _NOTHING_TO_TRAIN


def left_out(problem: Problem) -> Problem:
    """The problem told as a repair."""
    return Problem(f"row left out: {problem.reason}", problem.line, problem.field)


def _clean(value: object, place: str, repairs: Repairs) -> object:
    """The value with clean text at every depth that messages have."""
    if isinstance(value, str):
        return _clean_text(value, place, repairs)
    if isinstance(value, list):
        return [_clean(part, f"{place}[{index}]", repairs) for index, part in enumerate(value)]
    if isinstance(value, dict):
        return {name: _clean(part, f"{place}.{name}", repairs) for name, part in value.items()}
    return value


def _clean_text(text: str, place: str, repairs: Repairs) -> str:
    cleaned, ends = _LINE_END.subn("\n", text)
    if ends:
        repairs.tell(place, f"line ends: {ends} made \\n")
    cleaned, controls = _CONTROL.subn("", cleaned)
    if controls:
        repairs.tell(place, f"control characters: {controls} taken out")
    return cleaned


def _whole_turns(messages: list[object], place: str, repairs: Repairs) -> list[object]:
    kept: list[object] = []
    for index, message in enumerate(messages):
        if kept and message == kept[-1]:
            repairs.tell(f"{place}[{index}]", "turn left out: it repeats the one before word for word")
        else:
            kept.append(message)
    answers = [index for index, message in enumerate(kept) if _is_answer(message)]
    if answers and answers[-1] + 1 < len(kept):
        repairs.tell(place, f"turns left out: {len(kept) - answers[-1] - 1} behind the last answer")
        del kept[answers[-1] + 1 :]
    return kept


def _is_answer(message: object) -> bool:
    if not isinstance(message, dict):
        return False
    fields: Fields = message
    role = fields.get("role", fields.get("from"))
    return isinstance(role, str) and role.lower() in _ANSWERS
