"""What is done about personal data in rows: reported, masked with stable stand-ins, or the row left out."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from charkha.data.formats import ReadFile
from charkha.data.personal import DETECTORS_VERSION
from charkha.data.personal_finds import Find
from charkha.data.personal_rows import (
    Finding,
    RowFinds,
    Value,
    change_texts,
    find_in_rows,
    numbered,
    same_form,
    wanted_finds,
)
from charkha.data.rows import Row
from charkha.data.scan import ScannedFile, ScanResult
from charkha.data.scan_report import decision_sentence, markdown_report
from charkha.store.durable import sha256_of_file

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Action = Literal["report", "block", "mask", "drop"]


@dataclass(frozen=True)
class TreatedFile:
    """One file: what was found in it before anything was done. `rows` are those after, where they are in memory."""

    path: str
    finds: RowFinds
    rows: tuple[Row, ...] = ()

    def record(self) -> dict[str, object]:
        """Counts without values or text, as manifest.json keeps them."""
        counts: dict[str, dict[str, int]] = {}
        for (kind, confidence), count in sorted(self.finds.counts.items()):
            counts.setdefault(kind, {"high": 0, "medium": 0})[confidence] = count
        return {"path": self.path, "rows_with_findings": int(self.finds.found.sum()), "counts": counts}


@dataclass(frozen=True)
class Treatment:
    """What was decided and done over all files of a data set."""

    action: Action
    kept_kinds: tuple[str, ...]
    files: tuple[TreatedFile, ...]

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The first findings of every file, in order."""
        return tuple(finding for file in self.files for finding in file.finds.findings)

    @property
    def total(self) -> int:
        """How many findings there are."""
        return sum(file.finds.total for file in self.files)

    @property
    def masked(self) -> int:
        """Places that hold a stand-in now."""
        return self.total if self.action == "mask" else 0

    @property
    def dropped_rows(self) -> int:
        """Rows that were left out."""
        return sum(int(file.finds.found.sum()) for file in self.files) if self.action == "drop" else 0

    @property
    def counts(self) -> dict[str, int]:
        """Findings of each kind, the most frequent first."""
        counts: Counter[str] = Counter()
        for file in self.files:
            for (kind, _confidence), count in file.finds.counts.items():
                counts[kind] += count
        return dict(counts.most_common())

    def record(self) -> dict[str, object]:
        """The decision and its numbers, without any value, for manifest.json."""
        return {
            "action": self.action,
            "kept_kinds": list(self.kept_kinds),
            "detectors": DETECTORS_VERSION,
            "findings": self.total,
            "counts": self.counts,
            "masked": self.masked,
            "dropped_rows": self.dropped_rows,
            "files": [file.record() for file in self.files],
        }


def treat_rows(files: Iterable[tuple[str, Sequence[Row]]], action: Action, kept_kinds: Sequence[str] = ()) -> Treatment:
    """Looks through rows in memory and does what `action` says to all finds but those of `kept_kinds`.

    Stand-ins go through all files. `report` and `block` leave the rows as they are: who asked for `block` looks at the
    findings.
    """
    found = [(path, rows, find_in_rows(path, rows, kept_kinds)) for path, rows in files]
    numbers = numbered([finds.values for _path, _rows, finds in found])
    treated = [
        TreatedFile(path, finds, _treated(rows, finds, action, of_file, kept_kinds))
        for (path, rows, finds), of_file in zip(found, numbers, strict=True)
    ]
    return Treatment(action, tuple(kept_kinds), tuple(treated))


def _treated(
    rows: Sequence[Row], finds: RowFinds, action: Action, numbers: Mapping[Value, int], kept_kinds: Sequence[str]
) -> tuple[Row, ...]:
    if action == "drop":
        return tuple(row for row, found in zip(rows, finds.found, strict=True) if not found)
    if action == "mask":
        return masked_rows(rows, finds.found, numbers, kept_kinds)
    return tuple(rows)


def masked_rows(
    rows: Sequence[Row], found: NDArray[np.bool_], numbers: Mapping[Value, int], kept_kinds: Sequence[str] = ()
) -> tuple[Row, ...]:
    """The rows, with stand-ins where something was `found`, bool [rows]; the others are not searched again."""
    return tuple(masked_row(row, numbers, kept_kinds) if hit else row for row, hit in zip(rows, found, strict=True))


def masked_row(row: Row, numbers: Mapping[Value, int], kept_kinds: Sequence[str] = ()) -> Row:
    """The row with every find replaced by its stand-in; `numbers` has those of its values."""
    return change_texts(row, lambda _field, text: mask_text(text, wanted_finds(text, kept_kinds), numbers))


def mask_text(text: str, finds: Sequence[Find], numbers: Mapping[Value, int]) -> str:
    """The text with every find replaced: `<PAN_1>` is the same value wherever it stands, however it is written.

    `finds` come left to right and do not overlap.
    """
    parts: list[str] = []
    done = 0
    for find in finds:
        value = (find.kind, same_form(find.kind, text[find.start : find.end]))
        parts += (text[done : find.start], f"<{find.kind.upper()}_{numbers[value]}>")
        done = find.end
    return "".join((*parts, text[done:]))


def treatment_report(treatment: Treatment, files: Sequence[ReadFile]) -> str:
    """The Markdown report of what was found in the files and done about it, dated now. `files` as they were read."""
    scanned = tuple(
        ScannedFile(file.report(), sha256_of_file(file.path), treated.finds.characters)
        for file, treated in zip(files, treatment.files, strict=True)
    )
    done = decision_sentence(treatment.action, treatment.masked, treatment.dropped_rows)
    if treatment.kept_kinds:
        done += f" Kinds that were left alone and not counted: {', '.join(treatment.kept_kinds)}."
    if treatment.total > len(treatment.findings):
        done += f" Of {treatment.total} findings the first {len(treatment.findings)} are listed; all are counted."
    result = ScanResult(scanned, treatment.findings, None, None)
    return markdown_report(result, done, time.strftime("%Y-%m-%d %H:%M %z"))
