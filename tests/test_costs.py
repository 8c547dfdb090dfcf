"""What a call costs: where its time went can be seen. (What memory it takes: test_fit.)"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable

import pytest

import metaalign_edge as edge

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def test_laps_are_added_up_and_the_rest_is_other() -> None:
    watch = edge.Stopwatch()
    for _ in range(2):
        with watch("a lap"):
            time.sleep(0.01)
    with pytest.raises(ZeroDivisionError), watch("a failure"):
        time.sleep(0.01)
        1 / 0  # noqa: B018
    time.sleep(0.01)
    assert watch.laps["a lap"] >= 20 and watch.laps["a failure"] >= 10
    total, rest = re.fullmatch(r"(\d+) ms: start \d+, a lap \d+, a failure \d+, other (\d+)", str(watch)).groups()  # type: ignore[union-attr]
    assert int(rest) >= 10 and int(total) >= 40


def test_verbose_says_where_the_time_went(run: Run) -> None:
    (line,) = (one for one in run("chat", "-v", "What is tea?").stderr.splitlines() if one.startswith("time "))
    spent, memory = line.split("; ")
    total, *laps = (int(number) for number in re.findall(r"\d+", spent))
    names = re.findall(r"[a-z.]+(?= \d)", spent)[1:]
    assert names == ["start", "metadata", "llama.cpp", "model", "tokens", "context", "prompt", "answer", "other"]
    assert abs(sum(laps) - total) <= len(laps)
    assert re.fullmatch(r"memory \d{2,} MB at most", memory)
