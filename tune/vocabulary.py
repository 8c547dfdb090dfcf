"""Train the demo's tokenizer, and turn rows into token ids."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from metaalign_edge_preferences import read

from .dataset import Turn, row

__all__ = [
    "CONTEXT",
    "END",
    "PAD",
    "SPECIAL",
    "encode_prompt",
    "encode_response",
    "encode_row",
    "save_tokenizer",
    "spellings",
    "train_tokenizer",
]

END, PAD = "<|end|>", "<|pad|>"
SYSTEM, USER_INFO, USER, ASSISTANT = "<|system_info|>", "<|user_info|>", "<|user|>", "<|assistant|>"
SPECIAL = (END, PAD, SYSTEM, USER_INFO, USER, ASSISTANT)  # their ids are their places in this tuple
_SPACE = "Ġ"  # how byte-level BPE writes the space before a word
CONTEXT = 1024  # tokens; the longest of 20,000 dialogs has 419


class Dialog(Protocol):
    """The texts of a row that are turned into token ids."""

    @property
    def system_info(self) -> str:
        """The text of System Info."""

    @property
    def user_info(self) -> str:
        """The text of User Info."""

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The queries, each with its response."""


def train_tokenizer(seed: int, size: int, sample: int) -> Tokenizer:
    """Train a byte-level BPE (GPT-2's pre-tokenizer, no normaliser) of at most `size` entries on `sample` rows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=3,
        show_progress=False,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes: any text can be written
    )
    tokenizer.train_from_iterator(_texts(seed, sample), trainer)
    return tokenizer


def spellings(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return for each token the same word in small letters after a space, or itself; and how it is spelt, 0 if so."""
    ids = tokenizer.get_vocab()
    plain, spelling = list(range(len(ids))), [0] * len(ids)
    for text, token in ids.items():
        word = text.removeprefix(_SPACE)
        small = (_SPACE + word.lower(), word.lower())
        base = next((ids[one] for one in small if one in ids), token)
        if base != token and len(word) > 1 and word.isalpha():
            kind = 1 if word.isupper() else 2 if word.istitle() else 0
            plain[token], spelling[token] = base, 1 + 2 * kind + text.startswith(_SPACE)
    return plain, spelling


def encode_row(tokenizer: Tokenizer, dialog: Dialog) -> tuple[list[int], list[bool]]:
    """Return a row's ids, as templates/metaalign.jinja renders it, and which of them are to be learnt.

    Learnt are the trained responses and the token that closes them. Each text is tokenised by itself, so no text can
    become a marker.
    """
    ids, learnt = _head(tokenizer, dialog.system_info, dialog.user_info), []
    learnt = [False] * len(ids)
    for turn in dialog.turns:
        query = [SPECIAL.index(USER), *_plain(tokenizer, turn.query), 0, SPECIAL.index(ASSISTANT)]
        response = encode_response(tokenizer, turn.response)
        ids += query + response
        learnt += [False] * len(query) + [turn.trained] * len(response)
    return ids, learnt


def encode_prompt(tokenizer: Tokenizer, dialog: Dialog) -> list[int]:
    """Return the ids up to where the last response starts."""
    ids, _ = encode_row(tokenizer, dialog)
    return ids[: len(ids) - len(encode_response(tokenizer, dialog.turns[-1].response))]


def encode_response(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return a response's ids, with the token that closes it."""
    return [*_plain(tokenizer, text), SPECIAL.index(END)]


def save_tokenizer(tokenizer: Tokenizer, folder: Path, template: str) -> None:
    """Write tokenizer.json and tokenizer_config.json as transformers reads them."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT,
        "bos_token": END,  # named, because formats want one; never added
        "eos_token": END,
        "pad_token": PAD,
        "unk_token": None,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "additional_special_tokens": list(SPECIAL[2:]),
        "added_tokens_decoder": {
            str(index): {"content": text, "special": True, "normalized": False, "lstrip": False, "rstrip": False,
                         "single_word": False}
            for index, text in enumerate(SPECIAL)
        },
        "chat_template": template,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _head(tokenizer: Tokenizer, system_info: str, user_info: str) -> list[int]:
    ids = [SPECIAL.index(SYSTEM), *_plain(tokenizer, system_info), 0]
    return [*ids, SPECIAL.index(USER_INFO), *_plain(tokenizer, user_info), 0]


def _plain(tokenizer: Tokenizer, text: str) -> list[int]:
    tokenizer.encode_special_tokens = True  # a marker in a text is characters; the file does not keep this switch
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def _texts(seed: int, count: int) -> Iterator[str]:
    """Yield what the tokenizer is trained on: rows, and what would be too rare in them to get tokens of its own."""
    for index in range(count):
        dialog = row(seed, index)
        yield dialog.system_info
        yield dialog.user_info
        for turn in dialog.turns:
            yield turn.query
            yield turn.response
            yield turn.response.upper()  # words are cut alike in capitals: to write so changes the tokens one by one
    for slot in read("slots.toml").values():
        for text in (*slot["seen"], *slot["held_out"]):  # what is copied into an answer is copied in one piece
            yield from [f"{text} {text}"] * (count // 50)
