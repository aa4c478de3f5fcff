"""Experts of a streamed base come one by one, only those that tokens go to, and compute what resident ones do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from streamed_steps import ALL_LINEAR, run_steps, same

from charkha.backends.base import BaseModelSpec, Streaming

ON_ATTENTION = replace(ALL_LINEAR, target_modules=("q_proj", "v_proj"))
LONG = pytest.mark.long
# bf16 products of experts need rows of a multiple of 16 bytes.
SHAPES = {
    "mixtral": {"intermediate_size": 176},
    "qwen3_moe": {"head_dim": 16, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
}


@pytest.fixture(scope="module", autouse=True)
def slab_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHARKHA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def moe(model_folder) -> Callable[[str], Path]:
    return lambda kind: model_folder(kind, **SHAPES[kind])


@pytest.mark.parametrize(
    ("kind", "settings", "streaming"),
    [
        ("mixtral", {}, Streaming()),
        ("mixtral", {"dtype": "bf16", "reentrant": True}, Streaming(expert_slots=2)),
        ("qwen3_moe", {"dtype": "bf16"}, Streaming(hot_layers=1, expert_slots=3)),
        pytest.param("qwen3_moe", {"reentrant": True}, Streaming(slots=3, expert_slots=2), marks=LONG),
        pytest.param("mixtral", {}, Streaming(hot_layers=2), marks=LONG),
    ],
)
def test_streamed_experts_are_resident_ones_bit_for_bit(moe, kind, settings, streaming):
    settings = {"quantization": "none", "adapter": ON_ATTENTION, "steps": 1, **settings}
    assert same(run_steps(moe(kind), **settings), run_steps(moe(kind), streaming=streaming, **settings))


def packed_and_unpacked(load: Callable[[BaseModelSpec], Any]) -> Callable[[BaseModelSpec], Any]:
    """A loader that gives a resident base the numbers that its experts have in NF4, each matrix for itself."""
    import bitsandbytes.functional as bnb
    import torch

    def through(matrix: Any) -> Any:
        packed, state = bnb.quantize_4bit(matrix.contiguous(), quant_type="nf4", compress_statistics=True)
        return bnb.dequantize_4bit(packed, state)

    def loaded(spec: BaseModelSpec) -> Any:
        model = load(spec)
        with torch.no_grad():
            for module in model.modules():
                if "gate_up_proj" in module._parameters and spec.streaming is None:
                    for expert in range(module.num_experts):
                        for matrix in (*module.gate_up_proj[expert].chunk(2), module.down_proj[expert]):
                            matrix.copy_(through(matrix))
        return model

    return loaded


@pytest.mark.parametrize("kind", ["mixtral", pytest.param("qwen3_moe", marks=LONG)])
def test_experts_in_4_bits_are_each_packed_for_itself(moe, monkeypatch, kind):
    from charkha.backends.torch import model

    monkeypatch.setattr(model, "load_base", packed_and_unpacked(model.load_base))
    settings = {"quantization": "nf4", "adapter": ON_ATTENTION, "steps": 1}
    assert same(run_steps(moe(kind), **settings), run_steps(moe(kind), streaming=Streaming(), **settings))


def test_only_experts_that_tokens_go_to_are_brought_and_the_backward_pass_finds_them(moe):
    import torch

    from charkha.backends.torch.model import load_base
    from charkha.backends.torch.streamed_model import engine_of

    model = load_base(BaseModelSpec(moe("qwen3_moe"), "fp32", "sdpa", "none", "cpu", Streaming()))
    engine = engine_of(model)
    assert engine is not None
    assert engine.experts is not None
    layer = model.model.layers[0].mlp.experts
    brought: list[int] = []
    send = engine.experts._transfer.start
    engine.experts._transfer.start = lambda unit, slot: (brought.append(unit), send(unit, slot))
    rows = torch.randn(3, 64, requires_grad=True)
    chosen = torch.tensor([[4, 1], [1, 4], [4, 2]])
    answer = layer(rows, chosen, torch.full((3, 2), 0.5))
    first = engine.slab.expert_units(0)[0]
    assert [unit - first for unit in brought] == [1, 2, 4]
    answer.sum().backward()
    assert [unit - first for unit in brought] == [1, 2, 4]
    assert rows.grad is not None


def test_slots_take_no_more_than_was_asked(moe):
    from charkha.backends.torch.model import load_base
    from charkha.backends.torch.streamed_model import engine_of

    base = BaseModelSpec(moe("mixtral"), "fp32", "sdpa", "none", "cpu")
    sizes = {}
    for slots in (2, 3, 9):
        engine = engine_of(load_base(replace(base, streaming=Streaming(expert_slots=slots))))
        assert engine is not None
        assert engine.experts is not None
        sizes[slots] = (engine.experts.slot_count, engine.device_bytes)
    expert = engine.slab.experts[0][0].byte_count
    assert [count for count, _ in sizes.values()] == [2, 3, 4]  # a layer has four
    assert sizes[3][1] - sizes[2][1] == expert


def test_an_expert_that_is_lost_while_in_use_ends_the_run(moe, monkeypatch):
    from charkha.backends.torch.expert_slots import ExpertSlots, WeightsOverwritten

    send = ExpertSlots._send_for

    def careless(self, unit, kept):
        return send(self, unit, kept - {self._entered[0]})

    monkeypatch.setattr(ExpertSlots, "_send_for", careless)
    settings = {"quantization": "none", "adapter": ON_ATTENTION, "steps": 1}
    with pytest.raises(WeightsOverwritten, match="was brought into the slot of expert"):
        run_steps(moe("mixtral"), streaming=Streaming(expert_slots=2), prepare=forget_uses, **settings)


def forget_uses(engine: Any) -> None:
    """The oldest slot is then always the first."""
    engine.experts._last_use = Always(engine.experts.slot_count)


class Always(list):  # type: ignore[type-arg]
    def __init__(self, count: int) -> None:
        super().__init__([0] * count)

    def __setitem__(self, place: Any, value: Any) -> None:
        pass
