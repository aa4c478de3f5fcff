"""`charkha quickstart`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from charkha.cli.terminal import JsonOption, near, new_app, new_table, note, run_command, stdout_console
from charkha.units import format_seconds

app = new_app()


@app.command()
def quickstart(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Run folder; default runs/quickstart.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Walks the whole road once, offline, on a CPU, in about two minutes.

    Trains the built-in model to turn messages to a help desk into JSON, measures it on held-out messages before and
    after, merges the adapter, verifies the merged model and asks it in a fresh process.

    Example: charkha quickstart
    """

    def work() -> dict[str, Any]:
        from charkha.cli.environment import go_offline
        from charkha.cli.live import LiveLine

        go_offline()
        from charkha.verbs.quickstart import quickstart as walk

        live = LiveLine()

        def say(text: str) -> None:
            live.close()
            note(text)

        return asdict(walk(output, live, say))

    run_command(work, _show, as_json)


def _show(result: dict[str, Any]) -> None:
    console = stdout_console()
    example = result["example"]
    for name, text in (("message", example["prompt"]), ("base", example["base"]), ("tuned", example["tuned"])):
        console.print(f"{name:>8}  ", style="bold", end="")
        console.print(text, markup=False)
    table = new_table("", ">before", ">after")
    table.add_row(
        f"exact match, {result['rows']} held-out messages",
        _percent(result["exact_match_before"]),
        _percent(result["exact_match_after"]),
    )
    table.add_row("  wording seen in training", "", _percent(result["exact_match_seen_patterns"]))
    table.add_row("  new wording", "", _percent(result["exact_match_new_patterns"]))
    table.add_row("held-out loss", f"{result['eval_loss_before']:.3f}", f"{result['eval_loss_after']:.3f}")
    console.print(table)
    console.print(f"merged model   {near(result['merged'])}  (logits within {result['max_logit_difference']:.1e})")
    times = f"{format_seconds(result['seconds'])}, of it training {format_seconds(result['training_seconds'])}"
    console.print(f"time           {times}")
    chat = f"charkha chat {near(result['run'])}"
    note(
        "\nNow your own data:\n"
        "  charkha data inspect your.jsonl                        what is in it, and what is wrong with it\n"
        "  charkha init --model MODEL --data your.jsonl           writes charkha.yaml\n"
        "  charkha train charkha.yaml                             trains; run it again to go on after any stop\n"
        f"  {chat:<52}   talks to the model you just made"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
