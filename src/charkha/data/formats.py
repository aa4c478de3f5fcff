"""Any data file to rows, with every problem collected and told by line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from charkha.data.layouts import Layout, choose_layout, columns_of, rename_columns
from charkha.data.readers import read_records
from charkha.data.records import Record
from charkha.data.rows import Row
from charkha.data.validate import read_row
from charkha.errors import DataError, FileProblems, Problem

_SHOWN_PROBLEMS = 20


@dataclass(frozen=True)
class ReadFile:
    """What reading one file gave. `format` is None when no row could be read far enough to tell."""

    path: Path
    format: str | None
    encoding: str | None
    rows: tuple[Row, ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    columns: tuple[str, ...]
    ignored_columns: tuple[str, ...] = ()

    def report(self) -> FileProblems:
        """The same without the rows themselves, as errors and `--json` carry it."""
        return FileProblems(str(self.path), self.format, self.encoding, len(self.rows), self.problems)


def read_rows(path: Path, *, format: str = "auto", mapping: Mapping[str, str] | None = None) -> ReadFile:
    """Every row of a file and every problem in it, each in the file's order.

    `mapping` is our column name -> the file's (`{"prompt": "question"}`). Raises DataError where the file as a whole
    cannot be used: missing, empty, of no recognisable format, with pictures. Bad rows never raise.
    """
    mapping = mapping or {}
    found = read_records(path)
    columns = columns_of(found.records)
    if not columns:  # not one object: the problems say why
        problems = found.problems + _not_objects(found.records)
        return ReadFile(path, None, found.encoding, (), problems, found.notes, ())
    records = rename_columns(path, found.records, mapping)
    layout = choose_layout(path, records, format, mapping)
    rows, problems = _validated(records, layout)
    ignored = tuple(name for name in columns_of(records) if name not in layout.columns)
    notes = found.notes + _ignored_note(ignored)
    every = tuple(sorted(found.problems + problems, key=lambda problem: problem.line or 0))
    return ReadFile(path, layout.name, found.encoding, rows, every, notes, columns, ignored)


def _not_objects(records: Sequence[Record]) -> tuple[Problem, ...]:
    results = (read_row(record, "text") for record in records)
    return tuple(result for result in results if isinstance(result, Problem))


def _validated(records: Sequence[Record], layout: Layout) -> tuple[tuple[Row, ...], tuple[Problem, ...]]:
    rows: list[Row] = []
    problems: list[Problem] = []
    for record in records:
        result = read_row(record, layout.name)
        if isinstance(result, Problem):
            problems.append(result)
        else:
            rows.append(result)
    return tuple(rows), tuple(problems)


def _ignored_note(ignored: tuple[str, ...]) -> tuple[str, ...]:
    return (f"columns that are not used: {', '.join(ignored)}",) if ignored else ()


def raise_for_problems(files: Sequence[ReadFile]) -> None:
    """Raises DataError if any file has a problem; returns otherwise.

    The message shows the first 20 as `file:line: field: reason` and counts all by reason; `.files` carries every one.
    """
    raise_for_reports(tuple(file.report() for file in files))


def raise_for_reports(reports: tuple[FileProblems, ...]) -> None:
    """As `raise_for_problems`, for problems found after reading, such as rows that are too long."""
    places = [(report.path, problem) for report in reports for problem in report.problems]
    if not places:
        return
    lines = [problem_line(path, problem) for path, problem in places[:_SHOWN_PROBLEMS]]
    if len(places) > _SHOWN_PROBLEMS:
        lines.append(f"... and {len(places) - _SHOWN_PROBLEMS} more")
    counts = Counter(_reason_group(problem.reason) for _, problem in places)
    summary = ", ".join(f"{count} x {reason}" for reason, count in counts.most_common())
    rows = "1 problem" if len(places) == 1 else f"{len(places)} problems"
    raise DataError(
        f"{rows} in the data ({summary})\n" + "\n".join(lines),
        remedy=_remedy(counts),
        files=reports,
    )


def _remedy(counts: Counter[str]) -> str:
    if set(counts) == {"too long"}:
        return "raise data.max_length, or say what happens to longer rows: data.overlong: drop, split or truncate"
    return "correct or remove these rows; `charkha data inspect FILE` lists every one"


def problem_line(path: str, problem: Problem) -> str:
    """`file:line: field: reason`, leaving out what is not known."""
    place = path if problem.line is None else f"{path}:{problem.line}"
    return f"{place}: {problem.field}: {problem.reason}" if problem.field else f"{place}: {problem.reason}"


def _reason_group(reason: str) -> str:
    """Reasons are written `kind: particulars`; they are counted by kind."""
    return reason.split(":", 1)[0]
