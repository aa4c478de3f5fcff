"""Base + adapter -> standalone model, a block of rows at a time: memory follows neither model nor shard size.

What the adapter does to a weight (`updates.py`) is computed in fp32 and rounded once to the type in which the base
stores it. Adapters of 3-D expert weights, and bases whose weights transformers renames while loading, go through
PEFT's own merge in memory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from charkha.backends.torch.packed import PackedInt8, PackedWeight, is_part_of_packed, packed_weights
from charkha.backends.torch.peft_merge import merge_in_memory
from charkha.backends.torch.tensor_files import (
    INDEX,
    StoredTensor,
    TensorFileWriter,
    output_bytes,
    read_bytes,
    read_rows,
    row_blocks,
    tensors_of_folder,
)
from charkha.backends.torch.updates import WeightUpdate, read_adapter_config, read_updates, why_only_in_memory
from charkha.errors import DoesNotFit, EnvironmentProblem, UsageError
from charkha.store import durable
from charkha.units import format_bytes

if TYPE_CHECKING:
    import torch

BLOCK_BYTES = 8 << 20
RECORD = "charkha_merge.json"  # marks a folder as a merge, which the next merge may replace
Dequantize = Callable[[str, "torch.Tensor"], "torch.Tensor | None"]
_TEXT_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*", "USE_POLICY*")


@dataclass(frozen=True)
class Merged:
    """Bytes of the merged weights; `note` says when another way than block by block was taken, and why."""

    bytes: int
    note: str | None = None


@dataclass(frozen=True)
class _Output:
    """One tensor of the merged model: a stored one, or a 4-bit or 8-bit one unpacked."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: StoredTensor | PackedWeight | PackedInt8


