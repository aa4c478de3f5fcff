"""Scanning files: every column, with file, line and field; and the report, which never shows a value."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from charkha.cli.data import app
from charkha.data.formats import ReadOptions
from charkha.data.scan import repetitions_in, scan_files
from charkha.personal_kinds import PERSONAL_KINDS

PAN, AADHAAR, MOBILE = "ABCPE1234F", "234123412346", 9876543210


def chat(question: str, answer: str = "Noted.") -> dict[str, object]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["scan", *map(str, words)])


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    records = [chat("hello"), {**chat(f"My PAN is {PAN}"), "aadhaar": AADHAAR, "phone": MOBILE, "order_id": MOBILE}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_finds_are_told_by_file_line_field_and_characters(rows):
    found = scan_files([rows]).findings
    assert [(find.kind, find.line, find.field, find.start, find.end) for find in found] == [
        ("pan", 2, "messages[0].content", 10, 20),
        ("aadhaar", 2, "aadhaar", 0, 12),
        ("mobile", 2, "phone", 0, 10),
    ]
    assert {find.file for find in found} == {str(rows)}


def test_the_name_of_a_column_says_what_its_values_are(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(f"aadhaar no,account_number,order_id,pincode\n{AADHAAR},12345678901,{AADHAAR},560001\n")
    found = scan_files([path]).findings
    assert [(find.kind, find.field, find.confidence) for find in found] == [
        ("aadhaar", "aadhaar no", "high"),
        ("bank_account", "account_number", "high"),
        ("pin_code", "pincode", "high"),
    ]


def test_files_of_no_known_layout_and_nested_values_are_scanned(tmp_path):
    path = tmp_path / "odd.jsonl"
    path.write_text(json.dumps({"data": [{"people": [{"bio": f"her PAN {PAN}"}]}]}) + "\n")
    (find,) = scan_files([path]).findings
    assert (find.field, find.line) == ("data[0].people[0].bio", 1)


def test_the_json_contract(rows):
    result = run(rows, "--json")
    assert result.exit_code == 0
    record = json.loads(result.stdout)
    assert set(record["findings"][0]) == {"kind", "file", "line", "field", "start", "end", "confidence"}
    assert record["counts"] == {"pan": 1, "aadhaar": 1, "mobile": 1}
    assert record["duplicates"] == {"exact": 0, "near": 0}
    assert record["leakage"] == {"exact": None, "near": None}
    assert record["blocking"] == 3


def test_rows_that_repeat_and_rows_that_leaked_are_counted(tmp_path):
    train, held_out = tmp_path / "train.jsonl", tmp_path / "eval.jsonl"
    train.write_text("".join(json.dumps({**chat(text), "id": n}) + "\n" for n, text in enumerate("aabcc")))
    held_out.write_text(json.dumps(chat("c")) + "\n")
    duplicates, leakage = repetitions_in([train], [held_out], ReadOptions())
    assert (duplicates.exact, leakage.exact) == (2, 1)
    record = json.loads(run(train, "--against", held_out, "--json").stdout)
    assert (record["duplicates"]["exact"], record["leakage"]["exact"]) == (2, 1)


def test_lines_that_cannot_be_read_are_told_with_exit_code_4(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(f'{{"text": "PAN {PAN}"}}\n{{"text": \n')
    result = run(path, "--json")
    record = json.loads(result.stdout)
    assert result.exit_code == 4
    assert record["counts"] == {"pan": 1}
    assert record["files"][0]["problems"][0]["line"] == 2
    assert record["error"]["kind"] == "data"


@pytest.mark.parametrize("ending", ["md", "html"])
def test_the_report_tells_places_counts_and_what_was_done_and_no_value(rows, tmp_path, ending):
    path = tmp_path / "out" / f"report.{ending}"
    result = run(rows, "--report", path)
    assert result.exit_code == 0, result.output
    text = path.read_text(encoding="utf-8")
    for told in (str(rows), "messages[0].content", "10-20", PERSONAL_KINDS["pan"], "data.personal", "Limits"):
        assert told in text
    for value in (PAN, AADHAAR, str(MOBILE)):
        assert value not in text
        assert value not in result.output
    assert re.search(r"pan\b.*1.*0.*1", text)


def test_a_report_of_another_kind_is_refused(rows, tmp_path):
    result = run(rows, "--report", tmp_path / "report.pdf")
    assert result.exit_code == 2
    assert not (tmp_path / "report.pdf").exists()


def test_file_names_cannot_break_the_report(tmp_path):
    path = tmp_path / "a|b<script>.jsonl"
    path.write_text(json.dumps({"text": f"PAN {PAN}", "x": 1}) + "\n")
    for ending in ("md", "html"):
        assert run(path, "--report", tmp_path / f"r.{ending}").exit_code == 0
    assert "a\\|b" in (tmp_path / "r.md").read_text()
    assert "<script>" not in (tmp_path / "r.html").read_text()
