"""`pull`, and `-m user/repo`, against a real HTTP server on this machine that speaks the hub's endpoints, and misbehaves."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
from helpers.hub import Hub, keep, running
from helpers.terminal import Terminal

import metaalign_edge as edge
from metaalign_edge_commands.terminal.progress import progress_bar
from metaalign_edge_commands.terminal.screen import Screen
from metaalign_edge_runtime.errors import in_bytes
from metaalign_edge_runtime.stores import download, models
from metaalign_edge_runtime.stores.hub import TRIES, Choice, HubFile, best_choice

Refuses = Callable[..., str]
Pull = Callable[..., tuple[str, str]]
REPOSITORY = "some/tiny-GGUF"


@pytest.fixture
def data(tiny: Path) -> bytes:
    return tiny.read_bytes()


@pytest.fixture
def hub(data: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Serve a repository as people make them: quantisations, a projector, an adapter, an importance matrix, a card."""
    files = {
        "tiny-Q8_0.gguf": data,
        "tiny-f16.gguf": data + bytes(64),
        "mmproj-tiny-f16.gguf": b"GGUF projector",
        "tiny-lora-f32.gguf": b"GGUF adapter",
        "tiny.imatrix.gguf": b"GGUF matrix",
        "README.md": b"# tiny",
    }
    monkeypatch.setattr("metaalign_edge_runtime.stores.hub.PAUSE", 0)
    with running({REPOSITORY: files}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.address)
        yield server


@pytest.fixture
def pull(capfd: pytest.CaptureFixture[str]) -> Pull:
    """Run a `pull` that must succeed; return what it prints, and says."""

    def run(*arguments: str) -> tuple[str, str]:
        code = edge.run(["pull", *arguments])
        out, error = capfd.readouterr()
        assert code == 0, error
        return out, error

    return run


def lies_about(hub: Hub, size: object) -> None:
    hub.listed["tiny-Q8_0.gguf"] = size


def nothing_is_left() -> bool:
    """Tell whether no model and no piece of one is in the cache."""
    return models.model_names() == ["metaalign-demo"] and models.unfinished_downloads() == []


def test_a_model_comes_into_the_hubs_own_cache_where_other_programs_find_it(hub: Hub, pull: Pull, data: bytes) -> None:
    out, error = pull(f"{REPOSITORY}:Q8_0")
    path = Path(out.removesuffix("\n"))
    assert path.read_bytes() == data and error.count("\n") == 1 and f"{REPOSITORY}:Q8_0" in error
    found = huggingface_hub.try_to_load_from_cache(REPOSITORY, "tiny-Q8_0.gguf", cache_dir=models.hub_folder())
    assert found == str(path)
    assert f"{REPOSITORY}:Q8_0" in models.model_names()
    assert {(method, place.split("/")[1]) for method, place, _ in hub.log} == {
        ("GET", "api"),
        ("GET", "some"),
        ("HEAD", "some"),
    }
    assert len(hub.bodies()) == 1


def test_what_is_here_is_not_asked_for_again_unless_a_newer_one_is_wanted(hub: Hub, pull: Pull) -> None:
    first, _ = pull(REPOSITORY)
    hub.log.clear()
    assert pull(REPOSITORY)[0] == first and pull(f"{REPOSITORY}:q8_0")[0] == first
    assert hub.log == []
    assert pull(REPOSITORY, "--update")[0] == first
    assert hub.log and not hub.bodies()


@pytest.mark.parametrize("wanted, file", [
    (":Q8_0", "tiny-Q8_0.gguf"), (":q8_0", "tiny-Q8_0.gguf"), (":F16", "tiny-f16.gguf"),
    (":tiny-f16.gguf", "tiny-f16.gguf"), ("", "tiny-Q8_0.gguf"),
])  # fmt: skip
def test_the_colon_takes_a_quantisation_or_a_file(wanted: str, file: str, hub: Hub, pull: Pull) -> None:
    document = json.loads(pull(REPOSITORY + wanted, "--json", "-q")[0])
    assert Path(document["path"]).name == file
    assert document["downloaded"] and document["architecture"] == "llama"


