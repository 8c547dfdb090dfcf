"""Special tokens: those that begin and end a text, those that are added to every text, and those that stop an answer.

The rules follow llama.cpp's converter (MIT): tokenizer_config.json names the tokens, tokenizer.json gives their ids,
and config.json has ids for the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from metaalign_edge_runtime.errors import LoadError

from .tokens import added_in_tokenizer

LATER_STOPS = ("eot", "eom")  # roles in GGUF for a second and a third end token
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
# Tokens with these texts stop llama.cpp in any vocabulary (llama-vocab.cpp).
STOPS = {
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
}  # fmt: skip


@dataclass(frozen=True)
class TokenizerFiles:
    """The files of a checkpoint about special tokens, each a parsed JSON object, empty if there is no file."""

    tokenizer: Mapping[str, Any]  # tokenizer.json
    settings: Mapping[str, Any]  # tokenizer_config.json
    names: Mapping[str, str]  # role -> text, see `named`
    config: Mapping[str, Any]  # config.json
    generation: Mapping[str, Any]  # generation_config.json


@dataclass
class Special:
    """The special tokens by role. Dictionaries are in the order of writing."""

    ids: dict[str, int] = field(default_factory=dict)
    adds: dict[str, bool] = field(default_factory=dict)  # whether the token is added to every text
    unsaid: dict[str, bool] = field(default_factory=dict)  # the same for roles on which all files are silent
    eot: int | None = None  # the end of a turn, by a rule of the architecture
    extra_stops: dict[str, int] = field(default_factory=dict)  # further end tokens, which STOPS does not list
    adds_nothing: bool = False  # tokenizer.json adds no token before a text


def named(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the tokens that tokenizer_config.json or special_tokens_map.json (`settings`) names: role -> text."""
    found = {}
    for role in ROLES:
        entry = settings.get(f"{role}_token")
        text = entry.get("content") if isinstance(entry, dict) else entry
        if isinstance(text, str):
            found[role] = text
    return found


def find_special(
    files: TokenizerFiles,
    ids: Mapping[str, int],
    tokens: list[str],
    control: set[int],
    end: str | None = None,
    eot: int | None = None,
) -> Special:
    """Find the special tokens of a vocabulary.

    ids: text -> id. tokens: the texts by id. control: the ids of control tokens. end: the text of a token that ends an
    answer whatever the files say, if the vocabulary has it. eot: the id of the token that ends a turn, if the
    architecture fixes it. Raises LoadError if the files contradict each other, or name no end token.
    """
    special, names = Special(eot=eot), dict(files.names)
    for role, stand_in in (("bos", "cls"), ("eos", "sep")):
        if role not in names and stand_in in names:
            names[role] = names[stand_in]
    _what_is_added(files.tokenizer, names, special)
    added = {entry.text: entry.number for entry in reversed(added_in_tokenizer(files.tokenizer))}
    for role in ROLES:
        flag = files.settings.get(f"add_{role}_token")
        if isinstance(flag, bool):
            special.adds.setdefault(role, flag)  # tokenizer.json has the last word
        if role in names:
            # Like llama.cpp's converter: bos and eos may be any token, the others must be added tokens.
            known = ids if role in ("bos", "eos") else added
            if names[role] in known:
                special.ids[role] = known[names[role]]
            elif role in ("bos", "eos"):
                raise LoadError(f"tokenizer_config.json: {role}_token {names[role]!r} is not in the vocabulary")
    text_config = files.config.get("text_config")
    for role in ROLES:
        value = files.config.get(f"{role}_token_id")
        if value is None and isinstance(text_config, dict):
            value = text_config.get(f"{role}_token_id")
        if role not in special.ids and type(value) is int:
            if 0 <= value < len(tokens):
                special.ids[role] = value
            elif role in ("bos", "eos"):
                raise LoadError(f"config.json: {role}_token_id {value} is no id of this vocabulary of {len(tokens)}")
    if end is not None and end in ids:
        special.ids["eos"] = ids[end]
    _stops(files, tokens, control, special)
    if special.adds.get("bos") and "bos" not in special.ids:
        raise LoadError("tokenizer_config.json: add_bos_token is set, but no file says which token that is")
    return special


