"""What the tests share: a re-homed user, no network, a tiny real model, and a runner for real subprocesses."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import checkpoints
from helpers.gguf_files import copy_model, types

import metaalign_edge as edge
from metaalign_edge_runtime.llama import library
from metaalign_edge_runtime.stores import models

TASTES = (
    "EDITOR",
    "VISUAL",
    "PAGER",
    "LESS",
    "NO_COLOR",
    "FORCE_COLOR",
    "GITHUB_ACTIONS",
)  # typer takes the last for one
for name in list(os.environ):  # of the machine's user; libraries read some of them once, when they are imported
    if name in TASTES or (name.startswith(("METAALIGN_EDGE_", "HF_")) and not name.endswith("_REFERENCE")):
        del os.environ[name]

ROOT = Path(__file__).resolve().parent.parent
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(autouse=True, scope="session")
def obey_ctrl_c() -> None:
    """Undo what a shell does to its background jobs: a child of them would ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def nobody(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the settings of the machine's user from what is made once for all tests, before they are at home."""
    with pytest.MonkeyPatch.context() as patch:
        for kind in ("CACHE", "CONFIG", "DATA"):
            patch.setenv(f"METAALIGN_EDGE_{kind}", str(tmp_path_factory.getbasetemp() / "nobody" / kind.lower()))
        patch.setenv("METAALIGN_EDGE_PROJECT", "0")
        yield


@pytest.fixture(autouse=True)
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every test a home of its own, and no variables of the machine's user."""
    for name in [
        name for name in os.environ if name.startswith(("METAALIGN_EDGE_", "HF_")) and not name.endswith("_REFERENCE")
    ]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in [name for name in os.environ if name.startswith("XDG_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("METAALIGN_EDGE_PROJECT", "0")
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse connections to anything but this machine."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test reached for the network: {address}")
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of some kilobytes whose tokenizer has the tier tokens."""
    return checkpoints.make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", max_position_embeddings=512)


@pytest.fixture(scope="session")
def tiny(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That checkpoint as a GGUF, made by the command that users have."""
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    assert edge.run(["convert", str(checkpoint), "-o", str(path), "--outtype", "f32", "-q"]) == 0
    return path


@pytest.fixture(scope="session")
def demo() -> Path:
    """The embedded default model."""
    return models.embedded_model()


@pytest.fixture
def run() -> Run:
    """Run the installed command in a process of its own; `input` is its stdin, empty by default."""

    def start(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
        options = {"input": "", "capture_output": True, "text": True, "timeout": 120, **options}
        return subprocess.run([sys.executable, "-m", "metaalign_edge", *arguments], **options)  # type: ignore[call-overload]

    return start


@pytest.fixture
def here(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Do as `run`, in this process: a tenth of the time, for what needs no process of its own."""

    def start(*arguments: str, input: str | bytes = "") -> subprocess.CompletedProcess[str]:
        stdin = input if isinstance(input, bytes) else input.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        return subprocess.CompletedProcess(arguments, edge.run(arguments), *capfd.readouterr())

    return start


@pytest.fixture
def fails(run: Run) -> Callable[..., str]:
    """Run a command that must fail with this exit code and one line on stderr; return the line."""
    return lambda code, *arguments, **options: refusal(code, run(*arguments, **options))


@pytest.fixture
def refuses(here: Run) -> Callable[..., str]:
    """Do as `fails`, in this process: for what is refused before any model is loaded."""
    return lambda code, *arguments, **options: refusal(code, here(*arguments, **options))


@pytest.fixture
def says(here: Run) -> Callable[..., tuple[str, str]]:
    """Run a command in this process that must succeed; return what it wrote to stdout and to stderr."""

    def call(*arguments: str, stdin: bytes = b"") -> tuple[str, str]:
        result = here(*arguments, input=stdin)
        assert result.returncode == 0, result.stderr
        return result.stdout, result.stderr

    return call


def refusal(code: int, result: subprocess.CompletedProcess[str]) -> str:
    """Return what a command said that failed with this exit code: one line, no traceback, and nothing on stdout."""
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute attention in 32 bits: random weights have near ties, which the usual 16 bits decide one way or another."""
    llama = library.llama_cpp()
    usual = llama.llama_context_default_params

    def params() -> Any:
        found = usual()
        found.type_k = found.type_v = 0  # GGML_TYPE_F32
        found.flash_attn_type = 0  # LLAMA_FLASH_ATTN_TYPE_DISABLED
        return found

    monkeypatch.setattr(llama, "llama_context_default_params", params)


@pytest.fixture(scope="session")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model large enough to be interrupted: some seconds for a long prompt, and an answer without end."""
    folder = tmp_path_factory.mktemp("slow")
    size = {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 64,
    }
    checkpoint = checkpoints.make_checkpoint(folder / "slow", dtype="BF16", max_position_embeddings=16384, **size)
    assert (
        edge.run(["convert", str(checkpoint), "-o", str(folder / "slow.gguf"), "--outtype", "bf16", "-q", "--no-check"])
        == 0
    )
    return folder / "slow.gguf"


@pytest.fixture(scope="session")
def parts(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """That model in three parts."""
    path = tmp_path_factory.mktemp("parts") / "tiny-Q8_0.gguf"
    copy_model(tiny, path, part=-(-len(types(tiny)) // 3))
    return sorted(path.parent.glob("*.gguf"))