def test_without_a_quantisation_stderr_says_which_is_taken_and_why_and_what_else_there_is(hub: Hub, pull: Pull) -> None:
    _, error = pull(REPOSITORY)
    assert "taking Q8_0" in error and "60 % of the" in error and "also F16" in error and "mmproj" not in error


def test_the_list_shows_the_choices_and_which_would_be_taken(hub: Hub, pull: Pull) -> None:
    rows = json.loads(pull(REPOSITORY, "--list", "--json")[0])
    assert [(row["name"], row["taken"]) for row in rows] == [(f"{REPOSITORY}:Q8_0", True), (f"{REPOSITORY}:F16", False)]
    assert rows[0]["bytes"] == len(hub.repositories[REPOSITORY]["tiny-Q8_0.gguf"])
    table, _ = pull(f"{REPOSITORY}:f16", "--list")
    assert [line.endswith("taken") for line in table.splitlines()] == [False, False, True]
    assert nothing_is_left()


@pytest.mark.parametrize("free, best", [
    (100, "Q8_0"), (12, "Q6_K"), (9, "Q4_K_M"), (6, "Q2_K"), (3, None), (float("inf"), "Q8_0"),
])  # fmt: skip
def test_the_best_is_the_largest_usual_one_that_leaves_room(free: float, best: str | None) -> None:
    sizes = {"Q2_K": 3, "IQ4_XS": 4, "Q4_K_M": 5, "Q6_K": 7, "Q8_0": 9, "F16": 17}
    choices = [Choice(tag, (HubFile(f"a-{tag}.gguf", size),)) for tag, size in sizes.items()]
    found = best_choice(choices, free)
    assert (found and found.tag) == best


def test_what_fits_no_machine_is_refused_with_the_numbers(hub: Hub, refuses: Refuses) -> None:
    hub.listed |= {"tiny-Q8_0.gguf": 10**15, "tiny-f16.gguf": 2 * 10**15}
    line = refuses(5, "pull", REPOSITORY)
    assert "1,000,000.0 GB" in line and "free memory" in line


