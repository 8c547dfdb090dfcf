"""A tiny model that says a script: written as a GGUF at once, its pieces are tokens of their own."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np

from helpers.gguf_files import finish

SIZE = 384  # tokens, and values of each one's state
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
START, STOP = "<|assistant|>", "<|stop|>"  # what a prompt ends with; what ends an answer
TEMPLATE = "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|stop|>{% endfor %}<|assistant|>"


def byte_letters() -> list[str]:
    """List the letters that stand for the 256 bytes in a byte-level vocabulary."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = itertools.count(256)
    return [chr(byte if byte in own else next(others)) for byte in range(256)]


def write_scripted(
    path: Path,
    script: Sequence[str],
    *,
    template: str = TEMPLATE,
    start: str = START,
    control: Sequence[str] = (),
    also: Sequence[str] = (),
    ending: str = STOP,
    context: int = 1024,
) -> Path:
    """Write a GGUF whose greedy answer is a script, a list of pieces that are a token each; the stop token follows.

    A token is always followed by the same one, so no piece stands twice before different ones.

    Args:
        template: the chat template; its prompt ends with `start`.
        control: pieces that are control tokens; `start` is one anyway.
        also: control tokens that are in the vocabulary without being said.
        ending: what follows the last piece; an earlier piece of the script, and the answer has no end.
    """
    letters = byte_letters()
    words = [
        *letters,
        "ab",
        STOP,
        *dict.fromkeys(word for word in (start, *script, *also, ending) if word not in (STOP, *letters)),
    ]
    controls = {STOP, start, *control, *also}
    kinds = [CONTROL if word in controls else NORMAL if at <= 256 else USER_DEFINED for at, word in enumerate(words)]
    assert len(words) <= SIZE, "the script has too many pieces"
    stop = words.index(STOP)
    follows = np.zeros((SIZE, SIZE), dtype=np.float32)
    follows[stop] = 0.01  # what no script goes on from ends the answer
    next_of: dict[str, str] = {}
    for one, other in itertools.pairwise([start, *script, ending]):
        assert next_of.setdefault(one, other) == other, f"{one!r} stands before {next_of[one]!r} and {other!r}"
        follows[words.index(other), words.index(one)] = 1
    unused = [f"[unused {number}]" for number in range(SIZE - len(words))]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(context)
    writer.add_embedding_length(SIZE)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(SIZE // 4)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([word.encode() for word in words + unused])
    writer.add_token_types(kinds + [UNUSED] * len(unused))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(stop)
    writer.add_bos_token_id(stop)
    writer.add_add_bos_token(False)
    writer.add_chat_template(template)
    for name, rows in (("token_embd", np.eye(SIZE, dtype=np.float32)), ("output", follows)):
        writer.add_tensor(f"{name}.weight", rows)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(SIZE, dtype=np.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros((SIZE, SIZE), dtype=np.float32))
    for name, shape in (("gate", (32, SIZE)), ("up", (32, SIZE)), ("down", (SIZE, 32))):
        writer.add_tensor(f"blk.0.ffn_{name}.weight", np.zeros(shape, dtype=np.float32))
    return finish(writer, path)
