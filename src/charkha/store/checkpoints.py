"""Checkpoints that are complete or absent: staged, synced, hashed, renamed, and verified before they are believed.

A checkpoint is `checkpoints/step-000400/` with MANIFEST.json (step, and size and SHA-256 of every file) written last.
Which one is newest is read from inside the manifests, never from folder names or file times. Bytes, never tensors.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from charkha.errors import DoesNotFit, RunDamaged
from charkha.store import durable
from charkha.units import format_bytes

MANIFEST = "MANIFEST.json"
_FORMAT = 2
_OVERHEAD_BYTES = 256 << 10  # manifest, folders, and the last block of every file


@dataclass(frozen=True)
class NewFile:
    """One file of a checkpoint to be: `parts` makes its bytes, in order, when they are written."""

    name: str
    size: int
    parts: Callable[[], Iterable[durable.Bytes]]


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint whose manifest was read. `verify` tells whether its files still match it."""

    path: Path
    step: int
    files: dict[str, tuple[int, str]]  # relative name -> (bytes, sha256)
    eval_loss: float | None = None  # held-out loss at this step, where it was measured

    @property
    def total_bytes(self) -> int:
        return sum(size for size, _ in self.files.values())


@dataclass(frozen=True)
class Skipped:
    """A folder under checkpoints/ that cannot be used, and why."""

    path: Path
    reason: str


