"""One way of training the same rows, in a process of its own; prints one JSON line. Started by run.py."""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")

MODEL = {
    "vocab_size": 8192, "hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 4, "intermediate_size": 1408, "max_position_embeddings": 1024,
}  # fmt: skip
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
BATCH, RATE, LONGEST = 8, 1e-3, 1024


def main() -> None:
    """Runs one way and prints what it cost."""
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=sorted(WAYS))
    parser.add_argument("--rows", type=int, required=True)
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(1)  # process CPU time of one thread repeats to a few percent; two threads wait for each other
    with tempfile.TemporaryDirectory() as folder:
        result = WAYS[arguments.way](Path(folder), arguments.rows)
    result["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"way": arguments.way, **result}))


def conversations(count: int) -> list[dict]:
    """Starter rows joined to conversations of one to six exchanges: lengths from some 80 to 500 tokens."""
    from charkha.starter.paths import train_file

    rows = [json.loads(line)["messages"] for line in train_file().read_text(encoding="utf-8").splitlines()]
    made, place = [], 0
    for number in range(count):
        turns = []
        for _ in range(1 + number * 7 % 6):
            turns += [turn for turn in rows[place % len(rows)] if turn["role"] != "system"]
            place += 1
        made.append({"messages": turns})
    return made


def base_model(folder: Path, dtype: str) -> Path:
    """A random Llama of 21.9 M parameters with the starter's tokenizer."""
    import shutil

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from charkha.starter.paths import model_folder

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**MODEL)).to(getattr(torch, dtype)).save_pretrained(folder / "base")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(model_folder() / name, folder / "base")
    return folder / "base"


def charkha(folder: Path, rows: int, dtype: str) -> dict:
    """`charkha train` as a user runs it, in this process; the time of the steps alone, as its events have it."""
    from charkha.training.session import train

    base_model(folder, "float32")
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in conversations(rows)), encoding="utf-8")
    (folder / "charkha.yaml").write_text(
        f"model: {{base: base, dtype: {dtype}}}\nadapter: {json.dumps(LORA)}\n"
        f"data: {{train: [rows.jsonl], eval: null, max_length: {LONGEST}}}\n"
        f"training: {{epochs: 1, batch_size: {BATCH}, learning_rate: {RATE}, lr_scheduler_type: constant}}\n"
        "output: run\n",
        encoding="utf-8",
    )
    clock = Clock()

    def observe(event: dict) -> None:
        if event["event"] == "step":
            clock.tick(event["tokens"])

    train(folder / "charkha.yaml", [], observe)
    return clock.result()


def bare(folder: Path, rows: int, dtype: str) -> dict:
    """The loop that anyone would write, over the very batches that charkha plans: model's own loss, clip, AdamW."""
    import torch

    from charkha.backends.base import AdapterSpec, BaseModelSpec
    from charkha.backends.torch.adapters import attach_adapter
    from charkha.backends.torch.batches import MicroBatchPlan, collate
    from charkha.backends.torch.model import load_base
    from charkha.data.formats import read_rows
    from charkha.data.shards import open_shard, write_shard
    from charkha.data.templates import load_template
    from charkha.data.tokenize import encode_rows
    from charkha.data.tokenizer import load_tokenizer

    base = base_model(folder, "float32")
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in conversations(rows)), encoding="utf-8")
    tokenizer = load_tokenizer(base)
    encoded = encode_rows(read_rows(folder / "rows.jsonl").rows, tokenizer, load_template(base))
    shard = open_shard(write_shard(folder, "train", encoded.rows))
    spec = BaseModelSpec(base, dtype, "sdpa", "none", "cpu")
    adapter = AdapterSpec("lora", LORA["r"], LORA["lora_alpha"], LORA["lora_dropout"], "all-linear")
    model = attach_adapter(load_base(spec), adapter, False).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, fused=True)
    plan = MicroBatchPlan(shard, batch_size=BATCH, micro_batch_size=BATCH, seed=42, fingerprint="")
    clock = Clock()
    for step in range(plan.steps_per_epoch):
        chosen = plan.rows_of(step)
        batch = collate(shard, chosen, tokenizer.pad_id)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        clock.tick(int(shard.lengths[chosen].sum()))
    return clock.result()


def trl(folder: Path, rows: int, best: bool) -> dict:
    """SFTTrainer on the same conversations: as it comes, or with bf16 weights, packing and no recomputation."""
    import datasets
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    base = base_model(folder, "float32")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16 if best else torch.float32)
    clock = Clock()

    class Ticks(TrainerCallback):
        def on_train_begin(self, *_: object, **__: object) -> None:
            clock.begin()

        def on_step_end(self, *_: object, **__: object) -> None:
            clock.tick(0)

    extra = {"packing": True, "gradient_checkpointing": False, "per_device_train_batch_size": 2} if best else {}
    settings = {"per_device_train_batch_size": BATCH, "learning_rate": RATE, "max_length": LONGEST} | extra
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(folder / "out"), num_train_epochs=1, use_cpu=True, disable_tqdm=True, save_strategy="no",
            report_to="none", **settings,
        ),
        train_dataset=datasets.Dataset.from_list(conversations(rows)),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA),
        callbacks=[Ticks()],
    )  # fmt: skip
    tokens = sum(len(ids) for ids in trainer.train_dataset["input_ids"])
    trainer.train()
    return clock.result(tokens)


class Clock:
    """CPU seconds of this process between the first and the last step; the first step, which warms up, is left out."""

    def __init__(self) -> None:
        self._marks: list[tuple[float, int]] = []

    def begin(self) -> None:
        """Nothing: TRL's begin, kept so that all ways tick alike."""

    def tick(self, tokens: int) -> None:
        """The end of a step that saw so many real tokens."""
        self._marks.append((time.process_time(), tokens))

    def result(self, total_tokens: int | None = None) -> dict:
        """Real tokens per CPU second after the first step. Without counts, tokens are shared out evenly over steps."""
        steps = len(self._marks) - 1
        seconds = self._marks[-1][0] - self._marks[0][0]
        counted = sum(tokens for _, tokens in self._marks[1:])
        tokens = counted if total_tokens is None else total_tokens * steps / (steps + 1)
        return {"tokens": round(tokens), "cpu_seconds": round(seconds, 3), "tokens_per_cpu_second": tokens / seconds}


WAYS = {
    "bare fp32": lambda folder, rows: bare(folder, rows, "fp32"),
    "charkha fp32": lambda folder, rows: charkha(folder, rows, "fp32"),
    "bare bf16": lambda folder, rows: bare(folder, rows, "bf16"),
    "charkha bf16": lambda folder, rows: charkha(folder, rows, "bf16"),
    "trl defaults": lambda folder, rows: trl(folder, rows, best=False),
    "trl best": lambda folder, rows: trl(folder, rows, best=True),
}

if __name__ == "__main__":
    main()
