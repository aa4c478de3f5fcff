from __future__ import annotations

import json
from pathlib import Path

import pytest

from charkha.data.formats import ReadFile, raise_for_problems, read_rows
from charkha.data.rows import ChatRow, PromptRow, TextRow
from charkha.errors import DataError, UsageError


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


def jsonl(path: Path, *rows: object) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def only_problem(path: Path, **options: object) -> tuple[int | None, str | None, str]:
    (problem,) = read_rows(path, **options).problems
    return problem.line, problem.field, problem.reason


def chat(*turns: tuple[str, str]) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def spoken(row: object) -> list[tuple[str, str]]:
    assert isinstance(row, ChatRow)
    return [(turn.role, turn.content) for turn in row.turns]


# Formats


def test_gsm8k_is_refused_with_its_columns_and_the_mapping_to_write(shared: Path) -> None:
    path = shared / "data" / "instruct" / "gsm8k_train.jsonl"
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert "question, answer" in caught.value.message
    assert "data.map: {prompt: question, completion: answer}" in caught.value.remedy
    assert "--map prompt=question,completion=answer" in caught.value.remedy
    read = read_rows(path, mapping={"prompt": "question", "completion": "answer"})
    assert (read.format, len(read.rows), read.problems) == ("prompt_completion", 7473, ())


def test_messages_keep_several_turns_and_name_ignored_columns(tmp_path: Path) -> None:
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "Bye")]
    read = read_rows(jsonl(tmp_path / "a.jsonl", {**chat(*turns), "lang": "en", "id": 7}))
    assert spoken(read.rows[0]) == turns
    assert read.ignored_columns == ("lang", "id")
    assert any("lang, id" in note for note in read.notes)


def test_alpaca_joins_instruction_and_input_and_reads_system_and_history(tmp_path: Path) -> None:
    row = {"instruction": "Add", "input": "1 2", "output": "3", "system": "Calculate", "history": [["a", "b"]]}
    read = read_rows(jsonl(tmp_path / "a.jsonl", row))
    expected = [("system", "Calculate"), ("user", "a"), ("assistant", "b"), ("user", "Add\n\n1 2"), ("assistant", "3")]
    assert spoken(read.rows[0]) == expected


def test_prompt_and_completion_as_text_or_as_messages(tmp_path: Path) -> None:
    text = {"prompt": "1+1=", "completion": " 2"}
    messages = {"prompt": chat(("user", "a"))["messages"], "completion": chat(("assistant", "b"))["messages"]}
    read = read_rows(jsonl(tmp_path / "a.jsonl", text, messages))
    assert read.rows[0] == PromptRow("1+1=", " 2", 1)
    assert spoken(read.rows[1]) == [("user", "a"), ("assistant", "b")]


def test_answers_in_a_conversational_prompt_are_not_trained(tmp_path: Path) -> None:
    prompt = chat(("user", "a"), ("assistant", "b"), ("user", "c"))["messages"]
    read = read_rows(
        jsonl(tmp_path / "a.jsonl", {"prompt": prompt, "completion": chat(("assistant", "d"))["messages"]})
    )
    assert [turn.is_trained for turn in read.rows[0].turns] == [False, False, False, True]


def test_openai_weights_switch_turns_off(tmp_path: Path) -> None:
    row = chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    row["messages"][1]["weight"] = 0
    read = read_rows(jsonl(tmp_path / "a.jsonl", row))
    assert [turn.is_trained for turn in read.rows[0].turns] == [False, False, False, True]


