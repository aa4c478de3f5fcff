"""Where folders are made, looked at and thrown away by the thousand."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

MEMORY = Path("/dev/shm")


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A folder that nothing has to be synced in: in memory where the system has such a disk."""
    if not os.access(MEMORY, os.W_OK):
        yield tmp_path / "scratch"
        return
    folder = Path(tempfile.mkdtemp(prefix="charkha-", dir=MEMORY))
    yield folder / "scratch"
    shutil.rmtree(folder)
