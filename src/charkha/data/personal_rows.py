"""Personal data in rows: every text of a row with its place, what was found in some rows, and the texts changed."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from charkha.data.folding import fold
from charkha.data.personal import find_personal
from charkha.data.personal_finds import Confidence, Find
from charkha.data.rows import ChatRow, PreferenceRow, PromptRow, RatedRow, Row, ToolCall, Turn

if TYPE_CHECKING:
    from numpy.typing import NDArray

_KEPT_FINDINGS = 10_000  # of one file; all are counted
_BETWEEN = re.compile(r"[^0-9A-Za-z\u0080-\uffff]")
_AS_TYPED = frozenset({"email", "upi", "ip_address"})
Change = Callable[[str, str], str]  # (field, text) -> text
Value = tuple[str, str]  # kind, and the form that is the same however the value is written


@dataclass(frozen=True, slots=True)
class Finding:
    """One find and its place. `line` counts from 1, `start` and `end` characters of the field; never the value."""

    kind: str
    file: str
    line: int | None
    field: str
    start: int
    end: int
    confidence: Confidence

    @property
    def blocks(self) -> bool:
        """Whether training refuses such data until its user has decided."""
        return Find(self.kind, self.start, self.end, self.confidence).blocks


@dataclass(frozen=True, eq=False)
class RowFinds:
    """What was found in the rows of a block or a file: the first findings, and the first that block; all counted.

    `found` says of each row whether it holds any, bool [rows]. `values` stand in the order of their first appearance.
    """

    findings: tuple[Finding, ...]
    blocking: tuple[Finding, ...]
    counts: Counter[tuple[str, Confidence]]
    blocking_counts: Counter[str]
    found: NDArray[np.bool_]
    values: tuple[Value, ...]
    characters: int

    @property
    def total(self) -> int:
        """How many findings there are."""
        return self.counts.total()


def find_in_rows(path: str, rows: Sequence[Row], kept_kinds: Sequence[str] = ()) -> RowFinds:
    """Looks through every text of the rows for all kinds but `kept_kinds`."""
    findings: list[Finding] = []
    values: dict[Value, None] = {}
    found = np.zeros(len(rows), dtype=np.bool_)
    characters = 0
    for number, row in enumerate(rows):
        for field, text in all_texts_of(row):
            characters += len(text)
            for find in wanted_finds(text, kept_kinds):
                findings.append(Finding(find.kind, path, row.line, field, find.start, find.end, find.confidence))
                values[find.kind, same_form(find.kind, text[find.start : find.end])] = None
                found[number] = True
    blocking = [finding for finding in findings if finding.blocks]
    return RowFinds(
        tuple(findings[:_KEPT_FINDINGS]),
        tuple(blocking[:_KEPT_FINDINGS]),
        Counter((finding.kind, finding.confidence) for finding in findings),
        Counter(finding.kind for finding in blocking),
        found,
        tuple(values),
        characters,
    )


def joined_finds(parts: Sequence[RowFinds]) -> RowFinds:
    """The parts one after the other as one."""
    counts: Counter[tuple[str, Confidence]] = Counter()
    blocking: Counter[str] = Counter()
    for part in parts:
        counts.update(part.counts)
        blocking.update(part.blocking_counts)
    return RowFinds(
        tuple(finding for part in parts for finding in part.findings)[:_KEPT_FINDINGS],
        tuple(finding for part in parts for finding in part.blocking)[:_KEPT_FINDINGS],
        counts,
        blocking,
        np.concatenate([np.zeros(0, dtype=np.bool_), *(part.found for part in parts)]),
        tuple(dict.fromkeys(value for part in parts for value in part.values)),
        sum(part.characters for part in parts),
    )


def wanted_finds(text: str, kept_kinds: Sequence[str]) -> tuple[Find, ...]:
    """The finds of a text, left to right, without those of kinds that are left alone."""
    finds = find_personal(text)
    return tuple(find for find in finds if find.kind not in kept_kinds) if kept_kinds else finds


def same_form(kind: str, value: str) -> str:
    """The value without what may differ in writing: spaces, hyphens, scripts, letter case, a country code."""
    plain = fold(value).text
    if kind == "secret":
        return plain
    if kind in _AS_TYPED:
        return plain.lower()
    compact = _BETWEEN.sub("", plain).upper()
    return compact[-10:] if kind == "mobile" else compact


def all_texts_of(row: Row) -> tuple[tuple[str, str], ...]:
    """(field, text) of all that a row says, tool calls and the list of tools included, in a fixed order."""
    found: list[tuple[str, str]] = []

    def note(field: str, text: str) -> str:
        found.append((field, text))
        return text

    change_texts(row, note)
    return tuple(found)


def change_texts(row: Row, change: Change) -> Row:
    """The row with every text replaced by what `change` makes of it."""
    if isinstance(row, PromptRow):
        return replace(row, prompt=change("prompt", row.prompt), completion=change("completion", row.completion))
    if isinstance(row, ChatRow | RatedRow):
        return replace(row, turns=_turns("messages", row.turns, change), tools=_tools(row.tools, change))
    if isinstance(row, PreferenceRow):
        sides = {name: _turns(name, getattr(row, name), change) for name in ("prompt", "chosen", "rejected")}
        return replace(row, **sides, tools=_tools(row.tools, change))  # type: ignore[arg-type]
    return replace(row, text=change("text", row.text))


def _turns(field: str, turns: Sequence[Turn], change: Change) -> tuple[Turn, ...]:
    return tuple(_turn(f"{field}[{index}]", turn, change) for index, turn in enumerate(turns))


def _turn(field: str, turn: Turn, change: Change) -> Turn:
    content = change(f"{field}.content", turn.content)
    calls = tuple(_call(f"{field}.tool_calls[{index}]", call, change) for index, call in enumerate(turn.calls))
    name, call_id = (_maybe(f"{field}.{part}", getattr(turn, part), change) for part in ("name", "call_id"))
    return replace(turn, content=content, calls=calls, name=name, call_id=call_id)


def _call(field: str, call: ToolCall, change: Change) -> ToolCall:
    name = change(f"{field}.function.name", call.name)
    arguments = _json(f"{field}.function.arguments", call.arguments, change)
    return replace(call, name=name, arguments=arguments, id=_maybe(f"{field}.id", call.id, change))


def _tools(tools: str | None, change: Change) -> str | None:
    return None if tools is None else _json("tools", tools, change)


def _maybe(field: str, text: str | None, change: Change) -> str | None:
    return None if text is None else change(field, text)


def _json(field: str, text: str, change: Change) -> str:
    """JSON as text, value by value, so that it stays JSON; untouched where nothing in it is changed."""
    try:
        value = json.loads(text)
    except ValueError:  # arguments that are no JSON are a problem of their own; as text they are looked through
        return change(field, text)
    changed = _value(field, value, change)
    return text if changed == value else json.dumps(changed, ensure_ascii=False)


def _value(field: str, value: Any, change: Change) -> Any:
    if isinstance(value, str):
        return change(field, value)
    if isinstance(value, int) and not isinstance(value, bool):
        text = str(value)
        changed = change(field, text)
        return value if changed == text else changed
    if isinstance(value, list):
        return [_value(f"{field}[{index}]", part, change) for index, part in enumerate(value)]
    if isinstance(value, dict):
        return {change(f"{field} (a key)", key): _value(f"{field}.{key}", part, change) for key, part in value.items()}
    return value


def numbers_of(values: Sequence[Value]) -> dict[Value, int]:
    """Numbers that depend on nothing but the value, to compare rows by before those in order are known."""
    return {value: int.from_bytes(hashlib.sha256("\0".join(value).encode()).digest()[:12], "big") for value in values}


def numbered(blocks: Sequence[Sequence[Value]]) -> Iterator[dict[Value, int]]:
    """Of each block the numbers of its values: each kind counts from 1, in the order of first appearance."""
    numbers: dict[Value, int] = {}
    last: Counter[str] = Counter()
    for values in blocks:
        for value in values:
            if value not in numbers:
                last[value[0]] += 1
                numbers[value] = last[value[0]]
        yield {value: numbers[value] for value in values}
