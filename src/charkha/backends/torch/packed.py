"""4-bit and 8-bit weights back to numbers: a base that training quantized while loading, and a base so stored.

Layout of stored 4-bit weights as bitsandbytes writes them: `X.weight` (two values a byte), `X.weight.absmax` and,
with double quantization, `X.weight.nested_absmax` and `.nested_quant_map`, `X.weight.quant_map`, and
`X.weight.quant_state.bitsandbytes__nf4` (JSON as bytes: shape, dtype, block sizes, offset). Of stored 8-bit weights:
`X.weight` (int8), `X.SCB` (largest magnitude of each output row) and `X.weight_format`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from charkha.backends.torch.quiet import quiet_libraries
from charkha.backends.torch.tensor_files import StoredTensor, read_bytes, read_rows, torch_dtype_of

if TYPE_CHECKING:
    import torch

_STATE = ".quant_state.bitsandbytes__"
_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", _STATE)
_INT8_SCALE, _INT8_FORMAT = ".SCB", ".weight_format"
_STORED_NAME = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class PackedWeight:
    """One weight stored in 4 bits, with what it unpacks to."""

    name: str
    dtype: str  # as in a safetensors header
    shape: tuple[int, ...]
    parts: dict[str, StoredTensor]  # "" is the packed weight itself

    def unpack(self) -> torch.Tensor:
        """The weight's values, in the dtype and shape it had before it was quantized."""
        quiet_libraries()
        import bitsandbytes.functional as bnb

        tensors = {key.lstrip("."): read_rows(part, 0, part.shape[0]) for key, part in self.parts.items() if key}
        state = bnb.QuantState.from_dict(qs_dict=tensors, device="cpu")
        packed = read_rows(self.parts[""], 0, self.parts[""].shape[0])
        return bnb.dequantize_4bit(packed, state).reshape(self.shape)


@dataclass(frozen=True)
class PackedInt8:
    """One weight stored in 8 bits with a scale for each output row, and the type to unpack it to."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    weight: StoredTensor
    row_maxima: StoredTensor

    def unpack(self) -> torch.Tensor:
        """The weight's values, q * max / 127 by row."""
        values = read_rows(self.weight, 0, self.shape[0]).float()
        maxima = read_rows(self.row_maxima, 0, self.shape[0]).float()
        return values.mul_(maxima[:, None] / 127).to(torch_dtype_of(self.dtype))


def packed_weights(tensors: Mapping[str, StoredTensor]) -> dict[str, PackedWeight | PackedInt8]:
    """Every 4-bit and 8-bit weight among the tensors of a model, by name."""
    found: dict[str, PackedWeight | PackedInt8] = {}
    plain = [tensor for tensor in tensors.values() if tensor.dtype in _STORED_NAME.values() and len(tensor.shape) == 2]
    for name, tensor in tensors.items():
        if name.endswith(_INT8_SCALE):
            rows = tensors[name.removesuffix(_INT8_SCALE) + ".weight"]
            dtype = plain[0].dtype if plain else "BF16"  # embeddings and head are stored whole
            found[rows.name] = PackedInt8(rows.name, dtype, rows.shape, rows, tensor)
            continue
    for name, tensor in tensors.items():
        weight, marker, _kind = name.partition(_STATE)
        if not marker:
            continue
        state: dict[str, Any] = json.loads(read_bytes(tensor, 0, tensor.byte_count))
        parts = {other.removeprefix(weight): part for other, part in tensors.items() if _belongs(other, weight)}
        found[weight] = PackedWeight(weight, _STORED_NAME[state["dtype"]], tuple(state["shape"]), parts)
    return found


def is_part_of_packed(name: str) -> bool:
    """Whether a stored tensor is a statistic of a 4-bit or 8-bit weight rather than a weight."""
    return name.endswith((*_PARTS[:-1], _INT8_SCALE, _INT8_FORMAT)) or _STATE in name


def _belongs(name: str, weight: str) -> bool:
    rest = name.removeprefix(weight) if name.startswith(weight) else None
    return rest is not None and (rest == "" or rest in _PARTS[:-1] or rest.startswith(_STATE))


def quantization_roundtrip(
    modules: frozenset[str], dtype: str, quantization: str
) -> Callable[[str, torch.Tensor], torch.Tensor | None]:
    """What a weight became when training loaded it in nf4, fp4 (double quantization) or int8: quantized and back.

    `modules` are the layers that were quantized, `dtype` the type in which they were loaded before; other weights
    give None.
    """
    quiet_libraries()
    import bitsandbytes.functional as bnb

    from charkha.backends.torch.base_config import torch_dtype

    loaded = torch_dtype(dtype)

    def roundtrip(name: str, weight: torch.Tensor) -> torch.Tensor | None:
        if name.removesuffix(".weight") not in modules:
            return None
        if quantization == "int8":
            values, maxima, _ = bnb.int8_vectorwise_quant(weight.half())  # bitsandbytes takes fp16 there
            return bnb.int8_vectorwise_dequant(values, maxima).to(weight.dtype)
        packed, state = bnb.quantize_4bit(weight.to(loaded), quant_type=quantization, compress_statistics=True)
        return bnb.dequantize_4bit(packed, state).to(weight.dtype)

    return roundtrip
