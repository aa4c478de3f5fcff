"""`charkha guard`: what the guard would do about heat, watts and power cuts."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from charkha.cli.terminal import JsonOption, new_app, new_table, note, run_command, stdout_console

app = new_app(help="Shows what the guard would do about heat, watts and power cuts.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Shows what the guard would do about heat, watts and power cuts."""


@app.command()
def simulate(
    trace: Annotated[Path, typer.Argument(help="JSONL file, one object with readings a line.", show_default=False)],
    target: Annotated[
        float, typer.Option("--target", metavar="C", help="GPU temperature to hold, in degrees Celsius.")
    ] = 83.0,
    max_power: Annotated[
        float | None, typer.Option("--max-power", metavar="W", help="Ceiling for all GPUs together, in watts.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Runs the guard over a trace of readings and shows each decision that changed something.

    The readings stay as recorded: a limit that the guard sets does not cool them. Exit code 4 for a bad line.

    Example: charkha guard simulate readings.jsonl --target 80
    """
    run_command(lambda: _simulate(trace, target, max_power), _show, as_json)


def _simulate(path: Path, target_c: float, max_power_w: float | None) -> dict[str, Any]:
    from charkha.guard_limits import GuardLimits
    from charkha.guard_trace import changing, describe, read_trace, run_trace, summarize_trace

    trace = read_trace(path)
    decisions = run_trace(trace, GuardLimits(target_temperature_c=target_c, max_power_w=max_power_w))
    summary = summarize_trace(trace, decisions)
    return {
        "trace": str(path),
        "decisions": [{"time_s": time_s, **asdict(decision)} for time_s, decision in changing(decisions)],
        "summary": asdict(summary) | {"text": describe(summary)},
    }


def _show(result: dict[str, Any]) -> None:
    table = new_table(">time (s)", "action", ">idle", "power limits", "why")
    for decision in result["decisions"]:
        limits = ", ".join("-" if watts is None else f"{watts:.0f} W" for watts in decision["power_limits_w"])
        table.add_row(
            f"{decision['time_s']:g}",
            decision["action"] + (" + save" if decision["save"] else ""),
            f"{decision['pace']:.0%}",
            limits or "-",
            "; ".join([*decision["reasons"], *decision["notes"]]),
        )
    if result["decisions"]:
        stdout_console().print(table)
    else:
        note("the guard would have changed nothing")
    stdout_console().print(result["summary"]["text"])
