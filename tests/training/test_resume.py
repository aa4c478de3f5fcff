"""Interrupted + resumed = uninterrupted, bit for bit, for every kind of run."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from charkha.errors import DoesNotFit, RunDamaged, RunFolderError, RunOfAnotherConfig, TrainingFailed
from charkha.store.checkpoints import MANIFEST, CheckpointStore
from charkha.store.runs import RunFolder

MakeProject = Callable[..., Any]


def assert_equal(left: dict[str, Any], right: dict[str, Any]) -> None:
    import torch

    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


def steps(run: Path) -> list[tuple[int, float, float, float]]:
    """(step, loss, gradient norm, learning rate) of the run as it stands."""
    return [
        (event["step"], event["loss"], event["grad_norm"], event["learning_rate"])
        for event in RunFolder(run).events()
        if event["event"] == "step"
    ]


KINDS: dict[str, dict[str, Any]] = {
    "lora with dropout": {},
    "full": {"adapter": {"method": "full"}},
    "full with tied weights": {"base": "qwen2", "adapter": {"method": "full"}},
    "nf4, evaluated before the checkpoint": {"model": {"quantization": "nf4"}, "training": {"eval_every": 1}},
    "gradient checkpointing": {"training": {"gradient_checkpointing": True}},
    "bf16": {"model": {"dtype": "bf16"}},
    "nf4 in bf16": {"model": {"dtype": "bf16", "quantization": "nf4"}},
}


LONG_KINDS = ("full", "bf16", "gradient checkpointing")  # which others hold too


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.long) if kind in LONG_KINDS else kind for kind in KINDS]
)
def test_a_stopped_run_ends_as_if_it_had_never_been_stopped(project: MakeProject, kind: str) -> None:
    work = project(**KINDS[kind])
    whole, _ = work.train(output="whole")
    paused, _ = work.train(output="cut", stop_at=3)
    assert (paused.status, paused.steps, paused.adapter) == ("paused", 3, None)
    resumed, _ = work.train(output="cut")
    assert (resumed.status, resumed.steps, resumed.resumes) == ("done", 6, 1)
    assert steps(work.run_folder("cut")) == steps(work.run_folder("whole"))
    assert_equal(work.weights("cut"), work.weights("whole"))
    assert_equal(work.checkpoint_tensors("cut"), work.checkpoint_tensors("whole"))
    assert (resumed.tokens, resumed.loss_first, resumed.loss_last) == (whole.tokens, whole.loss_first, whole.loss_last)
    assert resumed.eval_loss_before == whole.eval_loss_before
    assert resumed.eval_loss_after == whole.eval_loss_after


def test_a_run_stopped_after_every_step_still_ends_the_same(project: MakeProject) -> None:
    work = project(training={"max_steps": 4}, checkpoint={"keep": 1})
    work.train(output="whole")
    for step in (1, 2, 3):
        assert work.train(output="cut", stop_at=step)[0].steps == step
    work.train(output="cut")
    assert steps(work.run_folder("cut")) == steps(work.run_folder("whole"))
    assert_equal(work.weights("cut"), work.weights("whole"))


def test_an_epoch_boundary_may_be_crossed_by_a_resume(project: MakeProject) -> None:
    """32 rows in batches of 7: five steps an epoch, the last one short."""
    work = project(training={"batch_size": 7, "micro_batch_size": 2, "max_steps": 8})
    work.train(output="whole")
    work.train(output="cut", stop_at=5)
    work.train(output="cut")
    assert steps(work.run_folder("cut")) == steps(work.run_folder("whole"))
    assert_equal(work.weights("cut"), work.weights("whole"))


def test_steps_lost_with_a_kill_are_taken_again_and_counted_once(project: MakeProject) -> None:
    """A stop without a save: the second Ctrl-C."""
    work = project()
    whole, _ = work.train(output="whole")

    from charkha.training.session import train

    def observe(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 5:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    paused = train(work.config, ["output=cut"], observe)
    assert paused.status == "paused"
    resumed, _ = work.train(output="cut")
    assert [
        event["from_step"] for event in RunFolder(work.run_folder("cut")).events() if event["event"] == "resume"
    ] == [4]
    assert steps(work.run_folder("cut")) == steps(work.run_folder("whole"))
    assert resumed.tokens == whole.tokens
    assert_equal(work.weights("cut"), work.weights("whole"))


def test_a_finished_run_is_not_trained_again(project: MakeProject) -> None:
    work = project(training={"max_steps": 2})
    first, _ = work.train()
    before = work.weights()
    again, events = work.train()
    assert again.status == "done"
    assert again.resumes == 0
    assert (again.loss_last, again.adapter) == (first.loss_last, first.adapter)
    assert any("nothing to train" in event.get("text", "") for event in events)
    assert_equal(work.weights(), before)


def test_a_cut_between_the_last_checkpoint_and_the_adapter_is_made_good(
    project: MakeProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    from charkha.training import outputs

    work = project(training={"max_steps": 2})
    work.train(output="whole")

    def cut(*args: object) -> None:
        raise KeyError("the power is gone")

    with monkeypatch.context() as patch:
        patch.setattr(outputs, "write_companions", cut)
        with pytest.raises(KeyError):
            work.train(output="cut")
    assert not (work.run_folder("cut") / "adapter").exists(), "an unfinished adapter must not look finished"
    result, _ = work.train(output="cut")
    assert result.status == "done"
    assert_equal(work.weights("cut"), work.weights("whole"))
    assert "trained" in RunFolder(work.run_folder("cut")).read_manifest()


def test_a_longer_run_does_not_change_the_data_order_of_its_first_steps(project: MakeProject) -> None:
    work = project(training={"lr_scheduler_type": "constant", "max_steps": 2})
    work.train(output="short")
    work.train("training.max_steps=4", output="long")
    assert steps(work.run_folder("long"))[:2] == steps(work.run_folder("short"))


def test_the_dtypes_of_trained_tensors_are_the_same_before_and_after_a_resume(
    project: MakeProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    from charkha.backends.torch import state

    work = project(model={"dtype": "bf16", "quantization": "nf4"})
    work.train(stop_at=2)
    load = state.load_weights
    seen: list[set[str]] = []

    def spy(model: Any, folder: Path) -> None:
        for moment in ("before", "after"):
            if moment == "after":
                load(model, folder)
            seen.append({str(parameter.dtype) for _, parameter in state.trainable(model)})

    monkeypatch.setattr(state, "load_weights", spy)
    work.train()
    assert seen == [{"torch.float32"}, {"torch.float32"}]


CHANGES = {
    "training.learning_rate": "training.learning_rate=1e-5",
    "training.seed": "training.seed=1",
    "adapter.r": "adapter.r=2",
    "training.batch_size": "training.batch_size=4",
    "trainer": "trainer.adam_beta1=0.5",
    "data.train_on": "data.train_on=all",
}


def test_a_run_goes_on_only_with_the_settings_data_and_base_it_began_with(
    project: MakeProject, model_folder: Callable[..., Path]
) -> None:
    work = project()
    work.train(stop_at=2)
    records = {
        path: path.read_bytes() for path in (work.run_folder() / "charkha.yaml", work.run_folder() / "manifest.json")
    }
    for key, override in CHANGES.items():
        with pytest.raises(RunOfAnotherConfig, match=key.replace(".", r"\.")) as caught:
            work.train(override)
        assert caught.value.exit_code == 6
    other = model_folder("llama", seed=1)
    with pytest.raises(RunOfAnotherConfig, match="base"):
        work.train(f"model.base={other}")
    rows = work.folder / "rows.jsonl"
    original = rows.read_text()
    rows.write_text(original.replace("TEA", "COFFEE"))
    with pytest.raises(RunOfAnotherConfig, match="data"):
        work.train()
    rows.write_text(original)
    assert {path: path.read_bytes() for path in records} == records
    assert work.train("checkpoint.every=1 steps", "cost.currency=EUR")[0].status == "done"


def test_another_machine_version_or_rate_is_accepted_when_told_so_and_remembered(
    project: MakeProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    from charkha.training import continuing

    work = project()
    work.train(stop_at=2)
    versions = continuing.package_versions() | {"transformers": "9.9.9"}
    monkeypatch.setattr(continuing, "package_versions", lambda: versions)
    with pytest.raises(RunOfAnotherConfig, match=r"transformers: .* in the run, 9\.9\.9 now") as caught:
        work.train("training.learning_rate=1e-5")
    assert "training.learning_rate" in str(caught.value)
    assert "--accept-changes" in (caught.value.remedy or "")
    from charkha.training.session import train

    overrides = ["training.learning_rate=1e-5", "output=run"]
    notes: list[str] = []
    result = train(work.config, overrides, lambda event: notes.append(str(event.get("text"))), accept_changes=True)
    assert result.status == "done"
    assert sum(text.startswith("accepted: ") for text in notes) == 2
    (accepted,) = RunFolder(work.run_folder()).read_manifest()["accepted"]
    assert accepted["step"] == 2
    assert len(accepted["changes"]) == 2
    assert train(work.config, overrides, lambda event: None).status == "done", "nothing differs any more"


def test_what_the_saved_state_does_not_fit_is_never_accepted(project: MakeProject) -> None:
    from charkha.training.session import train

    work = project()
    work.train(stop_at=2)
    for override in ("adapter.r=2", "training.batch_size=4", "training.seed=1", "training.optimizer=sgd"):
        with pytest.raises(RunOfAnotherConfig) as caught:
            train(work.config, [override, "output=run"], lambda event: None, accept_changes=True)
        assert "--accept-changes" not in (caught.value.remedy or "")


def test_another_base_in_the_same_folder_is_noticed(
    project: MakeProject, new_model: Callable[..., Path], tmp_path: Path
) -> None:
    base = new_model(tmp_path / "base")
    work = project(base)
    work.train(stop_at=2)
    shutil.rmtree(base)
    new_model(base, seed=5)
    with pytest.raises(RunOfAnotherConfig, match="base"):
        work.train()


def cut_short(path: Path) -> None:
    weights = next(path.glob("adapter_model.safetensors"))
    os.truncate(weights, weights.stat().st_size // 2)


def test_a_damaged_newest_checkpoint_falls_back_to_the_older_and_ends_with_the_same_weights(
    project: MakeProject,
) -> None:
    work = project()
    work.train(output="whole")
    work.train(output="cut", stop_at=5)
    checkpoints = sorted((work.run_folder("cut") / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == ["step-000004", "step-000005"]
    cut_short(checkpoints[-1])
    _, events = work.train(output="cut")
    assert any("passed over" in event.get("text", "") and "step-000005" in event["text"] for event in events)
    assert [event["from_step"] for event in events if event["event"] == "resume"] == [4]
    assert steps(work.run_folder("cut")) == steps(work.run_folder("whole"))
    assert_equal(work.weights("cut"), work.weights("whole"))


def test_when_every_checkpoint_is_damaged_nothing_is_overwritten(project: MakeProject) -> None:
    work = project()
    work.train(stop_at=4)
    folders = sorted((work.run_folder() / "checkpoints").iterdir())
    for folder in folders:
        (folder / MANIFEST).unlink()
    with pytest.raises(RunDamaged, match="step-000004") as caught:
        work.train()
    assert caught.value.exit_code == 6
    assert sorted((work.run_folder() / "checkpoints").iterdir()) == folders


@pytest.mark.parametrize("lost", ["optimizer.safetensors", "rng.json", "trainer_state.json", "scheduler.json"])
def test_a_checkpoint_that_lacks_any_of_its_files_is_not_used(project: MakeProject, lost: str) -> None:
    work = project()
    work.train(stop_at=4)
    (work.run_folder() / "checkpoints" / "step-000004" / lost).unlink()
    checkpoint, skipped = CheckpointStore(work.run_folder()).newest_verified()
    assert checkpoint is not None
    assert checkpoint.step == 2
    assert lost in skipped[0].reason


def test_lost_shards_of_a_run_are_made_again(project: MakeProject) -> None:
    work = project()
    work.train(output="whole")
    work.train(output="cut", stop_at=3)
    (train,) = (work.run_folder("cut") / "data").glob("train-*")
    os.truncate(train, train.stat().st_size // 2)
    work.train(output="cut", stop_at=4)
    for shard in (work.run_folder("cut") / "data").iterdir():
        shard.unlink()
    work.train(output="cut")
    assert_equal(work.weights("cut"), work.weights("whole"))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is tried again at once."""
    from charkha.backends.torch import saving

    monkeypatch.setattr(saving, "_RETRY_S", 0.05)


