"""Loading a base: what the libraries would silently leave undone is an error."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from charkha.backends.base import AdapterSpec, BaseModelSpec
from charkha.errors import EnvironmentProblem, UsageError

ModelFolder = Callable[..., Path]


def spec(folder: Path, quantization: str = "none", dtype: Any = "fp32") -> BaseModelSpec:
    return BaseModelSpec(folder, dtype, "sdpa", quantization, "cpu")


def lora(*targets: str) -> AdapterSpec:
    return AdapterSpec("lora", 4, 8, 0.0, targets if len(targets) != 1 else targets[0])


FALCONS = {
    "multi-query": {"multi_query": True, "new_decoder_architecture": False, "alibi": False},
    "grouped, with two norms": {"num_kv_heads": 2, "new_decoder_architecture": True, "alibi": False},
    "with biases and alibi": {"multi_query": False, "new_decoder_architecture": False, "alibi": True, "bias": True},
}


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("shape", FALCONS)
def test_every_linear_layer_of_falcon_is_quantized_to_its_own_weights(
    new_model: Callable[..., Path], tmp_path: Path, shape: str, quantization: str
) -> None:
    """Falcon's linear class is a subclass of nn.Linear, which transformers does not replace and says nothing."""
    import torch

    from charkha.backends.torch.model import load_base, quantized_modules

    folder = new_model(tmp_path / "falcon", "falcon", ffn_hidden_size=172, **FALCONS[shape])
    whole, packed = load_base(spec(folder)), load_base(spec(folder, quantization))
    linears = {
        name for name, module in whole.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    assert set(quantized_modules(packed)) == linears
    ids = torch.arange(24)[None] + 8
    with torch.no_grad():
        exact, rounded = whole(ids).logits, packed(ids).logits
    noise = float((exact - rounded).abs().mean() / exact.abs().mean())
    assert 0 < noise < (0.05 if quantization == "int8" else 0.4)


def test_a_base_whose_linear_layers_would_stay_whole_is_refused_in_four_bits(
    model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    from charkha.backends.torch import model

    monkeypatch.setattr(model, "quantizable_class", lambda model_type: AutoModelForCausalLM)
    with pytest.raises(EnvironmentProblem, match="FalconLinear"):
        model.load_base(spec(model_folder("falcon"), "nf4"))


def copy_of(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def test_weights_missing_from_the_files_are_not_replaced_by_random_numbers(
    model_folder: ModelFolder, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    from charkha.backends.torch.model import load_base

    folder = copy_of(model_folder("llama"), tmp_path / "base")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EnvironmentProblem, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load_base(spec(folder))


def test_weights_of_another_shape_than_the_config_says_are_refused(model_folder: ModelFolder, tmp_path: Path) -> None:
    import json

    from charkha.backends.torch.model import load_base

    folder = copy_of(model_folder("llama"), tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    with pytest.raises(EnvironmentProblem, match=r"\(64, 172\) in the files, \(64, 128\) by the config"):
        load_base(spec(folder))


@pytest.mark.parametrize("damage", ["cut", "gone", "pickle"])
def test_weights_that_cannot_be_read_are_told(model_folder: ModelFolder, tmp_path: Path, damage: str) -> None:
    from charkha.backends.torch.model import load_base

    folder = copy_of(model_folder("llama"), tmp_path / "base")
    weights = folder / "model.safetensors"
    if damage == "cut":
        os.truncate(weights, weights.stat().st_size - 100)
    elif damage == "gone":
        weights.unlink()
    else:
        weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(EnvironmentProblem) as caught:
        load_base(spec(folder))
    assert str(folder) in (caught.value.where or "")


def test_target_modules_that_name_no_layer_are_refused(model_folder: ModelFolder) -> None:
    from charkha.backends.torch.adapters import attach_adapter
    from charkha.backends.torch.model import load_base

    for targets in (("q_prj",), ("lm_head", "q_proj"), ("embed_tokens", "q_proj")):
        with pytest.raises(UsageError) as caught:
            attach_adapter(load_base(spec(model_folder("llama"))), lora(*targets), False)
        assert caught.value.where == "adapter.target_modules"


def test_an_evaluation_changes_neither_gradients_nor_logits_of_a_four_bit_base(model_folder: ModelFolder) -> None:
    """bitsandbytes repacks 4-bit weights for good at the first forward pass in eval mode on CPUs with AVX512-BF16."""
    import torch

    from charkha.backends.torch.adapters import attach_adapter
    from charkha.backends.torch.model import load_base

    folder = model_folder("llama")  # intermediate size 172: an odd number of quantization blocks
    model = attach_adapter(load_base(spec(folder, "nf4", "bf16")), lora("all-linear"), False)
    ids = torch.arange(20)[None] + 10

    def logits_and_gradients() -> tuple[Any, dict[str, Any]]:
        model.train()
        model.zero_grad()
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return output.logits.detach().clone(), gradients

    before = logits_and_gradients()
    model.eval()
    with torch.no_grad():
        evaluated = model(input_ids=ids).logits
    after = logits_and_gradients()
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[0], evaluated)
    assert before[1].keys() == after[1].keys() != set()
    assert all(torch.equal(before[1][name], after[1][name]) for name in before[1])
