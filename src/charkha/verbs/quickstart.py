"""The whole road on the built-in model and data: train, measure before and after, merge, use."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from charkha.errors import CharkhaError
from charkha.evaluation import Answer, EvalResult, open_run, score
from charkha.starter.paths import heldout_file, quickstart_config
from charkha.training.opening import Observer
from charkha.training.session import train

Say = Callable[[str], None]


@dataclass(frozen=True)
class QuickstartResult:
    """The JSON contract of `charkha quickstart`. Exact match is the share of held-out rows answered without a flaw."""

    exact_match_before: float
    exact_match_after: float
    exact_match_seen_patterns: float
    exact_match_new_patterns: float
    eval_loss_before: float
    eval_loss_after: float
    rows: int
    run: str
    merged: str
    max_logit_difference: float
    seconds: float
    training_seconds: float
    example: dict[str, str]  # prompt, expected, base, tuned (by the merged model in a fresh process)


def quickstart(output: Path | None, observe: Observer, say: Say) -> QuickstartResult:
    """Runs the road in a new folder under runs/ (or in `output`). Nothing but the package's own files is read.

    Raises the errors of training and merging, and CharkhaError when a fresh process cannot load what was merged.
    """
    began = time.monotonic()
    folder = (output if output is not None else _free_folder(Path("runs/quickstart"))).resolve()
    say("1/4  training: LoRA on the built-in model")
    trained = train(quickstart_config(), [f"output={folder}"], observe)
    if trained.status != "done":
        raise CharkhaError("stopped before the end", where=str(folder), remedy="run `charkha quickstart` again")
    say("2/4  measuring: answers to held-out messages, base model and tuned model")
    before, after = _measure(folder)
    say("3/4  merging in a fresh process, and verifying the result")
    merged = _in_fresh_process(["merge", str(folder)])
    say("4/4  asking the merged model in a fresh process")
    example = _example(folder, before, after)
    by_pattern = _exact_by_pattern(after.answers)
    assert before.exact_match is not None
    assert after.exact_match is not None
    return QuickstartResult(
        exact_match_before=before.exact_match,
        exact_match_after=after.exact_match,
        exact_match_seen_patterns=by_pattern["seen"],
        exact_match_new_patterns=by_pattern["new"],
        eval_loss_before=before.loss,
        eval_loss_after=after.loss,
        rows=after.rows,
        run=str(folder),
        merged=merged["path"],
        max_logit_difference=merged["max_logit_difference"],
        seconds=round(time.monotonic() - began, 1),
        training_seconds=trained.seconds,
        example=example,
    )


def _free_folder(wanted: Path) -> Path:
    """`wanted`, or the first of wanted-2, wanted-3, ... that does not exist: each quickstart begins anew."""
    number, folder = 1, wanted
    while folder.exists():
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder


def _measure(folder: Path) -> tuple[EvalResult, EvalResult]:
    opened = open_run(folder)
    assert opened.data.eval is not None
    with opened.use_base() as base:
        before = score(opened, opened.data.eval, str(folder), base)
    return before, score(opened, opened.data.eval, str(folder), opened.model)


def _exact_by_pattern(answers: tuple[Answer, ...]) -> dict[str, float]:
    """Exact match of rows whose wording was seen in training, and of those whose wording is new."""
    rows = heldout_file().read_text(encoding="utf-8").splitlines()
    right: dict[str, list[bool]] = {"seen": [], "new": []}
    for answer in answers:
        right[json.loads(rows[answer.line - 1])["pattern"]].append(answer.exact)
    return {pattern: sum(marks) / len(marks) for pattern, marks in right.items()}


def _example(folder: Path, before: EvalResult, after: EvalResult) -> dict[str, str]:
    """The first held-out message: what base and merged model answer."""
    line = after.answers[0].line
    row = json.loads(heldout_file().read_text(encoding="utf-8").splitlines()[line - 1])
    turns = {turn["role"]: turn["content"] for turn in row["messages"]}
    system = ["--system", turns["system"]] if "system" in turns else []
    talk = _in_fresh_process(["chat", str(folder), "--merged", "--prompt", turns["user"], *system])
    return {
        "prompt": turns["user"],
        "expected": turns["assistant"],
        "base": before.answers[0].given.strip(),
        "tuned": talk["turns"][0]["assistant"].strip(),
    }


def _in_fresh_process(arguments: list[str]) -> dict[str, Any]:
    """`charkha ARGUMENTS --json` in a new Python, so that nothing of this process can help it along."""
    command = [sys.executable, "-m", "charkha", *arguments, "--json"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise CharkhaError(
            f"`charkha {arguments[0]}` ended with {finished.returncode}: {finished.stderr.strip()[-500:]}"
        )
    result: dict[str, Any] = json.loads(finished.stdout)
    return result
