"""Runs whose layer inputs lie in host memory: the same as others, stopped and resumed too, with the memory planned."""

from __future__ import annotations

import json
import sys

import pytest
from equal_runs import all_equal, losses

from charkha.errors import ConfigError

LAYERS = 6
PLAIN = "training.gradient_checkpointing=full"
OFFLOADED = "devices.offload=activations"


@pytest.fixture
def moving(monkeypatch):
    """Has inputs moved on a CPU too, whose memory is then two: torch's is the device's, mapped memory the host's."""
    from charkha.training.choices import Chooser

    monkeypatch.setattr(Chooser, "offloads_activations", property(lambda chooser: asked(chooser)))

    def asked(chooser):
        return "activations" in chooser._config.devices.offloaded


def long_rows(work, count=24):
    """Rows of about 100 tokens, so that what layers keep is the most of a step."""
    with (work.folder / "rows.jsonl").open("w") as file:
        for number in range(count):
            answer = " ".join([f"tea {number}"] * 18)
            turns = [{"role": "user", "content": "Please say"}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")
    return work


def planned(work, output):
    return json.loads((work.run_folder(output) / "plan.json").read_text())


def test_stopped_and_resumed_ends_as_a_run_that_moves_nothing(project, model_folder, moving):
    work = long_rows(project(model_folder("llama", num_hidden_layers=LAYERS)))
    plain, before = work.train(PLAIN, output="plain")
    first, seen = work.train(OFFLOADED, output="offloaded", stop_at=5)
    assert first.status == "paused"
    result, rest = work.train(OFFLOADED, output="offloaded")
    assert result.status == "done"
    assert losses([*seen, *rest]) == losses(before)
    assert all_equal(work.weights("offloaded"), work.weights("plain"))
    assert all_equal(work.checkpoint_tensors("offloaded"), work.checkpoint_tensors("plain"))
    away = planned(work, "plain")["peak_allocated_bytes"] - planned(work, "offloaded")["peak_allocated_bytes"]
    assert away > 0
    assert plain.peak_memory_bytes - first.peak_memory_bytes == pytest.approx(away, rel=0.02)


@pytest.mark.long
def test_a_run_goes_on_with_it_or_without(project, model_folder, moving):
    work = project(model_folder("llama", num_hidden_layers=4))
    _, before = work.train(PLAIN, output="plain")
    _, seen = work.train(OFFLOADED, output="changing", stop_at=2)
    _, then = work.train("devices.offload=none", output="changing", stop_at=4)
    _, rest = work.train(OFFLOADED, output="changing")
    assert losses([*seen, *then, *rest]) == losses(before)
    assert all_equal(work.weights("changing"), work.weights("plain"))


@pytest.mark.long
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "gemma3_text", "falcon"])
@pytest.mark.parametrize("settings", [{}, {"adapter": {"method": "dora"}}, {"adapter": {"method": "full"}}], ids=str)
def test_every_family_and_method_through_the_trainer(project, model_folder, moving, kind, settings):
    work = project(model_folder(kind, num_hidden_layers=4), **settings)
    _, before = work.train(PLAIN, output="plain")
    _, seen = work.train(OFFLOADED, output="offloaded", stop_at=3)
    _, rest = work.train(OFFLOADED, output="offloaded")
    assert losses([*seen, *rest]) == losses(before)
    assert all_equal(work.weights("offloaded"), work.weights("plain"))


@pytest.mark.long
def test_beside_what_selective_checkpointing_keeps(project, model_folder, moving):
    selective = "training.gradient_checkpointing=selective"
    work = long_rows(project(model_folder("llama", num_hidden_layers=LAYERS)))
    plain, before = work.train(selective, output="plain")
    offloaded, seen = work.train(selective, OFFLOADED, output="offloaded")
    assert losses(seen) == losses(before)
    assert all_equal(work.weights("offloaded"), work.weights("plain"))
    assert offloaded.peak_memory_bytes < plain.peak_memory_bytes
    for measured, name in ((plain, "plain"), (offloaded, "offloaded")):
        assert measured.peak_memory_bytes == pytest.approx(planned(work, name)["peak_allocated_bytes"], rel=0.02)


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="gloo on the loopback of Linux")
def test_every_process_moves_its_own(project, model_folder, moving):
    work = project(model_folder("llama", num_hidden_layers=4))
    _, before = work.train(PLAIN, "devices.processes=2", output="plain")
    _, seen = work.train(OFFLOADED, "devices.processes=2", output="offloaded")
    assert losses(seen) == losses(before)
    assert all_equal(work.weights("offloaded"), work.weights("plain"))


@pytest.mark.long
def test_beside_a_streamed_base(project, model_folder, moving, tmp_path, monkeypatch):
    monkeypatch.setenv("CHARKHA_CACHE", str(tmp_path / "cache"))
    work = long_rows(project(model_folder("llama", num_hidden_layers=LAYERS), model={"quantization": "nf4"}))
    streamed = "model.placement=streamed"
    plain, before = work.train(streamed, output="plain")
    offloaded, seen = work.train(streamed, OFFLOADED, output="offloaded")
    assert losses(seen) == losses(before)
    assert all_equal(work.weights("offloaded"), work.weights("plain"))
    away = planned(work, "plain")["peak_allocated_bytes"] - planned(work, "offloaded")["peak_allocated_bytes"]
    assert plain.peak_memory_bytes - offloaded.peak_memory_bytes == pytest.approx(away, rel=0.02)


def test_on_a_cpu_it_is_said_that_nothing_moves(project, model_folder):
    work = project(model_folder("llama"), training={"max_steps": 1, "eval_every": 1})
    result, events = work.train(OFFLOADED)
    assert result.status == "done"
    notes = [event["text"] for event in events if event["event"] == "note"]
    assert [note for note in notes if "devices.offload: activations moves nothing here" in note]
    assert planned(work, "run")["settings"]["offload"] == []


def test_without_checkpointing_there_is_nothing_to_move(project, moving):
    work = project("llama")
    with pytest.raises(ConfigError, match="moves what checkpointing keeps"):
        work.train(OFFLOADED, "training.gradient_checkpointing=none")


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("devices.offload=optimizer", "paged_adamw_32bit"),
        ("devices.offload=[parameters, activations]", "model.placement streamed"),
        ("devices.offload_to=nvme", "model.placement streamed"),
    ],
)
def test_what_is_not_moved_yet_is_refused_with_what_comes_nearest(project, override, remedy):
    work = project("llama")
    with pytest.raises(ConfigError, match="not carried out") as refusal:
        work.train(override)
    assert remedy in str(refusal.value)
