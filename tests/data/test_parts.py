"""Tokens in parts: the same at any number of processes, and kept when the work is interrupted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from charkha.config_file import load_config
from charkha.data import parts as parts_module
from charkha.data.shards import Shard
from charkha.data.workers import map_ordered
from charkha.errors import CharkhaError
from charkha.training.preparing import prepare_data

Writer = Callable[..., Path]


def doubled(shared: int, task: int) -> int:
    if task == shared:
        raise ValueError("asked for")
    return task * 2


def killed(_: None, task: int) -> int:
    import os
    import signal

    if task == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return task


def test_results_come_in_order_from_any_number_of_processes() -> None:
    tasks = list(range(40))
    assert list(map_ordered(doubled, tasks, -1, 2)) == list(map_ordered(doubled, tasks, -1, 1))
    with pytest.raises(ValueError, match="asked for"):
        list(map_ordered(doubled, tasks, 30, 2))


def test_a_process_that_is_killed_is_an_error_and_no_hang() -> None:
    with pytest.raises(CharkhaError, match="died"):
        list(map_ordered(killed, range(40), None, 2))


@pytest.fixture
def project(tmp_path: Path, write_model: Writer, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_model(tmp_path / "model")
    pairs = [(f"q {n}", f"a {n}" * (n % 9 + 1)) for n in range(1500)]
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in pairs]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(100)))
    (tmp_path / "charkha.yaml").write_text(
        "model: {base: model}\ndata: {train: [a.jsonl, {path: b.jsonl, weight: 2}], eval: 10%, template: chatml}\n"
        "output: run\n"
    )
    monkeypatch.setattr("charkha.data.sources.CHUNK_BYTES", 20_000)
    monkeypatch.setattr(parts_module, "BLOCKS_A_PART", 3)
    return tmp_path


def prepared(project: Path, folder: str, processes: int = 1) -> tuple[Shard, Shard | None, tuple[str, ...]]:
    loaded = load_config(project / "charkha.yaml", overrides=[f"data.num_proc={processes}"])
    data = prepare_data(loaded, project / "model", project / folder, 512, None)
    return data.train, data.eval, data.notes


def test_shards_are_the_same_bytes_at_any_number_of_processes(project: Path) -> None:
    one, two = prepared(project, "one"), prepared(project, "two", processes=2)
    assert one[0].path.name == two[0].path.name
    assert one[1] is not None
    assert two[1] is not None
    assert one[1].path.name == two[1].path.name
    assert sorted(path.name for path in (project / "one").iterdir()) == sorted([one[0].path.name, one[1].path.name])
    held_out_texts = sum(length < 12 for length in one[1].lengths)  # each stood twice in an epoch, had it stayed
    assert one[1].rows == 160
    assert one[0].rows == 1500 + 2 * 100 - 160 - held_out_texts
    assert any("weight 2" in note for note in one[2])


def test_an_interrupted_preparation_keeps_the_parts_that_are_whole(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepared(project, "whole")[0].path.name
    made: list[int] = []
    keep = parts_module._keep_part

    def counted(folder: Path, number: int, part: parts_module.EncodedPart) -> parts_module.EncodedPart:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(number)
        return keep(folder, number, part)

    monkeypatch.setattr(parts_module, "_keep_part", counted)
    with pytest.raises(KeyboardInterrupt):
        prepared(project, "again")
    (folder,) = (project / "again").iterdir()
    damaged = next(folder.glob("part-000001-train-*"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    monkeypatch.setattr(parts_module, "_keep_part", lambda *args: made.append(args[1]) or keep(*args))
    assert prepared(project, "again")[0].path.name == whole
    assert made[:2] == [0, 1]
    assert 0 not in made[2:]  # whole, so not made again
    assert made[2] == 1  # cut, so made again
    assert not folder.exists()
