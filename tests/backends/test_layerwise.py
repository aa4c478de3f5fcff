"""The check of a merge with one layer in memory at a time: the figures of the whole models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streamed_steps import ALL_LINEAR, run_steps

from charkha.backends.base import BaseModelSpec, Streaming

LONG = pytest.mark.long
PROMPTS = [np.arange(3, 3 + count) for count in (7, 12, 9)]


@pytest.fixture
def merged(model_folder, tmp_path) -> Any:
    """`merged(kind)` -> (base, adapter folder, merged folder) of a model with a random adapter."""
    from charkha.backends.torch.merge import merge_adapter

    def make(kind: str, method: str = "lora") -> tuple[BaseModelSpec, Path, Path]:
        from dataclasses import replace

        base = BaseModelSpec(model_folder(kind), "fp32", "sdpa", "none", "cpu")
        adapter = replace(ALL_LINEAR, method=method)
        trained = run_steps(base.path, quantization="none", adapter=adapter, steps=1).model
        trained.save_pretrained(str(tmp_path / "adapter"))
        merge_adapter(base.path, tmp_path / "adapter", tmp_path / "merged")
        return base, tmp_path / "adapter", tmp_path / "merged"

    return make


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("llama", "lora"),
        ("gemma3_text", "dora"),
        pytest.param("falcon", "lora", marks=LONG),
        pytest.param("qwen2", "rslora", marks=LONG),
        pytest.param("gpt_neox", "lora", marks=LONG),  # whose head has another name in the files
    ],
)
def test_the_figures_are_those_of_the_whole_models(merged, kind, method):
    from charkha.backends.torch.verify import check_merge

    base, adapter, folder = merged(kind, method)
    whole = check_merge(base, adapter, folder, PROMPTS, layerwise=False)
    assert whole.verified
    assert whole.max_logit_difference > 0
    assert check_merge(base, adapter, folder, PROMPTS, layerwise=True) == whole


def test_a_wrong_merge_is_found_layer_by_layer_too(merged):
    from charkha.backends.torch.verify import check_merge

    base, adapter, _folder = merged("llama")
    assert not check_merge(base, adapter, base.path, PROMPTS, layerwise=True).verified


def test_each_layer_is_read_once_for_all_rows_and_dropped_before_the_next(merged, monkeypatch):
    from charkha.backends.torch.layerwise import LayersFromFiles
    from charkha.backends.torch.verify import check_merge

    base, adapter, folder = merged("llama")
    seen: list[tuple[str, int]] = []
    for name in ("bring", "drop"):
        own = getattr(LayersFromFiles, name)

        def told(self: Any, number: int, name: str = name, own: Any = own) -> None:
            seen.append((name, number))
            own(self, number)

        monkeypatch.setattr(LayersFromFiles, name, told)
    check_merge(base, adapter, folder, PROMPTS, layerwise=True)
    one_pass = [("bring", 0), ("drop", 0), ("bring", 1), ("drop", 1)]
    emptied = [("drop", 0), ("drop", 1)]
    assert seen == [*emptied, *one_pass, *emptied, *one_pass, *one_pass]


def test_what_memory_holds_is_checked_whole_and_what_it_does_not_by_layers(merged, monkeypatch):
    from charkha.backends.torch import verify

    base, _adapter, _folder = merged("llama")
    assert not verify._is_layerwise(base, None)
    monkeypatch.setattr(verify, "_available_bytes", lambda device: 1000)
    assert verify._is_layerwise(base, None)


def test_names_that_differ_from_the_files_are_not_run_by_layers(model_folder):
    from charkha.backends.torch.layerwise import can_run_layerwise

    for kind, possible in (("llama", True), ("falcon", True), ("mixtral", False)):
        assert can_run_layerwise(BaseModelSpec(model_folder(kind), "fp32", "sdpa", "none", "cpu")) is possible


def test_what_goes_wrong_in_one_row_ends_all(model_folder):
    import torch

    from charkha.backends.torch.layerwise import in_lockstep

    layer = torch.nn.Linear(2, 2)

    def run(row: int) -> Any:
        if row == 1:
            raise KeyError(row)
        return layer(torch.zeros(2))

    with pytest.raises(KeyError):
        in_lockstep(layer, [layer], [0, 1, 2], run)


@pytest.mark.long
def test_a_streamed_reference_is_that_of_a_resident_base(model_folder, merged, tmp_path, monkeypatch):
    from dataclasses import replace

    from charkha.backends.torch.verify import _reference_logits

    monkeypatch.setenv("CHARKHA_CACHE", str(tmp_path / "cache"))
    base, adapter, _folder = merged("llama")
    packed = replace(base, quantization="nf4")
    resident = _reference_logits(packed, adapter, PROMPTS, None)
    streamed = _reference_logits(replace(packed, streaming=Streaming()), adapter, PROMPTS, None)
    assert all(np.array_equal(left, right) for left, right in zip(resident, streamed, strict=True))
