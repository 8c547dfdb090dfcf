"""Files that llama.cpp would not survive are refused before it reads them, in one line that names the fault."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.damaged_gguf import Parts, packed_text
from helpers.vocabularies import write_spm

Fails = Callable[..., str]
Run = Callable[..., "subprocess.CompletedProcess[str]"]
PYTHON = "import sys, metaalign_edge as edge\ntry:\n    edge.Model.open(sys.argv[1])\nexcept edge.LoadError as error:\n    print(error)"


def whole(number: int) -> bytes:
    """Pack a whole number with its type."""
    return struct.pack("<II", 4, number)


def real(number: float) -> bytes:
    """Pack a 32-bit float with its type."""
    return struct.pack("<If", 6, number)


def text(value: bytes) -> bytes:
    """Pack a text with its type."""
    return struct.pack("<I", 8) + packed_text(value)


def texts(*values: bytes) -> bytes:
    """Pack a list of texts with its type."""
    return struct.pack("<IIQ", 9, 8, len(values)) + b"".join(map(packed_text, values))


def changed(source: Path, path: Path, **values: bytes | None) -> Path:
    """Copy a GGUF with other values; in the names of the keys, `__` stands for a dot."""
    parts, new = Parts.of(source), {name.replace("__", ".").encode(): value for name, value in values.items()}
    parts.keys = [(key, value) for key, value in parts.keys if key not in new]
    parts.keys += [(key, value) for key, value in new.items() if value is not None]
    path.write_bytes(parts.head() + parts.weights)
    return path


def without_byte_tokens(folder: Path) -> Path:
    """Write a SentencePiece vocabulary whose byte tokens are spelt otherwise, so that they are none."""
    parts = Parts.of(write_spm(folder / "whole.gguf"))
    parts.keys = [(key, value.replace(b"<0x", b"<9x")) for key, value in parts.keys]
    (folder / "bytes.gguf").write_bytes(parts.head())
    return folder / "bytes.gguf"


@pytest.mark.parametrize("values, said", [
    ({"llama__block_count": whole(600)}, "block_count is 600"),
    ({"llama__block_count": whole(0)}, "block_count is 0"),
    ({"llama__block_count": text(b"two")}, "block_count is a text, not a whole number"),
    ({"llama__nextn_predict_layers": whole(99)}, "nextn_predict_layers is 99"),
    ({"llama__expert_count": whole(5000)}, "expert_count is 5,000"),
    ({"llama__expert_count": whole(8)}, "expert_used_count is 0"),
    ({"llama__expert_used_count": whole(2)}, "expert_used_count is 2"),
    ({"llama__expert_count": whole(8), "llama__expert_used_count": whole(2), "llama__expert_group_count": whole(3)}, "3 groups"),
    ({"llama__attention__head_count_kv": whole(3)}, "heads of keys and values"),
    ({"llama__attention__layer_norm_rms_epsilon": real(-1.0)}, "layer_norm_rms_epsilon"),
    ({"llama__attention__layer_norm_rms_epsilon": real(float("nan"))}, "layer_norm_rms_epsilon"),
    ({"llama__rope__scaling__type": text(b"bent")}, "'bent'"),
    ({"llama__context_length": text(b"many")}, "context_length is a text"),
    ({"llama__context_length": whole(0)}, "context_length is 0"),
    ({"tokenizer__ggml__model": text(b"rwkv")}, "'rwkv'"),
    ({"tokenizer__ggml__tokens": texts()}, "vocabulary is empty"),
    ({"tokenizer__ggml__tokens": texts(b"a", b"b", b"a")}, "a token stands in its vocabulary twice"),
    ({"tokenizer__ggml__tokens": texts(b"a", b"b", b"a\0c")}, "a token stands in its vocabulary twice"),
    ({"tokenizer__ggml__bos_token_id": text(b"x")}, "bos_token_id is a text"),
    ({"tokenizer__ggml__merges": None}, "cannot find tokenizer merges"),
    ({"tokenizer__ggml__pre": text(b"brand-new")}, "unknown pre-tokenizer type: 'brand-new'"),
    ({"general__architecture": text(b"\x1b]0;owned\x07llama")}, "unknown model architecture: '\\x1b]0;owned\\x07llama'"),
])  # fmt: skip
def test_a_host_program_survives_a_damaged_file(
    values: dict[str, bytes | None], said: str, tiny: Path, tmp_path: Path
) -> None:
    path = changed(tiny, tmp_path / "damaged.gguf", **values)
    done = subprocess.run([sys.executable, "-c", PYTHON, str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and said in done.stdout and done.stdout.count("\n") == 1, (
        done.returncode,
        done.stdout,
        done.stderr,
    )


@pytest.mark.parametrize("kind", [24, 26, 28])
def test_weights_that_are_no_weights_are_refused(kind: int, tiny: Path, tmp_path: Path, fails: Fails) -> None:
    parts = Parts.of(tiny)
    tensor = next(tensor for tensor in parts.tensors if tensor[0] == b"blk.0.attn_q.weight")
    tensor[2] = kind
    path = tmp_path / "damaged.gguf"
    path.write_bytes(parts.head() + parts.weights)
    assert "attn_q.weight holds" in fails(5, "convert", str(path), "--outtype", "Q4_0", "--dry-run")
    assert fails(5, "chat", "-m", str(path), "tea?")


def test_convert_says_why_llama_cpp_refuses_a_gguf(tiny: Path, tmp_path: Path, fails: Fails) -> None:
    for number, said in ((600, "block_count is 600"), (1, "llama.cpp cannot quantise this")):
        path = changed(tiny, tmp_path / "damaged.gguf", llama__block_count=whole(number))
        if number == 1:
            path = changed(path, path, llama__embedding_length=text(b"wide"))
        assert said in fails(5, "convert", str(path), "--outtype", "Q4_0", "--dry-run")


def test_letters_that_a_vocabulary_cannot_write_are_refused(tmp_path: Path, fails: Fails, run: Run) -> None:
    path, template = without_byte_tokens(tmp_path), tmp_path / "plain.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    command = ("render", "--tokens", "--template", str(template), "-m", str(path))
    assert "'é'" in fails(5, *command, "café")
    assert "nor for its bytes" in fails(5, *command, "tea \U0001f375")
    done = run(*command, "tea and water")
    assert done.returncode == 0, done.stderr


def test_a_byte_level_vocabulary_that_calls_itself_sentencepiece_is_refused(tiny: Path, tmp_path: Path) -> None:
    path = changed(tiny, tmp_path / "damaged.gguf", tokenizer__ggml__model=text(b"llama"))
    code = f"{PYTHON}\nwith edge.Model.open(sys.argv[1], template='chatml') as model:\n    edge.generate(model, 'Tea?')"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "LoadError: this vocabulary has tokens neither" in done.stderr, done.stderr


def test_an_abort_of_llama_cpp_ends_in_one_line(tiny: Path, tmp_path: Path, fails: Fails) -> None:
    path = changed(tiny, tmp_path / "damaged.gguf", tokenizer__ggml__tokens=texts(*[b"a"] * 512))
    assert "llama.cpp gave up" in fails(5, "render", "--tokens", "-m", str(path), "tea?")


def test_an_exception_that_llama_cpp_does_not_catch_ends_in_one_line(tmp_path: Path) -> None:
    code = (
        "import sys, ctypes, metaalign_edge\nfrom metaalign_edge_runtime.llama import library, vocabulary\n"
        "library.is_program = True\nllama = library.start()\n"
        "words = llama.llama_model_get_vocab(vocabulary.load_words(sys.argv[1]))\n"
        "llama.llama_tokenize(words, b'\\xc3\\xa9', 2, (ctypes.c_int32 * 9)(), 9, False, False)"
    )
    path = without_byte_tokens(tmp_path)
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 5 and done.stderr.count("\n") == 1 and "does not catch" in done.stderr, done.stderr
