"""The cells of the support table: each trains, is stopped, goes on to the same bits, is scored and merged.

A cell is (family, method, quantization, packing, attention). The record of all of them is docs/architectures.json;
docs/architectures.md is made from it by tools/support_table.py.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

from charkha.errors import UsageError
from families import Family

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "docs" / "architectures.json"
WORKS = "works"


METHODS = ("full", "lora", "dora", "rslora", "ia3", "prompt_tuning")
QUANTIZATIONS = ("none", "nf4", "fp4", "int8")
LAYOUTS = tuple(itertools.product(("grouped", "packed"), ("sdpa", "eager")))
# Two of the steps below at this rate lower the held-out loss of a random tiny model.
_RATES = {"full": 2e-3, "ia3": 5e-2, "prompt_tuning": 5e-2}


def layout_name(packing: str, attention: str) -> str:
    """The key of a cell within (family, method, quantization)."""
    return f"{packing} {attention}"


def run_cell(project: Any, base: Path, family: Family, method: str, quantization: str, layout: tuple[str, str]) -> str:
    """WORKS, or the reason of the refusal. Anything else that goes wrong is raised: a cell is never half good."""
    packing, attention = layout
    work = project(
        base,
        model={"base": str(base), "quantization": quantization, "attention": attention},
        adapter={"method": method, "num_virtual_tokens": 8, **family.adapter},
        data={"packing": packing == "packed"},
        training={
            "max_steps": 3,
            "batch_size": 2 if packing == "packed" else 8,
            "micro_batch_size": 1 if packing == "packed" else 4,
            "learning_rate": _RATES.get(method, 5e-3),
            "lr_scheduler_type": "constant",
            "eval_every": 2,
        },
        checkpoint={"every": "2 steps"},
    )
    try:
        whole, _events = work.train(output="whole")
    except UsageError as refusal:
        return _reason(refusal)
    _require_learned(whole)
    work.train(output="cut", stop_at=2)
    resumed, _events = work.train(output="cut")
    _require_same_bits(work, resumed)
    _require_same_score(work, whole)
    _require_merged(work, method, quantization)
    return WORKS


def _reason(refusal: UsageError) -> str:
    problems = getattr(refusal, "problems", None)
    if problems:
        return "; ".join(f"{problem.key}: {problem.reason}" for problem in problems)
    return f"{refusal.where}: {refusal.message}"


def _require_learned(result: Any) -> None:
    assert result.status == "done"
    assert math.isfinite(result.loss_last)
    assert result.eval_loss_after < result.eval_loss_before


def _require_same_bits(work: Any, resumed: Any) -> None:
    import torch

    assert (resumed.status, resumed.resumes) == ("done", 1)
    whole, cut = work.weights("whole"), work.weights("cut")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(tensor, cut[name]) for name, tensor in whole.items()), "resumed run ended with other bits"


def _require_same_score(work: Any, whole: Any) -> None:
    """What was trained, loaded again from the run folder, scores as it did at the end of training, and answers."""
    from charkha.chatting import Conversation
    from charkha.evaluation import open_run, score

    opened = open_run(work.run_folder("cut"))
    scored = score(opened, opened.data.eval, "cut", opened.model, answers=False)
    assert abs(scored.loss - whole.eval_loss_after) < 1e-4
    talk = Conversation(opened, None, temperature=0.0, max_new_tokens=4, seed=1, base=False)
    assert isinstance("".join(talk.say("tea 3?")), str)


def _require_merged(work: Any, method: str, quantization: str) -> None:
    from charkha.verbs.merging import merge_run

    run = work.run_folder("cut")
    if method == "full":
        assert merge_run(run).note is not None, "that a whole model needs no merge is said"
        return
    if method == "prompt_tuning":
        try:
            merge_run(run)
        except UsageError:
            return  # no weight was changed
        raise AssertionError("a merge of prompt_tuning was not refused")
    assert merge_run(run).verified
    if quantization != "none":
        assert merge_run(run, onto="dequantized", output=run / "dequantized").verified
