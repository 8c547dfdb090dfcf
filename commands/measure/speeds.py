"""Measuring how fast this machine runs a model, for `bench`."""

from __future__ import annotations

import functools
import math
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import metaalign_edge as edge
from metaalign_edge import BatchEntry, Dialog, Engine, Guidance, Model, SequenceState, Settings
from metaalign_edge_runtime.errors import EdgeError, one_line
from metaalign_edge_runtime.llama import memory
from metaalign_edge_runtime.llama.gguf import ModelFile
from metaalign_edge_runtime.llama.interrupt import Interrupt
from metaalign_edge_runtime.llama.library import Closing
from metaalign_edge_runtime.llama.vocabulary import ATTR_NORMAL

if TYPE_CHECKING:
    from metaalign_edge_preferences import report as pages

BENCH_PROMPT, BENCH_TOKENS = 512, 48  # tokens that a measurement reads, and writes
BENCH_PARALLEL = (2, 4, 8)  # sequences that write at the same time


@dataclass(frozen=True)
class Speeds:
    """A model's speeds on this machine: medians of several rounds."""

    model: str
    prefill_tps: float  # tokens per second, here and below
    decode_tps: float
    parallel: dict[str, float]  # of all sequences together, by the number of sequences
    guided_tps: float  # with a strength, that is two contexts
    first_token_ms: float  # whole call of `chat`: load, read a meta-prompt of BENCH_PROMPT tokens, write one token
    first_token_cached_ms: float  # the same with the meta-prompt's state in the cache
    peak_mb: float  # the most memory that such a call takes; 0 where the system does not say

    def rows(self) -> list[list[str]]:
        """Return the rows of a table: what was measured, the figure, its ratio to a base, the unit."""

        def line(what: str, figure: float, unit: str, base: float | None = None) -> list[str]:
            return [what, f"{figure:,.1f}", "" if base is None else f"{figure / base:.2f}", unit]

        call, alone = f"ms, a call with a meta-prompt of {BENCH_PROMPT} tokens", self.decode_tps
        return [
            line("read a prompt", self.prefill_tps, "tokens/s"),
            line("write an answer", alone, "tokens/s", alone),
            *(
                line(f"write {count} at a time", tps, "tokens/s together", alone)
                for count, tps in self.parallel.items()
            ),
            line("write with a strength", self.guided_tps, "tokens/s, two contexts", alone),
            line("first token", self.first_token_ms, call, self.first_token_ms),
            line("first token, cached", self.first_token_cached_ms, "ms, its state on the disk", self.first_token_ms),
            line("memory", self.peak_mb, "MB at most, of such a call"),
        ]

    def charts(self) -> list[pages.Chart]:
        """Return the speeds and the times as bars."""
        from metaalign_edge_preferences.report import Bar, Chart  # not at the top: a timed child imports this file

        found = []
        for title, unit, kind in (("Speed", "Tokens per second", "tokens/s"), ("A call", "Milliseconds", "ms,")):
            shown = [(what, float(figure.replace(",", ""))) for what, figure, _, said in self.rows() if kind in said]
            most = max(figure for _, figure in shown)
            power = 10 ** math.floor(math.log10(most))
            top = next(size * power for size in (2, 4, 6, 8, 10) if size * power >= most)
            labels = tuple((what, (Bar(figure, figure, figure, f"{figure:,.1f}"),)) for what, figure in shown)
            found.append(Chart(title, f"{unit}, the median of some rounds.", 0, top, labels))
        return found


