"""Disks for tests: one that records every operation with its data, one that fails, and one on which the process dies.

They go under the real code by `durable.use_disk`. What they do, they do on the real disk.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from charkha.store import durable


@dataclass(frozen=True)
class Operation:
    """One operation that was done, or refused (`error` is its errno then)."""

    kind: str  # the name of the method of Disk
    path: Path
    target: Path | None = None  # of a rename
    offset: int = 0  # of a write
    data: bytes = b""
    error: int | None = None


class RecordingDisk(durable.Disk):
    """Does every operation and keeps it in `operations`, in order."""

    def __init__(self) -> None:
        self.operations: list[Operation] = []

    def before(self, operation: Operation, file: BinaryIO | None = None) -> None:
        """Called before each operation; what it raises is what the caller of the disk sees."""

    def _done(self, operation: Operation) -> None:
        self.operations.append(operation)

    def create(self, path: Path) -> BinaryIO:
        operation = Operation("create", path)
        self.before(operation)
        file = super().create(path)
        self._done(operation)
        return file

    def write(self, file: BinaryIO, data: durable.Bytes) -> None:
        operation = Operation("write", Path(file.name), offset=file.tell(), data=bytes(data))
        self.before(operation, file)
        super().write(file, data)
        self._done(operation)

    def sync(self, file: BinaryIO) -> None:
        operation = Operation("sync", Path(file.name))
        self.before(operation, file)
        super().sync(file)
        self._done(operation)

    def sync_folder(self, folder: Path) -> None:
        operation = Operation("sync_folder", folder)
        self.before(operation)
        super().sync_folder(folder)
        self._done(operation)

    def rename(self, source: Path, target: Path) -> None:
        operation = Operation("rename", source, target)
        self.before(operation)
        super().rename(source, target)
        self._done(operation)

    def unlink(self, path: Path) -> None:
        operation = Operation("unlink", path)
        self.before(operation)
        super().unlink(path)
        self._done(operation)

    def make_folder(self, path: Path) -> None:
        operation = Operation("make_folder", path)
        self.before(operation)
        super().make_folder(path)
        self._done(operation)

    def remove_empty_folder(self, path: Path) -> None:
        operation = Operation("remove_empty_folder", path)
        self.before(operation)
        super().remove_empty_folder(path)
        self._done(operation)


class FailingDisk(RecordingDisk):
    """Refuses the `nth` operation (from 1), or the nth of one `kind`, with `code`; `from_then_on`, all after it, too.

    A refused write takes half its data first when `in_part` is set, as a disk that runs full does.
    """

    def __init__(
        self, code: int, nth: int, *, kind: str | None = None, from_then_on: bool = False, in_part: bool = False
    ) -> None:
        super().__init__()
        self._code, self._nth, self._kind = code, nth, kind
        self._from_then_on, self._in_part = from_then_on, in_part
        self._seen = 0

    @property
    def has_failed(self) -> bool:
        return any(operation.error is not None for operation in self.operations)

    def before(self, operation: Operation, file: BinaryIO | None = None) -> None:
        if self._kind not in (None, operation.kind):
            return
        self._seen += 1
        if self._seen < self._nth or (self._seen > self._nth and not self._from_then_on):
            return
        taken = operation.data[: len(operation.data) // 2] if self._in_part else b""
        if file is not None and taken:
            file.write(taken)
        refused = Operation(operation.kind, operation.path, operation.target, operation.offset, taken, self._code)
        self.operations.append(refused)
        raise OSError(self._code, os.strerror(self._code), str(operation.path))


class Cut(BaseException):
    """The process is dead: nothing may catch this but the test."""


class CuttingDisk(RecordingDisk):
    """The process dies just before the `nth` operation (from 1) and does nothing after it."""

    def __init__(self, nth: int) -> None:
        super().__init__()
        self._left = nth - 1

    def before(self, operation: Operation, file: BinaryIO | None = None) -> None:
        if self._left == 0:
            raise Cut(f"before {operation.kind} {operation.path.name}")
        self._left -= 1


class QuickDisk(durable.Disk):
    """Syncs nothing: for folders that are thrown away, where only the result counts."""

    def sync(self, file: BinaryIO) -> None:
        """Nothing."""

    def sync_folder(self, folder: Path) -> None:
        """Nothing."""
