"""Runs on a streamed base: the same as resident ones, killed and resumed too, through the verbs a user has."""

from __future__ import annotations

import json
import random
import time

import pytest
from equal_runs import all_equal, losses

LAYERS = 4


@pytest.fixture(autouse=True)
def slab_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CHARKHA_CACHE", str(tmp_path / "cache"))


STREAMED = "model.placement=streamed"
RESIDENT = "training.gradient_checkpointing=full"


def test_stopped_and_resumed_ends_as_the_resident_run(project, model_folder):
    work = project(model_folder("llama", num_hidden_layers=LAYERS), model={"quantization": "nf4"})
    undisturbed, before = work.train(RESIDENT, output="resident")
    first, seen = work.train(STREAMED, output="streamed", stop_at=3)
    assert first.status == "paused"
    result, rest = work.train(STREAMED, output="streamed")
    assert result.status == "done"
    assert losses([*seen, *rest]) == losses(before)
    assert all_equal(work.weights("streamed"), work.weights("resident"))
    assert all_equal(work.checkpoint_tensors("streamed"), work.checkpoint_tensors("resident"))
    # What stays behind is two layers of four, in a run that was measured over the same steps.
    streamed, _ = work.train(STREAMED, output="measured")
    planned = [json.loads((work.run_folder(name) / "plan.json").read_text()) for name in ("resident", "streamed")]
    saved = planned[0]["peak_allocated_bytes"] - planned[1]["peak_allocated_bytes"]
    assert saved > 0
    assert undisturbed.peak_memory_bytes - streamed.peak_memory_bytes == pytest.approx(saved, rel=0.02)


@pytest.mark.parametrize(
    ("kind", "tables"),
    [
        ("gemma3_text", "both"),  # tied, which loading draws random numbers for
        pytest.param("llama", "both", marks=pytest.mark.long),
        pytest.param("llama", "embedding", marks=pytest.mark.long),
    ],
)
def test_tables_on_the_host_train_the_same_adapter_over_a_pause(project, model_folder, kind, tables):
    work = project(model_folder(kind), model={"quantization": "nf4"}, training={"max_steps": 3}, data={"eval": None})
    _, before = work.train(STREAMED, "model.host_tables=none", "training.loss_head=chunked", output="device")
    first, seen = work.train(STREAMED, f"model.host_tables={tables}", output="host", stop_at=1)
    assert first.status == "paused"
    _, rest = work.train(STREAMED, output="host")  # auto on the command line; the run knows where they were
    found = losses([*seen, *rest])
    assert found.keys() == losses(before).keys()
    assert found == pytest.approx(losses(before), rel=1e-5)  # a head in blocks adds up in another order
    assert (json.loads((work.run_folder("host") / "plan.json").read_text()))["streaming"]["host_tables"] == tables
    held = work.weights("host")
    for name, weight in work.weights("device").items():
        assert (held[name] - weight).abs().max() < 1e-3 * weight.abs().max()


def test_on_a_machine_with_more_memory_a_streamed_run_goes_on_resident_when_told_so(project):
    from charkha.errors import RunOfAnotherConfig
    from charkha.training.session import train

    work = project(training={"max_steps": 2}, data={"eval": None})
    work.train(STREAMED, output="run", stop_at=1)
    work.train(STREAMED, output="other", stop_at=1)
    with pytest.raises(RunOfAnotherConfig, match=r"model\.placement: 'streamed' in") as caught:
        work.train("model.placement=resident")
    assert "--accept-changes" in (caught.value.remedy or "")
    assert train(work.config, ["output=run"], lambda event: None, accept_changes=True).status == "done"  # auto
    accepted = json.loads((work.run_folder() / "manifest.json").read_text())["accepted"]
    assert "model.placement: 'streamed' in the run, 'resident' now" in accepted[0]["changes"]
    work.train(STREAMED, output="other")
    assert all_equal(work.weights("run"), work.weights("other"))


