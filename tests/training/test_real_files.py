"""Files as people publish them train without conversion by hand; skipped where they are not on this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from charkha.errors import DataError

MakeProject = Callable[..., Any]
DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
MODELS = DATA.parent / "models"

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the real files are not on this machine")

FILES = {
    "instruct/alpaca_en_demo.json": ("alpaca", 999),
    "chat/sharegpt_dummy_conversation.json": ("sharegpt", 500),
    "sql/wikisql_train.jsonl": ("text", 1000),
    "indic/xquad_hi_alpaca.jsonl": ("alpaca", 1190),
}


def project_over(project: MakeProject, model_folder: Callable[..., Path], name: str, **data: Any) -> Any:
    """Two steps over a whole file, by a tiny model with room for the longest of these rows."""
    return project(
        model_folder("llama", max_position_embeddings=16384),
        data={"train": [str(DATA / name)], "eval": 4, "max_length": 16384, **data},
        training={"max_steps": 2, "batch_size": 2, "micro_batch_size": 1},
    )


@pytest.mark.parametrize("name", FILES)
def test_a_published_file_trains_as_it_is(project: MakeProject, model_folder: Callable[..., Path], name: str) -> None:
    layout, rows = FILES[name]
    result, events = project_over(project, model_folder, name).train()
    assert (result.status, result.steps) == ("done", 2)
    notes = [event["text"] for event in events if event["event"] == "note"]
    assert f"{Path(name).name}: {rows} rows of format {layout}" in notes


def test_columns_of_another_name_are_answered_with_the_mapping_which_then_works(
    project: MakeProject, model_folder: Callable[..., Path]
) -> None:
    name = "instruct/gsm8k_train.jsonl"
    with pytest.raises(DataError) as refusal:
        project_over(project, model_folder, name).train()
    assert "{prompt: question, completion: answer}" in str(refusal.value)
    mapping = {"prompt": "question", "completion": "answer"}
    result, _ = project_over(project, model_folder, name, map=mapping).train()
    assert result.status == "done"


@pytest.mark.parametrize(
    ("quantization", "before", "after"), [pytest.param("none", 3.3, 2.35, marks=pytest.mark.long), ("nf4", 3.45, 2.4)]
)
def test_a_real_model_learns_real_stories_and_keeps_what_it_learned_when_merged(
    project: MakeProject, quantization: str, before: float, after: float
) -> None:
    from charkha.evaluation import evaluate_run
    from charkha.verbs.merging import merge_run

    work = project(
        MODELS / "stories260K",
        model={"base": str(MODELS / "stories260K"), "quantization": quantization},
        adapter={"r": 16, "lora_alpha": 32, "lora_dropout": 0.05},
        data={"train": [str(DATA / "indic/story_openings_english.txt")], "eval": "5%", "max_length": 512},
        training={"max_steps": 100, "batch_size": 16, "micro_batch_size": 16, "learning_rate": 1e-3, "eval_every": 100},
        checkpoint={"every": "100 steps"},
    )
    result, _ = work.train()
    assert result.eval_loss_before == pytest.approx(before, abs=0.05)
    assert result.eval_loss_after <= after
    if quantization == "none":
        assert merge_run(work.run_folder()).verified
        merged = evaluate_run(work.run_folder(), merged=True)
        assert merged.loss == pytest.approx(result.eval_loss_after, abs=5e-4)
