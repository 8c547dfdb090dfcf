#!/usr/bin/env python3
"""Compare with what people use, on the same GGUF, in the same run: starts of a call, many answers at a time, memory.

    python benchmarks/peers.py --build DIR [--rounds 5] [--threads N] [-ngl N] [--model GGUF]
    python benchmarks/peers.py --tools DIR [--llm PATH --llm-model ID] ...

llama.cpp's own programs (llama-completion, llama-batched-bench) are taken from --tools, or built into --build from the
source package of the llama-cpp-python that is installed, which pip downloads; that takes cmake, a C++ compiler and some
ten minutes. `llm` is compared if its console script is named, with the id that its plugin llm-gguf gave to the model.
Without --model it is the random one of decode.py, of the shape of a 0.5B one in Q8_0.

Every round runs each way once; the first extra round only fills caches. Prints the median of each way, and ratios:

- one token after a meta-prompt of some 770 tokens, as whole processes, with the peak of resident memory;
- tokens per second of one, two and eight sequences together (all sequences' tokens count), ours by `metaalign-edge
  bench`: two are also the two contexts of a strength; against `llama-batched-bench -kvu -pps`, and against
  llama-cpp-python's `Llama`, which answers one after the other.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from decode import make_model

from metaalign_edge import Dialog, ModelFile, Turn, choose_template, physical_cores, render

PACKAGE = "llama-cpp-python"
PROGRAMS = ("llama-completion", "llama-batched-bench")
CONTEXT = 2048
LENGTH = 48  # tokens that each sequence writes
META_PROMPT = " ".join(
    ["The tone is calm, and every answer names its source."] * 14
)  # a token a letter, for the random one
QUERY = "What is tea?"
HIGH_LEVEL = """
import sys
from llama_cpp import Llama
path, prompt, context, threads, layers = sys.argv[1], open(sys.argv[2]).read(), *map(int, sys.argv[3:])
llama = Llama(path, n_ctx=context, n_threads=threads, n_threads_batch=threads, n_gpu_layers=layers, verbose=False)
print(llama.create_completion(prompt, max_tokens=1, temperature=0.0)["choices"][0]["text"])
"""
SUCCESSIVE = """
import sys, time
from llama_cpp import Llama
path, count, length, threads, layers = sys.argv[1], *map(int, sys.argv[2:])
llama = Llama(path, n_ctx=1024, n_threads=threads, n_threads_batch=threads, n_gpu_layers=layers, verbose=False)
began, tokens = time.perf_counter(), 0
for number in range(count):
    answer = llama.create_completion(f"{number}: tea?", max_tokens=length, temperature=0.0)
    tokens += answer["usage"]["completion_tokens"]
