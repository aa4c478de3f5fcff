"""`kill -9` at random moments over five kinds of run: each must end as its undisturbed twin, bit for bit.

Run: python benchmarks/faults/kill_campaign.py [--kills 200] [--seed 1]   (about ten seconds a kill; run it again to go
on where it was stopped; --fresh begins anew)

A worker is started with the run's own command, killed with SIGKILL at a random moment of its life (while it loads, in a
step, inside a save), and started again with no manual work, until the run is done. Results go to
benchmarks/results/kill_campaign.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from charkha.store.checkpoints import CheckpointStore
from charkha.store.runs import RunFolder

RESULTS = Path(__file__).resolve().parents[1] / "results" / "kill_campaign.json"
WORK = Path(tempfile.gettempdir()) / "charkha-kill-campaign"
KINDS = {
    "LoRA with dropout": [],
    "QLoRA nf4": ["model.quantization=nf4"],
    "full": ["adapter.method=full"],
    "LoRA, packed": ["data.packing=true", "training.batch_size=2", "training.micro_batch_size=1"],
    "QLoRA nf4, packed": [
        "model.quantization=nf4", "data.packing=true", "training.batch_size=2", "training.micro_batch_size=1",
    ],
}  # fmt: skip
STEPS = 240
CONFIG = """
model: {base: base}
adapter: {r: 4, lora_dropout: 0.1}
data: {train: [train.jsonl], eval: heldout.jsonl, max_length: 512}
training: {max_steps: 240, batch_size: 8, micro_batch_size: 4, eval_every: 60, learning_rate: 1e-3}
checkpoint: {every: 2 steps}
guard: {ups: none}
output: run
"""


def main() -> None:
    """Goes on with the campaign until every kind has had its kills and has ended."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--kind", type=int, action="append", help="number of a kind, from 0; all of them by default")
    arguments = parser.parse_args()
    if arguments.fresh:
        shutil.rmtree(WORK, ignore_errors=True)
    prepare()
    per_kind = -(-arguments.kills // len(KINDS))
    kinds = list(KINDS.items())
    for number in arguments.kind or range(len(kinds)):
        kind, overrides = kinds[number]
        print(f"{kind}: {per_kind} kills", flush=True)
        campaign(number, overrides, per_kind, random.Random(arguments.seed * 100 + number))
        print(f"  {result_of(number)}", flush=True)
    report = {kind: result_of(number) for number, kind in enumerate(KINDS) if log_of(number).exists()}
    RESULTS.write_text(json.dumps(summary(report), indent=1) + "\n", encoding="utf-8")


def prepare() -> None:
    """A random tiny Llama with the starter's tokenizer, and the starter's data."""
    if (WORK / "charkha.yaml").exists():
        return
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from charkha.starter.paths import heldout_file, model_folder, train_file

    WORK.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2, "num_attention_heads": 4}
    vocabulary = json.loads((model_folder() / "config.json").read_text())["vocab_size"]
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, num_key_value_heads=2, **shape))
    model.save_pretrained(WORK / "base")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(model_folder() / name, WORK / "base")
    shutil.copy(train_file(), WORK / "train.jsonl")
    rows = heldout_file().read_text(encoding="utf-8").splitlines(keepends=True)[:8]
    (WORK / "heldout.jsonl").write_text("".join(rows), encoding="utf-8")
    (WORK / "charkha.yaml").write_text(CONFIG, encoding="utf-8")


def log_of(kind: int) -> Path:
    """What is known of a kind so far."""
    return WORK / f"{kind}.json"


def campaign(kind: int, overrides: list[str], kills: int, picker: random.Random) -> None:
    """One kind: an undisturbed run, and runs that are killed until `kills` is reached; every one must match."""
    whole = RunFolder(WORK / f"{kind}-whole")
    if not finished(whole):
        start(whole, overrides).communicate()
    log = log_of(kind)
    record = json.loads(log.read_text()) if log.exists() else {"trials": [], "runs": [], "mismatches": []}
    number = len(record["runs"])
    while len(record["trials"]) < kills:
        cut = RunFolder(WORK / f"{kind}-cut-{number}")
        while not finished(cut) and len(record["trials"]) < kills:
            trial = kill_once(cut, overrides, picker)
            if trial is not None:
                record["trials"].append(trial)
                log.write_text(json.dumps(record))
        if not finished(cut):
            start(cut, overrides).communicate()
        record["runs"].append(number)
        if bits(cut) != bits(whole):
            record["mismatches"].append(number)
        log.write_text(json.dumps(record))
        shutil.rmtree(cut.path, ignore_errors=True)
        number += 1


