"""`charkha fetch`."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer

from charkha.cli.terminal import JsonOption, new_app, new_table, note, run_command, stdout_console
from charkha.units import format_bytes, format_seconds

app = new_app()


@app.command()
def fetch(
    model: Annotated[
        str,
        typer.Argument(help="Model id on the hub, author/name, or hub:author/name for a data set.", show_default=False),
    ],
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit; `main` unless given.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Brings a base model to this machine: resumable, verified, safetensors only. No other command needs a network.

    HF_TOKEN opens gated models, HF_HOME moves the cache, HF_ENDPOINT names another hub. Run it again after any stop.

    Example: charkha fetch Qwen/Qwen2.5-0.5B-Instruct
    """
    run_command(lambda: _fetch(model, revision), _show, as_json)


def _fetch(model: str, revision: str | None) -> dict[str, Any]:
    from charkha.verbs.fetching import fetch_data_set, fetch_model

    is_data = model.startswith("hub:")
    line = _ProgressLine()
    try:
        fetched = (fetch_data_set if is_data else fetch_model)(model, revision=revision, progress=line)
    finally:
        line.close()
    return {
        "kind": "data set" if is_data else "model",
        "repo_id": fetched.repo_id,
        "revision": fetched.revision_sha,
        "path": str(fetched.path),
        "files": list(fetched.files),
        "bytes": fetched.bytes,
    }


def _show(result: dict[str, Any]) -> None:
    table = new_table("", "")
    table.add_row(result["kind"], result["repo_id"])
    table.add_row("commit", result["revision"])
    table.add_row("size", f"{format_bytes(result['bytes'])} in {len(result['files'])} files, verified")
    table.add_row("folder", result["path"])
    stdout_console().print(table)
    if result["kind"] == "data set":
        note(f"in charkha.yaml: data.train: [hub:{result['repo_id']}]")
        return
    note(f"in charkha.yaml: model.base: {result['repo_id']}, and to pin it model.revision: {result['revision']}")


class _ProgressLine:
    """Bytes, rate and time left of the file in hand: in place on a terminal, else a line every ten seconds."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._every_seconds = 0.2 if self._terminal else 10.0
        self._drawn_at = time.monotonic()
        self._name = ""
        self._began = (0.0, 0)
        self._open = False

    def __call__(self, name: str, done_bytes: int, total_bytes: int) -> None:
        """Takes one report of the library; see `fetch_model`."""
        now = time.monotonic()
        if name != self._name:
            self._name, self._began = name, (now, done_bytes)
        if now - self._drawn_at < self._every_seconds:
            return
        self._drawn_at = now
        seconds, received = now - self._began[0], done_bytes - self._began[1]
        text = f"{name}  {format_bytes(done_bytes)} of {format_bytes(total_bytes)}"
        if received > 0 and seconds > 0:
            rate = received / seconds
            left = format_seconds((total_bytes - done_bytes) / rate)
            text += f"  {format_bytes(rate)}/s  left {left}"
        if self._terminal:
            sys.stderr.write(f"\r\x1b[2K{text}")
            sys.stderr.flush()
            self._open = True
        else:
            note(text)

    def close(self) -> None:
        """Clears the line."""
        if self._open:
            sys.stderr.write("\r\x1b[2K")
            self._open = False
