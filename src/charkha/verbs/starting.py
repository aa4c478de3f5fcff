"""`charkha init`: a commented charkha.yaml for a model and data, with what was found out about both."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from charkha.config import ModelSection
from charkha.data.formats import read_rows
from charkha.errors import CharkhaError, UsageError
from charkha.store.durable import write_durably
from charkha.training.base_model import find_base
from charkha.units import format_bytes

_SMALL_MODEL_PARAMETERS = 50_000_000


@dataclass(frozen=True)
class InitResult:
    """The JSON contract of `charkha init`."""

    path: str
    notes: list[str]


def write_config(path: Path, *, model: str, data: list[Path], mapping: dict[str, str], force: bool) -> InitResult:
    """Writes the config; paths in it are relative to its folder.

    Raises UsageError when `path` exists and `force` is not given, DataError when a data file cannot be read at all.
    """
    if path.exists() and not force:
        raise UsageError("exists already", where=str(path), remedy="choose another --output, or overwrite with --force")
    notes = [_data_note(file, mapping) for file in data]
    hub_or_folder, model_note = _model_note(model, path.parent)
    files = ", ".join(_quoted(_relative(file, path.parent)) for file in data) or "train.jsonl"
    maps = ", ".join(f"{key}: {_quoted(value)}" for key, value in mapping.items())
    name = data[0].stem if data else "run"
    text = _TEMPLATE.format(
        model=_quoted(hub_or_folder),
        quantization="nf4" if model_note.large else "none",
        rate="2e-4" if model_note.large else "1e-3",
        train=files,
        map=f"  map: {{{maps}}}\n" if maps else "",
        output=f"runs/{name}",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, text.encode())
    return InitResult(str(path), [*notes, *model_note.notes])


@dataclass(frozen=True)
class _ModelNote:
    large: bool
    notes: list[str]


def _data_note(file: Path, mapping: dict[str, str]) -> str:
    read = read_rows(file, mapping=mapping)
    trouble = f", {len(read.problems)} with problems (`charkha data inspect {file}`)" if read.problems else ""
    return f"{file}: {len(read.rows)} rows of format {read.format}{trouble}"


def _model_note(model: str, folder: Path) -> tuple[str, _ModelNote]:
    """The model as the config names it, and whether it is large enough for 4 bits to matter."""
    here = Path(model).expanduser()
    name = _relative(here, folder) if here.is_dir() else model
    try:
        base = find_base(ModelSection(base=name), folder)
    except CharkhaError as error:
        return name, _ModelNote(large=True, notes=[str(error)])
    weights = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    large = weights > 2 * _SMALL_MODEL_PARAMETERS
    return name, _ModelNote(large=large, notes=[f"{name}: {format_bytes(weights)} of weights in {base}"])


def _relative(path: Path, folder: Path) -> str:
    path, folder = path.resolve(), folder.resolve()
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)


def _quoted(text: str) -> str:
    """YAML plain where that is safe, else a JSON string, which YAML reads alike."""
    safe = all(character.isalnum() or character in "/._-" for character in text) and not text[:1].isdigit()
    return text if safe and text.lower() not in ("true", "false", "null") else json.dumps(text, ensure_ascii=False)


_TEMPLATE = """\
# What `charkha train` does. Paths are relative to this file; `charkha schema` lists every key.
model:
  base: {model}            # hub id (after `charkha fetch`), local folder, or `starter`
  quantization: {quantization}       # none | nf4: nf4 holds the frozen base in 4 bits
  dtype: auto              # bf16 where the hardware computes in it
adapter:
  method: lora             # lora | full
  r: 16                    # rank: how much can change
  lora_alpha: 32           # strength: updates are scaled by lora_alpha / r
  lora_dropout: 0.05
  target_modules: all-linear
data:
  train: [{train}]
{map}  eval: 5%                 # held-out rows: a share, a count, or a file
  max_length: auto         # tokens
  overlong: error          # error | drop | split | truncate: what happens to longer rows, always told
  train_on: responses      # responses | all
  personal: block          # personal data in the rows: block (refuse to train) | report | mask | drop
training:
  epochs: 3
  learning_rate: {rate}
  lr_scheduler_type: cosine
  warmup_ratio: 0.03
  batch_size: 16           # rows per optimizer step
  micro_batch_size: auto   # rows in memory at once
  seed: 42
checkpoint: {{every: auto, keep: 2}}   # about a minute; or 5min, or "50 steps": at most this much work is lost
output: {output}
"""
