"""Fine-tune the starter model in a bare PyTorch loop and measure exact match before and after, per seed.

    python tools/starter/measure.py --seeds 1 2 3

One training loop, one greedy decoder, no trainer: what the model and the data can do, whatever the trainer above them.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

STARTER = Path(__file__).resolve().parents[2] / "src/charkha/starter"
IGNORED = -100


@dataclass(frozen=True)
class Row:
    """One tokenized row; `trained_from` is the index of the first answer token."""

    tokens: list[int]
    trained_from: int
    answer: str
    pattern: str


@dataclass(frozen=True)
class Spent:
    """What a fine-tune took; CPU seconds are summed over threads and do not grow when others use the machine."""

    wall_seconds: float
    cpu_seconds: float
    tokens: int


def read_rows(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """The rows of a JSONL file, rendered with the chat template; the end token is trained, the line break is not."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        messages = record["messages"]
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
        answer = tokenizer(messages[-1]["content"])["input_ids"] + [tokenizer.eos_token_id]
        rows.append(Row(prompt + answer, len(prompt), messages[-1]["content"], record.get("pattern", "seen")))
    return rows


def pad(sequences: list[list[int]], value: int, left: bool = False) -> torch.Tensor:
    """[rows, longest] of `sequences`, filled with `value` on the right or left."""
    longest = max(map(len, sequences))
    fill = [[value] * (longest - len(s)) for s in sequences]
    return torch.tensor([f + s if left else s + f for s, f in zip(sequences, fill, strict=True)])


def fine_tune(
    base: PreTrainedModel, rows: list[Row], settings: dict[str, dict[str, object]], seed: int
) -> tuple[PeftModel, Spent]:
    """Train a LoRA adapter on `base`, in a bare loop that stands for the trainer."""
    adapter, training = settings["adapter"], settings["training"]
    torch.manual_seed(seed)
    model = get_peft_model(
        base,
        LoraConfig(
            r=adapter["r"],
            lora_alpha=adapter["lora_alpha"],
            lora_dropout=adapter["lora_dropout"],
            target_modules=adapter["target_modules"],
            task_type="CAUSAL_LM",
        ),
    )
    model.train()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=training["learning_rate"], weight_decay=training["weight_decay"])
    size, order = training["batch_size"], random.Random(seed)
    steps = training["epochs"] * math.ceil(len(rows) / size)
    warmup = max(1, math.ceil(training["warmup_ratio"] * steps))
    started, cpu_started, tokens, step = time.perf_counter(), time.process_time(), 0, 0
    for _ in range(training["epochs"]):
        shuffled = order.sample(rows, len(rows))
        for first in range(0, len(shuffled), size):
            batch = shuffled[first : first + size]
            share = min(1.0, (step + 1) / warmup)
            if step >= warmup:
                share = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
            for group in optimizer.param_groups:
                group["lr"] = training["learning_rate"] * share
            inputs = pad([r.tokens for r in batch], 0)
            mask = pad([[1] * len(r.tokens) for r in batch], 0)
            labels = pad([[IGNORED] * r.trained_from + r.tokens[r.trained_from :] for r in batch], IGNORED)
            loss = model(input_ids=inputs, attention_mask=mask, labels=labels, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            tokens += int(mask.sum())
            step += 1
            if step % 25 == 0:
                print(f"    step {step}/{steps} loss {loss.item():.4f}", flush=True)
    return model, Spent(time.perf_counter() - started, time.process_time() - cpu_started, tokens)


@torch.no_grad()
def answers(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, rows: list[Row], size: int = 50) -> list[str]:
    """Greedy answers, in the order of `rows`."""
    model.eval()
    out = []
    for first in range(0, len(rows), size):
        prompts = [r.tokens[: r.trained_from] for r in rows[first : first + size]]
        inputs = pad(prompts, tokenizer.pad_token_id, left=True)
        mask = pad([[1] * len(p) for p in prompts], 0, left=True)
        made = model.generate(
            input_ids=inputs,
            attention_mask=mask,
            max_new_tokens=90,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        out += tokenizer.batch_decode(made[:, inputs.shape[1] :], skip_special_tokens=True)
    return out


def report(title: str, given: list[str], rows: list[Row], show: int) -> None:
    """Print exact match for all rows, seen patterns and new patterns, and some misses."""
    hits = [a.strip() == r.answer for a, r in zip(given, rows, strict=True)]
    shares = {"all": sum(hits) / len(hits)}
    for pattern in ("seen", "new"):
        own = [h for h, r in zip(hits, rows, strict=True) if r.pattern == pattern]
        shares[pattern] = sum(own) / len(own)
    print(title, " ".join(f"{name} {share:.1%}" for name, share in shares.items()), flush=True)
    misses = [(a, r) for a, r, hit in zip(given, rows, hits, strict=True) if not hit]
    for got, row in misses[:show]:
        print(f"    {row.pattern}: want {row.answer}\n         got {got!r}")


def main() -> None:
    """Measure the base once and the fine-tune once per seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=STARTER / "model")
    parser.add_argument("--data", type=Path, default=STARTER / "data")
    parser.add_argument("--config", type=Path, default=STARTER / "quickstart.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--show", type=int, default=3)
    parser.add_argument("--rate", type=float, help="another learning rate than the config's")
    parser.add_argument("--epochs", type=int, help="another number of epochs than the config's")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = yaml.safe_load(arguments.config.read_text(encoding="utf-8"))
    settings["training"]["learning_rate"] = float(arguments.rate or settings["training"]["learning_rate"])
    settings["training"]["epochs"] = arguments.epochs or settings["training"]["epochs"]
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    train, heldout = (read_rows(arguments.data / f"{n}.jsonl", tokenizer) for n in ("train", "heldout"))
    lengths = [len(r.tokens) for r in train]
    print(f"row tokens mean {sum(lengths) / len(lengths):.1f} max {max(lengths + [len(r.tokens) for r in heldout])}")

    def load() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)

    started = time.perf_counter()
    given = answers(load(), tokenizer, heldout)
    report(f"base ({time.perf_counter() - started:.1f} s)", given, heldout, arguments.show)
    for seed in arguments.seeds:
        model, cost = fine_tune(load(), train, settings, seed)
        started = time.perf_counter()
        given = answers(model.merge_and_unload(), tokenizer, heldout)
        title = (
            f"seed {seed}: fine-tune {cost.wall_seconds:.1f} s wall, {cost.cpu_seconds:.1f} s CPU,"
            f" {cost.tokens / cost.wall_seconds:.0f} tok/s; answers {time.perf_counter() - started:.1f} s;"
        )
        report(title, given, heldout, arguments.show)


if __name__ == "__main__":
    main()
