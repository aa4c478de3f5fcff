"""A checkpoint is complete or absent, and a damaged one is never believed."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from charkha.errors import DoesNotFit, RunDamaged
from charkha.store import checkpoints, durable
from charkha.store.checkpoints import MANIFEST, CheckpointStore, NewFile, verify


def new_file(name: str, data: bytes) -> NewFile:
    half = len(data) // 2
    return NewFile(name, len(data), lambda: [data[:half], memoryview(data)[half:]])


def commit(store: CheckpointStore, step: int, size: int = 5000, eval_loss: float | None = None) -> Path:
    files = [
        new_file("weights.safetensors", bytes([step % 256]) * size),
        new_file("inner/state.json", json.dumps({"step": step}).encode()),
    ]
    return store.save(step, files, eval_loss=eval_loss).path


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "run")


def newest_step(store: CheckpointStore) -> int | None:
    checkpoint, _ = store.newest_verified()
    return checkpoint.step if checkpoint else None


def test_a_run_without_checkpoints_has_none(store: CheckpointStore) -> None:
    assert store.newest_verified() == (None, [])


def test_a_committed_checkpoint_is_found_with_its_files_and_size(store: CheckpointStore) -> None:
    path = commit(store, 40)
    assert path.name == "step-000040"
    checkpoint, skipped = store.newest_verified()
    assert checkpoint is not None
    assert not skipped
    assert (checkpoint.path, checkpoint.step) == (path, 40)
    assert set(checkpoint.files) == {"weights.safetensors", "inner/state.json"}
    assert checkpoint.total_bytes == 5000 + len('{"step": 40}')


def test_files_are_on_the_disk_before_the_manifest_and_the_manifest_before_the_name(store: CheckpointStore) -> None:
    order: list[str] = []

    class Recorder(durable.Disk):
        def sync(self, file: Any) -> None:
            order.append(f"sync {Path(file.name).name}")
            super().sync(file)

        def sync_folder(self, folder: Path) -> None:
            order.append(f"sync {folder.name}/")
            super().sync_folder(folder)

        def rename(self, source: Path, target: Path) -> None:
            order.append(f"rename {source.name} {target.name}")
            super().rename(source, target)

    durable.make_folder(store.folder)
    with durable.use_disk(Recorder()):
        commit(store, 1)
    written = order[order.index("sync weights.safetensors") :]
    assert written == [
        "sync weights.safetensors", "sync checkpoint/", "sync checkpoint/", "sync state.json", "sync inner/",
        f"sync {MANIFEST}", "sync checkpoint/", "sync run/", "rename checkpoint step-000001", "sync checkpoints/",
        "sync staging/",
    ]  # fmt: skip


def flip_a_byte(folder: Path) -> None:
    path = folder / "weights.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def cut_short(folder: Path) -> None:
    os.truncate(folder / "weights.safetensors", 100)


def zero_the_tail(folder: Path) -> None:
    path = folder / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:4000] + b"\0" * 1000)


def lose_a_file(folder: Path) -> None:
    (folder / "inner" / "state.json").unlink()


def lose_the_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def cut_the_manifest(folder: Path) -> None:
    path = folder / MANIFEST
    os.truncate(path, path.stat().st_size // 2)


def zero_the_manifest(folder: Path) -> None:
    path = folder / MANIFEST
    path.write_bytes(b"\0" * path.stat().st_size)


def empty_the_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text('{"format": 1, "step": 9, "files": {}}')


def replace_the_manifest_by_a_list(folder: Path) -> None:
    (folder / MANIFEST).write_text("[]")


def make_the_manifest_a_folder(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    (folder / MANIFEST).mkdir()


def make_a_file_a_folder(folder: Path) -> None:
    (folder / "weights.safetensors").unlink()
    (folder / "weights.safetensors").mkdir()


DAMAGES = [
    flip_a_byte, cut_short, zero_the_tail, lose_a_file, lose_the_manifest, cut_the_manifest, zero_the_manifest,
    empty_the_manifest, replace_the_manifest_by_a_list, make_the_manifest_a_folder, make_a_file_a_folder,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_passed_over_with_its_reason(
    store: CheckpointStore, damage: Callable[[Path], None]
) -> None:
    commit(store, 1)
    bad = commit(store, 2)
    damage(bad)
    checkpoint, skipped = store.newest_verified()
    assert checkpoint is not None
    assert checkpoint.step == 1
    assert [entry.path for entry in skipped] == [bad]
    assert skipped[0].reason


def test_when_every_checkpoint_is_damaged_there_is_none_and_each_reason_is_told(store: CheckpointStore) -> None:
    flip_a_byte(commit(store, 1))
    lose_the_manifest(commit(store, 2))
    checkpoint, skipped = store.newest_verified()
    assert checkpoint is None
    assert len(skipped) == 2


def test_a_file_that_the_disk_cannot_read_is_damage(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(store, 1)
    bad = commit(store, 2)
    original = durable.sha256_of_file

    def bad_sector(path: Path) -> str:
        if path.is_relative_to(bad):
            raise OSError(5, "Input/output error")
        return original(path)

    monkeypatch.setattr(durable, "sha256_of_file", bad_sector)
    assert newest_step(store) == 1


def test_the_step_is_read_from_inside_and_not_from_the_folders_name(store: CheckpointStore) -> None:
    old = commit(store, 1)
    commit(store, 2)
    old.rename(old.with_name("step-999999"))
    assert newest_step(store) == 2


def test_the_step_does_not_depend_on_clock_or_file_times(store: CheckpointStore) -> None:
    old = commit(store, 1)
    new = commit(store, 2)
    for path, stamp in ((old, time.time() + 1e6), (new, 0.0)):
        for file in [path, *path.rglob("*")]:
            os.utime(file, (stamp, stamp))
    assert newest_step(store) == 2


def test_what_a_crash_left_in_staging_is_no_checkpoint_and_never_part_of_one(store: CheckpointStore) -> None:
    staged = store.staging / "checkpoint"
    staged.mkdir(parents=True)
    (staged / "left-over.bin").write_bytes(b"garbage")
    assert newest_step(store) is None
    assert "left-over.bin" not in {path.name for path in commit(store, 1).rglob("*")}


def test_half_removed_checkpoints_are_no_checkpoints_and_are_cleaned_away(store: CheckpointStore) -> None:
    path = commit(store, 5)
    path.rename(path.with_name(f".{path.name}.removed"))
    assert store.newest_verified() == (None, [])
    store.clear()
    commit(store, 6)
    assert [entry.name for entry in store.folder.iterdir()] == ["step-000006"]


def test_a_checkpoint_of_the_same_step_replaces_a_damaged_one(store: CheckpointStore) -> None:
    flip_a_byte(commit(store, 3))
    verify(checkpoints.read_manifest(commit(store, 3)))
    assert newest_step(store) == 3


def test_prune_keeps_the_newest(store: CheckpointStore) -> None:
    for step in (1, 2, 3):
        commit(store, step)
    newest, _ = store.newest_verified()
    assert newest is not None
    store.prune(2, newest)
    assert sorted(path.name for path in store.folder.iterdir()) == ["step-000002", "step-000003"]


def test_prune_removes_nothing_when_the_new_checkpoint_is_not_what_was_written(store: CheckpointStore) -> None:
    commit(store, 1)
    newest = store.save(2, [new_file("weights.safetensors", b"x" * 100)])
    zero = newest.path / "weights.safetensors"
    zero.write_bytes(b"\0" * 100)  # a disk that lies about fsync
    with pytest.raises(RunDamaged, match="SHA-256"):
        store.prune(1, newest)
    assert newest_step(store) == 1


def test_a_damaged_checkpoint_beyond_the_resumed_step_does_not_push_a_good_one_out(store: CheckpointStore) -> None:
    commit(store, 4)
    flip_a_byte(commit(store, 8))
    commit(store, 6)  # resumed from 4 and gone on
    newest = checkpoints.read_manifest(store.folder / "step-000006")
    store.prune(2, newest)
    assert sorted(path.name for path in store.folder.iterdir()) == ["step-000004", "step-000006", "step-000008"]


def test_prune_leaves_folders_that_it_cannot_read(store: CheckpointStore) -> None:
    lose_the_manifest(commit(store, 1))
    commit(store, 2)
    commit(store, 3)
    newest, _ = store.newest_verified()
    assert newest is not None
    store.prune(1, newest)
    assert sorted(path.name for path in store.folder.iterdir()) == ["step-000001", "step-000003"]


def test_a_full_disk_is_told_before_anything_is_written(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(store, 1)
    monkeypatch.setattr(durable, "free_bytes", lambda path: 1000)
    for attempt in (lambda: commit(store, 2), lambda: store.reserve(2000)):
        with pytest.raises(DoesNotFit, match="1000 B free") as caught:
            attempt()
        assert caught.value.exit_code == 3
    assert newest_step(store) == 1
    assert not any(store.staging.rglob("*"))


def test_the_room_for_a_checkpoint_is_taken_and_given_to_it(
    small_disk: Callable[[int], Path],
) -> None:
    disk = small_disk(2 << 20)
    store = CheckpointStore(disk / "run")
    commit(store, 1, size=300_000)
    store.reserve(300_100)
    subprocess.run(["dd", "if=/dev/zero", f"of={disk}/greedy", "bs=4096"], capture_output=True, check=False)
    assert shutil.disk_usage(disk).free == 0
    commit(store, 2, size=300_000)  # by now there is no other room
    assert newest_step(store) == 2
    with pytest.raises(DoesNotFit):
        store.reserve(300_100)


def test_prune_keeps_the_best_and_the_pinned_and_counts_no_damaged_one(store: CheckpointStore) -> None:
    losses = {1: 3.0, 2: 1.5, 3: 2.0, 4: float("nan"), 5: 1.6, 6: None, 7: None}
    for step, loss in losses.items():
        commit(store, step, eval_loss=loss)
    (store.folder / "step-000003.pinned").touch()
    flip_a_byte(store.folder / "step-000006")
    store.prune(2, checkpoints.read_manifest(store.folder / "step-000007"))
    left = sorted(path.name for path in store.folder.iterdir() if path.is_dir())
    assert left == ["step-000002", "step-000003", "step-000005", "step-000006", "step-000007"]


def test_a_folder_that_is_gone_is_not_made_anew(tmp_path: Path) -> None:
    run = tmp_path / "run"
    store = CheckpointStore(run, anchor=run / "charkha.yaml")
    with pytest.raises(FileNotFoundError, match="run folder is gone"):
        commit(store, 1)
    assert not run.exists()


@pytest.mark.parametrize("left_behind", [False, True], ids=["nothing", "an empty mount point"])
def test_a_folder_that_goes_away_in_the_middle_of_a_save_is_told_and_nothing_counts_as_saved(
    tmp_path: Path, left_behind: bool
) -> None:
    run, aside = tmp_path / "run", tmp_path / "unmounted"
    run.mkdir()
    (run / "charkha.yaml").touch()
    store = CheckpointStore(run, anchor=run / "charkha.yaml")
    commit(store, 1)

    class Unmounted(durable.Disk):
        def sync(self, file: BinaryIO) -> None:
            super().sync(file)
            if not aside.exists():
                run.rename(aside)
                if left_behind:
                    (run / "staging" / "checkpoint").mkdir(parents=True)

    with durable.use_disk(Unmounted()), pytest.raises(FileNotFoundError, match="run folder is gone"):
        commit(store, 2)
    if left_behind:
        shutil.rmtree(run)
    aside.rename(run)
    newest, _ = store.newest_verified()
    assert newest is not None
    assert newest.step == 1


def test_every_single_bit_of_the_manifest_counts(store: CheckpointStore) -> None:
    path = commit(store, 1, eval_loss=2.5) / MANIFEST
    good = path.read_bytes()
    for place in range(len(good) * 8):
        bad = bytearray(good)
        bad[place // 8] ^= 1 << place % 8
        path.write_bytes(bytes(bad))
        with pytest.raises(RunDamaged):
            checkpoints.read_manifest(path.parent)


def test_a_file_that_the_manifest_does_not_name_is_damage(store: CheckpointStore) -> None:
    path = commit(store, 1)
    (path / "optimizer.pt").write_bytes(b"pickle")
    with pytest.raises(RunDamaged, match=r"optimizer\.pt is not in"):
        verify(checkpoints.read_manifest(path))


WRITER = """
import sys
from pathlib import Path
from typing import Any, BinaryIO
from charkha.store.checkpoints import CheckpointStore, NewFile
store = CheckpointStore(Path(sys.argv[1]))
step = int(sys.argv[2])
print("ready", flush=True)
while True:
    step += 1
    contents = [(name, f"{name}{step}".encode() * 40000) for name in ("a", "b", "c")]
    files = [NewFile(name, len(data), lambda data=data: [data]) for name, data in contents]
    store.prune(2, store.save(step, files))
"""


def test_a_writer_killed_at_any_moment_leaves_a_checkpoint_that_is_whole_and_recent(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "run")
    picker = random.Random(3)
    reached = 0
    for _ in range(12):
        command = [sys.executable, "-c", WRITER, str(tmp_path / "run"), str(reached)]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(picker.uniform(0.02, 0.25))
        writer.kill()
        writer.wait()
        writer.stdout.close()
        checkpoint, skipped = store.newest_verified()
        assert not skipped, "a folder with a proper name was not whole"
        if checkpoint is None:
            assert reached == 0
            continue
        assert checkpoint.step >= reached
        reached = checkpoint.step
        for name in ("a", "b", "c"):
            assert (checkpoint.path / name).read_bytes() == f"{name}{reached}".encode() * 40000
    assert reached > 0
    shutil.rmtree(tmp_path / "run")
