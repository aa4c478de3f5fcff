"""The parent of a run: what it starts again, what it does not, and that a run it watches ends with the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from charkha.errors import EnvironmentProblem, TrainingFailed
from charkha.store.runs import RunFolder
from charkha.training.fallback import applied_fallbacks, next_fallback
from charkha.training.supervisor import Patience, supervise

MakeProject = Callable[..., Any]
QUICK = Patience(
    fruitless_restarts=2, first_pause_s=0.01, longest_pause_s=0.02, first_sign_s=20, silence_s=0.6, look_s=0.02
)
WORKER = """
import os, signal, sys, time
from pathlib import Path
from charkha.store.control import Control
from charkha.store.runs import RunFolder
run = RunFolder(Path(sys.argv[1]))
count = run.path / "starts"
start = int(count.read_text()) + 1 if count.exists() else 1
count.write_text(str(start))
def step(number):
    run.append("step", step=number, total_steps=9, loss=1.0, tokens=1, seconds=0.1, tokens_per_second=1.0)
def failed(kind):
    run.append("status", status="failed", reason=kind, kind=kind)
"""


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.write_json(folder.manifest_path, {"base": {}, "data": {}, "plan": {"micro_batch_size": 4}})
    return folder


def watch(run: RunFolder, script: str, patience: Patience = QUICK) -> tuple[int, list[str]]:
    """(exit code, what was said) of a worker that does `script`; `start` counts its starts from 1."""
    said: list[str] = []
    return supervise([sys.executable, "-c", WORKER + script, str(run.path)], run, said.append, patience), said


def starts(run: RunFolder) -> int:
    return int((run.path / "starts").read_text())


@pytest.mark.parametrize("code", [0, 2, 3, 4, 5, 6, 7, 75])
def test_a_worker_that_ends_for_a_reason_is_not_started_again(run: RunFolder, code: int) -> None:
    assert watch(run, f"sys.exit({code})") == (code, [])
    assert starts(run) == 1


@pytest.mark.parametrize(
    ("death", "word"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("raise ZeroDivisionError", "crashed"),
    ],
)
def test_a_worker_that_dies_is_started_again_and_the_reason_is_recorded(run: RunFolder, death: str, word: str) -> None:
    code, said = watch(run, f"step(start)\nif start < 3: {death}")
    assert (code, starts(run), len(said)) == (0, 3, 2)
    assert word in said[0]
    restarts = [event for event in run.events() if event.get("status") == "restarting"]
    assert [event["reason"] for event in restarts] == said


def test_the_answer_is_that_of_the_last_worker_alone(run: RunFolder, tmp_path: Path) -> None:
    script = "print('worker', start, flush=True)\nstep(start)\nif start < 3: sys.exit(1)"
    command = [sys.executable, "-c", WORKER + script, str(run.path)]
    with (tmp_path / "answer").open("w+b") as answer:
        assert supervise(command, run, lambda text: None, QUICK, answer) == 0
        answer.seek(0)
        assert answer.read() == b"worker 3\n"


def test_a_worker_that_gets_nowhere_is_given_up_with_its_reasons(run: RunFolder) -> None:
    with pytest.raises(TrainingFailed, match=r"3 times in a row without .* step 0: crashed; crashed") as caught:
        watch(run, "sys.exit(1)")
    assert caught.value.exit_code == 7
    assert starts(run) == 3


def test_getting_on_counts_more_than_dying(run: RunFolder) -> None:
    assert watch(run, "step(start)\nif start < 7: sys.exit(1)")[0] == 0
    assert starts(run) == 7


def test_a_worker_without_a_sign_of_life_is_killed_and_started_again(run: RunFolder) -> None:
    script = "Control(run.path).beat()\nif start == 1: time.sleep(60)\ntime.sleep(0.3)"
    began = time.monotonic()
    code, said = watch(run, script)
    assert (code, starts(run)) == (0, 2)
    assert "gave no sign for" in said[0]
    assert time.monotonic() - began < 15


def test_a_worker_that_shows_signs_is_left_alone_for_as_long_as_it_takes(run: RunFolder) -> None:
    assert watch(run, "for _ in range(12): Control(run.path).beat(); time.sleep(0.2)") == (0, [])


CHUNKED, RECOMPUTED = {"training.loss_head": "chunked"}, {"training.gradient_checkpointing": "full"}
HALVED = [{"training.micro_batch_size": 2}, {"training.micro_batch_size": 1}]


def test_out_of_memory_takes_the_fallbacks_of_the_plan_in_order_until_none_is_left(run: RunFolder) -> None:
    run.write_json(run.path / "plan.json", {"fallbacks": [CHUNKED, RECOMPUTED, *HALVED]})
    code, said = watch(run, "if start < 4: failed('out_of_memory'); sys.exit(3)")
    assert code == 0
    restarts = [event["fallback"] for event in run.events() if event.get("status") == "restarting"]
    assert restarts == [CHUNKED, RECOMPUTED, HALVED[0]]
    assert "with training.gradient_checkpointing: full" in said[1]
    assert applied_fallbacks(run) == CHUNKED | RECOMPUTED | HALVED[0]
    kept = json.loads((run.path / "fallback.json").read_text())["steps"]
    assert [step["change"] for step in kept] == restarts
    assert kept[2]["reason"] == "out of memory at micro_batch_size 4, gradient_checkpointing True, loss_head chunked"
    with pytest.raises(TrainingFailed, match="with one row"):
        watch(run, "failed('out_of_memory'); sys.exit(3)")
    assert applied_fallbacks(run)["training.micro_batch_size"] == 1


def test_fallbacks_that_change_nothing_are_passed_over(run: RunFolder) -> None:
    run.write_json(run.path / "plan.json", {"fallbacks": [{"training.micro_batch_size": 8}, *HALVED]})
    assert next_fallback(run) == HALVED[0]


def test_inputs_go_to_host_memory_before_micro_batches_shrink(run: RunFolder) -> None:
    moved = {"devices.offload": "activations"}
    run.write_json(run.path / "plan.json", {"fallbacks": [RECOMPUTED, moved, *HALVED]})
    assert [next_fallback(run) for _ in range(3)] == [RECOMPUTED, moved, HALVED[0]]


def test_a_run_of_an_earlier_version_goes_on_where_it_was(run: RunFolder) -> None:
    """It has no list, and remembers micro batches alone."""
    run.write_json(run.path / "fallback.json", {"micro_batch_size": 2, "reason": "out of GPU memory at 4"})
    assert applied_fallbacks(run) == HALVED[0]
    assert [next_fallback(run) for _ in range(3)] == [CHUNKED, RECOMPUTED, HALVED[1]]


@pytest.mark.parametrize(("status", "code"), [("done", 0), ("paused", 75)])
def test_a_crash_after_the_run_has_what_it_wants_starts_nothing(run: RunFolder, status: str, code: int) -> None:
    script = f"run.append('status', status='{status}')\nos.kill(os.getpid(), signal.SIGSEGV)"
    assert watch(run, script) == (code, [])
    assert starts(run) == 1


def test_an_earlier_failure_is_not_taken_for_this_one(run: RunFolder) -> None:
    run.append("status", status="failed", reason="x", kind="out_of_memory")
    assert watch(run, "sys.exit(3)") == (3, [])


def test_a_lost_gpu_is_not_tried_again_and_again(run: RunFolder) -> None:
    with pytest.raises(EnvironmentProblem, match="fallen off the bus") as caught:
        watch(run, "failed('gpu_lost'); sys.exit(5)")
    assert "shut the machine down" in (caught.value.remedy or "")
    assert starts(run) == 1


def supervised(work: Any, output: str) -> subprocess.Popen[str]:
    """`charkha train` as a user starts it."""
    environment = {name: value for name, value in os.environ.items() if name != "CHARKHA_FOREGROUND"}
    command = [sys.executable, "-m", "charkha", "train", str(work.config), "--set", f"output={output}", "--json"]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def worker_of(parent: subprocess.Popen[str]) -> int:
    import psutil

    return int(psutil.Process(parent.pid).children()[0].pid)


def wait_for_step(run: Path, step: int) -> None:
    for _ in range(600):
        if any(event["event"] == "step" and event["step"] >= step for event in RunFolder(run).events()):
            return
        time.sleep(0.1)
    pytest.fail(f"no step {step} in a minute")


def slow_project(project: MakeProject) -> Any:
    """Sixty steps of some milliseconds each, and a checkpoint every third."""
    return project(
        training={"max_steps": 60, "eval_every": 100, "batch_size": 16, "micro_batch_size": 2},
        checkpoint={"every": "3 steps"},
    )


def test_a_killed_worker_goes_on_by_itself_and_ends_with_the_same_bits(project: MakeProject) -> None:
    import torch

    work = slow_project(project)
    work.train(output="whole")
    with supervised(work, "cut") as parent:
        wait_for_step(work.run_folder("cut"), 5)
        os.kill(worker_of(parent), signal.SIGKILL)
        out, err = parent.communicate(timeout=120)
    assert parent.returncode == 0, err
    assert "was killed by SIGKILL" in err
    result = json.loads(out)
    assert (result["status"], result["resumes"]) == ("done", 1)
    left, right = work.weights("cut"), work.weights("whole")
    assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())


def test_ctrl_c_reaches_the_worker_once_and_a_dead_supervisor_takes_its_worker_along(project: MakeProject) -> None:
    work = slow_project(project)
    with supervised(work, "run") as parent:
        wait_for_step(work.run_folder(), 2)
        parent.send_signal(signal.SIGINT)
        out, err = parent.communicate(timeout=60)
    assert parent.returncode == 75, err
    assert json.loads(out)["status"] == "paused"
    with supervised(work, "run") as parent:
        wait_for_step(work.run_folder(), json.loads(out)["steps"] + 2)
        worker = worker_of(parent)
        parent.kill()
        for _ in range(300):
            if not RunFolder(work.run_folder()).is_locked():
                break
            time.sleep(0.1)
    assert not RunFolder(work.run_folder()).is_locked(), f"worker {worker} still trains"
    assert RunFolder(work.run_folder()).events()[-1]["status"] == "paused"
