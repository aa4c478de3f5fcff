"""Makes a slab from the base's safetensors, a weight at a time, and finishes one that a kill left incomplete.

index.json is replaced when a layer with its experts is on the disk, so a kill costs one layer. The base's own files are
only read. The order of sums in `absmax.mean()` differs between CPU and GPU, so a slab is made where a resident base
would have been quantized: its weights are then the same, bit for bit.
"""

from __future__ import annotations

import errno
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from charkha.backends.torch.freed_memory import give_freed_memory_back
from charkha.backends.torch.slab_parts import (
    LinearShape,
    Weights,
    bytes_per_weight,
    is_stored_quantized,
    parts_of,
    require_stored,
)
from charkha.backends.torch.slabs import (
    DAMAGED,
    DATA,
    LAYER_ALIGNMENT,
    PIECE_ALIGNMENT,
    Index,
    Piece,
    Slab,
    SlabKey,
    SlabLayer,
    SlabReadOnly,
    locked,
    names_of,
    read_index,
    write_index,
)
from charkha.backends.torch.tensor_files import base_fingerprint, stored_name, tensor_bytes, tensors_of_folder
from charkha.caches import own_cache
from charkha.errors import DoesNotFit, EnvironmentProblem
from charkha.store import durable
from charkha.units import format_bytes

logger = logging.getLogger(__name__)

DTYPE_NAMES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}  # as in a safetensors header
OnLayer = Callable[[int, int], None]
_ROOM = "make room, or set CHARKHA_CACHE to a folder on a larger disk"
Unit = Sequence[LinearShape]


@dataclass(frozen=True)
class LayerShape:
    """What one decoder layer streams: its linear layers, and apart from them each expert's."""

    linears: tuple[LinearShape, ...]
    experts: tuple[tuple[LinearShape, ...], ...] = ()

    @property
    def units(self) -> tuple[tuple[LinearShape, ...], ...]:
        return (self.linears, *self.experts)


def ensure_slab(
    base: Path,
    layers: Sequence[LayerShape],
    *,
    quantization: str,
    dtype: str,
    device: str,
    cache: Path | None = None,
    on_layer: OnLayer = lambda done, total: None,
    on_wait: Callable[[], None] = lambda: None,
) -> Slab:
    """The slab of a base, made or finished when it is not there yet.

    What an earlier run found damaged is made again, and so is what the file is too short for. `on_layer(done, total)`
    is called for each layer that is written, `on_wait` while another process writes. Raises EnvironmentProblem for a
    folder that holds the slab of another base or may not be written to, and for a base whose files lack a weight;
    DoesNotFit for a disk too small.
    """
    weights = stored_weights(base)
    for linear in (linear for layer in layers for unit in layer.units for linear in unit):
        require_stored(linear, weights, str(base))
    made_on = device if quantization != "none" else "cpu"
    key = SlabKey(base_fingerprint(base), quantization, dtype, made_on)
    folder = (cache or own_cache() / "slabs") / key.folder_name
    try:
        with locked(folder, on_wait), _full_disk_told(folder):
            index = _made(_Writer(folder, weights, key), layers, on_layer)
    except SlabReadOnly:
        index = _finished(folder, key, layers)
        if len(index.layers) < len(layers) or any(unit.sha256 == DAMAGED for unit in index.units):
            raise
    return Slab(folder / DATA, index.layers, index.experts if any(index.experts) else ())


def _made(writer: _Writer, layers: Sequence[LayerShape], on_layer: OnLayer) -> Index:
    """What of the slab is there, repaired, and the rest of it written."""
    folder, key = writer.path.parent, writer.key
    index = _repaired(_finished(folder, key, layers), layers, writer)
    if len(index.layers) < len(layers):
        give_freed_memory_back()
        durable.cut_file(writer.path, index.end)
        _require_room(folder, layers[len(index.layers) :], key)
    for number in range(len(index.layers), len(layers)):
        written = list(_written(writer, layers[number], index.end))
        durable.sync_file(writer.path)
        index = Index(key, (*index.layers, written[0]), (*index.experts, tuple(written[1:])))
        write_index(folder, index)
        on_layer(number + 1, len(layers))
    return index


