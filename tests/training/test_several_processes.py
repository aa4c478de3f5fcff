"""Two gloo processes train one model: as one process would, with one writer, and none of them outlives another."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from charkha.errors import ConfigError
from charkha.store.runs import RunFolder
from charkha.training.launch import RankLost
from charkha.training.supervisor import Patience, supervise, worker_command

MakeProject = Callable[..., Any]
TWO = {"devices": {"processes": 2}}
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="gloo on the loopback of Linux")


def others() -> list[int]:
    """Further processes of any run that this process started, also through a worker."""
    import psutil

    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            command = child.cmdline()
        except psutil.Error:
            continue
        if "charkha.training.rank" in command:
            found.append(child.pid)
    return found


def steps(run: Path) -> list[tuple[int, float, float]]:
    return [(e["step"], e["loss"], e["grad_norm"]) for e in RunFolder(run).events() if e["event"] == "step"]


def assert_equal(left: dict[str, Any], right: dict[str, Any]) -> None:
    import torch

    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def test_two_processes_take_the_steps_of_one_and_a_killed_one_costs_only_the_steps_since_the_checkpoint(
    project: MakeProject,
) -> None:
    from charkha.training.session import train

    work = project(adapter={"lora_dropout": 0.0})
    one, _ = work.train(output="one")
    two, seen = work.train("devices.processes=2", output="two")
    assert any("devices.strategy: ddp" in event.get("text", "") for event in seen)
    assert others() == []
    assert_same_path(work, one, two)
    killed: list[float] = []

    def observe(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 3:
            os.kill(others()[0], signal.SIGKILL)
            killed.append(time.monotonic())

    with pytest.raises(RankLost, match="process 2 of 2 was killed by SIGKILL"):
        train(work.config, ["devices.processes=2", "output=cut"], observe)
    assert time.monotonic() - killed[0] < 10
    last = RunFolder(work.run_folder("cut")).events()[-1]
    assert (last["status"], last["kind"]) == ("failed", "rank_lost")
    work.train("devices.processes=2", output="cut")
    assert steps(work.run_folder("cut")) == steps(work.run_folder("two"))
    assert_equal(work.weights("cut"), work.weights("two"))


def assert_same_path(work: Any, one: Any, two: Any) -> None:
    import torch

    assert (two.status, two.tokens, two.steps) == ("done", one.tokens, one.steps)
    for (step, loss, norm), (same_step, same_loss, same_norm) in zip(
        steps(work.run_folder("one")), steps(work.run_folder("two")), strict=True
    ):
        assert step == same_step
        assert same_loss == pytest.approx(loss, rel=1e-5)
        assert same_norm == pytest.approx(norm, rel=1e-4)
    assert two.eval_loss_after == pytest.approx(one.eval_loss_after, rel=1e-5)
    left, right = work.weights("one"), work.weights("two")
    assert all(torch.allclose(left[name], right[name], rtol=1e-3, atol=1e-6) for name in left)


@pytest.mark.long
@pytest.mark.parametrize(
    "sections",
    [
        {"training": {"micro_batch_size": 3}},
        {"data": {"packing": True}},
        {"adapter": {"method": "full"}},
        {"training": {"gradient_checkpointing": True, "loss_head": "chunked"}},
    ],
    ids=["not evenly divided", "packed", "full", "checkpointing, chunked head"],
)
def test_two_processes_take_the_steps_that_one_takes(project: MakeProject, sections: dict[str, Any]) -> None:
    sections = {**sections, "adapter": {"lora_dropout": 0.0, **sections.get("adapter", {})}}
    work = project(**sections)
    one, _ = work.train(output="one")
    two, _ = work.train("devices.processes=2", output="two")
    assert_same_path(work, one, two)


@pytest.mark.long
def test_every_process_drops_out_other_numbers(project: MakeProject) -> None:
    """With the same rows in both, the same dropout would make two processes worth no more than one."""
    from charkha.store.checkpoints import CheckpointStore

    work = project(**TWO)
    work.train(stop_at=2)
    checkpoint, _ = CheckpointStore(work.run_folder()).newest_verified()
    assert checkpoint is not None
    first, second = (checkpoint.path / name for name in ("rng.safetensors", "rng-1.safetensors"))
    assert first.read_bytes() != second.read_bytes()


@pytest.mark.long
@pytest.mark.parametrize("sections", [{}, {"model": {"quantization": "nf4"}, "data": {"packing": True}}])
def test_a_stopped_run_of_two_ends_as_if_it_had_never_been_stopped(
    project: MakeProject, sections: dict[str, Any]
) -> None:
    work = project(**TWO, **sections)
    work.train(output="whole")
    paused, _ = work.train(output="cut", stop_at=3)
    assert (paused.status, paused.steps) == ("paused", 3)
    assert others() == []
    work.train(output="cut")
    assert steps(work.run_folder("cut")) == steps(work.run_folder("whole"))
    assert_equal(work.weights("cut"), work.weights("whole"))
    assert_equal(work.checkpoint_tensors("cut"), work.checkpoint_tensors("whole"))


@pytest.mark.long
def test_a_process_that_hangs_is_ended_with_all_others_when_the_run_gives_no_sign(
    project: MakeProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    work = project(**TWO)
    work.train(output="whole")
    monkeypatch.delenv("CHARKHA_FOREGROUND")
    run = RunFolder(work.run_folder("cut"))
    stopped: list[int] = []

    def stop_one() -> None:
        while not any(event["event"] == "step" and event["step"] >= 3 for event in run.events()):
            time.sleep(0.05)
        stopped.extend(others())
        os.kill(stopped[0], signal.SIGSTOP)

    thread = threading.Thread(target=stop_one)
    thread.start()
    said: list[str] = []
    command = worker_command(work.config, ["--set", "output=cut"])
    began = time.monotonic()
    assert supervise(command, run, said.append, Patience(first_pause_s=0.01, silence_s=8)) == 0
    thread.join()
    assert "gave no sign for" in said[0]
    assert len(said) == 1
    assert time.monotonic() - began < 90
    assert stopped[0] not in others()
    assert steps(run.path) == steps(work.run_folder("whole"))


@pytest.mark.long
def test_a_killed_first_process_takes_the_others_with_it_and_the_supervisor_starts_all_again(
    project: MakeProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    import psutil

    work = project(**TWO)
    work.train(output="whole")
    monkeypatch.delenv("CHARKHA_FOREGROUND")
    run = RunFolder(work.run_folder("cut"))
    orphans: list[int] = []

    def kill_the_worker() -> None:
        while not any(event["event"] == "step" and event["step"] >= 3 for event in run.events()):
            time.sleep(0.05)
        worker = next(child for child in psutil.Process().children() if "charkha" in child.cmdline())
        orphans.extend(child.pid for child in worker.children())
        worker.kill()
        time.sleep(2)
        orphans[:] = [pid for pid in orphans if psutil.pid_exists(pid)]

    thread = threading.Thread(target=kill_the_worker)
    thread.start()
    said: list[str] = []
    command = worker_command(work.config, ["--set", "output=cut"])
    assert supervise(command, run, said.append, Patience(first_pause_s=0.01)) == 0
    thread.join()
    assert "SIGKILL" in said[0]
    assert orphans == []
    assert steps(run.path) == steps(work.run_folder("whole"))
    assert_equal(work.weights("cut"), work.weights("whole"))


@pytest.mark.long
def test_an_error_of_the_first_process_is_told_as_its_own_and_leaves_no_other_behind(project: MakeProject) -> None:
    from charkha.errors import DoesNotFit
    from charkha.training.session import train

    def observe(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 2:
            raise DoesNotFit("the first process ran out of something")

    with pytest.raises(DoesNotFit, match="ran out of something"):
        train(project(**TWO).config, [], observe)
    assert others() == []


@pytest.mark.long
def test_rows_that_turn_out_to_leak_are_trained_unpacked_by_two_as_by_one(
    project: MakeProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Falcon's documents see each other; what is known of it is taken away, so that the loaded model must tell."""
    from charkha.training import packing_choice

    monkeypatch.setattr(packing_choice, "LEAK", {})
    for rule in ("_not_worth_it", "_too_few_steps"):
        monkeypatch.setattr(packing_choice, rule, lambda *args: None)
    work = project("falcon", **TWO)
    result, seen = work.train()
    assert result.status == "done"
    assert any("data.packing: True" in event.get("text", "") for event in seen)
    assert any("data.packing: False" in event.get("text", "") for event in seen)


