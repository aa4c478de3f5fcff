"""Every file of the shared folder is read or refused as its README says: one table, and no file left out of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from charkha.data.formats import read_rows
from charkha.data.rows import ChatRow, PreferenceRow, RatedRow
from charkha.errors import DataError

# name -> (format, encoding, rows); every row is good.
READ = {
    "instruct/alpaca_en_demo.json": ("alpaca", "utf-8", 999),
    "instruct/rasbt_instruction_data.json": ("alpaca", "utf-8", 1100),
    "instruct/identity.json": ("alpaca", "utf-8", 91),
    "chat/sharegpt_dummy_conversation.json": ("sharegpt", "utf-8", 500),
    "chat/oasst_en_100_tree.jsonl": ("oasst", "utf-8", 100),
    "chat/glaive_toolcall_en_demo.json": ("sharegpt", "utf-8", 300),
    "preference/dpo_en_demo.json": ("preference", "utf-8", 300),
    "preference/kto_en_demo.json": ("kto", "utf-8", 300),
    "pretrain/wiki_demo.txt": ("text", "utf-8", 30),
    "pretrain/c4_demo.jsonl": ("text", "utf-8", 300),
    "pretrain/the_verdict.txt": ("text", "utf-8", 83),
    "indic/story_openings_hindi.txt": ("text", "utf-8", 1000),
    "indic/story_openings_english.txt": ("text", "utf-8", 1000),
    "indic/en_hi_translate_alpaca.jsonl": ("alpaca", "utf-8", 1000),
    "indic/xquad_hi_alpaca.jsonl": ("alpaca", "utf-8", 1190),
    "sql/wikisql_train.jsonl": ("text", "utf-8", 1000),
    "sql/wikisql_valid.jsonl": ("text", "utf-8", 100),
    "sql/wikisql_test.jsonl": ("text", "utf-8", 100),
    "chat_exports/whatsapp_test_mmddyyyy_12hrs.txt": ("whatsapp", "utf-8", 1),
    "chat_exports/whatsapp_test_ddmmyy_24hrs.txt": ("whatsapp", "utf-8", 1),
    "chat_exports/whatsapp_test_[mmddyy]_24hrs.txt": ("whatsapp", "utf-8", 1),
    "chat_exports/telegram_single_export.json": ("telegram", "utf-8", 1),
    # The encodings are those that the README states.
    "awkward/encodings/sample-english.bom.txt": ("text", "utf-8-sig", 28),
    "awkward/encodings/sample-french.txt": ("text", "utf-8", 51),
    "awkward/encodings/sample-chinese.txt": ("text", "big5", 8),
    "awkward/encodings/sample-korean.txt": ("text", "cp949", 1),
    "awkward/encodings/sample-arabic.txt": ("text", "utf-8", 3),
    "awkward/encodings/sample-russian.txt": ("text", "mac_cyrillic", 3),
    "awkward/encodings/sample-turkish.txt": ("text", "cp1254", 28),
    "awkward/encodings/sample-spanish.txt": ("text", "utf-8", 20),
}
# name -> what the refusal of the whole file says
REFUSED = {
    "instruct/seed_tasks.jsonl": "columns: id, name, instruction, instances",
    "instruct/gsm8k_train.jsonl": "columns: question, answer",
    "chat/taskmaster4_data_07.json": "columns: conversation_id, vertical, scenario, instructions, utterances",
    "indic/xquad_hi.json": "one JSON object, not a list of rows (its keys: data, version)",
    "multimodal/mllm_demo.json": "pictures, sound or video (column 'images')",
    "awkward/csv/newlines.csv": "columns: a, b, c",
    "awkward/csv/newlines_crlf.csv": "columns: a, b, c",
    "awkward/csv/quotes_and_newlines.csv": "columns: a, b",
    "awkward/csv/escaped_quotes.csv": "columns: a, b",
    "awkward/csv/comma_in_quotes.csv": "columns: first, last, address, city, zip",
    "awkward/csv/utf8.csv": "columns: a, b, c",
    "awkward/csv/json.csv": "columns: key, val",
    "awkward/csv/empty.csv": "columns: a, b, c",
    "awkward/parquet/nested_lists.snappy.parquet": "columns: a, b",
    "awkward/parquet/nested_maps.snappy.parquet": "columns: a, b, c",
    "awkward/parquet/list_columns.parquet": "columns: int64_list, utf8_list",
    "awkward/parquet/null_list.parquet": "columns: emptylist",
    "awkward/parquet/alltypes_plain.parquet": "columns: id, bool_col",
    "awkward/parquet/large_string_map.brotli.parquet": "unpacks to 2048 MiB",
    "awkward/parquet/nulls.snappy.parquet": "columns: b_struct",
    "awkward/parquet/binary.parquet": "columns: foo",
    "awkward/json/n_structure_UTF8_BOM_no_data.json": "the file is empty",
    "awkward/json/i_structure_UTF-8_BOM_empty_object.json": "one JSON object, not a list of rows (its keys: none)",
}
# name -> the problem found in it; no row is good
PROBLEMS = {
    "awkward/json/n_array_extra_comma.json": "broken JSON: Expecting value (column 5)",
    "awkward/json/n_structure_trailing_#.json": "broken JSON: more text after the value (column 10)",
    "awkward/json/n_object_trailing_comma.json": "broken JSON: Expecting property name",
    "awkward/json/n_string_unescaped_newline.json": "broken JSON: Invalid control character",
    "awkward/json/n_number_NaN.json": "broken JSON: NaN is not a JSON value",
    "awkward/json/y_string_unicode_2.json": "not an object: the row is of type string",
    "awkward/json/y_object_duplicated_key.json": "repeated key: a stands twice in one object",
    "awkward/json/i_string_UTF-16LE_with_BOM.json": "not an object: the row is of type string",
    "awkward/json/i_string_invalid_utf-8.json": "not valid UTF-8: byte 0xff at byte offset 2",
}


def test_no_file_is_left_out_of_the_table(shared: Path) -> None:
    files = {str(path.relative_to(shared / "data")) for path in (shared / "data").rglob("*") if path.is_file()}
    assert files - {"README.md"} == READ.keys() | REFUSED.keys() | PROBLEMS.keys()


@pytest.mark.parametrize("name", READ)
def test_files_that_hold_rows_are_read_without_a_problem(shared: Path, name: str) -> None:
    read = read_rows(shared / "data" / name)
    assert (read.format, read.encoding, len(read.rows), read.problems) == (*READ[name], ())
    assert [row.line for row in read.rows] == sorted(row.line for row in read.rows)


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_are_no_data_set_are_refused_by_what_they_hold(shared: Path, name: str) -> None:
    with pytest.raises(DataError) as caught:
        read_rows(shared / "data" / name)
    assert REFUSED[name] in caught.value.message
    assert caught.value.where


@pytest.mark.parametrize("name", PROBLEMS)
def test_awkward_json_is_refused_with_the_reason(shared: Path, name: str) -> None:
    read = read_rows(shared / "data" / name)
    assert read.rows == ()
    assert any(problem.reason.startswith(PROBLEMS[name]) and problem.line == 1 for problem in read.problems)
    assert all(problem.remedy for problem in read.problems)


def test_tables_of_other_columns_are_read_by_mapping(shared: Path) -> None:
    read = read_rows(
        shared / "data" / "instruct" / "gsm8k_train.jsonl", mapping={"prompt": "question", "completion": "answer"}
    )
    assert (read.format, len(read.rows), read.problems) == ("prompt_completion", 7473, ())


def test_chat_exports_give_the_turns_that_were_written(shared: Path) -> None:
    folder = shared / "data" / "chat_exports"
    for name in ("mmddyyyy_12hrs", "ddmmyy_24hrs", "[mmddyy]_24hrs"):
        (row,) = read_rows(folder / f"whatsapp_test_{name}.txt").rows
        assert isinstance(row, ChatRow)
        assert [(turn.role, turn.content) for turn in row.turns] == [
            ("user", "Lorem ipsum dolor sit amet.\n."),
            ("assistant", "Lorem ipsum dolor sit amet,\nconsectetur adipiscing elit. Duis libero."),
        ]
    (row,) = read_rows(folder / "telegram_single_export.json").rows
    assert isinstance(row, ChatRow)
    assert [(turn.role, turn.content) for turn in row.turns] == [
        ("user", "Minimal Message"),
        ("assistant", "Link:https://telegram.org/"),
    ]
    assert row.line == 3


def test_tool_calls_trees_and_preferences_keep_what_they_say(shared: Path) -> None:
    tools = read_rows(shared / "data" / "chat" / "glaive_toolcall_en_demo.json").rows[0]
    assert isinstance(tools, ChatRow)
    assert [turn.role for turn in tools.turns][2:6] == ["user", "assistant", "tool", "assistant"]
    assert tools.turns[3].calls[0].name == "search_recipes"
    assert tools.turns[3].calls[0].arguments == '{"ingredients": ["chicken", "bell peppers", "rice"]}'
    assert '"search_recipes"' in str(tools.tools)
    trees = read_rows(shared / "data" / "chat" / "oasst_en_100_tree.jsonl").rows
    assert all(row.turns[0].role == "user" and row.turns[-1].role == "assistant" for row in trees)  # type: ignore[union-attr]
    pair = read_rows(shared / "data" / "preference" / "dpo_en_demo.json").rows[0]
    assert isinstance(pair, PreferenceRow)
    assert (pair.prompt[-1].role, pair.chosen[0].content[:13]) == ("user", "That sounds l")
    rated = read_rows(shared / "data" / "preference" / "kto_en_demo.json").rows
    assert {row.label for row in rated if isinstance(row, RatedRow)} == {True, False}
