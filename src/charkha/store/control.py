"""A run steered through its folder: one small file that says what is wished of it, and one that shows it is alive.

Any process may write the wish, with no more than the right to write in the folder; the worker reads it at every step
boundary. The heartbeat is a file whose time changes while the worker gets on; only changes count, never the clock.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Literal

from charkha.store import durable

Wish = Literal["run", "pause", "stop"]
_WISHES: tuple[Wish, ...] = ("run", "pause", "stop")


class Control:
    """The wish for one run folder, and its heartbeat."""

    def __init__(self, run_folder: Path) -> None:
        self.wish_path = run_folder / "control.json"
        self.heartbeat_path = run_folder / "heartbeat"

    def wish(self) -> Wish:
        """What is wished; `run` where nothing readable says otherwise."""
        try:
            wished = json.loads(self.wish_path.read_bytes())["wish"]
        except (OSError, ValueError, KeyError, TypeError):
            return "run"
        return wished if wished in _WISHES else "run"

    def set_wish(self, wish: Wish) -> None:
        """Replaces the wish; `run` removes it. Raises OSError where the folder cannot be written."""
        if wish == "run":
            durable.remove_file(self.wish_path)
        else:
            durable.write_durably(self.wish_path, json.dumps({"wish": wish}).encode())

    def beat(self) -> None:
        """Shows that the worker gets on. A full disk may not stop it: the file holds nothing."""
        try:
            os.utime(self.heartbeat_path)
        except FileNotFoundError:
            self._first_beat()
        except OSError:
            return

    def _first_beat(self) -> None:
        try:
            self.heartbeat_path.touch()
        except OSError:
            return

    def last_beat(self) -> int | None:
        """A number that changes with every beat; None before the first."""
        try:
            return self.heartbeat_path.stat().st_mtime_ns
        except OSError:
            return None
