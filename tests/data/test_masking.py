"""What is done about personal data in rows: stand-ins that are stable, rows left out, and a record without values."""

from __future__ import annotations

import json

from typer.testing import CliRunner

from charkha.cli.data import app
from charkha.data.formats import read_rows
from charkha.data.masking import treat_rows
from charkha.data.personal import find_personal
from charkha.data.personal_rows import all_texts_of, numbered, same_form
from charkha.data.rows import ChatRow, PreferenceRow, PromptRow, RatedRow, TextRow, ToolCall, Turn


def row(question: str, answer: str = "Noted.") -> ChatRow:
    return ChatRow((Turn("user", question), Turn("assistant", answer, 1)), 3)


def test_the_same_value_is_the_same_stand_in_however_it_is_written():
    assert same_form("mobile", "+91 98765 43210") == same_form("mobile", "९८७६५४३२१०")
    assert same_form("mobile", "9876543211") != same_form("mobile", "9876543210")
    assert same_form("pan", "abcpe1234f") == same_form("pan", "ABCPE 1234 F")
    assert same_form("email", "A@b.in") == same_form("email", "a@b.in")
    assert same_form("secret", "abc") != same_form("secret", "ABC")
    blocks = [[("pan", "A"), ("email", "a@b.in")], [("pan", "B"), ("pan", "A")]]
    assert list(numbered(blocks)) == [{("pan", "A"): 1, ("email", "a@b.in"): 1}, {("pan", "B"): 2, ("pan", "A"): 1}]


def test_masked_rows_keep_everything_else_and_the_numbers_run_through_all_files():
    first = row("PAN ABCPE1234F, mail r@gmail.com", "PAN ABCPE1234F, got it")
    done = treat_rows(
        [("a", [first]), ("b", [PromptRow("PAN ABCPK1234F", "PAN ABCPE1234F", 9), TextRow("none")])], "mask"
    )
    (chat,), (pair, text) = done.files[0].rows, done.files[1].rows
    assert [turn.content for turn in chat.turns] == ["PAN <PAN_1>, mail <EMAIL_1>", "PAN <PAN_1>, got it"]
    assert (chat.line, chat.turns[1].weight) == (3, 1)
    assert (pair.prompt, pair.completion, pair.line) == ("PAN <PAN_2>", "PAN <PAN_1>", 9)
    assert text == TextRow("none")
    assert (done.masked, done.counts) == (5, {"pan": 4, "email": 1})


def test_a_masked_text_holds_no_find_any_more():
    done = treat_rows(
        [("a", [row("Aadhaar 2341 2341 2346, a/c no 12345678901 IFSC SBIN0001234, dob 1.2.1990")])], "mask"
    )
    assert find_personal(done.files[0].rows[0].turns[0].content) == ()


def test_rows_are_left_out_or_left_alone():
    rows = [row("PAN ABCPE1234F"), row("nothing")]
    dropped = treat_rows([("a", rows)], "drop")
    assert (dropped.files[0].rows, dropped.dropped_rows) == ((rows[1],), 1)
    for action in ("report", "block"):
        left = treat_rows([("a", rows)], action)
        assert left.files[0].rows == tuple(rows)
        assert left.record()["findings"] == 1


def test_tool_calls_preferences_and_ratings_are_looked_through_and_masked():
    call = ToolCall("lookup", '{"pan": "ABCPE1234F"}')
    chat = ChatRow((Turn("user", "look"), Turn("assistant", "", calls=(call,)), Turn("assistant", "done")), 1, '["x"]')
    answer = (Turn("assistant", "PAN ABCPE1234F"),)
    pair = PreferenceRow((Turn("user", "PAN?"),), answer, (Turn("assistant", "PAN ABCPK1234F"),))
    rated = RatedRow((Turn("user", "q"), *answer), True)
    assert ("messages[1].tool_calls[0].function.arguments.pan", "ABCPE1234F") in all_texts_of(chat)
    done = treat_rows([("a", [chat, pair, rated])], "mask")
    chat, pair, rated = done.files[0].rows
    assert json.loads(chat.turns[1].calls[0].arguments) == {"pan": "<PAN_1>"}
    assert (pair.chosen[0].content, pair.rejected[0].content) == ("PAN <PAN_1>", "PAN <PAN_2>")
    assert rated.turns[1].content == "PAN <PAN_1>"


