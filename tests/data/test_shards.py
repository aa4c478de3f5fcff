from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from charkha.data.encoded import EncodedRow
from charkha.data.shards import open_shard, write_shard
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


def test_the_writer_can_be_replaced_and_nothing_is_written_for_no_rows(tmp_path: Path) -> None:
    written: list[Path] = []
    path = write_shard(tmp_path, "eval", rows(), write=lambda target, data: written.append(target))
    assert written == [path]
    assert not path.exists()
    with pytest.raises(DataError, match="no rows"):
        write_shard(tmp_path, "train", [])