def texts(events: list[dict[str, Any]], name: str) -> list[str]:
    return [event.get("text") or event.get("status") for event in events if event["event"] == name]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("trouble", [28, 30, 5, 122], ids=["full", "read-only", "input/output error", "over quota"])
@pytest.mark.parametrize("behind", [False, True], ids=["while training waits", "by the other thread"])
def test_a_disk_that_does_not_take_a_checkpoint_is_waited_for_and_nothing_is_lost(
    project: MakeProject, monkeypatch: pytest.MonkeyPatch, trouble: int, behind: bool
) -> None:
    from charkha.backends.torch import saving

    monkeypatch.setattr(saving, "_room_for_copy", lambda size: behind)
    work = project()
    work.train(output="whole")
    tries: list[int] = []
    save = CheckpointStore.save

    def fails_three_times(store: CheckpointStore, step: int, files: Any, **rest: Any) -> Any:
        tries.append(step)
        if 4 <= step < 6 and len(tries) < 5:
            raise OSError(trouble, os.strerror(trouble))
        return save(store, step, files, **rest)

    monkeypatch.setattr(CheckpointStore, "save", fails_three_times)
    result, events = work.train(output="cut")
    assert result.status == "done"
    assert tries[0] == 2
    assert len(tries) >= 5
    assert_equal(work.weights("cut"), work.weights("whole"))
    assert "waiting" in texts(events, "status")
    assert any("waiting for the disk" in text for text in texts(events, "note"))
    assert [number for number, *_rest in steps(work.run_folder("cut"))] == [1, 2, 3, 4, 5, 6]


