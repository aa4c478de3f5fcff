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
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter

from charkha.backends.base import AdapterSpec, BaseModelSpec, Place, StepPlan
from charkha.errors import CharkhaError, TrainingFailed

WORK, READY, FAILURE = "{rank}-work.json", "{rank}-ready", "{rank}-failure.json"
_LOOK_S = 0.1
_FIRST_MAY_TELL_S = 10.0  # the first process's own error, which a torn connection gives it at once with gloo
_LAST_WORDS_S = 60.0  # the others free their memory after the last step


@dataclass(frozen=True)
class RankWork:
    """What every process of a run is told. Plain values, so that a file carries it."""

    base: BaseModelSpec
    adapter: AdapterSpec
    plan: StepPlan
    train_shard: Path
    eval_shard: Path | None
    fingerprint: str
    pad_id: int
    run: Path
    resume_from: Path | None
    place: Place


@dataclass(frozen=True)
class RankFailure:
    """Why a further process ended, in its own words."""

    kind: str
    message: str
    remedy: str | None


class RankLost(TrainingFailed):
    """One of several processes ended; the supervisor starts the run again."""

    kind = "rank_lost"


work_file: TypeAdapter[RankWork] = TypeAdapter(RankWork)
failure_file: TypeAdapter[RankFailure] = TypeAdapter(RankFailure)


@contextmanager
def other_ranks(work: RankWork, count: int, give_up: Callable[[TrainingFailed], None]) -> Iterator[Place]:
    """Starts processes 1 to `count` - 1 and yields the place of this one, the first.

    Raises RankLost when one of them ends before the block does. `give_up` is called, from another thread, when this
    process does not come out of the block by itself soon after that: it must end the process.
    """
    if count == 1:
        yield Place()
        return
    folder = Path(tempfile.mkdtemp(prefix="charkha-ranks-"))
    others = _Others(folder, [_start(work, rank, count, folder) for rank in range(1, count)], give_up)
    try:
        others.wait_until_ready()
        yield Place(0, count, folder / "meeting")
        others.let_end()
    except Exception as error:
        loss = others.wait_for_loss(_FIRST_MAY_TELL_S / 2) if not isinstance(error, TrainingFailed) else None
        if loss is not None:
            raise loss from error
        raise
    finally:
        others.end()
        shutil.rmtree(folder, ignore_errors=True)


def _start(work: RankWork, rank: int, count: int, folder: Path) -> subprocess.Popen[bytes]:
    told = folder / WORK.format(rank=rank)
    told.write_bytes(work_file.dump_json(replace(work, place=Place(rank, count, folder / "meeting"))))
    environment = dict(os.environ)
    if work.base.device == "cuda":
        environment["CUDA_VISIBLE_DEVICES"] = _visible_device(rank, environment.get("CUDA_VISIBLE_DEVICES"))
    command = [sys.executable, "-P", "-m", "charkha.training.rank", str(told)]
    # A session of its own: a terminal's Ctrl-C is for the first process, which agrees on the end with the others.
    return subprocess.Popen(command, env=environment, stdout=2, start_new_session=True)


def _visible_device(rank: int, visible: str | None) -> str:
    """The one GPU that a process is to see, as its device 0."""
    return str(rank) if not visible else visible.split(",")[rank].strip()


class _Others:
    """The further processes, and the thread that looks whether they live."""

    def __init__(
        self, folder: Path, processes: list[subprocess.Popen[bytes]], give_up: Callable[[TrainingFailed], None]
    ) -> None:
        self._folder = folder
        self._processes = processes
        self._give_up = give_up
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ranks", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(_LOOK_S):
            loss = self._loss()
            if loss is not None:
                if not self._over.wait(_FIRST_MAY_TELL_S):
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
        which = f"process {rank + 1} of {len(self._processes) + 1}"
        try:
            failure = failure_file.validate_json((self._folder / FAILURE.format(rank=rank)).read_bytes())
        except (OSError, ValueError):
            return RankLost(f"{which} {how}", remedy="run the same command again; it goes on from the last checkpoint")
        loss = RankLost(f"{which}: {failure.message}", remedy=failure.remedy)
        loss.kind = failure.kind
        return loss

    def wait_until_ready(self) -> None:
        """Returns when every process is about to meet the others. Raises RankLost for one that does not get so far."""
        for rank in range(1, len(self._processes) + 1):
            while not (self._folder / READY.format(rank=rank)).exists():
                loss = self._loss()
                if loss is not None:
                    raise loss
                time.sleep(_LOOK_S)

    def wait_for_loss(self, seconds: float) -> TrainingFailed | None:
        """The loss of a process, waited for a while: its death may be seen here before the system tells of it."""
        until = time.monotonic() + seconds
        while (loss := self._loss()) is None and time.monotonic() < until:
            time.sleep(_LOOK_S)
        return loss

    def let_end(self) -> None:
        """Waits a while for the others to end by themselves, as they do after the last step."""
        until = time.monotonic() + _LAST_WORDS_S
        while any(process.poll() is None for process in self._processes) and time.monotonic() < until:
            time.sleep(_LOOK_S)

    def end(self) -> None:
        """Ends what is left of them at once; all that counts is with the first process."""
        self._over.set()
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        if self._thread is not threading.current_thread():
            self._thread.join()


def failure_of(error: BaseException) -> RankFailure:
    """An error as it is told to the first process."""
    if isinstance(error, CharkhaError):
        return RankFailure(error.kind, error.message, error.remedy)
    return RankFailure(RankLost.kind, f"{type(error).__name__}: {error}", None)
