"""How good a run is: held-out loss, exact match of answers, and base and tuned side by side.

Prompts and expected answers are cut out of the run's own tokenized rows: the prompt is every token before the last
trained span, the answer is that span. So what is generated from is, token for token, what was trained on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from charkha.backends.base import BaseModelSpec
from charkha.config import Config
from charkha.data.rows import Turn
from charkha.data.shards import Shard, open_shard, write_shard
from charkha.data.tokenize import encode_prompt
from charkha.errors import RunFolderError, UsageError
from charkha.store.runs import RunFolder
from charkha.training.dataset import PreparedData, encode_file
from charkha.training.opening import reopen

_ROOM_FOR_LONGER_ANSWERS = (
    8  # tokens beyond the longest expected answer: an answer that goes on is then seen to be wrong
)


@dataclass(frozen=True)
class Answer:
    """One held-out row answered. `line` is the row's line in its file."""

    line: int
    prompt: str
    expected: str
    given: str

    @property
    def exact(self) -> bool:
        """The same text, blanks at both ends aside."""
        return self.given.strip() == self.expected.strip()

    @property
    def fields(self) -> tuple[int, int] | None:
        """(fields equal, fields expected) when the expected answer is a JSON object; None otherwise."""
        expected = _json_object(self.expected)
        if expected is None:
            return None
        given = _json_object(self.given) or {}
        return sum(key in given and given[key] == value for key, value in expected.items()), len(expected)


@dataclass(frozen=True)
class EvalResult:
    """The JSON contract of `charkha eval`. Shares are of `rows` that have a prompt; None where there are none."""

    run: str
    rows: int
    tokens: int
    loss: float
    perplexity: float
    exact_match: float | None
    json_field_match: float | None
    preference_accuracy: float | None
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class OpenRun:
    """A run's model ready to answer. `use_base` switches the adapter off for a while."""

    config: Config
    base: BaseModelSpec
    data: PreparedData
    model: Any

    @contextmanager
    def use_base(self) -> Iterator[Any]:
        """The base model without the adapter. Raises UsageError for full fine-tuning, whose base is not loaded."""
        if not hasattr(self.model, "disable_adapter"):
            raise UsageError("a fully fine-tuned run holds no base model to switch to")
        with self.model.disable_adapter():
            yield self.model

    def answer(self, prompts: Sequence[np.ndarray], max_new_tokens: int, model: Any = None) -> list[str]:
        """Greedy answers as text."""
        from charkha.backends.torch.generate import generate_greedy

        ids = generate_greedy(
            self.model if model is None else model,
            prompts,
            max_new_tokens=max_new_tokens,
            end_ids=self.data.end_ids,
            pad_id=self.data.pad_id,
        )
        return [self.data.tokenizer.decode(answer) for answer in ids]


def open_run(path: Path, *, merged: Path | None = None) -> OpenRun:
    """Loads the tuned model of a run (or, with `merged`, that standalone folder in its place).

    Raises RunFolderError when the folder holds no run, or the run is not finished.
    """
    from charkha.backends.torch.model import load_adapter, load_base

    run = RunFolder(path)
    config, base, data = reopen(run)
    if merged is not None:
        return OpenRun(config, base, data, load_base(_unquantized(base, merged)))
    if config.adapter.method == "full":
        return OpenRun(config, base, data, load_base(_unquantized(base, _finished(run.path / "model", run))))
    return OpenRun(config, base, data, load_adapter(load_base(base), _finished(run.adapter, run)))


def evaluate_run(
    path: Path,
    *,
    file: Path | None = None,
    base: bool = False,
    merged: bool = False,
    limit: int | None = None,
    answers: bool = True,
) -> EvalResult:
    """Loss and answers on the run's held-out rows, or on `file`.

    `base` scores the model before training, `merged` the standalone model in the run's merged/ folder.

    `limit` caps the rows that are answered (the first ones), not those in the loss. Raises UsageError when there is
    nothing to evaluate on.
    """
    opened = open_run(path, merged=path / "merged" if merged else None)
    shard = _shard_of(opened, file, RunFolder(path))
    if base:
        with opened.use_base() as model:
            return score(opened, shard, str(path), model, limit=limit, answers=answers)
    return score(opened, shard, str(path), opened.model, limit=limit, answers=answers)


def score(
    opened: OpenRun, shard: Shard, name: str, model: Any, *, limit: int | None = None, answers: bool = True
) -> EvalResult:
    """Held-out loss of `model` over the shard, and its answers."""
    from charkha.backends.torch.held_out import held_out_loss

    loss = held_out_loss(model, shard, opened.data.pad_id)
    given = answer_rows(opened, shard, model, limit) if answers else ()
    fields = [answer.fields for answer in given]
    counted = [pair for pair in fields if pair is not None]
    return EvalResult(
        run=name,
        rows=len(shard.lengths),
        tokens=loss.tokens,
        loss=loss.loss,
        perplexity=math.exp(min(loss.loss, 700.0)),
        exact_match=sum(answer.exact for answer in given) / len(given) if given else None,
        json_field_match=sum(a for a, _ in counted) / sum(b for _, b in counted) if counted else None,
        preference_accuracy=None,
        answers=given,
    )


