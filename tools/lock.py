"""Rewrites requirements.lock and requirements-dev.lock from pyproject.toml; `--upgrade` also moves every pin.

Without `--upgrade` packages that are locked already keep their version. requirements-dev.lock holds only what
requirements.lock does not. torch is left out of both: tools/install_torch.py pins it.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

UV_VERSION = "0.13.9"
ROOT = Path(__file__).resolve().parent.parent
HEADER = "# Made by `make lock` from pyproject.toml; do not edit. Hashes cover every wheel, for Python 3.11 to 3.13.\n"


def main() -> None:
    """Compile both locks with a pinned uv in a throw-away environment."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that pyproject.toml allows")
    upgrade = parser.parse_args().upgrade
    with tempfile.TemporaryDirectory() as folder:
        uv = _install_uv(Path(folder) / "uv")
        old = "" if upgrade else _read("requirements.lock") + _read("requirements-dev.lock")
        run = _compile(uv, Path(folder) / "run.txt", old, [])
        dev = _compile(uv, Path(folder) / "dev.txt", run + old, ["--extra", "dev"])
    run_names = set(_entries(run))
    only_dev = "".join(entry for name, entry in _entries(dev).items() if name not in run_names)
    (ROOT / "requirements.lock").write_text(HEADER + run, encoding="utf-8")
    (ROOT / "requirements-dev.lock").write_text(HEADER + only_dev, encoding="utf-8")


def _install_uv(folder: Path) -> Path:
    venv.create(folder, with_pip=True)
    subprocess.run([folder / "bin/python", "-m", "pip", "install", "--quiet", f"uv=={UV_VERSION}"], check=True)
    return folder / "bin/uv"


def _compile(uv: Path, output: Path, pins: str, options: list[str]) -> str:
    """The compiled requirements. uv keeps the pins that it finds in the output file."""
    output.write_text(pins, encoding="utf-8")
    command: list[str | Path] = [
        uv,
        "pip",
        "compile",
        "pyproject.toml",
        "--config-file",
        "tools/lock.toml",
        "--universal",
    ]
    command += ["--python-version", "3.11", "--generate-hashes", "--no-emit-package", "torch"]
    command += ["--no-header", "--quiet", "--output-file", output, *options]
    finished = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    if finished.returncode:
        sys.exit(finished.returncode)
    text = output.read_text(encoding="utf-8")
    return text.split("\n# The following packages were excluded", 1)[0].rstrip() + "\n"


def _entries(lock: str) -> dict[str, str]:
    """Package name -> its lines with hashes and origin."""
    entries = re.split(r"^(?=[A-Za-z0-9])", lock, flags=re.MULTILINE)
    return {re.split(r"[=\[ ;]", entry, maxsplit=1)[0]: entry for entry in entries if entry.strip()}


def _read(name: str) -> str:
    path = ROOT / name
    return path.read_text(encoding="utf-8") if path.exists() else ""


if __name__ == "__main__":
    main()
