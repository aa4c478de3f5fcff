"""Unicode normal form C, on request only: Indic text is otherwise passed on code point by code point."""

from __future__ import annotations

import unicodedata
from dataclasses import replace

from charkha.data.rows import ChatRow, PreferenceRow, PromptRow, RatedRow, Row, Turn
from charkha.errors import UsageError


def normalized(row: Row, form: str) -> Row:
    """The row in the form asked for: `none` leaves it as it is, `nfc` composes what can be composed."""
    if form == "none":
        return row
    if form != "nfc":
        raise UsageError(f"data.normalize: {form!r} is not known", remedy="use none or nfc")
    if isinstance(row, ChatRow | RatedRow):
        return replace(row, turns=_turns(row.turns))
    if isinstance(row, PreferenceRow):
        return replace(row, prompt=_turns(row.prompt), chosen=_turns(row.chosen), rejected=_turns(row.rejected))
    if isinstance(row, PromptRow):
        return replace(row, prompt=_nfc(row.prompt), completion=_nfc(row.completion))
    return replace(row, text=_nfc(row.text))


def _turns(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    return tuple(replace(turn, content=_nfc(turn.content)) for turn in turns)


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)
