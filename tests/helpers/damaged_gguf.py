"""GGUF files damaged at random: in the types and values of their keys, in the list of tensors, in single bytes."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import os
import signal
import struct
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import metaalign_edge as edge
from metaalign_edge_runtime.errors import EdgeError
from metaalign_edge_runtime.llama import library
from metaalign_edge_runtime.llama.gguf import GGUFReader, ModelFile

SECONDS = 60  # that a command may take on a damaged file of some kilobytes
DOCUMENTED = (0, 2, 3, 5, 6, 7)  # exit codes that a damaged file may lead to
TEXTS = (b"", b"\xff\xfe", b"caf\xe9", b"\x1b]0;owned\x07", b"\x1b[31m", b"a\0b", b"llama", b"qwen2", b"gpt2", b"none")
TEXTS += (b"no_vocab", b"default", b"{{", b"{{ 1 // 0 }}", b"x" * 3000, b"-1", b"adapter", b"bert", b"t5", b"gemma3")
NUMBERS = (0, 1, 2, 3, 5, 7, 31, 33, 64, 127, 255, 511, 513, 600, 65535, 2**31 - 1, 2**31, 2**32 - 1)
WIDE = (-1, -2, -(2**31), 2**32, 2**63 - 1, -(2**63))
FLOATS = (0.0, -1.0, 0.5, 1e30, float("inf"), float("nan"), -float("inf"))
NAMES = ("tokenizer.ggml.bos_token_id", "tokenizer.ggml.add_bos_token", "tokenizer.chat_template", "general.type")
NAMES += ("general.alignment", "general.sampling.temp", "general.sampling.top_k", "metaalign.template", "split.count")
NAMES += ("tokenizer.chat_template.tool", "general.file_type", "general.license", "llama.vocab_size", "split.no")
NAMES += ("llama.attention.key_length", "llama.rope.scaling.type", "llama.expert_count", "tokenizer.ggml.eot_token_id")
NAMES += ("llama.attention.sliding_window", "llama.pooling_type", "llama.attention.causal", "general.sampling.min_p")


def packed_text(text: bytes) -> bytes:
    """Pack a text as GGUF does: its length, its bytes."""
    return struct.pack("<Q", len(text)) + text


def hostile(random: Random) -> bytes:
    """Return a value that hardly belongs where it is put: its type, and its bytes."""
    what = random.random()
    if what < 0.25:
        return struct.pack("<I", 8) + packed_text(random.choice(TEXTS))
    if what < 0.55:
        return struct.pack("<II", 4, random.choice(NUMBERS))
    if what < 0.65:
        return struct.pack("<Iq", 11, random.choice(WIDE))
    if what < 0.7:
        return struct.pack("<Ii", 5, random.choice((-1, 0, 1, 2**31 - 1)))
    if what < 0.8:
        return struct.pack("<If", 6, random.choice(FLOATS))
    if what < 0.85:
        return struct.pack("<IB", 7, random.choice((0, 1, 2, 255)))
    count = random.choice((0, 1, 2, 3, 600))
    if random.random() < 0.5:
        return struct.pack("<IIQ", 9, 8, count) + b"".join(packed_text(random.choice(TEXTS)) for _ in range(count))
    return struct.pack("<IIQ", 9, random.choice((4, 5, 6)), count) + random.randbytes(4 * count)


@dataclass
class Parts:
    """A GGUF file in parts that can be changed."""

    keys: list[tuple[bytes, bytes]]  # name; type and value as they stand in the file
    tensors: list[list[Any]]  # name, sizes, type, offset
    weights: bytes

    @classmethod
    def of(cls, path: Path) -> Parts:
        """Take a file apart."""
        file = ModelFile(path)
        keys = [(key.encode(), file.packed(key)) for key in file.metadata]
        tensors = [[info.name.encode(), list(info.shape), info.kind, info.offset] for info in file.tensor_infos()]
        return cls(keys, tensors, path.read_bytes()[file.weights_start() :] if tensors else b"")

    def head(self) -> bytes:
        """Pack all that stands before the weights."""
        packed = b"GGUF" + struct.pack("<IQQ", 3, len(self.tensors), len(self.keys))
        packed += b"".join(packed_text(name) + value for name, value in self.keys)
        for name, sizes, kind, offset in self.tensors:
            packed += packed_text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)
        return packed + bytes(-len(packed) % 32)

    def damage(self, random: Random) -> None:
        """Damage a key, or an entry of the list of tensors."""
        what, place = random.random(), random.randrange(len(self.keys))
        name, value = self.keys[place]
        if what < 0.2:
            self.keys[place] = name, hostile(random)
        elif what < 0.35:
            form, kind, values = random.choice((("<II", 4, NUMBERS), ("<II", 4, NUMBERS), ("<If", 6, FLOATS)))
            alike = [at for at, (_, value) in enumerate(self.keys) if value[:4] == struct.pack("<I", kind)]
            place = random.choice(alike or [place])
            self.keys[place] = self.keys[place][0], struct.pack(form, kind, random.choice(values))
        elif what < 0.4:
            del self.keys[place]
        elif what < 0.55:
            self.keys.append((random.choice(NAMES).encode(), hostile(random)))
        elif what < 0.6:
            self.keys[place] = random.choice((name[:-1], b"", b"\xff" + name, name + b"\x1b[1m", b"k" * 200)), value
        elif what < 0.8 or not self.tensors:
            arrays = [at for at, (_, value) in enumerate(self.keys) if value[:4] == struct.pack("<I", 9)]
            place = random.choice(arrays or [place])
            self.keys[place] = self.keys[place][0], damaged_array(random, self.keys[place][1])
        else:
            self.damage_tensor(random, random.choice(self.tensors))

    def damage_tensor(self, random: Random, tensor: list[Any]) -> None:
        """Damage an entry of the list of tensors, or take it away."""
        what = random.randrange(6)
        if what == 0:
            tensor[0] = random.choice(
                (b"", b"\xff", b"x" * 70, b"blk.9.attn_q.weight", self.tensors[0][0], b"blk..\x1b[2J")
            )
        elif what == 1:
            tensor[1][random.randrange(len(tensor[1]))] = random.choice((0, 1, 7, 64, 2**31, 2**40, 2**63, 2**64 - 1))
        elif what == 2:
            tensor[1] = random.choice(([], [1] * 5, tensor[1][::-1], tensor[1][:1], [*tensor[1], 2]))
        elif what == 3:
            tensor[2] = random.choice((0, 1, 2, 4, 8, 12, 26, 30, 39, 99, 2**32 - 1))
        elif what == 4:
            tensor[3] = random.choice((0, 1, 33, tensor[3] + 32, 2**40, 2**64 - 1))
        else:
            self.tensors.remove(tensor)


def damaged_array(random: Random, packed: bytes) -> bytes:
    """Shorten a packed array, or put other items into it, or say that its items are of another type."""
    reader = GGUFReader(packed, 4)
    if packed[:4] != struct.pack("<I", 9):
        return hostile(random)
    kind, length = reader.scalar("<I"), reader.scalar("<Q")
    items = []
    for _ in range(length):
        begin = reader.at
        reader.skip(kind, 1)
        items.append(packed[begin : reader.at])
    what = random.randrange(5)
    if what == 0:
        del items[random.randrange(len(items) + 1) :]
    elif what == 1 and items:
        items[random.randrange(len(items))] = random.choice(items)
    elif what == 2 and items:
        at, size = random.randrange(len(items)), len(items[0])
        items[at] = packed_text(random.choice(TEXTS)) if kind == 8 else random.randbytes(size)
    elif what == 3:
        items += items[:3]
    elif kind != 8:
        kind = random.choice((4, 5, 6))
    return struct.pack("<IIQ", 9, kind, len(items)) + b"".join(items)


def damage_bytes(random: Random, data: bytes) -> bytes:
    """Change, take out, double or cut some bytes."""
    damaged = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 8))):
        place, what = random.randrange(len(damaged)), random.random()
        if what < 0.7:
            damaged[place] = random.choice((0, 1, 0x1B, 0x7F, 0xFF, random.randrange(256)))
        elif what < 0.8:
            del damaged[place : place + random.randrange(1, 20)]
        elif what < 0.9:
            damaged[place:place] = damaged[place : place + random.randrange(1, 20)]
        else:
            del damaged[place + 1 :]
    return bytes(damaged)


def damaged(random: Random, whole: Path) -> bytes:
    """Return a damaged copy of a whole file."""
    parts = Parts.of(whole)
    if random.random() < 0.25:
        head = parts.head()
        return damage_bytes(random, head) + parts.weights
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        if parts.keys:
            parts.damage(random)
    return parts.head() + parts.weights


# -- what a command makes of a file -----------------------------------------------------------------------------------


def commands_on(path: Path, template: Sequence[str] = ()) -> Iterator[list[str]]:
    """List command lines that read a model's file in different ways."""
    yield ["models", "show", str(path)]
    yield ["render", "--tokens", "-m", str(path), *template, "--pref", "short", "Tea, caf\u00e9 \U0001f375?"]
    yield ["chat", "-m", str(path), *template, "-n", "2", "--temp", "0", "-q", "--no-cache", "Tea?"]
    yield ["convert", str(path), "-o", str(path.with_suffix(".out")), "--outtype", "Q4_0", "--dry-run"]


