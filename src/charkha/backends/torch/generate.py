"""Greedy or sampled continuation of prompts that are already tokens: whole batches for scoring, a stream for chat."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from charkha.backends.torch.device_errors import in_parts_that_fit
from charkha.backends.torch.loss import causal_model
from charkha.backends.torch.virtual_tokens import embedded_rows, uses_virtual_tokens
from charkha.data.order import batches_by_length

_TOKENS_PER_BATCH = 16384  # rows x (longest prompt + new tokens); bounds the key/value cache


def generate_greedy(
    model: Any, prompts: Sequence[np.ndarray], *, max_new_tokens: int, end_ids: frozenset[int], pad_id: int
) -> list[list[int]]:
    """The likeliest continuation of each prompt, without the end token, at most `max_new_tokens` long.

    Prompts are padded on the left, so that a row's answer does not depend on its neighbours beyond rounding.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    lengths = np.array([len(prompt) + max_new_tokens for prompt in prompts], dtype=np.int64)

    def answered(rows: np.ndarray) -> list[list[int]]:
        return _generate_batch(model, [prompts[int(row)] for row in rows], max_new_tokens, end_ids, pad_id)

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for rows in batches_by_length(lengths, _TOKENS_PER_BATCH) if len(prompts) else []:
                for part, new in in_parts_that_fit(rows, answered):
                    for row, ids in zip(part, new, strict=True):
                        answers[int(row)] = ids
    finally:
        model.train(was_training)
    return answers


def stream(
    model: Any,
    prompt: np.ndarray,
    *,
    decode: Callable[[list[int]], str],
    max_new_tokens: int,
    end_ids: frozenset[int],
    temperature: float,
    seed: int,
) -> Iterator[str]:
    """Pieces of text as they are produced; temperature 0 is greedy. The same seed gives the same answer.

    The text so far is decoded anew with every token and only its stable part is given out, so a character of several
    tokens (Hindi by bytes) appears once it is whole.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    device = next(model.parameters()).device
    model.eval()
    ids = torch.from_numpy(prompt.astype(np.int64))[None].to(device)
    inputs: dict[str, torch.Tensor] = {"input_ids": ids}
    cache: Any = None
    new: list[int] = []
    shown = ""
    with torch.no_grad(), _one_product_at_the_head(model):
        if uses_virtual_tokens(model):
            inputs = {"inputs_embeds": embedded_rows(model, ids, torch.ones_like(ids))[0]}
            model = model.get_base_model()
        last_alone = _of_the_last_token_alone(model)
        for _ in range(max_new_tokens):
            outputs = model(**inputs, past_key_values=cache, use_cache=True, **last_alone)
            cache = outputs.past_key_values
            chosen = _choose(outputs.logits[0, -1].float().cpu(), temperature, generator)
            if chosen in end_ids:
                break
            new.append(chosen)
            text = decode(new)
            if not text.endswith("\ufffd") and len(text) > len(shown):
                yield text[len(shown) :]
                shown = text
            inputs = {"input_ids": torch.tensor([[chosen]], device=device)}
    rest = decode(new)[len(shown) :]
    if rest:
        yield rest


def _of_the_last_token_alone(model: Any) -> dict[str, int]:
    """What has a model make logits of the last token only, where its class can: those of a long prompt are large."""
    takes = inspect.signature(causal_model(model).forward).parameters
    return {"logits_to_keep": 1} if "logits_to_keep" in takes else {}


def _choose(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature <= 0:
        return int(logits.argmax())
    return int(torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=generator))


def _generate_batch(
    model: Any, prompts: list[np.ndarray], max_new_tokens: int, end_ids: frozenset[int], pad_id: int
) -> list[list[int]]:
    width = max(len(prompt) for prompt in prompts)
    ids = np.full((len(prompts), width), pad_id, dtype=np.int64)
    mask = np.zeros((len(prompts), width), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    device = next(model.parameters()).device
    config = _greedy_config(model, max_new_tokens, end_ids, pad_id)
    inputs = {"input_ids": torch.from_numpy(ids).to(device), "attention_mask": torch.from_numpy(mask).to(device)}
    if uses_virtual_tokens(model):
        embeds, wide_mask = embedded_rows(model, inputs["input_ids"], inputs["attention_mask"])
        inputs = {"inputs_embeds": embeds, "attention_mask": wide_mask}
        model, width = model.get_base_model(), 0  # from embeddings, `generate` gives back the new tokens only
    with _own_generation_config(model, config), _one_product_at_the_head(model):
        output = model.generate(**inputs, generation_config=config)
    return [_until_end(row, end_ids) for row in output[:, width:].cpu().tolist()]


def _greedy_config(model: Any, max_new_tokens: int, end_ids: frozenset[int], pad_id: int) -> Any:
    """A fresh config: the model's own may ask for sampling, which would make scores differ from run to run."""
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(end_ids),
        pad_token_id=pad_id,
        bos_token_id=getattr(model.config, "bos_token_id", None),
        use_cache=True,
    )


@contextmanager
def _own_generation_config(model: Any, config: Any) -> Iterator[None]:
    """Puts `config` in the place of the model's own for a while.

    `generate` fills whatever the config it is given leaves open from the model's own: a repetition penalty, beams, or
    tokens that may not be said. PEFT hands its copy of the model's own to the model beneath, so both are replaced.
    """
    holders = [model, model.get_base_model()] if hasattr(model, "get_base_model") else [model]
    before = [holder.generation_config for holder in holders]
    for holder in holders:
        holder.generation_config = config
    try:
        yield
    finally:
        for holder, own in zip(holders, before, strict=True):
            holder.generation_config = own


@contextmanager
def _one_product_at_the_head(model: Any) -> Iterator[None]:
    """Has the head multiply all rows at once.

    It is given the last token of each row as a view, and torch takes a frozen weight times a view row by row; on a CPU
    in 16 bits with a copy of the weight for each (at::matmul, should_fold).
    """
    head = causal_model(model).get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _head, given: (_with_own_strides(given[0]), *given[1:]))
    try:
        yield
    finally:
        hook.remove()


def _with_own_strides(last: torch.Tensor) -> torch.Tensor:
    """A copy: of a single row `contiguous` would give back the view, with its strides."""
    return last.clone(memory_format=torch.contiguous_format)


def _until_end(ids: list[int], end_ids: frozenset[int]) -> list[int]:
    for place, token in enumerate(ids):
        if token in end_ids:
            return ids[:place]
    return ids
