"""WhatsApp's text export to conversations, in the date styles of its apps and countries.

    15/01/24, 10:32 - Asha: text            Android; . and - part dates too, am and pm in many spellings
    [15/01/2024, 10:32:15] Asha: text       iPhone
Lines that begin with no date go on with the message before. Whether day or month stands first is told by the file: a
number above 12, else the order in which the dates rise, else the day.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from charkha.data.conversations import Message, as_conversations, choose_assistant
from charkha.data.decoding import TextEncoding
from charkha.data.records import OpenFile

_SPACE = "[ \u00a0\u202f]"
_HEADER = re.compile(
    rf"[\u200e\u200f]*\[?(\d{{1,4}})[/.\-](\d{{1,2}})[/.\-](\d{{2,4}}),?{_SPACE}+"
    rf"(\d{{1,2}})[:.](\d{{2}})(?:[:.](\d{{2}}))?(?:{_SPACE}*([AaPp])\.?{_SPACE}?[Mm]\.?)?"
    rf"(?:\]{_SPACE}*|{_SPACE}+[-–]{_SPACE}+)(.*)",
    re.DOTALL,
)
_AUTHOR = re.compile(r"[\u200e\u200f]*([^:\n]{1,80}):(?: |(?=\S)|$)(.*)", re.DOTALL)
_WORDLESS = re.compile(
    r"[\u200e\u200f]*(?:<[^<>\n]*omitted>|<Media [^<>\n]*>|"
    r"(?:image|video|audio|sticker|GIF|document|Contact card) omitted|"
    r"This message was deleted\.?|You deleted this message\.?|null|Missed (?:voice|video) call.*)[\u200e\u200f]*",
    re.IGNORECASE,
)
_LOOKED_AT = 50


@dataclass(frozen=True)
class _Entry:
    """A dated entry: the three numbers of its date as they stand, seconds of the day, and what follows."""

    date: tuple[int, int, int]
    second: int
    text: str
    line: int


def is_whatsapp(head: str) -> bool:
    """Whether a text begins as an export does: a dated first line, and at least a quarter of the first fifty."""
    lines = [line for line in head.split("\n")[:_LOOKED_AT] if line.strip()]
    dated = [_HEADER.match(line) is not None for line in lines]
    return bool(dated) and dated[0] and sum(dated) * 4 >= len(dated) and _any_author(lines)


def _any_author(lines: Sequence[str]) -> bool:
    matches = [_HEADER.match(line) for line in lines]
    return any(match is not None and _AUTHOR.match(match[8]) is not None for match in matches)


def whatsapp_file(path: Path, text: str, encoding: TextEncoding, assistant: str | None) -> OpenFile:
    """The export as rows of the layout `messages`. Raises DataError where nobody answers."""
    entries = _entries(text)
    order, told_order = _date_order(entries)
    authored = [(entry, _AUTHOR.match(entry.text)) for entry in entries]
    found = [(entry, match[1].strip(), match[2].strip()) for entry, match in authored if match is not None]
    messages = [
        Message(author, words, _time_s(entry, order), entry.line)
        for entry, author, words in found
        if words and not _WORDLESS.fullmatch(words)
    ]
    name, told = choose_assistant(messages, assistant, str(path))
    block, more = as_conversations(messages, name)
    notes = [f"WhatsApp export: {len(messages)} messages, dates read as {told_order}", told, *more]
    for count, what in ((len(entries) - len(found), "lines of the app itself"), (len(found) - len(messages), "media")):
        if count:
            notes.append(f"{count} entries were left out: {what}")
    return OpenFile("whatsapp", encoding.name, iter([block]), (*encoding.notes, *notes))


def _entries(text: str) -> list[_Entry]:
    entries: list[_Entry] = []
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), start=1):
        match = _HEADER.match(line)
        if match is not None:
            first, second, third, hour, minute, seconds, half, rest = match.groups()
            moment = (_hour(int(hour), half) * 60 + int(minute)) * 60 + int(seconds or 0)
            entries.append(_Entry((int(first), int(second), int(third)), moment, rest, number))
        elif entries:
            entries[-1] = replace(entries[-1], text=f"{entries[-1].text}\n{line}")
    return entries


def _hour(hour: int, half: str | None) -> int:
    if half is None:
        return hour
    return hour % 12 + (12 if half in "Pp" else 0)


def _date_order(entries: Sequence[_Entry]) -> tuple[str, str]:
    """(`dmy`, `mdy` or `ymd`; the same in words)."""
    if any(entry.date[0] > 31 for entry in entries):
        return "ymd", "year, month, day"
    if any(entry.date[0] > 12 for entry in entries):
        return "dmy", "day, month, year"
    if any(entry.date[1] > 12 for entry in entries) or _falls(entries, "dmy") > _falls(entries, "mdy"):
        return "mdy", "month, day, year"
    return "dmy", "day, month, year"


def _falls(entries: Sequence[_Entry], order: str) -> int:
    """How often a message is older than the one before it under this reading; an export is in order."""
    times = [_time_s(entry, order) or 0.0 for entry in entries]
    return sum(later < earlier for earlier, later in itertools.pairwise(times))


def _time_s(entry: _Entry, order: str) -> float | None:
    parts = dict(zip(order, entry.date, strict=True))
    year = parts["y"] + 2000 if parts["y"] < 100 else parts["y"]
    try:
        return datetime(year, parts["m"], parts["d"]).toordinal() * 86400.0 + entry.second
    except ValueError:
        return None
