"""The proof that llama.cpp will split text as the checkpoint's own tokenizer does.

The vocabulary alone is written to a temporary GGUF file, llama.cpp loads it, and its tokens for some forty texts are
compared with those of the ``tokenizers`` library, where both are installed.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .checkpoint import Checkpoint
from .container import Packer
from .describe import add_vocabulary, write_head
from .errors import ConvertError
from .vocabulary import TOKENIZER_LIMIT

# Each text is here for a rule that some pre-tokenizer has: contractions, digits, spaces, signs, scripts.
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

APPROXIMATELY = 4  # texts that may differ where the table says that llama.cpp only comes close


def prove_pre_tokenizer(checkpoint: Checkpoint, pre: str) -> str:
    """Compare llama.cpp, given the pre-tokenizer ``pre``, with the tokenizer itself on TEXTS.

    Returns a sentence on what was found; raises ConvertError if they differ where the table does not say so.
    """
    try:
        import llama_cpp  # noqa: F401
        import tokenizers
    except ImportError as error:
        return f"pre-tokenizer {pre} found by its structure, not tried out: {error.name} is not installed"
    data = checkpoint.folder.bytes("tokenizer.json", TOKENIZER_LIMIT)
    try:
        reference = tokenizers.Tokenizer.from_buffer(data)
        wanted = [reference.encode(text, add_special_tokens=False).ids for text in TEXTS]
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic in the library is no Exception
        raise ConvertError(f"tokenizer.json: the tokenizers library cannot use it ({error})") from None
    with _vocabulary_file(checkpoint, pre) as path:
        found = tokenize_with_llama(path, TEXTS)
    wrong = [text for text, ours, theirs in zip(TEXTS, found, wanted, strict=True) if ours != theirs]
    row = checkpoint.vocabulary.signature.row
    limits = row.approximate if row is not None and row.name == pre else ""
    if len(wrong) > (APPROXIMATELY if limits else 0):
        raise ConvertError(
            f"pre-tokenizer {pre}: llama.cpp splits {len(wrong)} of {len(TEXTS)} texts otherwise than tokenizer.json, "
            f"{wrong[0]!r} among them; name another one (pre), or go without the proof (--no-check)"
        )
    same = f"pre-tokenizer {pre}: {len(TEXTS) - len(wrong)} of {len(TEXTS)} texts become the same tokens"
    return f"{same}; llama.cpp differs on {limits}" if wrong else same


@contextmanager
def _vocabulary_file(checkpoint: Checkpoint, pre: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="metaalign-edge-") as folder:
        path = Path(folder) / "vocabulary.gguf"
        writer = Packer(None, checkpoint.architecture)
        add_vocabulary(writer, checkpoint, pre, {})
        try:
            with path.open("wb") as file:
                write_head(writer, file)
        except OSError as error:
            raise ConvertError(f"{folder}: cannot be written ({error.strerror}); try --no-check") from None
        yield path


def tokenize_with_llama(path: Path, texts: tuple[str, ...]) -> list[list[int]]:
    """Tokenize with llama.cpp, loading nothing but the vocabulary. Raises ConvertError if it will not load."""
    import llama_cpp

    log = logging.getLogger("llama-cpp-python")  # llama.cpp's log goes through here
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not model:
            raise ConvertError("llama.cpp cannot load the vocabulary; is the pre-tokenizer's name one that it knows?")
        try:
            vocabulary = llama_cpp.llama_model_get_vocab(model)
            found = []
            for text in texts:
                data = text.encode("utf-8")
                ids = (llama_cpp.llama_token * (len(data) + 8))()
                count = llama_cpp.llama_tokenize(vocabulary, data, len(data), ids, len(ids), False, False)
                found.append(list(ids[: max(count, 0)]))
            return found
        finally:
            llama_cpp.llama_model_free(model)
    finally:
        log.setLevel(level)
