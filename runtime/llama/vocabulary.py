"""llama.cpp's vocabulary of a model, loaded without the weights."""

from __future__ import annotations

import ctypes
import functools
import threading
from pathlib import Path
from typing import Any

from ..errors import ContextOverflow, LoadError, TierViolation
from . import library, memory, soundness
from .gguf import ModelFile
from .library import Background, Closing
from .soundness import BYTE_TOKENS, Speller

TEXT_STACK = 1024  # bytes of stack per byte of text: llama.cpp's regex fallback recurses per character (400 were seen)
ATTR_UNKNOWN, ATTR_UNUSED, ATTR_NORMAL, ATTR_CONTROL, ATTR_USER_DEFINED, ATTR_BYTE = 1, 2, 4, 8, 16, 32  # llama.h
ATTR_LSTRIP, ATTR_RSTRIP = 128, 256


class LlamaVocabulary(Closing):
    """llama.cpp's vocabulary, as `tokenize` needs it, loaded by `load_vocabulary`. Close it, or use it in a `with`.

    Args:
        model: llama.cpp's pointer to a model; the vocabulary frees it.

    Raises:
        LoadError: the vocabulary is of a kind that chat models do not have.
    """

    def __init__(self, model: Any, file: ModelFile) -> None:
        self._llama, self._model, self.file = library.llama_cpp(), model, file
        self.pointer = self._llama.llama_model_get_vocab(model)
        self.size: int = self._llama.llama_vocab_n_tokens(self.pointer)
        kind = self._llama.llama_vocab_type(self.pointer)
        if kind not in (1, 2):  # LLAMA_VOCAB_TYPE_SPM, LLAMA_VOCAB_TYPE_BPE
            self.close()
            name = file.text("tokenizer.ggml.model") or "none"
            raise LoadError(
                f"{file.path} has a vocabulary of the kind {name!r}; chat models have SentencePiece or BPE ones"
            )
        self.escapes_spaces = kind == 1
        self.space_prefix = kind == 1 and bool(file.metadata.get("tokenizer.ggml.add_space_prefix", True))
        bos = self._llama.llama_vocab_bos(self.pointer)
        self.bos: int | None = bos if bos >= 0 and self._llama.llama_vocab_get_add_bos(self.pointer) else None
        self._speller = Speller(file) if kind == 1 and self._lacks_bytes() else None
        self._pieces: dict[int, bytes] = {}
        self._buffer = ctypes.create_string_buffer(256)
        if not self.escapes_spaces:  # some BPE vocabularies write a space as SentencePiece does (Gemma 4)
            probe = b"".join(map(self.piece, self._encode("\u2581".encode(), special=False)))
            self.escapes_spaces = probe == b" "
            self._pieces.clear()

    def _lacks_bytes(self) -> bool:
        """Tell whether a SentencePiece vocabulary lacks a byte token. They stand near its beginning."""
        missing = {token.encode() for token in BYTE_TOKENS}
        for token in range(self.size):
            missing.discard(self._llama.llama_vocab_get_text(self.pointer, token))
            if not missing:
                return False
        return True

    def close(self) -> None:
        """Free the model; repeated calls are harmless."""
        if self._model:
            self._llama.llama_model_free(self._model)
            self._model = None

    def encode(self, text: str, special: bool) -> list[int]:
        """Tokenise a text. A long one gets a thread with a large stack: llama.cpp's regex recurses per character.

        Raises:
            LoadError: the vocabulary has no token for a letter. ContextOverflow: the text is too long for a stack.
        """
        if self._speller:
            self._speller.check(text, special)
        data = text.encode()
        if len(data) < 2048:
            return self._encode(data, special)
        result: list[list[int]] = []
        before = threading.stack_size(max(TEXT_STACK * len(data), 1 << 24))
        try:
            thread = threading.Thread(target=lambda: result.append(self._encode(data, special)))
            thread.start()
            thread.join()
        except RuntimeError:
            raise ContextOverflow(
                f"{len(data):,} bytes are too many to tokenise on this machine: shorten the text"
            ) from None
        finally:
            threading.stack_size(before)
        return result[0]

    def _encode(self, data: bytes, special: bool) -> list[int]:
        room = len(data) + 16  # at most one token per byte, and the space that SentencePiece puts in front
        ids = (ctypes.c_int32 * room)()
        count = self._llama.llama_tokenize(self.pointer, data, len(data), ids, room, False, special)
        if count < 0:
            raise TierViolation("llama.cpp cannot tokenise this text")
        return ids[:count]

    def piece(self, token: int) -> bytes:
        """Return the bytes a token stands for."""
        found = self._pieces.get(token)
        if found is None:
            length = self._llama.llama_token_to_piece(self.pointer, token, self._buffer, len(self._buffer), 0, True)
            if length < 0:
                self._buffer = ctypes.create_string_buffer(-length)
                length = self._llama.llama_token_to_piece(self.pointer, token, self._buffer, len(self._buffer), 0, True)
            found = self._buffer.raw[:length]
            if self.escapes_spaces:
                found = found.replace("\u2581".encode(), b" ")
            self._pieces[token] = found
        return found

    def attributes(self, token: int) -> int:
        """Return llama.cpp's attribute bits of a token."""
        return int(self._llama.llama_vocab_get_attr(self.pointer, token))

    def is_end(self, token: int) -> bool:
        """Tell whether a token ends a generation."""
        return bool(self._llama.llama_vocab_is_eog(self.pointer, token))

    @functools.cached_property
    def longest(self) -> int:
        """The length of the longest token in bytes."""
        return max(len(self.piece(token)) for token in range(self.size))

    @functools.cached_property
    def _letters(self) -> dict[bytes, int]:
        """The tokens of one byte or one character, by their bytes; ordinary tokens win over byte tokens."""
        letters: dict[bytes, int] = {}
        for token in range(self.size):
            attributes, data = self.attributes(token), self.piece(token)
            if not attributes & (ATTR_NORMAL | ATTR_BYTE) or len(data) > 4 or self.is_end(token):
                continue
            if len(data) == 1 or len(data.decode("utf-8", "ignore")) == 1:
                if attributes & ATTR_BYTE:
                    letters.setdefault(data, token)
                else:
                    letters[data] = token
        return letters

    def spell(self, text: str) -> list[int]:
        """Tokenise a text with one token per character, or per byte where a character has no token.

        Raises:
            TierViolation: the vocabulary has no tokens for a character.
        """
        ids: list[int] = []
        for character in text:
            data = character.encode()
            try:
                whole = self._letters.get(data)
                ids += [self._letters[bytes([byte])] for byte in data] if whole is None else [whole]
            except KeyError:
                raise TierViolation(
                    f"this vocabulary has no token for {character!r}: take it out of the text"
                ) from None
        return ids