@functools.cache
def load_once() -> None:
    """Import what the commands need, so that no fork has to."""
    for name in ("models", "render", "chat", "convert", "measure.trial"):
        importlib.import_module(f"metaalign_edge_commands.{name}")
    for name in (
        "metaalign_edge_convert",
        "metaalign_edge_convert.quantize",
        "rich.console",
        "platformdirs",
        "jinja2.ext",
    ):
        importlib.import_module(name)
    library.llama_cpp()


def in_fork(arguments: Sequence[str], folder: Path) -> tuple[int, str, str]:
    """Run a command line in a fork of this process, as the program does; return its status, stdout and stderr.

    The status is the exit code, or minus the number of the signal that ended it.
    """
    load_once()  # llama.cpp, too, which computes nothing in this process
    outputs = [folder / "stdout", folder / "stderr"]
    child = os.fork()
    if not child:
        for number, output in enumerate(outputs, start=1):
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdin, sys.stdout, sys.stderr = (
            io.TextIOWrapper(os.fdopen(number, "rb" if not number else "wb"), errors="replace") for number in range(3)
        )
        signal.alarm(SECONDS)
        sys.argv = ["metaalign-edge", *arguments]
        with contextlib.suppress(BaseException):
            edge.main()
        os._exit(1)
    _, status = os.waitpid(child, 0)
    said = [output.read_bytes().decode("utf-8", "replace") for output in outputs]
    return os.waitstatus_to_exitcode(status), said[0], said[1]


def fault(command: str, status: int, stdout: str, stderr: str) -> str:
    """Return what is wrong with the end of a command on a damaged file; an empty text if nothing is."""
    lines, listed = stderr.splitlines(), "" if command == "chat" else stdout  # an answer is what the model says
    if status not in DOCUMENTED:
        return f"exit code {status}: {' / '.join(lines[:3])[:300]}"
    if "Traceback" in stderr or "metaalign-edge: unexpected" in stderr:
        return f"a surprise: {lines[-1][:300]}"
    if any((letter < " " and letter not in "\n\t") or "\x7f" <= letter < "\xa0" for letter in stderr + listed):
        return "a control character reaches the terminal"
    if status and (stdout or not lines or not lines[-1].startswith("metaalign-edge: ")):
        return f"exit code {status}, and not one line that says why: {stderr[:300]!r}"
    return ""


__all__ = ["EdgeError", "Parts", "commands_on", "damaged", "fault", "in_fork"]
