"""The gate before training: personal data in the rows is decided about by the user, and the decision is recorded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from charkha.config import DataSection
from charkha.data.formats import ReadFile, problem_line
from charkha.data.masking import Treatment, treat_rows, treatment_report
from charkha.data.scan import Finding
from charkha.errors import DataError, FileProblems, Problem

_SHOWN_PLACES = 10


@dataclass(frozen=True)
class Decided:
    """The files as they go on, what manifest.json keeps, what is said, and the report where anything was found."""

    files: list[ReadFile]
    record: dict[str, Any]
    notes: list[str]
    report: str | None


def decide_personal(files: Sequence[ReadFile], wish: DataSection, *, is_stated: bool) -> Decided:
    """Carries out `data.personal` on the rows of training and held-out files.

    `is_stated`: the config says so itself. Raises DataError for `block` where a find of high confidence is no public
    fact about a place, with every place and no value.
    """
    treatment = treat_rows([(str(file.path), file.rows) for file in files], wish.personal, wish.personal_keep)
    if wish.personal == "block":
        _refuse(files, treatment)
    record = treatment.record() | {"stated": is_stated}
    treated = [replace(file, rows=done.rows) for file, done in zip(files, treatment.files, strict=True)]
    report = treatment_report(treatment, files) if treatment.findings else None
    return Decided(treated, record, _notes(treatment), report)


def _refuse(files: Sequence[ReadFile], treatment: Treatment) -> None:
    blocking = [finding for finding in treatment.findings if finding.blocks]
    if not blocking:
        return
    counts = ", ".join(f"{count} {kind}" for kind, count in Counter(f.kind for f in blocking).most_common())
    lines = [problem_line(finding.file, _problem(finding)) for finding in blocking[:_SHOWN_PLACES]]
    if len(blocking) > _SHOWN_PLACES:
        lines.append(f"... and {len(blocking) - _SHOWN_PLACES} more")
    raise DataError(
        f"the rows hold personal data ({counts}) and nothing says what is to be done about it\n" + "\n".join(lines),
        remedy="decide with data.personal: mask (typed stand-ins such as <PAN_1>), drop (those rows are left out) or "
        "report (train on them as they are); `charkha data scan FILE --report FILE.md` lists every place",
        files=tuple(_report(file, blocking) for file in files),
    )


def _problem(finding: Finding) -> Problem:
    return Problem(f"personal data: {finding.kind} at {finding.start}-{finding.end}", finding.line, finding.field)


def _report(file: ReadFile, blocking: Sequence[Finding]) -> FileProblems:
    own = tuple(_problem(finding) for finding in blocking if finding.file == str(file.path))
    return FileProblems(str(file.path), file.format, file.encoding, len(file.rows), own)


def _notes(treatment: Treatment) -> list[str]:
    if not treatment.findings:
        return []
    counts = ", ".join(f"{count} {kind}" for kind, count in treatment.counts.items())
    done = {
        "mask": f"{treatment.masked} places masked",
        "drop": f"{treatment.dropped_rows} rows left out",
        "report": "the rows are trained as they are",
        "block": "none that blocks; the rows are trained as they are",
    }[treatment.action]
    return [f"personal data (data.personal: {treatment.action}): {counts}; {done}"]
