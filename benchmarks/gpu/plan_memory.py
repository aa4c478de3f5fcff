"""The traced plan against a CUDA GPU: max_memory_allocated and max_memory_reserved of the real trainer's steps.

Run on a machine with a GPU:
    python benchmarks/gpu/plan_memory.py [--layers 32] [--only NAME] [--out FILE]

The model has the shape of Llama 3.1 8B and random weights; with 32 layers it takes 16 GB on the disk of the temporary
folder. Each setting is trained for two optimizer steps in a process of its own. A setting that does not fit the card is
recorded as such. Prints a table and writes benchmarks/results/plan_memory_gpu.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from charkha.backends.base import AdapterSpec, BaseModelSpec, Order, StepPlan, TraceRequest
from charkha.backends.torch.trace import request_from_json, trace_memory

RESULTS = Path(__file__).resolve().parents[1] / "results" / "plan_memory_gpu.json"
LLAMA_3_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0, "tie_word_embeddings": False,
}  # fmt: skip
LORA = AdapterSpec("lora", 16, 32, 0.05, "all-linear")
SETTINGS: dict[str, dict] = {
    "qlora-checkpointed": {"quantization": "nf4", "gradient_checkpointing": "full", "loss_head": "chunked"},
    "qlora-checkpointed-padded": {
        "quantization": "nf4", "gradient_checkpointing": "full", "row_lengths": (1024, 700), "micro_batch_size": 2,
    },
    "qlora-short": {"quantization": "nf4", "sequence_length": 256},
    "qlora-accumulated-expandable": {
        "quantization": "nf4", "gradient_checkpointing": "full", "accumulation_steps": 4, "expandable_segments": True,
    },
    "lora-checkpointed": {"gradient_checkpointing": "full", "loss_head": "chunked", "sequence_length": 2048},
    "lora-full-head": {"sequence_length": 512},
    "dora-checkpointed": {"gradient_checkpointing": "full", "adapter": dataclasses.replace(LORA, method="dora")},
    "lora-8-bit-optimizer": {
        "gradient_checkpointing": "full", "optimizer": "adamw_8bit", "adapter": dataclasses.replace(LORA, r=128),
    },
}  # fmt: skip


def main() -> None:
    """Every setting, or in a child process one of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--only", action="append", choices=[*SETTINGS])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--measure", nargs=3, metavar=("BASE", "REQUEST", "ANSWER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(*(Path(argument) for argument in arguments.measure))
        return
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("no CUDA GPU")
    capability = torch.cuda.get_device_capability(0)
    with tempfile.TemporaryDirectory(prefix="charkha-plan-") as folder:
        base = write_base(Path(folder) / "base", arguments.layers)
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
        names = arguments.only or [*SETTINGS]
        rows = [compare(name, request(name, config, capability), base, Path(folder)) for name in names]
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "gpu": torch.cuda.get_device_name(0),
        "compute_capability": capability,
        "versions": {
            "cuda": torch.version.cuda,
            **{name: version(name) for name in ("torch", "transformers", "peft", "trl", "bitsandbytes")},
        },
        "layers": arguments.layers,
        "settings": rows,
    }
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def request(name: str, config: dict, capability: tuple[int, int]) -> TraceRequest:
    """The trace's side of a setting."""
    changes = {"micro_batch_size": 1, "sequence_length": 1024, "adapter": LORA, **SETTINGS[name]}
    return TraceRequest(config, device="cuda", compute_capability=capability, **changes)


def write_base(folder: Path, layers: int) -> Path:
    """A model of random bf16 weights, made on the GPU, where that takes seconds."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**LLAMA_3_8B, num_hidden_layers=layers, dtype="bfloat16")
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()
    return folder


def compare(name: str, asked: TraceRequest, base: Path, work: Path) -> dict:
    """One setting planned and trained."""
    planned = trace_memory(asked, cache=work / "traces")
    measured = train_in_child(asked, base, work)
    row = {"name": name, "planned": dataclasses.asdict(planned), "measured": measured}
    for counter in ("allocated", "reserved"):
        if measured.get(f"peak_{counter}_bytes"):
            row[f"{counter}_error"] = getattr(planned, f"peak_{counter}_bytes") / measured[f"peak_{counter}_bytes"] - 1
    told = " ".join(f"{key} {value:+.2%}" for key, value in row.items() if key.endswith("_error"))
    print(f"{name:32} {told or measured['error']}", flush=True)
    return row


def train_in_child(asked: TraceRequest, base: Path, work: Path) -> dict:
    """What the child measured, or why it did not."""
    import os

    question, answer = work / "request.json", work / "measured.json"
    question.write_text(json.dumps(dataclasses.asdict(asked)), encoding="utf-8")
    answer.unlink(missing_ok=True)
    allocator = f"expandable_segments:{asked.expandable_segments}"
    child = subprocess.run(
        [sys.executable, __file__, "--measure", str(base), str(question), str(answer)],
        env=os.environ | {"PYTORCH_ALLOC_CONF": allocator, "PYTORCH_CUDA_ALLOC_CONF": allocator},
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode != 0:
        return {"error": (child.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(answer.read_text(encoding="utf-8"))


def measure(base: Path, question: Path, answer: Path) -> None:
    """Two optimizer steps of the real trainer on the GPU."""
    import numpy as np
    import torch

    from charkha.backends.torch import trainer
    from charkha.data.shards import Shard
    from charkha.store.checkpoints import CheckpointStore

    class LeftAlone:
        def order(self, step_seconds: float) -> Order:
            return Order()

        def beat(self) -> None:
            return

    asked = request_from_json(json.loads(question.read_text(encoding="utf-8")))
    lengths = (asked.row_lengths or (asked.sequence_length,) * asked.micro_batch_size) * asked.accumulation_steps
    offsets = np.cumsum([0, *lengths])
    ids = np.random.default_rng(0).integers(3, 1000, offsets[-1]).astype(np.int32)
    lines = np.zeros(len(lengths), np.int32)
    shard = Shard(Path("x-0123456789abcdef.safetensors"), ids, np.ones(offsets[-1], bool), offsets, lines)
    plan = StepPlan(
        total_steps=2, steps_per_epoch=1, warmup_steps=0, learning_rate=1e-4, lr_scheduler_type="constant",
        weight_decay=asked.weight_decay, max_grad_norm=asked.max_grad_norm, batch_size=len(lengths),
        micro_batch_size=asked.micro_batch_size, gradient_checkpointing=asked.gradient_checkpointing == "full",
        loss_head=asked.loss_head, optimizer=asked.optimizer, seed=1, eval_steps=None, checkpoint_seconds=None,
        checkpoint_steps=None, checkpoints_kept=1, trainer={},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as work:
        started = time.monotonic()
        trainer.train(
            BaseModelSpec(base, asked.dtype, asked.attention, asked.quantization, "cuda"),
            asked.adapter,
            plan,
            train_shard=shard,
            eval_shard=None,
            fingerprint="x",
            pad_id=0,
            store=CheckpointStore(Path(work)),
            resume_from=None,
            steering=LeftAlone(),
            record=lambda name, **fields: None,
            final_folder=Path(work) / "final",
        )
        seconds = time.monotonic() - started
    measured = {
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        "free_bytes_of_device": torch.cuda.mem_get_info()[0],
        "seconds": round(seconds, 1),
    }
    answer.write_text(json.dumps(measured), encoding="utf-8")


if __name__ == "__main__":
    main()
