"""A model hub on loopback: the part of the Hugging Face API that fetching uses, with faults on request."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_LARGE = (".safetensors", ".bin", ".gguf", "tokenizer.json")


@dataclass
class Repo:
    files: dict[str, bytes]
    gated: bool = False
    private: bool = False


@dataclass
class LoopbackHub:
    """`requests` logs (method, path, Range). `cuts[name]` holds after how many bytes each next answer breaks off."""

    repos: dict[str, Repo] = field(default_factory=dict)
    token: str | None = None
    ignores_range: bool = False
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    user_agents: set[str] = field(default_factory=set)
    cuts: dict[str, list[int]] = field(default_factory=dict)
    statuses: dict[str, list[int]] = field(default_factory=dict)

    def __enter__(self) -> LoopbackHub:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def ranges(self, name: str) -> list[str | None]:
        """The Range header of each request for the file."""
        return [asked for _, path, asked in self.requests if path.endswith(f"/{name}")]


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(self.path.split("?")[0])
        self.hub.requests.append(("GET", path, self.headers.get("Range")))
        self.hub.user_agents.add(self.headers.get("User-Agent", ""))
        if match := re.fullmatch(r"/api/(?:models|datasets)/(.+?)/revision/(.+)", path):
            self._answer_listing(match[1], match[2])
        elif match := re.fullmatch(r"/(?:datasets/)?(.+?)/resolve/([^/]+)/(.+)", path):
            self._answer_file(match[1], match[2], match[3])
        else:
            self._refuse(404, None)

    def _answer_listing(self, repo_id: str, revision: str) -> None:
        repo = self._visible(repo_id)
        if repo is None:
            return self._refuse(401, "RepoNotFound")
        if revision not in ("main", "v1", COMMIT):
            return self._refuse(404, "RevisionNotFound")
        siblings = [_sibling(name, content) for name, content in repo.files.items()]
        return self._send(200, json.dumps({"id": repo_id, "sha": COMMIT, "siblings": siblings}).encode())

    def _answer_file(self, repo_id: str, commit: str, name: str) -> None:
        repo = self._visible(repo_id)
        if repo is None or commit != COMMIT or name not in repo.files:
            return self._refuse(404, "EntryNotFound")
        if repo.gated and not self._has_token():
            return self._refuse(401, "GatedRepo")
        if self.hub.statuses.get(name):
            return self._refuse(self.hub.statuses[name].pop(0), None)
        content, start = repo.files[name], 0
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if asked and not self.hub.ignores_range:
            start = int(asked[1])
        cuts = self.hub.cuts.get(name, [])
        return self._send(206 if start else 200, content[start:], cut=cuts.pop(0) if cuts else None)

    def _visible(self, repo_id: str) -> Repo | None:
        repo = self.hub.repos.get(repo_id)
        return None if repo is None or (repo.private and not self._has_token()) else repo

    def _has_token(self) -> bool:
        return self.hub.token is not None and self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def _refuse(self, status: int, code: str | None) -> None:
        self._send(status, b"{}", code=code)

    def _send(self, status: int, body: bytes, code: str | None = None, cut: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True


def _sibling(name: str, content: bytes) -> dict[str, object]:
    blob = b"blob %d\0" % len(content) + content
    record: dict[str, object] = {"rfilename": name, "size": len(content), "blobId": hashlib.sha1(blob).hexdigest()}
    if name.endswith(_LARGE):
        sha256 = hashlib.sha256(content).hexdigest()
        record["lfs"] = {"size": len(content), "sha256": sha256, "pointerSize": 130}
    return record