def test_tool_json_stays_json_and_names_and_ids_are_masked_too():
    call = ToolCall(
        "mail r@gmail.com", '{"phone": 9876543210, "text": "Hi\\nr@gmail.com", "ok": true}', "c-r@gmail.com"
    )
    turns = (Turn("user", "q"), Turn("assistant", "", calls=(call,)), Turn("tool", "t", call_id="c-r@gmail.com"))
    row = ChatRow((*turns, Turn("assistant", "a")), 1, '[{"default": 9876543210}]')
    (done,) = treat_rows([("a", [row])], "mask").files[0].rows
    masked = done.turns[1].calls[0]
    arguments = json.loads(masked.arguments)
    assert (arguments["text"], arguments["ok"]) == ("Hi\n<EMAIL_1>", True)
    assert arguments["phone"] == "<MOBILE_1>"
    assert json.loads(done.tools) == [{"default": "<MOBILE_1>"}]
    assert (masked.name, masked.id, done.turns[2].call_id) == ("mail <EMAIL_1>", "<EMAIL_2>", "<EMAIL_2>")
    plain = ChatRow((Turn("user", "q"), Turn("assistant", "a", calls=(ToolCall("f", '{"b":1,  "a": 2}'),))), 1)
    assert treat_rows([("a", [plain])], "mask").files[0].rows == (plain,)


def test_rows_that_are_the_same_once_masked_stand_on_one_side_and_count_as_repetitions(tmp_path):
    source, out = tmp_path / "a.jsonl", tmp_path / "out.jsonl"
    mails = ("Ravi@gmail.com", "ravi@gmail.com", "RAVI@gmail.com")
    rows = [{"prompt": f"{n} {mail}", "completion": "ok"} for n in range(20) for mail in mails]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["prepare", str(source), "-o", str(out), "--personal", "mask", "--eval", "6", "--deduplicate", "--json"]
    result = json.loads(CliRunner().invoke(app, words).stdout)
    assert (result["train_rows"], result["eval_rows"], result["duplicates"]) == (14, 6, 40)


def test_a_place_that_takes_no_file_is_told_in_a_line(tmp_path):
    source = tmp_path / "a.csv"
    source.write_text("prompt,completion\na,b\n")
    (tmp_path / "folder.jsonl").mkdir()
    for target in (tmp_path / "folder.jsonl", "/proc/out.jsonl"):
        result = CliRunner().invoke(app, ["prepare", str(source), "-o", str(target)])
        assert result.exit_code == 2, result.output


def test_kinds_that_are_kept_are_no_finds():
    done = treat_rows([("a", [row("PAN ABCPE1234F, IFSC SBIN0001234")])], "mask", ["ifsc"])
    assert done.files[0].rows[0].turns[0].content == "PAN <PAN_1>, IFSC SBIN0001234"
    assert done.record()["kept_kinds"] == ["ifsc"]


def test_the_record_holds_counts_and_no_value():
    record = treat_rows([("a", [row("PAN ABCPE1234F and abcpe1234k")])], "mask").record()
    assert record["files"][0]["counts"] == {"pan": {"high": 2, "medium": 0}}
    assert "1234" not in json.dumps(record)


def test_prepare_masks_and_drops(tmp_path):
    source, out = tmp_path / "a.csv", tmp_path / "out.jsonl"
    source.write_text("prompt,completion\nMy PAN is ABCPE1234F,ok\nhi,hello\n")

    def prepare(*words: str):
        return CliRunner().invoke(app, ["prepare", str(source), "-o", str(out), *words])

    masked = json.loads(prepare("--personal", "mask", "--json").stdout)
    assert [row.prompt for row in read_rows(out).rows] == ["My PAN is <PAN_1>", "hi"]
    assert masked["personal"]["masked"] == 1
    assert "1 pan (1 rows left out)" in prepare("--personal", "drop").stderr
    assert [row.prompt for row in read_rows(out).rows] == ["hi"]
    assert "ABCPE1234F" not in prepare().output
    assert read_rows(out).rows[0].prompt == "My PAN is ABCPE1234F"
    assert prepare("--personal", "burn").exit_code == 2


def test_prepare_reports_what_was_found_and_done(tmp_path):
    source, report = tmp_path / "a.csv", tmp_path / "report.md"
    source.write_text("prompt,completion\nMy PAN is ABCPE1234F,ok\nhi,hello\n")
    words = ["prepare", str(source), "-o", str(tmp_path / "out.jsonl"), "--personal", "drop", "--report", str(report)]
    assert CliRunner().invoke(app, words).exit_code == 0
    text = report.read_text()
    assert "1 rows that hold such data were left out" in text
    assert "| 2 | prompt | 10-20 | pan | high |" in text
    assert "ABCPE1234F" not in text
