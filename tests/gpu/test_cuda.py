"""On a CUDA GPU: what a CPU cannot show. Run by `make test-gpu`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from charkha.config_file import dump_config, load_config
from charkha.starter.paths import quickstart_config

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def needs_cuda():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")


def train(folder: Path, *overrides: str) -> dict:
    from dataclasses import asdict

    from charkha.training.session import train as train_run

    config = load_config(quickstart_config(), ["training.max_steps=12", f"output={folder}", *overrides])
    path = folder.parent / f"{folder.name}.yaml"
    resolved = config.config.model_dump(mode="json")
    resolved["model"]["base"] = "starter"
    resolved["data"]["train"] = [str(quickstart_config().parent / "data/train.jsonl")]
    resolved["data"]["eval"] = str(quickstart_config().parent / "data/heldout.jsonl")
    path.write_text(dump_config(type(config.config).model_validate(resolved)), encoding="utf-8")
    return asdict(train_run(path, [], lambda event: None))


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_lora_learns_on_the_gpu_and_reports_its_peak(tmp_path, quantization, dtype):
    result = train(tmp_path / "run", f"model.quantization={quantization}", f"model.dtype={dtype}")
    assert result["eval_loss_after"] < result["eval_loss_before"]
    assert result["peak_memory_bytes"] > 1_000_000
    choices = json.loads((tmp_path / "run/manifest.json").read_text())["choices"]
    assert any(choice["key"] == "model.attention" for choice in choices)


def test_interrupted_and_resumed_equals_undisturbed(tmp_path):
    from safetensors.numpy import load_file

    train(tmp_path / "whole", "checkpoint.every=6 steps")
    train(tmp_path / "cut", "checkpoint.every=6 steps")
    import shutil

    shutil.rmtree(tmp_path / "cut/checkpoints/step-000012")
    shutil.rmtree(tmp_path / "cut/adapter")
    train(tmp_path / "cut", "checkpoint.every=6 steps")
    whole = load_file(tmp_path / "whole/adapter/adapter_model.safetensors")
    cut = load_file(tmp_path / "cut/adapter/adapter_model.safetensors")
    assert all((whole[name] == cut[name]).all() for name in whole)
