"""What one weight of the base becomes in a slab: itself in the base's type, packed in 4 or 8 bits, or taken as stored.

Parts, by name: `weight`; of 4-bit weights `packed`, `absmax` and, with double quantization, `nested_absmax` and
`nested_offset`; of 8-bit ones `int8` and `row_maxima`. A base that is stored in 4 bits brings its code tables along
(`code`, `nested_code`): its bytes go into the slab as they are, nothing is unpacked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from charkha.backends.torch.tensor_files import StoredTensor, read_bytes, read_rows, torch_dtype_of
from charkha.errors import EnvironmentProblem

if TYPE_CHECKING:
    import torch

BLOCK_SIZE, NESTED_BLOCK_SIZE = 64, 256  # bitsandbytes' own for 4-bit weights with double quantization
_STATE = ".quant_state.bitsandbytes__"
_ROW_MAXIMA = "SCB"  # beside a weight stored in 8 bits
Weights = Mapping[str, StoredTensor]


@dataclass(frozen=True)
class Rows:
    """Some rows of a stored tensor, which is taken as a matrix: all dimensions but the last are rows."""

    stored: str
    first: int
    count: int


@dataclass(frozen=True)
class LinearShape:
    """One matrix that is streamed: the name of its module, [rows, columns], and where its rows are stored.

    `sources` are put one below the other; empty: the whole of `{name}.weight`.
    """

    name: str
    rows: int
    columns: int
    sources: tuple[Rows, ...] = ()


@dataclass(frozen=True)
class StoredState:
    """How a weight that the base stores in 4 bits was quantized; `dtype` is that of the weight before."""

    quant_type: str  # nf4 | fp4
    block_size: int
    nested_block_size: int | None  # None: the blocks' constants are in fp32
    nested_offset: float
    dtype: str  # bfloat16 | float16 | float32


def stored_state(weights: Weights, name: str) -> StoredState | None:
    """Of the module `name`; None where its weight is not stored in 4 bits."""
    tensor = next((weights[key] for kind in ("nf4", "fp4") if (key := f"{name}.weight{_STATE}{kind}") in weights), None)
    if tensor is None:
        return None
    state: dict[str, Any] = json.loads(read_bytes(tensor, 0, tensor.byte_count))
    nested = state.get("nested_blocksize") if f"{name}.weight.nested_absmax" in weights else None
    return StoredState(
        state["quant_type"], state["blocksize"], nested, float(state.get("nested_offset", 0.0)), state["dtype"]
    )


def stored_in_8_bits(weights: Weights, name: str) -> bool:
    """Whether the module's weight is stored as int8 with the largest magnitude of each row."""
    return f"{name}.{_ROW_MAXIMA}" in weights


def is_stored_quantized(weights: Weights) -> bool:
    """Whether some weight of the base is stored in 4 or 8 bits; the others are then left whole by every loader."""
    return any(_STATE in name or name.endswith(f".{_ROW_MAXIMA}") for name in weights)


def parts_of(
    linear: LinearShape, weights: Weights, *, quantization: str, dtype: str, made_on: str
) -> Iterator[tuple[str, torch.Tensor]]:
    """(part, tensor in host memory) of one weight; `quantization` of those that are stored whole.

    `dtype` is a safetensors name, `made_on` the device that quantizes.
    """
    state = stored_state(weights, linear.name)
    if state is not None:
        yield from _stored_4bit(weights, f"{linear.name}.weight", state)
        return
    if stored_in_8_bits(weights, linear.name):
        yield "int8", _whole(weights[f"{linear.name}.weight"])
        yield "row_maxima", _whole(weights[f"{linear.name}.{_ROW_MAXIMA}"])
        return
    weight = _read(linear, weights).to(torch_dtype_of(dtype))
    if quantization == "none":
        yield "weight", weight.contiguous()
    elif quantization == "int8":
        yield from _to_int8(weight, made_on)
    else:
        yield from _to_4bit(weight, quantization, made_on)


