"""Tiny models of real architectures, made on the spot, and runs trained on them; shared by all tests of a worker.

Hidden size 64 and two layers: a run of some steps takes about a second. Weights are random but larger than usual, so
that logits differ enough for a wrong merge or a wrong resume to show.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

# Before torch is imported: several workers with a thread per core each would wait for one another at every operation.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["CHARKHA_HISTORY"] = "off"  # what this machine remembers of itself is no test's to read or to write
os.environ["CHARKHA_FOREGROUND"] = "1"  # commands train in their own process; the supervisor's tests take it away
for _name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ[_name] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-cells", help="write what tests/matrix sees into this folder instead of comparing it")


# They take half a minute and more each: begun last, one would keep a worker busy while the others have nothing to do.
FIRST = (
    "test_quickstart.py",
    "test_supervisor.py",
    "test_several_processes.py",
    "test_verify_resume.py",
    "test_readme.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests first, the rest in its order."""
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


WORDS = ("tea", "rice", "wheel", "cotton", "river", "lamp", "train", "field", "paper", "stone", "cloud", "seed", "iron")
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}<|assistant|>{% generation %}"
    "{{ message['content'] }}<|end|>{% endgeneration %}{% else %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIALS = ["<s>", "</s>", "<pad>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]


def rows(count: int, first: int = 0) -> list[dict[str, Any]]:
    """Conversations of different lengths whose answer can be learned from the question."""
    made = []
    for number in range(first, first + count):
        word = WORDS[number % len(WORDS)]
        question = f"{'Please say ' * (number % 4)}{word} {number}?"
        answer = " ".join([word.upper()] * (1 + number % 3))
        made.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    return made


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def write_tokenizer(folder: Path) -> int:
    """A byte-level BPE trained on the rows, with the template; returns the vocabulary size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((json.dumps(row) for row in rows(64)), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=TEMPLATE
    )
    fast.save_pretrained(str(folder))
    return len(fast)


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "falcon": {"num_kv_heads": 4, "new_decoder_architecture": False, "alibi": False, "ffn_hidden_size": 172},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 64},
    "gemma3_text": {"head_dim": 16, "sliding_window": 64},
    "phi": {},
    "phi3": {},
}


def write_model(folder: Path, kind: str = "llama", *, dtype: str = "float32", seed: int = 0, **changes: Any) -> Path:
    """A model folder in Hugging Face layout with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True)
    vocabulary = write_tokenizer(folder)
    settings = {
        "vocab_size": vocabulary, "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
    }  # fmt: skip
    config = AutoConfig.for_model(kind, **{**settings, **ARCHITECTURES.get(kind, {}), **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)
    model.to(getattr(torch, dtype)).save_pretrained(str(folder), safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`model_folder("mistral", dtype="bfloat16")`: made once a session; tests must not write into it."""
    made: dict[str, Path] = {}

    def folder(kind: str = "llama", **changes: Any) -> Path:
        key = json.dumps([kind, changes], sort_keys=True)
        if key not in made:
            made[key] = write_model(tmp_path_factory.mktemp("model") / kind, kind, **changes)
        return made[key]

    return folder


@pytest.fixture(scope="session")
def new_model() -> Callable[..., Path]:
    """`new_model(folder, "llama", seed=1)` for a test that changes the model's files."""
    return write_model


@pytest.fixture(scope="module")
def nut() -> Iterator[Any]:
    """A real UPS daemon; see real_nut.py. Skipped where NUT is not installed."""
    from real_nut import running_nut

    with running_nut() as real:
        yield real


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """`small_disk(size_bytes)` is an empty disk of that size; skipped where mounting is not allowed."""
    folder = tmp_path / "disk"
    mounted = []

    def mount(size_bytes: int) -> Path:
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting a small disk is not allowed here")
        mounted.append(folder)
        return folder

    yield mount
    for path in mounted:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@dataclass
class Project:
    """A folder with rows and a config, as a user has it."""

    folder: Path
    base: Path
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> Path:
        return self.folder / "charkha.yaml"

    def run_folder(self, output: str = "run") -> Path:
        return self.folder / output

    def train(
        self, *overrides: str, output: str = "run", stop_at: int | None = None
    ) -> tuple[Any, list[dict[str, Any]]]:
        """Trains in this process; `stop_at` sends SIGINT when that step is recorded. Returns (result, events)."""
        import signal

        from charkha.training.session import train

        seen: list[dict[str, Any]] = []

        def observe(event: dict[str, Any]) -> None:
            seen.append(event)
            if event["event"] == "step" and event["step"] == stop_at:
                signal.raise_signal(signal.SIGINT)

        return train(self.config, [*overrides, f"output={output}"], observe), seen

    def weights(self, output: str = "run") -> dict[str, Any]:
        """The trained tensors of a finished run."""
        from safetensors.torch import load_file

        folder = self.run_folder(output)
        (path,) = [*folder.glob("adapter/*.safetensors"), *folder.glob("model/*.safetensors")]
        return load_file(str(path))

    def checkpoint_tensors(self, output: str = "run") -> dict[str, Any]:
        """Weights and optimizer state of the newest checkpoint."""
        from safetensors.torch import load_file

        from charkha.store.checkpoints import CheckpointStore

        checkpoint, _ = CheckpointStore(self.run_folder(output)).newest_verified()
        assert checkpoint is not None
        return {
            f"{path.name}:{name}": tensor
            for path in sorted(checkpoint.path.glob("*.safetensors"))
            for name, tensor in load_file(str(path)).items()
        }


@pytest.fixture
def project(tmp_path: Path, model_folder: Callable[..., Path]) -> Callable[..., Project]:
    """`project("llama", adapter={"r": 4})` writes rows and a config; every section may be given in part."""

    def make(base: str | Path = "llama", *, count: int = 40, **sections: Any) -> Project:
        folder = model_folder(base) if isinstance(base, str) else base
        write_jsonl(tmp_path / "rows.jsonl", rows(count))
        settings: dict[str, Any] = {
            "model": {"base": str(folder)},
            "adapter": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
            "data": {"train": ["rows.jsonl"], "eval": 8, "max_length": 128},
            "training": {
                "max_steps": 6,
                "batch_size": 8,
                "micro_batch_size": 4,
                "learning_rate": 2e-3,
                "eval_every": 2,
            },
            "checkpoint": {"every": "2 steps"},
            "output": "run",
        }
        for name, inner in sections.items():
            settings[name] = {**settings.get(name, {}), **inner} if isinstance(inner, dict) else inner
        made = Project(tmp_path, folder, settings)
        made.config.write_text(yaml.safe_dump(settings), encoding="utf-8")
        return made

    return make
