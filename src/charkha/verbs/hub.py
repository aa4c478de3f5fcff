"""A model hub as a list of files with sizes and hashes, and bytes that come in pieces.

Downloads are plain HTTP with `Range`, because huggingface_hub's own downloader drops a partial file when its process
ends: on a line that breaks, a 5 GB shard would begin again from its first byte. Its client, errors, token and listing
are used. Not covered: transfer through Xet, which needs a second service; every file has a plain address, too.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from charkha.errors import EnvironmentProblem, UsageError
from charkha.units import format_bytes

Progress = Callable[[str, int, int], None]
RepoKind = Literal["model", "dataset"]

_PIECE_BYTES = 1 << 20
_READ_TIMEOUT_SECONDS = 30
_FAILURES_WITHOUT_A_BYTE = 5
_SMALL_FILE_BYTES = 64 << 20
_TRUE = {"1", "ON", "YES", "TRUE"}
_RUN_AGAIN = "run the same command again when the connection is back; it goes on where it stopped"
_CHECK_ENDPOINT = "check HF_ENDPOINT: it must name a hub that speaks the Hugging Face API, or be unset"


class HubInterrupted(EnvironmentProblem):
    """A failure that passes by itself: no answer, a broken connection, a server that is busy."""


@dataclass(frozen=True)
class HubFile:
    """One file of a repository. `digest` is the sha256 of a large file (LFS), else the git blob id (sha1)."""

    name: str
    size: int
    digest: str
    large: bool


@dataclass(frozen=True)
class Listing:
    """A repository at one commit: `revision` is what was asked for, `commit` what it meant at that moment."""

    repo_id: str
    revision: str
    commit: str
    files: tuple[HubFile, ...]
    kind: RepoKind = "model"

    def file(self, name: str) -> HubFile | None:
        """The file of that name, None where the repository has none."""
        return next((file for file in self.files if file.name == name), None)


class Hub:
    """The hub that `HF_ENDPOINT` names (huggingface.co unless set), with the token of `HF_TOKEN` or `hf auth login`."""

    def __init__(self, sleep: Callable[[float], None] = time.sleep) -> None:
        refuse_offline()
        from huggingface_hub import constants, get_token

        self.endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT).rstrip("/")
        self._token = get_token()
        self._sleep = sleep

    def list_files(self, repo_id: str, revision: str, kind: RepoKind = "model") -> Listing:
        """The files of `repo_id`, with the commit that `revision` (branch, tag or commit) stands for now."""
        from huggingface_hub import HfApi

        api = HfApi(endpoint=self.endpoint, token=self._token)
        with self._explained(repo_id, revision):
            ask = api.model_info if kind == "model" else api.dataset_info
            info = ask(repo_id, revision=revision, files_metadata=True, timeout=_READ_TIMEOUT_SECONDS)
        if not re.fullmatch(r"[0-9a-f]{40}", str(info.sha)):
            raise EnvironmentProblem("the hub names no commit", where=self.endpoint, remedy=_CHECK_ENDPOINT)
        files = tuple(_hub_file(sibling, self.endpoint) for sibling in info.siblings or [])
        return Listing(repo_id, revision, str(info.sha), files, kind)

    def read(self, listing: Listing, file: HubFile) -> bytes:
        """The bytes of a small file, unverified; raises EnvironmentProblem for one above 64 MiB."""
        from huggingface_hub.utils import get_session, hf_raise_for_status

        if file.size > _SMALL_FILE_BYTES:
            raise EnvironmentProblem(
                f"{file.name} is {format_bytes(file.size)}, too large for a file of settings", where=listing.repo_id
            )
        with self._explained(listing.repo_id, listing.revision):
            response = get_session().get(
                self._address(listing, file), headers=self._headers(), timeout=_READ_TIMEOUT_SECONDS
            )
            hf_raise_for_status(response)
        return bytes(response.content)

    def download(self, listing: Listing, file: HubFile, part: Path, progress: Progress) -> None:
        """Completes `part`, going on from the bytes it holds. Raises EnvironmentProblem once nothing more comes.

        Tries again as long as bytes arrive; five failures without one are the end. What arrived stays for next time.
        """
        failures = 0
        problem: EnvironmentProblem
        while _size(part) != file.size:
            before = _size(part)
            try:
                with self._explained(listing.repo_id, listing.revision):
                    self._append(listing, file, part, progress)
                problem = HubInterrupted(f"{file.name} ended early", where=self.endpoint, remedy=_RUN_AGAIN)
            except HubInterrupted as error:
                problem = error
            failures = 0 if _size(part) > before else failures + 1
            if failures == _FAILURES_WITHOUT_A_BYTE:
                raise problem
            if _size(part) != file.size:
                self._sleep(2.0**failures)

    def _append(self, listing: Listing, file: HubFile, part: Path, progress: Progress) -> None:
        """One request for what `part` lacks; a server that ignores `Range` makes it begin again."""
        from huggingface_hub.utils import get_session, hf_raise_for_status

        held = _size(part)
        if held > file.size:
            part.unlink()
            held = 0
        headers = self._headers() | ({"Range": f"bytes={held}-"} if held else {})
        address = self._address(listing, file)
        with get_session().stream("GET", address, headers=headers, timeout=_READ_TIMEOUT_SECONDS) as response:
            if response.status_code >= 400:
                response.read()
                hf_raise_for_status(response)
            if response.status_code != 206:
                held = 0
            with part.open("ab" if held else "wb") as out:
                for piece in response.iter_raw(_PIECE_BYTES):
                    out.write(piece)
                    held += len(piece)
                    progress(file.name, held, file.size)

    def _address(self, listing: Listing, file: HubFile) -> str:
        place = listing.repo_id if listing.kind == "model" else f"datasets/{listing.repo_id}"
        return f"{self.endpoint}/{place}/resolve/{listing.commit}/{quote(file.name)}"

    def _headers(self) -> dict[str, str]:
        """Identity encoding, so that sizes and ranges count the file's own bytes."""
        from huggingface_hub.utils import build_hf_headers

        return {**build_hf_headers(token=self._token or False), "Accept-Encoding": "identity"}

    @contextmanager
    def _explained(self, repo_id: str, revision: str) -> Iterator[None]:
        """Turns what huggingface_hub and its HTTP client raise into problems with a remedy."""
        import httpx2
        from huggingface_hub import errors

        page = f"{self.endpoint}/{repo_id}"
        try:
            yield
        except errors.HFValidationError as error:
            raise UsageError(f"{repo_id!r} is no model id: {error}", remedy="write author/name") from error
        except errors.OfflineModeIsEnabled as error:
            raise _offline("HF_HUB_OFFLINE") from error
        except errors.GatedRepoError as error:
            raise self._gated(page) from error
        except errors.RepositoryNotFoundError as error:
            raise self._not_found(page) from error
        except errors.RevisionNotFoundError as error:
            raise EnvironmentProblem(
                f"the model has no branch, tag or commit {revision!r}", where=page, remedy=f"see {page}/tree/main"
            ) from error
        except errors.HfHubHTTPError as error:
            raise self._refused(page, error.response.status_code) from error
        except httpx2.TransportError as error:
            raise HubInterrupted(
                f"the hub does not answer: {error or type(error).__name__}", where=self.endpoint, remedy=_RUN_AGAIN
            ) from error

    def _gated(self, page: str) -> EnvironmentProblem:
        if self._token:
            message = "the model is gated and your token has no access to it yet"
            remedy = f"accept its licence at {page} with the account of the token, then run the same command again"
        else:
            message = "the model is gated: its authors ask you to accept their licence first"
            remedy = (
                f"accept it at {page}, make a token with read access at {self.endpoint}/settings/tokens,"
                " and set it: export HF_TOKEN=hf_..."
            )
        return EnvironmentProblem(message, where=page, remedy=remedy)

    def _not_found(self, page: str) -> EnvironmentProblem:
        hidden = "" if self._token else "; for a private model also set HF_TOKEN"
        return EnvironmentProblem(
            "the hub has no such model, or hides it from you", where=page, remedy=f"check the name{hidden}"
        )

    def _refused(self, page: str, status: int) -> EnvironmentProblem:
        if status in (408, 429) or status >= 500:
            return HubInterrupted(f"the hub is busy or broken (HTTP {status})", where=page, remedy=_RUN_AGAIN)
        if status in (401, 403):
            return EnvironmentProblem(
                f"the hub refuses access (HTTP {status})",
                where=page,
                remedy="check that HF_TOKEN is valid and may read this model",
            )
        return EnvironmentProblem(f"the hub answers HTTP {status}", where=page, remedy=_CHECK_ENDPOINT)


def refuse_offline() -> None:
    """Raises EnvironmentProblem when the environment forbids the network, before anything is imported or asked."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").upper() in _TRUE:
            raise _offline(name)


def _offline(variable: str) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"{variable} is set, so nothing may be fetched",
        remedy=f"unset {variable} for this command, or bring the model's folder and name it in `model.base`",
    )


def _hub_file(sibling: Any, endpoint: str) -> HubFile:
    """Raises EnvironmentProblem for an entry without size or hash: it could be neither planned for nor verified."""
    digest = str(sibling.lfs.sha256 if sibling.lfs else sibling.blob_id)
    if sibling.size is None or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", digest):
        raise EnvironmentProblem(
            f"the hub lists {sibling.rfilename} without size or hash", where=endpoint, remedy=_CHECK_ENDPOINT
        )
    return HubFile(str(sibling.rfilename), int(sibling.size), digest, large=sibling.lfs is not None)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
