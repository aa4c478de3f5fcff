"""`charkha data`: inspect, prepare, scan and preview training data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from charkha.cli.data_scan import scan, show_treatment
from charkha.cli.terminal import (
    JsonOption,
    error_record,
    new_app,
    new_table,
    note,
    run_command,
    stderr_console,
    stdout_console,
)
from charkha.errors import DataError, FileProblems, Problem, UsageError
from charkha.units import format_count

if TYPE_CHECKING:
    from charkha.data.inspect import FileStatistics
    from charkha.data.rows import Row
    from charkha.data.templates import ChatTemplate
    from charkha.data.tokenizer import Tokenizer

app = new_app(help="Inspects, prepares, scans and previews training data.", no_args_is_help=True)
app.command()(scan)

TrainOn = Literal["responses", "all"]
FilesArgument = Annotated[list[Path], typer.Argument(help="Data files.", show_default=False)]
FormatOption = Annotated[str, typer.Option("--format", help="Row layout; auto tells it from the columns.")]
MapOption = Annotated[
    list[str] | None,
    typer.Option("--map", metavar="OURS=THEIRS,...", help="Which column is which: prompt=question,completion=answer."),
]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="Model folder, fetched hub id, or `starter`: counts tokens.")
]
TemplateOption = Annotated[str, typer.Option(help="Chat template: auto, a built-in family, or a file.")]
TrainOnOption = Annotated[str, typer.Option(help="responses or all.")]

_SHOWN_PROBLEMS = 20


@app.command()
def inspect(
    files: FilesArgument,
    format: FormatOption = "auto",
    map_: MapOption = None,
    model: ModelOption = None,
    template: TemplateOption = "auto",
    train_on: TrainOnOption = "responses",
    as_json: JsonOption = False,
) -> None:
    """Format, encoding, rows, every bad row with its line and, with --model, lengths in tokens.

    Exit code 4 when a row cannot be used.

    Example: charkha data inspect support.jsonl --model starter
    """

    def work() -> dict[str, Any]:
        return _inspect(files, format, parse_mapping(map_), model, template, _train_on(train_on))

    run_command(work, _show_inspection, as_json)


def parse_mapping(pairs: Sequence[str] | None) -> dict[str, str]:
    """`["prompt=question,completion=answer"]` as a dict. Raises UsageError for a part without `=`."""
    mapping: dict[str, str] = {}
    for pair in (part for text in pairs or () for part in text.split(",")):
        ours, found, theirs = pair.partition("=")
        if not (found and ours.strip() and theirs.strip()):
            raise UsageError(f"--map {pair!r} is no pair", remedy="write --map prompt=question,completion=answer")
        mapping[ours.strip()] = theirs.strip()
    return mapping


def _train_on(word: str) -> TrainOn:
    if word == "responses" or word == "all":
        return word  # type: ignore[return-value, unused-ignore]
    raise UsageError(f"--train-on {word!r} is not known", remedy="use responses or all")


def _inspect(
    files: Sequence[Path], format: str, mapping: dict[str, str], model: str | None, template: str, train_on: TrainOn
) -> dict[str, Any]:
    tokenizer, chat = (None, None) if model is None else _load_model(model, Path.cwd(), template)
    statistics: list[FileStatistics] = []
    failures: list[DataError] = []
    reports: list[FileProblems] = []
    from charkha.data.inspect import inspect_file

    for path in files:
        try:
            found = inspect_file(
                path, format=format, mapping=mapping, tokenizer=tokenizer, template=chat, train_on=train_on
            )
        except DataError as error:
            failures.append(error)
            reports.append(FileProblems(str(path), None, None, 0, (Problem(error.message),)))
        else:
            statistics.append(found)
            reports.append(found.report())
    if failures:
        first = failures[0]
        raise DataError(first.message, where=first.where, remedy=first.remedy, files=tuple(reports))
    return _inspection_record(statistics, tuple(reports))


def _load_model(model: str, folder: Path, template: str) -> tuple[Tokenizer, ChatTemplate]:
    from charkha.config import ModelSection
    from charkha.data.templates import load_template
    from charkha.data.tokenizer import load_tokenizer
    from charkha.training.base_model import find_base

    base = find_base(ModelSection(base=model), folder)
    return load_tokenizer(base), load_template(base, template)


def _inspection_record(statistics: Sequence[FileStatistics], reports: tuple[FileProblems, ...]) -> dict[str, Any]:
    """The JSON contract; with bad rows also `error`, and exit code 4."""
    from charkha.data.formats import raise_for_reports

    counted = [found.tokens for found in statistics if found.tokens is not None]
    record: dict[str, Any] = {
        "files": [_file_record(found) for found in statistics],
        "tokens": sum(counts.total for counts in counted) if counted else None,
        "trained_tokens": sum(counts.trained for counts in counted) if counted else None,
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
        "notes": list(found.notes),
    }


def _show_inspection(result: dict[str, Any]) -> None:
    console = stdout_console()
    for file in result["files"]:
        kind = f"format {file['format'] or 'unknown'}, {file['encoding'] or 'no text encoding'}"
        rows = f"{file['rows']} rows, {len(file['problems'])} problems, {file['duplicates']} exact repetitions"
        console.print(f"{file['path']}\n  {kind}; {rows}", markup=False)
        if file["token_counts"] is not None:
            console.print(_lengths(file["token_counts"]), markup=False)
        _show_problems(file)
        for text in file["notes"]:
            note(f"  {text}")


def _lengths(counts: dict[str, int]) -> str:
    total, trained = format_count(counts["total"]), format_count(counts["trained"])
    spread = ", ".join(f"{name} {counts[name]}" for name in ("shortest", "median", "p95", "longest"))
    return f"  {total} tokens, {trained} of them trained; tokens a row: {spread}"


def _show_problems(file: dict[str, Any]) -> None:
    from charkha.data.formats import problem_line

    problems = [Problem(**problem) for problem in file["problems"]]
    console = stdout_console()
    for problem in problems[:_SHOWN_PROBLEMS]:
        console.print(problem_line(file["path"], problem), markup=False)
    if len(problems) > _SHOWN_PROBLEMS:
        console.print(f"... and {len(problems) - _SHOWN_PROBLEMS} more; --json lists all", markup=False)


@app.command()
def prepare(
    files: FilesArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="JSON Lines file to write.", show_default=False)],
    format: FormatOption = "auto",
    map_: MapOption = None,
    eval_: Annotated[
        str, typer.Option("--eval", help="Rows to hold out into OUT.eval.jsonl: a share (5%) or a count.")
    ] = "0",
    seed: Annotated[int, typer.Option(help="Decides which rows are held out.")] = 42,
    deduplicate: Annotated[bool, typer.Option("--deduplicate", help="Leave out exact repetitions.")] = False,
    personal: Annotated[
        str,
        typer.Option(
            help="Personal data: report counts it, mask writes stand-ins such as <PAN_1>, drop leaves rows out."
        ),
    ] = "report",
    report: Annotated[
        Path | None, typer.Option("--report", help="Write what was found and done, without values: a .md file.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Turns files of any supported format into one JSON Lines file. Nothing is written while a row is bad.

    Example: charkha data prepare tickets.csv -o tickets.jsonl --map prompt=question,completion=answer --eval 5%
    """

    def work() -> dict[str, Any]:
        from charkha.data.prepare import prepare_files

        done = prepare_files(
            files,
            out=out,
            format=format,
            mapping=parse_mapping(map_),
            eval_=eval_,
            seed=seed,
            deduplicate=deduplicate,
            personal=_personal(personal),
            personal_report=report,
        )
        record = asdict(done) | {"train_path": str(done.train_path), "eval_path": _text(done.eval_path)}
        return record | {"files": [asdict(file.report()) for file in done.files]}

    run_command(work, _show_prepared, as_json)


