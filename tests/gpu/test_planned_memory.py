"""The traced plan against a CUDA GPU, on layers of an 8B model. Run by `make test-gpu`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu
BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks/gpu/plan_memory.py"


def test_allocated_and_reserved_are_those_of_the_gpu_in_eight_settings(tmp_path):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    result = tmp_path / "result.json"
    subprocess.run([sys.executable, str(BENCHMARK), "--layers", "4", "--out", str(result)], check=True)
    rows = json.loads(result.read_text(encoding="utf-8"))["settings"]
    assert len(rows) == 8
    for row in rows:
        assert "error" not in row["measured"], row["name"]
        assert abs(row["allocated_error"]) <= 0.02, row["name"]
        assert abs(row["reserved_error"]) <= 0.05, row["name"]
