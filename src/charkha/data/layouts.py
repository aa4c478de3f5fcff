"""Which layout a file has, told from its columns over the whole file, and how columns are renamed by `data.map`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from charkha.data.records import Record
from charkha.errors import DataError, UsageError

_PROMPT_NAMES = ("prompt", "question", "query", "instruction", "input", "problem", "source", "context")
_COMPLETION_NAMES = ("completion", "answer", "response", "output", "solution", "target", "reply")
_MEDIA_COLUMNS = ("image", "images", "video", "videos", "audio", "audios")


@dataclass(frozen=True)
class Layout:
    """A named set of columns. A row belongs to it when it has all `required` ones and, if any are named, one of
    `one_of`; where `label` is named it must hold true or false.
    """

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    one_of: tuple[str, ...] = ()
    label: str | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column this layout reads; all others are ignored and named in a note."""
        return self.required + self.one_of + self.optional

    def fits(self, value: Mapping[str, object]) -> bool:
        """Whether a row has what the layout needs."""
        if not all(name in value for name in self.required):
            return False
        if self.label is not None and not isinstance(value[self.label], bool):
            return False
        return not self.one_of or any(name in value for name in self.one_of)


_TOOLS = ("tools", "functions")
_ASKED = ("messages", "conversations", "prompt", "question", "instruction", "input")
# In order of preference where rows fit several: a richer layout before a poorer one.
LAYOUTS = (
    Layout("preference", ("chosen", "rejected"), (*_ASKED, "system", *_TOOLS)),
    Layout(
        "kto", ("label",), (*_ASKED, "system", *_TOOLS), ("messages", "conversations", "completion", "output"), "label"
    ),
    Layout(
        "kto",
        ("kto_tag",),
        (*_ASKED, "system", *_TOOLS),
        ("messages", "conversations", "completion", "output"),
        "kto_tag",
    ),
    Layout("messages", ("messages",), _TOOLS),
    Layout("sharegpt", ("conversations",), ("system", *_TOOLS)),
    Layout("alpaca", ("instruction", "output"), ("input", "system", "history")),
    Layout("oasst", ("message_tree_id", "prompt")),
    Layout("prompt_completion", ("prompt", "completion"), _TOOLS),
    Layout("text", ("text",)),
)
_BY_NAME = {layout.name: layout for layout in reversed(LAYOUTS)}
_MAPPABLE = tuple(dict.fromkeys(column for layout in LAYOUTS for column in layout.columns))
_SFT_FIRST = ("messages", "sharegpt", "alpaca", "prompt_completion", "text")


def columns_of(records: Iterable[Record]) -> tuple[str, ...]:
    """The columns of all rows, in the order in which they first appear."""
    names: dict[str, None] = {}
    for record in records:
        if isinstance(record.value, dict):
            names.update(dict.fromkeys(record.value))
    return tuple(names)


def check_mapping(path: Path, columns: Sequence[str], mapping: Mapping[str, str]) -> None:
    """Raises UsageError for a name of ours that does not exist, DataError for a column that the file does not have."""
    unknown = [name for name in mapping if name not in _MAPPABLE]
    if unknown:
        raise UsageError(f"data.map: {unknown[0]!r} is no column of ours", remedy=f"map one of {', '.join(_MAPPABLE)}")
    missing = sorted(set(mapping.values()) - set(columns))
    if missing and columns:
        message = (
            f"data.map names the column {missing[0]!r}, which the file does not have; it has: {', '.join(columns)}"
        )
        raise DataError(message, where=str(path), remedy="correct data.map (or --map)")


def renamed(record: Record, mapping: Mapping[str, str]) -> Record:
    """The record with `mapping` (our name -> the file's column) applied."""
    if not mapping or not isinstance(record.value, dict):
        return record
    taken = set(mapping.values()) | set(mapping)
    value = {name: part for name, part in record.value.items() if name not in taken}
    value.update({ours: record.value[theirs] for ours, theirs in mapping.items() if theirs in record.value})
    return Record(value, record.line)


