"""The further processes of a run on several devices: started by the first, watched, and ended with it.

The first process is the worker that holds the run's lock and did all the planning. The others are told everything in
one file, know nothing of config or data preparation, and die with it. When one of them dies, the first must not wait
for it in the middle of an addition for ever: it ends in bounded time, and the supervisor starts all of them again.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from charkha.backends.base import AdapterSpec, BaseModelSpec, PeerGone, Place, StepPlan
from charkha.errors import CharkhaError, TrainingFailed

WORK, READY, FAILURE = "{rank}-work.json", "{rank}-ready", "{rank}-failure.json"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LOOK_S = 0.1
_DEAD_END_S = 10.0  # of waiting for a process that is gone; with gloo the wait ends at once, with NCCL never
_CAUSE_S = 5.0  # until the system tells of a death whose torn connection was seen already
_LAST_WORDS_S = 60.0  # the others free their memory after the last step


@dataclass(frozen=True)
class RankWork:
    """What a further process is told. Plain values, so that a file carries it."""

    base: BaseModelSpec
    adapter: AdapterSpec
    plan: StepPlan
    train_shard: Path
    eval_shard: Path | None
    fingerprint: str
    pad_id: int
    run: Path
    resume_from: Path | None


@dataclass(frozen=True)
class _Told:
    """The file of one process."""

    work: RankWork
    rank: int
    count: int
    meeting: Path
    parent: int  # process id of the first, with which it ends


@dataclass(frozen=True)
class RankFailure:
    """Why a further process ended, in its own words."""

    kind: str
    message: str
    remedy: str | None


class RankLost(TrainingFailed):
    """One of several processes ended; the supervisor starts the run again."""

    kind = "rank_lost"


told_file: TypeAdapter[_Told] = TypeAdapter(_Told)
failure_file: TypeAdapter[RankFailure] = TypeAdapter(RankFailure)


@contextmanager
def other_ranks(work: RankWork, count: int, give_up: Callable[[TrainingFailed], None]) -> Iterator[Place]:
    """Starts processes 1 to `count` - 1 and yields the place of this one, the first.

    An error of the block is what is raised, unless it only says that another process is gone: then RankLost, with what
    that one said. `give_up` is called from another thread when this process waits for one that is gone and does not
    come back from that; it must end the process.
    """
    if count == 1:
        yield Place()
        return
    others = _Others(count, give_up)
    try:
        others.start(work)
        yield Place(0, count, others.meeting, waits=others.first_waits, fails=others.first_failed)
        others.let_end()
    except PeerGone as error:
        raise others.wait_for_loss(_CAUSE_S) from error
    finally:
        others.end()


class _Others:
    """The further processes, and the thread that looks whether they live."""

    def __init__(self, count: int, give_up: Callable[[TrainingFailed], None]) -> None:
        self._count = count
        self._folder = Path(tempfile.mkdtemp(prefix="charkha-ranks-"))
        self.meeting = self._folder / "meeting"
        self._processes: list[subprocess.Popen[bytes]] = []
        self._give_up = give_up
        self._over = threading.Event()
        self._waits_since: float | None = None
        self._failed = False
        self._thread = threading.Thread(target=self._watch, name="ranks", daemon=True)

    def start(self, work: RankWork) -> None:
        """Returns when every process is about to meet the others. Raises RankLost for one that does not get so far."""
        for rank in range(1, self._count):
            self._processes.append(self._start(work, rank))
        self._thread.start()
        for rank in range(1, self._count):
            while not (self._folder / READY.format(rank=rank)).exists():
                loss = self._loss()
                if loss is not None:
                    raise loss
                time.sleep(_LOOK_S)

    def _start(self, work: RankWork, rank: int) -> subprocess.Popen[bytes]:
        path = self._folder / WORK.format(rank=rank)
        path.write_bytes(told_file.dump_json(_Told(work, rank, self._count, self.meeting, os.getpid())))
        environment = dict(os.environ)
        if work.base.device == "cuda":
            environment["CUDA_VISIBLE_DEVICES"] = _visible_device(rank, environment.get("CUDA_VISIBLE_DEVICES"))
        command = [sys.executable, "-P", "-m", "charkha.training.rank", str(path)]
        # In a session of its own, and deaf until it has said itself that it will not listen: a Ctrl-C of the terminal
        # or a service manager's SIGTERM is for the first process, which agrees on the end with the others.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            return subprocess.Popen(command, env=environment, stdout=2, start_new_session=True)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def first_waits(self, waiting: bool) -> None:
        """Told when the first process begins and ends to wait for all others."""
        self._waits_since = time.monotonic() if waiting else None

    def first_failed(self, error: BaseException) -> None:
        """Told of its error: the others, which may wait for it for ever, are ended before it leaves them."""
        self._failed = True
        if not isinstance(error, PeerGone):
            self._kill()

    def _watch(self) -> None:
        """A death counts only while the first process waits for the dead: a save is finished, a disk waited for."""
        lost_at: float | None = None
        while not self._over.wait(_LOOK_S) and not self._failed:
            loss, since = self._loss(), self._waits_since
            if loss is None:
                continue
            lost_at = lost_at or time.monotonic()
            if since is not None and time.monotonic() - max(since, lost_at) > _DEAD_END_S:
                self._kill()
                self._remove_folder()
                self._give_up(loss)
                return

    def _loss(self) -> TrainingFailed | None:
        for rank, process in enumerate(self._processes, start=1):
            code = process.poll()
            if code is not None and code != 0:
                return self._told(rank, code)
        return None

    def _told(self, rank: int, code: int) -> TrainingFailed:
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        which = f"process {rank + 1} of {self._count}"
        try:
            failure = failure_file.validate_json((self._folder / FAILURE.format(rank=rank)).read_bytes())
        except (OSError, ValueError):
            return RankLost(f"{which} {how}", remedy="run the same command again; it goes on from the last checkpoint")
        loss = RankLost(f"{which}: {failure.message}", remedy=failure.remedy)
        loss.kind = failure.kind
        return loss

    def wait_for_loss(self, seconds: float) -> TrainingFailed:
        """The loss of a process, waited for a while: its torn connection may be seen before the system tells of it."""
        until = time.monotonic() + seconds
        while (loss := self._loss()) is None and time.monotonic() < until:
            time.sleep(_LOOK_S)
        return loss or RankLost("the connection to the other processes is lost")

    def let_end(self) -> None:
        """Waits a while for the others to end by themselves, as they do after the last step."""
        until = time.monotonic() + _LAST_WORDS_S
        while any(process.poll() is None for process in self._processes) and time.monotonic() < until:
            time.sleep(_LOOK_S)

    def end(self) -> None:
        """Ends what is left of them at once; all that counts is with the first process."""
        self._over.set()
        self._kill()
        if self._thread.is_alive():
            self._thread.join()
        self._remove_folder()

    def _kill(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def _remove_folder(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


def _visible_device(rank: int, visible: str | None) -> str:
    """The one GPU that a process is to see, as its device 0."""
    return str(rank) if not visible else visible.split(",")[rank].strip()


def failure_of(error: BaseException) -> RankFailure:
    """An error as it is told to the first process."""
    if isinstance(error, CharkhaError):
        return RankFailure(error.kind, error.message, error.remedy)
    return RankFailure(RankLost.kind, f"{type(error).__name__}: {error}", None)
