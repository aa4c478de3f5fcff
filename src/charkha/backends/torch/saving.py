"""When a checkpoint is due, how it is taken, and what happens when the disk does not take it.

Snapshots are made at optimizer-step boundaries. Where host memory has room for a copy, files are written by another
thread while training goes on; otherwise training waits. A disk that is full, read-only or gone stops neither the
process nor the state in memory: the run waits, says so, and saves as soon as it can.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from charkha.backends.base import Recorder, Steering, StepPlan
from charkha.backends.torch.state import snapshot, snapshot_bytes
from charkha.errors import DoesNotFit, RunDamaged
from charkha.store.checkpoints import Checkpoint, CheckpointStore, NewFile
from charkha.units import format_seconds

# `checkpoint.every: auto`: saving takes at most this share of the run, and a minute's work is not worth a save.
_SHARE_OF_RUN = 0.01
_SHORTEST_S = 60.0
_PROMISED_S = 300.0  # auto says so when it cannot keep to this
_RETRY_S = 5.0
_DISK_TROUBLE = frozenset(
    {
        errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ENOENT, errno.ENOTDIR, errno.EACCES,
        errno.EPERM, errno.ENODEV, errno.ESTALE, errno.ENOTCONN, errno.ENXIO, errno.ETIMEDOUT,
    }
)  # fmt: skip


@dataclass(frozen=True)
class _Written:
    """What one save cost; `seconds` until it was on the disk and verified."""

    checkpoint: Checkpoint
    seconds: float
    reserve_problem: str | None


class Saver:
    """The checkpoints of one call of `train`."""

    def __init__(
        self,
        trainer: Any,
        plan: StepPlan,
        store: CheckpointStore,
        record: Recorder,
        steering: Steering,
    ) -> None:
        self._trainer = trainer
        self._plan = plan
        self._store = store
        self._record = record
        self._steering = steering
        self._bytes = snapshot_bytes(trainer.model)  # until the first checkpoint tells
        self._blocked_s = 0.0  # of the last save: how long training stood still for it
        self._saved_at = time.monotonic()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: tuple[int, float, Future[_Written]] | None = None
        self._trouble: Exception | None = None  # of a save beside training, to be waited out at this boundary
        self._told_of_rare_saves = False

    def begin(self) -> None:
        """Clears what a crash left and takes the room of the first checkpoint. Raises DoesNotFit without it."""
        self._store.clear()
        self._store.reserve(self._bytes)
        self._saved_at = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether this step boundary is one to save at."""
        if self._trouble is not None:
            return True
        if self._plan.checkpoint_steps is not None:
            return step % self._plan.checkpoint_steps == 0
        return time.monotonic() - self._saved_at >= self._interval_s()

    def _interval_s(self) -> float:
        if self._plan.checkpoint_seconds is not None:
            return self._plan.checkpoint_seconds
        interval = max(_SHORTEST_S, self._blocked_s / _SHARE_OF_RUN)
        if interval > _PROMISED_S and not self._told_of_rare_saves:
            self._told_of_rare_saves = True
            text = (
                f"checkpoint.every auto: a save takes {format_seconds(self._blocked_s)}, so there is one every "
                f"{format_seconds(interval)} to keep saving under 1 % of the run; set checkpoint.every to lose less"
            )
            self._record("note", text=text)
        return interval

    def save(self, step: int, random_files: Sequence[NewFile], *, eval_loss: float | None, wait: bool) -> None:
        """Takes a checkpoint of this step. With `wait` it is on the disk, verified, when this returns.

        `random_files` hold the random numbers of every process. Raises DoesNotFit when the disk does not take it and a
        stop is asked for meanwhile.
        """
        self.collect(wait=True)
        began = time.monotonic()
        behind = not wait and self._trouble is None and _room_for_copy(self._bytes)
        if behind:
            files = [*snapshot(self._trainer, copy=True), *random_files]
            self._pending = (step, began, self._thread.submit(self._write, step, files, eval_loss))
            self._blocked_s = time.monotonic() - began
        else:
            self._write_or_wait(step, random_files, eval_loss, began)
        self._saved_at = time.monotonic()

    def collect(self, *, wait: bool = False) -> None:
        """Records what the other thread has written meanwhile; with `wait`, after it is done."""
        if self._pending is None or not (wait or self._pending[2].done()):
            return
        began = time.monotonic()
        step, _taken_at, future = self._pending
        self._pending = None
        try:
            written = future.result()
        except (DoesNotFit, RunDamaged, OSError) as error:
            if not _is_disk_trouble(error):
                raise
            # The snapshot is gone and an older one would be of no more use: the state of now is saved instead.
            self._trouble = error
            return
        self._blocked_s += time.monotonic() - began if wait else 0.0
        self._tell(step, written, self._blocked_s)

    def close(self) -> None:
        """Ends the other thread; what it is writing is finished first, and recorded."""
        self._thread.shutdown(wait=True)
        if self._pending is None:
            return
        step, _began, future = self._pending
        self._pending = None
        try:
            self._tell(step, future.result(), self._blocked_s)
        except (DoesNotFit, RunDamaged, OSError) as error:  # training has ended already, for a reason of its own
            self._record("note", text=f"the checkpoint of step {step} could not be written: {error}")

    def _write_or_wait(self, step: int, random_files: Sequence[NewFile], eval_loss: float | None, began: float) -> None:
        while True:
            try:
                if self._trouble is None:
                    written = self._write(step, [*snapshot(self._trainer, copy=False), *random_files], eval_loss)
                    break
            except (DoesNotFit, RunDamaged, OSError) as error:
                if not _is_disk_trouble(error):
                    raise
                self._trouble = error
            self._wait_for_disk(self._trouble)
            self._trouble = None
        self._blocked_s = time.monotonic() - began
        self._tell(step, written, self._blocked_s)

    def _write(self, step: int, files: list[NewFile], eval_loss: float | None) -> _Written:
        """Saves, verifies, removes what is no longer kept, and takes the room for the next one."""
        began = time.monotonic()
        checkpoint = self._store.save(step, files, eval_loss=eval_loss)
        self._store.prune(self._plan.checkpoints_kept, checkpoint)
        problem = None
        try:
            self._store.reserve(checkpoint.total_bytes)
        except DoesNotFit as full:
            problem = full.message  # this one is safe; the next save will wait for room
        return _Written(checkpoint, time.monotonic() - began, problem)

    def _tell(self, step: int, written: _Written, blocked_s: float) -> None:
        self._bytes = written.checkpoint.total_bytes
        if written.reserve_problem:
            self._record("note", text=f"the disk is nearly full: {written.reserve_problem}")
        self._record(
            "checkpoint",
            step=step,
            path=str(written.checkpoint.path),
            bytes=self._bytes,
            seconds=round(written.seconds, 3),
            blocked_seconds=round(blocked_s, 3),
        )

    def _wait_for_disk(self, trouble: Exception) -> None:
        """Returns after a while, to try again. Raises DoesNotFit when a stop is asked for meanwhile."""
        reason = trouble.message if isinstance(trouble, (DoesNotFit, RunDamaged)) else str(trouble)
        self._record("status", status="waiting", reason=reason, step=self._trainer.state.global_step)
        text = f"waiting for the disk: {reason}. Nothing is lost: the run goes on by itself as soon as it can save"
        self._record("note", text=text)
        until = time.monotonic() + _RETRY_S
        while (left := until - time.monotonic()) > 0:
            self._steering.beat()
            if self._steering.order(0.0).stop:
                raise DoesNotFit(
                    f"stopped while the disk did not take a checkpoint: {reason}",
                    where=str(self._store.folder),
                    remedy="make room on this disk and run the same command again; it goes on from the last checkpoint",
                ) from trouble
            time.sleep(min(left, 0.1))


def _is_disk_trouble(error: Exception) -> bool:
    if isinstance(error, (DoesNotFit, RunDamaged)):  # RunDamaged: what was written reads back as something else
        return True
    return isinstance(error, OSError) and error.errno in _DISK_TROUBLE


def _room_for_copy(size: int) -> bool:
    """Whether host memory holds a second copy with as much to spare."""
    import psutil

    return bool(psutil.virtual_memory().available > 2 * size)