def result_of(kind: int) -> dict:
    """The log of a kind in numbers."""
    record = json.loads(log_of(kind).read_text())
    trials = record["trials"]
    return {
        "kills": len(trials),
        "inside_a_save": sum(trial["in_save"] for trial in trials),
        "before_the_first_step_of_a_start": sum(not trial["stepped"] for trial in trials),
        "runs": len(record["runs"]),
        "bit_identical_runs": len(record["runs"]) - len(record["mismatches"]),
        "damaged_checkpoints_seen": sum(trial["damaged"] for trial in trials),
        "worst_steps_lost": max(trial["steps_lost"] for trial in trials),
        "worst_seconds_to_the_next_step": max(trial["recovery_seconds"] or 0 for trial in trials),
    }


def start(run: RunFolder, overrides: list[str]) -> subprocess.Popen:
    """A worker of the run."""
    sets = [part for override in [*overrides, f"output={run.path}"] for part in ("--set", override)]
    command = [sys.executable, "-m", "charkha", "train", str(WORK / "charkha.yaml"), *sets, "--foreground", "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def kill_once(run: RunFolder, overrides: list[str], picker: random.Random) -> dict | None:
    """Starts a worker and kills it; None when the run was done before the moment came."""
    before, starts = last_step(run), len(starts_of(run))
    began = time.monotonic()
    worker = start(run, overrides)
    early = picker.random() < 0.1  # one in ten while the libraries and the model load
    delay = picker.uniform(0.5, 5.0) if early else picker.uniform(0.0, 1.2)
    first_step_seconds = None
    while not early and worker.poll() is None and first_step_seconds is None:
        if has_stepped(run, starts):
            first_step_seconds = time.monotonic() - began
        time.sleep(0.02)
    time.sleep(delay)
    stepped = has_stepped(run, starts)
    in_save = stepped and (run.path / "staging" / "checkpoint").exists()
    if worker.poll() is not None:
        out, err = worker.communicate()
        if worker.returncode != 0:
            raise SystemExit(f"a start needed a person: {worker.returncode}\n{out}\n{err[-2000:]}")
        return None
    worker.send_signal(signal.SIGKILL)
    worker.communicate()
    newest, skipped = CheckpointStore(run.path).newest_verified()
    reached = max(last_step(run), before)
    return {
        "in_save": in_save,
        "stepped": stepped,
        "steps_lost": reached - (newest.step if newest else 0),
        "damaged": len(skipped),
        "recovery_seconds": round(first_step_seconds, 2) if first_step_seconds and before else None,
    }


def starts_of(run: RunFolder) -> list[int]:
    """Where in the run's events its starts are."""
    return [number for number, event in enumerate(run.events()) if event.get("status") == "running"]


def has_stepped(run: RunFolder, starts_before: int) -> bool:
    """Whether the start that came after `starts_before` others has taken a step."""
    starts = starts_of(run)
    return len(starts) > starts_before and any(event["event"] == "step" for event in run.events()[starts[-1] :])


def last_step(run: RunFolder) -> int:
    """The last step that was taken, in a checkpoint or not."""
    return max((event["step"] for event in run.events() if event["event"] == "step"), default=0)


def finished(run: RunFolder) -> bool:
    """Whether the run ended with its weights in place."""
    return any((run.path / name).is_dir() for name in ("adapter", "model"))


def bits(run: RunFolder) -> tuple:
    """The trajectory, and the bytes of the trained weights."""
    steps = [(event["step"], event["loss"], event["grad_norm"]) for event in run.events() if event["event"] == "step"]
    weights = [path.read_bytes() for name in ("adapter", "model") for path in (run.path / name).glob("*.safetensors")]
    return steps, weights


def summary(report: dict) -> dict:
    """All kinds together."""
    totals = {key: sum(kind[key] for kind in report.values()) for key in ("kills", "inside_a_save", "runs")}
    totals["bit_identical_runs"] = sum(kind["bit_identical_runs"] for kind in report.values())
    totals["damaged_checkpoints_seen"] = sum(kind["damaged_checkpoints_seen"] for kind in report.values())
    return {"date": time.strftime("%Y-%m-%d"), "steps": STEPS, "totals": totals, "kinds": report}


if __name__ == "__main__":
    main()
