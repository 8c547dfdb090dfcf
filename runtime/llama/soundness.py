"""What a model's file must not say: llama.cpp ends the process on some values instead of refusing the file.

Most damage llama.cpp finds by itself, and gives a reason. Here is the rest: what it asserts, divides by, or reads as
something else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from ..errors import LoadError
from . import library
from .gguf import DEFAULT_ALIGNMENT, GGUFArray, ModelFile

OTHER_VOCABULARIES = ("bert", "t5", "rwkv", "plamo2", "test", "none", "no_vocab")
MOST_LAYERS, MOST_EXPERTS = 512, 1024  # llama.cpp's limits
ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")
BYTE_TOKENS = {f"<0x{byte:02X}>" for byte in range(256)}  # of a SentencePiece vocabulary
MARKS = {False: (4,), True: (2, 3, 4)}  # types of tokens that llama.cpp finds in text: user-defined; unknown, control
PLAIN_NUMBERS = range(24, 29)  # ggml's types of whole numbers and of 64-bit floats: it cannot multiply by them
FLOATS = (0, 1, 30)  # F32, F16, BF16: the types of vectors


def check_vocabulary(file: ModelFile) -> None:
    """Make sure that llama.cpp either loads a file's vocabulary, or refuses it with a reason.

    Raises:
        LoadError: the vocabulary is of a kind that chat models do not have, or damaged.
    """
    name = file.get("tokenizer.ggml.model", "none")
    if name in OTHER_VOCABULARIES:
        raise LoadError(
            f"{file.path} has a vocabulary of the kind {name!r}; chat models have SentencePiece or BPE ones"
        )
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, GGUFArray) and not tokens.length:
        raise damaged(file, "its vocabulary is empty")
    if not library.is_program:  # the program itself says so when llama.cpp finds it, without 50 ms for every load
        words = [word.partition("\0")[0] for word in file.items("tokenizer.ggml.tokens") if isinstance(word, str)]
        words = list(filter(None, words))  # llama.cpp ends a text at a NUL, and gives empty ones names of their own
        if len(set(words)) < len(words):
            raise damaged(file, "a token stands in its vocabulary twice")


def check_model(file: ModelFile) -> None:
    """Make sure that llama.cpp either loads a model and computes with it, or refuses it with a reason.

    Raises:
        LoadError: it would do neither.
    """
    check_vocabulary(file)
    check_weights(file)


def check_weights(file: ModelFile) -> None:
    """Do as `check_model`, for a file whose vocabulary is not used.

    Raises:
        LoadError: llama.cpp would end the process.
    """
    if fault := next(faults_of_sizes(file), "") or next(faults_of_tensors(file), ""):
        raise damaged(file, fault)


class Speller:
    """Tells which texts a SentencePiece vocabulary without all byte tokens has no tokens for: llama.cpp ends there."""

    def __init__(self, file: ModelFile) -> None:
        words, kinds = list(file.items("tokenizer.ggml.tokens")), list(file.items("tokenizer.ggml.token_type"))
        self._letters = {word for word in words if len(word) == 1}
        self._bytes = BYTE_TOKENS & set(words)
        typed = list(zip(words, kinds, strict=False))
        self._marks = {special: pattern([word for word, kind in typed if kind in MARKS[special]]) for special in MARKS}

    def check(self, text: str, special: bool) -> None:
        """Make sure that the vocabulary has a token for each letter, or for its bytes.

        Args:
            special: control tokens are recognised in the text.

        Raises:
            LoadError: it has none for a letter.
        """
        text = self._marks[special].sub("", text)
        written = f" {text}".replace(" ", "\u2581") if text else ""  # most such vocabularies put a space in front
        for letter in sorted(set(written) - self._letters):
            if any(f"<0x{byte:02X}>" not in self._bytes for byte in letter.encode()):
                raise LoadError(
                    f"this vocabulary has tokens neither for {letter!r} nor for its bytes: take it out of the text, or "
                    "take another model"
                )


def pattern(words: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that finds words, the longest first; without words, nothing."""
    return re.compile("|".join(map(re.escape, sorted(filter(None, words), key=len, reverse=True))) or r"(?!)")


def damaged(file: ModelFile, fault: str) -> LoadError:
    """Return the error for a damaged file."""
    return LoadError(f"cannot load {file.path}: {fault}: download or convert it again")


def faults_of_sizes(file: ModelFile) -> Iterator[str]:
    """Yield what is wrong with the sizes in a file's metadata."""
    layers, experts = file.get(f"{file.architecture}.block_count", 1), file.number("expert_count")
    heads, groups, taken = map(file.number, ("attention.head_count", "expert_group_count", "expert_group_used_count"))
    for name, count, least, most in (
        ("block_count", layers, 1, MOST_LAYERS),
        ("nextn_predict_layers", file.number("nextn_predict_layers"), 0, layers),
        ("expert_count", experts, 0, MOST_EXPERTS),
        ("expert_used_count", file.number("expert_used_count"), min(experts, 1), experts),
        ("expert_group_count", groups, 0, max(0, experts - 1)),
    ):
        if not least <= count <= most:
            yield f"{file.architecture}.{name} is {count:,}, not {least} to {most:,}"
    if groups > 1 and (experts % groups or not 0 < taken < groups):
        yield f"of {groups} groups of {experts} experts {taken} are used"
    if (shared := file.number("attention.head_count_kv", heads)) and heads % shared:
        yield f"{heads} attention heads cannot share {shared} heads of keys and values"
    for name in ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon", "attention.group_norm_epsilon"):
        if not file.get(f"{file.architecture}.{name}", 0.0) >= 0:  # nor a NaN
            yield f"{file.architecture}.{name} is no number from 0 on"
    kind = file.text(f"{file.architecture}.rope.scaling.type")
    if kind and kind not in ROPE_SCALINGS:
        yield f"{file.architecture}.rope.scaling.type is {kind!r}, which llama.cpp does not know"


def faults_of_tensors(file: ModelFile) -> Iterator[str]:
    """Yield what is wrong with the list of tensors, as far as llama.cpp does not look."""
    for part in file.files():
        if "general.alignment" in part.metadata and part.weights_start() % DEFAULT_ALIGNMENT:
            yield f"its weights do not begin at a multiple of {DEFAULT_ALIGNMENT} bytes"
        for tensor in part.tensor_infos():
            if tensor.kind in PLAIN_NUMBERS and tensor.name.endswith(".weight"):
                yield f"{tensor.name} holds whole numbers or 64-bit ones, which are no weights"
            if tensor.kind not in FLOATS and len([size for size in tensor.shape if size > 1]) == 1:
                yield f"{tensor.name} is a vector of a type that only matrices have"
