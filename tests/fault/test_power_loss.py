"""A power cut at any moment: every state that it can leave holds a whole, recent checkpoint and every synced event.

A run is recorded once; for each number of operations done, every state of power_loss.py is built and opened anew.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from power_loss import Tree, identity, states_after_cuts, write_tree
from recording_disk import Cut, CuttingDisk, Operation, QuickDisk, RecordingDisk
from saved_steps import bytes_of, commit, is_as_saved, left_over

from charkha.store import durable
from charkha.store.checkpoints import MANIFEST, Checkpoint, CheckpointStore
from charkha.store.runs import RunFolder

LOSSES = {1: 3.0, 2: 1.5}  # step 2 stays the best and is never removed
ROOM_BYTES = 20_000


@dataclass
class History:
    """What a run did, and after how many operations it had been promised."""

    operations: list[Operation]
    saved: list[tuple[int, int]] = field(default_factory=list)  # (operations done when save() returned, step)
    events: list[dict[str, Any]] = field(default_factory=list)
    synced: list[tuple[int, int]] = field(default_factory=list)  # (operations done, events synced by then)
    begun: list[dict[str, Any]] = field(default_factory=list)  # what plan.json was to hold, one after the other
    records: list[int] = field(default_factory=list)  # operations done when each of them was written

    def promised(self, done: int) -> tuple[int, int, int]:
        """(newest step saved, events synced, records written) after `done` operations."""
        return (
            max((step for at, step in self.saved if at <= done), default=0),
            max((count for at, count in self.synced if at <= done), default=0),
            sum(at <= done for at in self.records),
        )


Tell = Callable[[str, object], None]
Save = Callable[[CheckpointStore, int, float | None], Checkpoint]


class RecordedRun:
    """A run as training drives it, on a recording disk."""

    def __init__(self, folder: Path, disk: RecordingDisk, save: Save = commit) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.run, self.store, self._save = RunFolder(folder), CheckpointStore(folder), save
        self.history = History(disk.operations)

    def _now(self) -> int:
        return len(self.history.operations)

    def begin(self) -> None:
        self.write_record()
        self.store.clear()
        self.store.reserve(ROOM_BYTES)

    def note(self, name: str, **fields: Any) -> None:
        self.history.events.append(self.run.append(name, **fields))

    def sync_events(self) -> None:
        self.run.sync_events()
        self.history.synced.append((self._now(), len(self.history.events)))

    def write_record(self) -> None:
        record = {"version": len(self.history.begun), "text": "नमस्ते " * 150}
        self.history.begun.append(record)
        self.run.write_json(self.run.path / "plan.json", record)
        self.history.records.append(self._now())

    def step(self, step: int) -> None:
        """Some steps of training, then a checkpoint, with all that goes with it."""
        for number in range(3):
            self.note("step", step=step * 10 + number, loss=1 / step, text="x" * 300)
        checkpoint = self._save(self.store, step, LOSSES.get(step))
        self.history.saved.append((self._now(), step))
        self.store.prune(2, checkpoint)
        self.store.reserve(ROOM_BYTES)
        self.note("checkpoint", step=step)
        self.sync_events()


def record_a_run(folder: Path, steps: int, disk: RecordingDisk | None = None, save: Save = commit) -> History:
    """`steps` checkpoints, the same record rewritten every second one."""
    disk = disk or RecordingDisk()
    run = RecordedRun(folder / "run", disk, save)
    with durable.use_disk(disk):
        run.begin()
        for step in range(1, steps + 1):
            run.step(step)
            if step % 2:
                run.write_record()
    return run.history


def wrong_with(folder: Path, history: History, done: int) -> Iterator[str]:
    """What a run folder after a cut breaks of the promises made before it."""
    step, events, records = history.promised(done)
    found, skipped = CheckpointStore(folder).newest_verified()
    for entry in skipped:
        yield f"half a checkpoint has its proper name: {entry.path.name}: {entry.reason}"
    if found is None:
        if step:
            yield f"no checkpoint, though step {step} was saved"
    elif not is_as_saved(found):
        yield f"step {found.step} is not what was saved"
    elif found.step < step:
        yield f"step {found.step} is the newest, though step {step} was saved"
    read = RunFolder(folder).events()
    if not all(event in read for event in history.events[:events]):
        yield "a synced event is gone"
    if not all(event in history.events for event in read):
        yield "an event was never written"
    record = folder / "plan.json"
    if record.exists() or records:
        try:
            version = history.begun.index(json.loads(record.read_bytes()))
        except (OSError, ValueError) as error:
            yield f"plan.json is neither old nor new: {error!r}"
        else:
            if version < records - 1:
                yield f"plan.json has version {version}, though {records - 1} was written"


def wrong_afterwards(folder: Path) -> Iterator[str]:
    """What a run that goes on in the folder cannot do, or leaves behind."""
    store, run = CheckpointStore(folder), RunFolder(folder)
    before, events = store.newest_verified()[0], run.events()
    (folder / ".room-for-a-checkpoint").write_bytes(b"\0")  # taking room is no operation of the record
    with durable.use_disk(QuickDisk()):
        store.clear()
        event = run.append("note", text="went on")
        run.sync_events()
        store.prune(2, commit(store, 99))
    if left_over(store):
        yield f"left over: {left_over(store)}"
    if run.events() != [*events, event]:
        yield "a new event took another one with it"
    found, _ = store.newest_verified()
    if found is None or found.step != 99 or not is_as_saved(found):
        yield "the next checkpoint is not the newest"
    if before is not None and not (before.path / MANIFEST).exists():
        yield f"step {before.step}, from which the run went on, was removed by the first checkpoint after it"


def walk(
    history: History, root: Path, scratch: Path, *, go_on: bool = True, **which: int
) -> tuple[Counter[str], dict[str, str]]:
    """(states by rule, promise broken -> where first) for cuts into a recorded run; equal states are opened once."""
    trials: Counter[str] = Counter()
    broken: dict[str, str] = {}
    opened: set[tuple[int, tuple[int, int, int]]] = set()
    for done, rule, tree in states_after_cuts(history.operations, root, **which):
        trials[rule] += 1
        key = identity(tree), history.promised(done)
        if key in opened:
            continue
        opened.add(key)
        folder = run_folder_of(tree, scratch)
        for wrong in [*wrong_with(folder, history, done), *(wrong_afterwards(folder) if go_on else ())]:
            broken.setdefault(wrong, f"after {done} operations, {rule}")
        shutil.rmtree(scratch)
    trials["opened"] = len(opened)
    return trials, broken


def tell(record_property: Tell, trials: Counter[str], **counts: int) -> None:
    """Puts the numbers into the report of the test (`--junit-xml`)."""
    for name, number in {**trials, **counts}.items():
        record_property(name, number)


def run_folder_of(tree: Tree, scratch: Path) -> Path:
    write_tree(tree, scratch)
    (scratch / "run").mkdir(exist_ok=True)
    return scratch / "run"


def test_after_a_power_cut_at_any_moment_there_is_a_whole_and_recent_checkpoint_and_no_synced_event_is_lost(
    tmp_path: Path, scratch: Path, record_property: Tell
) -> None:
    history = record_a_run(tmp_path / "disk", steps=5)
    trials, broken = walk(history, tmp_path / "disk", scratch)
    tell(record_property, trials, operations=len(history.operations))
    assert not broken
    assert len(history.operations) > 150
    assert trials["last write torn at 512"] > 20


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
def test_many_random_states_after_a_power_cut(tmp_path: Path, scratch: Path, record_property: Tell, seed: int) -> None:
    history = record_a_run(tmp_path / "disk", steps=4 + seed)
    trials, broken = walk(history, tmp_path / "disk", scratch, seed=seed, random_states=10)
    tell(record_property, trials, operations=len(history.operations))
    assert not broken


# What the simulation must find: each of these breaks one rule of saving.


class DeafToSync(RecordingDisk):
    """A disk on which files are never synced."""

    def sync(self, file: BinaryIO) -> None:
        """Nothing."""


class DeafToFolderSync(RecordingDisk):
    """A disk on which the names in folders are never synced."""

    def sync_folder(self, folder: Path) -> None:
        """Nothing."""


def manifest_first(store: CheckpointStore, step: int, eval_loss: float | None) -> Checkpoint:
    """The manifest is written to the final folder before the files that it names."""
    staged = commit(CheckpointStore(store.folder.parent / "aside"), step, eval_loss)
    target = store.folder / f"step-{step:06d}"
    durable.make_folder(target / "inner")
    for name in (MANIFEST, *bytes_of(step)):
        durable.write_file(target / name, [(staged.path / name).read_bytes()])
        durable.sync_folder((target / name).parent)
    return Checkpoint(target, step, staged.files, eval_loss)


def old_ones_removed_first(store: CheckpointStore, step: int, eval_loss: float | None) -> Checkpoint:
    """Room is made before the new checkpoint is there."""
    for folder in store.folder.glob("step-*"):
        durable.remove_folder(folder)
    return commit(store, step, eval_loss)


@pytest.mark.parametrize(
    ("disk", "save", "found"),
    [
        (DeafToSync, commit, "half a checkpoint has its proper name"),
        (DeafToSync, commit, "though step 3 was saved"),
        (DeafToSync, commit, "a synced event is gone"),
        (DeafToSync, commit, "plan.json is neither old nor new"),
        (DeafToFolderSync, commit, "though step 3 was saved"),
        (RecordingDisk, manifest_first, "half a checkpoint has its proper name"),
        (RecordingDisk, old_ones_removed_first, "no checkpoint, though step 2 was saved"),
    ],
)
def test_the_simulation_finds_a_broken_save(
    tmp_path: Path, scratch: Path, disk: type[RecordingDisk], save: Save, found: str
) -> None:
    history = record_a_run(tmp_path / "disk", steps=3, disk=disk(), save=save)
    _, broken = walk(history, tmp_path / "disk", scratch, go_on=False)
    assert any(found in wrong for wrong in broken), broken


def test_a_record_written_in_place_is_found_torn(tmp_path: Path, scratch: Path) -> None:
    disk = RecordingDisk()
    run = RecordedRun(tmp_path / "disk" / "run", disk)
    with durable.use_disk(disk):
        run.write_record()
        durable.write_file(run.run.path / "plan.json", [b'{"version": 1}'])
    run.history.begun.append({"version": 1})
    run.history.records.append(len(disk.operations))
    _, broken = walk(run.history, tmp_path / "disk", scratch, go_on=False)
    assert any("plan.json is neither old nor new" in wrong for wrong in broken), broken


# Names that are not on the disk when a promise depends on them.


def test_events_synced_before_the_first_checkpoint_survive_a_cut(tmp_path: Path, scratch: Path) -> None:
    disk = RecordingDisk()
    run = RecordedRun(tmp_path / "disk" / "run", disk)
    with durable.use_disk(disk):
        run.begin()
        run.note("status", status="running")
        run.sync_events()
    _, broken = walk(run.history, tmp_path / "disk", scratch, go_on=False)
    assert not broken


def test_the_name_of_a_new_run_folder_is_on_the_disk_before_anything_is_promised(tmp_path: Path) -> None:
    disk = RecordingDisk()
    run = RunFolder(tmp_path / "runs" / "first")
    with durable.use_disk(disk), run.lock():
        run.write_json(run.manifest_path, {})
    made = [(operation.kind, operation.path) for operation in disk.operations]
    assert ("sync_folder", run.path.parent) in made
    assert ("sync_folder", tmp_path) in made


def test_a_removal_that_was_killed_is_on_the_disk_before_its_files_go(scratch: Path) -> None:
    root, disk = scratch.with_name("disk"), RecordingDisk()
    run = RecordedRun(root / "run", disk)
    with durable.use_disk(disk):
        run.step(1)
        run.step(2)
        doomed = run.store.folder / "step-000001"
        disk.rename(doomed, durable.removed_name(doomed))  # and dies here
        begun = len(disk.operations)
        CheckpointStore(root / "run").clear()
    _, broken = walk(run.history, root, scratch, go_on=False, first=begun, random_states=50)
    assert not broken


def killed_and_gone_on(root: Path, nth: int) -> tuple[History, int, bool]:
    """(record of a run killed before its nth operation and gone on with, operations when that began, was it killed)."""
    disk, killed = CuttingDisk(nth), False
    first = RecordedRun(root / "run", disk)
    try:
        with durable.use_disk(disk):
            first.begin()
            for step in (1, 2, 3):
                first.step(step)
    except Cut:
        killed = True
    again = RecordingDisk()
    again.operations = disk.operations  # one record of both lives
    second = RecordedRun(root / "run", again)
    second.history = first.history
    begun = len(disk.operations)
    with durable.use_disk(again):
        second.store.clear()
        second.store.reserve(ROOM_BYTES)
        second.step(7)
    return second.history, begun, killed


def wrong_after_kill_and_cut(
    scratch: Path, *, cut_every: int, random_states: int
) -> tuple[int, Counter[str], dict[str, str]]:
    """(kills, states by rule, promise broken -> where first), the run killed before each of its operations."""
    trials: Counter[str] = Counter()
    broken: dict[str, str] = {}
    for nth in count(1):
        root = scratch.with_name(f"disk-{nth}")
        history, begun, killed = killed_and_gone_on(root, nth)
        if not killed:
            return nth - 1, trials, broken
        which = {"first": begun + nth % cut_every, "every": cut_every, "random_states": random_states, "seed": nth}
        seen, wrong = walk(history, root, scratch, go_on=False, **which)
        trials += seen
        for what, where in wrong.items():
            broken.setdefault(what, f"killed before operation {nth} of {begun}+, {where}")
        shutil.rmtree(root)
    raise AssertionError("never reached")


def test_a_power_cut_after_a_kill_and_a_new_start_takes_nothing_that_was_saved(
    scratch: Path, record_property: Tell
) -> None:
    kills, trials, broken = wrong_after_kill_and_cut(scratch, cut_every=30, random_states=1)
    tell(record_property, trials, kills=kills)
    assert not broken


@pytest.mark.long
def test_a_power_cut_at_any_moment_after_a_kill_takes_nothing_that_was_saved(
    scratch: Path, record_property: Tell
) -> None:
    kills, trials, broken = wrong_after_kill_and_cut(scratch, cut_every=2, random_states=4)
    tell(record_property, trials, kills=kills)
    assert not broken
