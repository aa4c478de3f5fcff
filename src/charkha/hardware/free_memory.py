"""Host memory that a new program could have now, within what a container or service allows it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def free_host_bytes(cgroups: Path = _CGROUPS, own: Path = Path("/proc/self/cgroup")) -> int:
    """Memory that needs no swapping: what the kernel calls available, or less where a control group's limit is nearer.

    Not covered: limits on addresses (`ulimit -v`), which say little about memory that is used.
    """
    import psutil

    rooms = (_room(group) for group in _groups(cgroups, own))
    available = int(psutil.virtual_memory().available)
    return max(0, min([available, *(room for room in rooms if room is not None)]))


def _groups(cgroups: Path, own: Path) -> Iterator[Path]:
    """The process's group and all above it; in a container its own is the root that is seen."""
    lines = own.read_text(encoding="utf-8").splitlines() if own.is_file() else []
    yield from (cgroups, cgroups / "memory")
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers and "memory" not in controllers.split(","):
            continue
        root = cgroups / "memory" if controllers else cgroups  # version 1 has a tree for each controller
        group = root / path.lstrip("/")
        while root in group.parents:
            yield group
            group = group.parent


# Limit, use, and what of the use are idle file pages: version 2 and version 1.
_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def _room(group: Path) -> int | None:
    """Its limit less what is used; file pages that nobody has touched for a while give way. None without a limit."""
    for limit_file, used_file, idle_name in _FILES:
        limit = _number(group / limit_file)
        if limit is not None:
            return limit - (_number(group / used_file) or 0) + _statistic(group / "memory.stat", idle_name)
    return None


def _number(path: Path) -> int | None:
    """The number in the file; None where there is no file, or no limit in it."""
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _statistic(path: Path, name: str) -> int:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0)
