"""`charkha init`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from charkha.cli.terminal import JsonOption, new_app, note, parse_mapping, run_command, stdout_console

app = new_app()


@app.command()
def init(
    model: Annotated[str, typer.Option("--model", "-m", help="Hub id, folder, or `starter`.")] = "starter",
    data: Annotated[list[Path] | None, typer.Option("--data", "-d", help="Training file; repeatable.")] = None,
    map_: Annotated[str | None, typer.Option("--map", help="prompt=question,completion=answer")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Config file to write.")] = Path("charkha.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Writes a commented charkha.yaml for a model and data.

    Example: charkha init --model Qwen/Qwen2.5-0.5B-Instruct --data support.jsonl
    """

    def work() -> dict[str, Any]:
        from charkha.verbs.starting import write_config

        mapping = parse_mapping(map_)
        return asdict(write_config(output, model=model, data=data or [], mapping=mapping, force=force))

    run_command(work, _show, as_json)


def _show(result: dict[str, Any]) -> None:
    for text in result["notes"]:
        note(text)
    stdout_console().print(result["path"])
    note(f"next: charkha train {result['path']}")
