#!/usr/bin/env python3
"""Compare with what people use, on the same GGUF, in the same run: starts of a call, many answers at a time, memory.

    python benchmarks/peers.py --build DIR [--rounds 5] [--threads N] [--model GGUF] [--without llm] [--without node]
    CMAKE_ARGS=-DGGML_CUDA=on python benchmarks/peers.py --build DIR -ngl all --sequences 1,2,8,32

What it compares with is made in --build, once: llama.cpp's own programs (llama-completion, llama-batched-bench) from
the source package of the llama-cpp-python that is installed, which pip downloads and which takes cmake, a C++ compiler
and some ten minutes; `llm` with its plugin llm-gguf in a virtual environment; node-llama-cpp, where there is npm.
Without --model it is the random one of decode.py, of the shape of a 0.5B one in Q8_0, with the vocabulary of Qwen 2,
which that source has. With -ngl all everything is on the GPU, on both sides; where llama-cpp-python has none, the table
says so. Install the project without -e, as its users do: looking for the files of an editable install takes each start
of Python 14 ms.

Every round runs each way once; the first extra round only fills caches. Prints the median of each way, and ratios:

- one token after a meta-prompt of some 770 tokens, as whole processes, with the peak of resident memory. A second call
  asks another query after the same meta-prompt, or the same again, which `llama-completion --prompt-cache` has whole;
- tokens per second of some sequences together (all sequences' tokens count), after 128 that they share; two are also
  the two contexts of a strength; against `llama-batched-bench -kvu -pps`, and llama-cpp-python's `Llama`, which answers
  one after the other.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
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

from decode import Tokenizer, random_model

from metaalign_edge import Dialog, Rendering, Turn, choose_template, render, tokenize
from metaalign_edge_commands.measure.speeds import BENCH_PROMPT, BENCH_TOKENS
from metaalign_edge_runtime.llama.gguf import ModelFile
from metaalign_edge_runtime.llama.library import llama_cpp, physical_cores
from metaalign_edge_runtime.llama.vocabulary import load_vocabulary

PACKAGE = "llama-cpp-python"
PROGRAMS = ("llama-completion", "llama-batched-bench")
CONTEXT = 2048
SHARED = BENCH_PROMPT // 4  # tokens that all sequences have in common
LENGTH = BENCH_TOKENS  # tokens that each sequence writes
META_PROMPT = " ".join(["The tone is calm, and every answer names its source."] * 63)  # of 12 tokens each
QUERY, OTHER = "What is tea?", "What is ice?"
TOGETHER = """
import json, pathlib, sys
from metaalign_edge import Dialog, Guidance, Model, Settings
from metaalign_edge_commands.measure.speeds import Bench
from metaalign_edge_runtime.llama.gguf import ModelFile
from metaalign_edge_runtime.llama.interrupt import Interrupt
path, threads, layers, *counts = sys.argv[1:]
file, counts = ModelFile(pathlib.Path(path)), list(map(int, counts))
settings, interrupt = Settings(gpu_layers=layers, threads=int(threads)), Interrupt()
with Model(file, settings) as model, Bench(model, settings, interrupt, counts) as bench:
    bench.write(1)
    found = {count: bench.write(count) for count in counts}
    strength = Guidance(Dialog("", "a preference"), 1.0, 2.0)
    print(json.dumps({"guided": bench.write(2, strength), "together": found}))