def _personal(word: str) -> Literal["report", "mask", "drop"]:
    if word == "report" or word == "mask" or word == "drop":
        return word  # type: ignore[return-value, unused-ignore]
    raise UsageError(f"--personal {word!r} is not known", remedy="use report, mask or drop")


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _show_prepared(result: dict[str, Any]) -> None:
    table = new_table("file", ">rows")
    table.add_row(result["train_path"], str(result["train_rows"]))
    if result["eval_path"]:
        table.add_row(result["eval_path"], str(result["eval_rows"]))
    stdout_console().print(table)
    if result["personal"]["findings"]:
        show_treatment(result["personal"])
    if result["duplicates"]:
        left_out = "left out" if result["duplicates_removed"] else "kept; --deduplicate leaves them out"
        note(f"exact repetitions: {result['duplicates']} ({left_out})")


@app.command()
def preview(
    files: Annotated[list[Path] | None, typer.Argument(help="Data files.", show_default=False)] = None,
    config: Annotated[Path | None, typer.Option(help="Take files, model and settings from a charkha.yaml.")] = None,
    model: Annotated[str | None, typer.Option(help="Model folder, fetched hub id, or `starter`.")] = None,
    format: FormatOption = "auto",
    map_: MapOption = None,
    template: TemplateOption = "auto",
    train_on: TrainOnOption = "responses",
    rows: Annotated[int, typer.Option(min=1, help="Rows of each file to show.")] = 3,
    as_json: JsonOption = False,
) -> None:
    """Shows exactly which tokens are trained: highlighted in a terminal, between ⟦ and ⟧ elsewhere.

    Example: charkha data preview support.jsonl --model starter
    """

    def work() -> dict[str, Any]:
        if config is not None:
            return _preview_config(config, files, rows)
        if not files or model is None:
            raise UsageError("preview needs files and --model, or --config", remedy="add --model DIR")
        tokenizer, chat = _load_model(model, Path.cwd(), template)
        sources = [(path, parse_mapping(map_)) for path in files]
        return _preview(sources, format, tokenizer, chat, _train_on(train_on), rows)

    run_command(work, _show_preview, as_json)


