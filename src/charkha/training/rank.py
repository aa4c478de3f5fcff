"""`python -m charkha.training.rank FILE`: one further process of a run on several devices. See launch.py."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from charkha.backends.base import Order, Place
from charkha.data.shards import open_shard
from charkha.store.checkpoints import CheckpointStore, read_manifest
from charkha.training.launch import FAILURE, READY, STOP_SIGNALS, RankWork, failure_file, failure_of, told_file
from charkha.training.signals import end_with_parent


class _Follower:
    """What this process is told at step boundaries comes from the first one; it has no orders of its own."""

    def order(self, step_seconds: float) -> Order:
        """Nothing."""
        return Order()

    def beat(self) -> None:
        """Nothing: the first process waits for this one at every step, so its heartbeat is that of all."""


def main(path: Path) -> int:
    """Trains as the file says; the exit code. What goes wrong is left in a file beside it."""
    for number in STOP_SIGNALS:  # a service manager tells every process to end; the first one decides
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    told = told_file.validate_json(path.read_bytes())
    end_with_parent(told.parent, signal.SIGKILL)
    failure = path.with_name(FAILURE.format(rank=told.rank))

    def fails(error: BaseException) -> None:
        """Tells and leaves at once: tearing NCCL down may wait for the first process, which waits for this one."""
        failure.write_bytes(failure_file.dump_json(failure_of(error)))
        os._exit(1)

    place = Place(told.rank, told.count, told.meeting, fails=fails)
    try:
        _train(told.work, place, path.with_name(READY.format(rank=told.rank)))
    except Exception as error:  # noqa: BLE001  told to the first process, whatever it is
        fails(error)
    return 0


def _train(work: RankWork, place: Place, ready: Path) -> None:
    from charkha.backends.torch.quiet import quiet_libraries

    quiet_libraries()
    from charkha.backends.torch.trainer import train

    store = CheckpointStore(work.run)
    shards = (open_shard(work.train_shard), None if work.eval_shard is None else open_shard(work.eval_shard))
    resume_from = None if work.resume_from is None else read_manifest(work.resume_from)
    ready.touch()
    train(
        work.base,
        work.adapter,
        work.plan,
        train_shard=shards[0],
        eval_shard=shards[1],
        fingerprint=work.fingerprint,
        pad_id=work.pad_id,
        store=store,
        resume_from=resume_from,
        steering=_Follower(),
        record=lambda name, **fields: None,
        final_folder=store.staging,
        place=place,
    )


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
