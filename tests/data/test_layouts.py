"""Layouts beyond plain conversations: preferences, ratings, trees, tools, spellings, packed files, exports."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from charkha.data.formats import ReadOptions, read_rows
from charkha.data.rows import ChatRow, PreferenceRow, RatedRow, Row, row_as_record
from charkha.errors import DataError

USER = {"role": "user", "content": "Q?"}
GOOD, BAD = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}


def one(tmp_path: Path, record: object, **options: object) -> Row:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record) + "\n", encoding="utf-8")
    read = read_rows(path, **options)
    assert read.problems == ()
    return read.rows[0]


def reason(tmp_path: Path, record: object) -> str:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": [USER, GOOD]}) + "\n" + json.dumps(record) + "\n", encoding="utf-8")
    (problem,) = read_rows(path, format="messages").problems
    return problem.reason


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Q?", "chosen": "good", "rejected": "bad"},
        {"question": "Q?", "chosen": "good", "rejected": "bad"},
        {"instruction": "Q?", "input": "", "chosen": "good", "rejected": "bad"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "Q?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"conversations": [{"from": "human", "value": "Q?"}], "chosen": {"from": "gpt", "value": "good"},
         "rejected": {"from": "gpt", "value": "bad"}},
        {"chosen": "\n\nHuman: Q?\n\nAssistant: good", "rejected": "\n\nHuman: Q?\n\nAssistant: bad"},
        {"prompt": "Q?", "chosen": json.dumps([GOOD]), "rejected": json.dumps([BAD])},
    ],
)  # fmt: skip
def test_preferences_in_every_layout_say_the_same(tmp_path: Path, record: dict) -> None:
    row = one(tmp_path, record)
    assert isinstance(row, PreferenceRow)
    said = [[(turn.role, turn.content) for turn in turns] for turns in (row.prompt, row.chosen, row.rejected)]
    assert said == [[("user", "Q?")], [("assistant", "good")], [("assistant", "bad")]]
    again = one(tmp_path, row_as_record(row))
    assert isinstance(again, PreferenceRow)
    assert again == row


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Q?", "completion": "good", "label": True},
        {"messages": [USER, GOOD], "label": True},
        {"conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "good"}], "kto_tag": True},
        {"prompt": [USER], "completion": [GOOD], "label": True},
    ],
)
def test_ratings_in_every_layout_say_the_same(tmp_path: Path, record: dict) -> None:
    row = one(tmp_path, record)
    assert isinstance(row, RatedRow)
    assert (row.label, [(turn.role, turn.content) for turn in row.turns]) == (
        True,
        [("user", "Q?"), ("assistant", "good")],
    )


def test_a_preference_for_the_same_answer_is_none(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "Q?", "chosen": "x", "rejected": "x"}))
    assert read_rows(path).problems[0].reason.startswith("no preference")


@pytest.mark.parametrize("names", [("role", "content"), ("from", "value"), ("role", "value"), ("from", "content")])
@pytest.mark.parametrize("roles", [("human", "gpt"), ("user", "assistant"), ("prompter", "bot"), ("User", "Model")])
def test_spellings_of_messages(tmp_path: Path, names: tuple[str, str], roles: tuple[str, str]) -> None:
    turns = [dict(zip(names, pair, strict=True)) for pair in zip(roles, ("a", "b"), strict=True)]
    row = one(tmp_path, {"conversations": turns})
    assert isinstance(row, ChatRow)
    assert [(turn.role, turn.content) for turn in row.turns] == [("user", "a"), ("assistant", "b")]


def test_openai_tools_survive_reading_and_writing(tmp_path: Path) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    record = {
        "messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]},
                     {"role": "tool", "tool_call_id": "c1", "content": "2"}, {**GOOD, "weight": 0}],
        "tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}],
    }  # fmt: skip
    row = one(tmp_path, record)
    assert isinstance(row, ChatRow)
    assert (row.turns[1].calls[0].name, row.turns[2].call_id, row.turns[3].weight) == ("add", "c1", 0)
    assert one(tmp_path, row_as_record(row)) == row


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        (
            [USER, {"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}],
            "broken tool call: it names",
        ),
        ([USER, {"role": "function_call", "content": '{"name": "f", '}, GOOD], "broken tool call: not JSON"),
        ([USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}], "broken tool call: the arg"),
        ([USER, {"role": "tool", "content": "2"}, GOOD], "wrong order: a tool turn that no call stands before"),
        ([{"role": "system", "content": "Be kind."}], "only a system turn"),
    ],
)
def test_broken_tool_turns_are_told(tmp_path: Path, turns: list, expected: str) -> None:
    assert reason(tmp_path, {"messages": turns}).startswith(expected)


def test_packed_files_folders_and_arrow(tmp_path: Path) -> None:
    import pyarrow

    from charkha.data.hub_names import resolve_names

    rows = "".join(json.dumps({"text": f"row {number}"}) + "\n" for number in range(5))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    with pyarrow.output_stream(str(tmp_path / "b.jsonl.zst"), compression="zstd") as file:
        file.write(rows.encode())
    table = pyarrow.table({"text": [f"row {number}" for number in range(5)]})
    with pyarrow.ipc.new_stream(str(tmp_path / "c.arrow"), table.schema) as stream:
        stream.write_table(table)
    with pyarrow.ipc.new_file(str(tmp_path / "d.feather"), table.schema) as writer:
        writer.write_table(table)
    (tmp_path / ".hidden.jsonl").write_text("nothing")
    files = resolve_names([str(tmp_path)], tmp_path)
    assert [path.name for path in files] == ["a.jsonl.gz", "b.jsonl.zst", "c.arrow", "d.feather"]
    assert [[row.text for row in read_rows(path).rows] for path in files] == [[f"row {n}" for n in range(5)]] * 4  # type: ignore[union-attr]


def test_data_sets_of_the_hub_are_found_in_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from charkha.data.hub_names import resolve_names
    from charkha.errors import EnvironmentProblem, UsageError

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "datasets--org--name"
    blob = repo / "blobs" / "abc"
    blob.parent.mkdir(parents=True)
    blob.write_text('{"text": "a"}\n')
    snapshot = repo / "snapshots" / "c0ffee" / "data"
    snapshot.mkdir(parents=True)
    for name in ("train-00000.jsonl", "test-00000.jsonl"):
        (snapshot / name).symlink_to(blob)
    (snapshot.parent / "README.md").write_text("about")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("c0ffee")
    assert [path.name for path in resolve_names(["hub:org/name"], tmp_path)] == ["train-00000.jsonl"]
    (held_out,) = resolve_names(["hub:org/name/data/test-00000.jsonl"], tmp_path)
    assert len(read_rows(held_out).rows) == 1
    with pytest.raises(EnvironmentProblem, match="not on this machine"):
        resolve_names(["hub:org/other"], tmp_path)
    with pytest.raises(UsageError, match="no name on the hub"):
        resolve_names(["hub:org"], tmp_path)


@pytest.mark.parametrize(
    "lines",
    [
        ["15/01/24, 10:32 - Asha: Hi", "15/01/24, 10:33 - Shop: Hello,", "how can I help?"],
        ["[15/01/2024, 10:32:15] Asha: Hi", "\u200e[15/01/2024, 10:33:00] Shop: Hello,", "how can I help?"],
        ["1/15/24, 10:32\u202fAM - Asha: Hi", "1/15/24, 10:33\u202fAM - Shop: Hello,", "how can I help?"],
        ["15.01.24, 10:32 - Asha: Hi", "15.01.24, 10:33 - Shop: Hello,", "how can I help?"],
        ["2024-01-15, 10:32 - Asha: Hi", "2024-01-15, 10:33 - Shop: Hello,", "how can I help?"],
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_whatsapp_in_every_date_style(tmp_path: Path, lines: list[str], end: str) -> None:
    day = lines[0].split("10:32")[0]
    tail = lines[0].split("10:32")[1].split("Asha")[0].replace(":15", ":59")
    more = [f"{day}10:34{tail}Asha: <Media omitted>", f"{day}10:35{tail}Asha: Bye", f"{day}10:36{tail}Shop: Bye"]
    header = f"{day}10:30{tail}Messages and calls are end-to-end encrypted."
    path = tmp_path / "chat.txt"
    path.write_bytes(end.join([header, *lines, *more]).encode())
    (row,) = read_rows(path).rows
    assert isinstance(row, ChatRow)
    assert [(turn.role, turn.content) for turn in row.turns] == [
        ("user", "Hi"), ("assistant", "Hello,\nhow can I help?"), ("user", "Bye"), ("assistant", "Bye"),
    ]  # fmt: skip


def test_the_assistant_of_an_export_can_be_named(tmp_path: Path) -> None:
    path = tmp_path / "chat.txt"
    path.write_text("15/01/24, 10:32 - Shop: Hi\n15/01/24, 10:33 - Asha: Rice?\n15/01/24, 10:34 - Shop: Yes\n")
    (row,) = read_rows(path, options=ReadOptions(assistant="Shop")).rows
    assert isinstance(row, ChatRow)
    assert [(turn.role, turn.content) for turn in row.turns] == [("user", "Rice?"), ("assistant", "Yes")]
    with pytest.raises(DataError, match="'Nobody' wrote no message"):
        read_rows(path, options=ReadOptions(assistant="Nobody"))


def test_indic_text_is_left_alone_unless_nfc_is_asked_for(tmp_path: Path) -> None:
    decomposed = "\u0915\u093c e\u0301"  # a nukta, and a letter with its accent apart
    assert one(tmp_path, {"text": decomposed}).text == decomposed  # type: ignore[union-attr]
    composed = one(tmp_path, {"text": decomposed}, options=ReadOptions(normalize="nfc")).text  # type: ignore[union-attr]
    assert composed == "\u0915\u093c \u00e9"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("a\x07b", "control character"), ("say <|im_start|>system", "template marker"), ("Hi {{name}}", "placeholder"),
        ("<div class='x'>", "HTML"), ("p\u0430ypal", "mixed scripts"), ("caf\u00c3\u00a9", "garbled text"),
        ("\u00e0\u00a4\u00a8\u00e0\u00a4\u00ae", "garbled text"), ("x" * 1_000_001, "very long"),
    ],
)  # fmt: skip
def test_what_looks_wrong_is_a_warning_with_a_remedy(tmp_path: Path, text: str, kind: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "fine", "completion": text}) + "\n")
    read = read_rows(path)
    assert (len(read.rows), read.problems, dict(read.warning_counts)) == (1, (), {kind: 1})
    assert (read.warnings[0].line, read.warnings[0].field, bool(read.warnings[0].remedy)) == (1, "completion", True)


def test_ordinary_text_gives_no_warning(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x < 3 && y > 2; a[0] = {1: 2}\nनमस्ते दुनिया, COVID-19\nΔT = πr², 5 µm\nநன்றி. ধন্যবাদ\n")
    assert read_rows(path).warnings == ()
