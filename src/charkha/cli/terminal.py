"""How every command talks: results on stdout (one JSON object with --json), progress and notes on stderr.

Only `cli/` and `web/` draw. A command is a function that returns its result as a dict of the JSON contract and is
run by `run_command`, which turns errors into one message and an exit code.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from charkha.errors import CharkhaError, ConfigError, DataError, DoesNotFit, UsageError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on stdout; progress and notes on stderr.")]

_debug = False


def new_app(**settings: Any) -> typer.Typer:
    """The typer app of one command file, with the settings that all commands share."""
    return typer.Typer(
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        **settings,
    )


def set_debug(on: bool) -> None:
    """Whether errors show their traceback (`charkha --debug COMMAND`)."""
    global _debug
    _debug = on


def is_debugging() -> bool:
    """Whether errors show their traceback."""
    return _debug


def stdout_console() -> Console:
    """Where results go when `--json` is not given."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


def stderr_console() -> Console:
    """Where progress and notes go, always."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def note(text: str) -> None:
    """One line for the person watching; never part of the result. A terminal that is gone is no error."""
    with suppress(OSError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def near(path: str) -> str:
    """The path as a person would type it here: relative when it lies below the working folder."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return path


def run_command(work: Callable[[], dict[str, Any]], show: Callable[[dict[str, Any]], None], as_json: bool) -> None:
    """Runs `work`, prints its result as JSON or through `show`, and leaves with the error's exit code if it fails.

    A result may carry `exit_code` (a verdict that is not an error, such as a paused run); it is not printed.
    """
    try:
        result = work()
    except CharkhaError as error:
        fail(error, as_json)
    except KeyboardInterrupt:
        fail(CharkhaError("interrupted", remedy="run the same command again"), as_json, exit_code=130)
    except BrokenPipeError:
        raise typer.Exit(1) from None
    exit_code = result.pop("exit_code", 0)
    if as_json:
        print_json(result)
    else:
        show(result)
    raise typer.Exit(exit_code)


def print_json(record: dict[str, Any]) -> None:
    """The one JSON object of `--json`."""
    sys.stdout.write(json.dumps(record, ensure_ascii=False, indent=1, allow_nan=False) + "\n")
    sys.stdout.flush()


def fail(error: CharkhaError, as_json: bool, exit_code: int | None = None) -> NoReturn:
    """Reports `error` (stderr; with --json also as the JSON object) and exits with its code."""
    if _debug:
        traceback.print_exception(error)
    note(f"charkha: {error}")
    if as_json:
        print_json(error_record(error))
    raise typer.Exit(error.exit_code if exit_code is None else exit_code)


def error_record(error: CharkhaError) -> dict[str, Any]:
    """The error as the JSON contract has it; a data error carries `files`, a config error `problems`."""
    record: dict[str, Any] = {
        "error": {"kind": error.kind, "message": error.message, "where": error.where, "remedy": error.remedy}
    }
    if isinstance(error, DataError):
        record["files"] = [asdict(file) for file in error.files]
    if isinstance(error, ConfigError):
        record["error"]["problems"] = [asdict(problem) for problem in error.problems]
    if isinstance(error, DoesNotFit):
        record["fits"] = False
    return record


def parse_mapping(text: str | None) -> dict[str, str]:
    """`prompt=question,completion=answer` -> {"prompt": "question", "completion": "answer"}. Raises UsageError."""
    mapping: dict[str, str] = {}
    for part in (text or "").split(",") if text else []:
        ours, equals, theirs = part.partition("=")
        if not equals or not ours.strip() or not theirs.strip():
            raise UsageError(f"{part!r} is not of the form ours=theirs", where="--map", remedy="--map prompt=question")
        mapping[ours.strip()] = theirs.strip()
    return mapping


def new_table(*columns: str, title: str | None = None) -> Table:
    """An empty table in the one style of all commands; columns that begin with `>` are aligned right."""
    from rich import box
    from rich.table import Table

    named = any(column.removeprefix(">") for column in columns)
    style = box.SIMPLE_HEAD if named else None
    table = Table(title=title, box=style, title_justify="left", pad_edge=False, show_header=named)
    for column in columns:
        right = column.startswith(">")
        table.add_column(column.removeprefix(">"), justify="right" if right else "left", overflow="fold")
    return table
