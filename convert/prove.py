"""Prove that llama.cpp will tokenize as the checkpoint's own tokenizer does.

The vocabulary alone is written to a temporary GGUF file, which llama.cpp loads. Its tokens for some forty texts, for
the lines of the chat template and for the added tokens must be those of the `tokenizers` library. Both libraries must
be installed.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from metaalign_edge_runtime.errors import LoadError, some
from metaalign_edge_runtime.llama import library
from metaalign_edge_runtime.llama.vocabulary import load_words

from .checkpoint import Checkpoint
from .container import Packer
from .describe import add_vocabulary, write_head
from .pretokenizers import DISTINCT, NAME, SENTENCEPIECE_PRE, TABLE
from .vocabulary import TOKENIZER_LIMIT, Vocabulary

# Each text tries a rule of some pre-tokenizer: contractions, digits, spaces, signs, scripts.
TEXTS = (
    "Hello, world!",
    "hello world",
    " leading and trailing ",
    "two  spaces   three    four",
    "tab\tand\t\ttabs",
    "line\nbreak\n\ntwo\n\n\nthree",
    "windows\r\nline\r\n\r\nends\r\n",
    "   indented\n\t\tcode\n    more",
    "trailing spaces   \nnext",
    "\n",
    " ",
    "     ",
    " \n \n ",
    "I'm sure they'll say we've won, don't you'd think it's what you're after?",
    "I'M SURE THEY'LL SAY WE'VE WON, DON'T YOU'D THINK IT'S WHAT YOU'RE AFTER?",
    "'s 't 're 've 'm 'll 'd 'S 'LL ' s",
    "'sure 'tis 'twas 'dark 'members 'llama 'reason 'version Türkiye'den",
    "Wait!!!\n\nWhat?\r\n;\n\n\n\nend",
    "a       b              c",
    "1 12 123 1234 12345 123456 1234567 12345678",
    "3.14159, 2,718, 1e-5, 0x1F, 50%, $4.99, №7",
    "x2 a1b22c333 v1.2.3 2024-02-29 12:30",
    "camelCase PascalCase snake_case kebab-case SCREAMING_CASE HTTPServer",
    "def f(x): return {'a': [1, 2], \"b\": (3, 4)}",
    "if (a && b || !c) { d += e->f; } // why?",
    "/usr/local/bin https://example.org/a/b?c=d&e=f#g user@example.org",
    "...... !!! ??? ?!?! --- === *** ___ ### @@@ ~~~",
    "“quoted” ‘single’ «guillemets» – dash — em… ellipsis",
    '<tag attr="value">text</tag> &amp; [link](target) **bold**',
    "naïve café über señor Ångström Dvořák",
    "Straße GROẞE ﬁne æther",
    "Привет, как дела? Сегодня 3 января.",
    "Γειά σου Κόσμε",
    "שלום עולם",
    "مرحبا بالعالم ١٢٣",
    "你好，世界！今天是2024年。",
    "こんにちは、世界。カタカナとひらがな",
    "안녕하세요 세계",
    "สวัสดีชาวโลก",
    "नमस्ते दुनिया",
    "🙂 🚀🚀 👩‍👩‍👧‍👦 🏳️‍🌈 ✅",
    "∑ ∫ √2 ≈ 1.414 ± 0.001 × 10⁻³ ½",
    "a\u00a0non-breaking\u2003em\u200bzero",
    "\\n is not a line break, nor is \\\\t a tab",
)

APPROXIMATELY = 4  # texts that may differ with a pre-tokenizer that the table calls approximate
ADDED_TOKENS = 200  # to try at most
LINE = 1000  # characters of a line; on longer ones, llama.cpp's regular expressions may recurse too deeply
MISSING = "not tried out: {} is not installed"


def choose_pre_tokenizer(checkpoint: Checkpoint, given: str | None) -> str:
    """Return llama.cpp's name for the pre-tokenizer of a checkpoint: `given` if the user gives one.

    Otherwise it is found in the table or, failing that, by trying: of all the ways in which llama.cpp splits text,
    exactly one must give the tokens of tokenizer.json on every text. Raises LoadError.
    """
    vocabulary = checkpoint.vocabulary
    if given is not None and not NAME.fullmatch(given):
        raise LoadError(f"pre {given!r} is no name of a pre-tokenizer, such as {TABLE[0].name}")
    if vocabulary.signature is None:
        if given is not None:
            raise LoadError(f"pre {given!r}: a SentencePiece vocabulary has no pre-tokenizer; leave it out")
        return SENTENCEPIECE_PRE
    if given is not None:
        return given
    row = vocabulary.signature.row
    if row is not None:
        return row.name
    unknown = f"tokenizer.json: llama.cpp's name for this pre-tokenizer is not known: {vocabulary.signature}"
    remedy = "if you know one that splits alike, name it with --pre NAME"
    try:
        proof = _Proof(checkpoint)
    except ImportError as error:
        raise LoadError(f"{unknown}; {error.name}, which would find it by trying, is not installed") from None
    equal = [name for name in DISTINCT if not proof.differences(name)]
    if len(equal) != 1:
        found = f"{some(equal, 40)} split alike on all that was tried" if equal else "none of its own splits alike"
        raise LoadError(f"{unknown}; {found}; {remedy}")
    return equal[0]


def prove_pre_tokenizer(checkpoint: Checkpoint, pre: str) -> str:
    """Compare llama.cpp, using the pre-tokenizer `pre`, with the tokenizer of the checkpoint.

    They must agree on TEXTS, on the lines of the chat template, and on the added tokens. Returns the result as a
    sentence; raises LoadError if they differ on more texts than the table expects.
    """
    vocabulary = checkpoint.vocabulary
    byte_level = vocabulary.signature is not None
    subject = f"pre-tokenizer {pre}" if byte_level else "SentencePiece vocabulary"
    try:
        if not checkpoint.folder.has("tokenizer.json"):
            with _vocabulary_file(checkpoint, pre) as path:
                tokenize_with_llama(path, [])
            return f"{subject} loads, not tried out: there is no tokenizer.json to compare it with"
        proof = _Proof(checkpoint)
    except ImportError as error:
        found = f"{subject} found by its structure" if byte_level else subject
        return f"{found}, {MISSING.format(error.name)}"
    wrong, count = proof.differences(pre), len(proof.texts)
    row = vocabulary.signature.row if vocabulary.signature else None
    limits = row.approximate if row is not None and row.name == pre else ""
    if len(wrong) > (APPROXIMATELY if limits else 0):
        remedy = "name another one with --pre" if byte_level else "take the tokenizer's files from the base model"
        raise LoadError(
            f"{subject}: llama.cpp splits {len(wrong)} of {count} texts otherwise than tokenizer.json, "
            f"{wrong[0]!r} among them; {remedy}, or go without the proof (--no-check)"
        )
    same = f"{subject}: {count - len(wrong)} of {count} texts become the same tokens"
    if wrong:
        return f"{same}; llama.cpp differs on {limits}"
    return f"{same}; texts that begin with a space were left out" if proof.left_out else same


class _Proof:
    """Texts and their tokens by tokenizer.json, to be compared with those by llama.cpp."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Tokenize with the tokenizers library. Raises ImportError without it or llama_cpp, LoadError if it fails."""
        import llama_cpp  # noqa: F401
        import tokenizers

        self.checkpoint = checkpoint
        data = checkpoint.folder.bytes("tokenizer.json", TOKENIZER_LIMIT)
        texts = [*TEXTS, *template_lines(checkpoint)]
        # Before a text that begins with a space, llama.cpp puts another one; "Metaspace" does not.
        self.left_out = checkpoint.vocabulary.signature is None and b'"Metaspace"' in data
        self.texts = [text for text in texts if not (self.left_out and text.startswith(" "))]
        self.texts += added_tokens(checkpoint)
        try:
            reference = tokenizers.Tokenizer.from_buffer(data)
            self.wanted = [reference.encode(text, add_special_tokens=False).ids for text in self.texts]
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a panic of the library is a BaseException
            raise LoadError(f"tokenizer.json: the tokenizers library cannot use it ({error})") from None

    def differences(self, pre: str) -> list[str]:
        """Return the texts for which llama.cpp with the pre-tokenizer `pre` has other tokens."""
        with _vocabulary_file(self.checkpoint, pre) as path:
            found = tokenize_with_llama(path, self.texts)
        return [text for text, ours, theirs in zip(self.texts, found, self.wanted, strict=True) if ours != theirs]