"""
NODE = """
import {readFileSync} from "node:fs";
import {getLlama, LlamaCompletion, LlamaLogLevel} from "node-llama-cpp";
const [path, prompt, context, threads, layers] = process.argv.slice(2);
const gpu = layers === "0" ? false : "auto";
const llama = await getLlama({gpu, build: "never", logLevel: LlamaLogLevel.error, maxThreads: Number(threads)});
const model = await llama.loadModel({modelPath: path, gpuLayers: layers === "-1" ? "max" : Number(layers)});
const made = await model.createContext({contextSize: Number(context), threads: Number(threads)});
const completion = new LlamaCompletion({contextSequence: made.getSequence()});
console.log(await completion.generateCompletion(readFileSync(prompt, "utf8"), {maxTokens: 1, temperature: 0}));
process.exit(0);
"""
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


def call(command: list[str], folder: Path, to_first: bool = False) -> Call:
    """Run a command to its end, or only to the first byte that it says, with what it keeps in a folder.

    Raises:
        SystemExit: it fails.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"METAALIGN_EDGE_CACHE": str(folder / "kept"), "LLM_USER_PATH": str(folder / "llm")}
    with tempfile.TemporaryFile() as said:
        began = time.perf_counter()
        out = subprocess.PIPE if to_first else said
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=said, env=environment)
        if process.stdout:
            process.stdout.read(1)
            first = time.perf_counter()
            process.kill()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = (first if process.stdout else time.perf_counter()) - began
        if status and not to_first:
            said.seek(0)
            raise SystemExit(f"{' '.join(command)[:200]} failed: {said.read()[-400:].decode(errors='replace')}")
    return Call(seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6)


def source_of(folder: Path) -> Path:
    """Return llama.cpp's source as the installed llama-cpp-python has it; pip downloads it into a folder, once."""
    version = importlib.metadata.version(PACKAGE)
    source = folder / f"{PACKAGE.replace('-', '_')}-{version}"
    folder.mkdir(parents=True, exist_ok=True)
    if not source.is_dir():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", PACKAGE, "-d", str(folder)]
        subprocess.run([*command, f"{PACKAGE}=={version}"], check=True)
        with tarfile.open(folder / f"{source.name}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    return source / "vendor" / "llama.cpp"


def build(source: Path, made: Path) -> Path:
    """Build llama.cpp's programs, unless they are there; return their folder."""
    tools = made / "bin"
    if all(shutil.which(program, path=tools) for program in PROGRAMS):
        return tools
    if not shutil.which("cmake"):
        raise SystemExit("cmake is missing: pip install cmake")
    options = [
        "-DCMAKE_BUILD_TYPE=Release",
        "-DLLAMA_CURL=OFF",
        "-DLLAMA_BUILD_TESTS=OFF",
        *os.getenv("CMAKE_ARGS", "").split(),
    ]
    subprocess.run(["cmake", "-S", str(source), "-B", str(made), *options], check=True)
    subprocess.run(["cmake", "--build", str(made), "-j", str(os.cpu_count()), "--target", *PROGRAMS], check=True)
    return tools


def install_llm(folder: Path) -> Path:
    """Install `llm` and its plugin in a virtual environment, unless it is there; return its console script."""
    script = folder / ("Scripts" if os.name == "nt" else "bin") / "llm"
    if not script.with_suffix(".exe" if os.name == "nt" else "").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(script.with_name("python")), "-m", "pip", "install", "llm", "llm-gguf"], check=True)
    return script


def install_node(folder: Path) -> Path:
    """Install node-llama-cpp, unless it is there; return the folder that has it in its `node_modules`."""
    if not (folder / "node_modules" / "node-llama-cpp").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "install", "--ignore-scripts", "--prefix", str(folder), "node-llama-cpp"]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return folder


def template_name(path: Path) -> str:
    """Return what --template takes for a model; the random one has none of its own."""
    return "auto" if ModelFile(path).templates else "chatml"


def prompt_for(query: str, path: Path) -> Rendering:
    """Render a query after the meta-prompt."""
    return render(Dialog(META_PROMPT, "", (Turn(query),)), choose_template(template_name(path), ModelFile(path)))


def prompt_sizes(path: Path) -> tuple[int, int]:
    """Return how many tokens come before a query, and how many with it and behind it."""
    with load_vocabulary(ModelFile(path)) as vocabulary:
        tokens = tokenize(prompt_for(QUERY, path), vocabulary, CONTEXT)
    (before,) = tokens.queries()
    return before, len(tokens.tokens) - before


