"""Any data file to rows, with every problem collected and told by line: as a stream of blocks, or whole."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from charkha.data.fixing import is_left_out, left_out, repaired
from charkha.data.layouts import LAYOUTS, Layout, check_mapping, choose_layout, columns_of, refuse_media, renamed
from charkha.data.normal_form import normalized
from charkha.data.readers import open_records
from charkha.data.records import Block, ParsedBlock, Record, blank_lines_note
from charkha.data.remedies import with_remedy
from charkha.data.rows import Row
from charkha.data.sources import empty_file
from charkha.data.suspicions import suspicions_in
from charkha.data.validate import read_row
from charkha.errors import DataError, FileProblems, Problem

_SHOWN_PROBLEMS = 20
_KEPT_PROBLEMS = 10_000  # of one file; all are counted
_SAMPLE_BLOCKS = 16  # what tells the layout: about 16 MiB, most files whole


@dataclass(frozen=True)
class ReadOptions:
    """How a file is read. `mapping` is our column name -> the file's (`{"prompt": "question"}`).

    `assistant` names who is the assistant in a chat export; `normalize` is none or nfc; `keep` are further columns
    whose values go along with the rows, for splitting by them. `fix` makes the safe repairs of `fixing.py`;
    without `warn` rows are not looked through for what seems wrong.
    """

    format: str = "auto"
    mapping: Mapping[str, str] = field(default_factory=dict)
    assistant: str | None = None
    normalize: str = "none"
    keep: tuple[str, ...] = ()
    fix: bool = False
    warn: bool = True


@dataclass(frozen=True)
class RowBlock:
    """The rows of one block. `kept[i]` holds the values of `ReadOptions.keep` of row i, as text."""

    rows: tuple[Row, ...]
    problems: tuple[Problem, ...]
    warnings: tuple[Problem, ...]
    columns: tuple[str, ...]
    blank: int
    kept: tuple[tuple[str | None, ...], ...] = ()
    fixes: tuple[Problem, ...] = ()


@dataclass(frozen=True)
class RowTask:
    """A block and all that is needed to make rows of it, in whatever process."""

    path: Path
    block: Block
    layout: Layout | None
    options: ReadOptions

    def run(self) -> RowBlock:
        """The rows. Raises DataError for a row with pictures."""
        parsed = self.block.parse()
        refuse_media(self.path, parsed.records)
        judged = _Judged(problems=list(parsed.problems))
        for record in parsed.records:
            self._judge(record, judged)
        judged.problems.sort(key=lambda problem: problem.line or 0)
        return RowBlock(
            rows=tuple(judged.rows),
            problems=tuple(with_remedy(problem) for problem in judged.problems),
            warnings=tuple(judged.warnings),
            columns=columns_of(parsed.records),
            blank=parsed.blank,
            kept=tuple(judged.kept),
            fixes=tuple(judged.fixes),
        )

    def _judge(self, record: Record, judged: _Judged) -> None:
        kept = _kept(record, self.options.keep)
        record = renamed(record, self.options.mapping)
        if self.options.fix:
            record, fixes = repaired(record)
            judged.fixes.extend(fixes)
        result = read_row(record, "text" if self.layout is None else self.layout.name)
        if not isinstance(result, Problem):
            row = normalized(result, self.options.normalize)
            judged.rows.append(row)
            if self.options.warn:
                judged.warnings.extend(suspicions_in(row))
            judged.kept.append(kept)
        elif self.options.fix and is_left_out(result):
            judged.fixes.append(left_out(result))
        else:
            judged.problems.append(result)


@dataclass
class _Judged:
    """What has been made of a block so far."""

    problems: list[Problem]
    rows: list[Row] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    kept: list[tuple[str | None, ...]] = field(default_factory=list)
    fixes: list[Problem] = field(default_factory=list)


def _kept(record: Record, names: Sequence[str]) -> tuple[str | None, ...]:
    value = record.value if isinstance(record.value, dict) else {}
    return tuple(None if value.get(name) is None else str(value[name]) for name in names)


@dataclass(frozen=True)
class OpenRows:
    """A file whose layout is known and whose rows are still to come. `format` is None when no row could be read."""

    path: Path
    format: str | None
    encoding: str | None
    notes: tuple[str, ...]
    layout: Layout | None
    mapping: Mapping[str, str]
    tasks: Iterator[RowTask]


def open_rows(path: Path, options: ReadOptions | None = None) -> OpenRows:
    """The file, opened; its layout is told from its first 16 MiB.

    Raises DataError where the file as a whole cannot be used: missing, empty, of no recognisable format, with pictures.
    """
    options = options or ReadOptions()
    opened = open_records(path, assistant=options.assistant)
    sample: list[ParsedBlock] = []
    for block in opened.blocks:
        sample.append(block.parse())
        if len(sample) == _SAMPLE_BLOCKS:
            break
    records = [record for block in sample for record in block.records]
    columns = columns_of(records)
    layout = None
    if columns:
        check_mapping(path, columns, options.mapping)
        layout = choose_layout(
            path, [renamed(record, options.mapping) for record in records], options.format, options.mapping
        )
    elif not records and not any(block.problems for block in sample) and len(sample) < _SAMPLE_BLOCKS:
        raise empty_file(path)
    blocks: Iterable[Block] = itertools.chain(sample, opened.blocks)
    exported = opened.kind in ("telegram", "whatsapp")
    format = opened.kind if exported else None if layout is None else layout.name
    tasks = (RowTask(path, block, layout, options) for block in blocks)
    return OpenRows(path, format, opened.encoding, opened.notes, layout, options.mapping, tasks)


class ProblemList:
    """Problems of one kind of one file: the first ten thousand, and how many there are of each class."""

    def __init__(self) -> None:
        self.kept: list[Problem] = []
        self.counts: Counter[str] = Counter()

    def extend(self, problems: Iterable[Problem]) -> None:
        """Takes in more, in the file's order."""
        for problem in problems:
            self.counts[reason_group(problem.reason)] += 1
            if len(self.kept) < _KEPT_PROBLEMS:
                self.kept.append(problem)

    @property
    def total(self) -> int:
        """How many there are, also those that are not kept."""
        return sum(self.counts.values())

    def notes(self, name: str) -> tuple[str, ...]:
        """What has to be told where not all are listed."""
        more = self.total - len(self.kept)
        return (f"{more} more {name} are counted but not listed",) if more else ()


