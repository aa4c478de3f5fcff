"""What should be known of a data file before training: personal data, secrets, repetitions, leaked test rows."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from charkha.data.duplicates import duplicates_in_files, leakage_in_files
from charkha.data.formats import ReadOptions
from charkha.data.personal import find_personal
from charkha.data.personal_finds import Find
from charkha.data.personal_rows import Finding
from charkha.data.readers import open_records
from charkha.data.records import Block, Record
from charkha.data.workers import map_ordered, worker_count
from charkha.errors import DataError, FileProblems, Problem, UsageError
from charkha.store.durable import sha256_of_file

_NAMED_LENGTH = 64  # a value no longer than this may be what its column's name says
_LAST_NAME = re.compile(r"[^.\[\]]+(?=(?:\[[0-9]+\])*$)")


@dataclass(frozen=True)
class ScannedFile:
    """One file: how much of it was read, and what could not be."""

    report: FileProblems
    sha256: str
    characters: int


@dataclass(frozen=True)
class Repetitions:
    """Rows that repeat an earlier one, exactly or nearly. `near` is None where only whole records were compared."""

    exact: int
    near: int | None


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
    options: ReadOptions | None = None,
    workers: int | None = None,
) -> ScanResult:
    """Personal data in every string and whole number of the files, also in columns that no row uses.

    Raises DataError where a file as a whole cannot be read; lines that cannot are in its report.
    """
    options = options or ReadOptions()
    files: list[ScannedFile] = []
    findings: list[Finding] = []
    for path in paths:
        scanned, found = _scan_file(path, options, worker_count([path], workers))
        files.append(scanned)
        findings += found
    duplicates, leakage = repetitions_in(paths, against, options, workers)
    return ScanResult(tuple(files), tuple(findings), duplicates, leakage)


def _scan_file(path: Path, options: ReadOptions, workers: int) -> tuple[ScannedFile, list[Finding]]:
    opened = open_records(path, assistant=options.assistant)
    findings: list[Finding] = []
    problems: list[Problem] = []
    rows = characters = 0
    for part in map_ordered(_scan_block, opened.blocks, str(path), workers):
        findings += part.findings
        problems += part.problems
        rows += part.rows
        characters += part.characters
    report = FileProblems(str(path), None, opened.encoding, rows, tuple(problems))
    return ScannedFile(report, sha256_of_file(path), characters), findings


@dataclass(frozen=True)
class _ScannedBlock:
    findings: list[Finding]
    problems: tuple[Problem, ...]
    rows: int
    characters: int


def _scan_block(path: str, block: Block) -> _ScannedBlock:
    """Runs in any process."""
    parsed = block.parse()
    findings: list[Finding] = []
    characters = 0
    for record in parsed.records:
        for field, text in texts_within(record.value):
            characters += len(text)
            findings += (_placed(find, path, record.line, field) for find in find_in_field(field, text))
    return _ScannedBlock(findings, parsed.problems, len(parsed.records), characters)


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


def repetitions_in(
    paths: Sequence[Path], against: Sequence[Path], options: ReadOptions, workers: int | None = None
) -> tuple[Repetitions, Repetitions | None]:
    """(rows that repeat an earlier row, rows of `against` that also stand in the files, or None without it).

    A row repeats another when it says the same once read, whatever else its line holds. Files in no known layout are
    compared record by record, exactly only.
    """
    try:
        twice = duplicates_in_files(paths, options, workers=workers)
        leaked = leakage_in_files(paths, against, options, workers=workers) if against else None
    except (DataError, UsageError):
        if options.format != "auto" or options.mapping:
            raise
        return _repeated_records(paths, against)
    return Repetitions(twice.exact, twice.near), None if leaked is None else Repetitions(leaked.exact, leaked.near)


def _repeated_records(paths: Sequence[Path], against: Sequence[Path]) -> tuple[Repetitions, Repetitions | None]:
    records = Counter(digest for path in paths for digest in _digests(path))
    duplicates = Repetitions(records.total() - len(records), None)
    if not against:
        return duplicates, None
    return duplicates, Repetitions(sum(digest in records for path in against for digest in _digests(path)), None)


def _digests(path: Path) -> Iterator[str]:
    for block in open_records(path).blocks:
        yield from (_record_digest(record) for record in block.parse().records)


def _record_digest(record: Record) -> str:
    text = json.dumps(record.value, ensure_ascii=False, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