def starts(path: Path, tools: Path, options: argparse.Namespace, folder: Path) -> dict[str, Callable[[], Call]]:
    """Return the ways to get one token after a long meta-prompt."""
    prompts, kept = {query: folder / f"{query[8:-1]}.txt" for query in (QUERY, OTHER)}, folder / "prompt-cache"
    for query, prompt in prompts.items():
        prompt.write_text(prompt_for(query, path).prompt, encoding="utf-8")
    threads, layers, context = str(options.threads), options.layers, str(CONTEXT)
    ours = [sys.executable, "-m", "metaalign_edge", "chat", "-m", str(path), "--template", template_name(path)]
    ours += ["-s", META_PROMPT, "-n", "1", "--temp", "0", "-c", context, "-t", threads, "-ngl", options.ngl]
    theirs = [str(tools / "llama-completion"), "-m", str(path), "-n", "1", "--temp", "0", "-c", context, "-t", threads]
    theirs += ["-ngl", options.ngl, "-no-cnv", "-f"]
    class_ = [sys.executable, "-c", HIGH_LEVEL, str(path), str(prompts[QUERY]), context, threads, layers]

    def cached(query: str) -> Call:
        """Call llama-completion with what it keeps of the first query's prompt: it overwrites that at each call."""
        if not kept.exists():
            call([*theirs, str(prompts[QUERY]), "--prompt-cache", str(kept)], folder)
        shutil.copy(kept, folder / "copy")
        return call([*theirs, str(prompts[query]), "--prompt-cache", str(folder / "copy")], folder)

    def first() -> Call:
        """Call us with nothing kept: what the second call needs is written down, then."""
        shutil.rmtree(folder / "kept", ignore_errors=True)
        return call([*ours, QUERY], folder)

    ways = {
        "metaalign-edge chat --no-cache": lambda: call([*ours, "--no-cache", QUERY], folder),
        "metaalign-edge chat, the first call": first,
        "llama-completion": lambda: call([*theirs, str(prompts[QUERY])], folder),
        "llama-cpp-python's Llama": lambda: call(class_, folder),
        "metaalign-edge chat, another query": lambda: call([*ours, OTHER], folder),
        "llama-completion --prompt-cache, another query": lambda: cached(OTHER),
        "metaalign-edge chat, the same query": lambda: call([*ours, QUERY], folder),
        "llama-completion --prompt-cache, the same query": lambda: cached(QUERY),
    }
    if options.llm:
        llm = [str(options.llm), "-m", "gguf/peer", "--no-log", "-s", META_PROMPT, QUERY]
        call([str(options.llm), "gguf", "register-model", "peer", str(path), "--n-ctx", context], folder)
        ways["llm (llm-gguf), to its first character"] = lambda: call(llm, folder, to_first=True)
    if options.node:
        script = options.node / "metaalign-edge-peer.mjs"
        script.write_text(NODE, encoding="utf-8")
        node = ["node", str(script), str(path), str(prompts[QUERY]), context, threads, layers]
        ways["node-llama-cpp"] = lambda: call(node, folder)
    return ways


def rates(path: Path, tools: Path, options: argparse.Namespace) -> dict[str, float]:
    """Return tokens per second of some sequences together, in every way."""
    threads, layers, counts = str(options.threads), options.layers, options.sequences
    ours = [sys.executable, "-c", TOGETHER, str(path), threads, options.ngl, *map(str, counts)]
    found = json.loads(subprocess.run(ours, capture_output=True, text=True, check=True).stdout)
    theirs = [str(tools / "llama-batched-bench"), "-m", str(path), "-t", threads, "-ngl", options.ngl, "-kvu", "-pps"]
    theirs += ["-npp", str(SHARED), "-ntg", str(LENGTH), "-npl", ",".join(map(str, counts))]
    theirs += ["-c", str((SHARED + LENGTH) * max(8, *counts))]
    said = subprocess.run([*theirs, "--output-format", "jsonl"], capture_output=True, text=True, check=True).stdout
    rows = map(json.loads, (line for line in said.splitlines() if line.startswith("{")))
    bench = {row["pl"]: row["speed_tg"] for row in rows}
    one_by_one = [sys.executable, "-c", SUCCESSIVE, str(path), "8", str(LENGTH), threads, layers]
    after = subprocess.run(one_by_one, capture_output=True, text=True, check=True)
    speeds = {}
    for count in counts:
        speeds[f"{count} metaalign-edge"] = found["together"][str(count)]
        if count == 2:
            speeds["2 metaalign-edge, as the contexts of a strength"] = 2 * found["guided"]
        if count == 8:
            speeds["8 `Llama`, one after the other"] = float(after.stdout)
        speeds[f"{count} llama-batched-bench"] = bench[count]
    return speeds


