"""The limit of a process's control groups, of both versions, its own or one above."""

from __future__ import annotations

from pathlib import Path

import pytest

from charkha.hardware.memory_limit import memory_limit_bytes
from charkha.hardware.probe import probe_host

GIB = 2**30


def limits(folder: Path, membership: str, files: dict[str, str]) -> int | None:
    (folder / "cgroup").write_text(membership)
    for name, content in files.items():
        path = folder / "sys" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return memory_limit_bytes(folder / "cgroup", folder / "sys")


V1_NONE = "9223372036854771712\n"


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/job\n", {"job/memory.max": f"{8 * GIB}\n"}, 8 * GIB),
        ("0::/user/job\n", {"user/job/memory.max": "max\n", "user/memory.max": f"{4 * GIB}\n"}, 4 * GIB),
        ("0::/user/job\n", {"user/job/memory.max": f"{2 * GIB}\n", "user/memory.max": f"{4 * GIB}\n"}, 2 * GIB),
        ("0::/job\n", {"job/memory.max": "max\n"}, None),
        ("9:memory:/job\n0::/\n", {"memory/job/memory.limit_in_bytes": f"{3 * GIB}\n"}, 3 * GIB),
        ("9:cpu,memory:/job\n", {"memory/job/memory.limit_in_bytes": V1_NONE}, None),
        ("0::/of/the/host\n", {"memory.max": f"{GIB}\n"}, GIB),  # a container whose own root is mounted
        ("5:cpu:/job\n", {"memory/job/memory.limit_in_bytes": f"{GIB}\n"}, None),
    ],
)
def test_the_smallest_limit_of_a_group_or_one_above_counts(tmp_path, membership, files, expected):
    assert limits(tmp_path, membership, files) == expected


def test_a_system_without_control_groups_has_no_limit(tmp_path):
    assert memory_limit_bytes(tmp_path / "absent", tmp_path) is None


def test_the_hosts_memory_is_no_more_than_the_limit(monkeypatch):
    monkeypatch.setattr("charkha.hardware.probe.memory_limit_bytes", lambda: GIB)
    assert probe_host().ram_bytes == GIB
