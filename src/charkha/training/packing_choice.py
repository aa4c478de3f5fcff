"""Whether rows are packed, and why: what `data.packing` asks for, and what model, method and machine allow."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from charkha.backends.base import Packing
from charkha.config import Config
from charkha.data.packing import pack
from charkha.errors import ConfigError, ConfigProblem
from charkha.plan.packing_support import BY_MASK, KEEP_APART, LEAK
from charkha.training.choices import Choice, Chooser
from charkha.training.planned_settings import ModelChoices

if TYPE_CHECKING:
    from numpy.typing import NDArray

# batch_size counts packed rows, so packing leaves fewer optimizer steps. `auto` does not leave less than this.
FEWEST_STEPS = 100


def choose_packing(
    config: Config,
    chooser: Chooser,
    lengths: NDArray[np.int64],
    row_tokens: int,
    model: ModelChoices,
    device: str,
    proved_leak: str | None = None,
) -> Packing | None:
    """The packed rows of this run; None for one document a row. `auto` is recorded with its reason.

    `lengths` are the documents' tokens, `proved_leak` what an earlier start of this run found on the loaded model.
    Raises ConfigError for `true` where documents would see each other.
    """
    asked = config.data.packing
    if asked is False:
        return None
    obstacle = proved_leak or _obstacle(config, model.model_type)
    if asked is True:
        if obstacle:
            problem = ConfigProblem("data.packing", f"true cannot be used here: {obstacle}", remedy="use false")
            raise ConfigError("config", [problem])
        return _packed(lengths, row_tokens)
    against = obstacle or _not_worth_it(model.model_type, device, model.attention)
    packing = None if against else _packed(lengths, row_tokens)
    if packing is not None:
        against = _too_few_steps(config, packing)
    if against is None:
        reason = "the attention kernel takes documents of any length in one row, so nothing is padded"
        chooser.choices.append(Choice("data.packing", True, reason))
        return packing
    chooser.choices.append(Choice("data.packing", False, f"rows are grouped by length instead: {against}"))
    return None


def packing_option(config: Config, lengths: NDArray[np.int64], row_tokens: int, model: ModelChoices) -> Packing | None:
    """The packed rows that there would be; None where documents would see each other, or that was never measured."""
    if _obstacle(config, model.model_type) or model.model_type not in KEEP_APART:
        return None
    return _packed(lengths, row_tokens)


def packing_note(packing: Packing, batch_size: int) -> str:
    """What packing comes to, for a reader."""
    documents = packing.documents / packing.rows
    return (
        f"packed {packing.documents} rows into {packing.rows} of {packing.row_tokens} tokens, filled to "
        f"{packing.fill_rate:.1%}; training.batch_size {batch_size} counts these, about "
        f"{documents * batch_size:.0f} documents a step"
    )


def _packed(lengths: NDArray[np.int64], row_tokens: int) -> Packing:
    shapes = pack(lengths, row_tokens)
    return Packing(row_tokens, shapes.rows, len(lengths), round(shapes.fill_rate, 4))


def _obstacle(config: Config, model_type: str) -> str | None:
    """Why documents of a row would not be apart; None where nothing is known against it."""
    if config.adapter.method == "prompt_tuning":
        return "prompt_tuning puts its tokens before a row, not before each document in it"
    if model_type in LEAK:
        return f"documents of a row would see each other in {model_type}: {LEAK[model_type]}"
    return None


def _not_worth_it(model_type: str, device: str, attention: str) -> str | None:
    if model_type not in KEEP_APART:
        return f"whether {model_type} keeps documents of a row apart was not measured"
    if device == "cpu":
        # 21.9 M parameters, LoRA, one thread, documents of 80 to 500 tokens: tokens per CPU second 1003 grouped,
        # 1134 packed (bf16), 644 and 784 (fp32).
        return "on a CPU that is nearly as fast, and batch_size keeps counting rows"
    if attention == "eager" or (attention == "sdpa" and model_type in BY_MASK):
        return f"with {attention} attention a packed row of {model_type} costs the square of its length"
    return None


def _too_few_steps(config: Config, packing: Packing) -> str | None:
    training = config.training
    steps = training.max_steps or round(training.epochs * math.ceil(packing.rows / training.batch_size))
    if steps >= FEWEST_STEPS:
        return None
    return (
        f"training.batch_size would count {packing.rows} packed rows of {packing.row_tokens} tokens, "
        f"which leaves {steps} optimizer steps"
    )