def test_what_goes_wrong_in_another_process_is_told_as_there(project: MakeProject, tmp_path: Path) -> None:
    """The second process finds a shard that is not what its name says."""
    work = project(**TWO)

    def observe(event: dict[str, Any]) -> None:
        if event["event"] == "status":  # all is planned, no other process is started yet
            for shard in work.run_folder().glob("data/train-*"):
                shard.write_bytes(b"damaged")

    from charkha.training.session import train

    with pytest.raises(RankLost, match=r"process 2 of 2: .*shard"):
        train(work.config, [], observe)


@pytest.mark.long
def test_a_run_may_go_on_with_another_number_of_processes_when_told_to(project: MakeProject) -> None:
    from charkha.errors import RunOfAnotherConfig
    from charkha.training.session import train

    work = project()
    work.train(stop_at=2)
    with pytest.raises(RunOfAnotherConfig, match=r"devices\.processes: 1 in the run, 2 now"):
        work.train("devices.processes=2")
    result = train(work.config, ["devices.processes=2"], lambda event: None, accept_changes=True)
    assert (result.status, result.steps) == ("done", 6)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"devices": {"processes": 2, "strategy": "single"}}, "single is one process"),
        ({"devices": {"processes": 9}}, "batch_size 8 has fewer rows"),
        ({"devices": {"strategy": "fsdp"}}, "fsdp"),
    ],
)
def test_processes_that_cannot_be_are_refused_before_the_base_is_loaded(
    project: MakeProject, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        project(**sections).train()
