"""What should be known of a data file before training: personal data, secrets, repetitions, leaked test rows."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from charkha.data.formats import read_rows
from charkha.data.personal import find_personal
from charkha.data.personal_finds import Confidence, Find
from charkha.data.readers import read_records
from charkha.data.records import Record
from charkha.data.rows import content_hash
from charkha.errors import DataError, FileProblems, UsageError

_NAMED_LENGTH = 64  # a value no longer than this may be what its column's name says
_LAST_NAME = re.compile(r"[^.\[\]]+(?=(?:\[[0-9]+\])*$)")


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


@dataclass(frozen=True)
class ScannedFile:
    """One file: how much of it was read, and what could not be."""

    report: FileProblems
    sha256: str
    characters: int


@dataclass(frozen=True)
class Repetitions:
    """Rows that repeat an earlier one. `near` is None where near-duplicates were not looked for."""

    exact: int
    near: int | None = None


@dataclass(frozen=True)
class ScanResult:
    """Everything found in some files. `leakage` counts rows that also stand in the files held against them; None where
    repetitions were not looked for.
    """

    files: tuple[ScannedFile, ...]
    findings: tuple[Finding, ...]
    duplicates: Repetitions | None
    leakage: Repetitions | None

    @property
    def counts(self) -> dict[str, int]:
        """Findings of each kind, the most frequent first."""
        return dict(Counter(finding.kind for finding in self.findings).most_common())


def scan_files(
    paths: Sequence[Path],
    *,
    against: Sequence[Path] = (),
    format: str = "auto",
    mapping: Mapping[str, str] | None = None,
) -> ScanResult:
    """Personal data in every string and whole number of the files, also in columns that no row uses.

    Raises DataError where a file as a whole cannot be read; lines that cannot are in its report.
    """
    files: list[ScannedFile] = []
    findings: list[Finding] = []
    for path in paths:
        read = read_records(path)
        characters = 0
        for record in read.records:
            for field, text in texts_within(record.value):
                characters += len(text)
                findings += (_placed(find, str(path), record.line, field) for find in find_in_field(field, text))
        report = FileProblems(str(path), None, read.encoding, len(read.records), read.problems)
        files.append(ScannedFile(report, hashlib.sha256(path.read_bytes()).hexdigest(), characters))
    duplicates, leakage = exact_repetitions(paths, against, format, mapping or {})
    return ScanResult(tuple(files), tuple(findings), duplicates, leakage)


def _placed(find: Find, file: str, line: int | None, field: str) -> Finding:
    return Finding(find.kind, file, line, field, find.start, find.end, find.confidence)


def texts_within(value: object, place: str = "") -> Iterator[tuple[str, str]]:
    """(field, text) of every string and whole number in a JSON value: `messages[0].content`."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, dict):
        for name, part in value.items():
            yield from texts_within(part, f"{place}.{name}" if place else str(name))
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from texts_within(part, f"{place}[{index}]")
    elif isinstance(value, int) and not isinstance(value, bool):
        yield place, str(value)


def find_in_field(field: str, text: str) -> tuple[Find, ...]:
    """The finds of one field; a short value is read together with its column's name, which may say what it is."""
    if len(text) > _NAMED_LENGTH or not any(letter.isdigit() or letter == "@" for letter in text):
        return find_personal(text)
    name = _LAST_NAME.search(field)
    lead = f"{name[0]}: " if name else ""
    shift = len(lead)
    return tuple(
        Find(find.kind, find.start - shift, find.end - shift, find.confidence)
        for find in find_personal(lead + text)
        if find.start >= shift
    )


# Repetitions: exact ones only. A row repeats another when it says the same once read, whatever else its line holds.


def exact_repetitions(
    paths: Sequence[Path], against: Sequence[Path], format: str, mapping: Mapping[str, str]
) -> tuple[Repetitions, Repetitions | None]:
    """(rows that repeat an earlier row, rows that also stand in `against` or None without it)."""
    rows = Counter(digest for path in paths for digest in _digests(path, format, mapping))
    duplicates = Repetitions(rows.total() - len(rows))
    if not against:
        return duplicates, None
    held_out = {digest for path in against for digest in _digests(path, format, mapping)}
    return duplicates, Repetitions(sum(count for digest, count in rows.items() if digest in held_out))


def _digests(path: Path, format: str, mapping: Mapping[str, str]) -> Iterable[str]:
    """What identifies each row; of a file in no known layout, each record as it stands."""
    try:
        return [content_hash(row) for row in read_rows(path, format=format, mapping=mapping).rows]
    except (DataError, UsageError):
        if format != "auto" or mapping:
            raise
        return [_record_digest(record) for record in read_records(path).records]


def _record_digest(record: Record) -> str:
    text = json.dumps(record.value, ensure_ascii=False, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
