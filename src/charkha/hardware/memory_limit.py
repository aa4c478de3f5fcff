"""How much memory a process on this host may hold: the RAM there is, or what its control groups allow it.

A container, a systemd unit with MemoryMax or a batch job sees the whole host's RAM in /proc/meminfo; the kernel kills
it at the limit of its group or of one above. Both versions of control groups are read (Linux's cgroup-v2.rst and
memory.rst).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

# Version 1 has no word for "none": a number near 2^63, rounded to pages.
_NO_LIMIT = 1 << 60
_PROC, _SYS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def memory_limit_bytes(membership: Path = _PROC, mount: Path = _SYS) -> int | None:
    """The smallest limit of this process's control groups; None where none is set, and on other systems than Linux."""
    limits = [limit for path in _limit_files(membership, mount) if (limit := _limit(path)) is not None]
    return min(limits, default=None)


def _limit_files(membership: Path, mount: Path) -> Iterator[Path]:
    """Of this process's groups and all above them. In a container the path may be the host's, its root ours."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, name = mount, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = mount / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = root / path.lstrip("/")
        yield from (folder / name for folder in (group, *group.parents) if folder == root or root in folder.parents)


def _limit(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() and int(text) < _NO_LIMIT else None