def show_starts(calls: dict[str, list[Call]]) -> None:
    """Print the table of whole processes: a second call is compared with what llama-completion makes of the same."""
    medians = {
        name: [statistics.median(column) for column in zip(*found, strict=True)] for name, found in calls.items()
    }
    print("| one token, as a whole process | s | of `llama-completion` | of its `--prompt-cache` | peak MB |")
    print("| --- | --- | --- | --- | --- |")
    cold = medians["llama-completion"][0]
    for name, (seconds, megabytes) in medians.items():
        _, _, query = name.partition(", ")
        theirs = medians.get(f"llama-completion --prompt-cache, {query}")
        second = f"{seconds / theirs[0]:.2f}" if theirs else ""
        print(f"| {name} | {seconds:.2f} | {seconds / cold:.2f} | {second} | {megabytes:,.0f} |")


def show_rates(found: dict[str, list[float]]) -> None:
    """Print the table of sequences."""
    print("| sequences | way | tokens/s | of `llama-batched-bench` |")
    print("| --- | --- | --- | --- |")
    medians = {name: statistics.median(figures) for name, figures in found.items()}
    for name, median in medians.items():
        count, way = name.split(" ", 1)
        print(f"| {count} | {way} | {median:.1f} | {median / medians[f'{count} llama-batched-bench']:.2f} |")


def versions(options: argparse.Namespace) -> str:
    """Return what was compared, on what."""
    found = [f"{PACKAGE} {importlib.metadata.version(PACKAGE)}", f"Python {platform.python_version()}"]
    if options.llm:
        said = subprocess.run([str(options.llm), "--version"], capture_output=True, text=True, check=True).stdout
        found.append(said.strip().replace(", version", ""))
    if options.node:
        package = options.node / "node_modules" / "node-llama-cpp" / "package.json"
        found.append(f"node-llama-cpp {json.loads(package.read_text(encoding='utf-8'))['version']}")
    return ", ".join(found)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", metavar="DIR", type=Path, required=True, help="where the peers are, or are made")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; the first extra one is not counted")
    parser.add_argument("--threads", type=int, default=physical_cores(), help="default: one per physical core")
    parser.add_argument("-ngl", dest="ngl", default="0", help="layers on the GPU: a number, or all")
    parser.add_argument("--sequences", default="1,2,8", help="how many together (default: %(default)s)")
    parser.add_argument("--model", metavar="GGUF", type=Path, help="a model of yours, that does not end early")
    peers = ("llm", "node")
    parser.add_argument("--without", choices=peers, action="append", default=[], help="do not compare with this one")
    options = parser.parse_args()
    options.layers = "-1" if options.ngl == "all" else options.ngl
    options.sequences = [int(count) for count in options.sequences.split(",")]
    source = source_of(options.build)
    tools = build(source, options.build / "build")
    options.llm = None if "llm" in options.without else install_llm(options.build / "llm")
    options.node = None
    if "node" not in options.without:
        if shutil.which("npm"):
            options.node = install_node(options.build / "node")
        else:
            print("npm is missing: not compared with node-llama-cpp", file=sys.stderr)
    vocabulary = source / "models" / "ggml-vocab-qwen2.gguf"
    path = options.model or random_model("metaalign-edge-peers-0.5b-q8_0.gguf", lambda: Tokenizer.of(vocabulary))
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
    gpu = llama_cpp().llama_supports_gpu_offload()
    where = f"-ngl {options.ngl} on the GPU" if gpu and options.ngl != "0" else f"the CPU, {options.threads} threads"
    print(f"{path.name}, {where}, {options.rounds} rounds, {time.strftime('%Y-%m-%d')}, {versions(options)}")
    before, behind = prompt_sizes(path)
    print(f"a prompt of {before} tokens before the query, and {behind} more\n")
    show_starts(calls)
    print()
    show_rates(speeds)


if __name__ == "__main__":
    main()
