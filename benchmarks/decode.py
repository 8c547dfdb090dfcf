#!/usr/bin/env python3
"""Compare decode speed: ours, llama-cpp-python's own class, and what llama.cpp itself reaches on this machine.

    python benchmarks/decode.py [--tokens 128] [--rounds 7] [--threads N] [--llama-bench PATH] [--model GGUF]

The model has the shape of a 0.5B one (24 layers of 896, 14 heads on 2, 151,936 tokens, Q8_0, 528 MB) and random
weights; it is made once, in the folder for temporary files. Its special tokens have zero rows in the embedding, which
is the output matrix too, so their logit is 0 while the greatest of 150,000 random ones never is: no answer ends early.

Every round runs each way once, greedily, after the same prompt:

- ours: `answer_one`, what the command `chat` calls, by the speed that it reports;
- llama-cpp-python: `Llama.create_completion(stream=True)`;
- bare loop: `llama_decode` and llama.cpp's greedy sampler through the low-level binding, and nothing else;
- llama-bench, if --llama-bench says where it is: llama.cpp's own `tg`, which samples nothing and has no prompt.

Tokens per second are counted from the first token to the last. Prints medians and their ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

import metaalign_edge as edge
from metaalign_edge import Dialog, Model, RenderOptions, Scheduler, Settings, Turn, choose_template
from metaalign_edge_runtime.llama.gguf import ModelFile
from metaalign_edge_runtime.llama.interrupt import Interrupt
from metaalign_edge_runtime.llama.library import llama_cpp, physical_cores

LAYERS, WIDTH, INNER, HEADS, KV_HEADS, VOCABULARY = 24, 896, 4864, 14, 2, 151_936
ENDS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
BLOCK = 32  # weights that share a scale in Q8_0: 2 bytes of float16, then a byte each
CONTEXT = 1024
QUERY = "What is the difference between a hare and a rabbit?"


class Tokenizer(NamedTuple):
    """Byte-level BPE, in the terms of a GGUF."""

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    end: int

    @classmethod
    def plain(cls) -> Tokenizer:
        """Make one of a single merge: the 256 letters of bytes, made-up words, and the end tokens."""
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
        letters = [chr(code) for code in plain] + [chr(256 + number) for number in range(256 - len(plain))]
        words = [f"Ġw{number}" for number in range(VOCABULARY - len(letters) - len(ENDS))]
        types = [int(gguf.TokenType.NORMAL)] * (VOCABULARY - len(ENDS)) + [int(gguf.TokenType.CONTROL)] * len(ENDS)
        return cls("qwen2", [*letters, *words, *ENDS], types, ["Ġ w"], VOCABULARY - 1)

    @classmethod
    def of(cls, path: Path) -> Tokenizer:
        """Read the one of a GGUF; it has VOCABULARY tokens."""
        fields = gguf.GGUFReader(path).fields
        names = ("pre", "tokens", "token_type", "merges", "eos_token_id")
        found = cls(*(fields[f"tokenizer.ggml.{name}"].contents() for name in names))
        assert len(found.tokens) == VOCABULARY, f"{path} has {len(found.tokens)} tokens"
        return found


def make_model(path: Path, tokenizer: Tokenizer) -> None:
    """Write the random model; no more than one tensor is in memory."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(4096)
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(tokenizer.types)
    writer.add_token_merges(tokenizer.merges)
    writer.add_eos_token_id(tokenizer.end)
    writer.add_add_bos_token(False)
    special = np.flatnonzero(np.array(tokenizer.types) != gguf.TokenType.NORMAL)
    tensors = tensor_shapes()
    for name, shape in tensors.items():
        if len(shape) == 1:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * shape[0])
        else:
            rows, columns = shape
            stored = (rows, columns // BLOCK * (BLOCK + 2))
            writer.add_tensor_info(
                name, stored, np.dtype(np.uint8), stored[0] * stored[1], gguf.GGMLQuantizationType.Q8_0
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = np.random.default_rng(0)
    pool = random.integers(-127, 128, (1 << 20, BLOCK + 2), dtype=np.int8).view(np.uint8)  # a million blocks
    pool[:, :2] = np.array([0.02 / 73], np.float16).view(np.uint8)  # weights of a standard deviation of 0.02
    for number, (name, shape) in enumerate(tensors.items()):
        data: np.ndarray[Any, Any]
        if len(shape) == 1:
            data = np.ones(shape, np.float32)
        else:
            blocks = shape[0] * shape[1] // BLOCK
            data = np.take(pool, np.arange(number * 4099, number * 4099 + blocks), axis=0, mode="wrap")
            data = data.reshape(shape[0], -1)
        if name == "token_embd.weight":
            data[special] = 0
        writer.write_tensor_data(data)
    writer.close()


def random_model(name: str, tokenizer: Callable[[], Tokenizer]) -> Path:
    """Return where the random model of this name is, in the folder for temporary files; make it if it is not there."""
    path = Path(tempfile.gettempdir()) / name
    if not path.is_file():
        print(f"making {path}", file=sys.stderr)
        make_model(path.with_suffix(".part"), tokenizer())
        path.with_suffix(".part").replace(path)
    return path


def tensor_shapes() -> dict[str, tuple[int, ...]]:
    """Return the tensors of the model, [out, in], in the order they are written."""
    narrow = WIDTH // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (VOCABULARY, WIDTH), "output_norm.weight": (WIDTH,)}
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_norm.weight": (WIDTH,),
            f"blk.{layer}.attn_q.weight": (WIDTH, WIDTH),
            f"blk.{layer}.attn_k.weight": (narrow, WIDTH),
            f"blk.{layer}.attn_v.weight": (narrow, WIDTH),
            f"blk.{layer}.attn_output.weight": (WIDTH, WIDTH),
            f"blk.{layer}.ffn_norm.weight": (WIDTH,),
            f"blk.{layer}.ffn_gate.weight": (INNER, WIDTH),
            f"blk.{layer}.ffn_up.weight": (INNER, WIDTH),
            f"blk.{layer}.ffn_down.weight": (WIDTH, INNER),
        }
    return shapes


def ours(chat: Scheduler, tokens: int) -> float:
    """Answer as the command `chat` does."""
    answer = edge.answer_one(chat, edge.Request(Dialog("", "", (Turn(QUERY),)), 0))
    assert answer.output_tokens == tokens, f"the answer ended after {answer.output_tokens} tokens"
    return answer.tokens_per_second


def high_level(llama: Any, prompt: list[int], tokens: int) -> float:
    """Stream a completion from llama-cpp-python's own class."""
    stamps = [
        time.perf_counter()
        for _ in llama.create_completion(prompt, max_tokens=tokens, temperature=0.0, stream=True, seed=0)
    ]
    assert tokens <= len(stamps) <= tokens + 1, f"{len(stamps)} chunks for {tokens} tokens"  # one more says why it ends
    return (tokens - 1) / (stamps[tokens - 1] - stamps[0])


class BareLoop:
    """Nothing but llama_decode and llama.cpp's greedy sampler."""

    def __init__(self, model: Model, threads: int) -> None:
        llama = self.llama = llama_cpp()
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_threads, params.n_threads_batch = CONTEXT, threads, threads
        params.no_perf = True
        self.context = llama.llama_init_from_model(model.pointer, params)
        self.memory = llama.llama_get_memory(self.context)
        self.sampler = llama.llama_sampler_init_greedy()

    def run(self, prompt: list[int], tokens: int) -> float:
        """Decode a number of tokens after a prompt; return tokens per second."""
        llama, context, sampler = self.llama, self.context, self.sampler
        llama.llama_memory_clear(self.memory, True)
        ids = (llama.llama_token * len(prompt))(*prompt)
        assert llama.llama_decode(context, llama.llama_batch_get_one(ids, len(prompt))) == 0
        one = (llama.llama_token * 1)(llama.llama_sampler_sample(sampler, context, -1))
        batch = llama.llama_batch_get_one(one, 1)
        started = time.perf_counter()
        for _ in range(tokens - 1):
            llama.llama_decode(context, batch)
            one[0] = llama.llama_sampler_sample(sampler, context, -1)
        return (tokens - 1) / (time.perf_counter() - started)


def llama_bench(program: str, path: Path, tokens: int, threads: int) -> float:
    """Let llama.cpp measure itself."""
    command = [program, "-m", str(path), "-p", "0", "-n", str(tokens), "-t", str(threads), "-r", "1", "-o", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout)[0]["avg_ts"])