@pytest.mark.usefixtures("impatient")
def test_a_stop_while_the_disk_is_full_ends_with_3_and_the_earlier_checkpoint_stands(
    project: MakeProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    import signal

    from charkha.store import durable

    work = project()
    work.train(output="whole")
    free = durable.free_bytes

    def fills_up(path: Path) -> int:
        if (work.run_folder("cut") / "checkpoints/step-000002").exists():
            signal.raise_signal(signal.SIGTERM)
            return 10
        return free(path)

    with monkeypatch.context() as patch:
        patch.setattr(durable, "free_bytes", fills_up)
        with pytest.raises(DoesNotFit, match="10 B free") as caught:
            work.train(output="cut")
    assert caught.value.exit_code == 3
    newest, skipped = CheckpointStore(work.run_folder("cut")).newest_verified()
    assert newest is not None
    assert (newest.step, skipped) == (2, [])
    assert work.train(output="cut")[0].status == "done"
    assert_equal(work.weights("cut"), work.weights("whole"))


def test_without_room_for_a_checkpoint_no_step_is_taken(project: MakeProject, monkeypatch: pytest.MonkeyPatch) -> None:
    from charkha.store import durable

    work = project()
    monkeypatch.setattr(durable, "free_bytes", lambda path: 10)
    with pytest.raises(DoesNotFit, match="10 B free"):
        work.train()
    assert steps(work.run_folder()) == []


@pytest.mark.usefixtures("impatient")
def test_a_small_disk_that_really_is_full_is_waited_for_until_there_is_room(
    project: MakeProject, small_disk: Callable[[int], Path]
) -> None:
    disk = small_disk(1_600_000)
    ballast = disk / "ballast"
    work = project(checkpoint={"keep": 1, "every": "1 steps"})
    work.train(output="whole")
    seen: list[str] = []

    def observe(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 2:
            subprocess.run(["dd", "if=/dev/zero", f"of={ballast}", "bs=4096"], capture_output=True, check=False)
            for reserve in (disk / "run").glob(".room-*"):
                reserve.unlink()  # as if another program had taken even that
                subprocess.run(["dd", "if=/dev/zero", f"of={disk}/more", "bs=4096"], capture_output=True, check=False)
        if event["event"] == "status" and event["status"] == "waiting":
            seen.append(event["reason"])
            if len(seen) == 3:
                ballast.unlink()

    from charkha.training.session import train

    result = train(work.config, [f"output={disk / 'run'}"], observe)
    assert (result.status, len(seen)) == ("done", 3)
    assert "free" in seen[0] or "No space" in seen[0]
    assert [number for number, *_rest in steps(disk / "run")] == [1, 2, 3, 4, 5, 6], "lines wait for the disk as well"
    assert_equal(work.weights("whole"), work.weights(str(disk / "run")))


@pytest.mark.usefixtures("impatient")
def test_a_run_folder_that_vanishes_is_waited_for_and_nothing_is_lost(project: MakeProject) -> None:
    from charkha.training.session import train

    work = project(checkpoint={"every": "1 steps"})
    work.train(output="whole")
    run, aside = work.run_folder("cut"), work.folder / "unmounted"
    waited: list[str] = []

    def observe(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 3:
            run.rename(aside)
        if event["event"] == "status" and event["status"] == "waiting":
            waited.append(event["reason"])
            if len(waited) == 2:
                shutil.rmtree(run, ignore_errors=True)  # what an empty mount point may have caught meanwhile
                aside.rename(run)

    result = train(work.config, ["output=cut"], observe)
    assert result.status == "done"
    assert "the run folder is gone" in waited[0]
    assert [number for number, *_rest in steps(run)] == [1, 2, 3, 4, 5, 6]
    assert_equal(work.weights("cut"), work.weights("whole"))


def test_a_run_folder_that_cannot_be_written_is_told_before_the_base_is_loaded(
    project: MakeProject, small_disk: Callable[[int], Path]
) -> None:
    disk = small_disk(1 << 20)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(RunFolderError, match="Read-only file system") as caught:
        project().train(output=str(disk / "run"))
    assert caught.value.exit_code == 6


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_good_checkpoint(project: MakeProject) -> None:
    work = project(
        training={"learning_rate": 1e30, "lr_scheduler_type": "constant", "max_steps": 30},
        checkpoint={"every": "1 steps"},
    )
    with pytest.raises(TrainingFailed, match="not finite") as caught:
        work.train()
    assert caught.value.exit_code == 7
    assert "learning_rate" in (caught.value.remedy or "")
    newest, skipped = CheckpointStore(work.run_folder()).newest_verified()
    assert newest is not None
    assert not skipped
    assert newest.step == len(steps(work.run_folder()))
    import torch

    assert all(torch.isfinite(tensor).all() for name, tensor in work.checkpoint_tensors().items() if "lora" in name)
    assert not (work.run_folder() / "adapter").exists()
    statuses = [event for event in RunFolder(work.run_folder()).events() if event["event"] == "status"]
    assert statuses[-1]["status"] == "failed"
    assert "not finite" in statuses[-1]["reason"]


def test_a_base_with_infinite_weights_fails_before_any_step(
    project: MakeProject, new_model: Callable[..., Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    base = new_model(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = float("inf")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    work = project(base)
    with pytest.raises(TrainingFailed, match="step 1 is not finite"):
        work.train()
    assert not (work.run_folder() / "checkpoints").exists()


TRAIN = """
import sys
from charkha.cli.app import main
sys.argv = ["charkha", "train", *sys.argv[1:]]
main()
"""


def start(config: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", TRAIN, str(config), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    for _ in range(600):
        if process.poll() is not None or len(steps(run)) >= step:
            return
        time.sleep(0.05)
    pytest.fail("no step came within 30 seconds")


@pytest.mark.long
def test_a_run_killed_again_and_again_ends_as_if_it_had_never_been(project: MakeProject) -> None:
    work = project(training={"max_steps": 60, "eval_every": 7}, checkpoint={"every": "3 steps"})
    work.train(output="whole")
    picker = random.Random(5)
    for _ in range(5):
        process = start(work.config, "--set", "output=cut")
        wait_for_step(process, work.run_folder("cut"), picker.randint(1, 40))
        time.sleep(picker.uniform(0, 0.2))
        process.kill()
        process.communicate()
    result, _ = work.train(output="cut")
    assert result.resumes >= 1
    assert steps(work.run_folder("cut")) == steps(work.run_folder("whole"))
    assert_equal(work.weights("cut"), work.weights("whole"))


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_command_with_75_and_the_same_command_goes_on(
    project: MakeProject, number: signal.Signals
) -> None:
    import json

    work = project(training={"max_steps": 400}, checkpoint={"every": "1000 steps"})
    process = start(work.config, "--json")
    wait_for_step(process, work.run_folder(), 3)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    result = json.loads(output)
    assert result["status"] == "paused"
    assert 0 < result["steps"] < 400
    newest, _ = CheckpointStore(work.run_folder()).newest_verified()
    assert newest is not None
    assert newest.step == result["steps"]
    assert "Traceback" not in errors
    assert work.train()[0].status == "done"


def test_a_terminal_that_is_closed_costs_no_step(project: MakeProject) -> None:
    from charkha.training.session import train

    def gone(event: dict[str, Any]) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    work = project()
    assert train(work.config, ["output=run"], gone).status == "done"
    assert len(steps(work.run_folder())) == 6


def test_a_run_keeps_the_autos_that_it_began_with(project: MakeProject, monkeypatch: pytest.MonkeyPatch) -> None:
    from charkha.training import choices

    work = project()
    work.train(stop_at=2)
    monkeypatch.setattr(choices, "BF16_PAYS_FROM", 0)  # a later version would choose bf16 here
    result, _ = work.train()
    assert result.status == "done"
    assert RunFolder(work.run_folder()).config_path.read_text().count("dtype: fp32") == 1
