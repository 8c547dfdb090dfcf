"""`chat` as a shell script sees it: streams, JSON, exit codes, signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., "subprocess.CompletedProcess[str]"]
COMMAND = [sys.executable, "-m", "metaalign_edge", "chat"]


def test_stdout_is_the_answer_and_nothing_else(run: Run, tiny: Path) -> None:
    result = run("chat", "-m", str(tiny), "-n", "8", "--temp", "0", "What is tea?")
    assert result.returncode == 0
    assert result.stderr == ""
    assert result.stdout.endswith("\n") and len(result.stdout) > 1


def test_streamed_whole_and_json_answers_are_the_same_text(here: Run, tiny: Path) -> None:
    arguments = ("chat", "-m", str(tiny), "-n", "12", "--seed", "7", "--pref", "short", "What is tea?")
    streamed, whole, document = here(*arguments), here(*arguments, "--no-stream"), here(*arguments, "--json")
    assert streamed.stdout == whole.stdout
    assert json.loads(document.stdout)["response"].rstrip("\n") == streamed.stdout.rstrip("\n")


def test_the_json_document_has_the_fields_of_the_contract(here: Run, tiny: Path) -> None:
    result = here(
        "chat",
        "-m",
        str(tiny),
        "-n",
        "5",
        "--temp",
        "0",
        "--json",
        "--system",
        "be kind",
        "--pref",
        "a",
        "--pref",
        "b",
        "tea?",
    )
    document = json.loads(result.stdout)
    assert list(document) == (
        "model template system_info user_info query response reasoning finish_reason input_tokens cached_tokens output_tokens "
        "load_ms first_token_ms duration_ms tokens_per_second seed truncated sampling".split()
    )
    assert (document["system_info"], document["user_info"], document["query"]) == ("be kind", "a\nb", "tea?")
    assert (document["template"], document["finish_reason"], document["output_tokens"]) == ("metaalign", "length", 5)
    assert document["model"] == "tiny.gguf" and isinstance(document["seed"], int)


def test_the_same_seed_gives_the_same_text_and_none_gives_another(here: Run, tiny: Path) -> None:
    arguments = ("chat", "-m", str(tiny), "-n", "20", "--temp", "1.5", "--json", "tea?")
    first = json.loads(here(*arguments).stdout)
    again = json.loads(here(*arguments, "--seed", str(first["seed"])).stdout)
    other = json.loads(here(*arguments).stdout)
    assert first["response"] == again["response"]
    assert first["seed"] != other["seed"]


def test_a_pipe_is_the_query_less_one_final_newline_and_goes_before_the_argument(here: Run, tiny: Path) -> None:
    def query(*arguments: str, input: str = "") -> str:
        said = here("chat", "-m", str(tiny), "-n", "1", "--json", *arguments, input=input).stdout
        return str(json.loads(said)["query"])

    assert query(input="What is tea?\n") == "What is tea?"
    assert query(input="two lines\n\n") == "two lines\n"
    assert query("Sum it up.", input="A text.\n") == "A text.\n\nSum it up."
    assert query("Only this.", "--no-stdin", input="never read") == "Only this."


def test_the_environment_gives_what_the_flags_do_not(here: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAALIGN_EDGE_MODEL", str(tiny))
    monkeypatch.setenv("METAALIGN_EDGE_MAX_TOKENS", "2")
    monkeypatch.setenv("METAALIGN_EDGE_SEED", "1")  # a random model may end at once
    monkeypatch.setenv("METAALIGN_EDGE_PREF", "two words, not split")
    document = json.loads(here("chat", "--json", "tea?").stdout)
    assert (document["model"], document["output_tokens"], document["user_info"]) == (
        "tiny.gguf",
        2,
        "two words, not split",
    )
    document = json.loads(here("chat", "--json", "--pref", "flag", "-n", "3", "tea?").stdout)
    assert (document["output_tokens"], document["user_info"]) == (3, "flag")


def test_the_tiers_come_from_files_too(here: Run, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "system.txt").write_text("be kind\n")
    (tmp_path / "pref.txt").write_text("short\nplease\n")
    files = (
        "--system-file",
        str(tmp_path / "system.txt"),
        "--pref",
        "first",
        "--pref-file",
        str(tmp_path / "pref.txt"),
    )
    document = json.loads(here("chat", "-m", str(tiny), "-n", "1", "--json", *files, "tea?").stdout)
    assert (document["system_info"], document["user_info"]) == ("be kind", "first\nshort\nplease")


def test_a_stop_text_ends_the_answer_before_it(here: Run, tiny: Path) -> None:
    arguments = ("chat", "-m", str(tiny), "-n", "30", "--temp", "0", "--json", "tea?")
    text = json.loads(here(*arguments).stdout)["response"]
    stop = text[10:13]
    document = json.loads(here(*arguments, "--stop", stop).stdout)
    assert (document["response"], document["finish_reason"]) == (text[: text.index(stop)], "stop")


def test_verbose_says_what_was_chosen_and_why(run: Run, tiny: Path) -> None:
    result = run("chat", "-m", str(tiny), "-n", "2", "--seed", "5", "-vv", "tea?")
    assert "template metaalign, native: the model was tuned on it" in result.stderr
    assert "on the CPU" in result.stderr and "seed 5" in result.stderr
    assert result.stderr.count(" general.architecture str") == 1  # of llama.cpp's own log
    assert "create_tensor" not in result.stderr and "set_abort_callback" not in result.stderr  # llama.cpp's debugging


def test_a_closed_pipe_ends_quietly_with_0(slow: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "-m", str(slow), "-n", "3000", "--temp", "0", "tea?"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout and process.stderr
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(timeout=30) == 0
    assert process.stderr.read() == b""


def test_a_full_disk_behind_stdout_is_exit_8(tiny: Path) -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [*COMMAND, "-m", str(tiny), "-n", "2", "tea?"],
            stdin=subprocess.DEVNULL,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert result.returncode == 8
    assert result.stderr == "metaalign-edge: cannot write to stdout: No space left on device\n"


@pytest.mark.parametrize("closed, code", [("<&-", 0), (">&-", 8), ("2>&-", 0)])
def test_a_closed_stream_is_no_traceback(tiny: Path, closed: str, code: int) -> None:
    line = f"{sys.executable} -m metaalign_edge chat -m {tiny} -n 2 tea? {closed}"
    result = subprocess.run(["sh", "-c", line], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr and result.stderr.count("\n") <= 1


def interrupted(
    arguments: list[str], after: Callable[[subprocess.Popen[bytes]], None], text: bytes = b""
) -> tuple[int, bytes, bytes, float]:
    process = subprocess.Popen(
        [*COMMAND, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin and process.stdout and process.stderr
    process.stdin.write(text)
    process.stdin.close()
    after(process)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, error = process.stdout.read(), process.stderr.read()
    return process.wait(timeout=30), out, error, time.monotonic() - started


def test_ctrl_c_stops_a_generation_keeps_what_was_said_and_exits_130(slow: Path) -> None:
    def some_text(process: subprocess.Popen[bytes]) -> None:
        assert process.stdout
        first.append(process.stdout.read(20))

    first: list[bytes] = []
    code, rest, error, seconds = interrupted(["-m", str(slow), "-n", "8000", "--temp", "0", "tea?"], some_text)
    assert (code, error) == (130, b"")
    assert len(first[0]) == 20 and (first[0] + rest).endswith(b"\n")
    assert seconds < 5


def test_ctrl_c_stops_a_prefill_at_once_and_json_says_so(slow: Path) -> None:
    def reading(process: subprocess.Popen[bytes]) -> None:
        stat = Path(f"/proc/{process.pid}/stat")
        if not stat.exists():  # not Linux
            time.sleep(2.5)
            return
        spent, start = 0, 1.5 * os.sysconf("SC_CLK_TCK")  # a start takes a third of that; the prompt, seconds
        while spent < start:
            assert process.poll() is None
            spent = sum(map(int, stat.read_text().rpartition(")")[2].split()[11:13]))
            time.sleep(0.02)

    code, out, error, seconds = interrupted(["-m", str(slow), "-ngl", "0", "--json"], reading, b"zoo " * 6000)
    document = json.loads(out)
    assert (code, error) == (130, b"")
    assert (document["finish_reason"], document["output_tokens"], document["response"]) == ("interrupted", 0, "")
    assert seconds < 5
