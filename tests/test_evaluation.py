"""The held-out loss is one number, however it is computed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from charkha.errors import RunFolderError, UsageError

MakeProject = Callable[..., Any]


@pytest.fixture
def finished(project: MakeProject) -> Any:
    work = project(training={"max_steps": 4, "learning_rate": 1e-2})
    work.result, work.events = work.train()
    return work


def test_the_loss_does_not_depend_on_the_batch_size_and_is_that_of_training(
    finished: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding and the shape of matrix products round differently: some units of 2^-24 on a loss near 5."""
    from charkha.backends.torch import held_out
    from charkha.evaluation import evaluate_run

    whole = evaluate_run(finished.run_folder(), answers=False)
    assert whole.loss == pytest.approx(finished.result.eval_loss_after, abs=2e-6)
    assert whole.rows == 8
    assert whole.perplexity == pytest.approx(math.exp(whole.loss))
    for tokens in (1, 40, 100):
        monkeypatch.setattr(held_out, "HELD_OUT_TOKENS", tokens)
        again = evaluate_run(finished.run_folder(), answers=False)
        assert again.loss == pytest.approx(whole.loss, abs=5e-6)
        assert again.tokens == whole.tokens


def test_the_loss_is_the_mean_over_tokens_and_not_over_rows(finished: Any) -> None:
    import torch

    from charkha.evaluation import evaluate_run, open_run

    opened = open_run(finished.run_folder())
    shard = opened.data.eval
    assert shard is not None
    total, count = 0.0, 0
    with torch.no_grad():
        for row in range(len(shard.lengths)):
            ids = torch.from_numpy(shard.input_ids(row).astype("int64"))[None]
            log_probabilities = opened.model(ids).logits[0].log_softmax(-1)
            for place in range(1, ids.shape[1]):
                if shard.trained(row)[place]:
                    total -= float(log_probabilities[place - 1, ids[0, place]])
                    count += 1
    result = evaluate_run(finished.run_folder(), answers=False)
    assert result.tokens == count
    assert result.loss == pytest.approx(total / count, abs=1e-5)


def test_the_base_is_scored_without_the_adapter(finished: Any) -> None:
    from charkha.evaluation import evaluate_run

    base = evaluate_run(finished.run_folder(), base=True, answers=False)
    assert base.loss == pytest.approx(finished.result.eval_loss_before, abs=2e-6)
    assert base.loss > evaluate_run(finished.run_folder(), answers=False).loss


def test_answers_are_compared_with_what_was_expected(finished: Any) -> None:
    from charkha.evaluation import evaluate_run

    result = evaluate_run(finished.run_folder(), limit=3)
    assert len(result.answers) == 3
    assert all(answer.expected.isupper() and "<|end|>" not in answer.expected for answer in result.answers)
    assert result.exact_match == sum(answer.exact for answer in result.answers) / 3


def test_a_run_without_held_out_rows_asks_for_a_file(project: MakeProject) -> None:
    from charkha.evaluation import evaluate_run

    work = project(data={"eval": None}, training={"max_steps": 1})
    result, _ = work.train()
    assert (result.eval_loss_before, result.eval_loss_after) == (None, None)
    with pytest.raises(UsageError, match="no held-out rows"):
        evaluate_run(work.run_folder())
    assert evaluate_run(work.run_folder(), file=work.folder / "rows.jsonl", answers=False).rows == 40


def test_an_unfinished_run_is_not_evaluated(project: MakeProject) -> None:
    from charkha.evaluation import evaluate_run

    work = project()
    work.train(stop_at=1)
    with pytest.raises(RunFolderError, match="not finished"):
        evaluate_run(work.run_folder())
