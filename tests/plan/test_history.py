"""What finished runs say about the next plan; which of them count; and a file that several processes write."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from charkha.plan.architecture import read_architecture
from charkha.plan.history import (
    PUBLISHED_P90,
    FinishedRun,
    RunShape,
    correction,
    line_of,
    planner_fingerprint,
    runs_of,
    shape_of,
)
from charkha.plan.memory_settings import MemorySettings
from charkha.plan.popular_models import popular_config
from charkha.store.jsonl import add_line, read_lines
from charkha.verbs.planned_probe import PROBE_P90

CONFIG = popular_config("meta-llama/Llama-3.1-8B-Instruct")
assert CONFIG is not None
LLAMA = read_architecture(CONFIG)
SETTINGS = MemorySettings("bf16", 4, 2048, quantization="nf4")
SHAPE = shape_of(LLAMA, SETTINGS, machine="here", device="RTX 4090", threads=8)
GIB = 2**30


def run(ratio: float, shape: RunShape = SHAPE, **changes: Any) -> FinishedRun:
    return replace(FinishedRun(shape, 100, 1000.0, 1000.0 * ratio, 10 * GIB, 10 * GIB, 1), **changes)


def test_without_runs_the_plan_stands_and_scatters_as_published_runs_do() -> None:
    found = correction([], SHAPE, "cuda", GIB)
    assert (found.runs, found.ratio, found.reasons) == (0, 1.0, ())
    assert found.p90 == pytest.approx(PUBLISHED_P90["cuda"])


def test_that_scatter_is_what_the_page_of_published_runs_says() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/plan-accuracy.md").read_text(encoding="utf-8")
    told = re.search(r"Nine of ten runs of class A took at most ([\d.]+) times", page)
    assert told is not None
    assert PUBLISHED_P90["cuda"] == pytest.approx(float(told[1]), abs=0.05)


def test_where_nobody_publishes_runs_and_after_a_probe_it_is_what_was_measured() -> None:
    path = Path(__file__).resolve().parents[2] / "benchmarks/results/probe.json"
    cases = json.loads(path.read_text(encoding="utf-8"))["cases"]
    for told, figure in (("closed_form_seconds", PUBLISHED_P90["cpu"]), ("probe_seconds", PROBE_P90)):
        ratios = [case["measured_seconds"] / case[told] for case in cases]
        assert figure == pytest.approx(np.percentile(ratios, 90), rel=0.01)


def test_the_more_runs_the_nearer_to_their_median() -> None:
    ratios = [correction([run(1.5)] * count, SHAPE, "cuda", GIB).ratio for count in (1, 3, 9)]
    assert 1.35 < ratios[0] < ratios[1] < ratios[2] < 1.5
    assert correction([run(1.5), run(1.5), run(40.0)], SHAPE, "cuda", GIB).ratio < 1.5, "one outlier moves nothing"
    slower, faster = (correction([run(one)], SHAPE, "cuda", GIB).ratio for one in (2.0, 0.5))
    assert slower * faster == pytest.approx(1)


def test_runs_that_agree_narrow_the_time_of_nine_of_ten_and_runs_that_scatter_widen_it() -> None:
    agreeing = correction([run(1.2)] * 9, SHAPE, "cuda", GIB).p90
    scattered = correction([run(one) for one in (0.6, 0.8, 1.0, 1.5, 2.5)], SHAPE, "cuda", GIB).p90
    assert 1 < agreeing < PUBLISHED_P90["cuda"] < scattered


def test_the_correction_is_said_with_how_many_runs_it_rests_on() -> None:
    (said,) = correction([run(1.12)] * 3, SHAPE, "cuda", 10 * GIB).reasons[:1]
    assert said.startswith("time: 3 finished runs like this on this GPU took 1.12 times the planned time")


@pytest.mark.parametrize(
    "changes",
    [
        {"machine": "elsewhere"},
        {"device": "RTX 3090"},
        {"processes": 2},
        {"dtype": "fp16"},
        {"method": "full"},
        {"quantization": "none"},
        {"streamed": True},
        {"planner": "older"},
        {"parameters": SHAPE.parameters // 40},
        {"positions": SHAPE.positions // 16, "longest": SHAPE.longest // 16},
    ],
)
def test_runs_of_another_kind_or_machine_say_nothing(changes: dict[str, Any]) -> None:
    assert correction([run(2.0, replace(SHAPE, **changes))], SHAPE, "cuda", GIB).runs == 0


def test_of_many_runs_the_nearest_shapes_count() -> None:
    far = [run(3.0, replace(SHAPE, parameters=4 * SHAPE.parameters), finished_unix_s=99)] * 9
    near = [run(1.1, replace(SHAPE, positions=SHAPE.positions // 2))] * 9
    assert correction([*far, *near], SHAPE, "cuda", GIB).ratio == pytest.approx(1.1, rel=0.01)


def test_memory_is_said_and_not_corrected() -> None:
    same = correction([run(1.0, measured_bytes=12 * GIB)], SHAPE, "cuda", 10 * GIB).reasons[-1]
    assert same == "memory: runs of the same settings held 12 GiB, planned 10 GiB"
    other = replace(SHAPE, settings="other")
    more = correction([run(1.0, other, measured_bytes=12 * GIB)], SHAPE, "cuda", 10 * GIB).reasons[-1]
    assert "1.20 times what was planned" in more
    less = correction([run(1.0, other, measured_bytes=8 * GIB)], SHAPE, "cuda", 10 * GIB).reasons
    assert not any(reason.startswith("memory") for reason in less)


def test_a_record_is_shapes_and_numbers() -> None:
    record = json.loads(line_of(run(1.1)))
    assert runs_of([line_of(run(1.1))]) == ([run(1.1)], 0)
    assert "llama" not in line_of(run(1.1)).lower()
    words = [value for value in record["shape"].values() if isinstance(value, str)]
    assert not any("/" in word for word in words)
    assert len(planner_fingerprint()) == 16


@pytest.mark.parametrize(
    "line",
    [
        "",
        "{",
        "[]",
        "null",
        '{"version": 2}',
        '{"version": 1}',
        line_of(run(1.1))[:-20],
        line_of(run(1.1)).replace("1000.0,", "0,"),
        line_of(run(1.1)).replace("1000.0,", "NaN,"),
        line_of(run(1.1)).replace('"here"', "7"),
        line_of(run(1.1)).replace('"steps"', '"stops"'),
        line_of(run(1.1)).replace('"finished_unix_s": 1', '"finished_unix_s": "yesterday"'),
        line_of(run(1.1)).replace('"longest": 2048', '"longest": 0'),
        line_of(run(1.1)).replace('"longest": 2048', '"longest": "2048"'),
        line_of(run(1000.0)),  # milliseconds taken for seconds
        line_of(run(1e-300)),
        "[" * 100_000,
    ],
)
def test_a_damaged_line_is_left_out_and_counted(line: str) -> None:
    runs, damaged = runs_of([line_of(run(1.0)), line, line_of(run(1.2))])
    assert [one.measured_seconds for one in runs] == [1000.0, 1200.0]
    assert damaged == 1


# The file


WRITER = """
import sys
from pathlib import Path
from charkha.store.jsonl import add_line
for number in range(40):
    add_line(Path(sys.argv[1]), f"{sys.argv[2]}-{number} {'x' * 300}", most=1000)
"""


def test_of_several_writers_at_once_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "new/folder/runs.jsonl"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), name]) for name in "abc"]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    lines = read_lines(path)
    assert sorted(line.split()[0] for line in lines) == sorted(f"{name}-{one}" for name in "abc" for one in range(40))
    assert all(len(line.split()[1]) == 300 for line in lines)


def test_a_line_cut_short_swallows_no_other(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_bytes(b"whole\ncut sh")
    add_line(path, "next", most=10)
    assert read_lines(path) == ["whole", "cut sh", "next"]


def test_the_oldest_lines_go(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    for number in range(12):
        add_line(path, str(number), most=5)
        assert len(read_lines(path)) <= 10
    assert read_lines(path)[-6:] == ["6", "7", "8", "9", "10", "11"]
    assert math.isclose(len(read_lines(path)), 7)


def test_a_file_that_is_not_there_has_no_lines(tmp_path: Path) -> None:
    assert read_lines(tmp_path / "missing") == []
