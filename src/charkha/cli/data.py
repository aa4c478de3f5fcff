"""`charkha data`: inspect here; prepare, scan and preview in files of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from charkha.cli.data_options import (
    AssistantOption,
    FilesArgument,
    FormatOption,
    MapOption,
    ModelOption,
    NormalizeOption,
    RowCounter,
    TemplateOption,
    TrainOnOption,
    WorkersOption,
    data_paths,
    load_model,
    parse_train_on,
    read_options,
    show_problems,
)
from charkha.cli.data_prepare import prepare
from charkha.cli.data_preview import preview
from charkha.cli.data_scan import scan
from charkha.cli.terminal import JsonOption, error_record, new_app, note, run_command, stderr_console, stdout_console
from charkha.errors import DataError, FileProblems, Problem
from charkha.units import format_count

if TYPE_CHECKING:
    from charkha.data.formats import ReadOptions
    from charkha.data.inspect import FileStatistics
    from charkha.data.tokenize import EncodeSettings

app = new_app(help="Inspects, prepares, scans and previews training data.", no_args_is_help=True)


@app.command()
def inspect(
    files: FilesArgument,
    format: FormatOption = "auto",
    map_: MapOption = None,
    model: ModelOption = None,
    template: TemplateOption = "auto",
    train_on: TrainOnOption = "responses",
    max_length: Annotated[int | None, typer.Option(min=8, help="Counts rows longer than this many tokens.")] = None,
    assistant: AssistantOption = None,
    normalize: NormalizeOption = "none",
    workers: WorkersOption = None,
    as_json: JsonOption = False,
) -> None:
    """Format, encoding, rows, every bad row with its line and, with --model, lengths in tokens.

    Exit code 4 when a row cannot be used.

    Example: charkha data inspect support.jsonl --model starter
    """

    def work() -> dict[str, Any]:
        settings = None
        if model is not None:
            from charkha.data.tokenize import EncodeSettings

            tokenizer, chat = load_model(model, Path.cwd(), template)
            settings = EncodeSettings(tokenizer, chat, parse_train_on(train_on))
        options = read_options(format, map_, assistant, normalize)
        return _inspect(data_paths(files), options, settings, max_length, workers)

    run_command(work, _show_inspection, as_json)


app.command()(prepare)
app.command()(scan)
app.command()(preview)


def _inspect(
    files: Sequence[Path],
    options: ReadOptions,
    settings: EncodeSettings | None,
    max_length: int | None,
    workers: int | None,
) -> dict[str, Any]:
    from charkha.data.inspect import inspect_file

    statistics: list[FileStatistics] = []
    failures: list[DataError] = []
    reports: list[FileProblems] = []
    for path in files:
        try:
            found = inspect_file(
                path,
                options=options,
                settings=settings,
                max_length=max_length,
                workers=workers,
                progress=RowCounter(),
            )
        except DataError as error:
            failures.append(error)
            line = _line_of(error, path)
            reports.append(FileProblems(str(path), None, None, 0, (Problem(error.message, line, None, error.remedy),)))
        else:
            statistics.append(found)
            reports.append(found.report())
    if failures:
        first = failures[0]
        raise DataError(first.message, where=first.where, remedy=first.remedy, files=tuple(reports))
    return _inspection_record(statistics, tuple(reports))


def _line_of(error: DataError, path: Path) -> int | None:
    """The line in an error's place `file:line`."""
    line = (error.where or "").removeprefix(f"{path}:")
    return int(line) if line.isdigit() else None


def _inspection_record(statistics: Sequence[FileStatistics], reports: tuple[FileProblems, ...]) -> dict[str, Any]:
    """The JSON contract; with bad rows also `error`, and exit code 4."""
    from charkha.data.formats import raise_for_reports
    from charkha.data.inspect import mix_of

    counted = [found.tokens for found in statistics if found.tokens is not None]
    tokens = {str(found.file.path): (0 if found.tokens is None else found.tokens.total, 1.0) for found in statistics}
    record: dict[str, Any] = {
        "files": [_file_record(found) for found in statistics],
        "tokens": sum(counts.total for counts in counted) if counted else None,
        "trained_tokens": sum(counts.trained for counts in counted) if counted else None,
        "mix": mix_of(tokens) if counted else mix_of({str(f.file.path): (f.file.row_count, 1.0) for f in statistics}),
    }
    try:
        raise_for_reports(reports)
    except DataError as error:
        record |= {"error": error_record(error)["error"], "exit_code": error.exit_code}
    return record


def _file_record(found: FileStatistics) -> dict[str, Any]:
    return asdict(found.report()) | {
        "columns": list(found.file.columns),
        "ignored_columns": list(found.file.ignored_columns),
        "duplicates": found.duplicates,
        "token_counts": None if found.tokens is None else asdict(found.tokens),
        "scripts": {name: asdict(counts) for name, counts in found.scripts.items()},
        "costs": list(found.costs),
        "notes": list(found.notes),
    }


def _show_inspection(result: dict[str, Any]) -> None:
    console = stdout_console()
    for file in result["files"]:
        kind = f"format {file['format'] or 'unknown'}, {file['encoding'] or 'no text encoding'}"
        problems = sum(file["counts"].values())
        rows = f"{file['rows']} rows, {problems} problems, {file['duplicates']} exact repetitions"
        console.print(f"{file['path']}\n  {kind}; {rows}", markup=False)
        if file["token_counts"] is not None:
            _show_lengths(file["token_counts"])
        for name, counts in file["scripts"].items():
            console.print(_script_line(name, counts), markup=False)
        show_problems(file["path"], file["problems"])
        for name, count in file["warning_counts"].items():
            first = next(warning for warning in file["warnings"] if warning["reason"].startswith(f"{name}:"))
            console.print(f"  {name}: {count}, first in line {first['line']}: {first['reason']}", markup=False)
        for text in file["costs"]:
            stderr_console().print(f"  {text}", style="yellow", markup=False)
        for text in file["notes"]:
            note(f"  {text}")
    if len(result["files"]) > 1:
        note("mix: " + ", ".join(f"{Path(path).name} {share:.1%}" for path, share in result["mix"].items()))


def _show_lengths(counts: dict[str, Any]) -> None:
    total, trained = format_count(counts["total"]), format_count(counts["trained"])
    spread = ", ".join(f"{name} {counts[name]}" for name in ("shortest", "median", "p95", "longest"))
    console = stdout_console()
    console.print(f"  {total} tokens, {trained} of them trained; tokens a row: {spread}", markup=False)
    most = max(rows for _, rows in counts["histogram"])
    first = next(place for place, (_, rows) in enumerate(counts["histogram"]) if rows)
    for bound, rows in counts["histogram"][first:]:
        console.print(f"  {'up to ' + format(bound, ','):>16} {rows:>9,} {'#' * round(40 * rows / most)}", markup=False)
    if counts["over_max_length"]:
        share = counts["over_max_length_share"]
        console.print(f"  {counts['over_max_length']:,} rows ({share:.2%}) are longer than {counts['max_length']}")


def _script_line(name: str, counts: dict[str, Any]) -> str:
    line = f"  {name}: {counts['rows']:,} rows, {format_count(counts['bytes'])} bytes"
    if counts["tokens_per_byte"] is None:
        return line
    return f"{line}, {counts['tokens_per_byte']:.3f} tokens a byte, {counts['tokens_per_character']:.2f} a character"
