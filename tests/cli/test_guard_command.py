"""`charkha guard simulate` over traces of readings."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from charkha.cli.guard import app


@pytest.fixture
def trace(tmp_path):
    """A card that becomes hot, whatever is done about it."""
    path = tmp_path / "trace.jsonl"
    card = {"name": "card", "power_default_w": 350, "power_minimum_w": 100, "shutdown_c": 110}
    rows = [
        {
            "time_s": second,
            "gpus": [{"index": 0, "temperature_c": 70 + second // 2, "power_w": 340, "power_limit_w": 350}],
            "gpu_limits": [card],
            "may_set_power": True,
        }
        for second in range(60)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def invoke(*arguments) -> object:
    return CliRunner().invoke(app, ["simulate", *map(str, arguments)])


def test_shows_what_changed_and_a_summary(trace):
    result = invoke(trace)
    assert result.exit_code == 0, result.output
    assert "pause + save" in result.output
    assert "power limit" in result.output
    assert "60 readings over 59 s" in result.output


def test_prints_one_json_object(trace):
    result = invoke(trace, "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["summary"]["pauses"] == 1
    assert record["decisions"][-1]["action"] == "pause"
    assert record["decisions"][-1]["reasons"]


def test_target_and_ceiling_are_heard(trace):
    cooler, warmer = (json.loads(invoke(trace, "--target", degrees, "--json").stdout) for degrees in (75, 95))
    assert cooler["summary"]["pauses"] == 1
    assert warmer["summary"]["pauses"] == 0
    capped = json.loads(invoke(trace, "--max-power", 250, "--target", 95, "--json").stdout)
    assert capped["decisions"][0]["power_limits_w"] == [242.0]


def test_a_calm_trace_changes_nothing(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text('{"time_s": 0, "gpus": [{"index": 0, "temperature_c": 60}]}\n')
    result = invoke(path)
    assert result.exit_code == 0, result.output
    assert "changed nothing" in result.output


def test_a_bad_line_is_exit_code_4_with_file_and_line(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text('{"time_s": 0}\n{"time": 1}\n')
    result = invoke(path, "--json")
    assert result.exit_code == 4
    record = json.loads(result.stdout)
    assert record["error"]["where"].endswith("trace.jsonl, line 2")
    assert record["files"][0]["problems"][0]["line"] == 2
    assert invoke(tmp_path / "missing.jsonl").exit_code == 4