def measure(path: Path, options: argparse.Namespace) -> dict[str, list[float]]:
    """Run every way in every round; return tokens per second by way."""
    from llama_cpp import Llama

    settings = Settings(context=CONTEXT, threads=options.threads, max_tokens=options.tokens, temperature=0.0)
    file, interrupt = ModelFile(path), Interrupt()
    with ExitStack() as stack:
        model = stack.enter_context(Model(file, settings, interrupt))
        template = choose_template("auto" if file.templates else "chatml", file)
        chat = stack.enter_context(Scheduler(model, template, settings, RenderOptions(), interrupt))
        (prompt,) = chat.submit(edge.Request(Dialog("", "", (Turn(QUERY),)))).contexts
        chat.cancel()
        bare = BareLoop(model, options.threads)
        llama = Llama(
            str(path), n_ctx=CONTEXT, n_threads=options.threads, n_threads_batch=options.threads, verbose=False
        )
        ways: dict[str, Callable[[], float]] = {
            "answer_one": lambda: ours(chat, options.tokens),
            "Llama": lambda: high_level(llama, prompt, options.tokens),
            "bare loop": lambda: bare.run(prompt, options.tokens),
        }
        if options.llama_bench:
            ways["llama-bench"] = lambda: llama_bench(options.llama_bench, path, options.tokens, options.threads)
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(options.rounds + 1):
            for name, way in ways.items():
                speed = way()
                if number:  # the first round pages the model in
                    speeds[name].append(speed)
    return speeds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=128, help="tokens of each answer")
    parser.add_argument("--rounds", type=int, default=7, help="rounds; the first extra one is not counted")
    parser.add_argument("--threads", type=int, default=physical_cores(), help="default: one per physical core")
    parser.add_argument("--llama-bench", metavar="PATH", help="llama.cpp's benchmark program")
    parser.add_argument("--model", metavar="GGUF", type=Path, help="a model of yours, that does not end early")
    options = parser.parse_args()
    path = options.model or random_model("metaalign-edge-bench-0.5b-q8_0.gguf", Tokenizer.plain)
    speeds = measure(path, options)
    print(f"{path.name}, {options.tokens} tokens, {options.threads} threads, {options.rounds} rounds\n")
    medians = {name: statistics.median(found) for name, found in speeds.items()}
    peers = list(medians)[1:]
    print(f"{'way':<30}{'median tokens/s':>16}{'best':>8}" + "".join(f"{'of ' + peer:>18}" for peer in peers))
    for name, median in medians.items():
        ratios = "".join(f"{median / medians[peer]:>18.2f}" for peer in peers)
        print(f"{name:<30}{median:>16.1f}{max(speeds[name]):>8.1f}{ratios}")


if __name__ == "__main__":
    main()
