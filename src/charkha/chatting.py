"""A conversation with a run's model: history, rendered and tokenized exactly as the training rows were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np

from charkha.data.rows import Turn
from charkha.data.tokenize import encode_prompt
from charkha.errors import UsageError
from charkha.evaluation import OpenRun


class Conversation:
    """Turns so far, and the next answer as a stream of text.

    A run that was trained on plain prompts or text has no turns: each line is then a prompt of its own.
    """

    def __init__(
        self, opened: OpenRun, system: str | None, *, temperature: float, max_new_tokens: int, seed: int, base: bool
    ) -> None:
        if system is not None and not opened.data.has_conversations:
            raise UsageError("this run was trained on plain prompts; it knows no system message", where="--system")
        self._opened = opened
        self._start = [Turn("system", system)] if system is not None else []
        self._turns = list(self._start)
        self._temperature = temperature
        self._max_new_tokens = max_new_tokens
        self._seed = seed
        self._base = base

    def forget(self) -> None:
        """Begins anew, with the system message only."""
        self._turns = list(self._start)

    def say(self, text: str) -> Iterator[str]:
        """The answer to `text`, in pieces. Raises UsageError when the conversation outgrew the model's positions."""
        from charkha.backends.torch.generate import stream

        prompt = self._prompt(text)
        answer = ""
        with self._opened.use_base() if self._base else nullcontext(self._opened.model) as model:
            for piece in stream(
                model,
                prompt,
                decode=self._opened.data.tokenizer.decode,
                max_new_tokens=self._room(len(prompt)),
                end_ids=self._opened.data.end_ids,
                temperature=self._temperature,
                seed=self._seed + len(self._turns),
            ):
                answer += piece
                yield piece
        self._turns += [Turn("user", text), Turn("assistant", answer)]

    def _prompt(self, text: str) -> np.ndarray:
        data = self._opened.data
        if not data.has_conversations:
            return encode_prompt(text, data.tokenizer, None)
        return encode_prompt([*self._turns, Turn("user", text)], data.tokenizer, data.template)

    def _room(self, prompt_tokens: int) -> int:
        positions = getattr(self._opened.model.config, "max_position_embeddings", None)
        if positions is None:
            return self._max_new_tokens
        if self._opened.config.adapter.method == "prompt_tuning":
            positions -= self._opened.config.adapter.num_virtual_tokens
        if prompt_tokens >= positions:
            raise UsageError(
                f"the conversation has {prompt_tokens} tokens, the model {positions} positions",
                remedy="begin anew with /new",
            )
        return min(self._max_new_tokens, int(positions) - prompt_tokens)
