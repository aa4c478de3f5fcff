"""A system clock that jumps a year ahead, back to 2000 and by hours, under real runs that are killed in between.

libfaketime gives the process a clock that this test sets while it trains; the monotonic clock is left alone, as a
system clock that jumps leaves it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from charkha.store.checkpoints import CheckpointStore
from charkha.store.runs import RunFolder

MakeProject = Callable[..., Any]
JUMPS = ("+365d", "-9490d", "-1h", "+0", "+40d", "-3600d")
LIBRARY = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)


@pytest.mark.long
@pytest.mark.skipif(LIBRARY is None, reason="libfaketime is not installed (make fault-tools)")
def test_a_clock_that_jumps_changes_neither_the_choice_of_checkpoint_nor_a_duration(
    project: MakeProject, tmp_path: Path
) -> None:
    work = project(training={"max_steps": 12, "eval_every": 100}, checkpoint={"every": "1 steps"})
    work.train(output="whole")
    clock = tmp_path / "clock"
    run = RunFolder(work.run_folder("cut"))
    for start in range(3):
        clock.write_text(JUMPS[2 * start] + "\n")
        _train_until_killed(work, run, clock, last=4 * start + 3, jump=JUMPS[2 * start + 1])
        newest, skipped = CheckpointStore(run.path).newest_verified()
        assert newest is not None
        assert newest.step >= _last(run, "checkpoint"), "never older than what was told to be saved"
        assert not skipped
    clock.write_text("-1d\n")
    assert subprocess.run(_command(work), env=_environment(clock), capture_output=True, check=False).returncode == 0
    assert _steps(run) == _steps(RunFolder(work.run_folder("whole")))
    whole, cut = work.weights("whole"), work.weights("cut")
    assert all(bool((whole[name] == cut[name]).all()) for name in whole)
    events = run.events()
    years = {time.gmtime(event["time_unix_s"]).tm_year for event in events}
    assert len(years) >= 3, "the clock really jumped"
    seconds = [event[key] for event in events for key in ("seconds", "blocked_seconds") if key in event]
    assert all(0 <= duration < 60 for duration in seconds)


def _command(work: Any) -> list[str]:
    return [sys.executable, "-P", "-m", "charkha", "train", str(work.config), "--set", "output=cut", "--foreground"]


def _environment(clock: Path) -> dict[str, str]:
    faked = {"LD_PRELOAD": str(LIBRARY), "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1"}
    return {**os.environ, **faked, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}


def _train_until_killed(work: Any, run: RunFolder, clock: Path, *, last: int, jump: str) -> None:
    """Lets the clock jump a step before `last`, and kills the process once that step is saved."""
    process = subprocess.Popen(_command(work), env=_environment(clock), stdout=subprocess.DEVNULL)
    jumped = False
    until = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < until:
        if _last(run, "step") >= last - 1 and not jumped:
            clock.write_text(jump + "\n")
            jumped = True
        if _last(run, "checkpoint") >= last:
            process.send_signal(signal.SIGKILL)
            process.wait()
        time.sleep(0.005)
    assert process.returncode == -signal.SIGKILL


def _last(run: RunFolder, name: str) -> int:
    return max((event["step"] for event in run.events() if event["event"] == name), default=0)


def _steps(run: RunFolder) -> list[tuple[int, float, float]]:
    """Each step as it stands in the end, without those that were taken again."""
    return [(event["step"], event["loss"], event["grad_norm"]) for event in run.events() if event["event"] == "step"]
