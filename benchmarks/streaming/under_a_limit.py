"""Trains a base that does not fit: `charkha train` in a memory cgroup, its layers streamed from the disk on a CPU.

Run: python benchmarks/streaming/under_a_limit.py [--hidden 2048] [--layers 16]    (as root where cgroups ask for it)

1. A tiny base (two layers of the same width) trains resident and streamed; the lower of the two peaks of anonymous
   memory is what a process needs.
2. The limit is that plus a quarter of the large base's quantized bytes. No swap; page cache counts and is reclaimed.
3. The large base trains streamed under the limit, the making of its slab included, and must end.
4. The large base trains resident under the same limit, as a control, and must be killed.

Results go to benchmarks/results/streaming_under_a_limit.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from charkha.starter.paths import model_folder

RESULTS = Path(__file__).resolve().parents[1] / "results" / "streaming_under_a_limit.json"
CONFIG = """
model: {{base: {base}, quantization: nf4, dtype: fp32, placement: {placement}}}
adapter: {{r: 2, lora_alpha: 4, lora_dropout: 0.0, target_modules: [q_proj]}}
data: {{train: [rows.jsonl], eval: null, max_length: 64, overlong: drop}}
training: {{max_steps: 2, batch_size: 1, micro_batch_size: 1, gradient_checkpointing: full}}
guard: {{ups: none}}
output: {output}
"""


def rows() -> list[dict[str, Any]]:
    """Short conversations."""
    words = ("tea", "rice", "cotton", "lamp", "iron", "seed", "cloud", "stone")
    return [
        {"messages": [{"role": "user", "content": f"{word}?"}, {"role": "assistant", "content": word.upper()}]}
        for word in words
    ]


def write_base(folder: Path, hidden: int, layers: int) -> int:
    """A random Llama with the built-in tokenizer, written tensor by tensor; the weights of its decoder layers."""
    import torch

    from charkha.backends.torch.tensor_files import TensorFileWriter

    folder.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(model_folder() / name, folder / name)
    config = json.loads((model_folder() / "config.json").read_text())
    inner, heads = hidden * 11 // 4, hidden // 64
    config |= {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "head_dim": 64,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": heads // 2, "tie_word_embeddings": True, "max_position_embeddings": 256,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    matrices = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden // 2, hidden),
        "self_attn.v_proj": (hidden // 2, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for number in range(layers):
        for name, shape in matrices.items():
            shapes[f"model.layers.{number}.{name}.weight"] = shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{number}.{name}.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    declared = [(name, "BF16", shape) for name, shape in shapes.items()]
    with TensorFileWriter(folder / "model.safetensors", declared) as writer:
        for _, _, shape in declared:
            tensor = torch.ones(shape) if len(shape) == 1 else torch.randn(shape).mul_(0.02)
            writer.write_tensor(tensor.bfloat16())
    return layers * sum(rows * columns for rows, columns in matrices.values())


@contextmanager
def memory_limit(limit_bytes: int) -> Iterator[Path]:
    """A cgroup whose processes may hold so much, page cache included; the file that takes their ids."""
    second = Path("/sys/fs/cgroup/cgroup.controllers").exists()
    folder = Path("/sys/fs/cgroup" if second else "/sys/fs/cgroup/memory") / f"charkha-{os.getpid()}"
    folder.mkdir()
    try:
        (folder / ("memory.max" if second else "memory.limit_in_bytes")).write_text(str(limit_bytes))
        swap = folder / "memory.swap.max"
        if swap.exists():
            swap.write_text("0")
        yield folder / "cgroup.procs"
    finally:
        folder.rmdir()


def train(work: Path, base: Path, placement: str, limit_bytes: int | None) -> dict[str, Any]:
    """Exit code, peak anonymous memory (sampled), the run's own result, and seconds of one run."""
    output = work / f"{base.name}-{placement}"
    shutil.rmtree(output, ignore_errors=True)
    config = work / f"{base.name}-{placement}.yaml"
    config.write_text(CONFIG.format(base=base, placement=placement, output=output))
    if limit_bytes is None:
        return _watched(config, work, None)
    with memory_limit(limit_bytes) as members:
        return _watched(config, work, members)


def _watched(config: Path, work: Path, members: Path | None) -> dict[str, Any]:
    command = [sys.executable, "-m", "charkha", "train", str(config), "--foreground", "--ignore-plan", "--json"]
    enter = (lambda: members.write_text(str(os.getpid()))) if members else None
    began, peak = time.monotonic(), 0
    with (work / "stderr").open("w") as log:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=log,
            preexec_fn=enter,
            env={**os.environ, "CHARKHA_CACHE": str(work / "cache"), "MALLOC_ARENA_MAX": "2"},
        )
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(0.01)
        assert process.stdout is not None
        printed = process.stdout.read().decode()
    result = json.loads(printed) if process.returncode == 0 else {}
    return {
        "exit_code": process.returncode,
        "peak_anonymous_bytes": peak,
        "peak_live_tensor_bytes": result.get("peak_memory_bytes"),
        "loss_last": result.get("loss_last"),
        "seconds": time.monotonic() - began,
    }


def anonymous_bytes(process: int) -> int:
    """Resident anonymous memory of a process; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=16)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="charkha-limit-") as name:
        work = Path(name)
        (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
        write_base(work / "tiny", arguments.hidden, 2)
        weights = write_base(work / "large", arguments.hidden, arguments.layers)
        tiny = {placement: train(work, work / "tiny", placement, None) for placement in ("resident", "streamed")}
        quantized = round(weights * 4.127 / 8)  # 4 bits and the constants of double quantization
        limit = min(run["peak_anonymous_bytes"] for run in tiny.values()) + quantized // 4
        streamed = train(work, work / "large", "streamed", limit)
        plan = json.loads((work / "large-streamed" / "plan.json").read_text())
        resident = train(work, work / "large", "resident", limit)
        free = train(work, work / "large", "resident", None)
    found = {
        "date": time.strftime("%Y-%m-%d"),
        "base": f"random Llama, hidden {arguments.hidden}, {arguments.layers} layers, nf4, computed in fp32",
        "quantized_bytes": quantized,
        "limit_bytes": limit,
        "tiny": tiny,
        "streamed_under_the_limit": streamed,
        "planned_live_tensor_bytes": plan["peak_allocated_bytes"],
        "resident_under_the_limit": resident,
        "resident_without_a_limit": free,
        "same_last_loss": streamed["loss_last"] == free["loss_last"],
        "resident_was_killed": resident["exit_code"] == -signal.SIGKILL,
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
