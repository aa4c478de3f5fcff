"""The parent of a run: starts the worker, and starts it again after a crash, a kill, a hang or too little GPU memory.

It imports no backend, so a dead CUDA cannot take it along. The worker runs in a session of its own: a terminal's Ctrl-C
reaches this process alone and is handed on once. All it knows of the worker is the exit code, the last events, and a
heartbeat file; the run itself goes on from its newest verified checkpoint, as after any other stop.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any

from charkha.errors import EnvironmentProblem, Paused, TrainingFailed
from charkha.store.control import Control
from charkha.store.runs import RunFolder
from charkha.training.fallback import next_fallback
from charkha.training.signals import under_nohup
from charkha.units import format_seconds

CRASHED = 1  # an exit code that is our bug, or the library's
# What the worker's last `status` event may say of a failure; see session.py.
OUT_OF_MEMORY, GPU_LOST, RANK_LOST = "out_of_memory", "gpu_lost", "rank_lost"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Patience:
    """How often and how soon a worker is started again, in seconds where it is a time."""

    fruitless_restarts: int = 4  # in a row, none of which got a step further
    first_pause_s: float = 1.0
    longest_pause_s: float = 60.0
    first_sign_s: float = 3600.0  # loading a large model from a slow disk gives no sign
    silence_s: float = 1800.0  # the longest micro batch, evaluation batch or save
    look_s: float = 0.2


@dataclass
class _Past:
    """What happened so far."""

    restarts: int = 0
    fruitless: int = 0
    step: int = 0
    reasons: list[str] = field(default_factory=list)


def supervise(
    command: Sequence[str], run: RunFolder, say: Say, patience: Patience | None = None, answer: IO[bytes] | None = None
) -> int:
    """Runs `command` (a worker of the run) until it ends for good; its exit code.

    `answer`, an open file, holds afterwards what the last worker wrote to its standard output, and nothing of those
    before it; without, all of them write to ours. Raises TrainingFailed for a worker that keeps dying without getting
    on, EnvironmentProblem for a GPU that only a restart of the machine brings back.
    """
    patience = patience or Patience()
    past = _Past(step=_last_step(run))
    while True:
        if answer is not None:
            answer.seek(0)
            answer.truncate()
        code, cause = _run_once(command, run, patience, answer)
        if cause is None:
            return code
        change = _decide_restart(run, cause, past, patience)
        pause = min(patience.longest_pause_s, patience.first_pause_s * 2 ** max(past.fruitless - 1, 0))
        words = "was out of GPU memory" if cause == OUT_OF_MEMORY else cause
        ways = ", ".join(f"{key}: {value}" for key, value in change.items())
        with_it = f" with {ways}" if ways else ""
        text = f"the worker {words}; it is started again{with_it} in {format_seconds(pause)} (restart {past.restarts})"
        run.append("status", status="restarting", reason=text, **({"fallback": change} if change else {}))
        say(text)
        time.sleep(pause)


def _run_once(
    command: Sequence[str], run: RunFolder, patience: Patience, answer: IO[bytes] | None
) -> tuple[int, str | None]:
    """(exit code, why it is worth another try); the latter None when that is the end of it."""
    said_before = len(_statuses(run))
    with (
        subprocess.Popen(list(command), start_new_session=True, stdout=answer) as worker,
        _hand_on_signals(worker) as asked,
    ):
        hung = _wait(worker, Control(run.path), patience)
    code = worker.returncode
    said = _statuses(run)[said_before:]
    if said and said[-1]["status"] in ("done", "paused"):  # whatever went wrong after that, the run has what it wants
        return (0 if said[-1]["status"] == "done" else Paused.exit_code), None
    if hung is not None:
        return code, None if asked else f"gave no sign for {format_seconds(hung)} and was killed"
    if code < 0 and not asked:
        return code, f"was killed by {_signal_name(-code)}"
    told = _failure(said)
    if told in (OUT_OF_MEMORY, GPU_LOST):
        return code, told
    if told == RANK_LOST and not asked:
        return code, f"lost another one: {said[-1]['reason']}"
    if code == CRASHED and not asked:
        return code, "crashed"
    return (code if code >= 0 else 128 - code), None  # as a shell counts a death by signal


def _wait(worker: subprocess.Popen[Any], control: Control, patience: Patience) -> float | None:
    """Returns when the worker has ended: None, or the seconds of silence after which it was killed."""
    beat, since, limit = control.last_beat(), time.monotonic(), patience.first_sign_s
    while True:
        try:
            worker.wait(timeout=patience.look_s)
            return None
        except subprocess.TimeoutExpired:
            pass
        now = control.last_beat()
        if now != beat:
            beat, since, limit = now, time.monotonic(), patience.silence_s
        silent = time.monotonic() - since
        if silent > limit:
            worker.kill()
            worker.wait()
            return silent


def _decide_restart(run: RunFolder, cause: str, past: _Past, patience: Patience) -> dict[str, Any]:
    """What is given up for memory at the next start; notes the restart in `past`.

    Raises when another try would be of no use.
    """
    if cause == GPU_LOST:
        raise EnvironmentProblem(
            "the GPU has fallen off the bus; every checkpoint so far is safe",
            where=str(run.path),
            remedy="shut the machine down, wait, start it (a reset is not enough), and run the same command again",
        )
    change = next_fallback(run) if cause == OUT_OF_MEMORY else {}  # raises TrainingFailed where none is left
    step = _last_step(run)
    past.fruitless = 0 if step > past.step or cause == OUT_OF_MEMORY else past.fruitless + 1
    past.step = max(past.step, step)
    past.restarts += 1
    past.reasons.append(cause)
    if past.fruitless > patience.fruitless_restarts:
        raise TrainingFailed(
            f"the worker ended {past.fruitless} times in a row without getting past step {past.step}: "
            + "; ".join(past.reasons[-past.fruitless :]),
            where=str(run.path),
            remedy="look at the messages above; `charkha --debug train CONFIG --foreground` shows the whole error",
        )
    return change


@contextmanager
def _hand_on_signals(worker: subprocess.Popen[Any]) -> Iterator[list[int]]:
    """Each SIGINT, SIGTERM and SIGHUP of ours goes on to the worker; yields those that did."""
    asked: list[int] = []

    def hand_on(number: int, _frame: FrameType | None) -> None:
        asked.append(number)
        if worker.poll() is None:
            worker.send_signal(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, hand_on) for number in numbers if not under_nohup(number)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _last_step(run: RunFolder) -> int:
    """The last step of the run, whether or not it is in a checkpoint; 0 before the first."""
    return max((event["step"] for event in run.events() if event["event"] == "step"), default=0)


def _statuses(run: RunFolder) -> list[dict[str, Any]]:
    return [event for event in run.events() if event["event"] == "status"]


def _failure(said: list[dict[str, Any]]) -> str | None:
    """The kind of failure that the worker wrote down before it ended, among what it said since it was started."""
    last = said[-1] if said else {}
    return last.get("kind") if last.get("status") == "failed" else None


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def worker_command(config: Path, arguments: Sequence[str], *, debug: bool = False) -> list[str]:
    """The command line of a worker: this very program, in the foreground, blind to modules in the working folder."""
    program = [sys.executable, "-P", "-m", "charkha", *(["--debug"] if debug else [])]
    return [*program, "train", str(config), *arguments, "--foreground", "--follow-parent", str(os.getpid())]
