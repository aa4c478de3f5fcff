"""`charkha compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from charkha.cli.terminal import JsonOption, new_app, note, run_command, stdout_console

app = new_app()


@app.command()
def compare(
    run: Annotated[Path, typer.Argument(help="Run folder.", show_default=False)],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt of yours; repeatable.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Without --prompt: this many held-out rows.")] = 3,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 200,
    as_json: JsonOption = False,
) -> None:
    """Base and tuned model side by side, on your prompts or on held-out rows. Answers are greedy.

    Example: charkha compare runs/support --prompt "My card was swallowed by the ATM in Pune."
    """

    def work() -> dict[str, Any]:
        from charkha.cli.environment import go_offline

        go_offline()
        from charkha.evaluation import compare_run

        pairs = compare_run(run, prompt or [], rows=rows, max_new_tokens=max_new_tokens, on_progress=note)
        return {"run": str(run), "comparisons": pairs}

    run_command(work, _show, as_json)


def _show(result: dict[str, Any]) -> None:
    console = stdout_console()
    for pair in result["comparisons"]:
        console.rule(style="dim")
        for name in ("prompt", "base", "tuned", "expected"):
            if pair[name] is not None:
                console.print(f"{name:>9}  ", style="bold", end="")
                console.print(pair[name].replace("\n", "\n           "), markup=False)
