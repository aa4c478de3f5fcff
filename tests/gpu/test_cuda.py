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


@pytest.mark.parametrize("sliding_window", [None, 64])
def test_torchs_variable_length_kernel_attends_as_document_by_document(sliding_window):
    """bf16, grouped key-value heads; outputs and gradients against sdpa over each document in fp32."""
    import torch

    from charkha.backends.torch import document_attention

    lengths = [5, 130, 1, 64, 300]
    bounds = torch.tensor([0, *lengths], dtype=torch.int32, device="cuda").cumsum(0, dtype=torch.int32)
    module = torch.nn.Module()
    module.num_key_value_groups = 4
    torch.manual_seed(0)
    shapes = ((1, 8, sum(lengths), 64), (1, 2, sum(lengths), 64), (1, 2, sum(lengths), 64))
    exact = [torch.randn(shape, device="cuda").bfloat16().float().requires_grad_() for shape in shapes]
    narrow = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    assert document_attention._has_kernel(narrow[0], narrow[2])
    assert not document_attention._has_kernel(exact[0], exact[2])
    settings = {"scaling": 0.125, "sliding_window": sliding_window, "cu_seq_lens_q": bounds, "max_length_q": 300}
    outputs = [
        document_attention.documents_attention(module, *tensors, None, **settings)[0] for tensors in (exact, narrow)
    ]
    slope = torch.randn_like(outputs[0])
    for output in outputs:
        output.backward(slope.to(output.dtype))
    pairs = [outputs, *([wide.grad, short.grad] for wide, short in zip(exact, narrow, strict=True))]
    for wide, short in pairs:
        assert (wide - short.float()).abs().max() < 0.02 * wide.abs().max()


def test_a_packed_run_learns_through_the_kernel(tmp_path):
    result = train(tmp_path / "run", "data.packing=true", "model.dtype=bf16", "model.attention=sdpa")
    assert result["eval_loss_after"] < result["eval_loss_before"]
