#!/usr/bin/env python3
"""Time whole processes from the shell's point of view: start, do the little thing, end.

    python benchmarks/startup.py [--runs 15] [--model GGUF] [--llm PATH]

Every round runs each command once, so that whatever else the machine does hits all of them alike. Prints the median,
the quickest run, and the ratio of medians to a bare Typer application of two commands with one argument each. Then
says what each command imported that a start should not need.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BARE = """
import typer

app = typer.Typer()


@app.command()
def chat(query: str) -> None:
    "Answer a query."


@app.command()
def render(query: str) -> None:
    "Print the prompt."


app()
"""
HEAVY = ("llama_cpp", "numpy", "huggingface_hub", "gguf", "torch", "jinja2", "metaalign_edge_convert")
WATCH = """
import sys
import metaalign_edge
metaalign_edge.run(sys.argv[1:])
heavy = [name for name in {heavy!r} if name in sys.modules or any(m.startswith(name + ".") for m in sys.modules)]
print("imported:", len(sys.modules), "modules;", "of the heavy ones", ", ".join(heavy) or "none", file=sys.stderr)
"""


def beside(name: str) -> str | None:
    """Find a console script next to this Python, else on the PATH."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def wall(command: list[str]) -> float:
    """Run a command to its end; return milliseconds.

    Raises:
        SystemExit: the command fails.
    """
    started = time.perf_counter()
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    took = (time.perf_counter() - started) * 1000
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed ({done.returncode}): {done.stderr[-400:]}")
    return took


def imported(arguments: list[str]) -> str:
    """Run the command line inside a watching Python; return what it imported."""
    command = [sys.executable, "-c", WATCH.format(heavy=HEAVY), *arguments]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    return done.stderr.strip().splitlines()[-1]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15, help="rounds; the first extra one is not counted")
    parser.add_argument("--llm", metavar="PATH", default=beside("llm"), help="the console script of the package `llm`")
    parser.add_argument("--model", metavar="GGUF", help="the model to render for; default: the embedded one")
    options = parser.parse_args()
    render = ["render", *(["-m", options.model] if options.model else []), "What is tea?"]
    ours = beside("metaalign-edge")
    if ours is None:
        raise SystemExit("metaalign-edge is not installed: pip install -e .")
    with tempfile.TemporaryDirectory() as folder:
        bare = Path(folder) / "bare.py"
        bare.write_text(BARE, encoding="utf-8")
        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "bare Typer app --help": [sys.executable, str(bare), "--help"],
            "metaalign-edge --version": [ours, "--version"],
            "metaalign-edge --help": [ours, "--help"],
            'metaalign-edge render "What is tea?"': [ours, *render],
        }
        if options.llm:
            commands["llm --version"] = [options.llm, "--version"]
            commands["llm --help"] = [options.llm, "--help"]
        times: dict[str, list[float]] = {name: [] for name in commands}
        for number in range(options.runs + 1):
            for name, command in commands.items():
                took = wall(command)
                if number:  # the first round fills the disk's cache and writes bytecode
                    times[name].append(took)
    print(f"{options.runs} rounds, Python {sys.version.split()[0]}, {os.cpu_count()} CPUs\n")
    print(f"{'command':<40}{'median ms':>10}{'best ms':>9}{'ratio':>7}")
    base = statistics.median(times["bare Typer app --help"])
    for name, taken in times.items():
        median = statistics.median(taken)
        print(f"{name:<40}{median:>10.0f}{min(taken):>9.0f}{median / base:>7.2f}")
    if not options.llm:
        print("\nllm is not installed: pip install llm (in a virtual environment of its own), then --llm PATH")
    print()
    for arguments in (["--help"], render):
        print(f"metaalign-edge {arguments[0]}: {imported(arguments)}")


if __name__ == "__main__":
    main()
