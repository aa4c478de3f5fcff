from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from charkha.data.encoded import EncodedRow
from charkha.data.shards import open_shard, token_rows, write_shard, write_token_rows
from charkha.errors import DataError, RunDamaged


def rows(count: int = 3) -> list[EncodedRow]:
    return [
        EncodedRow(
            np.arange(length, dtype=np.int32), np.arange(length) % 2 == 0, None if length == 1 else length, ends=True
        )
        for length in range(1, count + 1)
    ]


def test_what_was_written_is_read_row_by_row(tmp_path: Path) -> None:
    shard = open_shard(write_shard(tmp_path / "data", "train", rows()))
    assert (shard.rows, list(shard.lengths), list(shard.lines)) == (3, [1, 2, 3], [0, 2, 3])
    assert shard.trained_tokens == 4
    for index, row in enumerate(rows()):
        assert np.array_equal(shard.input_ids(index), row.input_ids)
        assert np.array_equal(shard.trained(index), row.trained)
    assert (shard.input_ids(0).dtype, shard.trained(0).dtype) == (np.int32, np.bool_)


def test_the_name_follows_the_content(tmp_path: Path) -> None:
    first = write_shard(tmp_path, "train", rows())
    assert write_shard(tmp_path / "again", "train", rows()).name == first.name
    assert write_shard(tmp_path, "train", rows(4)).name != first.name
    assert open_shard(first).content_hash in first.name
    assert [path.suffix for path in tmp_path.glob("*.*")] == [".safetensors"] * 2


def test_a_cut_or_altered_or_missing_shard_is_damaged(tmp_path: Path) -> None:
    path = write_shard(tmp_path, "train", rows())
    data = path.read_bytes()
    for wrong in (data[:-1], data[:-1] + bytes([data[-1] ^ 1]), b""):
        path.write_bytes(wrong)
        with pytest.raises(RunDamaged, match="does not match the hash"):
            open_shard(path)
    path.unlink()
    with pytest.raises(RunDamaged, match="missing"):
        open_shard(path)
    with pytest.raises(RunDamaged, match="holds no hash"):
        open_shard(tmp_path / "train.safetensors")


def test_a_shard_is_the_file_that_the_library_would_write_in_however_many_parts(tmp_path: Path) -> None:
    every = rows()
    whole = write_shard(tmp_path, "train", every)
    arrays = {
        "input_ids": np.concatenate([row.input_ids for row in every]).astype(np.int32),
        "trained": np.concatenate([row.trained for row in every]).astype(np.uint8),
        "offsets": np.cumsum([0, *map(len, every)]).astype(np.int64),
        "line": np.asarray([row.line or 0 for row in every], dtype=np.int32),
    }
    assert whole.read_bytes() == save(arrays)
    parts = [token_rows(every[:1]), token_rows([]), token_rows(every[1:])]
    assert write_token_rows(tmp_path / "parts", "train", parts).name == whole.name
    assert sorted(path.name for path in tmp_path.glob("*")) == sorted(["parts", whole.name])


def test_nothing_is_written_for_no_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no rows"):
        write_shard(tmp_path, "train", [])