def test_mapping_gives_our_names_to_any_columns(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "a.jsonl",
        {"body": "words", "conv": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    )
    assert read_rows(path, mapping={"text": "body"}).rows == (TextRow("words", 1),)
    assert spoken(read_rows(path, mapping={"messages": "conv"}).rows[0]) == [("user", "a"), ("assistant", "b")]


def test_mapping_wins_over_columns_that_fit_by_themselves(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": "long", "q": "a", "answer": "b"})
    read = read_rows(path, mapping={"prompt": "q", "completion": "answer"})
    assert read.rows == (PromptRow("a", "b", 1),)


def test_mapping_a_column_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"q": "a", "a": "b"})
    with pytest.raises(DataError, match=r"'question'.*it has: q, a"):
        read_rows(path, mapping={"prompt": "question", "completion": "a"})
    with pytest.raises(UsageError, match="'promt'"):
        read_rows(path, mapping={"promt": "q"})


def test_rows_of_another_format_are_problems(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b"}, {"prompt": "c", "completion": "d"})
    assert only_problem(path) == (3, "text", "missing field")


def test_a_format_that_the_file_does_not_have_is_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": "a"})
    with pytest.raises(DataError, match="needs the column 'messages'; the file has: text"):
        read_rows(path, format="messages")
    with pytest.raises(UsageError, match="'parquet'"):
        read_rows(path, format="parquet")


# Bad rows

GOOD = chat(("user", "a"), ("assistant", "b"))


@pytest.mark.parametrize(
    ("row", "field", "reason"),
    [
        ([1], None, "not an object: the row is of type array"),
        ({"messages": []}, "messages", "no messages: the array is empty"),
        ({"messages": "hello"}, "messages", "wrong type: string where an array is needed, and it is not JSON"),
        ({"messages": 3}, "messages", "wrong type: number where an array of messages is needed"),
        ({"messages": ["hi"]}, "messages[0]", "wrong type: string where a message object is needed"),
        (chat(("user", "a"), ("assistant", "")), "messages[1].content", "missing answer: it is empty"),
        (chat(("user", "a"), ("assistant", " \n")), "messages[1].content", "missing answer: it is only white space"),
        (chat(("user", ""), ("assistant", "b")), "messages[0].content", "empty user turn: it is empty"),
        (chat(("user", "a")), "messages", "no assistant turn: there is nothing to train"),
        (chat(("assistant", "a")), "messages", "no user turn"),
        (chat(("user", "a"), ("user", "b"), ("assistant", "c")), "messages[1]", "wrong order: two user turns in a row"),
        (
            chat(("user", "a"), ("assistant", "b"), ("user", "c")),
            "messages",
            "no answer at the end: the conversation ends with a user turn",
        ),
        (
            chat(("user", "a"), ("system", "b"), ("assistant", "c")),
            "messages[1]",
            "wrong order: a system turn after the first place",
        ),
        ({"messages": [{"content": "a"}]}, "messages[0].role", "missing field"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing field"),
        (
            {"messages": [{"role": "user", "content": 5}]},
            "messages[0].content",
            "wrong type: number where text is needed",
        ),
    ],
)
def test_each_bad_conversation_is_told_by_line_field_and_reason(
    tmp_path: Path, row: object, field: str | None, reason: str
) -> None:
    assert only_problem(jsonl(tmp_path / "a.jsonl", GOOD, row)) == (2, field, reason)


def test_an_unknown_role_is_named(tmp_path: Path) -> None:
    line, field, reason = only_problem(jsonl(tmp_path / "a.jsonl", chat(("wizard", "a"), ("assistant", "b"))))
    assert (line, field) == (1, "messages[0].role")
    assert reason.startswith("unknown role: 'wizard'")


def test_rows_without_answer_or_prompt_are_problems(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": " "}, {"prompt": "", "completion": "b"}]
    rows += [{"prompt": "a"}, {"prompt": "a", "completion": None}, {"prompt": "a", "completion": 42}]
    read = read_rows(jsonl(tmp_path / "a.jsonl", *rows))
    assert [(problem.line, problem.field, problem.reason) for problem in read.problems] == [
        (2, "completion", "missing answer: it is only white space"),
        (3, "prompt", "missing prompt: it is empty"),
        (4, "completion", "missing field"),
        (5, "completion", "missing answer: it is empty"),
        (6, "completion", "wrong type: number where text is needed"),
    ]
    assert len(read.rows) == 1


def test_line_37_broken_is_reported_as_line_37_and_the_rest_is_read(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"row {number}"}) for number in range(1, 101)]
    lines[36] = '{"text": "row 37"'
    read = read_rows(write(tmp_path / "a.jsonl", "\n".join(lines)))
    assert len(read.rows) == 99
    (problem,) = read.problems
    assert problem.line == 37
    assert problem.reason.startswith("broken JSON: Expecting ',' delimiter")


def test_bad_rows_become_one_error_that_counts_all_and_shows_twenty(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": "good"}, *({"text": ""} for _ in range(23)), {"text": 3})
    read = read_rows(path)
    with pytest.raises(DataError) as caught:
        raise_for_problems([read])
    message = caught.value.message
    assert "24 problems in the data (23 x empty text, 1 x wrong type)" in message
    assert f"{path}:2: text: empty text" in message
    assert message.count(str(path)) == 20
    assert "and 4 more" in message
    assert (caught.value.exit_code, len(caught.value.files[0].problems), caught.value.files[0].rows) == (4, 24, 1)


def test_good_files_raise_nothing() -> None:
    raise_for_problems([ReadFile(Path("a"), "text", "utf-8", (), (), (), ())])


# Whole files


def test_missing_empty_and_strange_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="not an ordinary file"):
        read_rows(tmp_path)
    with pytest.raises(DataError, match=r"\*\.xlsx are not read"):
        read_rows(write(tmp_path / "a.xlsx", "x"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.md", "a.parquet"])
@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf", b"\n \r\n"])
def test_an_empty_file_says_so(tmp_path: Path, name: str, content: bytes) -> None:
    with pytest.raises(DataError, match="empty"):
        read_rows(write(tmp_path / name, content))


@pytest.mark.parametrize(("name", "content"), [("a.json", "[ ]"), ("a.csv", "prompt,completion\n")])
def test_a_file_without_rows_is_empty(tmp_path: Path, name: str, content: str) -> None:
    with pytest.raises(DataError, match="empty"):
        read_rows(write(tmp_path / name, content))


def test_a_broken_parquet_file_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Parquet"):
        read_rows(write(tmp_path / "a.parquet", "PAR1 not really"))


# JSON


def test_array_elements_are_told_by_the_line_where_they_start(tmp_path: Path) -> None:
    read = read_rows(write(tmp_path / "a.json", '[\n  {"text": "a"},\n\n  {"text":\n ""},\n {"text": "c"}]\n'))
    assert [row.line for row in read.rows] == [2, 6]
    assert [problem.line for problem in read.problems] == [4]


def test_what_the_file_holds_decides_not_its_name(tmp_path: Path) -> None:
    lines = read_rows(write(tmp_path / "a.json", '{"text": "a"}\n{"text": "b"}\n'))
    array = read_rows(write(tmp_path / "a.jsonl", '[{"text": "a"},\n {"text": "b"}]'))
    assert [row.line for row in lines.rows] == [1, 2]
    assert [row.line for row in array.rows] == [1, 2]
    assert "JSON Lines" in lines.notes[0]
    assert "array" in array.notes[0]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": NaN}', "broken JSON: NaN is not a JSON value"),
        ('{"text": -Infinity}', "broken JSON: -Infinity is not a JSON value"),
        ('{"text": "a", "n": 1e999}', "broken JSON: the number 1e999 is too large"),
        ('{"text": "a", "text": "b"}', "repeated key: text stands twice in one object"),
        ('{"text": "a"} {"text": "b"}', "broken JSON: more text after the value (column 14)"),
        ('{"text": ' + "[" * 100_000 + "}", "broken JSON: nested too deeply"),
    ],
)
def test_json_is_read_strictly(tmp_path: Path, line: str, reason: str) -> None:
    assert only_problem(write(tmp_path / "a.jsonl", f'{{"text": "good"}}\n{line}\n')) == (2, None, reason)


def test_half_a_surrogate_pair_is_a_problem_and_a_whole_one_is_text(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl", '{"text": "\\ud83d\\ude00"}\n{"text": "a\\ud83d"}\n{"text": "\u2028 is no line end"}'
    )
    read = read_rows(path)
    assert [row.text for row in read.rows] == ["\U0001f600", "\u2028 is no line end"]
    assert read.problems[0].line == 2
    assert "half a character: U+D83D" in read.problems[0].reason


@pytest.mark.parametrize(
    "name", ["n_array_extra_comma", "n_number_NaN", "n_object_trailing_comma", "n_structure_trailing_#"]
)
def test_json_that_must_be_refused_is_refused(shared: Path, name: str) -> None:
    read = read_rows(shared / "data" / "awkward" / "json" / f"{name}.json")
    assert not read.rows
    assert any(problem.reason.startswith("broken JSON") for problem in read.problems)


def test_json_that_must_be_read_is_read_and_its_rows_judged(shared: Path) -> None:
    folder = shared / "data" / "awkward" / "json"
    assert only_problem(folder / "y_string_unicode_2.json")[2] == "not an object: the row is of type string"
    assert only_problem(folder / "i_string_UTF-16LE_with_BOM.json")[2] == "not an object: the row is of type string"
    assert "not valid UTF-8: byte 0xff at byte offset 2" in only_problem(folder / "i_string_invalid_utf-8.json")[2]
    assert only_problem(folder / "y_object_duplicated_key.json")[2] == "repeated key: a stands twice in one object"


# Encodings


@pytest.mark.parametrize(
    ("encoding", "told"), [("utf-8", "utf-8"), ("utf-8-sig", "utf-8-sig"), ("utf-16", "utf-16-le")]
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_text_is_the_same_in_every_encoding_and_with_either_line_end(
    tmp_path: Path, encoding: str, told: str, end: str
) -> None:
    path = write(tmp_path / "a.jsonl", f'{{"text": "नमस्ते"}}{end}{{"text": "b"}}{end}'.encode(encoding))
    read = read_rows(path)
    assert read.rows == (TextRow("नमस्ते", 1), TextRow("b", 2))
    assert (read.encoding, read.problems) == (told, ())


def test_a_few_odd_bytes_are_problems_with_line_and_byte_offset(tmp_path: Path) -> None:
    read = read_rows(write(tmp_path / "a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n{"text": "c"}\n'))
    assert [row.line for row in read.rows] == [1, 3]
    assert read.problems[0].line == 2
    assert "byte 0xe9 at byte offset 27" in read.problems[0].reason


# Tables


def test_csv_with_quotes_and_newlines_is_told_by_physical_line(shared: Path) -> None:
    read = read_rows(shared / "data" / "awkward" / "csv" / "newlines.csv", mapping={"prompt": "a", "completion": "b"})
    assert [(row.line, row.prompt) for row in read.rows] == [(2, "1"), (3, "Once upon \na time"), (5, "7")]
    quotes = read_rows(shared / "data" / "awkward" / "csv" / "quotes_and_newlines.csv", mapping={"text": "b"})
    assert [row.text for row in quotes.rows] == ['ha \n"ha" \nha', "4"]
    empty = read_rows(shared / "data" / "awkward" / "csv" / "empty.csv", mapping={"prompt": "a", "completion": "b"})
    assert [(problem.line, problem.field) for problem in empty.problems] == [(2, "completion")]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "prompt;completion\na, b;c\n"),
        ("a.csv", "prompt\tcompletion\na, b\tc\n"),
        ("a.tsv", "prompt\tcompletion\na, b\tc\n"),
        ("a.csv", "'prompt','completion'\n'a, b','c'\n"),
        ("a.csv", '"prompt","completion"\r\n"a, b","c"\r\n'),
        ("a.csv", "\ufeffprompt|completion\na, b|c"),
    ],
)
def test_delimiter_and_quotes_are_detected(tmp_path: Path, name: str, content: str) -> None:
    assert read_rows(write(tmp_path / name, content)).rows == (PromptRow("a, b", "c", 2),)


def test_csv_cells_of_any_size_and_backslash_quotes(tmp_path: Path) -> None:
    large = "x" * 300_000
    assert read_rows(write(tmp_path / "a.csv", f'text\n"{large}"\n')).rows == (TextRow(large, 2),)
    escaped = read_rows(write(tmp_path / "b.csv", 'prompt,completion\n"say \\"hi\\", please",ok\n'))
    assert escaped.rows == (PromptRow('say "hi", please', "ok", 2),)


def test_csv_rows_that_do_not_fit_the_header_are_problems(tmp_path: Path) -> None:
    read = read_rows(write(tmp_path / "a.csv", 'prompt,completion\na,b\nc\n\n"d,e\nf'))
    assert [row.line for row in read.rows] == [2]
    assert [(problem.line, problem.reason) for problem in read.problems] == [
        (3, "wrong number of cells: 1 where the header has 2"),
        (5, "broken CSV: a quoted cell that starts here is never closed"),
    ]
    assert "1 blank line was skipped" in read.notes
    with pytest.raises(DataError, match="'a' twice"):
        read_rows(write(tmp_path / "b.csv", "a,a\n1,2\n"))


def test_a_csv_cell_may_hold_messages_as_json(tmp_path: Path) -> None:
    cell = json.dumps(GOOD["messages"]).replace('"', '""')
    assert spoken(read_rows(write(tmp_path / "a.csv", f'messages\n"{cell}"\n')).rows[0]) == [
        ("user", "a"),
        ("assistant", "b"),
    ]


def test_parquet_rows_count_from_one_and_nulls_are_absent(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"instruction": "a", "input": None, "output": "b"},
        {"instruction": "a", "input": "x", "output": None},
        {"instruction": "c", "input": "", "output": "d"},
    ]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    read = read_rows(path)
    assert (read.format, read.encoding, [row.line for row in read.rows]) == ("alpaca", None, [1, 3])
    assert [(problem.line, problem.field) for problem in read.problems] == [(2, "output")]


