"""The scan as a document for who answers for the data: what was found where, and what was done. Never a value."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Sequence

from charkha.data.personal import DETECTORS_VERSION
from charkha.data.personal_finds import NOT_A_PERSON
from charkha.data.personal_rows import Finding
from charkha.data.scan import ScanResult
from charkha.personal_kinds import PERSONAL_KINDS

_LIMITS = (
    "Names, postal addresses, numbers spelt out in words, numbers with a mistyped check digit, and text in pictures "
    "are not looked for. `high` means a check digit, an unmistakable form, or a label beside the value; `medium` means "
    "that form or context alone speak for it."
)


def markdown_report(result: ScanResult, done: str, date: str) -> str:
    """The report as Markdown. `done` says what was decided; `date` is printed as it is given."""
    return "\n\n".join(
        [
            "# Personal data in training files",
            f"{date}. charkha's detectors, version {DETECTORS_VERSION}. No value that was found is shown here.",
            "## Files",
            _table(("file", "rows", "characters", "sha256", "not readable"), _file_rows(result)),
            "## What was found",
            _table(("kind", "what it is", "high", "medium", "rows"), _kind_rows(result.findings))
            if result.findings
            else "Nothing.",
            "## What was done",
            done,
            "## Repetitions",
            _repetitions(result),
            "## Where",
            _table(("file", "line", "field", "characters", "kind", "confidence"), _place_rows(result.findings))
            if result.findings
            else "Nowhere.",
            "## Limits",
            _LIMITS,
        ]
    ) + "\n"  # fmt: skip


def html_report(result: ScanResult, done: str, date: str) -> str:
    """The same as one HTML page that loads nothing."""
    sections = [
        ("Files", _html_table(("file", "rows", "characters", "sha256", "not readable"), _file_rows(result))),
        ("What was found", _html_table(("kind", "what it is", "high", "medium", "rows"), _kind_rows(result.findings))),
        ("What was done", _paragraph(done)),
        ("Repetitions", _paragraph(_repetitions(result))),
        (
            "Where",
            _html_table(("file", "line", "field", "characters", "kind", "confidence"), _place_rows(result.findings)),
        ),
        ("Limits", _paragraph(_LIMITS)),
    ]
    body = "".join(f"<h2>{title}</h2>{content}" for title, content in sections)
    head = f"{date}. charkha's detectors, version {DETECTORS_VERSION}. No value that was found is shown here."
    style = "body{font:15px sans-serif;max-width:70em;margin:2em auto}td,th{padding:.2em .8em;text-align:left}"
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Personal data in training files</title>'
        f"<style>{style}</style><h1>Personal data in training files</h1>{_paragraph(head)}{body}</html>\n"
    )


def decision_sentence(action: str | None, masked: int = 0, dropped_rows: int = 0) -> str:
    """What was done, in words; None where the files were only scanned."""
    if action == "mask":
        return f"{masked} places were replaced by typed stand-ins, the same value by the same stand-in."
    if action == "drop":
        return f"{dropped_rows} rows that hold such data were left out."
    if action == "report":
        return "The rows are used as they are (`report`)."
    if action == "block":
        return "The rows are used as they are (`block`): nothing was found that stops training by itself."
    return (
        "Nothing yet: the files were only scanned, and are unchanged. Training refuses finds of high confidence until "
        "`data.personal` is set to `mask`, `drop` or `report`; the decision is kept in the run's manifest.json. "
        f"Kinds that never block: {', '.join(sorted(NOT_A_PERSON))}."
    )


def _file_rows(result: ScanResult) -> list[tuple[str, ...]]:
    return [
        (
            file.report.path,
            str(file.report.rows),
            str(file.characters),
            file.sha256,
            f"{len(file.report.problems)} lines",
        )
        for file in result.files
    ]


def _kind_rows(findings: Sequence[Finding]) -> list[tuple[str, ...]]:
    counts = Counter((finding.kind, finding.confidence) for finding in findings)
    rows = Counter(kind for kind, _, _ in {(f.kind, f.file, f.line) for f in findings})
    kinds = sorted(rows, key=lambda kind: -counts[kind, "high"] - counts[kind, "medium"])
    return [
        (kind, PERSONAL_KINDS[kind], str(counts[kind, "high"]), str(counts[kind, "medium"]), str(rows[kind]))
        for kind in kinds
    ]


def _place_rows(findings: Sequence[Finding]) -> list[tuple[str, ...]]:
    return [
        (
            finding.file,
            "" if finding.line is None else str(finding.line),
            finding.field,
            f"{finding.start}-{finding.end}",
            finding.kind,
            finding.confidence,
        )
        for finding in findings
    ]


def _repetitions(result: ScanResult) -> str:
    if result.duplicates is None:
        return "Not looked for here; `charkha data scan` counts them."
    text = f"{result.duplicates.exact} rows repeat an earlier row exactly"
    if result.duplicates.near is not None:
        text += f", {result.duplicates.near} nearly"
    if result.leakage is None:
        return text + ". No test rows were given to compare with."
    text += f"; {result.leakage.exact} rows also stand in the test rows"
    return text + (f", {result.leakage.near} nearly." if result.leakage.near is not None else ".")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return _paragraph("Nothing.")
    first = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{first}</tr>{body}</table>"


def _paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"