class CheckpointStore:
    """The checkpoints of one run folder. One writer at a time: the holder of the run's lock."""

    def __init__(self, run_folder: Path, *, anchor: Path | None = None) -> None:
        """`anchor` is a file that is there as long as the folder is: without it nothing is written."""
        self._anchor = anchor
        self.folder = run_folder / "checkpoints"
        self.staging = run_folder / "staging"
        self._reserve = run_folder / ".room-for-a-checkpoint"
        self._good: set[Path] = set()  # verified since this store was made

    def clear(self) -> None:
        """Removes what a crash left behind: staged files, half-removed checkpoints, the reserve."""
        durable.remove_tree(self.staging)
        for replaced in self.folder.glob("*.replaced"):  # a cut while a step was saved again
            self._clear_replaced(replaced)
        removed = list(self.folder.glob(".*.removed"))  # a cut between the two steps of a removal
        if removed:
            durable.sync_folder(self.folder)  # or their files might go and their proper names come back
        for doomed in removed:
            durable.remove_tree(doomed)
        durable.remove_file(self._reserve)

    def _clear_replaced(self, replaced: Path) -> None:
        """The older of two checkpoints of one step goes when the newer has its name; else it gets its name back."""
        target = replaced.with_suffix("")
        if not target.exists():
            durable.rename_durably(replaced, target)
        elif self._reads_well(target):
            durable.remove_folder(replaced)  # else both stay: the older one may be the only good one

    def _reads_well(self, folder: Path) -> bool:
        try:
            return self._is_good(read_manifest(folder))
        except RunDamaged:
            return False

    def reserve(self, size: int) -> None:
        """Takes the room of the next checkpoint on the disk, so that nobody else fills it up.

        Raises DoesNotFit when it is not there. Where the system cannot take room, free space is looked at only.
        """
        self._require_run_folder()
        durable.make_folder(self._reserve.parent)
        durable.remove_file(self._reserve)
        self._require_room(size + _OVERHEAD_BYTES)
        try:
            durable.reserve(self._reserve, size + _OVERHEAD_BYTES)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise self._no_room(size) from error
            raise DoesNotFit(
                f"no room for a checkpoint can be taken: {error.strerror}",
                where=str(self.folder),
                remedy="see to this disk and run the same command again; earlier checkpoints are untouched",
            ) from error

    def save(self, step: int, files: Sequence[NewFile], *, eval_loss: float | None = None) -> Checkpoint:
        """Makes `files` the checkpoint of `step`: written and synced, manifest last, rename, fsync of the parent.

        Raises DoesNotFit when there is not room enough, OSError for what else a disk can do; earlier checkpoints are
        untouched then. A run folder that goes away in the middle, even one whose empty mount point takes the files, is
        told as such.
        """
        with self._in_the_run_folder():
            return self._write_and_commit(step, files, eval_loss)

    def _write_and_commit(self, step: int, files: Sequence[NewFile], eval_loss: float | None) -> Checkpoint:
        staged = self.staging / "checkpoint"
        durable.remove_tree(staged)
        durable.remove_file(self._reserve)
        self._require_room(sum(file.size for file in files))
        written: dict[str, tuple[int, str]] = {}
        for file in files:
            path = staged / file.name
            durable.make_folder(path.parent)
            written[file.name] = durable.write_file(path, file.parts())
            durable.sync_folder(path.parent)
        manifest = _manifest_bytes(step, written, eval_loss)
        durable.write_file(staged / MANIFEST, [manifest])
        durable.sync_folder(staged)
        durable.make_folder(self.folder)
        durable.sync_folder(self.folder.parent)  # an earlier try may have made the folder and not got this far
        target = self.folder / f"step-{step:06d}"
        replaced = target.with_name(f"{target.name}.replaced")  # a name under which it still counts
        self._good.discard(target)
        if target.exists():  # it failed verification, or its save or the removal of older ones was tried again
            if replaced.exists():
                durable.remove_folder(replaced)
            durable.rename_durably(target, replaced)
        durable.rename_durably(staged, target)
        if replaced.exists():
            durable.remove_folder(replaced)
        return Checkpoint(target, step, written, eval_loss)

    @contextmanager
    def _in_the_run_folder(self) -> Iterator[None]:
        """Whatever ends the block, a run folder that is gone by then is what is told."""
        try:
            yield
        except (OSError, RunDamaged, DoesNotFit):
            self._require_run_folder()
            raise
        self._require_run_folder()

    def _require_run_folder(self) -> None:
        if self._anchor is not None and not self._anchor.exists():
            reason = "the run folder is gone: removed, or its disk unmounted"
            raise FileNotFoundError(errno.ENOENT, reason, str(self._anchor.parent))

    def _require_room(self, size: int) -> None:
        self._require_run_folder()
        if durable.free_bytes(self.folder) < size:
            raise self._no_room(size)

    def _no_room(self, size: int) -> DoesNotFit:
        free = durable.free_bytes(self.folder)
        return DoesNotFit(
            f"a checkpoint needs {format_bytes(size)} but the disk has {format_bytes(free)} free",
            where=str(self.folder),
            remedy="make room on this disk and run the same command again; earlier checkpoints are untouched",
        )

    def newest_verified(self) -> tuple[Checkpoint | None, list[Skipped]]:
        """The checkpoint with the highest step whose every file matches its manifest, and those passed over."""
        skipped: list[Skipped] = []
        found: list[Checkpoint] = []
        for folder in self._folders():
            try:
                found.append(read_manifest(folder))
            except RunDamaged as damage:
                skipped.append(Skipped(folder, damage.message))
        for checkpoint in sorted(found, key=lambda checkpoint: checkpoint.step, reverse=True):
            try:
                verify(checkpoint)
            except RunDamaged as damage:
                skipped.append(Skipped(checkpoint.path, damage.message))
                continue
            return checkpoint, skipped
        return None, skipped

    def prune(self, keep: int, newest: Checkpoint) -> None:
        """Removes all but the `keep` newest checkpoints, the best and the pinned; `newest` is verified before any goes.

        Best is the lowest held-out loss measured at a checkpoint; a file `step-000400.pinned` beside a checkpoint pins
        it. One beyond `newest` was passed over as damaged when the run was resumed: it does not count and stays.
        """
        with self._in_the_run_folder():
            self._prune(keep, newest)

    def _prune(self, keep: int, newest: Checkpoint) -> None:
        verify(newest)
        self._good.add(newest.path)
        readable: list[Checkpoint] = []
        for folder in self._folders():
            try:
                readable.append(read_manifest(folder))
            except RunDamaged:
                continue  # damaged folders stay: a person may want to look at them
        readable = [checkpoint for checkpoint in readable if checkpoint.step <= newest.step]
        readable.sort(key=lambda checkpoint: checkpoint.step, reverse=True)
        measured = [one for one in readable if one.eval_loss is not None and math.isfinite(one.eval_loss)]
        best = min(measured, key=lambda checkpoint: checkpoint.eval_loss or 0.0, default=newest)
        kept = 0
        for checkpoint in readable:
            if kept < keep:
                kept += self._is_good(checkpoint)  # a damaged one does not count, and stays to be looked at
            elif checkpoint.path != best.path and not checkpoint.path.with_suffix(".pinned").exists():
                durable.remove_folder(checkpoint.path)

    def _is_good(self, checkpoint: Checkpoint) -> bool:
        """Whether it verifies; each is read once in the life of this store."""
        if checkpoint.path not in self._good:
            try:
                verify(checkpoint)
            except RunDamaged:
                return False
            self._good.add(checkpoint.path)
        return True

    def _folders(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def read_manifest(folder: Path) -> Checkpoint:
    """The checkpoint as its manifest describes it. Raises RunDamaged when the manifest is missing or not as written."""
    path = folder / MANIFEST
    try:
        stored = path.read_bytes()
        manifest = json.loads(stored)
        files = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
        step, eval_loss = int(manifest["step"]), manifest["eval_loss"]
        if not files:
            raise ValueError("it names no files")
        if _manifest_bytes(step, files, eval_loss) != stored:
            raise ValueError("it does not match its own SHA-256")
    except FileNotFoundError:
        raise RunDamaged(f"{MANIFEST} is missing: the checkpoint was never finished", where=str(folder)) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise RunDamaged(f"{MANIFEST} cannot be read: {error}", where=str(folder)) from None
    return Checkpoint(folder, step, files, eval_loss)


def _manifest_bytes(step: int, files: dict[str, tuple[int, str]], eval_loss: float | None) -> bytes:
    """One spelling for one content, with a hash over the rest: any other bytes were damaged."""
    record: dict[str, Any] = {
        "format": _FORMAT,
        "step": step,
        "eval_loss": eval_loss,
        "files": {name: {"bytes": size, "sha256": digest} for name, (size, digest) in sorted(files.items())},
    }
    record["sha256"] = hashlib.sha256(json.dumps(record).encode()).hexdigest()
    return (json.dumps(record, indent=1) + "\n").encode()


def verify(checkpoint: Checkpoint) -> None:
    """Raises RunDamaged naming the first file that is missing, not named, or differs in size or SHA-256.

    Reads every byte.
    """
    for name, (size, digest) in checkpoint.files.items():
        path = checkpoint.path / name
        reason = None
        try:
            if not path.is_file():
                reason = "is missing"
            elif path.stat().st_size != size:
                reason = f"has {path.stat().st_size} bytes instead of {size}"
            elif durable.sha256_of_file(path) != digest:
                reason = "does not match its SHA-256"
        except OSError as error:  # a bad sector, or not ours to read
            reason = f"cannot be read: {error.strerror}"
        if reason is not None:
            raise RunDamaged(f"{name} {reason}", where=str(checkpoint.path))
    present = {path.relative_to(checkpoint.path).as_posix() for path in checkpoint.path.rglob("*") if path.is_file()}
    unknown = sorted(present - set(checkpoint.files) - {MANIFEST})
    if unknown:
        raise RunDamaged(f"{unknown[0]} is not in {MANIFEST}", where=str(checkpoint.path))
