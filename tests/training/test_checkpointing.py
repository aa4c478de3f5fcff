"""Selective checkpointing: the weights of a full one, with attention computed once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402


class Counted(TorchDispatchMode):
    """Forward passes of attention's kernel that really run."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.attention += func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def counted() -> Iterator[Counted]:
    with Counted() as mode:
        yield mode


@pytest.mark.parametrize(
    ("method", "placement"),
    [
        ("lora", "resident"),
        pytest.param("full", "resident", marks=pytest.mark.long),
        pytest.param("dora", "streamed", marks=pytest.mark.long),
    ],
)
def test_selective_trains_the_same_weights_and_runs_attention_once(
    project, model_folder, monkeypatch, tmp_path, method, placement
):
    monkeypatch.setenv("CHARKHA_CACHE", str(tmp_path / "cache"))
    work = project(
        model_folder("llama"),
        model={"placement": placement},
        adapter={"method": method},
        training={"max_steps": 2, "eval_every": "auto"},
        data={"eval": None},
    )
    ran = {}
    for kind in ("full", "selective"):
        with counted() as mode:
            result, events = work.train(f"training.gradient_checkpointing={kind}", output=kind)
        ran[kind] = mode.attention, result.peak_memory_bytes
        assert not any("does not carry it out" in event.get("text", "") for event in events)
    once, twice = ran["selective"][0], ran["full"][0]
    assert 0 < once < twice == 2 * once
    assert ran["selective"][1] >= ran["full"][1]
    full, selective = (work.weights(kind) for kind in ("full", "selective"))
    assert full.keys() == selective.keys()
    assert all(torch.equal(full[name], selective[name]) for name in full)
