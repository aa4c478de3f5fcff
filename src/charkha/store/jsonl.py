"""A small file of JSON lines that several processes add to: nothing is lost, and a line cut short harms no other."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from charkha.store import durable


def add_line(path: Path, line: str, *, most: int) -> None:
    """Adds one line, on the disk when this returns; the oldest go when there are twice `most`. Raises OSError."""
    durable.make_folder(path.parent)
    with _locked(path.with_suffix(".lock")):
        before = path.read_bytes() if path.exists() else b""
        data = line.encode() + b"\n"
        kept = before.splitlines(keepends=True)
        if len(kept) >= 2 * most:
            durable.write_durably(path, b"".join(kept[-most:]).removesuffix(b"\n") + b"\n" + data)
            return
        durable.append(path, data if not before or before.endswith(b"\n") else b"\n" + data)
        durable.sync_file(path)
        if not before:
            durable.sync_folder(path.parent)


def read_lines(path: Path) -> list[str]:
    """Its lines that hold anything, oldest first; none where it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip()]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)  # releases the lock