@pytest.mark.long
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "gemma3_text", "falcon"])
@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
def test_every_family_and_method_through_the_trainer(project, model_folder, monkeypatch, kind, method):
    from charkha.backends.torch.transfers import LayerReader

    work = project(
        model_folder(kind, num_hidden_layers=LAYERS), model={"quantization": "nf4"}, adapter={"method": method}
    )
    _, before = work.train(RESIDENT, output="resident")
    read, chance = LayerReader.read, random.Random(0)

    def late(self, number, target):
        time.sleep(chance.random() * 0.01)
        read(self, number, target)

    monkeypatch.setattr(LayerReader, "read", late)
    _, seen = work.train(STREAMED, output="streamed", stop_at=3)
    _, rest = work.train(STREAMED, output="streamed")
    assert losses([*seen, *rest]) == losses(before)
    assert all_equal(work.weights("streamed"), work.weights("resident"))


# Of shapes that bf16 products of experts can take.
KINDS = {
    "llama": {"num_hidden_layers": LAYERS},
    "mixtral": {"num_hidden_layers": LAYERS, "intermediate_size": 176},
    "qwen3_moe": {
        "num_hidden_layers": LAYERS,
        "head_dim": 16,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
    },
}
ON_ATTENTION = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "lora_dropout": 0.0}


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "model", "adapter"),
    [
        ("mixtral", {"quantization": "none", "dtype": "bf16"}, ON_ATTENTION),
        ("qwen3_moe", {"quantization": "none"}, ON_ATTENTION),
        ("llama", {"quantization": "int8", "dtype": "bf16"}, {}),
        ("llama", {"quantization": "fp4"}, {}),
    ],
)
def test_experts_and_other_storages_too_over_a_pause(project, model_folder, kind, model, adapter):
    work = project(model_folder(kind, **KINDS[kind]), model=model, adapter=adapter)
    _, before = work.train(RESIDENT, output="resident")
    _, seen = work.train(STREAMED, output="streamed", stop_at=3)
    _, rest = work.train(STREAMED, output="streamed")
    assert losses([*seen, *rest]) == losses(before)
    assert all_equal(work.weights("streamed"), work.weights("resident"))


def test_experts_in_4_bits_are_trained_streamed_of_itself_and_refused_resident(project, model_folder):
    from charkha.errors import UsageError

    base = model_folder("mixtral", **KINDS["mixtral"])
    work = project(base, model={"quantization": "nf4"}, adapter=ON_ATTENTION, training={"max_steps": 1})
    result, seen = work.train("data.eval=null")
    assert result.status == "done"
    chosen = [event["text"] for event in seen if "model.placement" in event.get("text", "")]
    assert chosen == ["chose model.placement: streamed (experts are packed in nf4 only where they are streamed)"]
    for other in ("model.placement=resident", "adapter.target_modules=all-linear"):
        with pytest.raises(UsageError, match="would stay whole") as caught:
            work.train(other, output="other")
        assert "model.placement streamed, which packs experts" in (caught.value.remedy or "")


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "quantization", "adapter"),
    [("llama", "nf4", {}), ("llama", "int8", {}), ("mixtral", "none", ON_ATTENTION)],
)
def test_eval_chat_and_merge_of_a_streamed_run_are_those_of_a_resident_one(
    project, model_folder, kind, quantization, adapter
):
    from charkha.chatting import Conversation
    from charkha.evaluation import evaluate_run, open_run
    from charkha.verbs.merging import merge_run

    work = project(model_folder(kind, **KINDS[kind]), model={"quantization": quantization}, adapter=adapter)
    work.train(RESIDENT, output="resident")
    work.train(STREAMED, output="streamed")
    answers = {}
    for name in ("resident", "streamed"):
        run = work.run_folder(name)
        scored = evaluate_run(run)
        talk = Conversation(open_run(run), None, temperature=0, max_new_tokens=12, seed=0, base=False)
        merged = merge_run(run)
        assert merged.verified
        answers[name] = (scored.loss, scored.answers, "".join(talk.say("tea 3?")))
    assert answers["resident"] == answers["streamed"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"training": {"gradient_checkpointing": "none"}}, "begins by running it again"),
        ({"adapter": {"method": "full"}}, "trains every weight"),
        ({"adapter": {"method": "ia3"}}, "has not been tried"),
        ({"devices": {"processes": 2}}, "2 processes would each stream"),
    ],
)
def test_what_does_not_go_with_a_streamed_base_is_refused_before_it_is_loaded(project, settings, message):
    from charkha.errors import UsageError

    work = project("llama", **settings)
    with pytest.raises(UsageError, match=message):
        work.train(STREAMED)
    assert not (work.folder / "cache").exists()
