"""Tokenized rows on disk: flat arrays in a safetensors file that is named by the hash of its content.

Arrays: input_ids int32 [tokens], trained uint8 [tokens], offsets int64 [rows + 1], line int32 [rows] (0: unknown).
The hash is of the file's bytes, so a shard that was cut or altered is noticed before a row of it is trained.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from charkha.data.encoded import EncodedRow
from charkha.errors import DataError, RunDamaged
from charkha.store.durable import write_durably

if TYPE_CHECKING:
    from numpy.typing import NDArray

_NAME = re.compile(r".+-([0-9a-f]{16})\.safetensors")


def write_shard(
    folder: Path,
    name_prefix: str,
    encoded: Sequence[EncodedRow],
    *,
    write: Callable[[Path, bytes], None] = write_durably,
) -> Path:
    """Writes the rows as one shard and returns its path; the same rows give the same name and bytes.

    `write` is how a file reaches the disk: the run folder passes its own. Raises DataError for no rows.
    """
    from safetensors.numpy import save

    if not encoded:
        raise DataError("there are no rows to write", where=str(folder), remedy="check data.train and data.overlong")
    data = save(_arrays(encoded))
    path = folder / f"{name_prefix}-{hashlib.sha256(data).hexdigest()[:16]}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    write(path, data)
    return path


def _arrays(encoded: Sequence[EncodedRow]) -> dict[str, NDArray[np.generic]]:
    offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in encoded], out=offsets[1:])
    return {
        "input_ids": np.concatenate([row.input_ids for row in encoded]).astype(np.int32),
        "trained": np.concatenate([row.trained for row in encoded]).astype(np.uint8),
        "offsets": offsets,
        "line": np.asarray([row.line or 0 for row in encoded], dtype=np.int32),
    }


@dataclass(frozen=True, eq=False)
class Shard:
    """The rows of one shard, in memory."""

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
    """The shard, after its bytes were checked against the hash in its name. Raises RunDamaged where they differ."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    expected = hash_in_name(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise RunDamaged("the shard is missing", where=str(path), remedy="prepare the data again") from error
    found = hashlib.sha256(data).hexdigest()[:16]
    if found != expected:
        message = f"the shard does not match the hash in its name (content {found})"
        raise RunDamaged(message, where=str(path), remedy=_PREPARE_AGAIN)
    try:
        arrays = load(data)
        trained = arrays["trained"].view(np.bool_)
        return Shard(path, arrays["input_ids"], trained, arrays["offsets"], arrays["line"])
    except (SafetensorError, KeyError) as error:
        raise RunDamaged(f"this is no shard: {error}", where=str(path), remedy=_PREPARE_AGAIN) from error