print(tokens / (time.perf_counter() - began))
"""


class Call(NamedTuple):
    """What a whole process took."""

    seconds: float
    megabytes: float  # the peak of resident memory


def call(command: list[str], cache: Path) -> Call:
    """Run a command to its end.

    Raises:
        SystemExit: it fails.
    """
    environment = os.environ | {"METAALIGN_EDGE_CACHE": str(cache)}
    with tempfile.TemporaryFile() as said:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        if status:
            said.seek(0)
            raise SystemExit(f"{' '.join(command)[:200]} failed: {said.read()[-400:].decode(errors='replace')}")
    return Call(seconds, usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3))


def build(folder: Path) -> Path:
    """Download the source of the installed llama-cpp-python and build llama.cpp's programs; return their folder."""
    version = importlib.metadata.version(PACKAGE)
    source = folder / f"{PACKAGE.replace('-', '_')}-{version}"
    folder.mkdir(parents=True, exist_ok=True)
    if not source.is_dir():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", PACKAGE, "-d", str(folder)]
        subprocess.run([*command, f"{PACKAGE}=={version}"], check=True)
        with tarfile.open(folder / f"{source.name}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    if not shutil.which("cmake"):
        raise SystemExit("cmake is missing: pip install cmake")
    made = folder / "build"
    options = [
        "-DCMAKE_BUILD_TYPE=Release",
        "-DLLAMA_CURL=OFF",
        "-DLLAMA_BUILD_TESTS=OFF",
        *os.getenv("CMAKE_ARGS", "").split(),
    ]
    subprocess.run(["cmake", "-S", str(source / "vendor" / "llama.cpp"), "-B", str(made), *options], check=True)
    subprocess.run(["cmake", "--build", str(made), "-j", str(os.cpu_count()), "--target", *PROGRAMS], check=True)
    return made / "bin"


def starts(path: Path, tools: Path, options: argparse.Namespace, folder: Path) -> dict[str, Callable[[], Call]]:
    """Return the ways to get one token after a long meta-prompt."""
    template = choose_template("auto" if ModelFile(path).templates else "chatml", ModelFile(path))
    prompt, kept = folder / "prompt.txt", folder / "kept"
    prompt.write_text(render(Dialog(META_PROMPT, "", (Turn(QUERY),)), template).prompt, encoding="utf-8")
    threads, layers = str(options.threads), str(options.layers)
    ours = [sys.executable, "-m", "metaalign_edge", "chat", "-m", str(path), "--template", template.name]
    ours += ["--system", META_PROMPT, "-n", "1", "--temp", "0", "-c", str(CONTEXT), "-t", threads, "-ngl", layers]
    theirs = [str(tools / "llama-completion"), "-m", str(path), "-f", str(prompt), "-n", "1", "--temp", "0"]
    theirs += ["-c", str(CONTEXT), "-t", threads, "-ngl", layers, "-no-cnv"]
    class_ = [sys.executable, "-c", HIGH_LEVEL, str(path), str(prompt), str(CONTEXT), threads, layers]
    commands = {
        "metaalign-edge chat --no-cache": [*ours, "--no-cache", QUERY],
        "metaalign-edge chat": [*ours, QUERY],
        "llama-completion": theirs,
        "llama-completion --prompt-cache": [*theirs, "--prompt-cache", str(folder / "prompt-cache")],
        "llama-cpp-python's Llama": class_,
    }
    if options.llm:
        commands["llm"] = [
            options.llm,
            "-m",
            options.llm_model,
            "--no-log",
            "-s",
            META_PROMPT,
            "-o",
            "max_tokens",
            "1",
            QUERY,
        ]
    return {name: (lambda command=command: call(command, kept)) for name, command in commands.items()}  # type: ignore[misc]


def rates(path: Path, tools: Path, options: argparse.Namespace) -> dict[str, float]:
    """Return tokens per second of one, two and eight sequences, in every way."""
    threads, layers = str(options.threads), str(options.layers)
    ours = [sys.executable, "-m", "metaalign_edge", "bench", "-m", str(path), "--rounds", "1", "--json", "-t", threads]
    ours += ["-ngl", layers, "--template", "auto" if ModelFile(path).templates else "chatml"]
    found = json.loads(subprocess.run(ours, capture_output=True, text=True, check=True).stdout)
    theirs = [str(tools / "llama-batched-bench"), "-m", str(path), "-c", "2048", "-npp", "16", "-ntg", str(LENGTH)]
    theirs += ["-npl", "1,2,8", "-kvu", "-pps", "-t", threads, "-ngl", layers, "--output-format", "jsonl"]
    said = subprocess.run(theirs, capture_output=True, text=True, check=True).stdout.splitlines()
    bench = {row["pl"]: row["speed_tg"] for row in map(json.loads, (line for line in said if line.startswith("{")))}
    one_by_one = [sys.executable, "-c", SUCCESSIVE, str(path), "8", str(LENGTH), threads, layers]
    after = subprocess.run(one_by_one, capture_output=True, text=True, check=True)
    return {
        "1 ours": found["decode_tps"],
        "1 llama-batched-bench": bench[1],
        "2 ours": found["parallel"]["2"],
        "2 ours, as the contexts of a strength": 2 * found["guided_tps"],
        "2 llama-batched-bench": bench[2],
        "8 ours": found["parallel"]["8"],
        "8 llama-batched-bench": bench[8],
        "8 Llama, one after the other": float(after.stdout),
    }


def show_starts(calls: dict[str, list[Call]]) -> None:
    """Print the table of whole processes."""
    medians = {
        name: [statistics.median(column) for column in zip(*found, strict=True)] for name, found in calls.items()
    }
    print("| one token, as a whole process | s | of `llama-completion` | of its `--prompt-cache` | peak MB |")
    print("| --- | --- | --- | --- | --- |")
    cold, cached = (medians[name][0] for name in ("llama-completion", "llama-completion --prompt-cache"))
    for name, (seconds, megabytes) in medians.items():
        print(f"| {name} | {seconds:.2f} | {seconds / cold:.2f} | {seconds / cached:.2f} | {megabytes:,.0f} |")


def show_rates(found: dict[str, list[float]]) -> None:
    """Print the table of sequences."""
    print("| sequences | way | tokens/s | of `llama-batched-bench` |")
    print("| --- | --- | --- | --- |")
    medians = {name: statistics.median(figures) for name, figures in found.items()}
    for name, median in medians.items():
        count, way = name.split(" ", 1)
        print(f"| {count} | {way} | {median:.1f} | {median / medians[f'{count} llama-batched-bench']:.2f} |")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", metavar="DIR", type=Path, help="where llama.cpp's programs are")
    parser.add_argument("--build", metavar="DIR", type=Path, help="download their source and build them here")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; the first extra one is not counted")
    parser.add_argument("--threads", type=int, default=physical_cores(), help="default: one per physical core")
    parser.add_argument("-ngl", dest="layers", type=int, default=0, help="layers on the GPU")
    parser.add_argument("--model", metavar="GGUF", type=Path, help="a model of yours, that does not end early")
    parser.add_argument("--llm", metavar="PATH", help="the console script of the package `llm`")
    parser.add_argument("--llm-model", metavar="ID", help="what `llm gguf models` calls the model")
    options = parser.parse_args()
    if (options.tools is None) == (options.build is None) or (options.llm is None) != (options.llm_model is None):
        parser.error("give --tools or --build, and --llm with --llm-model")
    tools = options.tools or build(options.build)
    path = options.model or Path(tempfile.gettempdir()) / "metaalign-edge-bench-0.5b-q8_0.gguf"
    if not path.is_file():
        print(f"making {path}", file=sys.stderr)
        make_model(path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
    calls: dict[str, list[Call]] = {}
    speeds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        ways = starts(path, tools, options, Path(folder))
        for number in range(options.rounds + 1):
            taken = {name: way() for name, way in ways.items()}
            figures = rates(path, tools, options)
            if number:  # the first round pages the model in and fills the caches
                for name, one in taken.items():
                    calls.setdefault(name, []).append(one)
                for name, speed in figures.items():
                    speeds.setdefault(name, []).append(speed)
            print(f"round {number} of {options.rounds}", file=sys.stderr)
    print(
        f"{path.name}, {options.threads} threads, {options.layers} layers on the GPU, {options.rounds} rounds,", end=" "
    )
    print(f"{PACKAGE} {importlib.metadata.version(PACKAGE)}, Python {sys.version.split()[0]}\n")
    show_starts(calls)
    print()
    show_rates(speeds)


if __name__ == "__main__":
    main()
