from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "datasets", "pandas")
READING = (*HEAVY, "numpy", "pyarrow", "tokenizers", "jinja2", "safetensors")


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("charkha.data.formats, charkha.data.layouts", READING),
        ("charkha.cli.data", READING),
        ("charkha.data.inspect, charkha.data.preview, charkha.data.shards, charkha.data.order", HEAVY),
    ],
)
def test_what_importing_costs(modules: str, absent: tuple[str, ...]) -> None:
    code = f"import sys, {modules}; print(sorted(set({absent!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