@contextmanager
def _full_disk_told(folder: Path) -> Iterator[None]:
    """Raises DoesNotFit where the room that there was at the beginning has gone; finished layers are kept."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DoesNotFit(
            "the disk is full; the layers of the streamed base that are made already are kept",
            where=str(folder),
            remedy=f"{_ROOM}, and run the same command again",
        ) from error


def stored_weights(base: Path) -> Weights:
    """Every tensor of the base's files by name."""
    return {tensor.name: tensor for part in tensors_of_folder(base).values() for tensor in part}


def _written(writer: _Writer, layer: LayerShape, begin: int) -> Iterator[SlabLayer]:
    for unit in layer.units:
        made = writer.write(unit, begin)
        yield made
        begin = made.end


class _Writer:
    """Writes units of one slab into its file."""

    def __init__(self, folder: Path, weights: Weights, key: SlabKey) -> None:
        self.path = folder / DATA
        self._weights = weights
        self.key = key
        self._quantization = "none" if is_stored_quantized(weights) else key.quantization

    def write(self, linears: Unit, begin: int) -> SlabLayer:
        """One unit, from byte `begin` of the file on, a weight at a time; given to the system, not yet to the disk."""
        pieces: list[Piece] = []
        digest, position = hashlib.sha256(), 0

        def put(data: bytes | memoryview) -> None:
            nonlocal position
            durable.overwrite(self.path, begin + position, data)
            digest.update(data)
            position += len(data)

        key = self.key
        for linear in linears:
            for part, tensor in parts_of(
                linear,
                self._weights,
                quantization=self._quantization,
                dtype=DTYPE_NAMES[key.dtype],
                made_on=key.made_on,
            ):
                put(bytes(-position % PIECE_ALIGNMENT))
                data = tensor_bytes(tensor)
                kind, shape = stored_name(tensor.dtype), tuple(tensor.shape)
                pieces.append(Piece(linear.name, part, kind, shape, position, len(data)))
                put(data)
        put(bytes(-position % LAYER_ALIGNMENT))
        return SlabLayer(begin, position, digest.hexdigest(), tuple(pieces))


def _finished(folder: Path, key: SlabKey, layers: Sequence[LayerShape]) -> Index:
    """The finished layers that the file holds. Raises EnvironmentProblem for a slab of another base."""
    empty = Index(key, (), ())
    index = read_index(folder)
    if index is None:
        return empty
    if index.key != key or not _begins_as(index, layers):
        raise EnvironmentProblem(
            "this slab is of another base, or of another version of charkha",
            where=str(folder),
            remedy="remove this folder; it is made anew from the base",
        )
    size = (folder / DATA).stat().st_size if (folder / DATA).exists() else 0
    whole = [
        all(unit.end <= size for unit in (layer, *experts))
        for layer, experts in zip(index.layers, index.experts, strict=True)
    ]
    count = whole.index(False) if False in whole else len(whole)
    if count < len(whole):
        logger.warning("%s ends before layer %d; it and those after it are made anew", folder / DATA, count)
    return replace(index, layers=index.layers[:count], experts=index.experts[:count])


def _begins_as(index: Index, layers: Sequence[LayerShape]) -> bool:
    if len(index.layers) > len(layers):
        return False
    return all(
        names_of((layer, *experts)) == [[linear.name for linear in unit] for unit in shape.units]
        for layer, experts, shape in zip(index.layers, index.experts, layers, strict=False)
    )


def _repaired(index: Index, layers: Sequence[LayerShape], writer: _Writer) -> Index:
    """The same with every unit written again, in its place, that was found damaged."""
    for number, (layer, experts) in enumerate(zip(index.layers, index.experts, strict=True)):
        for unit, linears in zip((layer, *experts), layers[number].units, strict=True):
            if unit.sha256 != DAMAGED:
                continue
            logger.warning("%s was damaged; it is made anew", linears[0].name)
            index = index.with_unit(writer.write(linears, unit.offset))
            durable.sync_file(writer.path)
            write_index(writer.path.parent, index)
    return index


def _require_room(folder: Path, layers: Sequence[LayerShape], key: SlabKey) -> None:
    """`layers` are those still to be written. Raises DoesNotFit."""
    count = sum(linear.rows * linear.columns for layer in layers for unit in layer.units for linear in unit)
    needed = int(count * bytes_per_weight(key.quantization, key.dtype))
    free = durable.free_bytes(folder)
    if needed > free:
        raise DoesNotFit(
            f"the streamed base needs {format_bytes(needed)} of disk, of which {format_bytes(free)} are free",
            where=str(folder),
            remedy=_ROOM,
        )
