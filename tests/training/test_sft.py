"""What training changes, what it leaves alone, and that every way of cutting the batch is the same step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MakeProject = Callable[..., Any]
LEARN = {"max_steps": 16, "learning_rate": 1e-2, "eval_every": 100, "lr_scheduler_type": "constant"}


def losses(events: list[dict[str, Any]]) -> list[float]:
    return [event["loss"] for event in events if event["event"] == "step"]


@pytest.mark.parametrize("kind", ["llama", pytest.param("mistral", marks=pytest.mark.long), "qwen2"])
def test_lora_learns_and_changes_nothing_but_its_matrices(project: MakeProject, kind: str) -> None:
    work = project(kind, training=LEARN)
    result, events = work.train()
    assert result.status == "done"
    assert result.steps == result.total_steps == 16
    assert result.eval_loss_after < result.eval_loss_before - 0.3
    assert sum(losses(events)[-4:]) < sum(losses(events)[:4]) - 1
    weights = work.weights()
    assert weights
    assert all(".lora_A." in name or ".lora_B." in name for name in weights)
    assert all(str(tensor.dtype) == "torch.float32" for tensor in weights.values())
    # 7 linear layers in each of 2 blocks, and all of them moved away from B = 0.
    moved = [name for name, tensor in weights.items() if ".lora_B." in name and tensor.abs().max() > 0]
    assert len(moved) == 14


def spied_models(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models that training works on, each with `initial`: its tensors before the first step."""
    from charkha.backends.torch import trainer

    attach = trainer.attach_adapter
    seen: list[Any] = []

    def spy(*args: Any) -> Any:
        model = attach(*args)
        initial = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        seen.append((model, initial))
        return model

    monkeypatch.setattr(trainer, "attach_adapter", spy)
    return seen


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_lora_leaves_every_weight_of_the_base_as_it_was_bit_for_bit(
    project: MakeProject, monkeypatch: pytest.MonkeyPatch, quantization: str
) -> None:
    import torch

    seen = spied_models(monkeypatch)
    project(model={"quantization": quantization}).train()
    ((model, initial),) = seen
    changed = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, initial[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    assert {name for name, tensor in model.named_parameters() if tensor.requires_grad} == {
        name for name in initial if "lora_" in name
    }


def test_full_training_moves_every_weight_and_writes_a_whole_model(
    project: MakeProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    seen = spied_models(monkeypatch)
    work = project("qwen2", adapter={"method": "full"}, training={**LEARN, "learning_rate": 1e-3})
    result, _ = work.train()
    ((model, initial),) = seen
    assert not [name for name, tensor in model.named_parameters() if torch.equal(tensor, initial[name])]
    assert result.eval_loss_after < result.eval_loss_before - 0.3
    folder = work.run_folder() / "model"
    assert result.adapter == str(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trained = dict(model.named_parameters())
    assert all(torch.equal(tensor, trained[name]) for name, tensor in loaded.named_parameters())
    assert loaded.config.use_cache, "a model that answers without a cache is many times slower"
    assert (folder / "tokenizer.json").is_file()


def test_an_nf4_base_is_really_four_bits_with_double_quantization(
    project: MakeProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from bitsandbytes.nn import Linear4bit

    seen = spied_models(monkeypatch)
    work = project(adapter={"method": "qlora"}, training=LEARN)
    result, _ = work.train()
    ((model, _initial),) = seen
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert len(layers) == 14
    for layer in layers.values():
        assert layer.weight.dtype == torch.uint8
        assert layer.weight.quant_state.quant_type == "nf4"
        assert layer.weight.quant_state.nested, "double quantization"
    assert result.eval_loss_after < result.eval_loss_before - 0.3
    from charkha.store.runs import RunFolder

    trained = RunFolder(work.run_folder()).read_manifest()["trained"]
    assert len(trained["quantized_modules"]) == 14
    plain = sum(parameter.numel() for parameter in _plain_model(work.base).parameters())
    assert trained["total_parameters"] == plain + trained["trainable_parameters"]


def _plain_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def test_micro_batches_of_one_make_the_step_of_one_batch_of_eight(project: MakeProject) -> None:
    """fp32 without dropout: only the order of sums differs, a few units of 2^-24 per operation, grown by six steps."""
    import torch

    work = project(adapter={"lora_dropout": 0.0}, training={"lr_scheduler_type": "constant"})
    one, events_one = work.train("training.micro_batch_size=1", output="one")
    eight, events_eight = work.train("training.micro_batch_size=8", output="eight")
    assert losses(events_one) == pytest.approx(losses(events_eight), abs=1e-5)
    assert one.tokens == eight.tokens
    left, right = work.weights("one"), work.weights("eight")
    for name, tensor in left.items():
        assert torch.allclose(tensor, right[name], atol=2e-5), name


def test_a_micro_batch_size_that_does_not_divide_the_batch_is_the_same_step_too(project: MakeProject) -> None:
    work = project(adapter={"lora_dropout": 0.0}, training={"max_steps": 3})
    _, events_three = work.train("training.micro_batch_size=3", output="three")
    _, events_eight = work.train("training.micro_batch_size=8", output="eight")
    assert losses(events_three) == pytest.approx(losses(events_eight), abs=1e-5)


def test_the_loss_of_a_step_is_the_mean_over_its_trained_tokens(project: MakeProject) -> None:
    """Against a bare forward pass over the same rows, which also pins what is trained: the answer and its end."""
    import torch

    work = project(adapter={"lora_dropout": 0.0}, training={"max_steps": 1})
    result, _ = work.train()
    from charkha.backends.torch.batches import MicroBatchPlan, collate
    from charkha.store.runs import RunFolder
    from charkha.training.opening import reopen

    config, _, data = reopen(RunFolder(work.run_folder()))
    plan = MicroBatchPlan(data.train, batch_size=8, micro_batch_size=8, seed=config.training.seed,
                          fingerprint=data.fingerprint)  # fmt: skip
    batch = collate(data.train, plan.rows_of(0), data.pad_id)
    with torch.no_grad():
        logits = _plain_model(work.base)(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    targets = batch["labels"][:, 1:]
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), targets.reshape(-1))
    assert result.loss_first == pytest.approx(float(expected), abs=1e-5)
    row = int(plan.rows_of(0)[0])
    trained = data.train.input_ids(row)[data.train.trained(row)]
    text = data.tokenizer.decode(trained.tolist())
    assert text.replace("<|end|>", "").isupper()
    assert int(trained[-1]) in data.end_ids


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_adapters_are_kept_and_saved_in_fp32_whatever_the_base_is(project: MakeProject, dtype: str) -> None:
    work = project(model={"dtype": dtype, "quantization": "nf4"}, training={"max_steps": 2})
    work.train()
    assert {str(tensor.dtype) for tensor in work.weights().values()} == {"torch.float32"}


def test_a_finished_run_holds_no_pickles(project: MakeProject) -> None:
    work = project(training={"max_steps": 2})
    work.train()
    files = {path.name for path in work.run_folder().rglob("*") if path.is_file()}
    assert files
    allowed = {".safetensors", ".json", ".jsonl", ".yaml", ".md", ".jinja", ""}
    assert {Path(name).suffix for name in files} <= allowed
    assert not list((work.run_folder() / "staging").iterdir())


def test_the_companions_of_the_adapter_make_it_usable_alone(project: MakeProject) -> None:
    import json

    work = project(training={"max_steps": 1})
    work.train()
    folder = work.run_folder() / "adapter"
    assert "generation" in (folder / "chat_template.jinja").read_text()
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert 6 in (ends if isinstance(ends, list) else [ends]), "<|end|> ends an answer"


@pytest.mark.parametrize(
    "argument", ["label_smoothing_factor=0.1", "eval_steps=3", "learning_rate=1", "nonsense=1", "ignore_data_skip=true"]
)
def test_trainer_arguments_that_would_not_take_effect_are_refused(project: MakeProject, argument: str) -> None:
    from charkha.errors import ConfigError

    with pytest.raises(ConfigError) as caught:
        project().train(f"trainer.{argument}")
    assert [problem.key for problem in caught.value.problems] == [f"trainer.{argument.partition('=')[0]}"]


def test_a_trainer_argument_that_takes_effect_is_passed_on(project: MakeProject) -> None:
    work = project(training={"max_steps": 3})
    _, plain = work.train(output="plain")
    _, other = work.train("trainer.adam_beta1=0.1", output="other")
    assert losses(plain)[:2] == losses(other)[:2]
    assert losses(plain) != losses(other)


def test_gradient_checkpointing_takes_the_same_steps(project: MakeProject) -> None:
    work = project(adapter={"lora_dropout": 0.0}, training={"max_steps": 3})
    _, plain = work.train(output="plain")
    _, recomputed = work.train("training.gradient_checkpointing=true", output="recomputed")
    assert losses(recomputed) == pytest.approx(losses(plain), abs=1e-6)


def test_one_device_is_used_however_many_there_are() -> None:
    from charkha.backends.torch.trl_arguments import _OneDevice

    arguments = _OneDevice(output_dir="unused", use_cpu=True, bf16=False)
    arguments._n_gpu = 2  # what transformers would count in a machine with two cards
    assert arguments.n_gpu == 1
    assert arguments.train_batch_size == arguments.per_device_train_batch_size
