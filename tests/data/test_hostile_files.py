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


def refused(path: Path) -> DataError:
    begun = time.process_time()
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert time.process_time() - begun < 10
    return caught.value


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv"])
def test_a_line_without_an_end_is_refused_before_it_is_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with path.open("wb") as file:
        file.write(b'{"text": "a"}\n' if name != "a.csv" else b"text,more\na,b\n")
        for _ in range(70):
            file.write(b"x" * (1 << 20))
        file.truncate(1 << 30)  # a gigabyte, most of it a hole
    error = refused(path)
    assert "longer than 64 MiB" in error.message
    assert error.where == f"{path}:{2 if name != 'a.csv' else 3}"


def test_one_row_of_over_64_mebibytes_in_an_array_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"text": "a"},\n{"text": "' + b"x" * (66 << 20) + b'"}]')
    read = read_rows(path)
    assert [row.line for row in read.rows] == [1]
    assert (read.problems[0].line, "one row of over 64 MiB" in read.problems[0].reason) == (2, True)


@pytest.mark.parametrize("name", ["bomb.jsonl.gz", "bomb.txt.zst"])
def test_a_bomb_is_left_packed(tmp_path: Path, name: str) -> None:
    import gzip

    import pyarrow

    path = tmp_path / name
    line = b" " * 4095 + b"\n"
    if name.endswith(".gz"):
        with gzip.open(path, "wb", compresslevel=1) as file:
            for _ in range(260):
                file.write(line * 256)
    else:
        with pyarrow.output_stream(str(path), compression="zstd") as stream:
            for _ in range(260):
                stream.write(line * 256)
    assert "unpacks to more than 200 times its size" in refused(path).message


@pytest.mark.parametrize("cut", [3, 10, 30])
@pytest.mark.parametrize("packing", ["gz", "zst"])
def test_a_packed_file_that_was_cut_is_told(tmp_path: Path, cut: int, packing: str) -> None:
    import gzip

    import pyarrow

    path = tmp_path / f"a.jsonl.{packing}"
    rows = "".join(json.dumps({"text": f"row {number}"}) + "\n" for number in range(500)).encode()
    packed = gzip.compress(rows) if packing == "gz" else pyarrow.compress(rows, codec="zstd", asbytes=True)
    path.write_bytes(packed[:-cut])
    assert isinstance(outcome(path), DataError)


def test_pipes_devices_and_links_that_lead_nowhere_are_named_at_once(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "dangling.jsonl").symlink_to(tmp_path / "nothing.jsonl")
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    assert "a pipe (FIFO)" in refused(tmp_path / "pipe.jsonl").message
    assert "a device" in refused(tmp_path / "zero.jsonl").message
    assert "leads nowhere" in refused(tmp_path / "dangling.jsonl").message
    assert "leads nowhere" in refused(tmp_path / "loop.jsonl").message
    (tmp_path / "real.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "real.jsonl")
    assert len(read_rows(tmp_path / "link.jsonl").rows) == 1


def test_nul_bytes_are_told_by_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good\nbad\0line\n")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n{"text": "a\0b"}\n\0\0\0\n')
    assert [problem.line for problem in read_rows(tmp_path / "a.txt").problems] == [2]
    assert [problem.line for problem in read_rows(tmp_path / "a.jsonl").problems] == [2, 3]


def test_only_ten_thousand_of_many_problems_are_kept_and_all_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n' + "{]\n" * 30_000)
    read = read_rows(path)
    assert (len(read.rows), len(read.problems), dict(read.counts)) == (1, 10_000, {"broken JSON": 30_000})
    assert "20000 more problems are counted but not listed" in read.notes


def test_blocks_cut_anywhere_give_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": f'नमस्ते {number} 👋 \\ " e{number}'} for number in range(60)]
    files = {
        "a.jsonl": "".join(json.dumps(row, ensure_ascii=number % 2 == 0) + "\n" for number, row in enumerate(rows)),
        "a.json": json.dumps(rows, indent=1, ensure_ascii=False),
        "b.json": json.dumps([*rows, 12, True, -1.5e3]),
        "a.csv": "text\r\n" + "".join('"' + row["text"].replace('"', '""') + '\r\nx"\r\n' for row in rows),
        "a.md": "\n\n".join(row["text"] for row in rows),
        "u.jsonl": "\ufeff" + "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
    }
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode("utf-16-le" if name == "u.jsonl" else "utf-8"))
    whole = {name: outcome(tmp_path / name) for name in files}
    assert all(isinstance(read, ReadFile) and len(read.rows) == 60 for read in whole.values())
    monkeypatch.setattr("charkha.data.json_arrays._BLOCK_CHARACTERS", 16)
    monkeypatch.setattr("charkha.data.json_arrays._LONGEST_TOKEN", 32)
    for size in (7, 64, 1001):
        monkeypatch.setattr("charkha.data.sources.CHUNK_BYTES", size)
        for name, read in whole.items():
            if name == "a.csv" and size < 64:
                continue  # its first chunk tells the dialect
            again = outcome(tmp_path / name)
            assert isinstance(again, ReadFile), (name, size, again)
            assert isinstance(read, ReadFile)
            assert (again.rows, again.problems) == (read.rows, read.problems), (name, size)
