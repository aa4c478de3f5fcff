"""Data named on the command line or in a config: files, folders of files, and data sets of a model hub by name.

`hub:org/name` is looked for where Hugging Face tools and `charkha fetch` keep what they bring; never on the network.
`hub:org/name@revision` names a revision, `hub:org/name/data/train.jsonl` a file or folder inside.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from charkha.caches import hub_cache
from charkha.data.readers import SUFFIXES
from charkha.data.sources import files_of
from charkha.errors import DataError, EnvironmentProblem, UsageError

PREFIX = "hub:"
_NAME = re.compile(
    r"hub:(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w.-]+))?(?:/(?P<inside>.+))?"
)
_HELD_OUT = re.compile(r"(?:^|[^a-z])(?:test|valid(?:ation)?|dev|eval)(?:[^a-z]|$)")


@dataclass(frozen=True)
class HubName:
    """A data set of the hub. `inside` is the file or folder asked for, None for its training files."""

    repo_id: str
    revision: str
    inside: str | None


def parse_hub_name(text: str) -> HubName | None:
    """The parts of `hub:...`, None for anything else. Raises UsageError for a name that is none."""
    if not text.startswith(PREFIX):
        return None
    match = _NAME.fullmatch(text)
    if match is None or ".." in (match["inside"] or "").split("/"):
        raise UsageError(f"{text!r} is no name on the hub", remedy="write hub:org/name or hub:org/name/file.jsonl")
    return HubName(match["repo"], match["revision"] or "main", match["inside"])


def resolve_names(names: Sequence[str], folder: Path) -> list[Path]:
    """The files that the names mean; paths are relative to `folder`, folders stand for the data files below them.

    Raises DataError for a folder without data files, EnvironmentProblem for a data set that is not on this machine.
    """
    found: list[Path] = []
    for name in names:
        hub = parse_hub_name(name)
        if hub is not None:
            found.extend(_hub_files(hub))
        else:
            path = Path(name).expanduser()
            found.extend(files_of([path if path.is_absolute() or folder == Path.cwd() else folder / path], SUFFIXES))
    return found


def _hub_files(name: HubName) -> list[Path]:
    snapshot = _snapshot(name)
    if name.inside is not None:
        return files_of([snapshot / name.inside], SUFFIXES)
    files = [path for path in files_of([snapshot], SUFFIXES) if not _is_about(path, snapshot)]
    training = [path for path in files if not _HELD_OUT.search(str(path.relative_to(snapshot)).lower())]
    if not training:
        raise DataError(
            f"the data set {name.repo_id} holds no training files in a format that is read",
            where=str(snapshot),
            remedy=f"name one: {PREFIX}{name.repo_id}/FILE",
        )
    return training


def _is_about(path: Path, snapshot: Path) -> bool:
    """Whether a file describes the data set instead of being part of it."""
    return path.suffix.lower() == ".md" or (path.parent == snapshot and path.name == "dataset_infos.json")


def _snapshot(name: HubName) -> Path:
    repo = hub_cache() / f"datasets--{name.repo_id.replace('/', '--')}"
    reference = repo / "refs" / name.revision
    commit = reference.read_text().strip() if reference.is_file() else name.revision
    snapshot = repo / "snapshots" / commit
    if not snapshot.is_dir():
        raise EnvironmentProblem(
            f"the data set {name.repo_id} ({name.revision}) is not on this machine",
            where=str(repo),
            remedy=f"`charkha fetch {PREFIX}{name.repo_id}` brings it; training itself uses no network",
        )
    return snapshot
