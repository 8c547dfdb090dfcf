"""`convert user/repo` against a real HTTP server on this machine that speaks the hub's endpoints."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

Fails = Callable[..., str]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves one checkpoint as `someone/tiny`; answers `status` to everything else that is asked of it."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.status, self.headers = folder, 200, {}


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, body: bool) -> None:
        files = {path.name: path.read_bytes() for path in self.server.folder.iterdir()}
        name = self.path.rsplit("/", 1)[-1]
        if self.server.status != 200:
            self.reply(self.server.status, b"{}", body, self.server.headers)
        elif self.path.startswith("/api/models/someone/tiny/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": sha1(data).hexdigest()}
                for name, data in files.items()
            ]
            self.reply(200, json.dumps(tree).encode(), body, {})
        elif self.path.startswith("/api/models/someone/tiny"):
            document = {"id": "someone/tiny", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
            self.reply(200, json.dumps(document).encode(), body, {})
        elif self.path.startswith(f"/someone/tiny/resolve/{COMMIT}/") and name in files:
            headers = {"ETag": f'"{sha1(files[name]).hexdigest()}"', "X-Repo-Commit": COMMIT}
            self.reply(200, files[name], body, headers)
        else:
            self.reply(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})

    def reply(self, status: int, data: bytes, body: bool, headers: dict[str, str]) -> None:
        self.send_response(status)
        for header in {"Content-Length": str(len(data)), "Content-Type": "application/json", **headers}.items():
            self.send_header(*header)
        self.end_headers()
        if body:
            self.wfile.write(data)


@pytest.fixture
def hub(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub(checkpoint) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_a_checkpoint_comes_from_the_hub_and_then_from_its_cache(
    hub: Hub, run: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run("convert", "someone/tiny", "-o", str(tmp_path / "a.gguf"), "--json")
    assert result.returncode == 0, result.stderr  # type: ignore[attr-defined]
    assert json.loads(result.stdout)["template"] == "metaalign"  # type: ignore[attr-defined]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    again = run("convert", "someone/tiny", "-o", str(tmp_path / "b.gguf"))
    assert again.returncode == 0, again.stderr  # type: ignore[attr-defined]
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@pytest.mark.parametrize("status, headers, code, word", [
    (404, {"X-Error-Code": "RepoNotFound"}, 3, "no hub repository"),
    (403, {"X-Error-Code": "GatedRepo"}, 4, "gated"),
    (401, {"X-Error-Code": "GatedRepo"}, 4, "gated"),
    (400, {}, 4, "cannot be reached"),
])  # fmt: skip
def test_a_hub_that_refuses_is_an_error_of_its_kind(
    hub: Hub, status: int, headers: dict[str, str], code: int, word: str, fails: Fails
) -> None:
    hub.status, hub.headers = status, headers  # type: ignore[assignment]
    assert word in fails(code, "convert", "someone/tiny")


def test_without_a_network_a_hub_id_is_exit_4(monkeypatch: pytest.MonkeyPatch, fails: Fails) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "someone/tiny" in fails(4, "convert", "someone/tiny")