def merge_adapter(
    base: Path,
    adapter: Path,
    target: Path,
    *,
    dequantize: Dequantize | None = None,
    on_tensor: Callable[[str, int, int], None] | None = None,
) -> Merged:
    """Writes the merged model to `target`, complete or absent.

    `dequantize(name, weight)` gives the values that the adapter was trained beside (None: those stored); without it
    the adapter goes onto the base as stored, and weights stored in 4 or 8 bits are unpacked. `on_tensor(name, done,
    total)` is told of progress.
    An earlier merge in `target` is replaced; anything else there is left alone (UsageError).
    Raises DoesNotFit before anything is written when the disk is too small, UsageError for an adapter that has nothing
    to merge or that does not belong to this base.
    """
    files = _outputs(base)
    shapes = {output.name: output.shape for outputs in files.values() for output in outputs}
    why = why_only_in_memory(read_adapter_config(adapter))
    updates = {} if why else read_updates(adapter, shapes)
    missing = _require_targets(shapes, updates, base)
    if missing:
        why = f"the base stores {missing} under other names"
    if why and dequantize is not None:
        raise UsageError(
            f"this adapter can be merged in memory only ({why}), and so onto the base as stored only",
            where=str(adapter),
            remedy="leave out --onto dequantized",
        )
    _require_replaceable(target)
    total_bytes = sum(output_bytes(output.dtype, output.shape) for outputs in files.values() for output in outputs)
    _require_room(target, total_bytes)
    staging = target.with_name(f".{target.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    if why:
        total_bytes = merge_in_memory(base, adapter, staging)
    else:
        _merge_blocks(files, updates, staging, dequantize, on_tensor)
        if set(files) != {"model.safetensors"}:
            _write_index(staging, files, total_bytes)
    _copy_text_files(base, adapter, staging)
    (staging / RECORD).write_text(json.dumps({"base": str(base), "adapter": str(adapter)}) + "\n", encoding="utf-8")
    durable.sync_tree(staging)
    if target.exists():
        durable.remove_folder(target)
    durable.rename_durably(staging, target)
    return Merged(total_bytes, f"merged in memory by PEFT, not block by block: {why}" if why else None)


def _merge_blocks(
    files: dict[str, list[_Output]],
    updates: dict[str, WeightUpdate],
    staging: Path,
    dequantize: Dequantize | None,
    on_tensor: Callable[[str, int, int], None] | None,
) -> None:
    done, total = 0, sum(len(outputs) for outputs in files.values())
    for name, outputs in files.items():
        with TensorFileWriter(staging / name, [(o.name, o.dtype, o.shape) for o in outputs]) as writer:
            for output in outputs:
                _write_merged(writer, output, updates.get(output.name), dequantize)
                done += 1
                if on_tensor is not None:
                    on_tensor(output.name, done, total)


def _outputs(base: Path) -> dict[str, list[_Output]]:
    """File name -> tensors of the merged model, in the base's own order."""
    stored = tensors_of_folder(base)
    packed = packed_weights({tensor.name: tensor for tensors in stored.values() for tensor in tensors})
    return {
        name: [
            _Output(tensor.name, source.dtype, source.shape, source)
            for tensor in tensors
            if not is_part_of_packed(tensor.name)
            for source in [packed.get(tensor.name, tensor)]
        ]
        for name, tensors in stored.items()
    }


def _write_index(folder: Path, files: dict[str, list[_Output]], total_bytes: int) -> None:
    weight_map = {output.name: name for name, outputs in files.items() for output in outputs}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _require_targets(shapes: dict[str, tuple[int, ...]], updates: dict[str, WeightUpdate], base: Path) -> str | None:
    """The first updated weight that is stored under another name than the loaded model's; None when there is none.

    Raises UsageError for a weight that this base does not have, or has in another shape.
    """
    renamed = None
    for name, update in updates.items():
        if name in shapes and _same_shape(update.shape, shapes[name]):
            continue
        if name not in shapes and _same_shape(update.shape, _shape_when_loaded(base, name)):
            renamed = renamed or name
            continue
        found = f"has shape {shapes[name]}" if name in shapes else "does not exist"
        raise UsageError(
            f"the adapter updates {name} of shape {update.shape}, which {found} in this base",
            where=str(base),
            remedy="merge onto the base model that the run was trained on",
        )
    return renamed


def _same_shape(wanted: tuple[int, ...], found: tuple[int, ...] | None) -> bool:
    """Equal, where -1 stands for any extent."""
    if found is None or len(wanted) != len(found):
        return False
    return all(extent in (-1, other) for extent, other in zip(wanted, found, strict=True))


def _shape_when_loaded(base: Path, name: str) -> tuple[int, ...] | None:
    """Shape of a parameter of the model as transformers builds it; None where there is none of that name."""
    from charkha.backends.torch.skeleton import build_skeleton

    try:
        parameters = dict(build_skeleton(base).named_parameters(remove_duplicate=False))
    except EnvironmentProblem:
        return None
    return tuple(parameters[name].shape) if name in parameters else None


def _require_replaceable(target: Path) -> None:
    if (target / RECORD).is_file() or not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    raise UsageError(
        "exists and is not a model that charkha merged; it is left as it is",
        where=str(target),
        remedy="choose a new folder with --output",
    )


def _require_room(target: Path, needed: int) -> None:
    free = durable.free_bytes(target)
    if free < needed + BLOCK_BYTES:
        raise DoesNotFit(
            f"the merged model takes {format_bytes(needed)} but the disk has {format_bytes(free)} free",
            where=str(target),
            remedy="make room, or choose another place with --output",
        )


def _write_merged(
    writer: TensorFileWriter, output: _Output, update: WeightUpdate | None, dequantize: Dequantize | None
) -> None:
    source = output.source
    if not isinstance(source, StoredTensor):
        return _write_values(writer, source.unpack(), update)
    if dequantize is not None and len(source.shape) == 2:
        values = dequantize(source.name, read_rows(source, 0, source.shape[0]))
        if values is not None:
            return _write_values(writer, values, update)
    if update is None:
        for offset in range(0, source.byte_count, BLOCK_BYTES):
            writer.write(read_bytes(source, offset, min(BLOCK_BYTES, source.byte_count - offset)))
        return None
    # fp32 sums of a bf16 block, and the update beside it, take four times the block's own bytes.
    for first, count in row_blocks(source, BLOCK_BYTES // 4):
        block = read_rows(source, first, count)
        writer.write_tensor(update.apply(block.float(), first).to(block.dtype))
    return None


def _write_values(writer: TensorFileWriter, values: torch.Tensor, update: WeightUpdate | None) -> None:
    """Values that are in memory as a whole; only the sums are made block by block."""
    rows = max(1, BLOCK_BYTES // 4 // max(1, values[0].numel() * values.element_size()))
    for first in range(0, len(values), rows):
        block = values[first : first + rows]
        writer.write_tensor(block if update is None else update.apply(block.float(), first).to(block.dtype))


def _copy_text_files(base: Path, adapter: Path, target: Path) -> None:
    """Config, tokenizer, template and licence travel along; the run's own tokenizer and template files win."""
    for pattern in _TEXT_FILES:
        for path in base.glob(pattern):
            if path.name != INDEX:
                shutil.copyfile(path, target / path.name)
        for path in adapter.glob(pattern):
            if not path.name.startswith("adapter_"):
                shutil.copyfile(path, target / path.name)
    config_path = target / "config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    if config.pop("quantization_config", None) is not None:
        config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