def choose_layout(path: Path, records: Sequence[Record], wanted: str, mapping: Mapping[str, str]) -> Layout:
    """The layout asked for, or the one that most of these records have the columns of.

    Raises DataError naming the columns found when there is none, and for pictures.
    """
    columns = columns_of(records)
    refuse_media(path, records)
    if wanted != "auto":
        return _layout_asked_for(path, wanted, columns)
    counts = _rows_by_layout(records, mapping)
    best = max(LAYOUTS, key=lambda layout: counts[layout])  # max keeps the first of equals
    if counts[best] == 0:
        raise _unrecognised(path, columns)
    return best


def _rows_by_layout(records: Iterable[Record], mapping: Mapping[str, str]) -> Counter[Layout]:
    """How many rows fit each layout; with a mapping only layouts that use it count."""
    candidates = [layout for layout in LAYOUTS if set(mapping) <= set(layout.columns)]
    counts: Counter[Layout] = Counter()
    for record in records:
        value = record.value
        if isinstance(value, dict):
            counts.update(layout for layout in candidates if layout.fits(value))
    return counts


def _layout_asked_for(path: Path, wanted: str, columns: tuple[str, ...]) -> Layout:
    layout = _BY_NAME.get(wanted)
    if layout is None:
        raise UsageError(f"data.format: {wanted!r} is not read", remedy=f"use auto or one of {', '.join(_BY_NAME)}")
    missing = [name for name in layout.required if name not in columns]
    if missing:
        message = f"format {wanted} needs the column {missing[0]!r}; the file has: {', '.join(columns) or 'none'}"
        raise DataError(message, where=str(path), remedy=_mapping_remedy(columns))
    return layout


def refuse_media(path: Path, records: Iterable[Record]) -> None:
    """Raises DataError at the first row that holds pictures, sound or video."""
    for record in records:
        value = record.value
        if not isinstance(value, dict):
            continue
        column = next((name for name in _MEDIA_COLUMNS if value.get(name)), None)
        if column is None and has_media_part(value.get("messages")):
            column = "messages"
        if column is not None:
            raise DataError(
                f"the rows hold pictures, sound or video (column {column!r}); only text is trained",
                where=f"{path}:{record.line}",
                remedy=f"remove the rows that need {column!r}, or use a tool for multimodal models",
            )


def has_media_part(messages: object) -> bool:
    """Whether a message's content is a list of parts of which one is not text."""
    if not isinstance(messages, list):
        return False
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return any(isinstance(part, dict) and part.get("type") not in (None, "text") for part in parts)


def _unrecognised(path: Path, columns: tuple[str, ...]) -> DataError:
    if not columns:
        return DataError("no row is an object with named columns", where=str(path), remedy=_mapping_remedy(columns))
    known = "; ".join(f"{name}: {', '.join(_BY_NAME[name].required)}" for name in (*_SFT_FIRST, "preference", "kto"))
    message = f"the format is not recognised from the columns: {', '.join(columns)} (known: {known})"
    return DataError(message, where=str(path), remedy=_mapping_remedy(columns))


def _mapping_remedy(columns: tuple[str, ...]) -> str:
    """How to say which column is which, with the file's own names where they can be guessed."""
    lowered = {name.lower(): name for name in reversed(columns)}
    prompt = next((lowered[name] for name in _PROMPT_NAMES if name in lowered), None)
    completion = next((lowered[name] for name in _COMPLETION_NAMES if name in lowered), None)
    example = ""
    if prompt is None or completion is None or prompt == completion:
        example, prompt, completion = "for example ", "question", "answer"
    return (
        f"say which column is which: {example}data.map: {{prompt: {prompt}, completion: {completion}}} in the config, "
        f"or --map prompt={prompt},completion={completion}"
    )
