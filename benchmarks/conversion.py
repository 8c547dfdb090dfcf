#!/usr/bin/env python3
"""Compare conversion, in whole processes: `metaalign-edge convert` and llama.cpp's own converter, and how cost grows.

    python benchmarks/conversion.py --reference DIR [--rounds 3] [--outtype f16 --outtype q8_0 …] [--folder DIR]
    python benchmarks/conversion.py --sizes [0.1 0.5 2 8] [--outtype q8_0]

The checkpoint has the shape of a 0.5B one (24 layers of 896, 14 heads on 2, 151,936 tokens, bfloat16, 988 MB), random
weights and Qwen2's real vocabulary; it is made once, in the folder for temporary files. --reference, or the variable
METAALIGN_EDGE_REFERENCE, is the unpacked source package of llama-cpp-python, whose converter needs torch, transformers
and sentencepiece. Every round runs each way once, the checkpoint in the disk's cache; the files must be the same, byte
for byte:

- convert: the command as it is, with the proof of the pre-tokenizer and a look at the result;
- convert --no-check: the conversion alone, which is what the reference does;
- the reference.

--sizes converts checkpoints of so many GB, 256,000 tokens among them; their weights are holes in a sparse file, so that
the disk's reading does not count. Prints medians of the time, ratios to the reference, and the highest memory.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

from metaalign_edge_runtime.llama.library import physical_cores

LAYERS, WIDTH, INNER, HEADS, KV_HEADS, HEAD = 24, 896, 4864, 14, 2, 64
BFLOAT16 = 2  # bytes
POOL = 1 << 24  # random weights, used again and again
# Run a module or a file, then say the highest memory of the process, which getrusage would mix with its parent's.
WATCHED = """
import runpy, sys
name, *sys.argv[1:] = sys.argv[1:]
try:
    if name == "metaalign-edge":
        from metaalign_edge import run
        sys.exit(run(sys.argv[1:]))
    sys.argv[0] = name
    sys.path.insert(0, name.rpartition("/")[0])
    runpy.run_path(name, run_name="__main__")
except SystemExit as end:
    if end.code:
        raise
from metaalign_edge_runtime.llama.memory import peak_mb
print("peak", peak_mb(), file=sys.stderr)
"""


class Run(NamedTuple):
    """What one process took."""

    seconds: float
    cpu: float  # seconds of all its threads; says more where others use the machine too
    peak_mb: float


def shapes(layers: int, width: int, inner: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a Llama with a tied embedding."""
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, width),
        "model.norm.weight": (width,),
    }
    for number in range(layers):
        layer = f"model.layers.{number}."
        found |= {
            f"{layer}input_layernorm.weight": (width,),
            f"{layer}post_attention_layernorm.weight": (width,),
            f"{layer}mlp.gate_proj.weight": (inner, width),
            f"{layer}mlp.up_proj.weight": (inner, width),
            f"{layer}mlp.down_proj.weight": (width, inner),
            f"{layer}self_attn.q_proj.weight": (HEADS * HEAD, width),
            f"{layer}self_attn.k_proj.weight": (KV_HEADS * HEAD, width),
            f"{layer}self_attn.v_proj.weight": (KV_HEADS * HEAD, width),
            f"{layer}self_attn.o_proj.weight": (width, HEADS * HEAD),
        }
    return found