def _preview_config(path: Path, files: Sequence[Path] | None, count: int) -> dict[str, Any]:
    """The config's files (or those given in their place) as its run would train them."""
    from charkha.config import DataSource
    from charkha.config_file import load_config
    from charkha.data.templates import load_template
    from charkha.data.tokenizer import load_tokenizer
    from charkha.training.base_model import find_base

    config, folder = load_config(path).config, path.parent
    sources = [DataSource(path=source) if isinstance(source, str) else source for source in config.data.train]
    chosen = [(folder / Path(source.path).expanduser(), {**config.data.map, **source.map}) for source in sources]
    if files:
        chosen = [(file, dict(config.data.map)) for file in files]
    base = find_base(config.model, folder)
    wish = config.data.template
    beside = folder / wish
    template = load_template(base, str(beside) if wish != "auto" and beside.is_file() else wish)
    return _preview(chosen, config.data.format, load_tokenizer(base), template, config.data.train_on, count)


def _preview(
    sources: Sequence[tuple[Path, dict[str, str]]],
    format: str,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    train_on: TrainOn,
    count: int,
) -> dict[str, Any]:
    from charkha.data.formats import read_rows
    from charkha.data.preview import preview_rows

    shown: list[dict[str, Any]] = []
    for path, mapping in sources:
        read = read_rows(path, format=format, mapping=mapping)
        if read.problems:
            note(f"{path}: {len(read.problems)} rows cannot be used; `charkha data inspect {path}` lists them")
        rows: Sequence[Row] = read.rows
        for row in preview_rows(rows, tokenizer, template, train_on, count=count):
            shown.append({"path": str(path), **asdict(row), "ends": row.ends})
    return {"rows": shown, "notes": list(tokenizer.notes)}


def _show_preview(result: dict[str, Any]) -> None:
    from rich.text import Text

    console = stdout_console()
    marks = ("", "") if console.color_system else ("⟦", "⟧")
    for row in result["rows"]:
        place = row["path"] if row["line"] is None else f"{row['path']}:{row['line']}"
        counts = f"{len(row['tokens'])} tokens, {row['trained_tokens']} of them trained"
        console.print(Text(f"{place}  {counts}", style="bold"))
        console.print(_coloured(row["tokens"], marks))
        if row["template"]:
            console.print(f"template: {row['template']}", markup=False)
        _show_end(row)
    for text in result["notes"]:
        note(text)


def _coloured(tokens: Sequence[dict[str, Any]], marks: tuple[str, str]) -> Any:
    """The row's text with the trained stretches highlighted."""
    from rich.text import Text

    text = Text()
    before = False
    for token in [*tokens, {"text": "", "trained": False}]:
        if token["trained"] != before:
            text.append(marks[0] if token["trained"] else marks[1])
        before = token["trained"]
        text.append(token["text"], style="black on green" if before else "dim")
    return text


def _show_end(row: dict[str, Any]) -> None:
    if row["ends"]:
        stdout_console().print(f"the end token {row['end_token']} is trained\n", markup=False)
    else:
        message = "no end token is trained: the model is not taught where to stop\n"
        stderr_console().print(message, style="yellow", markup=False)
