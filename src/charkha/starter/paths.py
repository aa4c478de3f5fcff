"""Where the built-in starter model, its data and its config lie inside the installed package."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).resolve().parent


def model_folder() -> Path:
    """The base model in Hugging Face layout: weights, config, tokenizer, chat template."""
    return _HERE / "model"


def train_file() -> Path:
    """The training rows, JSON lines with `messages`."""
    return _HERE / "data" / "train.jsonl"


def heldout_file() -> Path:
    """The held-out rows; each says in `pattern` whether its wording is `seen` in training or `new`."""
    return _HERE / "data" / "heldout.jsonl"


def quickstart_config() -> Path:
    """The config of the quickstart; paths inside it are relative to its folder."""
    return _HERE / "quickstart.yaml"
