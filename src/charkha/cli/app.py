"""The command line: one thin function per verb, each in a file of its own, imported only when it is asked for.

Loading on demand keeps `charkha --help` under 0.3 s: the table below holds every command's one-line help, and
typer sees only the file of the command that was called.
"""

from __future__ import annotations

import importlib
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

# command -> (module under charkha.cli, one-line help); the module holds `app`, or what stands behind the colon: a
# Typer with that command or group.
COMMANDS: dict[str, tuple[str, str]] = {
    "quickstart": ("quickstart", "The whole road on the built-in model and data, offline, in about two minutes."),
    "doctor": ("doctor", "Checks driver, CUDA, GPUs, memory, disk, UPS, sensors and offline state."),
    "init": ("init", "Writes a commented charkha.yaml for a model and data."),
    "fetch": ("fetch", "Brings a base model to this machine: resumable, pinned, safetensors only."),
    "plan": ("plan", "Memory, time, energy and money of a run before it starts, on this machine or another."),
    "data": ("data", "Inspects, prepares, scans and previews training data."),
    "train": ("train", "Trains; run it again to go on after any stop."),
    "runs": ("runs", "Lists runs and where each stands."),
    "watch": ("watch", "Shows a run as it goes: step, loss, tokens/s, memory, time left."),
    "pause": ("steer:pause_app", "Saves a run at its next step boundary and lets it wait there."),
    "resume": ("steer:resume_app", "Lets a paused run go on."),
    "stop": ("steer:stop_app", "Saves a run at its next step boundary and ends it."),
    "service": ("service", "Goes on with a run after a reboot or a power cut, as a systemd user unit."),
    "verify-resume": ("verify_resume", "Proves on this machine that a killed run goes on to the same bits."),
    "guard": ("guard", "Shows what the guard would do about heat, watts and power cuts."),
    "eval": ("evaluate", "Held-out loss, perplexity and exact match of a run."),
    "compare": ("compare", "Base and tuned model side by side on your prompts."),
    "chat": ("chat", "Talks to a run's tuned model."),
    "merge": ("merge", "Makes a standalone model and verifies it against base + adapter."),
    "schema": ("schema", "JSON Schema of the config, for editors."),
}


class LazyGroup(TyperGroup):
    """A group that knows its commands by name and imports only the one that runs."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        command = typer.main.get_command(app_of(cmd_name))
        command.name = cmd_name
        return command

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The list of commands from the table above; the inherited one would import every module for its help."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_line) for name, (_module, help_line) in COMMANDS.items()])


def app_of(name: str) -> typer.Typer:
    """The typer app of a command, its module imported now."""
    module, _, attribute = COMMANDS[name][0].partition(":")
    found: typer.Typer = getattr(importlib.import_module(f"charkha.cli.{module}"), attribute or "app")
    return found


app = typer.Typer(
    cls=LazyGroup,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"charkha {version('charkha')}")
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True)] = False,
) -> None:
    """Fine-tunes large language models on hardware you own.

    Start with `charkha quickstart`, then `charkha init` for your own model and data.
    """
    from charkha.cli.environment import prepare_environment
    from charkha.cli.terminal import set_debug

    set_debug(debug)
    prepare_environment()


def main() -> None:
    """Entry point of the `charkha` command."""
    app()


if __name__ == "__main__":
    main()
