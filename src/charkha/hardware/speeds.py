"""How fast bytes move on this machine, as it was measured: from host memory to the GPUs, back, and from the disk.

`charkha doctor` measures and remembers; a plan reads. What is remembered of other cards or another disk is not used.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from charkha.caches import history_folder

_CHUNK_BYTES = 8 << 20
_READ_BYTES, _READ_SECONDS = 512 << 20, 1.5  # whichever comes first ends a measurement of a disk


@dataclass(frozen=True)
class Speeds:
    """Bytes per second; None is unknown. Of several cards the slowest one's, of memory that is pinned."""

    host_to_device_bytes_per_s: float | None = None
    device_to_host_bytes_per_s: float | None = None
    disk_read_bytes_per_s: float | None = None  # one file from its begin, past the page cache


def speeds_file() -> Path | None:
    """The JSON file of what was measured; None where nothing is remembered."""
    folder = history_folder()
    return None if folder is None else folder / "speeds.json"


def remembered_speeds(cards: Sequence[str], folder: Path) -> Speeds:
    """What was measured of these cards (their names) and of the disk that `folder` is on. A damaged file is no file."""
    path = speeds_file()
    try:
        record = json.loads(path.read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError, RecursionError):
        return Speeds()
    links, disks = (_mapping(_mapping(record).get(name)) for name in ("links", "disks"))
    link = _mapping(links.get(_link_key(cards)))
    return Speeds(
        host_to_device_bytes_per_s=_rate(link.get("host_to_device_bytes_per_s")),
        device_to_host_bytes_per_s=_rate(link.get("device_to_host_bytes_per_s")),
        disk_read_bytes_per_s=_rate(disks.get(str(mount_point(folder)))),
    )


def speeds_record(before: Any, cards: Sequence[str], folder: Path, speeds: Speeds) -> dict[str, Any]:
    """The content of the file with `speeds` in it; what was not measured now stays as it was `before`."""
    links, disks = (dict(_mapping(_mapping(before).get(name))) for name in ("links", "disks"))
    if speeds.host_to_device_bytes_per_s is not None:
        links[_link_key(cards)] = {
            "host_to_device_bytes_per_s": speeds.host_to_device_bytes_per_s,
            "device_to_host_bytes_per_s": speeds.device_to_host_bytes_per_s,
        }
    if speeds.disk_read_bytes_per_s is not None:
        disks[str(mount_point(folder))] = speeds.disk_read_bytes_per_s
    return {"version": 1, "links": links, "disks": disks}


def _link_key(cards: Sequence[str]) -> str:
    return " + ".join(cards)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _rate(value: Any) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and 0 < value < math.inf else None


def mount_point(folder: Path) -> Path:
    """Where the file system that `folder` is on, or will be, is mounted."""
    folder = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists()).resolve()
    return next(place for place in (folder, *folder.parents) if os.path.ismount(place) or place == place.parent)


def disk_read_bytes_per_s(path: Path) -> float | None:
    """Bytes per second of reading the file in pieces of 8 MiB, past the page cache where the file system can.

    For at most 1.5 s or 512 MiB; None for a file below one piece. Pages of it that are cached already are asked to be
    dropped, which the system may refuse. Raises OSError.
    """
    buffer = mmap.mmap(-1, _CHUNK_BYTES)  # page-aligned, as direct reads need
    descriptor = _open_direct(path)
    try:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        size, done, began = min(os.fstat(descriptor).st_size, _READ_BYTES), 0, time.perf_counter()
        while done + _CHUNK_BYTES <= size and time.perf_counter() - began < _READ_SECONDS:
            done += os.preadv(descriptor, [buffer], done)
        return done / (time.perf_counter() - began) if done else None
    finally:
        os.close(descriptor)
        buffer.close()


def _open_direct(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    except OSError:
        return os.open(path, os.O_RDONLY)  # tmpfs and some network file systems know no direct reads
