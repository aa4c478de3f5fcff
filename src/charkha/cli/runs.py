"""`charkha runs`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from charkha.cli.terminal import JsonOption, new_app, new_table, note, run_command, stdout_console
from charkha.units import format_count, format_seconds

app = new_app()


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(help="Folder that holds run folders.")] = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """Lists runs and where each stands. Reads their files only, so it works beside a run and after a crash.

    Example: charkha runs
    """

    def work() -> dict[str, Any]:
        from charkha.summary import find_runs, summarize

        found = [summarize(run) for run in find_runs(folder)]
        return {"runs": [_without_curve(asdict(summary)) for summary in found]}

    run_command(work, lambda result: _show(result, folder), as_json)


def _without_curve(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "losses"}


def _show(result: dict[str, Any], folder: Path) -> None:
    if not result["runs"]:
        note(f"no runs in {folder}; `charkha train CONFIG` makes one")
        return
    table = new_table("run", "status", ">step", ">loss", ">held-out: before", ">last", ">tokens/s", ">left")
    for run in result["runs"]:
        table.add_row(
            run["run"],
            run["status"],
            f"{run['step']}/{run['total_steps'] or '?'}",
            _number(run["loss"]),
            _number(run["eval_loss_before"]),
            _number(run["eval_loss"]),
            "-" if run["tokens_per_second"] is None else format_count(round(run["tokens_per_second"])),
            "-" if run["seconds_left"] is None else format_seconds(run["seconds_left"]),
        )
    stdout_console().print(table)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