class Bench(Closing):
    """Measures a loaded model. Use it in a `with`.

    Raises:
        LoadError: llama.cpp cannot make the context. Interrupted: Ctrl-C, in any measurement.
    """

    def __init__(
        self, model: Model, settings: Settings, interrupt: Interrupt, together: Sequence[int] = BENCH_PARALLEL
    ) -> None:
        self._interrupt = interrupt
        self._engine = Engine(model, settings, interrupt, BENCH_PROMPT + BENCH_TOKENS, max(2, *together))
        vocabulary = model.vocabulary
        usual = [token for token in range(vocabulary.size) if vocabulary.attributes(token) & ATTR_NORMAL]
        self._prompt = random.Random(0).choices(usual, k=BENCH_PROMPT)

    def close(self) -> None:
        """Free the context."""
        self._engine.close()

    def _begin(self, count: int, length: int) -> list[SequenceState]:
        """Return sequences that have read the first `length` tokens of the prompt."""
        engine = self._engine
        first, *others = engine.sequences[:count]
        for sequence in engine.sequences:
            engine.truncate(sequence, 0)
        for start in range(0, length, engine.batch_size):
            self._interrupt.check()
            engine.logits(
                engine.decode([BatchEntry(first, self._prompt[start : min(start + engine.batch_size, length)])])[0]
            )
        for sequence in others:
            engine.copy_prefix(first, sequence, length)
            if not sequence.tokens:  # a state that cannot be shared
                engine.decode([BatchEntry(sequence, self._prompt[:length], logits=False)])
        return [first, *others]

    def read(self) -> float:
        """Return the speed of reading, in tokens per second."""
        started = time.perf_counter()
        self._begin(1, BENCH_PROMPT)
        return BENCH_PROMPT / (time.perf_counter() - started)

    def write(self, count: int, guidance: Guidance | None = None) -> float:
        """Return the tokens per second that `count` sequences write together; with guidance, they are one answer's."""
        sequences = self._begin(count, BENCH_PROMPT // 4)
        tokens, started = [self._prompt[-1]] * count, time.perf_counter()
        for _ in range(BENCH_TOKENS):
            self._interrupt.check()
            rows = self._engine.decode([BatchEntry(one, [token]) for one, token in zip(sequences, tokens, strict=True)])
            if guidance:
                guidance.combine([self._engine.logits(row) for row in rows])
                rows = rows[:1] * count
            tokens = [int(self._engine.logits(row).argmax()) for row in rows]
        return BENCH_TOKENS * (1 if guidance else count) / (time.perf_counter() - started)


def measure(
    file: ModelFile,
    settings: Settings,
    template: str,
    rounds: int,
    interrupt: Interrupt,
    tell: Callable[[str], None] = lambda _: None,
) -> Speeds:
    """Measure everything once in each round, after a first round that only brings the file into memory.

    `tell` is given what is measured next.

    Raises:
        Interrupted: Ctrl-C. LoadError: the model cannot be loaded. EdgeError: a call of `chat` fails.
    """
    from statistics import median

    found: dict[str, list[float]] = {}
    plan = edge.plan_for(file, settings, answers=max(BENCH_PARALLEL))
    with Model(file, settings, interrupt, plan) as model, Bench(model, settings, interrupt) as bench:
        guidance = Guidance(Dialog("", "a preference", ()), 1.0, 2.0)
        kinds: dict[str, tuple[str, Callable[[], float]]] = {
            "read": ("read a prompt", bench.read),
            "write": ("write an answer", functools.partial(bench.write, 1)),
            "guided": ("write with a strength", functools.partial(bench.write, 2, guidance)),
        }
        for count in BENCH_PARALLEL:
            kinds[str(count)] = (f"write {count} at a time", functools.partial(bench.write, count))
        for number in range(rounds + 1):
            for name, (what, work) in kinds.items():
                tell(f"{what}, {f'round {number} of {rounds}' if number else 'to warm up'}")
                found.setdefault(name, []).append(work())
        each = len(model.vocabulary.encode(" patient patient", special=False)) / 2
    meta_prompt = " patient" * int(BENCH_PROMPT / each)
    calls = []
    for number in range(rounds):
        tell(f"first token, round {number + 1} of {rounds}")
        calls.append(time_calls(file, settings, template, meta_prompt, interrupt))
    speeds = {name: round(median(figures[1:]), 1) for name, figures in found.items()}
    first, cached, peak = (round(median(figures), 1) for figures in zip(*calls, strict=True))
    return Speeds(
        model=file.path.name,
        prefill_tps=speeds["read"],
        decode_tps=speeds["write"],
        parallel={str(count): speeds[str(count)] for count in BENCH_PARALLEL},
        guided_tps=speeds["guided"],
        first_token_ms=first,
        first_token_cached_ms=cached,
        peak_mb=peak,
    )


def child_main() -> None:
    """Run the command line of a child process, then print its peak memory in MB on the last line."""
    code = edge.run()
    print(memory.peak_mb())
    sys.exit(code)


def time_calls(
    file: ModelFile, settings: Settings, template: str, meta_prompt: str, interrupt: Interrupt
) -> tuple[float, float, float]:
    """Call `chat` twice; return the milliseconds of the first and of the second, cached call, and the peak in MB.

    Raises:
        EdgeError: a call fails. Interrupted: Ctrl-C.
    """
    import subprocess
    import tempfile

    code = "import metaalign_edge, metaalign_edge_commands.measure.speeds as speeds; speeds.child_main()"
    command = [sys.executable, "-c", code, "chat", "-m", str(file.path), "-n", "1", "--no-stdin", "-q"]
    command += ["--template", template, "-ngl", settings.gpu_layers, "--system", meta_prompt, "tea?"]
    command += ["-t", str(settings.threads)] if settings.threads else []
    command += [word for one in settings.adapters for word in ("--lora", f"{one.path}:{one.scale}")]
    times, peak = [], 0.0
    with tempfile.TemporaryDirectory(prefix="metaalign-edge-") as folder:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("METAALIGN_EDGE_")}
        environment |= {"METAALIGN_EDGE_CACHE": folder, "PYTHONPATH": os.pathsep.join(sys.path)}
        environment |= {"METAALIGN_EDGE_CONFIG": folder, "METAALIGN_EDGE_PROJECT": "0"}  # no settings of the user's
        for _ in range(2):
            interrupt.check()
            started = time.perf_counter()
            ended = subprocess.run(command, capture_output=True, text=True, env=environment)
            times.append((time.perf_counter() - started) * 1000)
            if ended.returncode:
                interrupt.check()
                raise EdgeError(f"a call of chat failed: {one_line(ended.stderr)}")
            peak = max(peak, float(ended.stdout.splitlines()[-1]))
    return times[0], times[1], peak
