"""Every write that must survive a power cut: fsync of files and folders, and renames, in one place.

A file is durable when its bytes and the folder entry that names it are both on the disk; `os.replace` alone is
atomic but not durable. Nothing here knows what the bytes mean.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

_CHUNK_BYTES = 1 << 20


def sync_file(path: Path) -> None:
    """Flushes the file's bytes to the disk (blocks until the device says so)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Flushes the folder's entries (new names, renames, deletions) to the disk."""
    if os.name == "nt":
        return  # Windows opens no folder for fsync; NTFS journals its entries
    sync_file(folder)


def write_durably(path: Path, data: bytes) -> None:
    """Replaces `path` by `data`: after a cut there is the old file or the new one, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)


def sync_tree(folder: Path) -> None:
    """Flushes every file and folder below `folder`, and `folder` itself."""
    for parent, _folders, files in os.walk(folder):
        for name in files:
            sync_file(Path(parent, name))
        sync_folder(Path(parent))


def rename_durably(source: Path, target: Path) -> None:
    """Gives a folder its final name. Raises FileExistsError when `target` exists: nothing is overwritten."""
    if target.exists():
        raise FileExistsError(f"{target} exists")
    os.rename(source, target)
    sync_folder(target.parent)
    if source.parent != target.parent:
        sync_folder(source.parent)


def remove_folder(folder: Path) -> None:
    """Removes a folder in two steps, so that a cut never leaves half a folder under its proper name."""
    doomed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    sync_folder(folder.parent)
    shutil.rmtree(doomed)


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
    return shutil.disk_usage(path).free
