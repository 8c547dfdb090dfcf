"""`convert user/repo` against a real HTTP server on this machine that speaks the hub's endpoints."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.hub import Hub, running

Fails = Callable[..., str]


@pytest.fixture
def hub(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    with running({"someone/tiny": files}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        yield server


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
    (400, {}, 4, "(400)"),
])  # fmt: skip
def test_a_hub_that_refuses_is_an_error_of_its_kind(
    hub: Hub, status: int, headers: dict[str, str], code: int, word: str, fails: Fails
) -> None:
    hub.status, hub.headers = status, headers  # type: ignore[assignment]
    assert word in fails(code, "convert", "someone/tiny")


def test_without_a_network_a_hub_id_is_exit_4(monkeypatch: pytest.MonkeyPatch, fails: Fails) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "someone/tiny" in fails(4, "convert", "someone/tiny")


def test_offline_a_hub_id_asks_nobody(hub: Hub, fails: Fails) -> None:
    assert "someone/tiny" in fails(4, "convert", "someone/tiny", "--offline")
    assert hub.log == []