class FileTally:
    """What is learned about a file as its blocks go by."""

    def __init__(self, opened: OpenRows) -> None:
        self._opened = opened
        self._columns: dict[str, None] = {}
        self._blank = 0
        self.problems = ProblemList()
        self.warnings = ProblemList()
        self.fixes = ProblemList()
        self.rows = 0

    def add(self, block: RowBlock, rows: int | None = None) -> None:
        """Takes in the next block; `rows` is said where the block's own rows stayed in another process."""
        self._columns.update(dict.fromkeys(block.columns))
        self._blank += block.blank
        self.rows += len(block.rows) if rows is None else rows
        self.problems.extend(block.problems)
        self.warnings.extend(block.warnings)
        self.fixes.extend(block.fixes)

    def _is_read(self, column: str) -> bool:
        """Whether the layout uses a column of the file, under the name that the mapping gives it."""
        ours = next((name for name, theirs in self._opened.mapping.items() if theirs == column), column)
        layouts = [layout for layout in LAYOUTS if self._opened.layout and layout.name == self._opened.layout.name]
        return any(ours in layout.columns for layout in layouts)

    def finish(self, rows: tuple[Row, ...] = ()) -> ReadFile:
        """The file as read. Raises DataError when it held nothing at all."""
        opened = self._opened
        if not self.rows and not self.problems.total:
            raise empty_file(opened.path)
        ignored = tuple(name for name in self._columns if opened.layout is not None and not self._is_read(name))
        undecoded = not self.rows and set(self.problems.counts) == {"not valid UTF-8"}
        notes = (
            *opened.notes, *blank_lines_note(self._blank), *_ignored_note(ignored),
            *self.problems.notes("problems"), *self.warnings.notes("warnings"), *self.fixes.notes("repairs"),
        )  # fmt: skip
        return ReadFile(
            path=opened.path,
            format=opened.format,
            encoding=None if undecoded else opened.encoding,
            rows=rows,
            problems=tuple(self.problems.kept),
            notes=notes,
            columns=tuple(self._columns),
            ignored_columns=ignored,
            warnings=tuple(self.warnings.kept),
            row_count=self.rows,
            counts=tuple(self.problems.counts.items()),
            warning_counts=tuple(self.warnings.counts.items()),
            fixes=tuple(self.fixes.kept),
            fix_counts=tuple(self.fixes.counts.items()),
        )


