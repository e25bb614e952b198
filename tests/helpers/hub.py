"""A Hub on this machine: as much of its API as the real client needs to make a repository, commit to it and read it.

Every file is a regular one, which is what the preupload endpoint answers; the client then sends it within the commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_token-of-the-tests"


class Hub(ThreadingHTTPServer):
    """Repositories by name, each a list of commits, each a mapping from path to content."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, list[dict[str, bytes]]] = {}
        self.requests: list[str] = []

    def files(self, repository: str) -> dict[str, bytes]:
        return self.repositories[repository][-1]

    def environment(self, home: Path) -> dict[str, str]:
        """What makes a process use this Hub with an account of its own, and start without caches."""
        endpoint = f"http://127.0.0.1:{self.server_port}"
        return {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN, "HF_HOME": str(home)}


@contextmanager
def serve() -> Iterator[Hub]:
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


def sha(repository: str, commits: int) -> str:
    return hashlib.sha1(f"{repository} {commits}".encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        kind, *rest = self._parts()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "wanted the token of the tests"})
        elif (kind, *rest) == ("api", "repos", "create"):
            self._create(json.loads(body))
        elif (kind, *rest) == ("api", "validate-yaml"):
            self._answer(200, {"errors": [], "warnings": []})
        elif len(rest) == 5 and rest[0] == "models" and "/".join(rest[1:3]) in self.server.repositories:
            act = {"preupload": self._preupload, "commit": self._commit}[rest[3]]
            act("/".join(rest[1:3]), body)
        else:
            self._missing("RepoNotFound")

    def do_GET(self) -> None:
        parts = self._parts()
        if parts[:2] == ["api", "models"] and "/".join(parts[2:4]) in self.server.repositories:
            self._describe("/".join(parts[2:4]))
        elif len(parts) >= 5 and parts[2] == "resolve":
            self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._missing("RepoNotFound")

    do_HEAD = do_GET

    def _parts(self) -> list[str]:
        self.server.requests.append(f"{self.command} {self.path}")
        return [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
        exists = name in self.server.repositories
        self.server.repositories.setdefault(name, [{".gitattributes": b""}])
        self._answer(409 if exists else 200, {"url": f"http://{self.headers['Host']}/{name}", "name": name})

    def _preupload(self, repository: str, body: bytes) -> None:
        files = [
            {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
            for file in json.loads(body)["files"]
        ]
        self._answer(200, {"files": files})

    def _commit(self, repository: str, body: bytes) -> None:
        commits = self.server.repositories[repository]
        files = dict(commits[-1])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] != "header":
                raise AssertionError(f"no such operation here: {line['key']}")
        commits.append(files)
        oid = sha(repository, len(commits))
        url = f"http://{self.headers['Host']}/{repository}/commit/{oid}"
        self._answer(200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def _describe(self, repository: str) -> None:
        commits = self.server.repositories[repository]
        siblings = [{"rfilename": path} for path in commits[-1]]
        self._answer(200, {"id": repository, "sha": sha(repository, len(commits)), "tags": [], "siblings": siblings})

    def _resolve(self, repository: str, revision: str, path: str) -> None:
        commits = self.server.repositories.get(repository)
        if commits is None:
            self._missing("RepoNotFound")
            return
        count = next((n for n in range(1, len(commits) + 1) if sha(repository, n) == revision), None)
        if count is None and revision != "main":
            self._missing("RevisionNotFound")
            return
        count = count or len(commits)
        content = commits[count - 1].get(path)
        commit = {"X-Repo-Commit": sha(repository, count)}
        if content is None:
            self._missing("EntryNotFound", **commit)
        else:
            self._send(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"', **commit)

    def _missing(self, code: str, **headers: str) -> None:
        self._answer(404, {"error": code}, **{"X-Error-Code": code, "X-Error-Message": code}, **headers)

    def _answer(self, status: int, content: Any, **headers: str) -> None:
        self._send(status, json.dumps(content).encode(), **{"Content-Type": "application/json"}, **headers)

    def _send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass
