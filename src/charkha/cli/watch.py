"""`charkha watch`."""

from __future__ import annotations

import itertools
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from charkha.cli.terminal import JsonOption, new_app, new_table, run_command, stdout_console
from charkha.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from rich.console import RenderableType

    from charkha.summary import RunSummary

app = new_app()
_BARS = "▁▂▃▄▅▆▇█"
_CURVE_WIDTH = 40


@app.command()
def watch(
    run: Annotated[Path, typer.Argument(help="Run folder.", show_default=False)],
    every: Annotated[float, typer.Option(min=0.2, help="Seconds between looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once and leave.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Shows a run as it goes: step, loss, tokens/s, memory, heat, power, time left. Ends with the run, or with Ctrl-C.

    It only reads the run folder, so it may be started and stopped at any time, from any terminal.

    Example: charkha watch runs/support
    """

    def work() -> dict[str, Any]:
        from charkha.store.runs import RunFolder
        from charkha.summary import summarize

        folder = RunFolder(run)
        summary = summarize(folder)
        if as_json or once or summary.status != "running":
            return {"summary": summary}
        try:
            summary = _follow(folder, every)
        except KeyboardInterrupt:
            summary = summarize(folder)
        return {"summary": summary, "shown": True}

    def with_record() -> dict[str, Any]:
        result = work()
        return asdict(result["summary"]) if as_json else result

    run_command(with_record, _show, as_json)


def _follow(folder: Any, every: float) -> RunSummary:
    from rich.live import Live

    from charkha.summary import summarize

    with Live(console=stdout_console(), auto_refresh=False) as live:
        while True:
            summary = summarize(folder)
            live.update(_view(summary), refresh=True)
            if summary.status != "running":
                return summary
            time.sleep(every)


def _show(result: dict[str, Any]) -> None:
    if not result.get("shown"):
        stdout_console().print(_view(result["summary"]))


def _view(summary: RunSummary) -> RenderableType:
    table = new_table("", "")
    done = summary.step / summary.total_steps if summary.total_steps else 0.0
    rows = {
        "run": summary.run,
        "status": summary.status + (f" ({summary.reason})" if summary.reason else ""),
        "step": f"{summary.step} of {summary.total_steps or '?'}  ({100 * done:.0f} %)",
        "loss": f"{_number(summary.loss)}  {curve(summary.losses)}",
        "held-out loss": f"{_number(summary.eval_loss_before)} -> {_number(summary.eval_loss)}",
        "tokens/s": "-" if summary.tokens_per_second is None else format_count(round(summary.tokens_per_second)),
        "memory": "-" if summary.memory_bytes is None else format_bytes(summary.memory_bytes),
        "temperature": "-" if summary.temperature_c is None else f"{summary.temperature_c:.0f} °C",
        "power": "-" if summary.power_w is None else f"{summary.power_w:.0f} W",
        "left": "-" if summary.seconds_left is None else format_seconds(summary.seconds_left),
        "last sign of life": "-" if summary.quiet_seconds is None else f"{format_seconds(summary.quiet_seconds)} ago",
        "resumes": str(summary.resumes),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def curve(values: tuple[float, ...], width: int = _CURVE_WIDTH) -> str:
    """The values as a row of bars, each the mean of its share of them."""
    if not values:
        return ""
    count = min(width, len(values))
    edges = [len(values) * place // count for place in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((mean - low) * scale)] for mean in means)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
