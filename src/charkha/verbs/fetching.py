"""Brings a base model to this machine, into the Hugging Face cache, where every tool of that family finds it.

The layout is the cache's own: bytes in `blobs/` under their hash, `snapshots/COMMIT/` pointing at them, the commit of a
branch in `refs/`. A snapshot appears only when all its files are here and verified, so a model that can be seen is
complete.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from charkha.caches import hub_cache
from charkha.data.hub_names import parse_hub_name
from charkha.data.readers import SUFFIXES
from charkha.errors import DoesNotFit, EnvironmentProblem, UsageError
from charkha.plan.base_checks import check_base_config
from charkha.store import durable
from charkha.units import format_bytes
from charkha.verbs.hub import Hub, HubFile, Listing, Progress, refuse_offline

# What must stay free: a full disk harms more than this command.
RESERVE_BYTES = 2 << 30

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"[\w.-]+\.safetensors")
# Settings, tokenizer, templates and licence; everything else stays where it is, above all code and pickles.
_SIDE_FILES = re.compile(
    r"config\.json|generation_config\.json|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json"
    r"|added_tokens\.json|vocab\.(json|txt)|merges\.txt|(tokenizer|spiece|sentencepiece)[\w.]*\.model"
    r"|chat_template\.(jinja|json)|additional_chat_templates/[\w-]+\.jinja"
    r"|(LICEN[CS]E|NOTICE|USE_POLICY|README)(\.(md|txt))?"
)
_DIGEST_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class FetchedModel:
    """A model that is here, complete and verified. `bytes` counts all `files`; `path` is the folder to load from."""

    repo_id: str
    revision_sha: str
    path: Path
    files: tuple[str, ...]
    bytes: int


def fetch_model(
    repo_id: str,
    *,
    revision: str | None = None,
    free_bytes: Callable[[Path], int] = durable.free_bytes,
    progress: Progress = lambda name, done, total: None,
    sleep: Callable[[float], None] = time.sleep,
) -> FetchedModel:
    """Fetches what is missing of the model, verifies everything, and returns where it is.

    `progress(name, done_bytes, total_bytes)` is called for each piece received and, with `verifying NAME`, for each
    piece read back. Raises DoesNotFit when the disk is too small, before any weight is transferred; EnvironmentProblem
    for a model or a hub that cannot be used; UsageError for what is no model id.
    """
    revision = revision or "main"
    _check_names(repo_id, revision)
    refuse_offline()
    hub = Hub(sleep)
    listing = hub.list_files(repo_id, revision)
    return _fetched(hub, listing, _choose_files(hub, listing), free_bytes, progress)


def fetch_data_set(
    name: str,
    *,
    revision: str | None = None,
    free_bytes: Callable[[Path], int] = durable.free_bytes,
    progress: Progress = lambda name, done, total: None,
    sleep: Callable[[float], None] = time.sleep,
) -> FetchedModel:
    """Fetches the files of a data set (`hub:author/name`) that can be read, as `fetch_model` does a model's.

    Raises as `fetch_model`, and EnvironmentProblem for a data set without a file of a known kind.
    """
    hub_name = parse_hub_name(name)
    if hub_name is None:
        raise UsageError(f"{name!r} is no data set of a hub", remedy="write hub:author/name")
    revision = revision or hub_name.revision
    _check_names(hub_name.repo_id, revision)
    refuse_offline()
    hub = Hub(sleep)
    listing = hub.list_files(hub_name.repo_id, revision, "dataset")
    wanted = [file for file in listing.files if _is_data(file.name, hub_name.inside)]
    if not wanted:
        kinds = ", ".join(SUFFIXES)
        raise EnvironmentProblem(
            f"the data set has no files that are read ({kinds})",
            where=f"{hub.endpoint}/datasets/{listing.repo_id}",
            remedy="take another data set or --revision; many have Parquet files under refs/convert/parquet",
        )
    return _fetched(hub, listing, tuple(wanted), free_bytes, progress)


def _is_data(name: str, inside: str | None) -> bool:
    path = PurePosixPath(name)
    kinds = path.suffixes[-2:]
    if inside is not None and name != inside and not name.startswith(inside.rstrip("/") + "/"):
        return False
    return any(kind.lower() in SUFFIXES for kind in kinds) or path.name.startswith(("README", "LICENSE"))


def _fetched(
    hub: Hub,
    listing: Listing,
    files: tuple[HubFile, ...],
    free_bytes: Callable[[Path], int],
    progress: Progress,
) -> FetchedModel:
    repo = hub_cache() / f"{listing.kind}s--{listing.repo_id.replace('/', '--')}"
    with _only_here(repo), _disk_errors(repo):
        snapshot = repo / "snapshots" / listing.commit
        missing = [file for file in files if not _is_here(file, repo, snapshot, progress)]
        _check_disk(repo, missing, free_bytes)
        for file in missing:
            _bring(hub, listing, file, repo, progress)
        _show_snapshot(repo, snapshot, files)
        _record_commit(repo, listing)
    total_bytes = sum(file.size for file in files)
    return FetchedModel(listing.repo_id, listing.commit, snapshot, tuple(file.name for file in files), total_bytes)


def _check_names(repo_id: str, revision: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", repo_id, re.ASCII):
        raise UsageError(
            f"{repo_id!r} is no model id of a hub",
            remedy="write author/name, such as Qwen/Qwen2.5-0.5B-Instruct; a local folder needs no fetching",
        )
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", revision, re.ASCII) or ".." in revision:
        raise UsageError(f"{revision!r} is no revision", remedy="write a branch, a tag or a commit")


def _choose_files(hub: Hub, listing: Listing) -> tuple[HubFile, ...]:
    """Weights first, config.json last. Everything that speaks against the model is raised here, before weights move."""
    where = f"{hub.endpoint}/{listing.repo_id}"
    _refuse_without_safetensors(listing, where)
    config_file = listing.file("config.json")
    if config_file is None:
        raise EnvironmentProblem("the model has no config.json", where=where, remedy=_TAKE_TRANSFORMERS_LAYOUT)
    check_base_config(_read_json(hub, listing, config_file, where), where)
    weights = _weights(hub, listing, where)
    side = [file for file in listing.files if _SIDE_FILES.fullmatch(file.name) and file != config_file]
    return (*weights, *side, config_file)


_TAKE_TRANSFORMERS_LAYOUT = "take a model in the Hugging Face transformers layout with safetensors weights"


def _refuse_without_safetensors(listing: Listing, where: str) -> None:
    names = {file.name for file in listing.files}
    if _WEIGHTS in names or _INDEX in names:
        return
    if "adapter_model.safetensors" in names or "adapter_config.json" in names:
        raise EnvironmentProblem(
            "this is an adapter, not a base model",
            where=where,
            remedy="fetch the base that its adapter_config.json names",
        )
    pickles = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl")))
    if pickles:
        raise EnvironmentProblem(
            f"the weights are pickles ({pickles[0]}), which can run code when read; charkha reads safetensors only",
            where=where,
            remedy="take a copy with safetensors: many models have one under `refs/pr/N` (see the discussions of the"
            " model page; then --revision refs/pr/N), or ask its authors",
        )
    if any(name.endswith(".gguf") for name in names):
        raise EnvironmentProblem(
            "the weights are GGUF, made for inference",
            where=where,
            remedy="fetch the original that it was converted from",
        )
    raise EnvironmentProblem(f"the model has no {_WEIGHTS}", where=where, remedy=_TAKE_TRANSFORMERS_LAYOUT)


def _weights(hub: Hub, listing: Listing, where: str) -> tuple[HubFile, ...]:
    """The one weights file, or the shards that the index names and the index; a second copy of them is left out."""
    whole, index_file = listing.file(_WEIGHTS), listing.file(_INDEX)
    if whole is not None or index_file is None:
        return (whole,) if whole else ()
    weight_map = _read_json(hub, listing, index_file, where).get("weight_map")
    names = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
    shards = [listing.file(name) for name in names if _SHARD.fullmatch(name)]
    found = tuple(shard for shard in shards if shard is not None)
    if not names or len(found) != len(names):
        raise EnvironmentProblem(
            f"{_INDEX} names {len(names)} weight files, the model has {len(found)} of them",
            where=where,
            remedy="try another --revision, or ask its authors",
        )
    return (*found, index_file)


def _read_json(hub: Hub, listing: Listing, file: HubFile, where: str) -> dict[str, Any]:
    try:
        value = json.loads(hub.read(listing, file))
    except (ValueError, RecursionError) as error:
        raise EnvironmentProblem(f"{file.name} is no JSON: {error}", where=where, remedy="try again later") from error
    if not isinstance(value, dict):
        raise EnvironmentProblem(f"{file.name} holds no JSON object", where=where, remedy=_TAKE_TRANSFORMERS_LAYOUT)
    return value


def _blob(repo: Path, file: HubFile) -> Path:
    return repo / "blobs" / file.digest


def _part(repo: Path, file: HubFile) -> Path:
    return repo / "blobs" / f"{file.digest}.part"


def _is_here(file: HubFile, repo: Path, snapshot: Path, progress: Progress) -> bool:
    """Whether the file is in the cache, whole; a damaged copy (after a power cut, say) is removed."""
    for path in (_blob(repo, file), snapshot / file.name):
        if path.is_file():
            if path.stat().st_size == file.size and _digest(path, file, progress) == file.digest:
                return True
            path.unlink()
    return False


def _check_disk(repo: Path, missing: list[HubFile], free_bytes: Callable[[Path], int]) -> None:
    parts = [_part(repo, file) for file in missing]
    held = sum(part.stat().st_size for part in parts if part.exists())
    needed = sum(file.size for file in missing) - held
    free = free_bytes(repo)
    if needed > 0 and needed + RESERVE_BYTES > free:
        raise DoesNotFit(
            f"the download needs {format_bytes(needed)} and {format_bytes(RESERVE_BYTES)} must stay free;"
            f" the disk has {format_bytes(free)}",
            where=str(repo),
            remedy=f"free {format_bytes(needed + RESERVE_BYTES - free)}, or set HF_HOME to a folder on a larger disk",
        )


def _bring(hub: Hub, listing: Listing, file: HubFile, repo: Path, progress: Progress) -> None:
    """Downloads one file into `blobs/`, verified. Raises EnvironmentProblem when the bytes are not the listed ones."""
    part = _part(repo, file)
    part.parent.mkdir(parents=True, exist_ok=True)
    part.touch()
    hub.download(listing, file, part, progress)
    digest = _digest(part, file, progress)
    if digest != file.digest:
        part.unlink()
        raise EnvironmentProblem(
            f"{file.name} arrived damaged: its hash is {digest}, listed is {file.digest}",
            where=f"{hub.endpoint}/{listing.repo_id}",
            remedy="run the same command again; should it fail twice, a proxy or mirror (HF_ENDPOINT) changes the file",
        )
    durable.sync_file(part)
    os.replace(part, _blob(repo, file))
    durable.sync_folder(part.parent)


def _digest(path: Path, file: HubFile, progress: Progress) -> str:
    """The hash by which the hub lists the file: sha256 of a large one, git's blob hash of a small one."""
    digest = hashlib.sha256() if file.large else hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    done = 0
    with path.open("rb") as source:
        while chunk := source.read(_DIGEST_CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            progress(f"verifying {file.name}", done, file.size)
    return digest.hexdigest()


def _show_snapshot(repo: Path, snapshot: Path, files: tuple[HubFile, ...]) -> None:
    """Points the snapshot's names at the blobs, config.json last; on a disk without links the blob itself moves."""
    for file in files:
        pointer, blob = snapshot / file.name, _blob(repo, file)
        if not blob.is_file():
            continue  # an earlier fetch moved it into the snapshot
        pointer.parent.mkdir(parents=True, exist_ok=True)
        pointer.unlink(missing_ok=True)
        try:
            pointer.symlink_to(os.path.relpath(blob, pointer.parent))
        except OSError:
            os.replace(blob, pointer)
        durable.sync_folder(pointer.parent)


def _record_commit(repo: Path, listing: Listing) -> None:
    """Writes what the branch or tag stood for, so that training offline takes this commit."""
    if listing.revision == listing.commit:
        return
    reference = repo / "refs" / listing.revision
    reference.parent.mkdir(parents=True, exist_ok=True)
    durable.write_durably(reference, listing.commit.encode())


@contextmanager
def _only_here(repo: Path) -> Iterator[None]:
    """Exclusive use of the model's cache folder among fetches; a dead process's lock is gone by itself (flock)."""
    with _disk_errors(repo):
        repo.mkdir(parents=True, exist_ok=True)
        lock = (repo / ".charkha-fetch.lock").open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EnvironmentProblem(
                "another process is fetching this model", where=str(repo), remedy="wait until it is done"
            ) from None
        yield


@contextmanager
def _disk_errors(repo: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DoesNotFit(
                "the disk is full; what arrived is kept",
                where=str(repo),
                remedy="free some space, or set HF_HOME to a folder on a larger disk, and run the same command again",
            ) from error
        if isinstance(error, PermissionError) or error.errno == errno.EROFS:
            raise EnvironmentProblem(
                f"the folder cannot be written: {error.strerror}",
                where=str(error.filename or repo),
                remedy="set HF_HOME to a folder of your own",
            ) from error
        raise
