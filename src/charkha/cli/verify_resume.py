"""`charkha verify-resume`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from charkha.cli.terminal import JsonOption, new_app, note, run_command, stdout_console

app = new_app()
EXIT_DIFFERENT = 7


@app.command()
def verify_resume(
    config: Annotated[Path, typer.Argument(help="The run's charkha.yaml.", show_default=False)],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Overrides a key; repeatable.")
    ] = None,
    steps: Annotated[int, typer.Option(min=2, help="Optimizer steps of each run.")] = 6,
    kills: Annotated[int, typer.Option(min=1, help="How often the second run is killed.")] = 2,
    seed: Annotated[int, typer.Option(help="Decides after which steps.")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Proves on this machine that a killed run goes on to the same bits: a short run of your config, twice.

    One is left alone, the other is killed with SIGKILL and started again; losses, gradient norms and the trained
    weights are compared bit for bit. Both are removed afterwards. Exit code 7 when they differ.

    Example: charkha verify-resume charkha.yaml
    """

    def work() -> dict[str, Any]:
        from charkha.verbs.verify_resume import verify_resume as prove

        proof = prove(config, set_ or [], steps=steps, kills=kills, seed=seed, say=note)
        return asdict(proof) | ({} if proof.identical else {"exit_code": EXIT_DIFFERENT})

    run_command(work, _show, as_json)


def _show(result: dict[str, Any]) -> None:
    kills = ", ".join(map(str, result["kills"]))
    if result["identical"]:
        text = f"{result['steps']} steps, killed after {kills}: every loss and every trained bit is the same"
    else:
        text = "\n".join([f"{result['steps']} steps, killed after {kills}: not the same", *result["differences"]])
    stdout_console().print(text, markup=False)
