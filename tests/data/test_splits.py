from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from charkha.data.formats import ReadOptions, read_rows
from charkha.data.indexing import index_file
from charkha.data.splits import SplitWish, held_out, repeats
from charkha.errors import DataError


def index(tmp_path: Path, records: list[dict], wish: SplitWish) -> np.ndarray:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    indexed = index_file(path, ReadOptions(), wish, 1)
    assert indexed.read.problems == ()
    return held_out(indexed.keys, wish)


def test_no_customer_stands_on_both_sides(tmp_path: Path) -> None:
    records = [{"text": f"row {n}", "customer": f"c{n % 30}"} for n in range(300)]
    records += [{"text": "row 3", "customer": "c9"}, {"text": "alone"}, {"text": "alone too", "customer": None}]
    for seed in range(5):
        chosen = index(tmp_path, records, SplitWish("20%", seed, group_by="customer"))
        sides: dict[str, set[bool]] = {}
        for record, out in zip(records, chosen, strict=True):
            if record.get("customer"):
                sides.setdefault(record["customer"], set()).add(bool(out))
        assert all(len(side) == 1 for side in sides.values())
        assert sides["c3"] == sides["c9"]  # they share a row
        assert 30 <= chosen.sum() <= 61


def test_the_latest_rows_are_held_out(tmp_path: Path) -> None:
    records = [{"text": f"row {n}", "day": f"2024-0{1 + n // 28}-{1 + n % 28:02d}T10:00:00"} for n in range(100)]
    chosen = index(tmp_path, records[::-1], SplitWish(10, time_by="day"))
    assert chosen.tolist() == [n < 10 for n in range(100)]
    unix = [{"text": f"row {n}", "day": 1_700_000_000_000 + n} for n in range(100)]
    assert index(tmp_path, unix, SplitWish("10%", time_by="day")).sum() == 10


def test_a_row_without_a_time_is_a_problem_and_a_missing_column_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "day": "yesterday"}\n{"text": "b", "day": "2024-01-01"}\n')
    (problem,) = index_file(path, ReadOptions(), SplitWish(1, time_by="day"), 1).read.problems
    assert (problem.line, problem.field) == (1, "day")
    with pytest.raises(DataError, match="no column 'customer'"):
        index_file(path, ReadOptions(), SplitWish(1, group_by="customer"), 1)


def test_weights_repeat_rows_and_take_shares(tmp_path: Path) -> None:
    hashes = np.random.default_rng(1).integers(0, 1 << 63, (10_000, 2), dtype=np.uint64)
    assert (repeats(hashes, 1.0, 1) == 1).all()
    assert (repeats(hashes, 3.0, 1) == 3).all()
    half = repeats(hashes, 0.5, 1)
    assert set(half) == {0, 1}
    assert 0.48 < half.mean() < 0.52
    assert (half == repeats(hashes, 0.5, 1)).all()
    assert (half != repeats(hashes, 0.5, 2)).any()
    assert 2.18 < repeats(hashes, 2.2, 1).mean() < 2.22


def test_only_safe_repairs_are_made_and_each_is_listed(tmp_path: Path) -> None:
    user, answer = {"role": "user", "content": "a\x07\r\nb"}, {"role": "assistant", "content": "c"}
    rows = [
        {"messages": [user, user, answer, {"role": "user", "content": "and?"}]},
        {"messages": [{"role": "system", "content": "x"}]},
        {"messages": [user, {"role": "assistant", "content": " "}]},
        {"messages": [{"role": "wizard", "content": "x"}, answer]},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = read_rows(path, options=ReadOptions(fix=True))
    assert [[turn.content for turn in row.turns] for row in read.rows] == [["a\nb", "c"]]  # type: ignore[union-attr]
    assert [problem.line for problem in read.problems] == [4]  # what a wizard is only the owner knows
    assert {(fix.line, fix.reason.split(":")[0]) for fix in read.fixes} >= {
        (1, "line ends"), (1, "control characters"), (1, "turn left out"), (1, "turns left out"),
        (2, "row left out"), (3, "row left out"),
    }  # fmt: skip
    assert [len(read_rows(path).problems)] == [4]


@pytest.mark.parametrize("value", ["inf", "-Infinity", "1e999", "nan"])
def test_a_time_without_an_end_is_no_time_and_no_value_is_told(tmp_path: Path, value: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"prompt,completion,t\na,b,{value}\nc,d,2024-01-01\n")
    (problem,) = index_file(path, ReadOptions(), SplitWish(1, 42, None, "t"), 1).read.problems
    assert (problem.line, problem.field) == (2, "t")
    assert value not in problem.reason
