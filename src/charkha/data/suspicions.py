"""What looks wrong in a row that can be used: told as warnings, never a reason to refuse it.

All patterns are in one expression, since every character of the data goes through it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from charkha.data.remedies import with_remedy
from charkha.data.rows import ChatRow, PromptRow, RatedRow, Row, texts_of
from charkha.errors import Problem

_LONGEST_TEXT = 1_000_000
_SHORTEST_REPEAT = 40
_PATTERNS = (
    ("control", r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff]"),
    # Markers of ChatML, Llama 2 and 3, Mistral, Gemma and sentencepiece.
    ("marker", r"<\|[a-z][a-z0-9_]{1,30}\|>|<(?:start|end)_of_turn>|</?s>|\[/?INST\]|<</?SYS>>|<(?:bos|eos|pad|unk)>"),
    ("placeholder", r"\{\{ ?[A-Za-z_][\w. ]{0,40}\}\}"
                    r"|<(?:YOUR|INSERT|ENTER)[ _][A-Za-z_ ]{1,40}>|\[(?:YOUR|INSERT) [A-Za-z ]{1,40}\]"),
    ("html", r"</?(?:div|span|p|br|td|tr|table|font|li|ul|ol|script|style"
             r"|html|body|h[1-6])(?:\s[^<>]{0,200})?/?>|&(?:nbsp|amp|lt|gt|quot);"),
    # Cyrillic letters touching Latin ones (Greek does so in any formula), and letters of two Indic scripts touching.
    ("mixed", r"[A-Za-z][\u0400-\u04ff]|[\u0400-\u04ff][A-Za-z]"
              r"|[\u0904-\u0963][\u0980-\u0df4]|[\u0980-\u0df4][\u0904-\u0963]"),
    # UTF-8 read as Latin-1 or Windows-1252: Ã©, â€™, à¤¨; and the mark of a decoder that gave up.
    ("garbled", r"\u00c3[\u0080-\u00bf]|\u00e2\u20ac[\u2018-\u2122\u0080-\u00bf]|\u00e0[\u00a4-\u00b7][^\s\w]|\ufffd"),
)  # fmt: skip
_ALL = re.compile("|".join(f"(?P<{name}>{pattern})" for name, pattern in _PATTERNS))
# One class of letters, many times as fast to look for: a text without them holds none of the patterns.
_FIRST = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f<\[{&\x7f-\x9f\u00c3\u00e0\u00e2\ufeff\ufffd\u0400-\u04ff\u0980-\u0df4]"
)
_TOLD = {
    "control": ("control character", "U+{code:04X} at character {place}"),
    "marker": ("template marker", "{found!r} at character {place} is read as plain text"),
    "placeholder": ("placeholder", "{found!r} was left in at character {place}"),
    "html": ("HTML", "{found!r} at character {place}"),
    "mixed": ("mixed scripts", "{found!r} at character {place} joins letters of two scripts"),
    "garbled": ("garbled text", "{found!r} at character {place}"),
}


def suspicions_in(row: Row) -> Iterator[Problem]:
    """At most one warning of each class for each field of the row."""
    for field, text in texts_of(row):
        if len(text) > _LONGEST_TEXT:
            yield _warning(f"very long: {len(text)} characters", row, field)
        seen: set[str] = set()
        for match in _ALL.finditer(text) if _FIRST.search(text) else ():
            name = str(match.lastgroup)
            if name not in seen:
                seen.add(name)
                kind, told = _TOLD[name]
                found = told.format(found=match[0][:40], code=ord(match[0][0]), place=match.start())
                yield _warning(f"{kind}: {found}", row, field)
    yield from _repetitions(row)


def _repetitions(row: Row) -> Iterator[Problem]:
    if isinstance(row, PromptRow):
        if row.prompt.strip() == row.completion.strip():
            yield _warning("echo: the completion is the prompt", row, "completion")
        return
    if not isinstance(row, ChatRow | RatedRow):
        return
    first: dict[tuple[str, str], int] = {}
    for index, turn in enumerate(row.turns):
        before = row.turns[index - 1] if index else None
        if turn.role == "assistant" and before is not None and before.content == turn.content:
            yield _warning("echo: the answer says what was asked", row, f"messages[{index}]")
        if len(turn.content) >= _SHORTEST_REPEAT:
            known = first.setdefault((turn.role, turn.content), index)
            if known != index:
                yield _warning(f"repeated turn: it says what turn {known} said", row, f"messages[{index}]")


def _warning(reason: str, row: Row, field: str) -> Problem:
    return with_remedy(Problem(reason, row.line, field))
