"""Training speed on a CPU: charkha, a bare loop over the same batches, TRL as it comes and at its best.

Run: python benchmarks/cpu/run.py [--repeats 5] [--rows 96]     (about 15 minutes; wants an otherwise idle machine)

Each way runs in a process of its own, one thread, interleaved with the others; what is compared is real tokens (no
padding) per second of process CPU time. Prints a table and writes benchmarks/results/cpu_training.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results" / "cpu_training.json"
WAYS = ("bare fp32", "charkha fp32", "bare bf16", "charkha bf16", "trl defaults", "trl best")
RATIOS = (
    ("charkha fp32", "bare fp32"), ("charkha bf16", "bare bf16"),
    ("charkha bf16", "trl defaults"), ("charkha bf16", "trl best"),
)  # fmt: skip


def main() -> None:
    """Interleaves the repeats and sums them up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=96)
    arguments = parser.parse_args()
    runs: dict[str, list[dict]] = {way: [] for way in WAYS}
    for repeat in range(arguments.repeats):
        for way in WAYS:
            result = one(way, arguments.rows)
            runs[way].append(result)
            rate = result["tokens_per_cpu_second"]
            print(f"{repeat + 1}/{arguments.repeats}  {way:14}  {rate:8.0f} tokens per CPU second", flush=True)
    report = summary(runs, arguments)
    RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for way, entry in report["ways"].items():
        print(f"{way:14} {entry['median']:8.0f} tok/CPU-s  ({entry['low']:.0f} to {entry['high']:.0f})  "
              f"{entry['peak_rss_bytes'] / 2**20:.0f} MiB")  # fmt: skip
    for name, ratio in report["ratios"].items():
        print(f"{name}: {ratio['median']:.2f}  ({ratio['low']:.2f} to {ratio['high']:.2f})")


def one(way: str, rows: int) -> dict:
    """One way once."""
    command = [sys.executable, str(HERE / "worker.py"), way, "--rows", str(rows)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if finished.returncode != 0:
        raise SystemExit(f"{way}: {finished.stderr[-2000:]}")
    return json.loads(finished.stdout.strip().splitlines()[-1])


def summary(runs: dict[str, list[dict]], arguments: argparse.Namespace) -> dict:
    """Median and spread of rates, and of ratios within a repeat."""
    rates = {way: [result["tokens_per_cpu_second"] for result in results] for way, results in runs.items()}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"processor": processor(), "cores": os.cpu_count(), "system": platform.platform()},
        "load_1_minute": os.getloadavg()[0],
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft", "accelerate")},
        "model": "random Llama, 21.9 M parameters, vocabulary 8192, LoRA r 16 on all linear layers",
        "rows": arguments.rows,
        "repeats": arguments.repeats,
        "ways": {
            way: spread(values) | {"peak_rss_bytes": max(result["peak_rss_bytes"] for result in runs[way])}
            for way, values in rates.items()
        },
        "ratios": {
            f"{ours} / {theirs}": spread([a / b for a, b in zip(rates[ours], rates[theirs], strict=True)])
            for ours, theirs in RATIOS
        },
    }


def spread(values: list[float]) -> dict:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def processor() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
