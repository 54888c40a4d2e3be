"""A small Hugging Face Hub on this machine: as much of its protocol as huggingface_hub's filesystem and commits use.

Written from the requests of huggingface_hub 2.4. It has repositories of commits, tokens for private ones, listings in
pages, ranged downloads, a redirect to another address for large files, as the real one has to its CDN, and commits
with files inside or by Git LFS. It has no Xet, so clients need HF_HUB_DISABLE_XET=1 to write.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

_PAGE = 3  # entries of a listing; the real one has 1,000
LARGE = (".parquet", ".png", ".jpg", ".tar")  # what the real one keeps by LFS, by default


@dataclass
class Repository:
    """The commits of a repository, oldest first: files by path."""

    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{".gitattributes": b""}])
    messages: list[str] = field(default_factory=lambda: ["initial commit"])
    token: str | None = None  # that may read a private one

    @property
    def files(self) -> dict[str, bytes]:
        """The files of the newest commit."""
        return self.commits[-1]

    def at(self, revision: str) -> dict[str, bytes] | None:
        """Returns the files of `main` or of a commit."""
        if revision == "main":
            return self.files
        return next((files for number, files in enumerate(self.commits) if self.sha(number) == revision), None)

    def sha(self, number: int = -1) -> str:
        """Returns the id of a commit."""
        number = number % len(self.commits)
        return hashlib.sha1(f"{number}".encode()).hexdigest()


class Hub:
    """The server; `repositories` is by `datasets/USER/NAME` or `models/USER/NAME`."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.stored: dict[str, bytes] = {}  # large files, by sha256
        self.requests: list[tuple[str, str, str]] = []  # method, path, and the token that came with it
        self.bytes_sent = 0  # of contents
        self.fails_with: int | None = None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._cdn = ThreadingHTTPServer(("127.0.0.1", 0), type("Cdn", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.cdn = f"http://127.0.0.1:{self._cdn.server_address[1]}"

    @contextmanager
    def running(self) -> Iterator[Hub]:
        """Serves while the block runs."""
        for server in (self._server, self._cdn):
            threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield self
        finally:
            for server in (self._server, self._cdn):
                server.shutdown()
                server.server_close()

    def dataset(self, name: str, files: dict[str, bytes], token: str | None = None) -> Repository:
        """Makes a data set of one commit with these files."""
        repository = self.repositories[f"datasets/{name}"] = Repository(token=token)
        repository.commits[0] |= files
        return repository


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Prints nothing."""

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urlsplit(self.path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.hub.requests.append((self.command, unquote(parts.path), token))
        if self.hub.fails_with:
            self._answer(self.hub.fails_with, b"", {"Retry-After": "0"})
            return
        words = parts.path.strip("/").split("/")
        if words[0] in ("stored", "upload"):
            self._serve_large(words, body)
            return
        if words == ["api", "validate-yaml"]:  # of a README.md
            self._json({"warnings": [], "errors": []})
            return
        is_api = words[0] == "api"
        words = words[1:] if is_api else words
        kind = words.pop(0) if words[0] in ("datasets", "models") else "models"
        name, rest = "/".join(words[:2]), [unquote(word) for word in words[2:]]
        repository = self.hub.repositories.get(f"{kind}/{name.removesuffix('.git')}")
        if repository is None or repository.token not in (None, token):
            headers = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            self._answer(404 if token else 401, b"", headers)
        elif rest[:1] == ["info"]:
            self._lfs_batch(json.loads(body))
        elif rest[:1] == ["resolve"]:
            self._resolve(repository, rest[1], "/".join(rest[2:]))
        else:
            self._api(repository, name, rest, parse_qs(parts.query), body)

    def _api(self, repository: Repository, name: str, rest: list[str], query: dict[str, Any], body: bytes) -> None:
        verb, revision = rest[0] if rest else "revision", rest[1] if len(rest) > 1 else "main"
        files = repository.at(revision)
        if files is None:
            self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif verb == "revision":
            sha = repository.sha(next(number for number, each in enumerate(repository.commits) if each is files))
            self._json({"id": name, "sha": sha, "private": False, "siblings": [{"rfilename": path} for path in files]})
        elif verb == "tree":
            self._tree(files, "/".join(rest[2:]), query)
        elif verb == "paths-info":
            wanted = parse_qs(body.decode()).get("paths", []) if body[:1] != b"{" else json.loads(body)["paths"]
            self._json([entry for entry in _entries(files, "", True) if entry["path"] in wanted])
        elif verb == "preupload":
            paths = [each["path"] for each in json.loads(body)["files"]]
            modes = ["lfs" if path.endswith(LARGE) else "regular" for path in paths]
            answer = [
                {"path": path, "uploadMode": mode, "shouldIgnore": False}
                for path, mode in zip(paths, modes, strict=True)
            ]
            self._json({"files": answer})
        else:
            assert verb == "commit", self.path
            self._commit(repository, name, [json.loads(line) for line in body.splitlines()])

    def _tree(self, files: dict[str, bytes], path: str, query: dict[str, Any]) -> None:
        entries = _entries(files, path, query.get("recursive", ["False"])[0].lower() == "true")
        if not entries and path:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        start = int(query.get("cursor", ["0"])[0])
        headers = {}
        if start + _PAGE < len(entries):
            address = urlsplit(self.path)
            recursive = query.get("recursive", ["False"])[0]
            more = f"{self.hub.endpoint}{address.path}?recursive={recursive}&cursor={start + _PAGE}"
            headers["Link"] = f'<{more}>; rel="next"'
        self._json(entries[start : start + _PAGE], headers)

    def _resolve(self, repository: Repository, revision: str, path: str) -> None:
        files = repository.at(revision) or {}
        if path not in files:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        elif path.endswith(LARGE):
            digest = hashlib.sha256(files[path]).hexdigest()
            self.hub.stored[digest] = files[path]
            self._answer(302, b"", {"Location": f"{self.hub.cdn}/stored/{digest}"})
        else:
            self._content(files[path])

    def _serve_large(self, words: list[str], body: bytes) -> None:
        if words[0] == "upload":
            assert hashlib.sha256(body).hexdigest() == words[1]
            self.hub.stored[words[1]] = body
            self._answer(200, b"")
        elif "Authorization" in self.headers:
            self._answer(400, b"")  # as the CDN answers to a token besides its own signature
        else:
            self._content(self.hub.stored[words[1]])

    def _content(self, data: bytes) -> None:
        wanted = self.headers.get("Range")
        if wanted is None:
            self._answer(200, data)
            return
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, stop = int(first), int(last) + 1 if last else len(data)
        if start >= len(data):
            self._answer(416, b"")
            return
        stop = min(stop, len(data))
        self._answer(206, data[start:stop], {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})

    def _lfs_batch(self, asked: dict[str, Any]) -> None:
        objects = [
            {
                "oid": each["oid"],
                "size": each["size"],
                "actions": {"upload": {"href": f"{self.hub.cdn}/upload/{each['oid']}"}},
            }
            for each in asked["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, repository: Repository, name: str, lines: list[dict[str, Any]]) -> None:
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, repository.sha()):
            self._answer(412, b"", {"X-Error-Message": "A commit has happened since. Please refresh and try again."})
            return
        files = dict(repository.files)
        for line in lines[1:]:
            path = line["value"]["path"]
            if line["key"] == "file":
                files[path] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                files[path] = self.hub.stored[line["value"]["oid"]]
            elif line["key"] == "deletedFile":
                del files[path]
            else:
                assert line["key"] == "deletedFolder"
                files = {each: data for each, data in files.items() if not each.startswith(path.rstrip("/") + "/")}
        repository.commits.append(files)
        repository.messages.append(header["summary"])
        sha = repository.sha()
        self._json({"commitUrl": f"{self.hub.endpoint}/datasets/{name}/commit/{sha}", "commitOid": sha})

    def _json(self, value: Any, headers: dict[str, str] | None = None) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"} | (headers or {}))

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.hub.bytes_sent += len(body)
            self.wfile.write(body)


for _method in ("GET", "HEAD", "POST", "PUT"):
    setattr(_Handler, f"do_{_method}", _Handler._serve)


def _entries(files: dict[str, bytes], path: str, recursive: bool) -> list[dict[str, Any]]:
    """Returns the files and folders below a folder as the Hub lists them."""
    prefix = f"{path}/" if path else ""
    entries: dict[str, dict[str, Any]] = {}
    for name, data in sorted(files.items()):
        if not name.startswith(prefix):
            continue
        *folders, _ = name.removeprefix(prefix).split("/")
        for depth in range(1, len(folders) + 1):
            folder = prefix + "/".join(folders[:depth])
            entries.setdefault(folder, {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0})
            if not recursive:
                break
        if not folders or recursive:
            entries[name] = {"type": "file", "path": name, "oid": hashlib.sha1(data).hexdigest(), "size": len(data)}
    return list(entries.values())
