"""Safetensors files tensor by tensor: headers as JSON, bytes by position, so that memory does not follow file size.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the bytes
(https://github.com/huggingface/safetensors#format). The package's own writer wants all tensors of a file at once.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from charkha.errors import EnvironmentProblem

if TYPE_CHECKING:
    import torch

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
BYTES_OF = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
            "F8_E4M3": 1, "F8_E5M2": 1}  # fmt: skip
_SAMPLE_BYTES = 1 << 20
_LARGEST_HEADER_BYTES = 100_000_000  # the limit of the reference implementation


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of one file: where its bytes are."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def byte_count(self) -> int:
        return self.end - self.start


def tensors_of_folder(folder: Path) -> dict[str, list[StoredTensor]]:
    """File name -> its tensors in file order, for a model of one file or of many shards.

    Raises EnvironmentProblem for missing or broken files, and for an index that names files elsewhere.
    """
    if (folder / WHOLE).is_file():  # as transformers does: one whole file goes before an index
        names = [WHOLE]
    elif (folder / INDEX).exists():
        names = _names_in_index(folder / INDEX)
    else:
        names = sorted(path.name for path in folder.glob("model*.safetensors"))
    if not names:
        raise EnvironmentProblem("has no model*.safetensors", where=str(folder))
    return {name: tensors_of_file(folder / name) for name in names}


def _names_in_index(index: Path) -> list[str]:
    try:
        names = {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EnvironmentProblem(f"is not a readable index of weight files: {error}", where=str(index)) from None
    outside = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
    if outside:  # a file is written under the same name by the merge: it must stay inside the folder
        raise EnvironmentProblem(f"names {outside[0]!r}, which is no safetensors file beside it", where=str(index))
    return sorted(names)


def tensors_of_file(path: Path) -> list[StoredTensor]:
    """The tensors of one safetensors file, in the order of their bytes. Raises EnvironmentProblem if it is broken."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            if header_bytes > min(_LARGEST_HEADER_BYTES, size):
                raise ValueError("the header is longer than the file")
            header = json.loads(file.read(header_bytes))
        begin = 8 + header_bytes
        header.pop("__metadata__", None)
        tensors = [
            StoredTensor(
                name, entry["dtype"], tuple(entry["shape"]), path,
                begin + entry["data_offsets"][0], begin + entry["data_offsets"][1],
            )
            for name, entry in header.items()
        ]  # fmt: skip
        unknown = sorted({tensor.dtype for tensor in tensors} - set(BYTES_OF))
        if unknown:
            raise ValueError(f"type {unknown[0]} is not known")
        for tensor in tensors:
            if tensor.start < begin or tensor.byte_count != output_bytes(tensor.dtype, tensor.shape):
                raise ValueError(f"{tensor.name} has another size than its shape says")
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error) as error:
        raise EnvironmentProblem(f"is not a readable safetensors file: {error}", where=str(path)) from None
    cut = [tensor.name for tensor in tensors if tensor.end > size]
    if cut:
        raise EnvironmentProblem(f"ends before the bytes of {cut[0]}: the file was cut short", where=str(path))
    return sorted(tensors, key=lambda tensor: tensor.start)


def base_fingerprint(folder: Path) -> str:
    """SHA-256 over config.json and, of each weight file, its size, header and first and last MiB.

    Not covered: a change in the middle of a file that leaves size and ends alike (hashing all of a 140 GB base at every
    start would take minutes).
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for name in sorted(tensors_of_folder(folder)):
        path = folder / name
        size = path.stat().st_size
        digest.update(f"{name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLE_BYTES))
            file.seek(max(0, size - _SAMPLE_BYTES))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def read_rows(tensor: StoredTensor, first: int, count: int) -> torch.Tensor:
    """Rows `first` to `first + count` along the first dimension, as a tensor that owns its memory."""
    import torch

    row_shape = tensor.shape[1:]
    row_bytes = BYTES_OF[tensor.dtype]
    for extent in row_shape:
        row_bytes *= extent
    buffer = bytearray(read_bytes(tensor, first * row_bytes, count * row_bytes))
    flat = torch.frombuffer(buffer, dtype=torch_dtype_of(tensor.dtype))
    return flat.reshape(count, *row_shape)


def read_bytes(tensor: StoredTensor, offset: int, count: int) -> bytes:
    """`count` bytes of the tensor from `offset`; plain reads, since mapped pages count as resident memory."""
    descriptor = os.open(tensor.file, os.O_RDONLY)
    try:
        pieces = []
        position = tensor.start + offset
        while count > 0:
            piece = os.pread(descriptor, count, position)
            if not piece:
                raise EnvironmentProblem("ended while it was read", where=str(tensor.file))
            pieces.append(piece)
            position += len(piece)
            count -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)
    finally:
        os.close(descriptor)


def torch_dtype_of(name: str) -> torch.dtype:
    """`BF16` -> torch.bfloat16."""
    return _torch_dtypes()[name]


def stored_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> `BF16`."""
    return next(name for name, known in _torch_dtypes().items() if known == dtype)


def _torch_dtypes() -> dict[str, torch.dtype]:
    import torch

    return {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
        "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    }  # fmt: skip


def output_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of this type and shape."""
    return BYTES_OF[dtype] * math.prod(shape)


def header_of(tensors: list[tuple[str, str, tuple[int, ...]]]) -> tuple[bytes, int]:
    """The beginning of a file of these tensors (name, dtype, shape), and how many bytes of theirs follow it."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape in tensors:
        size = output_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the reference writer aligns the bytes to 8
    return struct.pack("<Q", len(text)) + text, offset


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor in host memory, not copied."""
    import torch

    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


class TensorFileWriter:
    """Writes one safetensors file whose names, dtypes and shapes are known, the bytes in the same order as declared."""

    def __init__(self, path: Path, tensors: list[tuple[str, str, tuple[int, ...]]]) -> None:
        self._path = path
        head, self._expected = header_of(tensors)
        self._written = 0
        self._file = path.open("wb")
        self._file.write(head)

    def write(self, data: bytes | memoryview) -> None:
        """Appends bytes."""
        self._file.write(data)
        self._written += len(data)

    def write_tensor(self, tensor: torch.Tensor) -> None:
        """Appends a tensor's bytes (row-major)."""
        self.write(tensor_bytes(tensor.contiguous()))

    def __enter__(self) -> TensorFileWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if kind is None and self._written != self._expected:
            raise AssertionError(f"{self._path}: {self._written} bytes written, {self._expected} declared")


def row_blocks(tensor: StoredTensor, block_bytes: int) -> Iterator[tuple[int, int]]:
    """(first row, rows) so that a block has about `block_bytes`; a tensor without dimensions is one block."""
    if not tensor.shape or tensor.byte_count == 0:
        return
    rows = tensor.shape[0]
    step = max(1, block_bytes // max(1, tensor.byte_count // rows))
    for first in range(0, rows, step):
        yield first, min(step, rows - first)
