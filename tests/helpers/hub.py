"""A hub on this machine: a real HTTP server that speaks the hub's endpoints, and misbehaves when told to."""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves repositories, `{"user/repo": {"file": bytes}}`, as the hub does large files."""

    daemon_threads = True

    def __init__(self, repositories: Mapping[str, Mapping[str, bytes]]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories = repositories
        self.status, self.headers = 200, {}  # of every answer, when it is not 200
        self.token, self.gate = "", threading.Event()
        self.tricks: list[str] = []  # one for each time a file's bytes are asked for; see `Handler.send`
        self.listed: dict[str, Any] = {}  # sizes that the list of files gives instead of the true ones
        self.promised: dict[str, int] = {}  # sizes that the head of a file gives instead
        self.log: list[tuple[str, str, str]] = []  # method, path and range of each request

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def bodies(self) -> list[str]:
        """List the ranges of the files that were asked for, an empty one for a whole file."""
        return [asked for method, path, asked in self.log if method == "GET" and "/resolve/" in path]


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def log_message(self, *_: object) -> None:
        pass

    def answer(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        hub.log.append((self.command, path, self.headers.get("Range", "")))
        hub.token = self.headers.get("Authorization", "")
        model = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?(/tree/.*)?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        if hub.status != 200:
            self.reply(hub.status, b"{}", hub.headers)
        elif model and model[1] in hub.repositories:
            files = hub.repositories[model[1]]
            found = self.tree(files) if model[2] else self.listing(model[1], files)
            self.reply(200, json.dumps(found).encode(), {})
        elif file and (data := hub.repositories.get(file[1], {}).get(unquote(file[2]))) is not None:
            self.send(unquote(file[2]), data)
        else:
            code = "EntryNotFound" if file else "RepoNotFound"
            self.reply(404, b"{}", {"X-Error-Code": code, "X-Repo-Commit": COMMIT})

    def listing(self, repository: str, files: Mapping[str, bytes]) -> dict[str, Any]:
        siblings = [
            {"rfilename": name, "size": self.server.listed.get(name, len(data))} for name, data in files.items()
        ]
        return {"id": repository, "sha": COMMIT, "siblings": siblings}

    def tree(self, files: Mapping[str, bytes]) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": name, "size": len(data), "oid": sha256(data).hexdigest()[:40]}
            for name, data in files.items()
        ]

    def send(self, name: str, data: bytes) -> None:
        """Send a file, or what is asked for of it, as the next trick says.

        drop: break off in the middle; half: only half, well-formed; whole: never mind the range; more: too much;
        garble: one byte is wrong; wait: stop in the middle until `gate` opens; a number: this status instead.
        """
        hub, size = self.server, self.server.promised.get(name, len(data))
        tag = f'"{sha256(data).hexdigest()}"'
        headers = {"X-Linked-Size": str(size), "X-Linked-ETag": tag, "X-Repo-Commit": COMMIT}
        trick = hub.tricks.pop(0) if self.command == "GET" and hub.tricks else ""
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked and trick not in ("whole", "half") else 0
        said = {"half": data[: len(data) // 2], "more": data + b"!", "garble": data[:-1] + b"!"}.get(trick, data)
        if trick.isdecimal():
            self.reply(int(trick), b"{}", {})
            return
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.reply(206 if start else 200, said[start:], headers, trick)

    def reply(self, status: int, data: bytes, headers: Mapping[str, str], trick: str = "") -> None:
        self.send_response(status)
        for header in {"Content-Length": str(len(data)), "Content-Type": "application/json", **headers}.items():
            self.send_header(*header)
        self.end_headers()
        if self.command == "GET":
            middle = len(data) // 2 if trick in ("drop", "wait") else len(data)
            with contextlib.suppress(ConnectionError):
                self.wfile.write(data[:middle])
                if trick == "wait":
                    self.server.gate.wait(120)
                    self.wfile.write(data[middle:])


@contextlib.contextmanager
def running(repositories: Mapping[str, Mapping[str, bytes]]) -> Iterator[Hub]:
    """Run a hub in a thread."""
    with Hub(repositories) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.gate.set()
        server.shutdown()


def keep(folder: Path, repository: str, name: str, data: bytes, commit: str = COMMIT) -> Path:
    """Put a file into a hub's cache as huggingface_hub does; return where it is seen."""
    place = folder / f"models--{repository.replace('/', '--')}"
    blob, seen = place / "blobs" / sha256(data).hexdigest(), place / "snapshots" / commit / name
    for path in (blob, seen, place / "refs" / "main"):
        path.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(data)
    (place / "refs" / "main").write_text(commit)
    seen.symlink_to(os.path.relpath(blob, seen.parent))
    return seen
