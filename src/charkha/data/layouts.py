"""Which layout a file has, told from its columns over the whole file, and how columns are renamed by `data.map`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from charkha.data.records import Record
from charkha.errors import DataError, UsageError

_PROMPT_NAMES = ("prompt", "question", "query", "instruction", "input", "problem", "source", "context")
_COMPLETION_NAMES = ("completion", "answer", "response", "output", "solution", "target", "reply")
_MEDIA_COLUMNS = ("image", "images", "video", "videos", "audio", "audios")


@dataclass(frozen=True)
class Layout:
    """A named set of columns. A row belongs to it when it has all `required` ones."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column this layout reads; all others are ignored and named in a note."""
        return self.required + self.optional


# In order of preference where rows fit several: a richer layout before a poorer one.
LAYOUTS = (
    Layout("messages", ("messages",)),
    Layout("sharegpt", ("conversations",), ("system",)),
    Layout("alpaca", ("instruction", "output"), ("input", "system", "history")),
    Layout("prompt_completion", ("prompt", "completion")),
    Layout("text", ("text",)),
)
_BY_NAME = {layout.name: layout for layout in LAYOUTS}
_MAPPABLE = tuple(dict.fromkeys(column for layout in LAYOUTS for column in layout.columns))


def columns_of(records: Iterable[Record]) -> tuple[str, ...]:
    """The columns of all rows, in the order in which they first appear."""
    names: dict[str, None] = {}
    for record in records:
        if isinstance(record.value, dict):
            names.update(dict.fromkeys(record.value))
    return tuple(names)


def rename_columns(path: Path, records: tuple[Record, ...], mapping: Mapping[str, str]) -> tuple[Record, ...]:
    """The records with `mapping` (our name -> the file's column) applied.

    Raises UsageError for a name of ours that does not exist, DataError for a column that the file does not have.
    """
    unknown = [name for name in mapping if name not in _MAPPABLE]
    if unknown:
        raise UsageError(f"data.map: {unknown[0]!r} is no column of ours", remedy=f"map one of {', '.join(_MAPPABLE)}")
    columns = columns_of(records)
    missing = sorted(set(mapping.values()) - set(columns))
    if missing and columns:
        message = (
            f"data.map names the column {missing[0]!r}, which the file does not have; it has: {', '.join(columns)}"
        )
        raise DataError(message, where=str(path), remedy="correct data.map (or --map)")
    return tuple(_renamed(record, mapping) for record in records)


def _renamed(record: Record, mapping: Mapping[str, str]) -> Record:
    if not isinstance(record.value, dict):
        return record
    taken = set(mapping.values()) | set(mapping)
    value = {name: part for name, part in record.value.items() if name not in taken}
    value.update({ours: record.value[theirs] for ours, theirs in mapping.items() if theirs in record.value})
    return Record(value, record.line)


def choose_layout(path: Path, records: tuple[Record, ...], wanted: str, mapping: Mapping[str, str]) -> Layout:
    """The layout asked for, or the one that most rows have the columns of.

    Raises DataError naming the columns found when there is none, and for preference data and pictures.
    """
    columns = columns_of(records)
    _refuse_media(path, records)
    if wanted != "auto":
        return _layout_asked_for(path, wanted, columns)
    _refuse_preference(path, records, columns)
    counts = _rows_by_layout(records, mapping)
    best = max(LAYOUTS, key=lambda layout: counts[layout.name])  # max keeps the first of equals
    if counts[best.name] == 0:
        raise _unrecognised(path, columns)
    return best


def _rows_by_layout(records: tuple[Record, ...], mapping: Mapping[str, str]) -> Counter[str]:
    """How many rows have all columns of each layout; with a mapping only layouts that use it count."""
    candidates = [layout for layout in LAYOUTS if set(mapping) <= set(layout.columns)]
    counts: Counter[str] = Counter()
    for record in records:
        value = record.value
        if isinstance(value, dict):
            counts.update(layout.name for layout in candidates if all(name in value for name in layout.required))
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


def _refuse_media(path: Path, records: tuple[Record, ...]) -> None:
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


def _refuse_preference(path: Path, records: tuple[Record, ...], columns: tuple[str, ...]) -> None:
    found = None
    if {"chosen", "rejected"} <= set(columns):
        found = "chosen, rejected"
    elif "label" in columns and {"messages", "completion"} & set(columns) and _has_boolean_label(records):
        found = "label"
    if found is not None:
        message = f"this is preference data (columns {found}), not training answers; it has: {', '.join(columns)}"
        remedy = (
            "plain training needs one answer a row: name the format (messages, prompt_completion), "
            "or map the column of the good answer"
        )
        raise DataError(message, where=str(path), remedy=remedy)


def _has_boolean_label(records: tuple[Record, ...]) -> bool:
    return any(isinstance(record.value, dict) and isinstance(record.value.get("label"), bool) for record in records)


def _unrecognised(path: Path, columns: tuple[str, ...]) -> DataError:
    if not columns:
        return DataError("no row is an object with named columns", where=str(path), remedy=_mapping_remedy(columns))
    known = "; ".join(f"{layout.name}: {', '.join(layout.required)}" for layout in LAYOUTS)
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
