"""The data sources of a run as the config names them: files, folders, names on the hub, each with a weight."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from charkha.config import Config, DataSource
from charkha.data.formats import ReadOptions
from charkha.data.hub_names import resolve_names


@dataclass(frozen=True)
class Source:
    """One file of `data.train`. `weight` says how often its rows stand in an epoch."""

    path: Path
    weight: float
    map: dict[str, str]


def sources_of(config: Config, folder: Path) -> list[Source]:
    """Every training file, folders and names of the hub opened up; all files of an entry share its weight.

    Raises DataError and EnvironmentProblem for what is not there.
    """
    found: list[Source] = []
    for entry in config.data.train:
        source = DataSource(path=entry) if isinstance(entry, str) else entry
        for path in resolve_names([source.path], folder):
            found.append(Source(path.absolute(), source.weight, source.map))
    return found


def options_of(config: Config, source: Source | None) -> ReadOptions:
    """How a source is read; None for a file that is no training source."""
    data = config.data
    mapping = {**data.map, **({} if source is None else source.map)}
    return ReadOptions(data.format, mapping, data.assistant, data.normalize)