@pytest.mark.parametrize(
    ("name", "column", "reason"),
    [
        ("alltypes_plain", "int_col", "wrong type: number"),
        ("binary", "foo", "wrong type: bytes"),
        ("list_columns", "utf8_list", "wrong type: array"),
        ("null_list", "emptylist", "wrong type: array"),
        ("nulls.snappy", "b_struct", "wrong type: object"),
    ],
)
def test_parquet_columns_that_are_no_text_are_problems(shared: Path, name: str, column: str, reason: str) -> None:
    path = shared / "data" / "awkward" / "parquet" / f"{name}.parquet"
    read = read_rows(path, mapping={"text": column})
    assert not read.rows
    assert any(problem.reason.startswith(reason) for problem in read.problems)


def test_parquet_shapes_that_pyarrow_cannot_turn_into_rows_are_data_errors(shared: Path) -> None:
    with pytest.raises(DataError, match="unpacks to 2048 MiB"):
        read_rows(shared / "data" / "awkward" / "parquet" / "large_string_map.brotli.parquet")


# Plain text


def test_txt_is_one_row_a_line_and_md_one_a_paragraph(tmp_path: Path) -> None:
    content = "first\r\n\r\nsecond\nthird\n\n"
    txt = read_rows(write(tmp_path / "a.txt", content))
    md = read_rows(write(tmp_path / "a.md", content))
    assert txt.rows == (TextRow("first", 1), TextRow("second", 3), TextRow("third", 4))
    assert txt.notes == ("each line is one row", "2 blank lines were skipped")
    assert md.rows == (TextRow("first", 1), TextRow("second\nthird", 3))
