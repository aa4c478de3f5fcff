"""Damage to a checkpoint that was whole once: always seen, always named, and the older one is used."""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
from recording_disk import QuickDisk
from saved_steps import SIZES, commit, is_as_saved

from charkha.store import durable
from charkha.store.checkpoints import MANIFEST, CheckpointStore

NAMES = [*SIZES, MANIFEST]
YEAR_2000, YEAR_2100 = 946_684_800, 4_102_444_800


@pytest.fixture
def store(scratch: Path) -> CheckpointStore:
    """Checkpoints of steps 1 and 2."""
    store = CheckpointStore(scratch)
    with durable.use_disk(QuickDisk()):
        commit(store, 1)
        commit(store, 2)
    return store


def folder_of(store: CheckpointStore, step: int) -> Path:
    return store.folder / f"step-{step:06d}"


def require_the_older(store: CheckpointStore, named: str) -> None:
    """Step 1 is used and step 2 passed over, for a reason that names the file."""
    found, skipped = store.newest_verified()
    assert found is not None
    assert found.step == 1
    assert is_as_saved(found)
    assert [entry.path for entry in skipped] == [folder_of(store, 2)]
    assert named in skipped[0].reason


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place // 8] ^= 1 << place % 8
    path.write_bytes(data)


def flip_everywhere(store: CheckpointStore, flips: int, seed: int) -> Counter[str]:
    """Flips one bit at a time at random places of every file, the same number in each; file -> flips."""
    picker, flipped = random.Random(seed), Counter()
    for number in range(flips):
        name = NAMES[number % len(NAMES)]
        path = folder_of(store, 2) / name
        place = picker.randrange(path.stat().st_size * 8)
        flip(path, place)
        require_the_older(store, name)
        flip(path, place)
        flipped[name] += 1
    found, _ = store.newest_verified()
    assert found is not None
    assert found.step == 2
    return flipped


def test_one_flipped_bit_anywhere_is_seen_and_its_file_named(store: CheckpointStore) -> None:
    assert flip_everywhere(store, 500, seed=0).total() == 500


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 5))
def test_thousands_of_flipped_bits_are_all_seen(store: CheckpointStore, seed: int) -> None:
    flip_everywhere(store, 5000, seed)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("left", ["nothing", "one byte", "half", "all but one byte"])
def test_a_truncated_file_is_seen(store: CheckpointStore, name: str, left: str) -> None:
    path = folder_of(store, 2) / name
    size = path.stat().st_size
    os.truncate(path, {"nothing": 0, "one byte": 1, "half": size // 2, "all but one byte": size - 1}[left])
    require_the_older(store, name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tail", [b"\0", b"\n", b"\0" * 4096], ids=["a zero", "a newline", "a block of zeros"])
def test_bytes_added_at_the_end_are_seen(store: CheckpointStore, name: str, tail: bytes) -> None:
    with (folder_of(store, 2) / name).open("ab") as file:
        file.write(tail)
    require_the_older(store, name)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_zeros_of_the_right_size_is_seen(store: CheckpointStore, name: str) -> None:
    path = folder_of(store, 2) / name
    path.write_bytes(bytes(path.stat().st_size))
    require_the_older(store, name)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_seen(store: CheckpointStore, name: str) -> None:
    (folder_of(store, 2) / name).unlink()
    require_the_older(store, name)


@pytest.mark.parametrize("name", ["optimizer.pt", ".hidden", "inner/more.json", "other/deep/file", "weights"])
def test_an_extra_file_is_seen(store: CheckpointStore, name: str) -> None:
    path = folder_of(store, 2) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"extra")
    require_the_older(store, name)


def swap(first: Path, second: Path) -> None:
    aside = first.with_name("aside")
    first.rename(aside)
    second.rename(first)
    aside.rename(second)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_swapped_between_two_checkpoints_is_seen_in_both(store: CheckpointStore, name: str) -> None:
    with durable.use_disk(QuickDisk()):
        commit(store, 3)
    swap(folder_of(store, 2) / name, folder_of(store, 3) / name)
    found, skipped = store.newest_verified()
    assert found is not None
    assert found.step == 1
    assert {entry.path for entry in skipped} == {folder_of(store, 2), folder_of(store, 3)}
    assert all(entry.reason for entry in skipped)


def test_files_swapped_inside_a_checkpoint_are_seen(store: CheckpointStore) -> None:
    swap(folder_of(store, 2) / "weights.safetensors", folder_of(store, 2) / "optimizer.safetensors")
    require_the_older(store, "safetensors")


def test_folders_that_swapped_their_names_are_what_they_hold(store: CheckpointStore) -> None:
    swap(folder_of(store, 1), folder_of(store, 2))
    found, skipped = store.newest_verified()
    assert found is not None
    assert (found.path.name, found.step) == ("step-000001", 2)
    assert is_as_saved(found)
    assert not skipped


def test_with_all_damaged_there_is_none_and_every_reason_is_told(store: CheckpointStore) -> None:
    with durable.use_disk(QuickDisk()):
        commit(store, 3)
    for step, name in enumerate(NAMES[:3], start=1):
        flip(folder_of(store, step) / name, 100)
    found, skipped = store.newest_verified()
    assert found is None
    reasons = {entry.path.name: entry.reason for entry in skipped}
    assert set(reasons) == {"step-000001", "step-000002", "step-000003"}
    for step, name in enumerate(NAMES[:3], start=1):
        assert name in reasons[f"step-{step:06d}"]


@pytest.mark.parametrize(
    ("old", "new"),
    [(YEAR_2000, YEAR_2100), (YEAR_2100, YEAR_2000), (YEAR_2000, YEAR_2000), (YEAR_2100, YEAR_2100), (0, 0)],
)
def test_file_times_change_neither_what_is_chosen_nor_what_is_kept(store: CheckpointStore, old: int, new: int) -> None:
    with durable.use_disk(QuickDisk()):
        commit(store, 3)
    for step, stamp in ((1, old), (2, new), (3, old)):
        for path in (folder_of(store, step), *folder_of(store, step).rglob("*")):
            os.utime(path, (stamp, stamp))
    found, skipped = store.newest_verified()
    assert found is not None
    assert (found.step, skipped) == (3, [])
    with durable.use_disk(QuickDisk()):
        store.prune(2, found)
    assert sorted(path.name for path in store.folder.iterdir()) == ["step-000002", "step-000003"]


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b'{"step": 1e999, "eval_loss": 0, "files": {}}', id="a number beyond all"),
        pytest.param(b"[" * 100_000, id="brackets without end"),
        pytest.param(b"1" * 10_000, id="digits without end"),
    ],
)
def test_a_hostile_manifest_is_damage_and_not_a_crash(store: CheckpointStore, content: bytes) -> None:
    (folder_of(store, 2) / MANIFEST).write_bytes(content)
    require_the_older(store, MANIFEST)


def test_a_copied_checkpoint_counts_as_one_of_its_step(store: CheckpointStore) -> None:
    shutil.copytree(folder_of(store, 1), store.folder / "a-copy")
    found, skipped = store.newest_verified()
    assert found is not None
    assert (found.step, skipped) == (2, [])
