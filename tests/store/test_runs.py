"""The run folder: one writer at a time, and records that survive a cut."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from charkha.errors import RunDamaged, RunFolderError, RunInUse
from charkha.store import durable
from charkha.store.runs import RunFolder

HOLDER = """
import sys, time
from pathlib import Path
from charkha.store.runs import RunFolder
with RunFolder(Path(sys.argv[1])).lock():
    print("locked", flush=True)
    time.sleep(60)
"""


def hold(path: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"locked\n"
    process.stdout.close()
    return process


def test_looking_at_a_run_touches_nothing(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    assert not run.exists
    assert run.events() == []
    assert not run.path.exists()


def test_a_second_process_is_refused_with_the_first_ones_number_and_a_dead_ones_lock_is_gone(tmp_path: Path) -> None:
    holder = hold(tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    try:
        with pytest.raises(RunInUse, match=f"process {holder.pid} ") as caught, run.lock():
            pytest.fail("two processes hold the lock")
        assert caught.value.exit_code == 6
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    with run.lock():
        assert (run.path / ".lock").read_text() == str(os.getpid())


def test_the_lock_is_gone_after_an_error_inside(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    with pytest.raises(ValueError, match="inside"), run.lock():
        raise ValueError("inside")
    with run.lock():
        pass


def test_a_shorter_process_number_replaces_a_longer_one_whole(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    (run.path / ".lock").write_text("99999999999")
    with run.lock():
        assert (run.path / ".lock").read_text() == str(os.getpid())


def test_a_folder_without_a_run_is_refused_with_the_runs_beside_it(tmp_path: Path) -> None:
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "charkha.yaml").write_text("")
    with pytest.raises(RunFolderError) as caught:
        RunFolder(tmp_path / "godo").require()
    assert "good" in (caught.value.remedy or "")
    assert caught.value.exit_code == 6


def test_events_come_back_as_they_were_written(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    written = [run.append("step", step=1, loss=2.0), run.append("note", text="नमस्ते")]
    assert run.events() == written


@pytest.mark.parametrize(
    "tail", [b'{"event": "step", "st', b"\0" * 20, b"{", '{"event": "note", "text": "न'.encode()[:-1]]
)
def test_a_last_line_cut_short_loses_only_itself(tmp_path: Path, tail: bytes) -> None:
    run = RunFolder(tmp_path)
    run.append("step", step=1)
    with run.events_path.open("ab") as file:
        file.write(tail)
    assert [event["step"] for event in run.events()] == [1]
    run.append("step", step=2)
    assert [event["step"] for event in run.events()] == [1, 2]


def test_events_are_only_ever_appended(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.append("step", step=1)
    before = run.events_path.read_bytes()
    run.append("resume", from_step=0)
    assert run.events_path.read_bytes().startswith(before)
    assert [event["event"] for event in run.events()] == ["resume"]


def test_syncing_events_reaches_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(tmp_path)
    run.sync_events()  # nothing to do yet
    run.append("step", step=1)
    synced: list[Path] = []
    monkeypatch.setattr(durable, "sync_file", synced.append)
    run.sync_events()
    assert synced == [run.events_path]


def test_a_broken_manifest_is_told_and_a_whole_one_comes_back(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with pytest.raises(RunDamaged, match=r"manifest\.json"):
        run.read_manifest()
    for content in ('{"data": ', "[]", "null", "{}", '{"data": {}, "base": []}'):
        run.manifest_path.write_text(content)
        with pytest.raises(RunDamaged, match=r"manifest\.json") as caught:
            run.read_manifest()
        assert caught.value.exit_code == 6
    whole = {"data": {"name": "हाँ"}, "base": {}}
    run.write_json(run.manifest_path, whole)
    assert run.read_manifest() == whole
    assert json.loads(run.manifest_path.read_text(encoding="utf-8")) == whole
