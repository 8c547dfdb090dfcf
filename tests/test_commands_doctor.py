"""`doctor` looks at everything that an answer needs, and lives through what it finds."""

from __future__ import annotations

import http.server
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.gguf_files import copy_model
from helpers.terminal import Terminal

import metaalign_edge as edge
from metaalign_edge import Settings
from metaalign_edge_commands.measure import health
from metaalign_edge_commands.measure.health import Examination
from metaalign_edge_runtime.errors import EdgeError, LoadError
from metaalign_edge_runtime.llama.gguf import ModelFile

Run = Callable[..., "subprocess.CompletedProcess[str]"]
NAMES = (
    "program llama.cpp devices processor memory model template first_token fit cache config data terminal hub".split()
)
Found = dict[str, tuple[str, str]]  # by name, the status and the detail


def found(document: str) -> Found:
    """Read what --json printed."""
    (checks,) = json.loads(document).values()
    assert [check["name"].replace(" ", "_") for check in checks] == NAMES
    assert all(check.keys() == {"name", "status", "detail"} and check["detail"] for check in checks)
    return {check["name"]: (check["status"], check["detail"]) for check in checks}


@pytest.fixture
def look(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Found]:
    """Run the command in this process, and tell that its exit code is 1 if a check failed, else 0."""

    def run(*arguments: str) -> Found:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
        code = edge.run(["doctor", "--json", *arguments])
        out, error = capfd.readouterr()
        checks = found(out)
        failed = sum(status == "failed" for status, _ in checks.values())
        assert (code, error) == ((1, f"metaalign-edge: {failed} of 14 checks failed\n") if failed else (0, ""))
        return checks

    return run


@pytest.mark.parametrize("line", ["max_token = 1", "max_tokens = 0", "[model", 'model = "gone.gguf"', "ctx_size = 1"])
def test_settings_that_are_wrong_are_a_line_and_keep_nothing_else_from_being_looked_at(
    line: str, look: Callable[..., Found], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METAALIGN_EDGE_CONFIG", str(tmp_path))
    (tmp_path / "config.toml").write_text(f"{line}\n")
    checks = look()
    status, detail = checks["config"]
    assert status == "failed" and str(tmp_path / "config.toml") in detail
    assert checks["llama.cpp"][0] == checks["data"][0] == "ok"


@pytest.fixture
def examination(tiny: Path) -> Examination:
    return Examination(str(tiny), Settings(threads=1), network=False)


def library(folder: Path, body: str) -> Path:
    """Compile a libllama that does something as soon as it is loaded; return its folder."""
    folder.mkdir()
    (folder / "llama.c").write_text(
        f"#include <signal.h>\n#include <unistd.h>\n__attribute__((constructor)) static void begin(void) {{ {body} }}\n"
    )
    name = "libllama.dylib" if sys.platform == "darwin" else "libllama.so"
    compiler = os.environ.get("CC") or shutil.which("cc") or "c++"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(folder / name), str(folder / "llama.c")], check=True)
    return folder


def test_everything_is_looked_at_and_nothing_has_failed(run: Run, demo: Path) -> None:
    result = run("doctor", "--json")
    assert (result.returncode, result.stderr) == (0, "")
    checks = found(result.stdout)
    assert {status for status, _ in checks.values()} <= {"ok", "warning"}
    details = {name: detail for name, (_, detail) in checks.items()}
    assert edge.__version__ in details["program"] and sys.executable in details["program"]
    assert (
        "0.3.36" in details["llama.cpp"]
        and ", for CPU, " in details["llama.cpp"]
        and "CPU" in details["devices"]
        and "GB" in details["memory"]
    )
    assert str(demo) in details["model"] and "native" in details["template"]
    assert "a token is decoded" in details["first token"] and "-c auto would take 1,024" in details["fit"]
    assert str(Path(os.environ["HOME"])) in details["cache"] and "0 states" in details["cache"]
    assert "pipe" in details["terminal"] and "not asked" in details["hub"]