def template_lines(checkpoint: Checkpoint) -> list[str]:
    """Return the lines between added tokens in the source of the chat template: it will render text like them."""
    source = checkpoint.chat_template or ""
    marked = sorted((text for text in checkpoint.tokens if text in source), key=len, reverse=True)
    parts = re.split("|".join(map(re.escape, marked)), source) if marked else [source]
    lines = [line[:LINE] for part in parts for line in part.splitlines(keepends=True)]
    return list(dict.fromkeys(line for line in lines if line.strip()))


def added_tokens(checkpoint: Checkpoint) -> list[str]:
    """Return up to ADDED_TOKENS added tokens, those in the chat template first, without those that contain spaces."""
    source = checkpoint.chat_template or ""
    plain = [text for text in checkpoint.tokens if text.strip() == text and "▁" not in text]
    return sorted(plain, key=lambda text: (text not in source, text))[:ADDED_TOKENS]


@contextmanager
def _vocabulary_file(checkpoint: Checkpoint, pre: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="metaalign-edge-") as folder:
        path = Path(folder) / "vocabulary.gguf"
        try:
            write_vocabulary(path, checkpoint.architecture, checkpoint.vocabulary, pre)
        except OSError as error:
            raise LoadError(f"{folder}: cannot be written ({error.strerror}); try --no-check") from None
        yield path


def write_vocabulary(path: Path, architecture: str, vocabulary: Vocabulary, pre: str) -> None:
    """Write a GGUF file with a vocabulary only. Raises OSError, and LoadError if GGUF cannot hold it."""
    writer = Packer(None, architecture)
    add_vocabulary(writer, vocabulary, pre, {})
    with path.open("wb") as file:
        write_head(writer, file)


def tokenize_with_llama(path: Path, texts: Sequence[str]) -> list[list[int]]:
    """Tokenize texts with llama.cpp, special tokens included; only the vocabulary is loaded. Raises LoadError."""
    llama = library.start()
    model = load_words(path, "the vocabulary")
    try:
        vocabulary = llama.llama_model_get_vocab(model)
        found = []
        for text in texts:
            data = text.encode("utf-8")
            ids = (llama.llama_token * (len(data) + 8))()
            count = llama.llama_tokenize(vocabulary, data, len(data), ids, len(ids), False, True)
            found.append(list(ids[: max(count, 0)]))
        return found
    finally:
        llama.llama_model_free(model)
