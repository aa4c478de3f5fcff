"""`charkha pause`, `charkha resume`, `charkha stop`: steer a run through its folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from charkha.cli.terminal import JsonOption, near, new_app, note, run_command

if TYPE_CHECKING:
    from charkha.store.control import Wish

RunArgument = Annotated[Path, typer.Argument(help="Run folder.", show_default=False)]
pause_app, resume_app, stop_app = new_app(), new_app(), new_app()


@pause_app.command()
def pause(run: RunArgument, as_json: JsonOption = False) -> None:
    """Saves at the next step boundary and waits there, the GPU idle, until `charkha resume`.

    Example: charkha pause runs/support
    """
    _steer(run, "pause", "saves at the next step boundary and waits there; `charkha resume` goes on", as_json)


@resume_app.command()
def resume(run: RunArgument, as_json: JsonOption = False) -> None:
    """Lets a paused run go on. (A run whose process has ended goes on with `charkha train`.)

    Example: charkha resume runs/support
    """
    _steer(run, "run", "goes on", as_json)


@stop_app.command()
def stop(run: RunArgument, as_json: JsonOption = False) -> None:
    """Saves at the next step boundary and ends the process; `charkha train` goes on from there.

    Example: charkha stop runs/support
    """
    _steer(run, "stop", "saves at the next step boundary and ends; `charkha train` goes on from there", as_json)


def _steer(run: Path, wish: Wish, told: str, as_json: bool) -> None:
    def work() -> dict[str, Any]:
        from charkha.errors import RunFolderError
        from charkha.store.control import Control
        from charkha.store.runs import RunFolder

        folder = RunFolder(run).require()
        if not folder.is_locked():
            raise RunFolderError(
                "no process is training in this folder",
                where=str(run),
                remedy=f"`charkha train {near(str(folder.config_path))}` goes on with this run",
            )
        Control(folder.path).set_wish(wish)
        return {"run": str(run), "wish": wish}

    run_command(work, lambda result: note(f"{result['run']}: {told}"), as_json)
