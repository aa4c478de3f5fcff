"""Embedding and head of a streamed base on the host: the same numbers, and no weight of theirs on the device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from streamed_steps import run_steps, same

from charkha.backends.base import BaseModelSpec, Streaming

BOTH = Streaming(embedding_on_host=True, head_on_host=True)


@pytest.fixture(scope="module", autouse=True)
def slab_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHARKHA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.parametrize(
    ("kind", "streaming"),
    [
        ("llama", Streaming(embedding_on_host=True)),
        ("gemma3_text", BOTH),  # tied, and scaled by its own class
        pytest.param("llama", BOTH, marks=pytest.mark.long),
        pytest.param("qwen2", BOTH, marks=pytest.mark.long),
        pytest.param("gemma3_text", Streaming(embedding_on_host=True), marks=pytest.mark.long),
    ],
)
def test_tables_on_the_host_change_no_number(model_folder, kind, streaming):
    settings = {"dtype": "bf16", "steps": 1}
    streamed = run_steps(model_folder(kind), streaming=streaming, **settings)
    assert same(run_steps(model_folder(kind), **settings), streamed)


def loaded(folder: Any, streaming: Streaming | None, dtype: Any = "fp32") -> Any:
    from charkha.backends.torch.model import load_base

    return load_base(BaseModelSpec(folder, dtype, "sdpa", "none", "cpu", streaming))


def test_tables_are_no_parameters_and_are_counted_all_the_same(model_folder):
    from charkha.backends.torch.streamed_tables import weights_on_host

    for kind in ("llama", "qwen2"):
        model, resident = (loaded(model_folder(kind), way) for way in (BOTH, None))
        assert not [name for name, _ in model.named_parameters() if "embed" in name or "head" in name]
        of_streamed, of_resident = (sum(p.numel() for p in m.parameters()) for m in (model, resident))
        assert of_streamed + weights_on_host(model) == of_resident
    tied_to_the_device = loaded(model_folder("qwen2"), Streaming(embedding_on_host=True))
    assert weights_on_host(tied_to_the_device) == 0


def test_of_a_file_only_the_table_is_mapped_wherever_it_begins(tmp_path):
    import torch
    from safetensors.torch import save_file

    from charkha.backends.torch.host_tables import HostTable
    from charkha.backends.torch.tensor_files import tensors_of_file

    path, table = tmp_path / "model.safetensors", torch.arange(3 * 700.0).view(700, 3)
    save_file({"a": torch.zeros(1 << 20), "b": table, "c": torch.zeros(1 << 20)}, path)
    stored = {tensor.name: tensor for tensor in tensors_of_file(path)}
    held = HostTable(stored["b"], torch.float32)
    assert torch.equal(held.tensor, table)
    assert len(held._map) < table.nbytes + 65536
    assert torch.equal(HostTable(stored["c"], torch.float32).tensor, torch.zeros(1 << 20)[None])


@pytest.mark.parametrize(("dtype", "slack"), [("fp32", 1e-5), ("bf16", 2e-2)])
def test_a_head_in_blocks_gives_loss_and_gradient_of_a_whole_one(model_folder, monkeypatch, dtype, slack):
    import torch

    from charkha.backends.torch import host_tables
    from charkha.backends.torch.loss import choose_loss, training_loss

    monkeypatch.setattr(host_tables, "_BLOCK_BYTES", 9000)  # some 35 or 70 rows of 320
    monkeypatch.setattr("charkha.backends.torch.head_loss._LEAST_ROWS", 100)
    monkeypatch.setattr("charkha.backends.torch.head_loss._CHUNK_BYTES", 1)
    found = []
    for streaming in (None, BOTH):
        model = loaded(model_folder("llama"), streaming, dtype)
        assert choose_loss(model, "chunked") == "chunked"
        model.requires_grad_(False)
        probe = torch.zeros(1, 1, 64, requires_grad=True)  # added to every position of what the head reads
        model.model.norm.register_forward_hook(lambda module, args, output, probe=probe: output + probe.to(output))
        ids = torch.arange(40).view(2, 20) + 3
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        loss = training_loss(model, inputs, torch.tensor(38), "chunked")
        loss.backward()
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
        found.append((loss.item(), probe.grad, logits))
    (loss, gradient, logits), (own_loss, own_gradient, own_logits) = found
    assert own_loss == pytest.approx(loss, rel=slack)
    assert torch.allclose(own_gradient, gradient, rtol=0, atol=slack * float(gradient.abs().max()))
    assert torch.allclose(own_logits.float(), logits.float(), rtol=0, atol=slack * float(logits.abs().max()))


def test_a_head_on_the_host_takes_the_chunked_loss_whatever_is_asked(model_folder):
    from charkha.backends.torch.loss import choose_loss

    model = loaded(model_folder("llama"), replace(BOTH, embedding_on_host=False))
    assert choose_loss(model, "full") == "chunked"
