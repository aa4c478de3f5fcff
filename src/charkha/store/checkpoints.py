"""Checkpoints that are complete or absent: staged, synced, hashed, renamed, and verified before they are believed.

A checkpoint is `checkpoints/step-000400/` with MANIFEST.json (step, and size and SHA-256 of every file) written last.
Which one is newest is read from inside the manifests, never from folder names or file times. Bytes, never tensors.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from charkha.errors import DoesNotFit, RunDamaged
from charkha.store import durable
from charkha.units import format_bytes

MANIFEST = "MANIFEST.json"
_FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint whose manifest was read. `verify` tells whether its files still match it."""

    path: Path
    step: int
    files: dict[str, tuple[int, str]]  # relative name -> (bytes, sha256)

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

    def __init__(self, run_folder: Path) -> None:
        self.folder = run_folder / "checkpoints"
        self.staging = run_folder / "staging"

    def stage(self, expected_bytes: int = 0) -> Path:
        """An empty folder to write the next checkpoint's files into; whatever a crash left there is removed.

        Raises DoesNotFit when the disk has less than `expected_bytes` free.
        """
        shutil.rmtree(self.staging, ignore_errors=True)
        for doomed in self.folder.glob(".*.removed"):  # a cut between the two steps of a removal
            shutil.rmtree(doomed, ignore_errors=True)
        free = durable.free_bytes(self.staging)
        if free < expected_bytes:
            raise DoesNotFit(
                f"a checkpoint needs {format_bytes(expected_bytes)} but the disk has {format_bytes(free)} free",
                where=str(self.folder),
                remedy="make room on this disk and run the same command again; earlier checkpoints are untouched",
            )
        staged = self.staging / "checkpoint"
        staged.mkdir(parents=True)
        return staged

    def commit(self, staged: Path, step: int) -> Checkpoint:
        """Makes the staged files the checkpoint of `step`: fsync, hash, manifest last, rename, fsync of the parent."""
        files = {
            path.relative_to(staged).as_posix(): (path.stat().st_size, durable.sha256_of_file(path))
            for path in sorted(staged.rglob("*"))
            if path.is_file()
        }
        durable.sync_tree(staged)
        manifest = {
            "format": _FORMAT,
            "step": step,
            "files": {name: {"bytes": size, "sha256": digest} for name, (size, digest) in files.items()},
        }
        durable.write_durably(staged / MANIFEST, json.dumps(manifest, indent=1).encode())
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.folder / f"step-{step:06d}"
        if target.exists():
            durable.remove_folder(target)  # only a checkpoint that failed verification is ever written again
        durable.rename_durably(staged, target)
        return Checkpoint(target, step, files)

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
        """Removes all but the `keep` newest checkpoints; `newest`, just committed, is verified before anything goes.

        A checkpoint beyond `newest` was passed over as damaged when the run was resumed: it does not count and stays.
        """
        verify(newest)
        readable: list[Checkpoint] = []
        for folder in self._folders():
            try:
                readable.append(read_manifest(folder))
            except RunDamaged:
                continue  # damaged folders stay: a person may want to look at them
        readable = [checkpoint for checkpoint in readable if checkpoint.step <= newest.step]
        readable.sort(key=lambda checkpoint: checkpoint.step, reverse=True)
        for old in readable[keep:]:
            if old.path != newest.path:
                durable.remove_folder(old.path)

    def _folders(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def read_manifest(folder: Path) -> Checkpoint:
    """The checkpoint as its manifest describes it. Raises RunDamaged when the manifest is missing or unreadable."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        files = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
        if not files:
            raise ValueError("it names no files")
        return Checkpoint(folder, int(manifest["step"]), files)
    except FileNotFoundError:
        raise RunDamaged(f"{MANIFEST} is missing: the checkpoint was never finished", where=str(folder)) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunDamaged(f"{MANIFEST} cannot be read: {error}", where=str(folder)) from None


def verify(checkpoint: Checkpoint) -> None:
    """Raises RunDamaged naming the first file that is missing or differs in size or SHA-256 (reads every byte)."""
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
