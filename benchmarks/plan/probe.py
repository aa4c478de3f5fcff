"""How near a probe is to the run that follows: `charkha plan --probe`, then `charkha train`, on small real models.

Run: python benchmarks/plan/probe.py [--only NAME]      (about 10 minutes on two cores)

Every case is a base model of random weights, rows of log-normally distributed lengths, and 30 to 60 optimizer steps.
Both commands are child processes with an empty history, so that the plan knows nothing of earlier runs. A step that
took ten times the median is left out of the measured time (a machine that was suspended), and counted. Prints a table
and writes benchmarks/results/probe.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results" / "probe.json"
MODELS = {
    "3M": (256, 688, 4, 4), "16M": (384, 1024, 6, 6), "starter": None,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("3M", {}),
    "lora, one row at a time": ("3M", {"training": {"micro_batch_size": 1}}),
    "lora, recomputed": ("3M", {"training": {"gradient_checkpointing": "full"}}),
    "full": ("3M", {"adapter": {"method": "full"}}),
    "nf4, two epochs": ("3M", {"model": {"quantization": "nf4"}, "training": {"epochs": 2}}),
    "packed": ("3M", {"data": {"packing": True}}),
    "lora, 16M": ("16M", {}),
    "starter": ("starter", {}),
}
WORDS = ("tea", "rice", "wheel", "cotton", "river", "lamp", "train", "field", "paper", "stone", "cloud", "seed")


def main() -> int:
    """Measures every case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=[*CASES])
    only = parser.parse_args().only
    rows = [measure(name, *CASES[name]) for name in CASES if only in (None, name)]
    errors = [abs(row["probe_seconds"] / row["measured_seconds"] - 1) for row in rows]
    print(f"median error of the time {statistics.median(errors):.1%}, worst {max(errors):.1%}")
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"cores": os.cpu_count(), "system": platform.platform()},
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft", "bitsandbytes")},
        "cases": rows,
    }
    if only is None:
        RESULTS.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def measure(name: str, model: str, changes: dict[str, Any]) -> dict[str, Any]:
    """One case in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        config = write_case(Path(folder), model, changes)
        load = os.getloadavg()[0]
        planned = charkha("plan", str(config), "--probe", "--method", "closed_form")
        trained = charkha("train", str(config), "--foreground")
        steps = [event for event in events(Path(trained["run"])) if event["event"] == "step"]
    usual = statistics.median(step["seconds"] for step in steps)
    kept = [step["seconds"] for step in steps if step["seconds"] < 10 * usual]
    row = {
        "case": name,
        "steps": len(steps),
        "left_out": len(steps) - len(kept),
        "closed_form_seconds": planned["probe"]["predicted"]["seconds"],
        "probe_seconds": planned["seconds"],
        "measured_seconds": round(sum(kept) * len(steps) / len(kept), 2),
        "probe_peak_bytes": planned["peak_allocated_bytes"],
        "measured_peak_bytes": trained["peak_memory_bytes"],
        "load_1_minute": [load, os.getloadavg()[0]],
    }
    print(
        f"{name:24} {row['steps']:3} steps  probe {row['probe_seconds']:7.1f} s  measured "
        f"{row['measured_seconds']:7.1f} s  {row['probe_seconds'] / row['measured_seconds'] - 1:+6.1%}   peak "
        f"{row['probe_peak_bytes'] / row['measured_peak_bytes'] - 1:+.2%}   load {load:.1f}",
        flush=True,
    )
    return row


def charkha(*arguments: str) -> Any:
    """The JSON of one command."""
    command = [sys.executable, "-m", "charkha", *arguments, "--json"]
    environment = os.environ | {"CHARKHA_HISTORY": "off"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def events(run: Path) -> list[dict[str, Any]]:
    """The run's events."""
    return [json.loads(line) for line in (run / "events.jsonl").read_text(encoding="utf-8").splitlines()]


def write_case(folder: Path, model: str, changes: dict[str, Any]) -> Path:
    """Base, rows and config."""
    write_rows(folder / "rows.jsonl")
    base = "starter" if model == "starter" else str(write_base(folder / "base", *MODELS[model]))
    settings: dict[str, Any] = {
        "model": {"base": base},
        "adapter": {"r": 8},
        "data": {"train": ["rows.jsonl"], "max_length": 256, "overlong": "truncate"},
        "training": {"epochs": 1, "batch_size": 8, "micro_batch_size": 2},
        "output": "run",
    }
    for section, values in changes.items():
        settings[section] = {**settings[section], **values}
    path = folder / "charkha.yaml"
    path.write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
    return path


def write_rows(path: Path, count: int = 320) -> None:
    """Questions and answers whose lengths are log-normally distributed."""
    draw = random.Random(7)

    def words(mean: float) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(1 + int(draw.lognormvariate(mean, 0.8))))

    rows = ({"prompt": words(2.6), "completion": words(2.2)} for _ in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_base(folder: Path, hidden: int, inner: int, layers: int, heads: int) -> Path:
    """A Llama of random weights with the starter's tokenizer."""
    import shutil

    from transformers import AutoConfig, AutoModelForCausalLM

    from charkha.starter.paths import model_folder

    shutil.copytree(model_folder(), folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    given = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = AutoConfig.for_model(
        "llama",
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=1024,
        **{key: given[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id") if key in given},
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(str(folder))
    return folder


if __name__ == "__main__":
    sys.exit(main())
