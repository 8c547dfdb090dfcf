"""Many rows: answered together, written at once, and never twice, whatever happens in between."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., "subprocess.CompletedProcess[str]"]
TOPICS = "the moon,tea,bread,a bicycle,rain,honey,a volcano,a clock".split(",")
WISHES = ["@json", "one sentence", "Answer in capital letters.", "Answer as a numbered list."]
COMMAND = [sys.executable, "-m", "metaalign_edge", "batch"]


def rows(count: int = 16) -> list[dict[str, Any]]:
    return [
        {"id": f"row {place}", "query": f"What is {TOPICS[place % 8]}?", "pref": WISHES[place % 4]}
        for place in range(count)
    ]


def write(path: Path, found: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in found))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_are_answered_as_chat_answers_them_and_stand_in_order(here: Run, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", rows()), tmp_path / "out.jsonl"
    done = here("batch", str(source), "-o", str(out), "--temp", "0", "--parallel", "5")
    assert (done.returncode, done.stdout) == (0, "") and "16 answered" in done.stderr
    found = read(out)
    assert [(row["index"], row["id"], row["error"]) for row in found] == [(i, f"row {i}", None) for i in range(16)]
    for row in found[:6]:
        alone = json.loads(here("chat", "--json", "--temp", "0", "--pref", row["user_info"], row["query"]).stdout)
        assert alone["response"] == row["response"] and alone.keys() - row.keys() == {"sampling"}


def test_without_a_file_rows_go_to_stdout_in_order_and_a_pipe_may_bring_them(here: Run) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows())
    done = here("batch", "-", "--temp", "0", "--parallel", "3", "-q", input=text)
    assert (done.returncode, done.stderr) == (0, "")
    assert [json.loads(line)["id"] for line in done.stdout.splitlines()] == [f"row {i}" for i in range(16)]


def test_system_is_the_same_field_as_system_info(here: Run) -> None:
    found = [{"query": "What is tea?", name: "Answer in capital letters."} for name in ("system", "system_info")]
    text = "".join(json.dumps(row) + "\n" for row in [*found, found[0] | found[1]])
    done = here("batch", "-", "--temp", "0", input=text)
    one, other, both = map(json.loads, done.stdout.splitlines())
    assert one["system_info"] == other["system_info"] == "Answer in capital letters."
    assert one["response"] == other["response"] and "are the same tier" in both["error"]
    assert (
        done.stderr.count("fields that mean nothing") == 0 and "3 rows: 2 answered, 0 before, 1 failed" in done.stderr
    )


def test_one_of_something_is_not_several(here: Run) -> None:
    assert "1 row: 1 answered" in here("batch", "-", input='{"query": "What is tea?"}').stderr
    assert "1 of 1 row failed" in here("batch", "-", input="{}").stderr


def test_a_row_says_everything_that_the_command_line_does_not(here: Run) -> None:
    turns = [{"query": "What is tea?", "response": "Tea is a drink."}]
    found = [
        {"query": "What is bread?", "user_info": "one sentence", "system_info": "Answer in capital letters.", "id": 7},
        {"query": "What is bread?", "pref": ["@caps", "one sentence"], "max_tokens": 3, "seed": 5, "system_info": ""},
        {"query": "And rain?", "turns": turns, "id": None},
        {"query": "What is tea?", "user_info": ""},
    ]
    standing = ("--system", "be kind", "--pref", "be formal", "--seed", "9")
    done = here("batch", "-", *standing, "--temp", "0", input="\n\n".join(map(json.dumps, found)))
    tiers, caps, turned, plain = map(json.loads, done.stdout.splitlines())
    assert (tiers["system_info"], tiers["user_info"], tiers["id"]) == (found[0]["system_info"], "one sentence", 7)
    assert tiers["response"].isupper() and tiers["seed"] == 9
    assert (caps["output_tokens"], caps["finish_reason"], caps["seed"], caps["system_info"]) == (3, "length", 5, "")
    assert caps["user_info"].endswith("\none sentence") and caps["user_info"] != "@caps\none sentence"
    assert (turned["user_info"], turned["query"], turned["id"]) == ("be formal", "And rain?", None)
    assert plain["user_info"] == "" and turned["input_tokens"] > plain["input_tokens"] + 8


BAD = {
    "a number without end": f'{{"query": "q", "seed": {"1" * 5000}}}', "no object": "[1]", "no JSON": "{'query': 1}", "no query": "{}", "an empty query": '{"query": " "}',
    "a query of another type": '{"query": 5}', "two preferences": '{"query": "q", "pref": "a", "user_info": "b"}',
    "an unknown profile": '{"query": "q", "pref": "@nobody"}', "a turn without an answer": '{"query": "q", "turns": [{"query": "a"}]}',
    "turns that are none": '{"query": "q", "turns": "a"}', "no number": '{"query": "q", "max_tokens": "5"}', "true": '{"query": "q", "seed": true}',
    "a negative number": '{"query": "q", "max_tokens": -5}', "a lone surrogate": '{"query": "\\ud800"}', "deep": "[" * 100_000,
    "too long": json.dumps({"query": "tea " * 3000}),
}  # fmt: skip


def test_a_bad_row_is_reported_with_its_line_and_the_rest_goes_on(here: Run, tmp_path: Path) -> None:
    found = [rows(1)[0], "", *BAD.values(), rows(2)[1]]
    source, out = write(tmp_path / "in.jsonl", found), tmp_path / "out.jsonl"
    with source.open("ab") as file:
        file.write(b'{"query": "caf\xe9"}\n')
    done = here("batch", str(source), "-o", str(out), "--temp", "0")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    written = read(out)
    assert [row["error"] is None for row in written] == [True, *[False] * len(BAD), True, False]
    assert [row["index"] for row in written] == list(range(len(BAD) + 3))
    for row, line in zip(written[1:-2], range(3, 99), strict=False):
        assert row["error"].startswith(f"line {line}: ") and f"{source}, {row['error']}" in done.stderr
    assert "not UTF-8" in written[-1]["error"] and f"line {len(BAD) + 4}: " in written[-1]["error"]


def test_a_mended_row_is_answered_and_no_other_again(here: Run, tmp_path: Path) -> None:
    good = rows(4)
    source, out = write(tmp_path / "in.jsonl", [*good[:2], "oops", good[3]]), tmp_path / "out.jsonl"
    command = ("batch", str(source), "-o", str(out))  # with a seed that is drawn
    assert here(*command).returncode == 1
    before = read(out)
    write(source, good)
    done = here(*command)
    assert done.returncode == 0 and "1 answered, 3 before" in done.stderr
    after = read(out)
    assert [after[place] for place in (0, 1, 3)] == [before[place] for place in (0, 1, 3)]
    assert after[2]["error"] is None and after[2]["query"] == good[2]["query"]
    write(source, [*good[:3], {"query": "What is honey?", "id": "another"}])
    assert "1 answered, 3 before" in here(*command).stderr and read(out)[3]["id"] == "another"


@pytest.mark.slow
def test_killed_at_any_moment_it_loses_no_row_and_repeats_none(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", rows(120)), tmp_path / "out.jsonl"
    command = [*COMMAND, str(source), "-o", str(out), "--temp", "0", "--parallel", "4", "-t", "1"]
    kept: dict[int, str] = {}
    for _ in range(40):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        deadline, enough = time.monotonic() + 30, len(kept) + 25
        while process.poll() is None and time.monotonic() < deadline:
            if out.exists() and out.read_bytes().count(b"\n") >= enough:
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        code = process.wait()
        lines = [line for line in out.read_text().splitlines(keepends=True) if line.endswith("\n")]
        for line in lines:
            index = json.loads(line)["index"]
            assert kept.setdefault(index, line) == line  # never another text, nor other figures
        assert len(lines) == len(kept)
        if code == 0:
            break
    assert code == 0 and [row["index"] for row in read(out)] == list(range(120))
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith((".", "in", "out"))) == [
        "in.jsonl",
        "out.jsonl",
    ]


def test_ctrl_c_keeps_what_is_finished_and_says_so(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", rows(400)), tmp_path / "out.jsonl"
    process = subprocess.Popen([*COMMAND, str(source), "-o", str(out), "-t", "1"], stderr=subprocess.PIPE, text=True)
    while not out.exists() or out.read_bytes().count(b"\n") < 5:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130 and "goes on from there" in error and error.count("\n") == 1
    assert 5 <= len(read(out)) < 400


@pytest.mark.slow
def test_the_rows_of_another_run_are_not_mixed_in(here: Run, tmp_path: Path, refuses: Callable[..., str]) -> None:
    source, out = write(tmp_path / "in.jsonl", rows(3)), tmp_path / "out.jsonl"
    command = ("batch", str(source), "-o", str(out))
    assert here(*command, "--temp", "0").returncode == 0
    before = out.read_bytes()
    assert "another run" in refuses(2, *command, "--temp", "1") and out.read_bytes() == before
    assert "another run" in refuses(2, *command, "--temp", "0", "--pref-strength", "2")
    assert here(*command, "--temp", "1", "--force").returncode == 0
    out.write_text("my notes\n")
    assert "something else" in refuses(2, *command) and out.read_text() == "my notes\n"
    assert "is the input" in refuses(2, "batch", str(source), "-o", str(source))
    assert "no file" in refuses(2, "batch", str(source), "-o", str(tmp_path))
    assert "cannot read" in refuses(3, "batch", str(tmp_path / "none.jsonl"))
    assert "cannot write" in refuses(8, "batch", str(source), "-o", str(tmp_path / "none" / "out.jsonl"))


def test_two_processes_do_not_write_the_same_file(tmp_path: Path, refuses: Callable[..., str]) -> None:
    source, out = write(tmp_path / "in.jsonl", rows(400)), tmp_path / "out.jsonl"
    process = subprocess.Popen([*COMMAND, str(source), "-o", str(out), "-q"])
    while not out.exists() or out.read_bytes().count(b"\n") < 2:
        assert process.poll() is None
        time.sleep(0.01)
    assert "another process" in refuses(2, "batch", str(source), "-o", str(out))
    process.kill()
    process.wait()


def test_a_disk_that_fills_is_exit_8_and_what_is_finished_stays(tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", rows(40)), tmp_path / "out.jsonl"

    def full() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))

    command = [*COMMAND, str(source), "-o", str(out), "--temp", "0"]
    done = subprocess.run(command, preexec_fn=full, capture_output=True, text=True)
    assert done.returncode == 8 and "goes on" in done.stderr and "Traceback" not in done.stderr
    whole = [line for line in out.read_text().splitlines(keepends=True) if line.endswith("\n")]
    assert len(whole) >= 3
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and f"{len(whole)} before" in done.stderr and len(read(out)) == 40


def test_nothing_to_do_loads_no_model(here: Run, tmp_path: Path) -> None:
    done = here("batch", "-", input="\n\n")
    assert (done.returncode, done.stdout) == (0, "") and "0 rows" in done.stderr
    source, out = write(tmp_path / "in.jsonl", rows(3)), tmp_path / "out.jsonl"
    assert here("batch", str(source), "-o", str(out)).returncode == 0
    done = here("batch", str(source), "-o", str(out), "-v")
    assert done.returncode == 0 and "3 before" in done.stderr and "loaded" not in done.stderr


def test_a_field_that_means_nothing_is_named(here: Run) -> None:
    done = here("batch", "-", input=json.dumps({**rows(1)[0], "perf": "x", "note": 1}))
    assert done.returncode == 0 and "note, perf" in done.stderr