def load_words(path: str | Path, name: str = "") -> Any:
    """Return llama.cpp's pointer to a model file's vocabulary.

    Args:
        name: what an error calls the file; by default its path.

    Raises:
        LoadError: llama.cpp refuses it.
    """
    llama = library.llama_cpp()
    params = llama.llama_model_default_params()
    params.vocab_only, params.n_gpu_layers = True, 0
    return library.load_file(path, params, name)


class VocabularyLoader(Closing):
    """A thread that loads a file's vocabulary, which takes llama.cpp about 0.25 s for 150,000 tokens.

    Close it, or use it in a `with`; a vocabulary that has not been taken by then is freed.

    Raises:
        LoadError: llama.cpp does not run on this machine.
    """

    def __init__(self, path: Path, verbose: bool = False) -> None:
        self._llama = library.start(verbose)  # not in the other thread: two threads of Python code slow each other down
        self._path = path
        self._loads: Background | None = None  # None once the vocabulary is taken
        if path.is_file():  # not a pipe, which can be read only once, or blocks
            self._loads = Background(self._load)

    def _load(self) -> Any:
        try:
            return load_words(self._path)
        finally:
            memory.trim_memory()

    def close(self) -> None:
        """Wait for the thread, and free a vocabulary that was not taken; repeated calls are harmless."""
        if self._loads and (pointer := self._loads.found()):
            self._llama.llama_model_free(pointer)
        self._loads = None

    def take(self, file: ModelFile) -> LlamaVocabulary:
        """Wait for the vocabulary and return it. The caller closes it.

        Args:
            file: the metadata of the file that is being loaded.

        Raises:
            LoadError: llama.cpp refuses the file, or its vocabulary is of a kind that chat models do not have.
        """
        loads, self._loads = self._loads, None
        if not loads:
            raise LoadError(f"cannot load {file.path}: it is no file, or its vocabulary was taken before")
        return LlamaVocabulary(loads.result(), file)


def load_vocabulary(file: ModelFile, verbose: bool = False) -> LlamaVocabulary:
    """Load a vocabulary without the weights. Close it, or use it in a `with`.

    Raises:
        LoadError: see `VocabularyLoader.take`.
    """
    soundness.check_vocabulary(file)
    with VocabularyLoader(file.path, verbose) as loading:
        return loading.take(file)