def test_a_connection_that_breaks_is_taken_up_where_it_broke(hub: Hub, pull: Pull, data: bytes) -> None:
    hub.tricks = ["drop", "drop", "500", "drop"]
    out, _ = pull(f"{REPOSITORY}:Q8_0")
    assert Path(out.strip()).read_bytes() == data
    starts = [int(asked.removeprefix("bytes=").rstrip("-") or 0) for asked in hub.bodies()]
    half = len(data) // 2
    assert starts[:3] == [0, half, half + (len(data) - half) // 2] and starts == sorted(starts) and len(starts) == 5


@pytest.mark.parametrize("size", [1000, 10**6])
def test_a_server_that_knows_no_ranges_begins_anew(size: int, hub: Hub) -> None:
    content = bytes(range(250)) * (size // 250)
    hub.repositories, hub.tricks = {"some/thing": {"a-Q8_0.gguf": content}}, ["drop", "whole"]
    assert (
        download.download_model(
            "some/thing", "Q8_0", lambda _: None, lambda: progress_bar(Screen(quiet=True))
        ).read_bytes()
        == content
    )


def test_what_a_failing_hub_left_is_gone_on_with_the_next_time(
    hub: Hub, pull: Pull, refuses: Refuses, data: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.tricks = ["drop", "503", "503", "503"]
    assert edge.run(["pull", "-q", f"{REPOSITORY}:Q8_0"]) == 4
    assert "(503)" in capfd.readouterr().err
    assert models.model_names() == ["metaalign-demo"] and len(models.unfinished_downloads()) == 1
    hub.log.clear()
    out, error = pull(f"{REPOSITORY}:Q8_0")
    assert Path(out.strip()).read_bytes() == data
    assert hub.bodies() == [f"bytes={len(data) // 2}-"] and "are here" in error


@pytest.mark.parametrize("trick, word", [("half", "before its"), ("more", "promised"), ("garble", "promised")])
def test_what_is_not_what_the_hub_promised_is_refused_and_never_a_model(
    trick: str, word: str, hub: Hub, pull: Pull, refuses: Refuses, data: bytes
) -> None:
    hub.tricks = [trick] * 10
    assert word in refuses(4, "pull", "-q", f"{REPOSITORY}:Q8_0")
    assert models.model_names() == ["metaalign-demo"]
    hub.tricks = []
    assert Path(pull(f"{REPOSITORY}:Q8_0")[0].strip()).read_bytes() == data


@pytest.mark.parametrize("listed, promised, code, word", [
    (10, None, 4, "nothing was downloaded"),
    (None, 10, 4, "nothing was downloaded"),
    (-1, None, 4, "no sizes"),
    ("large", None, 4, "no sizes"),
    (10**17, 10**17, 8, "needs 100,000,000.0 GB"),
])  # fmt: skip
def test_a_hub_that_lies_about_sizes_is_found_out_before_anything_is_fetched(
    listed: object, promised: int | None, code: int, word: str, hub: Hub, refuses: Refuses
) -> None:
    if listed is not None:
        lies_about(hub, listed)
    if promised is not None:
        hub.promised["tiny-Q8_0.gguf"] = promised
    assert word in refuses(code, "pull", "-q", f"{REPOSITORY}:Q8_0")
    assert not hub.bodies() and nothing_is_left()


@pytest.mark.parametrize("status, headers, code, word", [
    (401, {"X-Error-Code": "GatedRepo"}, 4, "accept its licence"),
    (403, {"X-Error-Code": "GatedRepo"}, 4, "HF_TOKEN"),
    (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, 4, "HF_TOKEN"),
    (401, {"X-Error-Code": "RepoNotFound"}, 3, "private"),
    (401, {}, 4, "HF_TOKEN"),
    (403, {}, 4, "refuses"),
    (404, {"X-Error-Code": "RepoNotFound"}, 3, "no hub repository"),
    (429, {"Retry-After": "3600"}, 4, "too many requests"),
    (500, {}, 4, "(500)"),
    (203, {}, 4, "makes no sense"),
])  # fmt: skip
def test_a_hub_that_refuses_or_fails_is_an_error_of_its_kind(
    status: int, headers: dict[str, str], code: int, word: str, hub: Hub, refuses: Refuses
) -> None:
    hub.status, hub.headers = status, headers
    assert word in refuses(code, "pull", REPOSITORY)
    assert len(hub.log) <= TRIES and nothing_is_left()


def test_a_gated_file_says_where_its_licence_is(hub: Hub, refuses: Refuses) -> None:
    hub.tricks = ["403"]
    assert "refuses" in refuses(4, "pull", "-q", f"{REPOSITORY}:Q8_0")
    hub.status, hub.headers = 403, {"X-Error-Code": "GatedRepo"}
    assert f"{hub.address}/{REPOSITORY}" in refuses(4, "chat", "-q", "-m", REPOSITORY, "tea?")


def test_the_token_is_sent(hub: Hub, pull: Pull, monkeypatch: pytest.MonkeyPatch) -> None:
    pull(REPOSITORY, "--list")
    assert hub.token == ""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    pull(REPOSITORY, "--list")
    assert hub.token == "Bearer hf_secret"


def test_a_hub_that_is_not_there_is_exit_4(hub: Hub, refuses: Refuses, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        address = os.environ["HF_ENDPOINT"]
        assert f"{address} cannot be reached (ConnectError): try again" in refuses(4, "pull", REPOSITORY)
        monkeypatch.setenv("http_proxy", f"{address[:7]}user:secret@{address[7:]}")
        line = refuses(4, "pull", REPOSITORY)
        assert "cannot be reached by way of the proxy in http_proxy (ConnectError)" in line and "secret" not in line
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert "proxy" not in refuses(4, "pull", REPOSITORY)


@pytest.mark.parametrize(
    "address", ["huggingface.co", "ftp://h", "http://", "http://[h", "http://h:port", "http://h:0"]
)
def test_an_address_of_the_hub_that_is_none_is_a_usage_error(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", address)
    for command in (["pull", REPOSITORY], ["convert", REPOSITORY]):
        ended = subprocess.run([sys.executable, "-m", "metaalign_edge", *command], capture_output=True, text=True)
        assert ended.returncode == 2 and "HF_ENDPOINT is no address of a hub" in ended.stderr
        assert ended.stderr.count("\n") == 1 and not ended.stdout


def test_a_proxy_of_a_kind_that_lacks_its_package_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("all_proxy", "socks5h://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    command = [sys.executable, "-m", "metaalign_edge", "pull", REPOSITORY]  # the hub's client reads the proxies once
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 4 and "socksio" in ended.stderr and ended.stderr.count("\n") == 1


@pytest.mark.parametrize("name, code, word", [
    ("some/none", 3, "no hub repository"),
    (f"{REPOSITORY}:Q2_K", 3, "it has Q8_0"),
    ("tiny", 2, "user/repo"),
    ("../tiny", 2, "user/repo"),
    ("some/tiny--GGUF", 3, "no hub repository"),
    ("some/cards", 3, "no whole GGUF model"),
    ("some/checkpoint", 3, "metaalign-edge convert some/checkpoint"),
    ("some/parts", 3, "no whole GGUF model"),
    ("some/twins:Q8_0", 2, "a-Q8_0.gguf, b-Q8_0.gguf"),
])  # fmt: skip
def test_a_name_that_means_no_model_says_what_to_do(
    name: str, code: int, word: str, hub: Hub, refuses: Refuses
) -> None:
    hub.repositories = {
        **hub.repositories,
        "some/cards": {"README.md": b"a"},
        "some/checkpoint": {"model.safetensors": b"a"},
        "some/parts": {"a-00001-of-00002.gguf": b"a"},
        "some/twins": {"a-Q8_0.gguf": b"a", "b-Q8_0.gguf": b"a"},
    }
    assert word in refuses(code, "pull", name)


def test_a_file_that_would_leave_the_cache_is_refused(hub: Hub, data: bytes) -> None:
    hub.repositories = {"some/evil": {"../../../../evil.gguf": data}}
    assert edge.run(["pull", "-q", "some/evil"]) in (3, 4)
    assert models.model_names() == ["metaalign-demo"]
    assert list(models.hub_folder().parent.parent.rglob("evil.gguf")) == []


def test_all_parts_are_fetched_and_the_first_is_the_model(
    hub: Hub, parts: list[Path], pull: Pull, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.repositories = {"some/split": {f"Q8_0/{part.name}": part.read_bytes() for part in parts}}
    hub.tricks = ["", "drop"]
    document = json.loads(pull("some/split", "--json")[0])
    assert Path(document["path"]).name == parts[0].name and document["name"] == "some/split:Q8_0"
    assert document["bytes"] == sum(part.stat().st_size for part in parts)
    assert edge.run(["chat", "-q", "-m", "some/split", "--no-stdin", "-n", "1", "tea?"]) == 0
    capfd.readouterr()
    assert edge.run(["models", "rm", "some/split:Q8_0"]) == 0 and nothing_is_left()


def test_chat_announces_what_it_downloads_and_then_asks_nobody(
    hub: Hub, capfd: pytest.CaptureFixture[str], no_sockets: Callable[[], None]
) -> None:
    command = ["chat", "-m", f"{REPOSITORY}:Q8_0", "--no-stdin", "--seed", "1", "-n", "4", "tea?"]
    assert edge.run(command) == 0
    first, error = capfd.readouterr()
    size = in_bytes(len(hub.repositories[REPOSITORY]["tiny-Q8_0.gguf"]))
    assert f"downloading {REPOSITORY}:Q8_0, {size}" in error
    no_sockets()
    assert edge.run([*command, "--offline"]) == edge.run(command) == 0
    assert capfd.readouterr() == (2 * first, "")


@pytest.fixture
def no_sockets(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Forbid sockets from here on."""

    def forbid() -> None:
        def refused(*_: object, **__: object) -> None:
            raise AssertionError("a socket was opened")

        monkeypatch.setattr(socket, "socket", refused)
        monkeypatch.setattr(socket, "create_connection", refused)
        monkeypatch.setattr(socket, "getaddrinfo", refused)

    return forbid


@pytest.mark.parametrize("how", ["--offline", "HF_HUB_OFFLINE", "METAALIGN_EDGE_OFFLINE"])
@pytest.mark.parametrize("command", [
    ["chat", "-m", REPOSITORY, "tea?"], ["render", "-m", REPOSITORY, "tea?"], ["pull", REPOSITORY],
    ["pull", REPOSITORY, "--list"], ["convert", "some/checkpoint"], ["bench", "-m", REPOSITORY],
    ["eval", "--size", "1", "--against", REPOSITORY],
])  # fmt: skip
def test_offline_no_socket_is_opened(
    command: list[str],
    how: str,
    hub: Hub,
    refuses: Refuses,
    no_sockets: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    no_sockets()
    if how.startswith("--"):
        command = [command[0], how, *command[1:]]
    else:
        monkeypatch.setenv(how, "1")
    assert "not on this machine" in refuses(4, *command)


def test_ctrl_c_keeps_what_came_and_the_next_time_goes_on(hub: Hub, pull: Pull, data: bytes) -> None:
    hub.tricks = ["wait"]
    command = [sys.executable, "-m", "metaalign_edge", "pull", f"{REPOSITORY}:Q8_0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 30
        while not any(path.stat().st_size for path in models.unfinished_downloads()):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=30)
    assert process.returncode == 130 and out == ""
    assert error.splitlines()[1:] == ["interrupted: the same command goes on from there"]
    assert Path(pull(f"{REPOSITORY}:Q8_0")[0].strip()).read_bytes() == data
    assert hub.bodies()[1].startswith("bytes=")


def test_a_disk_that_is_full_in_the_middle_is_exit_8(hub: Hub, data: bytes, run: Callable[..., object]) -> None:
    def small() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(data) // 2, len(data) // 2))

    result = run("pull", "-q", f"{REPOSITORY}:Q8_0", preexec_fn=small)
    assert result.returncode == 8 and "make room" in result.stderr and "MB more are needed" in result.stderr  # type: ignore[attr-defined]
    assert models.model_names() == ["metaalign-demo"]


def test_a_cache_that_cannot_be_written_is_exit_8(hub: Hub, refuses: Refuses, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", "/dev/null/hub")
    assert "HF_HOME" in refuses(8, "pull", "-q", f"{REPOSITORY}:Q8_0")


def test_a_model_that_is_damaged_says_how_to_get_a_new_one(hub: Hub, data: bytes, refuses: Refuses, pull: Pull) -> None:
    keep(models.hub_folder(), REPOSITORY, "tiny-Q8_0.gguf", data[: len(data) // 2])
    assert f"models rm {REPOSITORY}" in refuses(5, "pull", REPOSITORY)


@pytest.mark.slow
def test_two_at_once_download_it_once(hub: Hub, data: bytes) -> None:
    command = [sys.executable, "-m", "metaalign_edge", "pull", "-q", f"{REPOSITORY}:Q8_0"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = {process.communicate(timeout=60)[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0] and len(paths) == 1
    assert Path(paths.pop()).read_bytes() == data and len(hub.bodies()) == 1


def test_a_terminal_shows_how_far_it_is(hub: Hub) -> None:
    hub.tricks = ["wait"]
    terminal = Terminal("pull", f"{REPOSITORY}:Q8_0", kind="xterm-256color")
    terminal.until("Q8_0 \x1b")
    hub.gate.set()
    assert terminal.rest().splitlines()[-1].endswith("tiny-Q8_0.gguf")
    assert terminal.leave() == 0


def test_a_dumb_terminal_and_a_narrow_one_are_no_trouble(hub: Hub) -> None:
    terminal = Terminal("pull", f"{REPOSITORY}:Q8_0", columns=20)
    assert os.path.basename(terminal.rest().strip()) == "tiny-Q8_0.gguf"
    assert terminal.leave() == 0
