"""Every write that must survive a power cut, over one small set of disk operations that tests record, cut or fail.

A file is durable when its bytes and the folder entry that names it are both on the disk; `os.replace` alone is
atomic but not durable. A failed fsync means "not saved": the kernel may have dropped the bytes, so the file is given
up, never synced again. Nothing here knows what the bytes mean.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_CHUNK_BYTES = 1 << 20
Bytes = bytes | bytearray | memoryview


class Disk:
    """The operations on the real disk. Each is one step that a power cut may come before or after."""

    def create(self, path: Path) -> BinaryIO:
        """An empty file, open for writing; one that is there is emptied."""
        return path.open("wb", buffering=0)

    def write(self, file: BinaryIO, data: Bytes) -> None:
        """All of `data` at the file's end (the system may take it in parts)."""
        view = memoryview(data)
        while len(view):
            view = view[file.write(view) :]

    def sync(self, file: BinaryIO) -> None:
        """The file's bytes to the disk (blocks until the device says so)."""
        os.fsync(file.fileno())

    def sync_folder(self, folder: Path) -> None:
        """The folder's entries (new names, renames, deletions) to the disk."""
        if os.name == "nt":
            return  # Windows opens no folder for fsync; NTFS journals its entries
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """A new name; a file that has it already is replaced."""
        os.replace(source, target)

    def cut(self, path: Path, size: int) -> None:
        """Drops the file's bytes beyond `size`."""
        os.truncate(path, size)

    def unlink(self, path: Path) -> None:
        """Removes a file."""
        path.unlink()

    def make_folder(self, path: Path) -> None:
        """One new folder."""
        path.mkdir()

    def remove_empty_folder(self, path: Path) -> None:
        """Removes a folder that holds nothing."""
        path.rmdir()

    def free_bytes(self, path: Path) -> int:
        """Bytes that this user may still write on the disk of `path`."""
        return shutil.disk_usage(path).free


_disk = Disk()


@contextmanager
def use_disk(disk: Disk) -> Iterator[None]:
    """Puts another disk under every operation for a while; for tests."""
    global _disk
    before, _disk = _disk, disk
    try:
        yield
    finally:
        _disk = before


def write_file(path: Path, parts: Iterable[Bytes]) -> tuple[int, str]:
    """Writes a new file of `parts`, its bytes on the disk when this returns; (bytes, SHA-256 in hex) of what it holds.

    The name is durable only after `sync_folder` of its folder.
    """
    digest, size = hashlib.sha256(), 0
    file = _disk.create(path)
    try:
        for part in parts:
            _disk.write(file, part)
            digest.update(part)
            size += memoryview(part).nbytes
        _disk.sync(file)
    finally:
        file.close()
    return size, digest.hexdigest()


def write_durably(path: Path, data: Bytes) -> None:
    """Replaces `path` by `data`: after a cut there is the old file or the new one, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    write_file(partial, [data])
    _disk.rename(partial, path)
    _disk.sync_folder(path.parent)


def write_stream_durably(path: Path, parts: Iterable[Bytes]) -> str:
    """Writes a new file of `parts` and returns its SHA-256; give it its final name with `name_durably`."""
    return write_file(path, parts)[1]


def name_durably(source: Path, target: Path) -> None:
    """Gives a file its final name, on the disk when this returns; one of that name is replaced."""
    _disk.rename(source, target)
    _disk.sync_folder(target.parent)


def append(path: Path, data: Bytes) -> None:
    """Adds `data` at the end of a file, given to the system but not yet to the disk: see `sync_file`."""
    with path.open("ab", buffering=0) as file:
        _disk.write(file, data)


def overwrite(path: Path, offset: int, data: Bytes) -> None:
    """Puts `data` in the place of the file's bytes from `offset` on, given to the system as `append` does."""
    with path.open("r+b", buffering=0) as file:
        file.seek(offset)
        _disk.write(file, data)


def cut_file(path: Path, size: int) -> None:
    """Drops what stands in a file beyond its first `size` bytes; an empty file where there was none."""
    if not path.exists():
        write_file(path, [])
        _disk.sync_folder(path.parent)
    if path.stat().st_size > size:
        _disk.cut(path, size)
        sync_file(path)


def sync_file(path: Path) -> None:
    """Flushes the file's bytes to the disk."""
    with path.open("rb") as file:
        _disk.sync(file)


def sync_folder(folder: Path) -> None:
    """Flushes the folder's entries to the disk."""
    _disk.sync_folder(folder)


def sync_tree(folder: Path) -> None:
    """Flushes every file and folder below `folder`, and `folder` itself: what other writers made."""
    for parent, _folders, files in os.walk(folder):
        for name in files:
            sync_file(Path(parent, name))
        _disk.sync_folder(Path(parent))


def make_folder(folder: Path) -> None:
    """The folder and those above it, each new name on the disk."""
    missing = [folder, *folder.parents]
    for path in reversed([path for path in missing if not path.exists()]):
        with suppress(FileExistsError):  # another process was quicker
            _disk.make_folder(path)
        _disk.sync_folder(path.parent)


def rename_durably(source: Path, target: Path) -> None:
    """Gives a file or folder its final name. Raises FileExistsError when `target` exists: nothing is overwritten."""
    if target.exists():
        raise FileExistsError(f"{target} exists")
    _disk.rename(source, target)
    _disk.sync_folder(target.parent)
    if source.parent != target.parent:
        _disk.sync_folder(source.parent)


def remove_folder(folder: Path) -> None:
    """Removes a folder in two steps, so that a cut never leaves half a folder under its proper name."""
    doomed = removed_name(folder)
    remove_tree(doomed)
    _disk.rename(folder, doomed)
    _disk.sync_folder(folder.parent)
    remove_tree(doomed)


def removed_name(folder: Path) -> Path:
    """What `remove_folder` calls a folder while it goes; whatever has such a name is garbage."""
    return folder.with_name(f".{folder.name}.removed")


def remove_tree(folder: Path) -> None:
    """Removes a folder that nobody will miss, whatever it holds; nothing when it is not there."""
    for parent, folders, files in os.walk(folder, topdown=False):
        for name in files:
            _disk.unlink(Path(parent, name))
        for name in folders:
            inner = Path(parent, name)
            if inner.is_symlink():
                _disk.unlink(inner)
            else:
                _disk.remove_empty_folder(inner)
    if folder.is_dir():
        _disk.remove_empty_folder(folder)


def remove_file(path: Path) -> None:
    """Removes a file; nothing when it is not there."""
    with suppress(FileNotFoundError):
        _disk.unlink(path)


def sha256_of_file(path: Path) -> str:
    """Hex digest of the file's bytes, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write on the disk of `path` (which need not exist yet)."""
    while not path.exists():
        path = path.parent
    return _disk.free_bytes(path)


def reserve(path: Path, size: int) -> bool:
    """Makes `path` a file of `size` bytes whose room on the disk is taken; False where the system cannot do that.

    Raises OSError (no space) when there is not enough room; nothing is left behind then.
    """
    if not hasattr(os, "posix_fallocate"):
        return False
    with path.open("wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, max(size, 1))
        except OSError:
            path.unlink()
            raise
    return True
