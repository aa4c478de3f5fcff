from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from charkha.data.duplicates import hash_rows
from charkha.data.eval_share import held_out_count
from charkha.data.formats import ReadOptions, read_rows
from charkha.data.inspect import inspect_file
from charkha.data.prepare import prepare_files
from charkha.data.preview import preview_rows
from charkha.data.rows import ChatRow, PromptRow, TextRow, Turn, content_hash
from charkha.data.splits import SplitKeys, SplitWish, held_out, repetitions
from charkha.data.templates import load_template
from charkha.data.tokenize import EncodeSettings
from charkha.data.tokenizer import Tokenizer
from charkha.errors import DataError, UsageError

ROWS = [TextRow(f"row {number % 70}", number) for number in range(100)]
Texts = tuple[TextRow, ...]
CHATML = load_template(Path("nowhere"), "chatml")


def split(rows: Sequence[TextRow], eval_: str | int | float, seed: int) -> tuple[Texts, Texts]:
    """(training rows, held-out rows) by content alone: no groups, no times."""
    nothing = np.zeros(len(rows))
    chosen = held_out(SplitKeys(hash_rows(rows), nothing.astype(np.uint64), nothing), SplitWish(eval_, seed))
    sides = [tuple(row for row, out in zip(rows, chosen, strict=True) if out is np.bool_(side)) for side in (0, 1)]
    return sides[0], sides[1]


@pytest.mark.parametrize(("eval_", "count"), [("5%", 5), (0.05, 5), (7, 7), ("7", 7), (0, 0), ("0%", 0), ("0.1%", 1)])
def test_shares_and_counts(eval_: str | int | float, count: int) -> None:
    assert held_out_count(eval_, 100) == count
    assert len(split(ROWS, eval_, 42)[1]) in (count, count - 1)


@pytest.mark.parametrize("eval_", ["many", "-3", -3, 1.5, "120%", "nan", "eval.jsonl"])
def test_what_is_no_share_is_refused(eval_: str | int | float) -> None:
    with pytest.raises(UsageError, match=r"data\.eval"):
        held_out_count(eval_, 100)


def test_the_same_words_never_stand_on_both_sides() -> None:
    for seed in range(20):
        train, held_out = split(ROWS, "20%", seed)
        assert sorted(row.line for row in (*train, *held_out)) == list(range(100))
        assert not {row.text for row in train} & {row.text for row in held_out}


def test_a_split_depends_on_seed_and_content_and_not_on_the_order() -> None:
    shuffled = random.Random(1).sample(ROWS, len(ROWS))
    chosen = {row.line for row in split(ROWS, 10, 42)[1]}
    assert {row.line for row in split(shuffled, 10, 42)[1]} == chosen
    assert {row.line for row in split(ROWS, 10, 43)[1]} != chosen


def test_a_split_that_empties_a_side_is_refused() -> None:
    with pytest.raises(DataError, match="cannot be split"):
        split(ROWS[:1], 1, 42)
    with pytest.raises(DataError, match="cannot be split"):
        split([TextRow("same"), TextRow("same")], 1, 42)


def test_duplicates_are_counted_by_what_rows_say() -> None:
    repeated = repetitions(hash_rows(ROWS))
    assert [row.line for row, again in zip(ROWS, repeated, strict=True) if not again] == list(range(70))
    assert content_hash(TextRow("a", 1)) == content_hash(TextRow("a", 2))
    assert content_hash(TextRow("a")) != content_hash(PromptRow("a", "a"))


def test_written_rows_read_back_the_same(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "नम\u2028स्ते\n"}, {"role": "assistant", "content": '"b"', "weight": 1}]
    (tmp_path / "a.json").write_text(json.dumps([{"messages": turns}]))
    prepare_files([tmp_path / "a.json"], out=tmp_path / "new" / "a.jsonl")
    rows = (ChatRow((Turn("user", "नम\u2028स्ते\n"), Turn("assistant", '"b"', 1)), 1),)
    assert read_rows(tmp_path / "new" / "a.jsonl").rows == rows
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.jsonl"]