def test_off_a_terminal_a_check_is_a_line(here: Run, tiny: Path) -> None:
    lines = here("doctor", "-m", str(tiny)).stdout.splitlines()
    assert [line[9:21].strip().replace(" ", "_") for line in lines] == NAMES
    assert {line.split()[0] for line in lines} <= {"ok", "warning"}


def test_an_illegal_instruction_is_a_line_in_the_table(run: Run, tmp_path: Path) -> None:
    broken = library(tmp_path / "broken", "raise(SIGILL);")
    result = run("doctor", "--json", env={**os.environ, "LLAMA_CPP_LIB_PATH": str(broken)})
    assert (result.returncode, result.stderr) == (1, "metaalign-edge: 1 of 14 checks failed\n")
    checks = found(result.stdout)
    status, detail = checks["llama.cpp"]
    assert (
        status == "failed" and "SIGILL, an instruction that this processor lacks" in detail and "pip install" in detail
    )
    assert checks["devices"][0] == checks["first token"][0] == "warning" and "not tried" in checks["first token"][1]
    assert checks["model"][0] == checks["template"][0] == checks["fit"][0] == "ok"


@pytest.mark.parametrize("body, said", [("pause();", "no answer within 1 seconds"), ("_exit(3);", "it ends with 3"), ("_exit(0);", "it ends with 0: without a word"), ("raise(SIGKILL);", "SIGKILL, most likely for want of memory"), ("", "llama_")])  # fmt: skip
def test_a_library_that_hangs_leaves_dies_or_is_another_is_named(
    body: str, said: str, examination: Examination, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(library(tmp_path / "broken", body)))
    monkeypatch.setattr(
        "metaalign_edge_commands.measure.health.START_SECONDS", 1.0 if body.startswith("pause") else 60.0
    )
    with pytest.raises(EdgeError, match=f"it does not load: .*{said}"):
        health.check_llama(examination)


