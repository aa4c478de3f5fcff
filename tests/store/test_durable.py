"""What reaches the disk, and in which order."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from charkha.store import durable


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, str]]:
    """Every fsync and rename as (what, path below tmp_path), in order."""
    seen: list[tuple[str, str]] = []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def name(path: object) -> str:
        return os.path.relpath(str(path), tmp_path)

    def recorded_fsync(descriptor: int) -> None:
        seen.append(("fsync", name(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def recorded_replace(source: Path, target: Path) -> None:
        seen.append(("rename", f"{name(source)} -> {name(target)}"))
        replace(source, target)

    def recorded_rename(source: Path, target: Path) -> None:
        seen.append(("rename", f"{name(source)} -> {name(target)}"))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    monkeypatch.setattr(os, "rename", recorded_rename)
    return seen


def test_a_file_is_synced_before_it_gets_its_name_and_its_folder_after(
    tmp_path: Path, operations: list[tuple[str, str]]
) -> None:
    durable.write_durably(tmp_path / "a.json", b"new")
    assert operations == [("fsync", ".a.json.partial"), ("rename", ".a.json.partial -> a.json"), ("fsync", ".")]
    assert (tmp_path / "a.json").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    durable.write_durably(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        durable.write_durably(path, b"new")
    assert path.read_bytes() == b"old"


def test_a_tree_is_synced_with_every_file_before_its_folder(tmp_path: Path, operations: list[tuple[str, str]]) -> None:
    (tmp_path / "top" / "deep").mkdir(parents=True)
    for name in ("top/a", "top/deep/b"):
        (tmp_path / name).write_bytes(b"x")
    durable.sync_tree(tmp_path / "top")
    synced = [path for what, path in operations if what == "fsync"]
    assert set(synced) == {"top/a", "top", "top/deep/b", "top/deep"}
    assert synced.index("top/a") < synced.index("top")
    assert synced.index("top/deep/b") < synced.index("top/deep")


def test_a_rename_between_folders_syncs_both(tmp_path: Path, operations: list[tuple[str, str]]) -> None:
    for name in ("from/x", "to"):
        (tmp_path / name).mkdir(parents=True)
    durable.rename_durably(tmp_path / "from" / "x", tmp_path / "to" / "y")
    assert operations == [("rename", "from/x -> to/y"), ("fsync", "to"), ("fsync", "from")]


def test_a_rename_never_replaces_what_is_there(tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
    with pytest.raises(FileExistsError):
        durable.rename_durably(tmp_path / "x", tmp_path / "y")
    assert (tmp_path / "x").is_dir()


def test_a_folder_loses_its_name_before_its_files(
    tmp_path: Path, operations: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "file").write_bytes(b"1")
    durable.remove_folder(tmp_path / "x")
    assert operations[:2] == [("rename", "x -> .x.removed"), ("fsync", ".")]
    assert not list(tmp_path.iterdir())


def test_the_hash_is_sha256_of_all_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    assert durable.sha256_of_file(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_free_bytes_are_known_for_a_path_that_does_not_exist_yet(tmp_path: Path) -> None:
    assert durable.free_bytes(tmp_path / "a" / "b" / "c") > 0