def make_checkpoint(folder: Path, tensors: dict[str, tuple[int, ...]], tokenizer: dict[str, Any], sparse: bool) -> None:
    """Write a checkpoint; its weights are random, or holes."""
    folder.mkdir(parents=True)
    vocabulary, width = tensors["model.embed_tokens.weight"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": tensors["model.layers.0.mlp.up_proj.weight"][0],
        "num_hidden_layers": sum(name.endswith("up_proj.weight") for name in tensors),
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    end = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(end))
    header, at = {}, 0
    for name, shape in tensors.items():
        size = BFLOAT16 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    numbers = np.random.default_rng(0).normal(0, 0.02, POOL).astype(np.float32)
    pool = (numbers.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for shape in tensors.values() if not sparse else ():
            size = BFLOAT16 * int(np.prod(shape))
            for start in range(0, size, len(pool)):
                file.write(pool[: min(len(pool), size - start)])
        file.truncate(8 + len(head) + at)


def byte_letters() -> list[str]:
    """Return the 256 letters that stand for bytes in byte-level BPE."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(code) for code in plain] + [chr(256 + number) for number in range(256 - len(plain))]


def tokenizer_of(vocabulary: dict[str, int], merges: list[str], added: dict[str, int]) -> dict[str, Any]:
    """Return a tokenizer.json of byte-level BPE that splits as Qwen2's does."""
    contractions = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    regex = contractions + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": [{"id": number, "content": text, **flags} for text, number in added.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, letters]},
        "post_processor": letters,
        "decoder": letters,
        "model": {
            "type": "BPE",
            "vocab": vocabulary,
            "merges": [merge.split(" ") for merge in merges],
            "byte_fallback": False,
            "ignore_merges": False,
        },
    }


def real_tokenizer(reference: Path) -> dict[str, Any]:
    """Rebuild Qwen2's tokenizer.json from llama.cpp's copy of its vocabulary."""
    fields = gguf.GGUFReader(reference / "vendor/llama.cpp/models/ggml-vocab-qwen2.gguf").fields
    tokens, kinds = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type"))
    by_kind: dict[bool, dict[str, int]] = {True: {}, False: {}}
    for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        by_kind[kind == gguf.TokenType.CONTROL][token] = number
    normal = {token: number for token, number in by_kind[False].items() if kinds[number] == gguf.TokenType.NORMAL}
    return tokenizer_of(normal, fields["tokenizer.ggml.merges"].contents(), by_kind[True])


def made_up_tokenizer(size: int) -> dict[str, Any]:
    """Return a vocabulary of ``size`` words, each but the letters made by a merge."""
    words = byte_letters()
    pairs: list[str] = []
    for first in list(words):
        for second in words[:]:
            if len(words) == size - 1:
                return tokenizer_of(
                    {word: number for number, word in enumerate(words)}, pairs, {"<|endoftext|>": size - 1}
                )
            if len(second) < 3 and len(first + second) < 4:
                words.append(first + second)
                pairs.append(f"{first} {second}")
    raise ValueError(f"no {size} words")


