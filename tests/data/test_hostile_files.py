"""Files that were cut, altered or made to hurt end in rows, problems or one DataError: never in another exception."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest

from charkha.data.formats import ReadFile, read_rows
from charkha.errors import DataError

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "बी"}]
SEEDS = {
    "a.jsonl": "".join(json.dumps({"messages": TURNS}, ensure_ascii=False) + "\n" for _ in range(3)),
    "a.json": json.dumps([{"instruction": "a", "input": "", "output": "b"}] * 3, indent=1),
    "b.jsonl": "".join(json.dumps({"conversations": [{"from": "human", "value": "a"}]}) + "\n" for _ in range(3)),
    "a.csv": 'prompt,completion\n"a, ""b""\n",c\nd,e\n',
    "a.tsv": "text\tother\na\tb\n",
    "a.txt": "a\nb\n\n",
    "a.md": "# a\n\nb\n",
}


def outcome(path: Path) -> ReadFile | DataError:
    try:
        return read_rows(path)
    except DataError as error:
        return error


def altered(data: bytes, random_: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(random_.randint(1, 6)):
        place = random_.randrange(len(changed) + 1)
        kind = random_.randrange(4)
        if kind == 0:
            changed[place:place] = bytes([random_.randrange(256)])
        elif kind == 1:
            del changed[place : place + random_.randint(1, 5)]
        elif kind == 2:
            changed[place:place] = random_.choice(
                [b'"', b"[", b"{", b"null", b"\\u", b"\r", b"\0", b"1e999", b"\xff\xfe"]
            )
        else:
            changed[place:place] = changed[: random_.randint(0, 20)]
    return bytes(changed)


@pytest.mark.parametrize("name", SEEDS)
def test_altered_files_never_surprise(tmp_path: Path, name: str) -> None:
    random_ = random.Random(name)
    for _ in range(400):
        path = tmp_path / name
        path.write_bytes(altered(SEEDS[name].encode(), random_))
        read = outcome(path)
        assert isinstance(read, DataError) or read.rows or read.problems


@pytest.mark.parametrize(
    "value", [None, True, 3, 1.5, "", "x", [], [1], [[]], [None], {}, {"role": 1}, [{"role": None}]]
)
@pytest.mark.parametrize("column", ["messages", "conversations", "prompt", "text", "instruction", "history", "images"])
def test_any_json_value_in_any_column_is_a_row_a_problem_or_a_refusal(
    tmp_path: Path, column: str, value: object
) -> None:
    base = {"instruction": "a", "output": "b"} if column in ("instruction", "history") else {}
    base |= {"completion": "b"} if column == "prompt" else {}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({**base, column: value}) + "\n")
    read = outcome(path)
    assert isinstance(read, DataError) or len(read.rows) + len(read.problems) == 1


def test_cut_parquet_files_are_refused(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"]}), path)
    data = path.read_bytes()
    for length in range(4, len(data), 17):
        path.write_bytes(data[:length])
        with pytest.raises(DataError):
            read_rows(path)


def test_two_million_empty_lines_and_a_long_one_take_seconds(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n" * 2_000_000 + json.dumps({"text": "x" * 5_000_000}))
    begun = time.monotonic()
    assert read_rows(path).rows[0].line == 2_000_001
    assert time.monotonic() - begun < 20
