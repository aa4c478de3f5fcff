"""`charkha train`."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from charkha.cli.terminal import (
    JsonOption,
    is_debugging,
    near,
    new_app,
    new_table,
    note,
    parse_mapping,
    run_command,
    stdout_console,
)
from charkha.errors import Paused

if TYPE_CHECKING:
    from charkha.store.runs import RunFolder

app = new_app()


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="The run's charkha.yaml.", show_default=False)],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Overrides a key; repeatable.")
    ] = None,
    map_: Annotated[
        str | None, typer.Option("--map", help="Columns by name: prompt=question,completion=answer.")
    ] = None,
    accept_changes: Annotated[
        bool,
        typer.Option(
            "--accept-changes",
            help="Go on with a run under other versions, on another machine, or with other settings.",
        ),
    ] = False,
    ignore_plan: Annotated[
        bool, typer.Option("--ignore-plan", help="Begin although the plan says that the run does not fit.")
    ] = False,
    foreground: Annotated[
        bool,
        typer.Option("--foreground", envvar="CHARKHA_FOREGROUND", help="Train in this very process, not restarted."),
    ] = False,
    follow_parent: Annotated[int | None, typer.Option("--follow-parent", hidden=True)] = None,
    as_json: JsonOption = False,
) -> None:
    """Trains the model that the config describes. Run it again to go on after any stop.

    The training itself is a child process: after a crash, a kill or too little GPU memory it is started again and goes
    on from the last checkpoint. Ctrl-C finishes the step, saves and leaves with exit code 75; a second Ctrl-C leaves
    at once with the last saved step.

    Example: charkha train charkha.yaml --set training.learning_rate=1e-4
    """
    overrides = [*(set_ or []), *_map_override(map_)]
    if not foreground:
        _supervise(
            config,
            overrides,
            [*_named("--accept-changes", accept_changes), *_named("--ignore-plan", ignore_plan)],
            as_json,
        )
    if follow_parent is not None:
        from charkha.training.signals import end_with_parent

        end_with_parent(follow_parent)
    work = partial(
        _train,
        config,
        overrides,
        accept_changes=accept_changes,
        keep_wish=follow_parent is not None,
        ignore_plan=ignore_plan,
    )
    run_command(work, _show, as_json)


def _named(option: str, given: bool) -> list[str]:
    return [option] if given else []


def _supervise(config: Path, overrides: list[str], options: list[str], as_json: bool) -> NoReturn:
    """Leaves with the worker's exit code; what the worker prints is the answer."""

    def work() -> dict[str, Any]:
        from charkha.config_file import load_config
        from charkha.store.control import Control
        from charkha.store.runs import RunFolder
        from charkha.training.supervisor import supervise, worker_command

        loaded = load_config(config, overrides)  # a broken config is answered here
        run = RunFolder((loaded.folder / loaded.config.output).resolve())
        if run.exists:
            Control(run.path).set_wish("run")  # once: a worker that is started again heeds what was asked meanwhile
        arguments = [part for override in overrides for part in ("--set", override)]
        arguments += options
        arguments += ["--json"] if as_json else []
        command = worker_command(config, arguments, debug=is_debugging())
        if not as_json:
            raise typer.Exit(supervise(command, run, note))
        with tempfile.TemporaryFile() as answer:
            code = supervise(command, run, note, answer=answer)
            answer.seek(0)
            _print_answer(answer.read(), run)
        raise typer.Exit(code)

    run_command(work, _show, as_json)
    raise AssertionError("a supervised run always leaves by its exit code")


def _print_answer(text: bytes, run: RunFolder) -> None:
    """One object, however many workers there were; one that was killed in the middle of its end leaves none."""
    from charkha.summary import summarize

    try:
        json.loads(text)
    except ValueError:
        summary = summarize(run)
        text = json.dumps({"run": str(run.path), "status": summary.status, "steps": summary.step}).encode() + b"\n"
    typer.echo(text, nl=False)


def _map_override(text: str | None) -> list[str]:
    """`--map` as the `--set` that it stands for."""
    return [f"data.map={json.dumps(parse_mapping(text))}"] if text else []


def _train(config: Path, overrides: list[str], **wishes: bool) -> dict[str, Any]:
    from charkha.cli.environment import go_offline
    from charkha.cli.live import LiveLine
    from charkha.config_file import load_config

    load_config(config, overrides)  # a broken config is answered before torch is imported
    go_offline()
    from charkha.training.session import train as train_run

    live = LiveLine()
    try:
        result = train_run(config, overrides, live, **wishes)
    finally:
        live.close()
    return asdict(result) | ({"exit_code": Paused.exit_code} if result.status == "paused" else {})


def _show(result: dict[str, Any]) -> None:
    table = new_table("", ">")
    rows = {
        "status": result["status"],
        "steps": f"{result['steps']} of {result['total_steps']}",
        "loss, first and last step": _pair(result["loss_first"], result["loss_last"]),
        "held-out loss, before and after": _pair(result["eval_loss_before"], result["eval_loss_after"]),
        "tokens": f"{result['tokens']:,}",
        "tokens per second": str(result["tokens_per_second"]),
        "seconds": str(result["seconds"]),
        "adapter": str(result["adapter"]),
    }
    for name, value in rows.items():
        table.add_row(name, value)
    stdout_console().print(table)
    if result["status"] == "paused":
        note("paused with everything saved; the same command goes on")
    else:
        run = near(result["run"])
        note(f"next: charkha eval {run}   charkha chat {run}   charkha merge {run}")


def _pair(before: float | None, after: float | None) -> str:
    return " -> ".join("-" if value is None else f"{value:.4f}" for value in (before, after))
