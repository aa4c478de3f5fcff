"""The run folder: who may write to it, its frozen config, its provenance and its events.

Files are the interface between processes; every reader here works on a folder that another process is writing.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from charkha.errors import RunDamaged, RunFolderError, RunInUse
from charkha.events import from_lines, in_effect, make_event, to_line
from charkha.store import durable

_RECORDS = ("base", "data")  # what every manifest has, whatever else it has


class RunFolder:
    """Paths and records of one run. Creating the object touches nothing on the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_path = path / "charkha.yaml"
        self.manifest_path = path / "manifest.json"
        self.events_path = path / "events.jsonl"
        self.data = path / "data"
        self.adapter = path / "adapter"
        self.merged = path / "merged"
        self._unwritten: list[str] = []  # events that the disk has not taken yet
        self._events_named = False  # whether events.jsonl's own name is on the disk
        self._events_in_doubt = False  # whether a sync of it failed

    @property
    def exists(self) -> bool:
        """Whether a run was started here."""
        return self.config_path.is_file()

    def require(self) -> RunFolder:
        """Itself, when it holds a run; raises RunFolderError otherwise."""
        if self.exists:
            return self
        found = (
            sorted(str(config.parent) for config in self.path.parent.glob("*/charkha.yaml"))
            if self.path.parent.is_dir()
            else []
        )
        hint = f"runs beside it: {', '.join(found[:5])}" if found else "`charkha train CONFIG` makes one"
        raise RunFolderError("holds no run (no charkha.yaml)", where=str(self.path), remedy=hint)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Exclusive use of the folder until the block ends; a dead process's lock is gone by itself (flock).

        Raises RunInUse naming the process that holds it, RunFolderError for a folder that cannot be made or written.
        """
        try:
            durable.make_folder(self.path)
            descriptor = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise RunFolderError(
                f"the run folder cannot be written: {error.strerror}",
                where=str(self.path),
                remedy="choose an `output` that you may write to, or mount its disk for writing",
            ) from error
        try:
            if not _take(descriptor):
                holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
                raise RunInUse(
                    f"process {holder} is training in this folder",
                    where=str(self.path),
                    remedy="wait for it, stop it (Ctrl-C in its terminal), or give this run another `output`",
                )
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
            yield
        finally:
            os.close(descriptor)  # releases the lock

    def is_locked(self) -> bool:
        """Whether a living process holds the lock. The look itself takes a shared lock for an instant."""
        try:
            descriptor = os.open(self.path / ".lock", os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def write_json(self, path: Path, record: dict[str, Any]) -> None:
        """Replaces a small JSON file durably."""
        durable.write_durably(path, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())

    def read_manifest(self) -> dict[str, Any]:
        """manifest.json with its `base` and `data` records; raises RunDamaged when it is missing or broken."""
        try:
            manifest = json.loads(self.manifest_path.read_bytes())
            if not isinstance(manifest, dict) or not all(isinstance(manifest.get(key), dict) for key in _RECORDS):
                raise ValueError(f"it holds no records of {' and '.join(_RECORDS)}")
        except (OSError, ValueError) as error:
            raise RunDamaged(
                f"manifest.json cannot be read: {error}",
                where=str(self.path),
                remedy="copy the file back from a backup, or move the folder away to begin anew",
            ) from None
        return manifest

    def append(self, name: str, **fields: Any) -> dict[str, Any]:
        """Appends one event (see events.py) and returns it. Given to the system, not yet to the disk: `sync_events`."""
        event = make_event(name, **fields)
        self._unwritten.append(to_line(event) + "\n")
        with suppress(OSError):  # a full disk: the lines wait here, and the next checkpoint says what is the matter
            self._write_lines()
        return event

    def sync_events(self) -> None:
        """Puts the events so far on the disk; called with every checkpoint. Lines that do not fit yet are kept."""
        with suppress(OSError):
            self._write_lines()
            if self.events_path.exists():
                self._sync_lines()

    def _sync_lines(self) -> None:
        if self._events_in_doubt:  # the system may have dropped what it could not sync: a new file takes its place
            durable.write_durably(self.events_path, self.events_path.read_bytes())
        self._events_in_doubt = True
        durable.sync_file(self.events_path)
        self._events_in_doubt = False
        if not self._events_named:
            durable.sync_folder(self.path)
            self._events_named = True

    def _write_lines(self) -> None:
        if not self._unwritten:
            return
        data = "".join(self._unwritten).encode()
        # A line cut short, by a power cut or a full disk, must not swallow the next one.
        data = b"\n" + data if self._ends_in_part() else data
        before = self.events_path.stat().st_size if self.events_path.exists() else 0
        try:
            durable.append(self.events_path, data)
        except OSError:  # whole lines that a disk running full has taken are not written again
            taken = data[: self.events_path.stat().st_size - before] if self.events_path.exists() else b""
            del self._unwritten[: taken.lstrip(b"\n").count(b"\n")]
            raise
        self._unwritten.clear()

    def events(self) -> list[dict[str, Any]]:
        """The events in effect, oldest first; empty when there are none yet."""
        if not self.events_path.exists():
            return []
        with self.events_path.open(encoding="utf-8", errors="replace") as file:
            return in_effect(from_lines(file))

    def _ends_in_part(self) -> bool:
        try:
            with self.events_path.open("rb") as file:
                file.seek(-1, os.SEEK_END)
                return file.read(1) != b"\n"
        except (FileNotFoundError, OSError):
            return False


def _take(descriptor: int) -> bool:
    """Tries for half a second: a reader that looks whether the run is alive holds the lock for an instant."""
    for attempt in range(10):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.05 if attempt < 9 else 0)
    return False
