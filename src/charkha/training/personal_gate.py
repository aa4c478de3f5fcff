"""The gate before training: personal data in the rows is decided about by the user, and the decision is recorded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from charkha.config import DataSection
from charkha.data.formats import ReadFile, problem_line
from charkha.data.masking import TreatedFile, Treatment, treatment_report
from charkha.data.personal_rows import Finding, RowFinds
from charkha.errors import DataError, FileProblems, Problem

_SHOWN_PLACES = 10


@dataclass(frozen=True)
class Decided:
    """What is done, what manifest.json keeps, what is said, and the report where anything was found."""

    treatment: Treatment
    record: dict[str, Any]
    notes: list[str]
    report: str | None


def decide_personal(files: Sequence[tuple[ReadFile, RowFinds]], wish: DataSection, *, is_stated: bool) -> Decided:
    """Decides by `data.personal` what is done about what was found in training and held-out files.

    `is_stated`: the config says so itself. Raises DataError for `block` where a find of high confidence is no public
    fact about a place, with every place and no value.
    """
    treated = tuple(TreatedFile(str(file.path), finds) for file, finds in files)
    treatment = Treatment(wish.personal, tuple(wish.personal_keep), treated)
    reads = [file for file, _finds in files]
    if wish.personal == "block":
        _refuse(reads, treatment)
    record = treatment.record() | {"stated": is_stated}
    report = treatment_report(treatment, reads) if treatment.total else None
    return Decided(treatment, record, _notes(treatment), report)


def _refuse(files: Sequence[ReadFile], treatment: Treatment) -> None:
    counts: Counter[str] = Counter()
    for file in treatment.files:
        counts.update(file.finds.blocking_counts)
    if not counts:
        return
    blocking = [finding for file in treatment.files for finding in file.finds.blocking]
    lines = [problem_line(finding.file, _problem(finding)) for finding in blocking[:_SHOWN_PLACES]]
    if counts.total() > _SHOWN_PLACES:
        lines.append(f"... and {counts.total() - _SHOWN_PLACES} more")
    told = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
    raise DataError(
        f"the rows hold personal data ({told}) and nothing says what is to be done about it\n" + "\n".join(lines),
        remedy="decide with data.personal: mask (typed stand-ins such as <PAN_1>), drop (those rows are left out) or "
        "report (train on them as they are); `charkha data scan FILE --report FILE.md` lists every place",
        files=tuple(_report(file, blocking) for file in files),
    )


def _problem(finding: Finding) -> Problem:
    return Problem(f"personal data: {finding.kind} at {finding.start}-{finding.end}", finding.line, finding.field)


def _report(file: ReadFile, blocking: Sequence[Finding]) -> FileProblems:
    own = tuple(_problem(finding) for finding in blocking if finding.file == str(file.path))
    return FileProblems(str(file.path), file.format, file.encoding, file.row_count, own)


def _notes(treatment: Treatment) -> list[str]:
    if not treatment.total:
        return []
    counts = ", ".join(f"{count} {kind}" for kind, count in treatment.counts.items())
    done = {
        "mask": f"{treatment.masked} places masked",
        "drop": f"{treatment.dropped_rows} rows left out",
        "report": "the rows are trained as they are",
        "block": "none that blocks; the rows are trained as they are",
    }[treatment.action]
    return [f"personal data (data.personal: {treatment.action}): {counts}; {done}"]
