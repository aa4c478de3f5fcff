"""The frozen base as one file per (base, quantization, dtype, device that quantized): each layer one piece of bytes.

A slab folder holds `layers.slab` and `index.json`. A layer begins at a multiple of 4096 bytes and is as long as a
multiple of it, which direct reads from a disk need; a piece of it (packed weight, its constants) begins at a multiple
of 512. index.json names every finished layer with its SHA-256 and is replaced when a layer is on the disk, so a kill
costs one layer. The base's own files are only read.

The order of sums in `absmax.mean()` differs between CPU and GPU, so a slab is made where a resident base would have
been quantized: its weights are then the same, bit for bit.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charkha.backends.torch.freed_memory import give_freed_memory_back
from charkha.backends.torch.tensor_files import (
    StoredTensor,
    base_fingerprint,
    read_rows,
    stored_name,
    tensor_bytes,
    tensors_of_folder,
    torch_dtype_of,
)
from charkha.caches import own_cache
from charkha.errors import DoesNotFit, EnvironmentProblem
from charkha.store import durable
from charkha.units import format_bytes

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

LAYER_ALIGNMENT = 4096
PIECE_ALIGNMENT = 512
BLOCK_SIZE, NESTED_BLOCK_SIZE = 64, 256  # bitsandbytes' own for 4-bit weights with double quantization
DATA, INDEX = "layers.slab", "index.json"
DTYPE_NAMES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}  # as in a safetensors header
_FORMAT = 1
_READ_BYTES = 1 << 20
OnLayer = Callable[[int, int], None]


@dataclass(frozen=True)
class LinearShape:
    """One linear layer whose weight is streamed: the name of its module, and [rows, columns] of the weight."""

    name: str
    rows: int
    columns: int


@dataclass(frozen=True)
class Piece:
    """Bytes of one tensor within its layer. `part` is weight | packed | absmax | nested_absmax | nested_offset."""

    module: str
    part: str
    dtype: str  # as in a safetensors header
    shape: tuple[int, ...]
    offset: int  # from the layer's begin
    byte_count: int


@dataclass(frozen=True)
class SlabLayer:
    """One decoder layer in the file. `byte_count` includes what fills it up to whole blocks."""

    offset: int
    byte_count: int
    sha256: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class SlabKey:
    """What a slab is of; two slabs with the same key hold the same numbers."""

    fingerprint: str
    quantization: str  # none | nf4 | fp4
    dtype: str
    made_on: str  # cpu | cuda

    @property
    def folder_name(self) -> str:
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return f"{self.quantization}-{self.dtype}-{digest[:16]}"


@dataclass(frozen=True)
class Slab:
    """A finished slab: every layer is there and matches its hash."""

    path: Path
    layers: tuple[SlabLayer, ...]

    @property
    def total_bytes(self) -> int:
        return sum(layer.byte_count for layer in self.layers)

    @property
    def largest_layer_bytes(self) -> int:
        return max(layer.byte_count for layer in self.layers)


def ensure_slab(
    base: Path,
    layers: Sequence[Sequence[LinearShape]],
    *,
    quantization: str,
    dtype: str,
    device: str,
    cache: Path | None = None,
    on_layer: OnLayer = lambda done, total: None,
) -> Slab:
    """The slab of a base, made or finished when it is not there yet; every layer is hashed before it is returned.

    Layers that do not match their hash are made again, with a warning. `on_layer(done, total)` is called for each
    layer that is written. Raises EnvironmentProblem for a folder that holds the slab of another base and for a base
    whose files lack a weight, DoesNotFit for a disk too small.
    """
    made_on = device if quantization != "none" else "cpu"
    key = SlabKey(base_fingerprint(base), quantization, dtype, made_on)
    folder = (cache or own_cache() / "slabs") / key.folder_name
    weights = {tensor.name: tensor for part in tensors_of_folder(base).values() for tensor in part}
    _require_weights(weights, layers, base)
    with _locked(folder):
        finished = _intact_layers(folder, key, layers)
        if len(finished) < len(layers):
            give_freed_memory_back()
            durable.cut_file(folder / DATA, _end_of(finished))
            _require_room(folder, layers[len(finished) :], key)
        for number in range(len(finished), len(layers)):
            finished.append(_write_layer(folder, layers[number], weights, key, _end_of(finished)))
            durable.write_durably(folder / INDEX, _index_text(key, len(layers), finished))
            on_layer(len(finished), len(layers))
    return Slab(folder / DATA, tuple(finished))


def _write_layer(
    folder: Path, linears: Sequence[LinearShape], weights: dict[str, StoredTensor], key: SlabKey, begin: int
) -> SlabLayer:
    """Appends one layer, a weight at a time, its bytes on the disk when this returns."""
    pieces: list[Piece] = []
    digest, position = hashlib.sha256(), 0

    def put(data: bytes | memoryview) -> None:
        nonlocal position
        durable.append(folder / DATA, data)
        digest.update(data)
        position += len(data)

    for linear in linears:
        for part, tensor in _parts(weights[f"{linear.name}.weight"], key):
            put(bytes(-position % PIECE_ALIGNMENT))
            data = tensor_bytes(tensor)
            pieces.append(Piece(linear.name, part, stored_name(tensor.dtype), tuple(tensor.shape), position, len(data)))
            put(data)
    put(bytes(-position % LAYER_ALIGNMENT))
    durable.sync_file(folder / DATA)
    return SlabLayer(begin, position, digest.hexdigest(), tuple(pieces))


def _parts(stored: StoredTensor, key: SlabKey) -> Iterator[tuple[str, torch.Tensor]]:
    """What one weight becomes, in host memory: itself in `dtype`, or packed with its constants."""
    weight = read_rows(stored, 0, stored.shape[0]).to(torch_dtype_of(DTYPE_NAMES[key.dtype]))
    if key.quantization == "none":
        yield "weight", weight.contiguous()
        return
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(
        weight.to(key.made_on).contiguous(),
        blocksize=BLOCK_SIZE,
        compress_statistics=True,
        quant_type=key.quantization,
    )
    del weight
    for part, tensor in (
        ("packed", packed),
        ("absmax", state.absmax),
        ("nested_absmax", state.state2.absmax),
        ("nested_offset", state.offset),
    ):
        yield part, tensor.cpu().contiguous()


def _require_weights(weights: dict[str, StoredTensor], layers: Sequence[Sequence[LinearShape]], base: Path) -> None:
    for linear in (linear for layer in layers for linear in layer):
        stored = weights.get(f"{linear.name}.weight")
        if stored is None:
            raise EnvironmentProblem(
                f"this base stores {linear.name}.weight under another name; such a base cannot be streamed yet",
                where=str(base),
                remedy="use model.placement resident",
            )
        if stored.shape != (linear.rows, linear.columns):
            raise EnvironmentProblem(
                f"{stored.name} has shape {stored.shape} in the files, {(linear.rows, linear.columns)} by config.json",
                where=str(stored.file),
                remedy="fetch or copy the model again; config.json and the weights belong to different models",
            )


def _intact_layers(folder: Path, key: SlabKey, layers: Sequence[Sequence[LinearShape]]) -> list[SlabLayer]:
    """The finished layers up to the first that is damaged. Raises EnvironmentProblem for a slab of another base."""
    path = folder / INDEX
    try:
        index = json.loads(path.read_bytes())
        found = [_layer_of(record) for record in index["layers"]]
        same = index["format"] == _FORMAT and index["key"] == asdict(key) and index["layer_count"] == len(layers)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s cannot be read (%s); the slab is made anew", path, error)
        return []
    names = [[linear.name for linear in layer] for layer in layers]
    if not same or any(_modules(layer) != names[number] for number, layer in enumerate(found)):
        raise EnvironmentProblem(
            "this slab is of another base, or of another version of charkha",
            where=str(folder),
            remedy="remove this folder; it is made anew from the base",
        )
    for number, layer in enumerate(found):
        if layer.offset != _end_of(found[:number]) or not _matches(folder / DATA, layer):
            logger.warning("%s: layer %d does not match its hash; it and those after it are made anew", folder, number)
            return found[:number]
    return found


def _modules(layer: SlabLayer) -> list[str]:
    return list(dict.fromkeys(piece.module for piece in layer.pieces))


def _matches(path: Path, layer: SlabLayer) -> bool:
    """Whether the layer's bytes in the file have its hash; plain reads, whose pages count for no process."""
    digest, left = hashlib.sha256(), layer.byte_count
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(layer.offset)
            while left and (chunk := file.read(min(left, _READ_BYTES))):
                digest.update(chunk)
                left -= len(chunk)
    except FileNotFoundError:
        return False
    return not left and digest.hexdigest() == layer.sha256


