"""The main job, end to end, as a user runs it: a fresh process, offline, on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys


def test_quickstart_makes_the_built_in_model_answer_in_json(tmp_path):
    """Fixed seed: below 20 % of held-out messages right before, above 80 % after."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}  # nothing listens there
    finished = subprocess.run(
        [sys.executable, "-m", "charkha", "quickstart", "--json"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-3000:]
    result = json.loads(finished.stdout)
    assert result["exact_match_before"] < 0.20
    assert result["exact_match_after"] > 0.80
    assert result["rows"] >= 150
    assert result["example"]["tuned"] == result["example"]["expected"]
    assert (tmp_path / "runs/quickstart/merged/model.safetensors").is_file()
    assert result["run"] == str(tmp_path / "runs/quickstart")
