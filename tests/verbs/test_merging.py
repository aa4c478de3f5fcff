"""Merged = base + adapter, and a merge that is not is caught."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from charkha.errors import MergeNotVerified, RunFolderError, UsageError

MakeProject = Callable[..., Any]
LEARN = {"max_steps": 10, "learning_rate": 1e-2, "eval_every": 100}


def logits(model: Any, data: Any) -> list[np.ndarray]:
    import torch

    model.eval()
    with torch.no_grad():
        return [
            model(torch.from_numpy(data.eval.input_ids(row).astype(np.int64))[None]).logits[0].numpy()
            for row in range(4)
        ]


def base_and_adapter(run: Any, quantization: str = "none") -> tuple[Any, Any]:
    """(PEFT's own base + adapter in fp32, the run's data)."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from charkha.store.runs import RunFolder
    from charkha.training.opening import reopen

    _, base, data = reopen(RunFolder(run))
    settings = {}
    if quantization == "nf4":
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32, **settings)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # cannot repack 172 rows
    return PeftModel.from_pretrained(model, run / "adapter"), data


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_the_merged_model_answers_as_base_and_adapter_do(project: MakeProject, kind: str) -> None:
    from transformers import AutoModelForCausalLM

    from charkha.verbs.merging import merge_run

    work = project(kind, training=LEARN)
    work.train()
    result = merge_run(work.run_folder())
    assert result.verified
    assert result.max_logit_difference <= result.allowed_logit_difference < 0.01 * result.max_abs_logit
    expected_model, data = base_and_adapter(work.run_folder())
    expected = logits(expected_model, data)
    merged = logits(AutoModelForCausalLM.from_pretrained(work.run_folder() / "merged"), data)
    plain = logits(AutoModelForCausalLM.from_pretrained(work.base), data)
    for ours, theirs, untrained in zip(merged, expected, plain, strict=True):
        assert np.abs(ours - theirs).max() < 1e-3
        assert np.abs(theirs - untrained).max() > 0.1, "the adapter must matter, or this shows nothing"
    record = json.loads((work.run_folder() / "merged" / "charkha_merge.json").read_text())
    assert record["verified"] is True


def test_a_merge_onto_the_dequantized_base_answers_as_the_four_bit_base_and_adapter_do(project: MakeProject) -> None:
    from transformers import AutoModelForCausalLM

    from charkha.verbs.merging import merge_run

    work = project(model={"quantization": "nf4"}, training=LEARN)
    work.train()
    assert merge_run(work.run_folder(), onto="dequantized").verified
    expected_model, data = base_and_adapter(work.run_folder(), "nf4")
    expected = logits(expected_model, data)
    merged = logits(AutoModelForCausalLM.from_pretrained(work.run_folder() / "merged"), data)
    for ours, theirs in zip(merged, expected, strict=True):
        assert np.abs(ours - theirs).max() < 1e-3
    onto_base = merge_run(work.run_folder(), onto="base")
    assert onto_base.verified
    other = logits(AutoModelForCausalLM.from_pretrained(work.run_folder() / "merged"), data)
    assert np.abs(other[0] - expected[0]).max() > 1e-2, "two different bases"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merge_that_lost_one_layers_update_is_caught(
    project: MakeProject, model_folder: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    from charkha.backends.torch import merge
    from charkha.verbs.merging import merge_run

    work = project(model_folder("llama", dtype=dtype), training=LEARN)
    work.train()
    assert merge_run(work.run_folder()).verified
    read = merge.read_updates

    def lossy(*arguments: Any) -> Any:
        deltas = read(*arguments)
        del deltas["model.layers.1.mlp.down_proj.weight"]
        return deltas

    monkeypatch.setattr(merge, "read_updates", lossy)
    with pytest.raises(MergeNotVerified) as caught:
        merge_run(work.run_folder())
    assert caught.value.exit_code == 7
    assert not (work.run_folder() / "merged").exists(), "a wrong model must not stand under the right name"
    assert (work.run_folder() / "merged.unverified").is_dir()


def test_an_unfinished_run_and_a_folder_without_one_are_refused(project: MakeProject) -> None:
    from charkha.verbs.merging import merge_run

    work = project()
    with pytest.raises(RunFolderError):
        merge_run(work.run_folder())
    work.train(stop_at=1)
    with pytest.raises(RunFolderError, match="not finished"):
        merge_run(work.run_folder())


def test_a_run_on_a_whole_base_has_no_dequantized_weights_to_merge_onto(project: MakeProject) -> None:
    from charkha.verbs.merging import merge_run

    work = project(training={"max_steps": 1})
    work.train()
    with pytest.raises(UsageError, match="not quantized"):
        merge_run(work.run_folder(), onto="dequantized")


def test_full_training_needs_no_merge_and_says_so(project: MakeProject) -> None:
    from charkha.verbs.merging import merge_run

    work = project(adapter={"method": "full"}, training={"max_steps": 1})
    work.train()
    result = merge_run(work.run_folder())
    assert result.verified is None
    assert "standalone" in (result.note or "")
    assert result.path == str(work.run_folder() / "model")
