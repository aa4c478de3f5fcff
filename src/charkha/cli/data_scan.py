"""`charkha data scan`: personal data, secrets, repetitions and leaked test rows, with a report for compliance."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from charkha.cli.data_options import (
    AssistantOption,
    FilesArgument,
    FormatOption,
    MapOption,
    WorkersOption,
    data_paths,
    read_options,
)
from charkha.cli.terminal import (
    JsonOption,
    error_record,
    near,
    new_table,
    note,
    run_command,
    stdout_console,
)
from charkha.errors import DataError, UsageError

if TYPE_CHECKING:
    from charkha.data.scan import ScanResult

_SHOWN_PLACES = 20


def scan(
    files: FilesArgument,
    against: Annotated[
        list[str] | None,
        typer.Option("--against", help="Test rows that must not stand in the files; may be repeated."),
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--report", help="Write a report without values: a .md or .html file.")
    ] = None,
    format: FormatOption = "auto",
    map_: MapOption = None,
    assistant: AssistantOption = None,
    workers: WorkersOption = None,
    as_json: JsonOption = False,
) -> None:
    """Finds personal data and secrets in every column; counts repetitions and leaked test rows, exact and near.

    Values are never printed, only their kind and place. Exit code 4 when part of a file could not be read.

    Example: charkha data scan support.jsonl --against heldout.jsonl --report personal-data.md
    """

    def work() -> dict[str, Any]:
        from charkha.data.scan import scan_files

        if report is not None and report.suffix.lower() not in (".md", ".html"):
            raise UsageError(f"--report {report}: not a .md or .html file", remedy="name it report.md or report.html")
        result = scan_files(
            data_paths(files),
            against=data_paths(against or []),
            options=read_options(format, map_, assistant, "none"),
            workers=workers,
        )
        if report is not None:
            _write_report(result, report)
        return _record(result, report)

    run_command(work, _show, as_json)


def _write_report(result: ScanResult, path: Path) -> None:
    from charkha.data.scan_report import decision_sentence, html_report, markdown_report

    write = html_report if path.suffix.lower() == ".html" else markdown_report
    text = write(result, decision_sentence(None), time.strftime("%Y-%m-%d %H:%M %z"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UsageError(f"the report cannot be written: {error.strerror}", where=str(path)) from error


def _record(result: ScanResult, report: Path | None) -> dict[str, Any]:
    """The JSON contract; with lines that could not be read also `error`, and exit code 4."""
    from charkha.data.formats import raise_for_reports

    record: dict[str, Any] = {
        "files": [
            asdict(file.report) | {"sha256": file.sha256, "characters": file.characters} for file in result.files
        ],
        "findings": [asdict(finding) for finding in result.findings],
        "counts": result.counts,
        "blocking": sum(finding.blocks for finding in result.findings),
        "duplicates": {"exact": None, "near": None} if result.duplicates is None else asdict(result.duplicates),
        "leakage": {"exact": None, "near": None} if result.leakage is None else asdict(result.leakage),
        "report": None if report is None else str(report),
    }
    try:
        raise_for_reports(tuple(file.report for file in result.files))
    except DataError as error:
        record |= {"error": error_record(error)["error"], "exit_code": error.exit_code}
    return record


def _show(result: dict[str, Any]) -> None:
    console = stdout_console()
    for file in result["files"]:
        console.print(f"{file['path']}: {file['rows']} rows, {file['characters']} characters read", markup=False)
        for problem in file["problems"]:
            note(f"{file['path']}:{problem['line']}: not scanned: {problem['reason']}")
    if result["findings"]:
        _show_findings(result["findings"])
    else:
        console.print("no personal data or secrets found", markup=False)
    _show_repetitions(result)
    if result["report"]:
        note(f"report: {result['report']}")
    if result["blocking"]:
        note(
            f"{result['blocking']} finds of high confidence: training refuses them until data.personal says mask, "
            "drop or report"
        )


def show_treatment(personal: dict[str, Any]) -> None:
    """One line about what `data prepare` found and did."""
    counts = ", ".join(f"{count} {kind}" for kind, count in personal["counts"].items())
    done = {
        "report": "kept; --personal mask or drop, or `charkha data scan` for every place",
        "mask": f"{personal['masked']} places masked",
        "drop": f"{personal['dropped_rows']} rows left out",
    }[personal["action"]]
    note(f"personal data: {counts} ({done})")


def _show_findings(findings: list[dict[str, Any]]) -> None:
    from charkha.personal_kinds import PERSONAL_KINDS

    counts = Counter((finding["kind"], finding["confidence"]) for finding in findings)
    table = new_table("kind", "what it is", ">high", ">medium")
    for kind, _ in Counter(finding["kind"] for finding in findings).most_common():
        table.add_row(kind, PERSONAL_KINDS[kind], str(counts[kind, "high"]), str(counts[kind, "medium"]))
    console = stdout_console()
    console.print(table)
    for finding in findings[:_SHOWN_PLACES]:
        place = f"{near(finding['file'])}:{finding['line']}: {finding['field']}"
        span = f"characters {finding['start']}-{finding['end']}"
        console.print(f"{place}: {finding['kind']} ({finding['confidence']}) at {span}", markup=False)
    if len(findings) > _SHOWN_PLACES:
        console.print(f"... and {len(findings) - _SHOWN_PLACES} more; --report or --json lists all", markup=False)


def _show_repetitions(result: dict[str, Any]) -> None:
    duplicates, leakage = result["duplicates"], result["leakage"]
    text = f"exact repetitions: {duplicates['exact']}"
    if duplicates["near"] is not None:
        text += f", near: {duplicates['near']}"
    if leakage["exact"] is not None:
        text += f"; test rows that also stand in the files: {leakage['exact']}"
        text += f", nearly: {leakage['near']}" if leakage["near"] is not None else ""
    stdout_console().print(text, markup=False)
