"""`charkha doctor`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from charkha.cli.terminal import JsonOption, new_app, new_table, run_command, stderr_console, stdout_console

app = new_app()
_COLOURS = {"ok": "green", "warn": "yellow", "fail": "bold red", "unknown": "cyan"}
_FAILED = 5  # something that this machine lacks, as for EnvironmentProblem


@app.command()
def doctor(
    target: Annotated[
        Path | None,
        typer.Argument(metavar="RUN_OR_CONFIG", help="A run folder or a config to examine too.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Checks driver, CUDA, 4-bit kernels, GPUs, memory, disk, UPS, sensors and what runs offline.

    Takes about ten seconds. Each line is a fact, a verdict and what to do about it. Exit code 5 when a check fails.

    Example: charkha doctor
    """
    run_command(lambda: _examine(target), _show, as_json)


def _examine(target: Path | None) -> dict[str, Any]:
    from charkha.cli.environment import go_offline
    from charkha.doctor import diagnose

    go_offline()  # as training does: what is checked is what a run will find
    with stderr_console().status("looking at this machine") as status:
        checks = diagnose(target, lambda name: status.update(f"checking: {name}"))
    failed = any(check.verdict == "fail" for check in checks)
    return {"checks": [asdict(check) for check in checks], "exit_code": _FAILED if failed else 0}


def _show(result: dict[str, Any]) -> None:
    from rich.text import Text

    table = new_table("check", "fact", "verdict", "what to do")
    for check in result["checks"]:
        word = Text(check["verdict"], style=_COLOURS[check["verdict"]])
        table.add_row(check["name"], Text(check["fact"]), word, Text(check["remedy"] or ""))
    stdout_console().print(table)