def _layer_of(record: dict[str, Any]) -> SlabLayer:
    pieces = tuple(Piece(**{**piece, "shape": tuple(piece["shape"])}) for piece in record["pieces"])
    return SlabLayer(int(record["offset"]), int(record["byte_count"]), str(record["sha256"]), pieces)


def _index_text(key: SlabKey, layer_count: int, layers: list[SlabLayer]) -> bytes:
    record = {
        "format": _FORMAT,
        "key": asdict(key),
        "layer_count": layer_count,
        "layers": [asdict(layer) for layer in layers],
    }
    return (json.dumps(record, indent=1) + "\n").encode()


def _end_of(layers: Sequence[SlabLayer]) -> int:
    return layers[-1].offset + layers[-1].byte_count if layers else 0


def _require_room(folder: Path, layers: Sequence[Sequence[LinearShape]], key: SlabKey) -> None:
    """`layers` are those still to be written. Raises DoesNotFit."""
    count = sum(linear.rows * linear.columns for layer in layers for linear in layer)
    # Of 4-bit weights: half a byte, and a byte of constants per 64 (their own constants are 1 % of that).
    needed = count * 33 // 64 if key.quantization != "none" else count * (4 if key.dtype == "fp32" else 2)
    free = durable.free_bytes(folder)
    if needed > free:
        raise DoesNotFit(
            f"the streamed base needs {format_bytes(needed)} of disk, of which {format_bytes(free)} are free",
            where=str(folder),
            remedy="make room, or set CHARKHA_CACHE to a folder on a larger disk",
        )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time makes a slab; another waits and then finds it."""
    try:
        durable.make_folder(folder)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise EnvironmentProblem(
            f"the folder for streamed bases cannot be written: {error.strerror}",
            where=str(folder),
            remedy="set CHARKHA_CACHE to a folder that you may write to",
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