def test_files_are_prepared_split_and_deduplicated(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("q,a\n" + "".join(f"q{n % 30},a\n" for n in range(40)))
    out = tmp_path / "out.jsonl"
    done = prepare_files(
        [tmp_path / "a.csv"],
        out=out,
        options=ReadOptions(mapping={"prompt": "q", "completion": "a"}),
        split=SplitWish("10%"),
        deduplicate=True,
    )
    assert (done.train_rows, done.eval_rows, done.duplicates) == (27, 3, 10)
    assert done.eval_path == tmp_path / "out.eval.jsonl"
    assert json.loads(out.read_text().splitlines()[0]) == {"prompt": "q0", "completion": "a"} or done.eval_rows
    assert len(read_rows(out).rows) == 27


def test_nothing_is_written_for_bad_rows_or_mixed_files(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": ""}\n')
    (tmp_path / "a.txt").write_text("a\n")
    (tmp_path / "b.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl:2"):
        prepare_files([tmp_path / "bad.jsonl"], out=tmp_path / "out.jsonl")
    with pytest.raises(UsageError, match="different kinds"):
        prepare_files([tmp_path / "a.txt", tmp_path / "b.jsonl"], out=tmp_path / "out.jsonl")
    with pytest.raises(UsageError, match=r"\*\.jsonl"):
        prepare_files([tmp_path / "a.txt"], out=tmp_path / "out.json")
    assert not (tmp_path / "out.jsonl").exists()


# Preview and statistics


def test_a_preview_shows_every_character_and_what_is_trained(tiny: Tokenizer) -> None:
    row = ChatRow((Turn("user", "हि <|im_end|>"), Turn("assistant", "yes")), 4)
    (shown,) = preview_rows([row, row], tiny, CHATML, count=1)
    text = "<|im_start|>user\nहि <|im_end|><|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    assert "".join(token.text for token in shown.tokens) == text
    assert "".join(token.text for token in shown.tokens if token.trained) == "yes<|im_end|>"
    assert (shown.line, shown.end_token, shown.ends, shown.template) == (4, "<|im_end|>", True, "built-in chatml")
    assert shown.special_texts == ("<|im_end|>",)


def test_a_preview_names_the_tokens_around_the_text(stories: Tokenizer) -> None:
    (shown,) = preview_rows([PromptRow("Once", " upon")], stories, None)
    assert shown.tokens[0].text == "<s>"
    assert (shown.end_token, shown.template) == ("</s>", None)


def test_a_preview_says_when_no_end_is_taught(stories: Tokenizer) -> None:
    (shown,) = preview_rows([ChatRow((Turn("user", "a"), Turn("assistant", "b")))], stories, CHATML)
    assert not shown.ends  # this vocabulary spells <|im_end|> in pieces


def test_statistics_of_a_file(tmp_path: Path, tiny: Tokenizer) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in ["a", "a", "abc", "", "abcdefghi"]))
    found = inspect_file(path, settings=EncodeSettings(tiny, None))
    assert found.tokens is not None
    counts = found.tokens
    assert (counts.total, counts.shortest, counts.median, counts.p95, counts.longest) == (18, 2, 2, 10, 10)
    assert (found.duplicates, found.file.ignored_columns) == (1, ("id",))
    assert [problem.line for problem in found.problems] == [4]
    assert (found.report().rows, found.report().format) == (4, "text")
    assert inspect_file(path).tokens is None


def test_rows_that_cannot_be_rendered_are_in_the_statistics(tmp_path: Path, tiny: Tokenizer) -> None:
    path = tmp_path / "a.jsonl"
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    silent = {"messages": [good["messages"][0], {**good["messages"][1], "weight": 0}]}
    path.write_text(json.dumps(good) + "\n" + json.dumps(silent) + "\n")
    found = inspect_file(path, settings=EncodeSettings(tiny, CHATML))
    assert [problem.line for problem in found.problems] == [2]
    assert found.report().rows == 1
