"""Every adapter learns, goes on bit for bit after a stop, and answers; what PEFT would pass over is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from charkha.errors import ConfigError, UsageError

MakeProject = Callable[..., Any]

ADAPTERS: dict[str, dict[str, Any]] = {
    "dora": {"adapter": {"method": "dora"}},
    "rslora": {"adapter": {"method": "rslora"}},
    "ia3": {"adapter": {"method": "ia3"}, "training": {"learning_rate": 5e-2}},
    "prompt_tuning": {"adapter": {"method": "prompt_tuning"}, "training": {"learning_rate": 5e-2}},
    "lora+ with patterns and a head trained whole": {
        "adapter": {
            "loraplus_ratio": 8.0,
            "modules_to_save": ["lm_head"],
            "layers_to_transform": [1],
            "rank_pattern": {"down_proj": 2},
            "alpha_pattern": {"mlp.up_proj": 3.0},
        }
    },
    "dora on nf4": {"adapter": {"method": "dora"}, "model": {"quantization": "nf4"}},
    "ia3 on int8 in bf16": {"adapter": {"method": "ia3"}, "model": {"quantization": "int8", "dtype": "bf16"}},
    "prompt tuning on fp4": {"adapter": {"method": "prompt_tuning"}, "model": {"quantization": "fp4"}},
    "adamw_8bit on every weight": {"adapter": {"method": "full"}, "training": {"optimizer": "adamw_8bit"}},
    "paged lion": {"training": {"optimizer": "paged_lion_8bit"}, "adapter": {"method": "full"}},
    "adafactor": {"training": {"optimizer": "adafactor"}},
}


# One of each sort in every run of the tests; the others, a few seconds each, with the long ones.
QUICK = (
    "prompt_tuning", "lora+ with patterns and a head trained whole", "dora on nf4", "ia3 on int8 in bf16",
    "adamw_8bit on every weight",
)  # fmt: skip


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.long) for kind in ADAPTERS]
)
def test_it_learns_and_goes_on_bit_for_bit_after_a_stop(project: MakeProject, kind: str) -> None:
    import torch

    from charkha.evaluation import evaluate_run

    work = project(**ADAPTERS[kind])
    whole, _ = work.train(output="whole")
    work.train(output="cut", stop_at=3)
    resumed, _ = work.train(output="cut")
    assert (resumed.status, resumed.resumes) == ("done", 1)
    for left, right in (
        (work.weights("cut"), work.weights("whole")),
        (work.checkpoint_tensors("cut"), work.checkpoint_tensors("whole")),
    ):
        assert left.keys() == right.keys()
        assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())
    assert all(tensor.dtype == torch.float32 for tensor in work.weights("whole").values()), "adapters stay fp32"
    assert whole.eval_loss_after < whole.eval_loss_before
    evaluated = evaluate_run(work.run_folder("cut"), limit=2)
    assert evaluated.loss == pytest.approx(whole.eval_loss_after, abs=2e-3 if "bf16" in kind else 1e-5)


def test_prompt_tuning_scores_and_answers_each_row_behind_its_virtual_tokens(project: MakeProject) -> None:
    """Against whole forward passes of the plain model over virtual tokens and row, one row at a time."""
    import torch

    from charkha.backends.torch.generate import stream
    from charkha.evaluation import open_run

    work = project(adapter={"method": "prompt_tuning", "num_virtual_tokens": 5}, training={"learning_rate": 0.1})
    work.train()
    opened = open_run(work.run_folder())
    base, virtual = opened.model.get_base_model(), work.weights()["prompt_embeddings"][None]
    shard = opened.data.eval
    assert shard is not None
    prompts = [shard.input_ids(row)[: 6 + row] for row in range(3)]

    def greedy(prompt: np.ndarray, virtual_tokens: Any, count: int) -> list[int]:
        ids = prompt.tolist()
        with torch.no_grad():
            for _ in range(count):
                row = base.get_input_embeddings()(torch.tensor([ids]))
                embeds = torch.cat([virtual_tokens, row], 1) if virtual_tokens is not None else row
                ids.append(int(base(inputs_embeds=embeds).logits[0, -1].argmax()))
        return ids[len(prompt) :]

    def until_end(ids: list[int]) -> list[int]:
        return ids[: next((place for place, token in enumerate(ids) if token in opened.data.end_ids), len(ids))]

    decode = opened.data.tokenizer.decode
    wanted = [decode(until_end(greedy(prompt, virtual, 8))) for prompt in prompts]
    plain = [decode(until_end(greedy(prompt, None, 8))) for prompt in prompts]
    assert opened.answer(prompts, 8) == wanted
    with opened.use_base() as model:
        assert opened.answer(prompts, 8, model) == plain
    assert wanted != plain, "the virtual tokens must matter, or this shows nothing"

    def streamed(prompt: np.ndarray, temperature: float = 0.0, seed: int = 1) -> str:
        settings: dict[str, Any] = {"max_new_tokens": 8, "end_ids": opened.data.end_ids, "decode": decode}
        return "".join(stream(opened.model, prompt, temperature=temperature, seed=seed, **settings))

    assert [streamed(prompt) for prompt in prompts] == wanted
    with opened.use_base():
        assert [streamed(prompt) for prompt in prompts] == plain
    assert streamed(prompts[0], 2.0) == streamed(prompts[0], 2.0) != streamed(prompts[0], 2.0, seed=2)


def test_lora_plus_lets_the_b_matrices_learn_faster(project: MakeProject) -> None:
    settings = {"lr_scheduler_type": "constant", "max_steps": 1}
    work = project(adapter={"lora_dropout": 0.0}, training=settings)
    work.train(output="plain")
    work.train("adapter.loraplus_ratio=16", output="plus")
    plain, plus = work.weights("plain"), work.weights("plus")
    for name, tensor in plain.items():
        moved = float(plus[name].abs().mean() / tensor.abs().mean())
        assert moved == pytest.approx(16 if "lora_B" in name else 1, rel=0.01), name


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a head that trl cannot adapt": ("llama", {"target_modules": ["lm_head", "q_proj"]}, "target_modules"),
    "dropout on experts": ("mixtral", {}, "lora_dropout"),
    "dora on experts": ("mixtral", {"method": "dora", "lora_dropout": 0.0}, "method"),
    "a tied head": ("qwen2", {"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "a tied embedding": ("qwen2", {"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
    "a module that is not there": ("llama", {"modules_to_save": ["classifier"]}, "modules_to_save"),
    "a block that is not there": ("llama", {"layers_to_transform": [0, 2]}, "layers_to_transform"),
    "a pattern without a layer": ("llama", {"rank_pattern": {"down": 4}}, "rank_pattern"),
    "a layer that is not there": ("llama", {"target_modules": ["q_prj"]}, "target_modules"),
}


def test_dora_on_rows_of_zeros_is_refused_by_name_instead_of_ending_in_nan(
    project: MakeProject, new_model: Any, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = new_model(tmp_path / "base", "llama")
    path = folder / "model.safetensors"
    tensors = load_file(str(path))
    tensors["model.layers.1.self_attn.q_proj.weight"][:3] = 0
    save_file(tensors, str(path), {"format": "pt"})
    with pytest.raises(UsageError, match=r"3 of 64 rows of model\.layers\.1\.self_attn\.q_proj are all zeros"):
        project(folder, adapter={"method": "dora"}).train()


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_passed_over_is_refused_before_any_weight_is_read(
    project: MakeProject, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from charkha.backends.torch import trainer

    base, adapter, key = REFUSED[name]
    monkeypatch.setattr(trainer, "load_base", lambda spec: pytest.fail("the base was loaded"))
    work = project(base, adapter=adapter)
    with pytest.raises(UsageError) as caught:
        work.train()
    assert caught.value.exit_code == 2
    assert caught.value.where == f"adapter.{key}"
    assert caught.value.remedy
    assert not (work.run_folder() / "charkha.yaml").exists()


def test_dora_on_int8_is_refused_on_a_cpu(project: MakeProject) -> None:
    with pytest.raises(UsageError, match="int8") as caught:
        project(model={"quantization": "int8"}, adapter={"method": "dora"}).train()
    assert "nf4" in (caught.value.remedy or "")


@pytest.mark.parametrize(("kind", "quantization"), [("mixtral", "nf4"), ("mixtral", "int8")])
def test_a_base_that_would_stay_whole_is_refused_before_it_is_loaded(
    project: MakeProject, monkeypatch: pytest.MonkeyPatch, kind: str, quantization: str
) -> None:
    from charkha.backends.torch import trainer

    monkeypatch.setattr(trainer, "load_base", lambda spec: pytest.fail("the base was loaded"))
    with pytest.raises(UsageError, match="stay whole") as caught:
        project(kind, model={"quantization": quantization}, adapter={"lora_dropout": 0.0}).train()
    assert caught.value.where == "model.quantization"
    assert "none" in (caught.value.remedy or "")


def test_a_model_without_sdpa_takes_eager_attention_and_says_so(project: MakeProject) -> None:
    work = project("gemma2", training={"max_steps": 1})
    _, events = work.train()
    assert any("model.attention: eager" in event.get("text", "") and "no sdpa" in event["text"] for event in events)
    with pytest.raises(ConfigError, match="no such kernel"):
        work.train("model.attention=sdpa", output="other")


def test_keys_that_the_method_does_not_use_are_noted(project: MakeProject) -> None:
    work = project(adapter={"method": "ia3", "num_virtual_tokens": 3}, training={"max_steps": 1})
    _, events = work.train()
    notes = [event["text"] for event in events if event["event"] == "note"]
    assert "adapter.num_virtual_tokens is not used by method ia3" in notes
    assert "adapter.lora_dropout is not used by method ia3" in notes


@pytest.mark.parametrize(("name", "nearest"), [("adamw8bit", "adamw_8bit"), ("galore_adamw", "adamw"), ("foo", "adam")])
def test_an_unknown_optimizer_is_refused_with_the_nearest(project: MakeProject, name: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean [a-z_]*{nearest}"):
        project(training={"optimizer": name}).train()


def test_every_optimizer_that_is_offered_is_one_of_transformers(tmp_path: Path) -> None:
    from transformers.training_args import OptimizerNames

    from charkha.optimizers import KNOWN_OPTIMIZERS

    assert {name.value for name in OptimizerNames} >= KNOWN_OPTIMIZERS