@dataclass(frozen=True)
class ReadFile:
    """What reading one file gave. `format` is None when no row could be read far enough to tell.

    `rows` is empty where the file was read as a stream; `row_count` counts its good rows. `counts` and
    `warning_counts` are pairs of a class and how often it occurs.
    """

    path: Path
    format: str | None
    encoding: str | None
    rows: tuple[Row, ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    columns: tuple[str, ...]
    ignored_columns: tuple[str, ...] = ()
    warnings: tuple[Problem, ...] = ()
    row_count: int = 0
    counts: tuple[tuple[str, int], ...] = ()
    warning_counts: tuple[tuple[str, int], ...] = ()
    fixes: tuple[Problem, ...] = ()
    fix_counts: tuple[tuple[str, int], ...] = ()

    def report(self) -> FileProblems:
        """The same without the rows themselves, as errors and `--json` carry it."""
        return FileProblems(
            str(self.path), self.format, self.encoding, self.row_count, self.problems, self.warnings,
            dict(self.counts), dict(self.warning_counts),
        )  # fmt: skip


def read_rows(
    path: Path,
    *,
    format: str = "auto",
    mapping: Mapping[str, str] | None = None,
    options: ReadOptions | None = None,
) -> ReadFile:
    """Every row of a file and every problem in it, each in the file's order, all in memory.

    Raises DataError where the file as a whole cannot be used. Bad rows never raise.
    """
    options = options or ReadOptions(format, dict(mapping or {}))
    opened = open_rows(path, options)
    tally = FileTally(opened)
    rows: list[Row] = []
    for task in opened.tasks:
        block = task.run()
        tally.add(block)
        rows.extend(block.rows)
    return tally.finish(tuple(rows))


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
    counts: Counter[str] = Counter()
    for report in reports:
        counts.update(report.counts or Counter(reason_group(problem.reason) for problem in report.problems))
    total = sum(counts.values())
    lines = [problem_line(path, problem) for path, problem in places[:_SHOWN_PROBLEMS]]
    if total > _SHOWN_PROBLEMS:
        lines.append(f"... and {total - _SHOWN_PROBLEMS} more")
    summary = ", ".join(f"{count} x {reason}" for reason, count in counts.most_common())
    rows = "1 problem" if total == 1 else f"{total} problems"
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


def reason_group(reason: str) -> str:
    """Reasons are written `kind: particulars`; they are counted by kind."""
    return reason.split(":", 1)[0]


def first_rows(path: Path, options: ReadOptions, count: int) -> tuple[tuple[Row, ...], int]:
    """(the first good rows of a file, problems among those before them); reads no further. Raises DataError."""
    rows: list[Row] = []
    problems = 0
    for task in open_rows(path, options).tasks:
        block = task.run()
        rows.extend(block.rows)
        problems += len(block.problems)
        if len(rows) >= count:
            break
    return tuple(rows[:count]), problems
