"""Memory while a model answers: the closed form against what generation holds on a CPU."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from planned_runs import PlannedRun  # noqa: E402

from charkha.backends.base import BaseModelSpec  # noqa: E402
from charkha.backends.torch.adapters import attach_adapter  # noqa: E402
from charkha.backends.torch.generate import generate_greedy, stream  # noqa: E402
from charkha.backends.torch.memory import CpuPeak  # noqa: E402
from charkha.backends.torch.model import load_base  # noqa: E402
from charkha.plan.architecture import read_architecture  # noqa: E402
from charkha.plan.generation_memory import GenerationMemory, generation_memory, merged, with_the_adapter  # noqa: E402
from charkha.plan.memory_settings import MemorySettings  # noqa: E402

FEW_WORDS = {"vocab_size": 300}
SLIDING = {"head_dim": 64, "sliding_window": 16, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]}
SLIDING_16M = {**SLIDING, "layer_types": ["sliding_attention"] * 5 + ["full_attention"]}
ONE_KEY = {"multi_query": True, "new_decoder_architecture": False, "alibi": False, "ffn_hidden_size": 1536}
SHARED_KEYS = {"num_kv_heads": 2, "new_decoder_architecture": True, "alibi": False, "ffn_hidden_size": 1536}
# A run, whether its merged model answers, the prompts' lengths, new tokens.
QUICK = [
    (PlannedRun("1M", quantization="nf4"), False, (60, 50), 3),
    (PlannedRun("1M", kind="gemma3_text", settings={**SLIDING, **FEW_WORDS}), True, (4,) * 32, 20),
]
OTHERS = [
    (PlannedRun("16M"), False, (600,), 8),
    (PlannedRun("16M"), True, (600,), 8),
    (PlannedRun("16M", dtype="fp32"), False, (300, 300), 8),
    (PlannedRun("16M", dtype="fp32", quantization="nf4"), False, (600,), 8),
    (PlannedRun("16M", quantization="nf4"), False, (4,) * 40, 40),
    (PlannedRun("16M", settings=FEW_WORDS), False, (4,) * 40, 60),
    (PlannedRun("16M", kind="qwen3", settings={"head_dim": 64}), False, (600, 500), 8),
    (PlannedRun("16M", kind="gemma3_text", settings=SLIDING_16M), False, (600,), 8),
    (PlannedRun("16M", kind="gemma3_text", settings=SLIDING_16M), True, (4,) * 24, 60),
    (PlannedRun("16M", kind="mistral", settings={"sliding_window": 32}), False, (8,) * 24, 60),
    (PlannedRun("16M", kind="gemma2", attention="eager", settings={"head_dim": 64}), True, (4,) * 24, 60),
    (PlannedRun("16M", kind="falcon", settings=ONE_KEY), False, (600,), 8),
    (PlannedRun("16M", kind="falcon", settings=ONE_KEY), True, (4,) * 24, 60),
    (PlannedRun("16M", kind="falcon", settings=SHARED_KEYS), False, (4,) * 24, 60),
    (PlannedRun("16M", method="dora"), False, (600,), 8),
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


def predicted(run: PlannedRun, base: Path, is_merged: bool, prompts: tuple[int, ...], new: int) -> GenerationMemory:
    values: dict[str, Any] = {"dtype": run.dtype, "method": run.method, "quantization": run.quantization}
    settings = MemorySettings(rows=1, tokens=1, r=8, device="cpu", attention=run.attention, **values)
    return generation_memory(
        read_architecture(json.loads((base / "config.json").read_text(encoding="utf-8"))),
        merged(settings) if is_merged else with_the_adapter(settings),
        rows=len(prompts),
        prompt=max(prompts),
        tokens=max(prompts) + new - 1,  # the last new token is not read
        padded=len(set(prompts)) > 1,
    )


def loaded(run: PlannedRun, base: Path, is_merged: bool) -> Any:
    quantization = "none" if is_merged else run.quantization
    model = load_base(BaseModelSpec(base, run.dtype, run.attention, quantization, "cpu"))
    gc.collect()  # what is freed while a peak is measured would be taken off it
    return (model if is_merged else attach_adapter(model, run.adapter, False)).eval()


@pytest.mark.parametrize(("run", "is_merged", "prompts", "new"), QUICK, ids=repr)
def test_the_predicted_memory_of_answering_is_the_measured_one(run, is_merged, prompts, new, bases):
    require_measured(run, is_merged, prompts, new, bases)


@pytest.mark.long
@pytest.mark.parametrize(("run", "is_merged", "prompts", "new"), OTHERS, ids=repr)
def test_the_predicted_memory_of_every_kind_of_answering_is_the_measured_one(run, is_merged, prompts, new, bases):
    require_measured(run, is_merged, prompts, new, bases)


def require_measured(run: PlannedRun, is_merged: bool, prompts: tuple[int, ...], new: int, bases: Path) -> None:
    base = run.base(bases)
    model = loaded(run, base, is_merged)
    texts = [np.arange(length) % 100 + 3 for length in prompts]
    with CpuPeak(model) as measured:
        generate_greedy(model, texts, max_new_tokens=new, end_ids=frozenset(), pad_id=0)
    found = predicted(run, base, is_merged, prompts, new)
    assert sum(found.terms.values()) == found.peak_bytes == pytest.approx(measured.peak_bytes, rel=0.05)


def test_a_conversation_keeps_no_logits_of_its_prompt(bases):
    run, prompt = PlannedRun("1M", settings={"vocab_size": 8000}), np.arange(200) + 3
    base = run.base(bases)
    model = loaded(run, base, False)
    with CpuPeak(model) as measured:
        pieces = list(
            stream(
                model, prompt, decode=lambda ids: "x" * len(ids), max_new_tokens=3, end_ids=frozenset(), temperature=0,
                seed=0,
            )
        )  # fmt: skip
    assert len(pieces) == 3
    assert predicted(run, base, False, (200,), 3).peak_bytes == pytest.approx(measured.peak_bytes, rel=0.05)


def test_a_batch_of_answers_copies_no_head_for_each_row(bases):
    run, prompts = PlannedRun("1M", settings={"vocab_size": 8000}), [np.arange(4) + 3] * 32
    model = loaded(run, run.base(bases), False)
    head = model.get_base_model().lm_head.weight
    with CpuPeak(model) as measured:
        together = generate_greedy(model, prompts, max_new_tokens=2, end_ids=frozenset(), pad_id=0)
    held = predicted(run, run.base(bases), False, (4,) * 32, 2)
    assert measured.peak_bytes < held.peak_bytes + 4 * head.numel() * head.element_size()
    assert together == [together[0]] * 32
