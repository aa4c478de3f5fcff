"""The frozen base as one file per (base, quantization, dtype, device that quantized): each layer one piece of bytes.

A slab folder holds `layers.slab` and `index.json`. A unit of it is what a decoder layer streams, or one of its experts;
it begins at a multiple of 4096 bytes and is as long as a multiple of it, which direct reads from a disk need; a piece
of it (packed weight, its constants) begins at a multiple of 512. index.json names every finished unit with its SHA-256,
and holds one of itself: a piece read from another place would be another weight, and no unit's hash would tell.

A unit is hashed when a run first reads it, beside the computing, and not at the start: of a 70B that would take
minutes. One that does not match ends the run before anything is computed with it, and is marked in index.json; the next
start makes that unit again. `slab_making.py` writes slabs.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from charkha.errors import EnvironmentProblem
from charkha.store import durable

logger = logging.getLogger(__name__)

LAYER_ALIGNMENT = 4096
PIECE_ALIGNMENT = 512
DATA, INDEX = "layers.slab", "index.json"
FORMAT = 2
DAMAGED = ""  # in the place of the hash of a unit that is to be made again
_LOOK_S = 0.2  # between looks at a slab that another process works on


@dataclass(frozen=True)
class Piece:
    """Bytes of one tensor within its unit. `part` as in `slab_parts.py`."""

    module: str
    part: str
    dtype: str  # as in a safetensors header
    shape: tuple[int, ...]
    offset: int  # from the unit's begin
    byte_count: int


@dataclass(frozen=True)
class SlabLayer:
    """One unit in the file. `byte_count` includes what fills it up to whole blocks."""

    offset: int
    byte_count: int
    sha256: str
    pieces: tuple[Piece, ...]

    @property
    def end(self) -> int:
        return self.offset + self.byte_count


@dataclass(frozen=True)
class SlabKey:
    """What a slab is of; two slabs with the same key hold the same numbers."""

    fingerprint: str
    quantization: str  # none | nf4 | fp4 | int8
    dtype: str
    made_on: str  # cpu | cuda

    @property
    def folder_name(self) -> str:
        digest = hashlib.sha256(json.dumps([FORMAT, asdict(self)], sort_keys=True).encode()).hexdigest()
        return f"{self.quantization}-{self.dtype}-{digest[:16]}"


@dataclass(frozen=True)
class Slab:
    """A finished slab. Units have numbers: first those of the decoder layers, then every layer's experts in turn."""

    path: Path
    layers: tuple[SlabLayer, ...]
    experts: tuple[tuple[SlabLayer, ...], ...] = ()  # of each layer; none where the layer is dense

    @cached_property
    def units(self) -> tuple[SlabLayer, ...]:
        return (*self.layers, *(expert for layer in self.experts for expert in layer))

    def expert_units(self, layer: int) -> range:
        """Numbers of the units that are the layer's experts."""
        if not self.experts:
            return range(0)
        first = len(self.layers) + sum(len(experts) for experts in self.experts[:layer])
        return range(first, first + len(self.experts[layer]))

    @property
    def total_bytes(self) -> int:
        return sum(unit.byte_count for unit in self.units)

    @property
    def largest_layer_bytes(self) -> int:
        """Of what moves at once: a dense layer, the rest of one with experts, or an expert."""
        return max(unit.byte_count for unit in self.units)


class SlabDamaged(EnvironmentProblem):
    """Bytes of a slab that are not those that were written. Nothing was computed with them."""

    kind = "slab_damaged"


class SlabReadOnly(EnvironmentProblem):
    """A slab's folder that may not be written to: one that is whole can be used all the same."""


@dataclass(frozen=True)
class Index:
    """What index.json says: finished layers, each with its experts."""

    key: SlabKey
    layers: tuple[SlabLayer, ...]
    experts: tuple[tuple[SlabLayer, ...], ...]

    @property
    def units(self) -> tuple[SlabLayer, ...]:
        return (*self.layers, *(expert for layer in self.experts for expert in layer))

    @property
    def end(self) -> int:
        """Bytes of the file that finished layers take."""
        return max((unit.end for unit in self.units), default=0)

    def with_unit(self, changed: SlabLayer) -> Index:
        """The same with another record for the unit at this place in the file."""

        def new(unit: SlabLayer) -> SlabLayer:
            return changed if unit.offset == changed.offset else unit

        return replace(
            self,
            layers=tuple(map(new, self.layers)),
            experts=tuple(tuple(map(new, layer)) for layer in self.experts),
        )


