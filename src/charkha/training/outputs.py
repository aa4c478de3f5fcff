"""What stands beside the trained weights so that they can be used alone: tokenizer, template, end tokens, card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from charkha.config import Config
from charkha.training.dataset import PreparedData

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "vocab.json", "merges.txt",
    "added_tokens.json",
)  # fmt: skip


def write_companions(folder: Path, base: Path, data: PreparedData, config: Config) -> None:
    """Copies the tokenizer, writes the template that was trained with, the end tokens and a model card."""
    for name in TOKENIZER_FILES:
        if (base / name).exists():
            shutil.copyfile(base / name, folder / name)
    if data.template is not None and data.has_conversations:
        (folder / "chat_template.jinja").write_text(data.template.text, encoding="utf-8")
    _write_generation_config(folder, base, data)
    (folder / "README.md").write_text(_model_card(data, config), encoding="utf-8")


def _write_generation_config(folder: Path, base: Path, data: PreparedData) -> None:
    """The base's own settings, with every token that ended a trained answer among the end tokens."""
    source = base / "generation_config.json"
    settings = json.loads(source.read_text(encoding="utf-8")) if source.exists() else {}
    known = settings.get("eos_token_id")
    before = known if isinstance(known, list) else [known] if known is not None else []
    ends = [*before, *sorted(data.end_ids - set(before))]
    settings["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    (folder / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _model_card(data: PreparedData, config: Config) -> str:
    files = "\n".join(f"- {Path(file['path']).name}: {file['rows']} rows ({file['format']})" for file in data.files)
    training = config.training
    return (
        f"---\nbase_model: {config.model.base}\nlibrary_name: peft\ntags: [charkha, {config.adapter.method}]\n---\n\n"
        f"# {config.adapter.method} fine-tune of {config.model.base}\n\n"
        f"Trained with charkha (objective {training.objective}, learning rate {training.learning_rate:g}, "
        f"batch {training.batch_size}, seed {training.seed}) on {len(data.train.lengths)} rows:\n\n{files}\n\n"
        "The exact settings, versions and hashes are in charkha.yaml and manifest.json of the run folder.\n"
    )
