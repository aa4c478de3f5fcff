"""PEFT's own merge, with the whole model in memory: for what cannot be merged stored weight by stored weight."""

from __future__ import annotations

from pathlib import Path

from charkha.backends.base import BaseModelSpec, Dtype
from charkha.backends.torch.model import load_adapter, load_base
from charkha.backends.torch.tensor_files import tensors_of_folder

_DTYPES: dict[str, Dtype] = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}


def merge_in_memory(base: Path, adapter: Path, target: Path) -> int:
    """Saves base + adapter into the folder `target` and returns the bytes of its weights.

    The sums are made in the type in which most of the base is stored, so each is rounded twice. Peak memory is the
    model and one shard of it.
    """
    from transformers import GenerationConfig

    dtype = _stored_dtype(base)
    model = load_adapter(load_base(BaseModelSpec(base, dtype, "eager", "none", "cpu")), adapter)
    merged = model.merge_and_unload(safe_merge=True)
    merged.config.use_cache = True  # was off for loading only
    merged.generation_config = GenerationConfig()  # the base's own file is copied; transformers would judge it
    merged.save_pretrained(str(target))
    return sum(tensor.byte_count for tensors in tensors_of_folder(target).values() for tensor in tensors)


def _stored_dtype(base: Path) -> Dtype:
    bytes_of: dict[Dtype, int] = {}
    for tensors in tensors_of_folder(base).values():
        for tensor in tensors:
            dtype = _DTYPES.get(tensor.dtype, "fp32")
            bytes_of[dtype] = bytes_of.get(dtype, 0) + tensor.byte_count
    return max(bytes_of, key=lambda dtype: bytes_of[dtype])
