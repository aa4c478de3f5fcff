"""An upgrade between a stop and its resume, with a really installed other version of a library."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from charkha.store.runs import RunFolder

MakeProject = Callable[..., Any]
OTHER = "accelerate==1.14.0"


@pytest.fixture
def overlay(tmp_path: Path) -> dict[str, str]:
    """The environment of a process that finds the other version first; skipped where it cannot be fetched."""
    folder = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), OTHER]
    if subprocess.run(command, capture_output=True, check=False, timeout=120).returncode:
        pytest.skip(f"{OTHER} cannot be fetched here")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


@pytest.mark.long
def test_another_version_is_listed_and_refused_until_it_is_accepted_and_recorded(
    project: MakeProject, overlay: dict[str, str]
) -> None:
    work = project()
    work.train(stop_at=3)
    command = [sys.executable, "-m", "charkha", "train", str(work.config)]
    refused = subprocess.run(command, env=overlay, capture_output=True, text=True, check=False)
    assert refused.returncode == 6
    assert "accelerate: 1.15.0 in the run, 1.14.0 now" in refused.stderr
    assert "--accept-changes" in refused.stderr
    accepted = subprocess.run([*command, "--accept-changes"], env=overlay, capture_output=True, text=True, check=False)
    assert accepted.returncode == 0, accepted.stderr
    manifest = RunFolder(work.run_folder()).read_manifest()
    assert manifest["accepted"][0]["step"] == 3
    assert any("accelerate" in change for change in manifest["accepted"][0]["changes"])
    assert manifest["versions"]["accelerate"] == "1.14.0"
