"""Preparing a slab: peak memory against the largest layer or embedding, and time against a plain copy of the base.

Run: python benchmarks/streaming/prepare.py [--hidden 2048] [--layers 8]

A base of random bf16 weights is written to a temporary folder. A process that imports what training imports and does
nothing is compared with one that makes the slab. Preparing and copying (cp and fsync of the same files) take turns.
Results go to benchmarks/results/streaming_prepare.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "results" / "streaming_prepare.json"
VOCABULARY = 32000
REPEATS = 3


def linear_shapes(hidden: int) -> dict[str, tuple[int, int]]:
    """[rows, columns] of one layer in the proportions of Llama."""
    inner, keys = hidden * 11 // 4, hidden // 4
    return {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }  # fmt: skip


def write_base(folder: Path, hidden: int, layers: int) -> int:
    """Writes the files tensor by tensor; the bytes of the largest layer or embedding."""
    import torch

    from charkha.backends.torch.tensor_files import TensorFileWriter

    shapes = {f"model.layers.{n}.{name}.weight": s for n in range(layers) for name, s in linear_shapes(hidden).items()}
    shapes["model.embed_tokens.weight"] = (VOCABULARY, hidden)
    (folder / "config.json").write_text(json.dumps({"hidden_size": hidden, "num_hidden_layers": layers}))
    declared = [(name, "BF16", shape) for name, shape in shapes.items()]
    with TensorFileWriter(folder / "model.safetensors", declared) as writer:
        for _, _, shape in declared:
            writer.write_tensor(torch.randn(shape, dtype=torch.float32).mul_(0.02).bfloat16())
    layer = 2 * sum(rows * columns for rows, columns in linear_shapes(hidden).values())
    return max(layer, 2 * VOCABULARY * hidden)


def child(base: Path, cache: Path, hidden: int, layers: int, work: bool) -> None:
    """Imports what training does and, with `work`, makes the slab; prints peak RSS and seconds as JSON."""
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import transformers  # noqa: F401
    import trl  # noqa: F401

    from charkha.backends.torch.slab_making import LayerShape, ensure_slab
    from charkha.backends.torch.slab_parts import LinearShape

    began, began_cpu = time.perf_counter(), time.process_time()
    if work:
        plan = [
            LayerShape(
                tuple(LinearShape(f"model.layers.{n}.{name}", *shape) for name, shape in linear_shapes(hidden).items())
            )
            for n in range(layers)
        ]
        slab = ensure_slab(base, plan, quantization="nf4", dtype="bf16", device="cpu", cache=cache)
        assert slab.total_bytes == slab.path.stat().st_size
    peak = peak_of_this_program()
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - began_cpu
    print(json.dumps({"peak_rss_bytes": peak, "seconds": seconds, "cpu_seconds": cpu_seconds}))


def peak_of_this_program() -> int:
    """Peak resident bytes; getrusage would count what the parent held when it started this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def run_child(*arguments: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", *arguments]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    return found


def copy(base: Path, target: Path) -> float:
    """Seconds for a copy of the weights that is on the disk when it ends."""
    began = time.perf_counter()
    shutil.copyfile(base / "model.safetensors", target)
    with target.open("rb") as file:
        os.fsync(file.fileno())
    return time.perf_counter() - began


def measure(hidden: int, layers: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory(prefix="charkha-prepare-") as name:
        folder = Path(name)
        base = folder / "base"
        base.mkdir()
        largest = write_base(base, hidden, layers)
        size = [str(hidden), str(layers)]
        empty = run_child(str(base), str(folder / "none"), *size, "idle")["peak_rss_bytes"]
        prepared, copies = [], []
        for turn in range(REPEATS):
            prepared.append(run_child(str(base), str(folder / f"cache{turn}"), *size, "work"))
            shutil.rmtree(folder / f"cache{turn}")
            copies.append(copy(base, folder / "copy"))
            (folder / "copy").unlink()
        total = (base / "model.safetensors").stat().st_size
    peak = max(run["peak_rss_bytes"] for run in prepared)
    seconds, cpu = (statistics.median(run[key] for run in prepared) for key in ("seconds", "cpu_seconds"))
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": platform.processor() or platform.machine(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "load_1_minute": os.getloadavg()[0],
        "base": f"random bf16, hidden {hidden}, {layers} layers, vocabulary {VOCABULARY}",
        "base_bytes": total,
        "largest_layer_or_embedding_bytes": largest,
        "empty_process_rss_bytes": empty,
        "peak_rss_bytes": peak,
        "peak_above_empty_in_largest_layers": (peak - empty) / largest,
        "prepare_seconds": seconds,
        "prepare_cpu_seconds": cpu,
        "copy_seconds": statistics.median(copies),
        "prepare_over_copy": seconds / statistics.median(copies),
        "weights_per_cpu_second": (total / 2) / cpu,
    }


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        base, cache, hidden, layers, work = sys.argv[2:]
        child(Path(base), Path(cache), int(hidden), int(layers), work == "work")
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=8)
    arguments = parser.parse_args()
    found = measure(arguments.hidden, arguments.layers)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
