"""Tokenized rows on disk: flat arrays in a safetensors file that is named by the hash of its content.

Arrays: input_ids int32 [tokens], trained uint8 [tokens], offsets int64 [rows + 1], line int32 [rows] (0: unknown).
The hash is of the file's bytes, so a shard that was cut or altered is noticed before a row of it is trained.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from charkha.data.encoded import EncodedRow
from charkha.errors import DataError, RunDamaged
from charkha.store.durable import Bytes, name_durably, sha256_of_file, write_stream_durably

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PIECE = 1 << 20
_NAME = re.compile(r".+-([0-9a-f]{16})\.safetensors")


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Rows end to end: ids int32 [tokens], trained uint8 [tokens], lengths int64 [rows], lines int32 [rows]."""

    ids: NDArray[np.int32]
    trained: NDArray[np.uint8]
    lengths: NDArray[np.int64]
    lines: NDArray[np.int32]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.lengths)


@dataclass(frozen=True, eq=False)
class StoredRows:
    """Rows of a shard that stay on the disk: ids and trained are mapped anew when asked for, and let go after use.

    Pages of a mapping that is kept count as memory of the process, all of them in the end.
    """

    path: Path
    lengths: NDArray[np.int64]
    lines: NDArray[np.int32]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.lengths)

    @property
    def ids(self) -> NDArray[np.int32]:
        """Token ids, int32 [tokens]."""
        return _mapped(self.path)["input_ids"]

    @property
    def trained(self) -> NDArray[np.uint8]:
        """Which tokens are learned, uint8 [tokens]."""
        return _mapped(self.path)["trained"]


def token_rows(encoded: Sequence[EncodedRow]) -> TokenRows:
    """The rows end to end, in their order."""
    ids = [row.input_ids for row in encoded]
    trained = [row.trained for row in encoded]
    return TokenRows(
        np.concatenate(ids).astype(np.int32, copy=False) if ids else np.empty(0, np.int32),
        np.concatenate(trained).astype(np.uint8) if trained else np.empty(0, np.uint8),
        np.asarray([len(row) for row in encoded], dtype=np.int64),
        np.asarray([row.line or 0 for row in encoded], dtype=np.int32),
    )


def write_shard(
    folder: Path,
    name_prefix: str,
    encoded: Sequence[EncodedRow],
) -> Path:
    """Writes the rows as one shard and returns its path; the same rows give the same name and bytes.

    Raises DataError for no rows.
    """
    return write_token_rows(folder, name_prefix, [token_rows(encoded)])


def write_token_rows(
    folder: Path,
    name_prefix: str,
    parts: Sequence[TokenRows | StoredRows],
) -> Path:
    """Writes all parts as one shard, one after the other, so that little of those on the disk is in memory at once.

    Raises DataError where there is no row.
    """
    if not any(part.rows for part in parts):
        raise DataError("there are no rows to write", where=str(folder), remedy="check data.train and data.overlong")
    folder.mkdir(parents=True, exist_ok=True)
    unnamed = folder / f".{name_prefix}.partial"
    digest = write_stream_durably(unnamed, _bytes_of(parts))
    path = folder / f"{name_prefix}-{digest[:16]}.safetensors"
    name_durably(unnamed, path)
    return path


def _bytes_of(parts: Sequence[TokenRows | StoredRows]) -> Iterator[Bytes]:
    """A safetensors file as the library writes it: the header, then the arrays, the widest type first."""
    rows, tokens = sum(part.rows for part in parts), sum(int(part.lengths.sum()) for part in parts)
    sizes = (
        ("offsets", "I64", rows + 1, 8),
        ("input_ids", "I32", tokens, 4),
        ("line", "I32", rows, 4),
        ("trained", "U8", tokens, 1),
    )
    header: dict[str, dict[str, object]] = {}
    place = 0
    for name, dtype, count, width in sizes:
        header[name] = {"dtype": dtype, "shape": [count], "data_offsets": [place, place + count * width]}
        place += count * width
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    yield np.zeros(1, dtype="<i8").tobytes()
    reached = 0
    for part in parts:
        yield (np.cumsum(part.lengths) + reached).astype("<i8").tobytes()
        reached += int(part.lengths.sum())
    for part in parts:
        yield from _pieces(part.ids, "<i4")
    for part in parts:
        yield part.lines.astype("<i4").tobytes()
    for part in parts:
        yield from _pieces(part.trained, "u1")


def _pieces(values: NDArray[np.generic], dtype: str) -> Iterator[bytes]:
    for start in range(0, len(values), _PIECE):
        yield values[start : start + _PIECE].astype(dtype, copy=False).tobytes()


@dataclass(frozen=True, eq=False)
class Shard:
    """The rows of one shard. The flat arrays may be mapped from the file: what is looked at is read."""

    path: Path
    flat_ids: NDArray[np.int32]
    flat_trained: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    lines: NDArray[np.int32]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.lines)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row, int64 [rows]."""
        return np.diff(self.offsets)

    @property
    def trained_tokens(self) -> int:
        """Tokens that are learned, over all rows."""
        return int(self.flat_trained.sum())

    @property
    def content_hash(self) -> str:
        """The sixteen hex digits in the file's name: the fingerprint of what is trained."""
        return hash_in_name(self.path)

    def input_ids(self, row: int) -> NDArray[np.int32]:
        """Token ids of a row, int32 [tokens]; a view, not a copy."""
        return self.flat_ids[self.offsets[row] : self.offsets[row + 1]]

    def trained(self, row: int) -> NDArray[np.bool_]:
        """Which tokens of a row are learned, bool [tokens]; a view, not a copy."""
        return self.flat_trained[self.offsets[row] : self.offsets[row + 1]]


def hash_in_name(path: Path) -> str:
    """The content hash that a shard's name carries. Raises RunDamaged for a name without one."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise RunDamaged("the shard's name holds no hash", where=str(path), remedy=_PREPARE_AGAIN)
    return match[1]


_PREPARE_AGAIN = "remove the file; the same command prepares the data again"


def open_shard(path: Path) -> Shard:
    """The shard, mapped into memory, after its bytes were checked against the hash in its name.

    Raises RunDamaged where they differ.
    """
    expected = hash_in_name(path)
    try:
        found = sha256_of_file(path)[:16]
    except FileNotFoundError as error:
        raise RunDamaged("the shard is missing", where=str(path), remedy="prepare the data again") from error
    if found != expected:
        message = f"the shard does not match the hash in its name (content {found})"
        raise RunDamaged(message, where=str(path), remedy=_PREPARE_AGAIN)
    try:
        arrays = _mapped(path)
        return Shard(
            path,
            arrays["input_ids"],
            arrays["trained"].view(np.bool_),
            np.asarray(arrays["offsets"]),
            np.asarray(arrays["line"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise RunDamaged(f"this is no shard: {error}", where=str(path), remedy=_PREPARE_AGAIN) from error


def rows_of_shard(path: Path) -> StoredRows:
    """The rows of a shard as they are merged into another. Raises RunDamaged where it does not match its hash."""
    shard = open_shard(path)
    return StoredRows(path, shard.lengths, np.array(shard.lines))


_DTYPES = {"I64": "<i8", "I32": "<i4", "U8": "u1"}


def _mapped(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of a safetensors file, read from the disk when they are looked at. Raises ValueError and its like."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    data = np.memmap(path, dtype=np.uint8, mode="r", offset=0)[8 + length :]
    arrays = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        arrays[name] = data[start:stop].view(_DTYPES[entry["dtype"]])
    return arrays
