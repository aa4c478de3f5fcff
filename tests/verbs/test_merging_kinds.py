"""Every adapter and quantizer that can be merged is, and the result answers as base + adapter did."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from charkha.errors import UsageError

MakeProject = Callable[..., Any]
LEARN = {"max_steps": 4, "learning_rate": 3e-2, "lr_scheduler_type": "constant", "eval_every": 100}

KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "rslora": ("llama", {"method": "rslora"}, {}),
    "dora": ("llama", {"method": "dora"}, {}),
    "ia3 with biases": ("qwen2", {"method": "ia3"}, {}),
    "patterns and a head trained whole": (
        "llama",
        {
            "rank_pattern": {"down_proj": 2, "layers.1.self_attn.q_proj": 6},
            "alpha_pattern": {"mlp.up_proj": 3.0, r"layers\.0\..*_proj": 5.0},
            "modules_to_save": ["lm_head", "norm"],
        },
        {},
    ),
    "an embedding trained whole": ("llama", {"modules_to_save": ["embed_tokens"]}, {}),
    "dora in bf16": ("llama", {"method": "dora"}, {"dtype": "bf16"}),
    "lora beside experts": ("mixtral", {"target_modules": ["q_proj", "v_proj"]}, {}),
}


def logits_of(model: Any, prompts: list[np.ndarray]) -> list[np.ndarray]:
    import torch

    model.eval()
    with torch.no_grad():
        return [
            model(torch.from_numpy(prompt.astype("int64"))[None], use_cache=False).logits[0].float().numpy()
            for prompt in prompts
        ]


def largest(left: list[np.ndarray], right: list[np.ndarray]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.long) if kind in ("dora", "rslora") else kind for kind in KINDS]
)
def test_a_merged_model_answers_as_base_and_adapter_do(
    project: MakeProject, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Against PEFT's own forward pass, and against PEFT's own merge where the base is fp32."""
    from transformers import AutoModelForCausalLM

    from charkha.backends.torch import merge
    from charkha.evaluation import open_run
    from charkha.verbs.merging import merge_run

    monkeypatch.setattr(merge, "BLOCK_BYTES", 8192)  # several blocks a weight
    base, adapter, model = KINDS[kind]
    work = project(base, adapter=adapter, model=model, training=LEARN)
    work.train()
    result = merge_run(work.run_folder())
    assert result.verified
    assert result.note is None
    opened = open_run(work.run_folder())
    shard = opened.data.eval
    prompts = [shard.input_ids(row) for row in range(4)]
    merged = logits_of(AutoModelForCausalLM.from_pretrained(work.run_folder() / "merged"), prompts)
    untrained = logits_of(AutoModelForCausalLM.from_pretrained(work.base), prompts)
    assert largest(merged, untrained) > 0.1, "the adapter must matter, or this shows nothing"
    if model.get("dtype") != "bf16":
        assert largest(merged, logits_of(opened.model, prompts)) < 1e-3
        assert largest(merged, logits_of(opened.model.merge_and_unload(), prompts)) < 1e-3


def test_adapters_of_experts_are_merged_by_peft_in_memory_and_that_is_said(project: MakeProject) -> None:
    from transformers import AutoModelForCausalLM

    from charkha.backends.torch.tensor_files import tensors_of_folder
    from charkha.evaluation import open_run
    from charkha.verbs.merging import merge_run

    work = project("mixtral", adapter={"lora_dropout": 0.0}, training=LEARN)
    work.train()
    result = merge_run(work.run_folder())
    assert result.verified
    assert "in memory by PEFT" in (result.note or "")
    assert "expert" in (result.note or "")

    def names(folder: Path) -> set[str]:
        return {tensor.name for tensors in tensors_of_folder(folder).values() for tensor in tensors}

    assert names(work.run_folder() / "merged") == names(work.base), "the base's own names"
    opened = open_run(work.run_folder())
    prompts = [opened.data.eval.input_ids(row) for row in range(4)]
    merged = logits_of(AutoModelForCausalLM.from_pretrained(work.run_folder() / "merged"), prompts)
    assert largest(merged, logits_of(opened.model, prompts)) < 1e-3


def test_prompt_tuning_has_nothing_to_merge(project: MakeProject) -> None:
    from charkha.verbs.merging import merge_run

    work = project(adapter={"method": "prompt_tuning"}, training={"max_steps": 1})
    work.train()
    with pytest.raises(UsageError, match="changes no weight") as caught:
        merge_run(work.run_folder())
    assert caught.value.exit_code == 2
    assert not (work.run_folder() / "merged").exists()


@pytest.mark.parametrize(
    ("quantization", "method"), [pytest.param("fp4", "lora", marks=pytest.mark.long), ("fp4", "dora"), ("int8", "lora")]
)
def test_a_merge_onto_dequantized_weights_has_the_values_that_training_saw(
    project: MakeProject, quantization: str, method: str
) -> None:
    from safetensors.torch import load_file

    from charkha.backends.base import BaseModelSpec
    from charkha.backends.torch.model import load_base
    from charkha.verbs.merging import merge_run

    work = project(
        model={"quantization": quantization}, adapter={"method": method, "target_modules": ["q_proj"]}, training=LEARN
    )
    work.train()
    onto_base = merge_run(work.run_folder())
    assert onto_base.verified
    assert onto_base.note is None
    result = merge_run(work.run_folder(), onto="dequantized")
    assert result.verified
    assert ("activations" in (result.note or "")) == (quantization == "int8")
    loaded = load_base(BaseModelSpec(work.base, "fp32", "sdpa", quantization, "cpu")).dequantize().state_dict()
    merged = load_file(work.run_folder() / "merged" / "model.safetensors")
    whole = load_file(work.base / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert np.abs(merged[name] - whole[name]).max() > 1e-4
    assert np.abs(merged[name] - loaded[name].float()).max() < 1e-6


@pytest.mark.parametrize("quantization", ["fp4", "int8"])
def test_a_base_that_is_stored_quantized_is_trained_on_and_merged(
    project: MakeProject, model_folder: Callable[..., Path], tmp_path: Path, quantization: str
) -> None:
    import shutil

    from charkha.backends.base import BaseModelSpec
    from charkha.backends.torch.model import load_base
    from charkha.verbs.merging import merge_run

    stored = tmp_path / "stored"
    shutil.copytree(model_folder("llama"), stored)
    loaded = load_base(BaseModelSpec(stored, "fp32", "sdpa", quantization, "cpu"))
    (stored / "model.safetensors").unlink()
    loaded.save_pretrained(stored)
    assert "quantization_config" in json.loads((stored / "config.json").read_text())
    work = project(stored, training=LEARN)
    result, events = work.train()
    assert result.eval_loss_after < result.eval_loss_before
    assert any(f"model.quantization: {quantization}" in event.get("text", "") for event in events)
    merged = merge_run(work.run_folder())
    assert merged.onto == "dequantized"
    assert merged.verified