def answer_rows(opened: OpenRun, shard: Shard, model: Any, limit: int | None = None) -> tuple[Answer, ...]:
    """The model's answers to every row of the shard that has a prompt."""
    tokenizer = opened.data.tokenizer
    rows = [row for row in range(len(shard.lengths)) if answer_start(shard.trained(row)) > 0][:limit]
    if not rows:
        return ()
    cuts = [answer_start(shard.trained(row)) for row in rows]
    prompts = [shard.input_ids(row)[:cut] for row, cut in zip(rows, cuts, strict=True)]
    expected = [_without_end(shard, row, cut, opened.data.end_ids) for row, cut in zip(rows, cuts, strict=True)]
    longest = max(len(ids) for ids in expected) + _ROOM_FOR_LONGER_ANSWERS
    given = opened.answer(prompts, longest, model)
    return tuple(
        Answer(int(shard.lines[row]), tokenizer.decode(prompt.tolist()), tokenizer.decode(ids), text)
        for row, prompt, ids, text in zip(rows, prompts, expected, given, strict=True)
    )


def answer_start(trained: np.ndarray) -> int:
    """Where the last trained span begins; 0 when the row has no prompt (everything is trained, or nothing)."""
    places = np.flatnonzero(trained)
    if not len(places):
        return 0
    untrained_before = np.flatnonzero(~trained[: places[-1]])
    return int(untrained_before[-1]) + 1 if len(untrained_before) else 0


def compare_run(
    path: Path, texts: Sequence[str], *, rows: int, max_new_tokens: int, on_progress: Callable[[str], None]
) -> list[dict[str, str | None]]:
    """Greedy answers of base and tuned model to `texts`, or to the first held-out `rows` when there are none.

    Each: prompt, base, tuned, expected (None for a prompt of the user's).
    """
    opened = open_run(path)
    expected: list[str | None]
    if texts:
        shown, expected = list(texts), [None] * len(texts)
        prompts = [prompt_of(opened.data, text) for text in texts]
    else:
        prompts, shown, expected = _held_out_prompts(opened, _shard_of(opened, None, RunFolder(path)), rows)
    on_progress("the base model answers")
    with opened.use_base() as model:
        before = opened.answer(prompts, max_new_tokens, model)
    on_progress("the tuned model answers")
    after = opened.answer(prompts, max_new_tokens)
    return [
        {"prompt": prompt, "base": base, "tuned": tuned, "expected": wanted}
        for prompt, base, tuned, wanted in zip(shown, before, after, expected, strict=True)
    ]


def prompt_of(data: PreparedData, text: str) -> np.ndarray:
    """A user's text as the run's rows are: one user turn where it learned conversations, else the bare prompt."""
    if data.has_conversations:
        return encode_prompt([Turn("user", text)], data.tokenizer, data.template)
    return encode_prompt(text, data.tokenizer, None)


def _held_out_prompts(opened: OpenRun, shard: Shard, rows: int) -> tuple[list[np.ndarray], list[str], list[str | None]]:
    chosen = [row for row in range(len(shard.lengths)) if answer_start(shard.trained(row)) > 0][:rows]
    if not chosen:
        raise UsageError("the held-out rows have no prompts to answer", remedy="give one with --prompt")
    decode = opened.data.tokenizer.decode
    cuts = [answer_start(shard.trained(row)) for row in chosen]
    prompts = [shard.input_ids(row)[:cut] for row, cut in zip(chosen, cuts, strict=True)]
    wanted = [decode(_without_end(shard, row, cut, opened.data.end_ids)) for row, cut in zip(chosen, cuts, strict=True)]
    return prompts, [decode(prompt) for prompt in prompts], list(wanted)


def _without_end(shard: Shard, row: int, cut: int, end_ids: frozenset[int]) -> list[int]:
    ids: list[int] = shard.input_ids(row)[cut:][shard.trained(row)[cut:]].tolist()
    while ids and ids[-1] in end_ids:
        ids.pop()
    return ids


def _shard_of(opened: OpenRun, file: Path | None, run: RunFolder) -> Shard:
    if file is not None:
        encoded = encode_file(file, opened.config, opened.data)
        return open_shard(write_shard(run.data, "file", encoded.rows))
    if opened.data.eval is None:
        raise UsageError("this run kept no held-out rows", where=str(run.path), remedy="give a file with --file")
    return opened.data.eval


def _unquantized(base: BaseModelSpec, folder: Path) -> BaseModelSpec:
    return BaseModelSpec(folder, base.dtype, base.attention, "none", base.device)


def _finished(folder: Path, run: RunFolder) -> Path:
    if any(folder.glob("*.safetensors")):
        return folder
    raise RunFolderError(
        "the run is not finished: it has no trained weights yet",
        where=str(run.path),
        remedy=f"`charkha train {run.config_path}` goes on with it",
    )


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