def run(name: str, *arguments: str) -> Run:
    """Run metaalign-edge, or a file of Python, to its end.

    Raises:
        SystemExit: it fails.
    """
    command = [sys.executable, "-c", WATCHED, name, *arguments]
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{name} {' '.join(arguments)} failed ({done.returncode}): {done.stderr[-600:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run(seconds, cpu, float(done.stderr.split()[-1]))


def ours(source: Path, output: Path, outtype: str, *more: str) -> Run:
    """Convert with the command."""
    return run("metaalign-edge", "convert", str(source), "-o", str(output), "--outtype", outtype, "-q", *more)


def warm(source: Path) -> None:
    """Read the checkpoint into the disk's cache, so that nobody waits for the disk."""
    for path in source.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def middle(runs: list[Run]) -> Run:
    """Return the medians of the times, and the highest memory."""
    seconds, cpu = (statistics.median(times) for times in list(zip(*runs, strict=True))[:2])
    return Run(seconds, cpu, max(one.peak_mb for one in runs))


def compare(source: Path, reference: Path, outtypes: list[str], rounds: int) -> None:
    """Print a table of our times and the reference's."""
    script = str(reference / "vendor/llama.cpp/convert_hf_to_gguf.py")
    here, there = source.parent / "ours.gguf", source.parent / "theirs.gguf"
    print(f"{'way':<34}{'median s':>9}{'ratio':>7}{'CPU s':>8}{'ratio':>7}{'peak MB':>9}")
    for outtype in outtypes:
        theirs = (script, str(source), "--outfile", str(there), "--outtype", outtype)
        ways = {
            "convert": partial(ours, source, here, outtype, "--force"),
            "convert --no-check": partial(ours, source, here, outtype, "--force", "--no-check"),
            "reference": partial(run, *theirs),
        }
        runs: dict[str, list[Run]] = {name: [] for name in ways}
        for number in range(rounds + 1):
            for name, way in ways.items():
                warm(source)
                one = way()
                if number:  # the first round writes bytecode
                    runs[name].append(one)
        if not filecmp.cmp(here, there, shallow=False):
            raise SystemExit(f"{outtype}: the files differ")
        base = middle(runs["reference"])
        for name, found in runs.items():
            wall, cpu, peak = middle(found)
            ratios = wall / base.seconds, cpu / base.cpu
            columns = f"{wall:>9.2f}{ratios[0]:>7.2f}{cpu:>8.2f}{ratios[1]:>7.2f}{peak:>9.0f}"
            print(f"{name + ', ' + outtype:<34}{columns}")
        here.unlink()
        there.unlink()


def grow(folder: Path, sizes: list[float], outtype: str, rounds: int) -> None:
    """Print how time and memory grow with the checkpoint."""
    vocabulary = 256_000
    tokenizer = made_up_tokenizer(vocabulary)
    print(f"{'GB of bfloat16, ' + outtype:<24}{'median s':>9}{'CPU s':>8}{'CPU s per GB':>14}{'peak MB':>9}")
    for size in sizes:
        width = 128 if size < 0.5 else WIDTH
        layer = BFLOAT16 * sum(int(np.prod(shape)) for shape in shapes(1, width, INNER, 0).values())
        layers = max(1, round((size * 1e9 - BFLOAT16 * vocabulary * width) / layer))
        source = folder / f"sparse-{size:g}"
        shutil.rmtree(source, ignore_errors=True)
        make_checkpoint(source, shapes(layers, width, INNER, vocabulary), tokenizer, sparse=True)
        real = (source / "model.safetensors").stat().st_size / 1e9
        output = folder / "sparse.gguf"
        runs = [ours(source, output, outtype, "--force", "--no-check") for _ in range(rounds)]
        wall, cpu, peak = middle(runs)
        print(f"{real:<24.2f}{wall:>9.2f}{cpu:>8.2f}{cpu / real:>14.2f}{peak:>9.0f}")
        output.unlink()
        shutil.rmtree(source)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    named = os.environ.get("METAALIGN_EDGE_REFERENCE")
    parser.add_argument("--reference", metavar="DIR", type=Path, default=named and Path(named))
    parser.add_argument("--rounds", type=int, default=3, help="rounds; of the comparison, the first is not counted")
    parser.add_argument("--outtype", action="append", help="default: f16 and q8_0; repeat to add")
    parser.add_argument("--sizes", metavar="GB", type=float, nargs="*", help="how cost grows; default: 0.1 0.5 2 8")
    parser.add_argument("--folder", metavar="DIR", type=Path, default=Path(tempfile.gettempdir()), help="for the files")
    options = parser.parse_args()
    print(f"{options.rounds} rounds, Python {sys.version.split()[0]}, {physical_cores()} cores\n")
    if options.sizes is not None:
        grow(options.folder, options.sizes or [0.1, 0.5, 2, 8], (options.outtype or ["q8_0"])[0], options.rounds)
        return
    if options.reference is None:
        parser.error("--reference DIR: the unpacked source package of llama-cpp-python")
    source = options.folder / "metaalign-edge-bench" / "random-0.5b"
    if not source.is_dir():
        print(f"making {source}\n")
        tokenizer = real_tokenizer(options.reference)
        part = source.with_name("part")
        shutil.rmtree(part, ignore_errors=True)
        make_checkpoint(part, shapes(LAYERS, WIDTH, INNER, 151_936), tokenizer, sparse=False)
        part.replace(source)
    compare(source, options.reference, options.outtype or ["f16", "q8_0"], options.rounds)


if __name__ == "__main__":
    main()
