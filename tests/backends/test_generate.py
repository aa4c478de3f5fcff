"""Greedy answers depend on the weights alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from charkha.backends.base import AdapterSpec, BaseModelSpec

PROMPTS = [np.arange(10, 14), np.arange(20, 31), np.array([40]), np.arange(50, 57)]


def load(folder: Path, adapter: bool = False) -> Any:
    from charkha.backends.torch.adapters import attach_adapter
    from charkha.backends.torch.model import load_base

    model = load_base(BaseModelSpec(folder, "fp32", "sdpa", "none", "cpu"))
    return attach_adapter(model, AdapterSpec("lora", 2, 4, 0.0, "all-linear"), False) if adapter else model


def generate(model: Any, prompts: list[np.ndarray] = PROMPTS, ends: frozenset[int] = frozenset({1})) -> list[list[int]]:
    from charkha.backends.torch.generate import generate_greedy

    return generate_greedy(model, prompts, max_new_tokens=12, end_ids=ends, pad_id=2)


@pytest.mark.parametrize("adapter", [False, True])
def test_the_models_own_generation_settings_do_not_change_greedy_answers(
    model_folder: Callable[..., Path], adapter: bool
) -> None:
    from transformers import GenerationConfig

    model = load(model_folder("llama"), adapter)
    plain = generate(model)
    own = GenerationConfig(
        do_sample=True, temperature=5.0, top_k=3, repetition_penalty=5.0, num_beams=3, no_repeat_ngram_size=1,
        min_new_tokens=3, suppress_tokens=list(range(100, 300)), eos_token_id=[plain[0][0]], max_length=3,
    )  # fmt: skip
    model.generation_config = own
    if adapter:
        model.get_base_model().generation_config = own
    assert generate(model) == plain
    assert model.generation_config is own, "what a user finds on the model is left as it was"


def test_an_answer_is_the_chain_of_likeliest_tokens(model_folder: Callable[..., Path]) -> None:
    import torch

    model = load(model_folder("llama"))
    ids = PROMPTS[1].tolist()
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    assert generate(model)[1] == ids[len(PROMPTS[1]) :]


def test_an_answer_does_not_depend_on_its_neighbours_in_the_batch(model_folder: Callable[..., Path]) -> None:
    model = load(model_folder("llama"))
    assert [generate(model, [prompt])[0] for prompt in PROMPTS] == generate(model)


def test_an_answer_ends_before_its_end_token(model_folder: Callable[..., Path]) -> None:
    model = load(model_folder("llama"))
    whole = generate(model)
    cut = generate(model, ends=frozenset({whole[1][4], 1}))
    assert cut[1] == whole[1][: whole[1].index(whole[1][4])]


def test_no_prompts_give_no_answers_and_the_mode_of_the_model_is_kept(model_folder: Callable[..., Path]) -> None:
    model = load(model_folder("llama"))
    model.train()
    assert generate(model, []) == []
    generate(model)
    assert model.training