def _stops(files: TokenizerFiles, tokens: list[str], control: set[int], special: Special) -> None:
    """Set the end token if no file names one, and the further end tokens that stop transformers."""
    name, value = "generation_config.json", files.generation.get("eos_token_id")
    if value is None:
        name, value = "config.json", files.config.get("eos_token_id")
    stops = [stop for stop in (value if isinstance(value, list) else [value]) if stop is not None]
    for stop in stops:
        if type(stop) is not int or not 0 <= stop < len(tokens):
            raise LoadError(f"{name}: eos_token_id {stop!r} is no id of this vocabulary of {len(tokens)}")
    if "eos" not in special.ids:
        if not stops:  # llama.cpp would take token 11, whatever that is
            raise LoadError("no file names an end token; add eos_token to tokenizer_config.json")
        special.ids["eos"] = stops[0]
    # Only control tokens count: an ordinary word is a leftover default of a configuration class.
    extra = [stop for stop in dict.fromkeys(stops) if stop in control and tokens[stop] not in STOPS]
    extra = [stop for stop in extra if stop not in (special.ids["eos"], special.eot)]
    places = [place for place in LATER_STOPS if place != "eot" or special.eot is None]
    if len(extra) > len(places):
        raise LoadError(f"{name}: {len(extra) + 3 - len(places)} end tokens, but GGUF has room for three")
    special.extra_stops = dict(zip(places, extra, strict=False))


def _what_is_added(tokenizer: Mapping[str, Any], names: dict[str, str], special: Special) -> None:
    """Read from tokenizer.json whether bos and eos are added to every text; refuse any other tokens around it."""
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
            special.adds_nothing = not before
            for role, found in (("bos", before), ("eos", after)):
                if not found:
                    continue
                if found != [names.setdefault(role, found[0])]:
                    raise LoadError(
                        f"tokenizer.json: puts {' '.join(found)} around every text, but llama.cpp can put only the one "
                        f"{role}_token there, {names[role]}"
                    )
                special.adds[role] = True
            between = _between(step.get("pair"), before, after)
            if between:
                ends = (names.get("sep"), names.get("eos"))
                adds = any(text in ends for text in between[1:2]) or (between[0] in ends and not after)
                special.adds["sep"] = adds
                if adds and "sep" not in names and "eos" in names:
                    names["sep"] = names["eos"]
        else:
            raise LoadError(f"tokenizer.json: the post-processor {kind!r} has no counterpart in llama.cpp")


def _between(template: Any, before: list[str], after: list[str]) -> list[str]:
    """Return the special tokens between two texts in a template such as `[<s>, A, <s>, B]`."""
    pieces = [piece for piece in template if isinstance(piece, dict)] if isinstance(template, list) else []
    texts = []
    for piece in pieces:
        token = piece.get("SpecialToken")
        texts.append(token.get("id") if isinstance(token, dict) else None)
    inner = texts[len(before) if texts[: len(before)] == before else 0 :]
    if after and inner[-len(after) :] == after:
        inner = inner[: -len(after)]
    if len(inner) < 3 or inner[0] is not None or inner[-1] is not None:
        return []
    return [text for text in inner[1:-1] if isinstance(text, str)]


def _around(template: Any) -> tuple[list[str], list[str]]:
    """Return the special tokens before and after the text in a template such as `[<s>, A, </s>]`."""
    sides: tuple[list[str], list[str]] = ([], [])
    side = 0
    for piece in template if isinstance(template, list) else []:
        token = piece.get("SpecialToken") if isinstance(piece, dict) else None
        if token is None:
            side = 1
        elif isinstance(token, dict) and isinstance(token.get("id"), str):
            sides[side].append(token["id"])
    return sides