def _read(linear: LinearShape, weights: Weights) -> torch.Tensor:
    import torch

    found = [read_rows(as_matrix(weights[rows.stored]), rows.first, rows.count) for rows in _sources(linear)]
    return found[0] if len(found) == 1 else torch.cat(found)


def _sources(linear: LinearShape) -> tuple[Rows, ...]:
    return linear.sources or (Rows(f"{linear.name}.weight", 0, linear.rows),)


def as_matrix(stored: StoredTensor) -> StoredTensor:
    """The same bytes as [rows, columns]."""
    rows = 1
    for extent in stored.shape[:-1]:
        rows *= extent
    return replace(stored, shape=(rows, stored.shape[-1]))


def _whole(stored: StoredTensor) -> torch.Tensor:
    return read_rows(stored, 0, stored.shape[0]) if stored.shape else read_rows(replace(stored, shape=(1,)), 0, 1)


def _stored_4bit(weights: Weights, name: str, state: StoredState) -> Iterator[tuple[str, torch.Tensor]]:
    import torch

    yield "packed", _whole(weights[name])
    yield "absmax", _whole(weights[f"{name}.absmax"])
    yield "code", _whole(weights[f"{name}.quant_map"])
    if state.nested_block_size is not None:
        yield "nested_absmax", _whole(weights[f"{name}.nested_absmax"])
        yield "nested_code", _whole(weights[f"{name}.nested_quant_map"])
        yield "nested_offset", torch.tensor(state.nested_offset)


def _to_4bit(weight: torch.Tensor, quantization: str, made_on: str) -> Iterator[tuple[str, torch.Tensor]]:
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(
        weight.to(made_on).contiguous(), blocksize=BLOCK_SIZE, compress_statistics=True, quant_type=quantization
    )
    del weight
    for part, tensor in (
        ("packed", packed),
        ("absmax", state.absmax),
        ("nested_absmax", state.state2.absmax),
        ("nested_offset", state.offset),
    ):
        yield part, tensor.cpu().contiguous()


def _to_int8(weight: torch.Tensor, made_on: str) -> Iterator[tuple[str, torch.Tensor]]:
    """As bitsandbytes' Int8Params: from fp16, on the device that the weight goes to."""
    import bitsandbytes.functional as bnb
    import torch

    values, row_maxima, _ = bnb.int8_vectorwise_quant(weight.contiguous().to(device=made_on, dtype=torch.float16))
    del weight
    yield "int8", values.cpu().contiguous()
    yield "row_maxima", row_maxima.cpu().contiguous()


def require_stored(linear: LinearShape, weights: Weights, base: str) -> None:
    """Raises EnvironmentProblem when the base's files lack this weight, or have it in another shape."""
    state = stored_state(weights, linear.name)
    for rows in _sources(linear):
        stored = weights.get(rows.stored)
        if stored is None:
            raise EnvironmentProblem(
                f"this base stores {rows.stored} under another name; such a base cannot be streamed yet",
                where=base,
                remedy="use model.placement resident",
            )
        whole = as_matrix(stored).shape if stored.shape else (1, 1)
        fits = whole[1] == linear.columns and (
            whole[0] == rows.count if not linear.sources else rows.first + rows.count <= whole[0]
        )
        if state is not None:
            fits = 2 * stored.byte_count == linear.rows * linear.columns
        if not fits:
            raise EnvironmentProblem(
                f"{stored.name} has shape {stored.shape} in the files, {(linear.rows, linear.columns)} by config.json",
                where=str(stored.file),
                remedy="fetch or copy the model again; config.json and the weights belong to different models",
            )


def bytes_per_weight(quantization: str, dtype: str) -> float:
    """About so many bytes of the slab for each weight; of 4 bits with a byte of constants for 64."""
    return {"none": 4 if dtype == "fp32" else 2, "int8": 1.01}.get(quantization, 33 / 64)