def test_no_library_at_all_is_named(examination: Examination, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
    with pytest.raises(EdgeError, match=r"it does not load: .*reinstall"):
        health.check_llama(examination)


def test_another_version_of_the_binding_is_a_warning(examination: Examination, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.0.1")
    status, detail = health.check_llama(examination)
    assert status == "warning" and "pip install llama-cpp-python==0.3.36" in detail


def test_a_model_that_is_missing_or_broken_is_a_failed_line(
    look: Callable[..., Found], tiny: Path, tmp_path: Path
) -> None:
    checks = look("-m", str(tmp_path / "none.gguf"))
    assert [name for name, (status, _) in checks.items() if status == "failed"] == [
        "model",
        "template",
        "first token",
        "fit",
    ]
    assert "no model file" in checks["model"][1] and "there is no model" in checks["first token"][1]
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny.read_bytes()[:-1000])
    checks = look("-m", str(cut))
    assert [name for name, (status, _) in checks.items() if status == "failed"] == ["first token"]
    assert str(cut) in checks["first token"][1]


def test_a_model_without_a_template_is_a_warning_and_a_bad_template_a_failure(
    tiny: Path, tmp_path: Path, examination: Examination
) -> None:
    examination.file = ModelFile(copy_model(tiny, tmp_path / "bare.gguf", drop=["tokenizer.chat_template"]))
    assert health.check_template(examination) == ("warning", "the model carries none: give one with --template")
    changed = copy_model(
        tiny,
        tmp_path / "bad.gguf",
        drop=["tokenizer.chat_template"],
        add={"tokenizer.chat_template": "{{ messages[9].x }}"},
    )
    checks = dict(check[:2] for check in health.run_checks(Examination(str(changed), Settings(threads=1), False)))
    assert checks["template"] == checks["first token"] == "failed" and checks["fit"] == "ok"


def test_what_does_not_fit_has_failed_and_what_crawls_is_a_warning(
    examination: Examination, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    health.check_model(examination)
    (need,) = edge.plan_for(ModelFile(tiny), examination.settings, []).needs
    assert health.check_fit(examination)[0] == "ok"
    monkeypatch.setattr("metaalign_edge_runtime.llama.memory.free_memory", lambda: need.cache + need.compute + 1.0)
    assert health.check_fit(examination)[0] == "warning" and "quantization" in health.check_fit(examination)[1]
    monkeypatch.setattr("metaalign_edge_runtime.llama.memory.free_memory", lambda: need.cache + need.compute - 1.0)
    with pytest.raises(LoadError, match=r"-c \d+ would fit"):
        health.check_fit(examination)


def test_devices_are_listed_and_one_that_is_not_used_is_pointed_out(
    examination: Examination, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert health.check_devices(examination)[0] == "warning"  # llama.cpp has not been looked at
    processor = ["CPU", "a processor", 0, 8 * 10**9, 16 * 10**9]
    examination.facts = {"offloads": True, "features": "", "devices": [processor]}
    assert health.check_devices(examination) == (
        "warning",
        "none, though this build of llama.cpp has a backend for one: look at the driver",
    )
    examination.facts["devices"] = [processor, ["CUDA0", "a card", 1, 7 * 10**9, 8 * 10**9], ["iGPU", "chip", 2, 1, 1]]
    assert health.check_devices(examination) == ("ok", "CUDA0 (a card), 7.0 GB of 8.0 GB free")
    health.check_model(examination)
    assert (
        "3 of 3 layers on the GPU" in health.check_fit(examination)[1]
        and "free on CUDA0" in health.check_fit(examination)[1]
    )
    examination.facts["offloads"] = False
    monkeypatch.setattr("metaalign_edge_commands.measure.health.unused_gpu", lambda: None)
    assert health.check_devices(examination) == ("ok", "the CPU alone: this build of llama.cpp has no GPU")
    monkeypatch.setattr("metaalign_edge_commands.measure.health.unused_gpu", lambda: ("an NVIDIA GPU", "GGML_CUDA"))
    assert health.check_devices(examination)[0] == "warning" and "GGML_CUDA=on" in health.check_devices(examination)[1]


def test_instructions_that_the_build_has_and_the_processor_lacks_are_named(examination: Examination) -> None:
    assert health.check_processor(examination)[0] == "ok"
    strange = (
        "NEON = 1 | AVX2 = 1 | SVE = 1 | AVX512 = 1 | MATMUL_INT8 = 1 | AMX_INT8 = 1"  # no processor has both kinds
    )
    examination.facts = {"features": f"CPU : {strange} | "}
    status, detail = health.check_processor(examination)
    assert status == "warning" and "but the processor lacks" in detail
    examination.facts = {"features": "CPU : OPENMP = 1 | "}
    status, detail = health.check_processor(examination)
    assert status == "warning" and "any processor, not for" in detail


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path: Path, run: Run) -> None:
    assert health.check_folder(tmp_path / "a" / "b", "X")[0] == "ok" and not (tmp_path / "a").exists()
    assert "to be made" in health.check_folder(tmp_path / "a" / "b", "X")[1]
    for folder in (Path(os.devnull) / "x", Path("/proc/x") if sys.platform == "linux" else Path(os.devnull) / "y"):
        status, detail = health.check_folder(folder, "METAALIGN_EDGE_CACHE")
        assert status == "warning" and "METAALIGN_EDGE_CACHE names another" in detail
    without = {name: value for name, value in os.environ.items() if name != "HOME"} | {
        "METAALIGN_EDGE_DATA": "/dev/null/x",
        "METAALIGN_EDGE_CACHE": str(tmp_path / "cache"),  # not those of the machine's user
        "METAALIGN_EDGE_CONFIG": str(tmp_path / "config"),
    }
    checks = found(run("doctor", "--json", env=without).stdout)
    assert checks["data"][0] == "warning" and "/dev/null/x" in checks["data"][1]


def test_a_narrow_and_dumb_terminal_gets_lines_that_fit(tiny: Path) -> None:
    terminal = Terminal("doctor", "-m", str(tiny), columns=20)
    screen = terminal.rest()
    assert terminal.leave() == 0
    words = {line.strip() for line in screen.splitlines() if len(line) > 20}
    assert all(" " not in word for word in words)  # paths, say
    assert "dumb, 20 columns,\n  no colours" in screen and "\x1b" not in screen


def test_a_wide_terminal_gets_a_table(tiny: Path) -> None:
    terminal = Terminal("doctor", "-m", str(tiny), columns=70, kind="xterm-256color")
    lines = re.sub(r"\r[^\r\n]*\r", "", terminal.rest()).splitlines()  # without what was erased
    assert terminal.leave() == 0
    heads = [line for line in lines if not line.startswith(" ")]
    assert [line[9:20].strip().replace(" ", "_") for line in heads] == NAMES and len(lines) > len(heads)
    assert all(line.startswith(" " * 22) for line in lines if line not in heads)


def test_an_encoding_that_lacks_letters_is_a_warning(run: Run, tiny: Path) -> None:
    plain = {**os.environ, "LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    result = run("doctor", "--json", "-m", str(tiny), env=plain)
    assert result.returncode == 0 and found(result.stdout)["terminal"][0] == "warning"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A hub on this machine; yields what it is asked. It answers HEAD with the status that HF_ENDPOINT ends with."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(f"{self.command} {self.path}")
            self.send_response(int(self.path[1:]))
            self.send_header("Location", "/200")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as hub:
        threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.server_port}/200")
        yield asked
        hub.shutdown()


def test_the_hub_is_asked_once_and_only_if_that_is_wanted(
    server: list[str], examination: Examination, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert health.check_hub(examination)[0] == "ok" and "--network" in health.check_hub(examination)[1] and server == []
    examination.network = True
    status, detail = health.check_hub(examination)
    assert status == "ok" and "answers 200 in" in detail and server == ["HEAD /200"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert (
        health.check_hub(examination) == ("ok", "offline, as HF_HUB_OFFLINE says: nothing is fetched")
        and len(server) == 1
    )
    monkeypatch.delenv("HF_HUB_OFFLINE")
    for code, level in ((302, "ok"), (404, "warning"), (503, "failed")):
        monkeypatch.setenv("HF_ENDPOINT", f"{os.environ['HF_ENDPOINT'].rpartition('/')[0]}/{code}")
        status, detail = health.check_hub(examination)
        assert status == level and "answers " in detail


def test_a_hub_that_cannot_be_reached_or_says_nothing_is_a_failed_line(
    examination: Examination, monkeypatch: pytest.MonkeyPatch
) -> None:
    examination.network = True
    monkeypatch.setattr("metaalign_edge_commands.measure.health.HUB_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for address in (f"http://127.0.0.1:{silent.getsockname()[1]}", "http://127.0.0.1:9"):
            monkeypatch.setenv("HF_ENDPOINT", address)
            with pytest.raises(EdgeError, match=f"{address} cannot be reached"):
                health.check_hub(examination)
    for address in ("file:///etc/hosts", "nonsense"):
        monkeypatch.setenv("HF_ENDPOINT", address)
        with pytest.raises(EdgeError, match="no address of a hub"):
            health.check_hub(examination)


def test_no_socket_is_opened_unless_it_is_asked_for(
    look: Callable[..., Found], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", forbidden)
    assert look()["hub"][0] == "ok"


@pytest.mark.parametrize("arguments", [("-c", "many"), ("-ngl", "some"), ("extra",), ("--nonsense",)])
def test_a_command_line_without_sense_is_exit_2(arguments: tuple[str, ...], refuses: Callable[..., str]) -> None:
    assert refuses(2, "doctor", *arguments)