def read_index(folder: Path) -> Index | None:
    """What index.json says; None, with a warning, where it is damaged or has another format."""
    path = folder / INDEX
    try:
        index = json.loads(path.read_bytes())
        if index["format"] != FORMAT:
            raise ValueError(f"format {index['format']}")
        if index.pop("sha256", None) != _digest(index):
            raise ValueError("it does not match a hash of itself")
        layers = tuple(_unit_of(record["layer"]) for record in index["layers"])
        experts = tuple(tuple(_unit_of(unit) for unit in record["experts"]) for record in index["layers"])
        return Index(SlabKey(**index["key"]), layers, experts)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s cannot be read (%s); the slab is made anew", path, error)
        return None


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def write_index(folder: Path, index: Index) -> None:
    """Replaces index.json, on the disk when this returns."""
    record = {
        "format": FORMAT,
        "key": asdict(index.key),
        "layers": [
            {"layer": asdict(layer), "experts": [asdict(expert) for expert in experts]}
            for layer, experts in zip(index.layers, index.experts, strict=True)
        ],
    }
    durable.write_durably(folder / INDEX, (json.dumps(record | {"sha256": _digest(record)}) + "\n").encode())


def _unit_of(record: dict[str, Any]) -> SlabLayer:
    pieces = tuple(Piece(**{**piece, "shape": tuple(piece["shape"])}) for piece in record["pieces"])
    return SlabLayer(int(record["offset"]), int(record["byte_count"]), str(record["sha256"]), pieces)


def require_undamaged(slab: Slab, number: int, content: memoryview) -> None:
    """Compares a unit's bytes, just read, with their hash. Raises SlabDamaged, the unit then marked for the next start.

    hashlib lets other threads compute meanwhile.
    """
    unit = slab.units[number]
    if hashlib.sha256(content).hexdigest() == unit.sha256:
        return
    modules = modules_of(unit)
    again = "run the same command again: these weights are made again from the base, and the run goes on"
    if not _is_marked(slab.path.parent, unit):
        again = "remove this file's folder, and run the same command again: the run goes on"
    raise SlabDamaged(
        f"the bytes of {modules[0]} and {len(modules) - 1} further weights are not those that were written there "
        f"(byte {unit.offset} and on)",
        where=str(slab.path),
        remedy=f"{again} from its newest checkpoint; when it happens again, test memory and disk",
    )


def _is_marked(folder: Path, unit: SlabLayer) -> bool:
    """Whether the unit could be marked as damaged: a folder may be read-only, or its disk full."""
    try:
        with locked(folder):
            index = read_index(folder)
            if index is not None:
                write_index(folder, index.with_unit(replace(unit, sha256=DAMAGED)))
    except (OSError, SlabReadOnly) as error:
        logger.warning("%s cannot be marked as damaged: %s", folder, error)
        return False
    return True


def modules_of(unit: SlabLayer) -> list[str]:
    """Names of the modules whose weights are in a unit, in their order."""
    return list(dict.fromkeys(piece.module for piece in unit.pieces))


@contextmanager
def locked(folder: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """One process at a time makes or marks a slab; another waits and then finds it. Raises SlabReadOnly.

    `on_wait` is called again and again while another process has it.
    """
    try:
        durable.make_folder(folder)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise SlabReadOnly(
            f"the folder for streamed bases cannot be written: {error.strerror}",
            where=str(folder),
            remedy="set CHARKHA_CACHE to a folder that you may write to",
        ) from error
    try:
        while not _is_taken(descriptor):
            on_wait()
            time.sleep(_LOOK_S)
        yield
    finally:
        os.close(descriptor)


def _is_taken(descriptor: int) -> bool:
    """Whether the lock is ours now."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def names_of(units: Sequence[SlabLayer]) -> list[list[str]]:
    """`modules_of` each."""
    return [modules_of(unit) for unit in units]
