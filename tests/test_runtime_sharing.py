"""A model that several threads use, is closed or forked meanwhile, or has a time limit: an answer or an error, no crash.

A crash or a deadlock would take the tests along, so each of these programs is a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from metaalign_edge import AnswerTimeout, Model, UsageError, compare, generate, stream

BEGIN = """
import asyncio, os, signal, sys, threading, time
from metaalign_edge import AnswerTimeout, Model, compare, generate, stream
path, long = sys.argv[1], {"max_tokens": 9000, "temperature": 0}

def ask(model, **options):
    try:
        return generate(model, "What is tea?", **{**long, **options}).finish_reason
    except (RuntimeError, TimeoutError) as error:
        return f"{type(error).__name__}: {error}"

def child(work):
    sys.stdout.flush()
    if (process := os.fork()) == 0:
        signal.alarm(100)  # ends a child that hangs
        print("child:", work(), flush=True)
        os._exit(0)
    assert os.waitpid(process, 0)[1] == 0
"""


def said(program: str, model: Path) -> list[str]:
    """Run a program that begins so; return the lines that it prints."""
    command = [sys.executable, "-c", BEGIN + program, str(model)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.splitlines()


def test_closing_a_model_stops_the_answers_of_other_threads(slow: Path) -> None:
    program = """
