"""Makefile, interpreter search, container and conda files: what can be checked without installing anything."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
MAKE_VENV = ROOT / "tools/make_venv.sh"


def _fake_python(folder: Path, name: str, exit_status: int) -> None:
    """A command that answers the version check with `exit_status` and, asked for a venv, makes its folder."""
    script = folder / name
    script.write_text(
        f"""#!/bin/sh
case "$1" in
  -c) exit {exit_status} ;;
  --version) echo "{name} 3.x" ;;
  -m) mkdir -p "$4/bin" ;;
esac
"""
    )
    script.chmod(0o755)


def _search(tmp_path: Path, pythons: dict[str, int], **environment: str) -> subprocess.CompletedProcess[str]:
    tools = tmp_path / "commands here"
    tools.mkdir()
    for name in ("sh", "cat", "mkdir"):
        (tools / name).symlink_to(shutil.which(name))
    for name, exit_status in pythons.items():
        _fake_python(tools, name, exit_status)
    return subprocess.run(
        ["sh", str(MAKE_VENV), str(tmp_path / "new venv")],
        env={"PATH": str(tools), **environment},
        capture_output=True,
        text=True,
    )


def test_a_machine_with_only_an_old_python_is_told_how_to_get_one(tmp_path):
    finished = _search(tmp_path, {"python3": 1})
    assert finished.returncode == 1
    for words in ("Python 3.11", "3.10", "deadsnakes", "uv python install 3.11", "conda", "python3.11-venv"):
        assert words in finished.stderr
    assert not (tmp_path / "new venv").exists()


def test_a_shim_that_does_not_start_is_passed_over(tmp_path):
    finished = _search(tmp_path, {"python3.11": 127, "python3.12": 0, "python3": 0})
    assert finished.returncode == 0
    assert "python3.12" in finished.stdout
    assert (tmp_path / "new venv").is_dir()


def test_the_interpreter_that_was_asked_for_comes_first(tmp_path):
    finished = _search(tmp_path, {"python3.11": 0, "mine": 0}, PYTHON="mine")
    assert "with mine 3.x" in finished.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", ["quickstart", "test", "test-long", "test-gpu", "lint", "lock", "clean"])
def test_every_target_expands(target):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    finished = subprocess.run(["make", "--dry-run", target], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


def test_installed_packages_come_from_the_lock_with_hashes_and_nothing_else():
    makefile = (ROOT / "Makefile").read_text()
    installs = re.findall(r"^\t\$\(INSTALL\) (.*)$", makefile, re.MULTILINE)
    assert len(installs) == 3
    for arguments in installs:
        assert "--no-deps" in arguments
        assert "--require-hashes" in arguments or "--no-build-isolation --editable ." in arguments


def test_ci_runs_the_same_command_as_people():
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    assert script.read_text().startswith("#!/usr/bin/env bash\nset -euo pipefail\n")
    assert "make test" in script.read_text()


def test_the_image_is_built_from_files_that_exist_and_are_not_ignored():
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [
        source
        for arguments in re.findall(r"^COPY (.+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
        for source in arguments.split()[:-1]
    ]
    assert copied
    for source in copied:
        assert (ROOT / source).exists(), source
        assert source in allowed, source


def test_the_image_runs_offline_and_not_as_root():
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert re.findall(r"^USER (\S+)$", dockerfile, re.MULTILINE) == ["charkha"]
    assert "HF_HUB_OFFLINE=1" in dockerfile
    assert dockerfile.rstrip().endswith('ENTRYPOINT ["charkha"]')


def test_conda_brings_a_python_that_the_project_takes():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == "charkha"
    assert "python=3.11" in environment["dependencies"]


def test_the_licence_is_the_full_apache_text():
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
