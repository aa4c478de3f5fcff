"""A 70B model on 24 GB, on whatever NVIDIA GPU is at hand: peak, tokens per second, hidden share, against resident.

Run: python benchmarks/gpu/streaming.py [--steps 5] [--only 8b|70b]     (under nine minutes; 48 GB of free host RAM)

1. 8B shape, deterministic kernels: streamed (2 and 3 slots, hot layers) = resident, losses and gradients bit for bit.
2. 70B shape, LoRA r 16 on all linears, one row of 2048 tokens, torch's allocator capped at 23.5 GiB: peak reserved,
   tokens per second, and the share of copying that computing hides; then with copies slowed to 25, 12 and 7 GB/s.
3. The same model resident, without the cap, where the card has room for it (about 60 GB).

Weights are random NF4; see synthetic_base.py. A card faster than a 4090 hides less at the same bandwidth, since it
computes a layer sooner: the copy and compute seconds per layer are given apart. Results go to
benchmarks/results/streaming_gpu.json after every part.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts: deterministic matrix products
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from synthetic_base import SyntheticBase, bandwidth

from charkha.backends.base import AdapterSpec
from charkha.backends.torch.adapters import attach_adapter
from charkha.backends.torch.loss import training_loss

RESULTS = Path(__file__).resolve().parents[1] / "results" / "streaming_gpu.json"
CAP_BYTES = int(23.5 * 2**30)
TOKENS = 2048
BANDWIDTHS = (25.0, 12.0, 7.0)
LORA = AdapterSpec("lora", 16, 32, 0.0, "all-linear")


class Run:
    """A model with its adapter and optimizer, and its steps."""

    def __init__(self, base: SyntheticBase, **placement: Any) -> None:
        model, self.engine = base.model(**placement)
        torch.manual_seed(1)
        self.model = attach_adapter(model, LORA, True)
        self.model.activation_checkpointing_enable({"use_reentrant": False})
        self.model.train()
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for parameter in self.trained:
            parameter.data = parameter.data.float()
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=True)
        self.vocabulary = base.config.vocab_size

    def step(self, seed: int, tokens: int = TOKENS) -> torch.Tensor:
        """One optimizer step on one row of random tokens; its loss."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, self.vocabulary, (1, tokens), generator=generator).cuda()
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        with torch.autocast("cuda", torch.bfloat16):
            loss = training_loss(self.model, inputs, torch.tensor(tokens - 1, device="cuda"), "chunked")
        loss.backward()
        self.engine.require_intact()
        self.optimizer.step()
        return loss.detach()

    def gradient_sums(self) -> list[float]:
        """Of every trained tensor, in fp64: equal only if the gradients are."""
        return [float(parameter.grad.double().sum()) for parameter in self.trained]

    def clear(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)


def bit_identity(base: SyntheticBase, steps: int) -> dict[str, Any]:
    """Losses and sums of gradients of every placement, and whether all are those of the resident base."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    layers = base.config.num_hidden_layers
    placements = {
        "resident": {"slots": 2, "hot_layers": layers},
        "2 slots": {"slots": 2, "hot_layers": 0},
        "3 slots": {"slots": 3, "hot_layers": 0},
        "2 slots, a quarter hot": {"slots": 2, "hot_layers": layers // 4},
        "2 slots at 7 GB/s": {"slots": 2, "hot_layers": 0, "gb_per_second": 7.0},
    }
    found: dict[str, Any] = {}
    for name, placement in placements.items():
        run = Run(base, **placement)
        seen = []
        for seed in range(steps):
            loss = run.step(seed, 512)
            seen.append([float(loss), *run.gradient_sums()])
            run.clear()
        found[name] = seen
        del run
        free_memory()
    torch.use_deterministic_algorithms(False)
    same = {name: seen == found["resident"] for name, seen in found.items()}
    return {"losses": [step[0] for step in found["resident"]], "same_as_resident": same}


def speed(base: SyntheticBase, steps: int, **placement: Any) -> dict[str, Any]:
    """Tokens per second over `steps` steps after one that warms up, peaks, and what copying cost."""
    torch.cuda.reset_peak_memory_stats()
    run = Run(base, **placement)
    run.step(0)
    run.clear()
    torch.cuda.synchronize()
    run.engine.transfer.forget()
    moved, began = run.engine.traffic.bytes, time.perf_counter()
    losses = []
    for seed in range(1, steps + 1):
        losses.append(run.step(seed))
        run.clear()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    copying, waiting = run.engine.transfer.seconds()
    result = {
        **placement,
        "tokens_per_second": steps * TOKENS / seconds,
        "step_seconds": seconds / steps,
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        "bytes_per_step": (run.engine.traffic.bytes - moved) / steps,
        "copy_seconds_per_step": copying / steps,
        "stall_seconds_per_step": waiting / steps,
        "hidden_share": 1 - waiting / copying if copying else None,
        "losses": [float(loss) for loss in losses],
    }
    del run
    free_memory()
    return result


def free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def cap(on: bool) -> None:
    """Lets torch's allocator hold as much as a 24 GB card does, or all there is. The CUDA context is not in it."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, CAP_BYTES / total) if on else 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--only", choices=("8b", "70b"))
    arguments = parser.parse_args()
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "gpu": torch.cuda.get_device_name(0),
        "torch": torch.__version__,
        "cap_bytes": CAP_BYTES,
        "tokens": TOKENS,
    }

    def keep(**parts: Any) -> None:
        found.update(parts)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps(parts, indent=1), flush=True)

    if arguments.only != "70b":
        base = SyntheticBase("8b")
        keep(measured_gb_per_second=bandwidth(base.host.tensor), bit_identity_8b=bit_identity(base, 3))
        del base
        free_memory()
    if arguments.only != "8b":
        base = SyntheticBase("70b")
        cap(True)
        keep(streamed_70b=speed(base, arguments.steps, slots=2, hot_layers=0))
        keep(streamed_70b_hot=speed(base, arguments.steps, slots=2, hot_layers=12))
        for rate in BANDWIDTHS:
            keep(
                **{f"streamed_70b_at_{rate:g}_gb_per_second": speed(base, 2, slots=2, hot_layers=0, gb_per_second=rate)}
            )
        cap(False)
        if torch.cuda.get_device_properties(0).total_memory > 64e9:
            resident = speed(base, arguments.steps, slots=2, hot_layers=base.config.num_hidden_layers)
            ratio = found["streamed_70b"]["tokens_per_second"] / resident["tokens_per_second"]
            same = found["streamed_70b"]["losses"] == resident["losses"]
            keep(resident_70b=resident, streamed_over_resident=ratio, same_losses=same)


if __name__ == "__main__":
    main()
