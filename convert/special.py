"""The tokens with a job: which begin and end a text, which are added by themselves, and which stop an answer.

The rules follow llama.cpp's converter (MIT): tokenizer_config.json names tokens, tokenizer.json gives their ids, and
config.json fills in what is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import ConvertError

ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
# Texts at which llama.cpp stops by itself, whatever else a vocabulary says (llama-vocab.cpp).
STOPS = {
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
}  # fmt: skip


@dataclass(frozen=True)
class Files:
    """What the checkpoint's files say, each a parsed JSON object."""

    tokenizer: Mapping[str, Any]  # tokenizer.json
    settings: Mapping[str, Any]  # tokenizer_config.json
    names: Mapping[str, str]  # role -> text, see ``named``
    config: Mapping[str, Any]  # config.json
    generation: Mapping[str, Any]  # generation_config.json


@dataclass
class Special:
    """Ids by role and what is added to every text; dictionaries are in the order of writing."""

    ids: dict[str, int] = field(default_factory=dict)
    adds: dict[str, bool] = field(default_factory=dict)
    extra_stops: list[int] = field(default_factory=list)  # that neither ``ids`` nor STOPS covers


def named(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the tokens that tokenizer_config.json or special_tokens_map.json names: role -> text."""
    found = {}
    for role in ROLES:
        entry = settings.get(f"{role}_token")
        text = entry.get("content") if isinstance(entry, dict) else entry
        if isinstance(text, str):
            found[role] = text
    return found


def find_special(files: Files, ids: Mapping[str, int], tokens: list[str], control: set[int]) -> Special:
    """Work out the special tokens. ``ids`` maps token texts to ids, ``control`` holds the ids of control tokens.

    Raises ConvertError where nothing fits.
    """
    special, names = Special(), dict(files.names)
    for role, stand_in in (("bos", "cls"), ("eos", "sep")):
        if role not in names and stand_in in names:
            names[role] = names[stand_in]
    _what_is_added(files.tokenizer, names, special)
    for role in ROLES:
        flag = files.settings.get(f"add_{role}_token")
        if isinstance(flag, bool):
            special.adds.setdefault(role, flag)  # tokenizer.json has the last word
        if role in names:
            if names[role] in ids:
                special.ids[role] = ids[names[role]]
            elif role in ("bos", "eos"):
                raise ConvertError(
                    f"tokenizer_config.json: {role}_token {names[role]!r} is not in the vocabulary of tokenizer.json"
                )
    for role in ROLES:
        value = files.config.get(f"{role}_token_id")
        if role not in special.ids and type(value) is int:
            if 0 <= value < len(tokens):
                special.ids[role] = value
            elif role in ("bos", "eos"):
                raise ConvertError(f"config.json: {role}_token_id {value} is no id of this vocabulary of {len(tokens)}")
    _stops(files, tokens, control, special)
    if special.adds.get("bos") and "bos" not in special.ids:
        raise ConvertError("tokenizer_config.json: add_bos_token is set, but no file says which token that is")
    return special


def _stops(files: Files, tokens: list[str], control: set[int], special: Special) -> None:
    """Find an end token if none has been named yet, and the further ones at which transformers would stop."""
    name, value = "generation_config.json", files.generation.get("eos_token_id")
    if value is None:
        name, value = "config.json", files.config.get("eos_token_id")
    stops = [stop for stop in (value if isinstance(value, list) else [value]) if stop is not None]
    for stop in stops:
        if type(stop) is not int or not 0 <= stop < len(tokens):
            raise ConvertError(f"{name}: eos_token_id {stop!r} is no id of this vocabulary of {len(tokens)}")
    if "eos" not in special.ids:
        if not stops:  # llama.cpp would take token 11, whatever that is
            raise ConvertError("no file names an end token; add eos_token to tokenizer_config.json")
        special.ids["eos"] = stops[0]
    # an ordinary word among them is the leftover default of a configuration class, not a decision
    extra = [stop for stop in dict.fromkeys(stops) if stop in control and tokens[stop] not in STOPS]
    special.extra_stops = [stop for stop in extra if stop != special.ids["eos"]]
    if len(special.extra_stops) > 2:
        raise ConvertError(f"{name}: {len(special.extra_stops) + 1} end tokens, but GGUF has room for three")


def _what_is_added(tokenizer: Mapping[str, Any], names: dict[str, str], special: Special) -> None:
    """Read off tokenizer.json what goes before and after every text, as far as bos and eos can say it."""
    post = tokenizer.get("post_processor")
    if not isinstance(post, dict):
        return
    steps = post.get("processors", [post])
    for step in steps if isinstance(steps, list) else []:
        kind = step.get("type") if isinstance(step, dict) else None
        if kind == "ByteLevel":
            special.adds.setdefault("bos", False)
            special.adds.setdefault("eos", False)
        elif kind == "TemplateProcessing":
            before, after = _around(step.get("single"))
            for role, found in (("bos", before), ("eos", after)):
                if not found:
                    continue
                if found != [names.setdefault(role, found[0])]:
                    raise ConvertError(
                        f"tokenizer.json: puts {' '.join(found)} around every text, but llama.cpp can put only the one "
                        f"{role}_token there, {names[role]}"
                    )
                special.adds[role] = True
        else:
            raise ConvertError(f"tokenizer.json: the post-processor {kind!r} has no counterpart in llama.cpp")


def _around(template: Any) -> tuple[list[str], list[str]]:
    """Return the special tokens before and after the text in a template such as ``[<s>, A, </s>]``."""
    sides: tuple[list[str], list[str]] = ([], [])
    side = 0
    for piece in template if isinstance(template, list) else []:
        token = piece.get("SpecialToken") if isinstance(piece, dict) else None
        if token is None:
            side = 1
        elif isinstance(token, dict) and isinstance(token.get("id"), str):
            sides[side].append(token["id"])
    return sides
