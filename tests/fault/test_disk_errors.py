"""A disk that refuses, or a process that dies, at any operation: what was saved stays, and the next save works.

As SQLite's tests do it: the same scenario with operation 1, 2, 3, ... refused, until it ends untouched.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from power_loss import DiskModel, write_tree
from recording_disk import Cut, CuttingDisk, FailingDisk, Operation, QuickDisk, RecordingDisk
from saved_steps import commit, is_as_saved, left_over

from charkha.errors import DoesNotFit
from charkha.store import durable
from charkha.store.checkpoints import CheckpointStore, read_manifest, verify
from charkha.store.runs import RunFolder

LOSSES = {1: 1.5}  # step 1 is the best
ERRORS = [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT]


def a_run(folder: Path) -> CheckpointStore:
    """A run with checkpoints of steps 1, 2 and 3, two events and plan.json."""
    folder.mkdir()
    store, run = CheckpointStore(folder), RunFolder(folder)
    with durable.use_disk(QuickDisk()):
        for step in (1, 2, 3):
            commit(store, step, LOSSES.get(step))
        run.write_json(folder / "plan.json", {"version": "old"})
        run.append("step", step=1)
        run.append("step", step=2)
    return store


def save_and_prune(store: CheckpointStore, step: int = 4) -> None:
    """What training does at a checkpoint; the run waits for the disk when this raises."""
    run = RunFolder(store.folder.parent)
    run.append("step", step=step)
    store.prune(2, commit(store, step))
    run.append("checkpoint", step=step)
    run.sync_events()
    run.write_json(run.path / "plan.json", {"version": "new"})


def verified_steps(store: CheckpointStore) -> set[int]:
    """Steps whose folder has its proper name and holds what was saved. Nothing else may have such a name."""
    steps = set()
    for folder in store.folder.glob("step-*"):
        checkpoint = read_manifest(folder)
        verify(checkpoint)
        assert is_as_saved(checkpoint)
        steps.add(checkpoint.step)
    return steps


def check_nothing_was_lost(store: CheckpointStore) -> None:
    """The earlier checkpoints, or the new one and what it leaves of them; whole records; whole old events."""
    steps = verified_steps(store)
    assert steps >= {1, 2, 3} or steps >= {1, 3, 4}
    run = RunFolder(store.folder.parent)
    assert (run.path / "plan.json").read_text() in ('{\n "version": "old"\n}\n', '{\n "version": "new"\n}\n')
    events = [(event["event"], event["step"]) for event in run.events()]
    assert events[:2] == [("step", 1), ("step", 2)]
    assert events[2:] in ([], [("step", 4)], [("step", 4), ("checkpoint", 4)])


def check_a_new_start_works_and_cleans_up(folder: Path) -> None:
    store = CheckpointStore(folder)
    with durable.use_disk(QuickDisk()):
        store.clear()
        assert not left_over(store)
        store.reserve(20_000)
        store.prune(2, commit(store, 5))
        store.reserve(20_000)
    assert left_over(store) == [".room-for-a-checkpoint"]
    assert verified_steps(store) == {1, 5} | ({4} if 4 in verified_steps(store) else {3})
    assert not list(folder.rglob(".*.removed"))


def synced_after_failing(operations: Sequence[Operation]) -> list[str]:
    """Files whose sync failed and that were synced again, as if that made up for it, without being written anew."""
    given_up: set[Path] = set()
    believed = []
    for operation in operations:
        if operation.kind == "sync" and operation.error is not None:
            given_up.add(operation.path)
        elif operation.kind == "sync" and operation.path in given_up:
            believed.append(operation.path.name)
        elif operation.kind in ("create", "unlink"):
            given_up.discard(operation.path)
        elif operation.kind == "rename" and operation.target in given_up:
            given_up.remove(operation.target)  # a new file has its name
    return believed


def runs_until_untouched(scratch: Path, make_disk: Any) -> Iterator[tuple[int, CheckpointStore, RecordingDisk]]:
    """(n, store, disk) after the scenario with the nth operation refused, for n = 1, 2, ... until none was."""
    for nth in count(1):
        store, disk = a_run(scratch.with_name(f"run-{nth}")), make_disk(nth)
        error: BaseException | None = None
        try:
            with durable.use_disk(disk):
                save_and_prune(store)
        except (OSError, DoesNotFit, Cut) as raised:
            error = raised
        if error is None and not getattr(disk, "has_failed", False):
            assert verified_steps(store) == {1, 3, 4}
            return
        yield nth, store, disk


@pytest.mark.parametrize("from_then_on", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("code", ERRORS, ids=errno.errorcode.get)
def test_an_operation_that_fails_takes_nothing_and_the_next_save_works(
    scratch: Path, code: int, from_then_on: bool, record_property: Callable[[str, object], None]
) -> None:
    trials = 0
    for _, store, disk in runs_until_untouched(
        scratch, lambda nth: FailingDisk(code, nth, from_then_on=from_then_on, in_part=True)
    ):
        trials += 1
        check_nothing_was_lost(store)
        healed = RecordingDisk()
        with durable.use_disk(healed):
            save_and_prune(store)  # the same step again, by the same process, as training does while it waits
        assert verified_steps(store) == {1, 3, 4}
        assert set(synced_after_failing([*disk.operations, *healed.operations])) <= {"events.jsonl"}
        check_a_new_start_works_and_cleans_up(store.folder.parent)
    record_property("trials", trials)
    assert trials > 40


@pytest.mark.parametrize("kind", ["sync", "sync_folder"])
def test_a_sync_that_fails_is_not_a_save(scratch: Path, kind: str) -> None:
    refused: Counter[str] = Counter()
    for nth in count(1):
        store = a_run(scratch.with_name(f"run-{nth}"))
        disk = FailingDisk(errno.EIO, nth, kind=kind)
        with durable.use_disk(disk), suppress(OSError):
            commit(store, 4)
            assert not disk.has_failed, "save() returned although a sync had failed"
        if not disk.has_failed:
            break
        refused[kind] += 1
        assert verified_steps(store) >= {1, 2, 3}
    assert refused[kind] >= 4


def test_a_process_that_dies_at_any_operation_leaves_what_was_saved_and_a_new_start_cleans_up(
    scratch: Path, record_property: Callable[[str, object], None]
) -> None:
    trials = 0
    for _, store, _ in runs_until_untouched(scratch, CuttingDisk):
        trials += 1
        check_nothing_was_lost(CheckpointStore(store.folder.parent))
        check_a_new_start_works_and_cleans_up(store.folder.parent)
    record_property("trials", trials)
    assert trials > 40


def test_a_process_that_dies_while_it_cleans_up_is_cleaned_up_after(scratch: Path) -> None:
    trials = 0
    for nth in count(1):
        store = a_run(scratch.with_name(f"run-{nth}"))
        with durable.use_disk(CuttingDisk(20)), suppress(Cut):
            commit(store, 4)  # leaves staged files
        doomed = store.folder / "step-000002"
        doomed.rename(durable.removed_name(doomed))  # and half a removal
        try:
            with durable.use_disk(CuttingDisk(nth)):
                CheckpointStore(store.folder.parent).clear()
        except Cut:
            trials += 1
        else:
            break
        assert verified_steps(store) == {1, 3}
        check_a_new_start_works_and_cleans_up(store.folder.parent)
    assert trials >= 8


def test_a_failure_in_a_new_run_leaves_nothing_to_believe(scratch: Path) -> None:
    for nth in count(1):
        store = CheckpointStore(scratch.with_name(f"run-{nth}"))
        disk = FailingDisk(errno.ENOSPC, nth, in_part=True)
        with durable.use_disk(disk), suppress(OSError):
            commit(store, 1)
        if not disk.has_failed:
            break
        found, skipped = store.newest_verified()
        assert found is None or is_as_saved(found)
        assert not skipped
        with durable.use_disk(QuickDisk()):
            commit(store, 1)
        assert verified_steps(store) == {1}


def test_a_save_makes_up_for_a_folder_whose_sync_an_earlier_try_did_not_get(scratch: Path) -> None:
    lost = []
    for nth in count(1):
        root = scratch.with_name(f"disk-{nth}")
        (root / "run").mkdir(parents=True)
        disk, healed = FailingDisk(errno.EIO, nth, kind="sync_folder"), RecordingDisk()
        with durable.use_disk(disk), suppress(OSError):
            commit(CheckpointStore(root / "run"), 1)
        if not disk.has_failed:
            break
        with durable.use_disk(healed):
            commit(CheckpointStore(root / "run"), 1)
        model = DiskModel(root)
        for operation in [*disk.operations, *healed.operations]:
            model.apply(operation)
        for rule, tree in model.states(random.Random(nth)):
            after = scratch.with_name("after")
            write_tree(tree, after)
            if CheckpointStore(after / "run").newest_verified()[0] is None:
                lost.append(f"{rule}, folder sync {nth} refused")
            shutil.rmtree(after)
    assert not lost


def test_the_only_checkpoint_is_never_out_of_reach_while_its_step_is_saved_again(scratch: Path) -> None:
    lost = []
    for nth in count(1):
        store = CheckpointStore(scratch.with_name(f"run-{nth}"))
        with durable.use_disk(QuickDisk()):
            commit(store, 1)
        try:
            with durable.use_disk(CuttingDisk(nth)):
                commit(store, 1)
        except Cut as cut:
            if CheckpointStore(store.folder.parent).newest_verified()[0] is None:
                lost.append(str(cut))
        else:
            break
    assert not lost


def test_events_whose_sync_failed_are_written_anew_before_they_are_believed(scratch: Path) -> None:
    run = RunFolder(scratch)
    scratch.mkdir()
    disk, healed = FailingDisk(errno.EIO, 1, kind="sync"), RecordingDisk()
    with durable.use_disk(disk):
        run.append("note", text="first")
        run.sync_events()
    with durable.use_disk(healed):
        run.append("note", text="second")
        run.sync_events()
    assert [event["text"] for event in run.events()] == ["first", "second"]
    assert not synced_after_failing([*disk.operations, *healed.operations])


def test_an_event_that_a_full_disk_took_in_part_is_there_once(scratch: Path) -> None:
    run = RunFolder(scratch)
    scratch.mkdir()
    with durable.use_disk(FailingDisk(errno.ENOSPC, 1, from_then_on=True)):
        waiting = [run.append("step", step=step) for step in (1, 2, 3)]
    with durable.use_disk(FailingDisk(errno.ENOSPC, 1, kind="write", in_part=True)):
        run.sync_events()
    run.sync_events()
    assert run.events() == waiting


def test_room_that_cannot_be_taken_for_another_reason_is_not_called_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "posix_fallocate", broken)
    with pytest.raises((DoesNotFit, OSError), match="Input/output error"):
        CheckpointStore(tmp_path / "run").reserve(1000)
