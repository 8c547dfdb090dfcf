"""Metadata of any type, and names that are no text: an answer, or one line that says what is wrong."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.damaged_gguf import Parts, packed_text
from helpers.gguf_files import copy_model

from metaalign_edge_runtime.errors import LoadError
from metaalign_edge_runtime.llama.gguf import ModelFile
from metaalign_edge_runtime.llama.token_texts import token_texts

Fails = Callable[..., str]
Run = Callable[..., "subprocess.CompletedProcess[str]"]
OTHER = {  # values of every type, packed with their types
    "text": struct.pack("<I", 8) + packed_text(b"many"),
    "whole number": struct.pack("<II", 4, 7),
    "negative": struct.pack("<Ii", 5, -1),
    "float": struct.pack("<If", 6, float("nan")),
    "truth": struct.pack("<IB", 7, 1),
    "list": struct.pack("<IIQ", 9, 8, 2) + packed_text(b"a") + packed_text(b"b"),
    "no text": struct.pack("<I", 8) + packed_text(b"\xff\x1b]0;owned\x07"),
}
ASKED = [
    *("general.architecture", "general.name", "general.type", "general.license", "general.file_type", "split.count"),
    *(
        "llama.context_length",
        "llama.block_count",
        "llama.attention.head_count",
        "llama.vocab_size",
        "metaalign.template",
    ),
    *("general.sampling.temp", "general.sampling.top_k", "general.sampling.penalty_repeat", "general.sampling.min_p"),
    *("tokenizer.chat_template", "tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.tokens"),
    *("tokenizer.ggml.token_type", "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id"),
    *("tokenizer.ggml.add_bos_token", "tokenizer.chat_template.tool_use", "llama.rope.scaling.type"),
]


def replaced(source: Path, path: Path, key: str, value: bytes) -> Path:
    """Copy a GGUF with another value under a key."""
    parts = Parts.of(source)
    parts.keys = [(name, old) for name, old in parts.keys if name != key.encode()] + [(key.encode(), value)]
    path.write_bytes(parts.head() + parts.weights)
    return path


@pytest.mark.parametrize("key", ASKED)
def test_a_value_of_another_type_is_passed_over_or_named(
    key: str, tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], here: Run
) -> None:
    path = tmp_path / "odd.gguf"
    for kind, value in OTHER.items():
        replaced(tiny, path, key, value)
        for command in (
            ("models", "show", str(path)),
            ("render", "-m", str(path), "tea?"),
            ("models", "show", str(path), "--json"),
        ):
            done = here(*command)
            assert done.returncode in (0, 3, 5, 7), (kind, command, done.stderr)
            assert "unexpected" not in done.stderr and "\x1b" not in done.stdout + done.stderr, (kind, command)
            if done.returncode:
                assert done.stdout == "" and done.stderr.count("\n") == 1, (kind, command, done)


def test_recommendations_that_are_no_numbers_are_passed_over(tiny: Path, tmp_path: Path, run: Run) -> None:
    path = tmp_path / "odd.gguf"
    for name in ("temp", "top_k", "top_p", "min_p", "penalty_repeat"):
        for kind in ("text", "list", "float", "negative"):
            replaced(tiny, path, f"general.sampling.{name}", OTHER[kind])
            assert ModelFile(path).sampling(name) is None
    replaced(tiny, path, "general.sampling.penalty_repeat", struct.pack("<If", 6, 0.0))
    assert run("chat", "-m", str(path), "-n", "2", "-q", "tea?").returncode == 0


def test_a_default_template_that_is_no_text_is_named_and_another_one_can_be_given(
    tiny: Path, tmp_path: Path, fails: Fails, run: Run
) -> None:
    path = replaced(tiny, tmp_path / "odd.gguf", "tokenizer.chat_template", OTHER["whole number"])
    assert "tokenizer.chat_template is a whole number, not a text" in fails(5, "chat", "-m", str(path), "tea?")
    assert run("render", "-m", str(path), "--template", "metaalign", "tea?").stdout


def test_tokens_that_are_not_utf_8_keep_their_bytes(tiny: Path, tmp_path: Path, run: Run) -> None:
    parts = Parts.of(tiny)
    at = next(at for at, (key, _) in enumerate(parts.keys) if key == b"tokenizer.ggml.tokens")
    word = next(
        str(word) for word in ModelFile(tiny).items("tokenizer.ggml.tokens") if len(word) == 5 and word.isascii()
    )
    new = parts.keys[at][1].replace(packed_text(word.encode()), packed_text(b"a\xffb\x1bc"))
    assert new != parts.keys[at][1]
    parts.keys[at] = (parts.keys[at][0], new)
    path = tmp_path / "odd.gguf"
    path.write_bytes(parts.head() + parts.weights)
    assert len(token_texts(ModelFile(path))) == len(token_texts(ModelFile(tiny)))
    for command in (("models", "show", str(path)), ("chat", "-m", str(path), "-n", "1", "-q", "tea?")):
        done = run(*command)
        assert done.returncode == 0 and "\x1b" not in done.stderr, done.stderr


def test_no_name_in_a_file_reaches_the_terminal_as_a_command(tiny: Path, tmp_path: Path, run: Run) -> None:
    path = copy_model(
        tiny,
        tmp_path / "odd.gguf",
        add={"general.license": "a\x1b]0;owned\x07b", "general.name": "\x1b[31mred", "metaalign.template": "\x1b[2Jx"},
    )
    (tmp_path / "home/.lmstudio/models/some/things").mkdir(parents=True)
    (tmp_path / "home/.lmstudio/models/some/things/odd.gguf").write_bytes(path.read_bytes())
    for command in (
        ("models", "show", str(path)),
        ("models", "list"),
        ("doctor", "-m", str(path)),
        ("chat", "-m", str(path), "-n", "1", "-v", "--temp", "0", "tea?"),
        ("render", "--tokens", "-m", str(path), "-v", "tea?"),
        ("chat", "-m", str(path), "-n", "1", "-vv", "--temp", "0", "tea?"),
        ("convert", str(path), "--outtype", "q8_0", "--dry-run"),
    ):
        done = run(*command)
        assert not any(sign in done.stderr for sign in "\x1b\x07\x9b"), command
        assert command[0] == "chat" or not any(sign in done.stdout for sign in "\x1b\x07\x9b"), command


def test_models_that_load_at_the_same_time_keep_their_reasons(tiny: Path, tmp_path: Path) -> None:
    copy_model(tiny, tmp_path / "bad.gguf", drop=["tokenizer.ggml.merges"])
    code = """
import sys, threading, metaalign_edge as edge
said = []
def load():
    try:
        edge.Model.open(sys.argv[1])
    except edge.LoadError as error:
        said.append(str(error))
for _ in range(5):
    threads = [threading.Thread(target=load) for _ in range(6)]
    [one.start() for one in threads]
    [one.join() for one in threads]
import json
print(json.dumps(said))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "bad.gguf")], capture_output=True, text=True, timeout=120
    )
    said = json.loads(done.stdout)
    assert len(said) == 30 and all("cannot find tokenizer merges" in text for text in said), said


def test_a_tensor_with_a_name_or_a_shape_of_any_length_is_refused_at_once(tiny: Path, tmp_path: Path) -> None:
    for change in ([b"n" * 64, [1], 0, 0], [b"n", [1] * 5, 0, 0], [b"\xff", [1], 0, 0]):
        parts = Parts.of(tiny)
        parts.tensors.append(change)
        path = tmp_path / "odd.gguf"
        path.write_bytes(parts.head() + parts.weights)
        with pytest.raises(LoadError, match="list of tensors"):
            ModelFile(path).check_whole()
