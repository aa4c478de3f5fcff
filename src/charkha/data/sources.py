"""The bytes of one ordinary file, unpacked on the way where it is gzip or zstd, and the files of a folder.

Limits keep a file made to hurt from filling the machine: only ordinary files (and links to them) are opened, a line has
an end, and what a packed file unpacks to is in proportion to its size.
"""

from __future__ import annotations

import os
import stat
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from charkha.errors import DataError

CHUNK_BYTES = 1 << 20
LONGEST_LINE_BYTES = 64 << 20
LARGEST_WHOLE_BYTES = 256 << 20
UNPACKED_FREELY_BYTES = 256 << 20
LARGEST_RATIO = 200  # text packs 3 to 20 times smaller; what gives more is hardly text
_PACKED = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
_EMPTY = b" \t\r\n\0\xef\xbb\xbf\xff\xfe"


@dataclass(frozen=True)
class Source:
    """An ordinary file. `suffix` is that of its content: `.jsonl` for `rows.jsonl.gz`, whose `packing` is gzip."""

    path: Path
    suffix: str
    packing: str | None
    packed_bytes: int

    def chunks(self) -> Iterator[bytes]:
        """The unpacked content, at most a mebibyte at a time. Raises DataError where it cannot be read or unpacked."""
        try:
            with _opened(self.path, self.packing) as file:
                yield from self._limited(file)
        except (EOFError, zlib.error, OSError) as error:  # gzip.BadGzipFile is an OSError, as is Arrow's
            what = "cannot be read" if self.packing is None else f"is damaged and cannot be unpacked ({self.packing})"
            raise DataError(f"the file {what}: {error}", where=str(self.path), remedy=_COPY_AGAIN) from error

    def _limited(self, file: IO[bytes]) -> Iterator[bytes]:
        limit = max(UNPACKED_FREELY_BYTES, LARGEST_RATIO * self.packed_bytes)
        unpacked = 0
        while chunk := file.read(CHUNK_BYTES):
            unpacked += len(chunk)
            if self.packing is not None and unpacked > limit:
                raise DataError(
                    f"the file unpacks to more than {LARGEST_RATIO} times its size: it is hardly text",
                    where=str(self.path),
                    remedy="unpack it yourself and give the file inside if it is wanted",
                )
            yield chunk

    def whole(self) -> bytes:
        """All of it, for formats that cannot be read in parts. Raises DataError above 256 MiB."""
        parts: list[bytes] = []
        size = 0
        for chunk in self.chunks():
            parts.append(chunk)
            size += len(chunk)
            if size > LARGEST_WHOLE_BYTES:
                raise DataError(
                    f"one value fills more than {LARGEST_WHOLE_BYTES >> 20} MiB of the file",
                    where=str(self.path),
                    remedy="write one row a line as .jsonl",
                )
        return b"".join(parts)

    def is_empty(self) -> bool:
        """Whether there is nothing but white space and byte order marks; reads as far as the first other byte."""
        return not any(chunk.strip(_EMPTY) for chunk in self.chunks())


_COPY_AGAIN = "copy or export the file again"


def _opened(path: Path, packing: str | None) -> Any:
    if packing == "gzip":
        import gzip

        return gzip.open(path, "rb")
    if packing == "zstd":
        import pyarrow

        return pyarrow.CompressedInputStream(pyarrow.OSFile(str(path), "rb"), "zstd")
    return path.open("rb")


def open_source(path: Path) -> Source:
    """The file, looked at but not read. Raises DataError when it is missing or no ordinary file."""
    _require_ordinary(path)
    suffix = path.suffix.lower()
    packing = _PACKED.get(suffix)
    inner = path.with_suffix("").suffix.lower() if packing else suffix
    return Source(path, inner, packing, path.stat().st_size)


def _require_ordinary(path: Path) -> None:
    """Without opening it: to open a pipe would wait for its writer, and a device may never end."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if path.is_symlink():
            raise DataError(
                f"the link leads nowhere ({os.readlink(path)}): {error.strerror}",
                where=str(path),
                remedy="name the file itself",
            ) from error
        message = "the file does not exist" if isinstance(error, FileNotFoundError) else f"{error.strerror}"
        remedy = "check the path; it is relative to where you run"
        raise DataError(message, where=str(path), remedy=remedy) from error
    except ValueError as error:  # a NUL in the name
        raise DataError(f"this is no path: {error}", where=repr(str(path))) from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else _kind_of(mode)
        raise DataError(
            f"this is not an ordinary file but {kind}", where=str(path), remedy="name the data files themselves"
        )


def _kind_of(mode: int) -> str:
    if stat.S_ISFIFO(mode):
        return "a pipe (FIFO)"
    return "a socket" if stat.S_ISSOCK(mode) else "a device"


def empty_file(path: Path) -> DataError:
    """The error for a file without a single row."""
    return DataError(
        "the file is empty: it has no rows", where=str(path), remedy="give a file that holds training rows"
    )


def files_of(paths: Sequence[Path], suffixes: Sequence[str]) -> list[Path]:
    """The paths, each folder replaced by the data files below it in the order of their names.

    Hidden files and folders are passed over; links to folders are not followed, so a loop of links has an end.
    Raises DataError for a folder without data files.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(_files_below(path, suffixes))
        if not inside:
            raise DataError(
                "the folder holds no data files", where=str(path), remedy=f"give files named {', '.join(suffixes)}"
            )
        found.extend(inside)
    return found


def _files_below(folder: Path, suffixes: Sequence[str]) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(parent) / name
            suffix = path.suffix.lower()
            inner = path.with_suffix("").suffix.lower() if suffix in _PACKED else suffix
            if not name.startswith(".") and inner in suffixes and path.is_file():
                yield path
