"""`charkha merge`."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from charkha.cli.terminal import JsonOption, new_app, new_table, note, run_command, stdout_console
from charkha.units import format_bytes

app = new_app()


class Onto(StrEnum):
    """Which weights the adapter is added to."""

    base = "base"
    dequantized = "dequantized"


@app.command()
def merge(
    run: Annotated[Path, typer.Argument(help="Run folder.", show_default=False)],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the merged model.")] = None,
    onto: Annotated[
        Onto, typer.Option(help="The base as fetched, or the 4-bit base's dequantized weights.")
    ] = Onto.base,
    verify: Annotated[bool, typer.Option(help="Compare logits with base + adapter afterwards.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Merges a run's adapter into its base: a standalone Hugging Face folder, verified on real prompts.

    Example: charkha merge runs/support
    """

    def work() -> dict[str, Any]:
        from charkha.cli.environment import go_offline

        go_offline()
        from charkha.verbs.merging import merge_run

        last = {"stage": ""}

        def progress(text: str) -> None:
            stage = text.partition(" ")[0]
            if stage != last["stage"]:
                note(text)
            last["stage"] = stage

        result = merge_run(run, output=output, onto=onto.value, verify=verify, on_progress=progress)
        return asdict(result)

    run_command(work, _show, as_json)


def _show(result: dict[str, Any]) -> None:
    table = new_table("", ">")
    table.add_row("merged model", result["path"])
    table.add_row("size", format_bytes(result["bytes"]))
    if result["verified"] is not None:
        table.add_row("verified", "yes" if result["verified"] else "no")
        table.add_row("largest logit difference", f"{result['max_logit_difference']:.2e}")
        table.add_row("explained by rounding", f"up to {result['allowed_logit_difference']:.2e}")
    table.add_row("peak memory of the merge", format_bytes(result["peak_rss_bytes"]))
    stdout_console().print(table)
    if result["note"]:
        note(result["note"])
