"""`charkha eval`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from charkha.cli.terminal import JsonOption, new_app, new_table, run_command, stdout_console

app = new_app()


@app.command("eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder.", show_default=False)],
    file: Annotated[Path | None, typer.Option(help="Rows to score in place of the run's held-out ones.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Score the base model without the adapter.")] = False,
    merged: Annotated[bool, typer.Option("--merged", help="Score the run's merged model.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Answer only the first N rows.")] = None,
    answers: Annotated[bool, typer.Option(help="Generate answers for exact match.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Held-out loss and perplexity over every trained token; exact match and JSON-field match of greedy answers.

    Example: charkha eval runs/support --limit 100
    """

    def work() -> dict[str, Any]:
        from charkha.cli.environment import go_offline

        go_offline()
        from charkha.evaluation import evaluate_run

        return asdict(evaluate_run(run, file=file, base=base, merged=merged, limit=limit, answers=answers))

    run_command(work, _show, as_json)


def _show(result: dict[str, Any]) -> None:
    table = new_table("", ">")
    for key in ("rows", "tokens"):
        table.add_row(key, f"{result[key]:,}")
    table.add_row("loss", f"{result['loss']:.4f}")
    table.add_row("perplexity", f"{result['perplexity']:.4g}")
    for key in ("exact_match", "json_field_match"):
        if result[key] is not None:
            table.add_row(key.replace("_", " "), f"{100 * result[key]:.1f} %")
    console = stdout_console()
    console.print(table)
    wrong = [answer for answer in result["answers"] if answer["given"].strip() != answer["expected"].strip()]
    for answer in wrong[:3]:
        console.print(
            f"line {answer['line']}\n  expected {answer['expected']}\n  given    {answer['given']}", markup=False
        )
    if len(wrong) > 3:
        console.print(f"... and {len(wrong) - 3} more that differ; --json lists all")
