"""`charkha service`: a systemd user unit that goes on with a run after a reboot or a power cut."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from charkha.cli.terminal import JsonOption, near, new_app, new_table, note, run_command, stdout_console

app = new_app(help="Goes on with a run after a reboot or a power cut, as a systemd user unit.", no_args_is_help=True)

ConfigArgument = Annotated[Path, typer.Argument(help="The run's charkha.yaml.", show_default=False)]


@app.command()
def install(
    config: ConfigArgument,
    now: Annotated[bool, typer.Option("--now", help="Start it at once; otherwise at the next boot.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Writes and enables a unit that trains the config at every boot until the run is done, once the mains are stable.

    It starts a crashed run again, and one that stopped for a low battery when the mains are back. It leaves alone what
    was stopped by `charkha stop`, heat or a spent budget, until the next boot. No secret is written.

    Example: charkha service install charkha.yaml
    """

    def work() -> dict[str, Any]:
        from charkha.verbs.service import install_service

        return asdict(install_service(config, start=now))

    run_command(work, _show_installed, as_json)


def _show_installed(result: dict[str, Any]) -> None:
    stdout_console().print(result["unit"], markup=False)
    unit = Path(result["unit"]).name
    if result["started"]:
        note("enabled and started")
    elif result["enabled"]:
        note(f"enabled: it starts at the next boot, or now with `systemctl --user start --no-block {unit}`")
    else:
        note(f"written, not enabled: {result['reason']}")
    if result["linger"] is False:
        note("without lingering it starts only when you log in, not at boot")
    elif result["linger"] is None:
        note("whether it starts at boot, or only when you log in, cannot be told here: lingering decides")
    _show_to_do(result)
    if result["enabled"]:
        note(f"its output: journalctl --user --unit {unit}")


def _show_to_do(result: dict[str, Any]) -> None:
    if result["to_do"]:
        note("left for you:\n" + "\n".join(f"  {command}" for command in result["to_do"]))


@app.command()
def status(config: ConfigArgument, as_json: JsonOption = False) -> None:
    """Where the unit stands, as systemctl tells, and its run.

    Example: charkha service status charkha.yaml
    """

    def work() -> dict[str, Any]:
        from charkha.verbs.service import service_status

        return asdict(service_status(config))

    run_command(work, _show_status, as_json)


def _show_status(result: dict[str, Any]) -> None:
    table = new_table("", "")
    table.add_row("unit", result["unit"] if result["installed"] else "not installed")
    table.add_row("enabled", result["enabled"])
    table.add_row("active", result["active"])
    table.add_row("run", near(result["run"]))
    reason = f" ({result['run_reason']})" if result["run_reason"] else ""
    table.add_row("status of the run", result["run_status"] + reason)
    stdout_console().print(table)


@app.command()
def remove(config: ConfigArgument, as_json: JsonOption = False) -> None:
    """Disables and deletes the unit. A training that goes on now goes on; `charkha stop RUN` ends it.

    Example: charkha service remove charkha.yaml
    """

    def work() -> dict[str, Any]:
        from charkha.verbs.service import remove_service

        return asdict(remove_service(config))

    run_command(work, _show_removed, as_json)


def _show_removed(result: dict[str, Any]) -> None:
    for unit in result["units"]:
        note(f"removed {unit}")
    _show_to_do(result)


@app.command("wait-mains")
def wait_mains(
    config: ConfigArgument,
    stable: Annotated[float, typer.Option("--stable", metavar="S", min=0, help="Seconds of mains to wait for.")] = 30.0,
    unknown: Annotated[
        float, typer.Option("--unknown", metavar="S", min=0, help="Seconds after which a silent UPS holds nobody up.")
    ] = 120.0,
    poll: Annotated[float, typer.Option("--poll", metavar="S", min=0.01, help="Seconds from look to look.")] = 2.0,
    as_json: JsonOption = False,
) -> None:
    """Waits until the mains are stable, as the config's `guard.ups` tells; used by the unit before it trains.

    Returns at once where there is no UPS. A silent UPS is no reason not to train: that is said, and the exit code is 0.

    Example: charkha service wait-mains charkha.yaml
    """

    def work() -> dict[str, Any]:
        from charkha.verbs.service import wait_for_mains

        return asdict(wait_for_mains(config, note, stable_s=stable, unknown_s=unknown, poll_s=poll))

    run_command(work, _show_wait, as_json)


def _show_wait(result: dict[str, Any]) -> None:
    source, waited = result["source"], f"{result['waited_s']:.0f} s"
    told = {
        "no_ups": "no UPS to ask: going on at once",
        "stable": f"{source}: the mains are stable after {waited}: going on",
        "unknown": f"{source}: does not tell after {waited} ({result['reason']}): going on without it",
    }
    note(told[result["outcome"]])


@app.command("after-exit")
def after_exit(config: ConfigArgument, as_json: JsonOption = False) -> None:
    """Whether the run that has just ended is to be started again; used by the unit after each end, as ExecStopPost.

    Exit code 69 where it stopped for a low battery: systemd then starts it again, and it waits for the mains. Exit
    code 0 otherwise. What ended it is taken from EXIT_STATUS, which systemd sets, and from the run folder.

    Example: charkha service after-exit charkha.yaml
    """

    def work() -> dict[str, Any]:
        from charkha.verbs.service import EXIT_RESUMES, resumes_after_exit

        resumes = resumes_after_exit(config)
        return {"resumes": resumes, "exit_code": EXIT_RESUMES if resumes else 0}

    run_command(work, _show_after_exit, as_json)


def _show_after_exit(result: dict[str, Any]) -> None:
    if result["resumes"]:
        note("stopped for a low battery: it goes on when the mains are stable again")
