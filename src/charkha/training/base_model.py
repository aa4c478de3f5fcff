"""From `model.base` to a local folder: the built-in model, a folder, or a fetched hub model. Never the network."""

from __future__ import annotations

import re
from pathlib import Path

from charkha.caches import hub_cache
from charkha.config import ModelSection
from charkha.errors import EnvironmentProblem
from charkha.starter.paths import model_folder

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
STARTER = "starter"


def find_base(model: ModelSection, config_folder: Path) -> Path:
    """The folder of the base model. Raises EnvironmentProblem telling where it was looked for and how to get it."""
    if model.base == STARTER:
        return model_folder()
    local = (config_folder / Path(model.base).expanduser()).resolve()
    if local.is_dir():
        return local
    if _HUB_ID.match(model.base) and not model.base.startswith((".", "/", "~")):
        return _in_hub_cache(model.base, model.revision or "main", local)
    raise EnvironmentProblem(
        "no such model folder",
        where=str(local),
        remedy="correct model.base: a folder (relative to the config file), a hub id such as "
        "Qwen/Qwen2.5-0.5B-Instruct, or `starter`",
    )


def _in_hub_cache(repo_id: str, revision: str, local: Path) -> Path:
    """The snapshot that `charkha fetch` (or any Hugging Face tool) put into the cache."""
    repo = hub_cache() / f"models--{repo_id.replace('/', '--')}"
    reference = repo / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    snapshot = repo / "snapshots" / commit
    if (snapshot / "config.json").exists():
        return snapshot
    raise EnvironmentProblem(
        f"the base model {repo_id} ({revision}) is not on this machine",
        where=str(repo),
        remedy=f"`charkha fetch {repo_id}`, or give the folder that holds it (looked for {local})",
    )