for moment in range(12):  # from before the context is made to the middle of an answer
    heard = []
    with Model.open(path, threads=1 + moment % 2, context=2048) as model:
        threads = [threading.Thread(target=lambda: heard.append(ask(model, max_tokens=1500))) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(moment * 0.03)
    for thread in threads:
        thread.join()
    print(*set(heard))
"""
    assert said(program, slow) == ["RuntimeError: the model is closed"] * 12


def test_two_threads_may_close_a_model_at_the_same_time(tiny: Path) -> None:
    program = """
for _ in range(20):
    model = Model.open(path)
    ask(model, max_tokens=2)
    threads = [threading.Thread(target=model.close) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(model.pointer)
"""
    assert said(program, tiny) == ["None"] * 20


def test_a_task_that_is_given_up_and_a_model_that_is_left_do_not_crash(slow: Path) -> None:
    program = """
async def main():
    with Model.open(path, threads=1) as model:
        writing = asyncio.create_task(asyncio.to_thread(ask, model))
        await asyncio.sleep(0.3)
        writing.cancel()
        try:
            await writing
        except asyncio.CancelledError:
            print("cancelled")

asyncio.run(main())
"""
    assert said(program, slow) == ["cancelled"]


def test_a_signal_handler_that_closes_the_model_stops_the_answer(slow: Path) -> None:
    program = """
def closes(*_):
    try:
        model.close()
    except RuntimeError as error:
        print(error)

model = Model.open(path, threads=1)
signal.signal(signal.SIGALRM, closes)
signal.setitimer(signal.ITIMER_REAL, 0.5)
print(ask(model))
model.close()
print(model.pointer)
"""
    *perhaps, error, pointer = said(program, slow)  # between two steps the handler can close it at once
    assert (error, pointer) == ("RuntimeError: the model is closed", "None")
    assert not perhaps or "in this very thread" in perhaps[0]


def test_any_thread_may_close_a_stream(slow: Path) -> None:
    with Model.open(slow, threads=1, context=4096) as model:
        usual = generate(model, "And bread?", max_tokens=5, temperature=0).response
        for already in (0, 1, 5):
            pieces, begun = stream(model, "What is tea?", max_tokens=3900, temperature=0), threading.Event()
            read: list[str] = []

            def reader(pieces: object = pieces, read: list[str] = read, begun: threading.Event = begun) -> None:
                begun.set()
                read.extend(pieces)  # type: ignore[call-overload]

            for _ in range(already):
                next(pieces)
            thread = threading.Thread(target=reader)
            thread.start()
            begun.wait()
            pieces.close()
            thread.join()
            assert list(pieces) == []
            assert generate(model, "And bread?", max_tokens=5, temperature=0).response == usual


def test_a_wait_for_another_answer_can_be_closed_and_has_an_end(slow: Path) -> None:
    with Model.open(slow, threads=1, context=1024) as model:
        first = stream(model, "What is tea?", max_tokens=900, temperature=0)
        next(first)
        heard: list[object] = []

        def wait() -> None:
            with pytest.raises(AnswerTimeout) as caught:
                generate(model, "And bread?", timeout=0.01)
            heard.append(caught.value.answers)

        waiting = threading.Thread(target=wait)
        waiting.start()
        waiting.join()
        second = stream(model, "And bread?", max_tokens=5)
        reader = threading.Thread(target=lambda: heard.append(list(second)))
        reader.start()
        second.close()
        reader.join()
        assert heard == [[], []]
        first.close()
        assert generate(model, "And bread?", max_tokens=5).output_tokens == 5


def test_a_stream_that_threads_read_in_turn_is_nobodys_own(demo: Path) -> None:
    with Model.open(demo) as model:
        usual = generate(model, "What is tea?", temperature=0).response
        pieces = stream(model, "What is tea?", temperature=0)
        read = [next(pieces)]
        other = threading.Thread(target=lambda: read.append(next(pieces)))
        other.start()
        other.join()
        rest = threading.Timer(0.1, lambda: read.extend(pieces))
        rest.start()
        assert generate(model, "What is tea?", temperature=0).response == usual  # waits for the reader of the rest
        rest.join()
        assert "".join(read) == usual


def test_when_time_is_up_there_is_what_was_written(slow: Path) -> None:
    with Model.open(slow, threads=1, context=12000) as model:
        generate(model, "What is tea?", max_tokens=1)
        read = []
        with pytest.raises(TimeoutError, match=r"not complete after 0.5 seconds") as caught:
            for piece in stream(model, "What is tea?", max_tokens=9000, temperature=0, timeout=0.5):
                read.append(piece)
        (answer,) = caught.value.answers
        assert answer.finish_reason == "interrupted" and answer.output_tokens > 0
        assert answer.response == "".join(read) and answer.duration_ms > 0
        with pytest.raises(AnswerTimeout) as caught:  # while it reads
            generate(model, "zoo " * 8000, timeout=0.3)
        assert [(one.finish_reason, one.output_tokens) for one in caught.value.answers] == [("interrupted", 0)]
        with pytest.raises(AnswerTimeout) as caught:
            compare(model, "What is tea?", ["short", "long"], max_tokens=3000, temperature=0, timeout=1)
        assert [one.user_info for one in caught.value.answers] == ["short", "long"]
        assert {one.finish_reason for one in caught.value.answers} == {"interrupted"}
        for seconds in (0, 0.0):
            with pytest.raises(AnswerTimeout):
                generate(model, "tea?", timeout=seconds)
        for wrong in (-1, float("nan")):
            with pytest.raises(UsageError, match="timeout takes a number of seconds"):
                generate(model, "tea?", timeout=wrong)
        for enough in (1e9, float("inf"), None):
            assert generate(model, "tea?", max_tokens=2, timeout=enough).output_tokens == 2


def test_a_model_that_answered_before_a_fork_is_refused_in_the_child(tiny: Path) -> None:
    program = """
model = Model.open(path, threads=2)
print(ask(model, max_tokens=2))
pieces = stream(model, "What is tea?", max_tokens=400)
next(pieces)
def refused():
    heard = [ask(model), *(ask(model) for _ in range(2))]
    model.close()
    pieces.close()
    return set(heard)
child(refused)
pieces.close()
print(ask(model, max_tokens=2))
"""
    refusal = "RuntimeError: the model was opened before a fork: open it in the child process"
    assert said(program, tiny) == ["length", f"child: { {refusal} }", "length"]


def test_a_child_of_a_fork_opens_its_own_model_or_uses_one_that_nobody_has_used(tiny: Path) -> None:
    program = """
def own():
    with Model.open(path, threads=2) as model:
        return ask(model, max_tokens=9)
def unused():
    heard = ask(model, max_tokens=9)
    model.close()
    return heard, model.pointer
model = Model.open(path, threads=2)
child(own)
child(unused)
print(own())
child(own)
child(unused)
print(ask(model, max_tokens=9))
"""
    lines = ["child: length", "child: ('length', None)", "length"] * 2
    assert said(program, tiny) == lines
