"""`charkha data prepare`: any files to one JSON Lines file."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from charkha.cli.data_options import (
    AssistantOption,
    FilesArgument,
    FormatOption,
    MapOption,
    NormalizeOption,
    WorkersOption,
    data_paths,
    read_options,
    show_problems,
)
from charkha.cli.data_scan import show_treatment
from charkha.cli.terminal import JsonOption, new_table, note, run_command, stdout_console
from charkha.errors import UsageError


def prepare(
    files: FilesArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="JSON Lines file to write.", show_default=False)],
    format: FormatOption = "auto",
    map_: MapOption = None,
    assistant: AssistantOption = None,
    normalize: NormalizeOption = "none",
    eval_: Annotated[
        str, typer.Option("--eval", help="Rows to hold out into OUT.eval.jsonl: a share (5%) or a count.")
    ] = "0",
    group_by: Annotated[
        str | None, typer.Option(help="Column whose values never stand on both sides of the split.")
    ] = None,
    time_by: Annotated[str | None, typer.Option(help="Column of time: the latest rows are held out.")] = None,
    seed: Annotated[int, typer.Option(help="Decides which rows are held out.")] = 42,
    deduplicate: Annotated[bool, typer.Option("--deduplicate", help="Leave out exact repetitions.")] = False,
    fix: Annotated[
        bool, typer.Option("--fix", help="Make the repairs that change nothing that is taught, and list them.")
    ] = False,
    personal: Annotated[
        str,
        typer.Option(
            help="Personal data: report counts it, mask writes stand-ins such as <PAN_1>, drop leaves rows out."
        ),
    ] = "report",
    report: Annotated[
        Path | None, typer.Option("--report", help="Write what was found and done, without values: a .md file.")
    ] = None,
    workers: WorkersOption = None,
    as_json: JsonOption = False,
) -> None:
    """Turns files of any supported format into one JSON Lines file. Nothing is written while a row is bad.

    Example: charkha data prepare tickets.csv -o tickets.jsonl --map prompt=question,completion=answer --eval 5%
    """

    def work() -> dict[str, Any]:
        from charkha.data.prepare import prepare_files
        from charkha.data.splits import SplitWish

        done = prepare_files(
            data_paths(files),
            out=out,
            options=read_options(format, map_, assistant, normalize, fix),
            split=SplitWish(eval_, seed, group_by, time_by),
            deduplicate=deduplicate,
            workers=workers,
            personal=_personal(personal),
            personal_report=report,
        )
        record = asdict(done) | {"train_path": str(done.train_path), "eval_path": _text(done.eval_path)}
        fixes = [_fix_record(file) for file in done.files]
        reports = [asdict(file.report()) | more for file, more in zip(done.files, fixes, strict=True)]
        return record | {"files": reports}

    run_command(work, _show_prepared, as_json)


def _personal(word: str) -> Literal["report", "mask", "drop"]:
    if word == "report" or word == "mask" or word == "drop":
        return word  # type: ignore[return-value, unused-ignore]
    raise UsageError(f"--personal {word!r} is not known", remedy="use report, mask or drop")


def _fix_record(file: Any) -> dict[str, Any]:
    return {"fixes": [asdict(fix) for fix in file.fixes], "fix_counts": dict(file.fix_counts)}


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
    for file in result["files"]:
        for kind, count in file["fix_counts"].items():
            note(f"{file['path']}: {kind}: {count} repaired")
        show_problems(file["path"], file["fixes"], style="dim")
