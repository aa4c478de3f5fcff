"""The check of a merge, whole and layer by layer: peak memory, seconds, and whether the figures are the same.

Run: python benchmarks/streaming/merge_check.py [--hidden 1024] [--layers 24]

A random base, a random adapter on every linear layer, their merge; then each way of checking in a process of its own,
and one that only imports what both do. Results go to benchmarks/results/streaming_merge_check.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from prepare import peak_of_this_program
from under_a_limit import write_base

RESULTS = Path(__file__).resolve().parents[1] / "results" / "streaming_merge_check.json"
ROWS, TOKENS = 8, 128


def write_adapter(base: Path, adapter: Path) -> None:
    """LoRA of rank 8 with both matrices at random."""
    import torch

    from charkha.backends.base import AdapterSpec, BaseModelSpec
    from charkha.backends.torch.adapters import attach_adapter
    from charkha.backends.torch.model import load_base

    model = attach_adapter(
        load_base(BaseModelSpec(base, "bf16", "sdpa", "none", "cpu")),
        AdapterSpec("lora", 8, 16, 0.0, "all-linear"),
        False,
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    model.save_pretrained(str(adapter))


def child(work: Path, way: str) -> None:
    """Checks the merge in `work`, or prepares it, or does nothing; prints figures and peak RSS as JSON."""
    import numpy as np
    import peft  # noqa: F401
    from transformers import LlamaForCausalLM  # noqa: F401

    from charkha.backends.base import BaseModelSpec
    from charkha.backends.torch.merge import merge_adapter
    from charkha.backends.torch.verify import check_merge

    began, found = time.perf_counter(), {}
    if way == "prepare":
        write_adapter(work / "base", work / "adapter")
        merge_adapter(work / "base", work / "adapter", work / "merged")
    if way in ("whole", "layerwise"):
        rows = [np.arange(TOKENS) % 200 + 3 + row for row in range(ROWS)]
        base = BaseModelSpec(work / "base", "fp32", "sdpa", "none", "cpu")
        check = check_merge(base, work / "adapter", work / "merged", rows, layerwise=way == "layerwise")
        found = {"verified": check.verified, "max_logit_difference": check.max_logit_difference,
                 "allowed_logit_difference": check.allowed_logit_difference}  # fmt: skip
    found["seconds"] = time.perf_counter() - began
    found["peak_rss_bytes"] = peak_of_this_program()
    print(json.dumps(found))


def run_child(work: Path, way: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", str(work), way]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), sys.argv[3])
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=24)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="charkha-merge-") as name:
        work = Path(name)
        weights = write_base(work / "base", arguments.hidden, arguments.layers)
        run_child(work, "prepare")
        found = {way: run_child(work, way) for way in ("idle", "whole", "layerwise")}
    idle = found["idle"]["peak_rss_bytes"]
    figures = ("verified", "max_logit_difference", "allowed_logit_difference")
    layer = 4 * weights // arguments.layers
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "base": f"random Llama in bf16, hidden {arguments.hidden}, {arguments.layers} layers, checked in fp32",
        "rows": ROWS,
        "tokens_per_row": TOKENS,
        "layer_bytes": layer,
        "load_1_minute": os.getloadavg()[0],
        **found,
        "same_figures": all(found["whole"][name] == found["layerwise"][name] for name in figures),
        "layerwise_above_idle_in_layers": (found["layerwise"]["peak_rss_bytes"] - idle) / layer,
        "whole_above_idle_in_layers": (found["whole"]["peak_rss_bytes"] - idle) / layer,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
