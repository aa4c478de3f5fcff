"""How long a memory trace takes, and how much host memory, on one core: 8B and 70B shapes, no weights needed.

Run: python benchmarks/plan/trace_speed.py [--only 8B]      (about 4 minutes)

Each trace is a child process of its own with one thread, as `trace_memory` starts it, without its cache. Every layer is
traced: that layers repeat is not used, because which block of the allocator a layer gets depends on all before it.
Prints a table and writes benchmarks/results/trace_speed.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from charkha.backends.base import AdapterSpec, TraceRequest

RESULTS = Path(__file__).resolve().parents[1] / "results" / "trace_speed.json"
CONFIGS = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
LLAMA_3 = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072, "rope_theta": 500000.0, "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "bos_token_id": 128000, "eos_token_id": 128001,
}  # fmt: skip
LIMIT_SECONDS = {"8B": 30, "70B": 90}  # of CPU time, for one micro batch a step
LIMIT_BYTES = 10**9


def main() -> int:
    """Traces every setting; 1 when one is over its limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=[*CONFIGS])
    only = parser.parse_args().only
    rows = [measure(name, request) for name, request in settings() if only in (None, name.split()[0])]
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"processor": processor(), "cores": os.cpu_count(), "system": platform.platform()},
        "load_1_minute": os.getloadavg()[0],
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
        "limits": {"seconds": LIMIT_SECONDS, "peak_rss_bytes": LIMIT_BYTES},
        "traces": rows,
    }
    if only is None:
        RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0 if all(row["within_limits"] for row in rows) else 1


def settings() -> list[tuple[str, TraceRequest]]:
    """Name and request of each trace."""
    lora = AdapterSpec("lora", 16, 32, 0.05, "all-linear")
    found = []
    for size, shape in CONFIGS.items():
        config = {**LLAMA_3, **shape}
        qlora = TraceRequest(
            config, lora, 1, 2048, quantization="nf4", gradient_checkpointing="full", loss_head="chunked"
        )
        found.append((f"{size} QLoRA, checkpointing", qlora))
        found.append((f"{size} LoRA", dataclasses.replace(qlora, quantization="none", gradient_checkpointing="none")))
    full = dataclasses.replace(found[0][1], adapter=AdapterSpec("full", 0, 0, 0.0, ()), quantization="none")
    accumulated = dataclasses.replace(found[0][1], accumulation_steps=8)
    return [*found, ("8B full, checkpointing", full), ("8B QLoRA, checkpointing, 8 micro batches", accumulated)]


def measure(name: str, request: TraceRequest) -> dict:
    """One trace in a process of its own: seconds from its start to its end, and its peak resident memory."""
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder) / "request.json", Path(folder) / "result.json"
        asked.write_text(json.dumps(dataclasses.asdict(request)), encoding="utf-8")
        command = [sys.executable, "-m", "charkha.backends.torch.trace", str(asked), str(answer)]
        one_core = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        started = time.monotonic()
        child = subprocess.Popen(command, env=os.environ | one_core, stderr=subprocess.DEVNULL)
        _pid, status, usage = os.wait4(child.pid, 0)
        seconds = time.monotonic() - started
        if status != 0:
            raise SystemExit(f"{name}: the trace failed with status {status}")
        result = json.loads(answer.read_text(encoding="utf-8"))
    row = {
        "name": name,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        **{key: result[key] for key in ("operators", "peak_allocated_bytes", "peak_reserved_bytes", "peak_moment")},
    }
    row["within_limits"] = row["cpu_seconds"] < LIMIT_SECONDS[name.split()[0]] and row["peak_rss_bytes"] < LIMIT_BYTES
    allocated, reserved = (row[f"peak_{counter}_bytes"] / 2**30 for counter in ("allocated", "reserved"))
    cost = f"{row['seconds']:6.1f} s  {row['cpu_seconds']:6.1f} CPU s  {row['peak_rss_bytes'] / 2**20:5.0f} MiB"
    print(f"{name:42} {cost}  allocated {allocated:6.2f}  reserved {reserved:6.2f} GiB", flush=True)
    return row


def processor() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    sys.exit(main())
