#!/usr/bin/env python3
"""metaalign-edge: one local model that follows any preference at inference time.

A meta-aligned model reads three tiers: System Info (what the provider wants), User Info (who the user is and
what they prefer) and User Query. Editing the first two, the meta-prompt, is the whole of inference-time alignment.
This file renders the dialog, keeps tier text from posing as control tokens, and runs the model with llama.cpp.

Contents, in dependency order (nothing refers upward):

     1  Stopwatch
     2  Dialog
     3  Rendering
     4  Tier-safe tokens
     5  Settings and adapters
     6  Model
     7  Engine and sampler
     8  Guidance
     9  Answer
    10  Scheduler
    11  Python
    12  Main
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path


class Checkout:
    """Imports the folders beside this file under the names that they have where they are installed.

    `runtime/` is metaalign_edge_runtime, and so on.
    """

    ROOT = Path(__file__).resolve().parent

    @classmethod
    def find_spec(cls, name: str, *_: object) -> ModuleSpec | None:
        """Find a folder of this checkout for Python's import."""
        folder = name.removeprefix("metaalign_edge_")
        file = cls.ROOT / folder / "__init__.py"
        if folder == name or "." in folder or not file.is_file():
            return None
        return importlib.util.spec_from_file_location(name, file, submodule_search_locations=[str(file.parent)])


if (Checkout.ROOT / "pyproject.toml").is_file():  # first in the list, so that a checkout wins over what is installed
    sys.meta_path.insert(0, Checkout)
sys.modules.setdefault("metaalign_edge", sys.modules[__name__])  # run as a script, this module is __main__

import array
import codecs
import contextlib
import ctypes
import functools
import io
import itertools
import json
import math
import os
import random
import re
import struct
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, AnyStr, Literal, NamedTuple, Protocol, TextIO, TypedDict, cast

from metaalign_edge_runtime import __version__ as __version__
from metaalign_edge_runtime import structured
from metaalign_edge_runtime.errors import (
    ContextOverflow,
    EdgeError,
    Interrupted,
    LoadError,
    NetworkError,
    NotFound,
    OutputClosed,
    TemplateError,
    TierViolation,
    UsageError,
    one_line,
    say,
)
from metaalign_edge_runtime.llama import library, memory
from metaalign_edge_runtime.llama.gguf import DEFAULT_CONTEXT, GGUFArray, ModelFile, is_gguf
from metaalign_edge_runtime.llama.interrupt import Interrupt
from metaalign_edge_runtime.llama.library import LOG, Background, Closing
from metaalign_edge_runtime.llama.memory import CELLS, PREFILL_CHUNK, Device, Footprint, Plan
from metaalign_edge_runtime.llama.vocabulary import (
    ATTR_BYTE,
    ATTR_CONTROL,
    ATTR_LSTRIP,
    ATTR_RSTRIP,
    ATTR_UNKNOWN,
    ATTR_USER_DEFINED,
    LlamaVocabulary,
    Loading,
)
from metaalign_edge_runtime.stores import files, models, profiles
from metaalign_edge_runtime.stores.prompt_cache import States
from metaalign_edge_runtime.structured import Schema
from metaalign_edge_templates.sandbox import Refusal, Template, TemplateFailure
from metaalign_edge_templates.tier_text import Tier, TierText, join_text

if TYPE_CHECKING:
    from typing_extensions import Unpack

# What a program needs; see Python
__all__ = [
    "Answer", "ContextOverflow", "Dialog", "EdgeError", "LoadError", "Model", "NetworkError", "NotFound",
    "TemplateError", "TierViolation", "Turn", "UsageError", "compare", "generate", "stream",
]  # fmt: skip


# =====================================================================================================================
#  1  Stopwatch
# =====================================================================================================================


class Stopwatch:
    """Adds up where the time of a call goes. A lap is a `with`, or decorates what it times; laps do not nest.

    What another thread does meanwhile takes no time of the call's; waiting for it does.
    """

    def __init__(self) -> None:
        self.laps = {"start": 1000 * time.process_time()}  # Python itself, and what is imported above
        self._begun = time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, lap: str) -> Iterator[None]:
        """Time what is done inside."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.laps[lap] = self.laps.get(lap, 0.0) + 1000 * (time.perf_counter() - begun)

    def mark(self, lap: str) -> None:
        """Let a lap be all that has passed so far without one."""
        self.laps[lap] = self.laps["start"] + 1000 * (time.perf_counter() - self._begun) - sum(self.laps.values())

    def __str__(self) -> str:
        total = self.laps["start"] + 1000 * (time.perf_counter() - self._begun)
        laps = {**self.laps, "other": total - sum(self.laps.values())}
        return f"{total:.0f} ms: " + ", ".join(f"{lap} {spent:.0f}" for lap, spent in laps.items())


STOPWATCH = Stopwatch()


# =====================================================================================================================
#  2  Dialog
# =====================================================================================================================


@dataclass(frozen=True)
class Turn:
    """One question and, unless it is the newest, its answer."""

    query: str
    response: str | None = None


@dataclass(frozen=True)
class Dialog:
    """What is said in which tier. The prompt is a pure function of it; the last turn has no response yet.

    >>> dialog = Dialog("Be kind.", "I'm a zookeeper.", [Turn("What is tea?")])
    >>> dialog.then("Tea is a drink.", "And bread?").turns
    (Turn(query='What is tea?', response='Tea is a drink.'), Turn(query='And bread?', response=None))

    Raises:
        UsageError: a text cannot be written as UTF-8.
    """

    system_info: str = ""
    user_info: str = ""
    turns: Sequence[Turn] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "turns", tuple(self.turns))
        for name, text in self.texts():
            files.check_utf8(text, f"the {name}")

    def texts(self) -> Iterator[tuple[str, str]]:
        """Yield every text with the name of its tier."""
        yield "System Info", self.system_info
        yield "User Info", self.user_info
        for turn in self.turns:
            yield "User Query", turn.query
            if turn.response is not None:
                yield "Response", turn.response

    @classmethod
    def of(cls, system_info: str, user_info: str, past: Iterable[tuple[str, str]], query: str) -> Dialog:
        """Return the dialog whose newest query follows these queries and their responses."""
        return cls(system_info, user_info, (*(Turn(*pair) for pair in past), Turn(query)))

    def then(self, response: str, query: str) -> Dialog:
        """Return the dialog after this answer to its newest query, with another query."""
        *earlier, last = self.turns
        return replace(self, turns=[*earlier, replace(last, response=response), Turn(query)])


# =====================================================================================================================
#  3  Rendering
# =====================================================================================================================


class RenderOptions(NamedTuple):
    """How a dialog becomes a prompt."""

    remind: bool = True  # restate the priority next to the newest query when both tiers speak (wrapped only)
    think: bool | None = None  # `enable_thinking` of templates that know it; None passes nothing


AS_USUAL = RenderOptions()


@dataclass(frozen=True)
class ChatTemplate:
    """The template in force, where it came from, and the tokens it may name."""

    template: Template
    native: bool  # it knows User Info; otherwise the meta-prompt is wrapped into the messages
    name: str
    why: str  # how it was chosen, for -v
    meta_prompt: Template
    reminder: Template
    bos_token: str = ""
    eos_token: str = ""

    @property
    def identity(self) -> str:
        """Return a digest of all that is rendered by."""
        return files.digest([*(one.source for one in (self.template, self.meta_prompt, self.reminder)), self.native])


@dataclass(frozen=True)
class Rendering:
    """A rendered dialog: the prompt, and the messages that the template was given."""

    template: str
    native: bool
    messages: list[dict[str, Any]]
    prompt: TierText
    source: str  # the template's text: a user-defined token that stands in it is a marker

    def missing(self, dialog: Dialog) -> str | None:
        """Name a tier whose text did not reach the prompt; None if all did."""
        newest = dialog.turns[-1].query if dialog.turns else ""
        tiers: list[tuple[Tier, str]] = [
            ("system_info", dialog.system_info),
            ("user_info", dialog.user_info),
            ("query", newest),
        ]
        return next((tier for tier, text in tiers if text.strip() and not self.prompt.holds(tier)), None)


def render(dialog: Dialog, chat: ChatTemplate, options: RenderOptions = AS_USUAL) -> Rendering:
    """Render a dialog as the model reads it.

    Raises:
        TemplateError: the template fails, refuses the dialog, or leaves a tier out.
    """
    reasons = []
    for messages in native_messages(dialog) if chat.native else wrapped_messages(dialog, chat, options):
        try:
            rendering = render_messages(dialog, chat, options, messages)
        except (Refusal, TemplateFailure) as error:  # perhaps it takes the same dialog in another shape
            reasons.append(error if isinstance(error, TemplateFailure) else f"it says: {error}")
            continue
        missing = rendering.missing(dialog)
        if missing is None:
            return rendering
        reasons.append(f"it leaves out {missing}")
    if isinstance(reasons[0], TemplateFailure):
        raise reasons[0]
    raise TemplateError(
        f"the template {chat.name} cannot render this dialog: {reasons[0]}: give another with --template"
    )


def render_messages(
    dialog: Dialog, chat: ChatTemplate, options: RenderOptions, messages: list[dict[str, Any]]
) -> Rendering:
    """Hand messages and the variables that chat templates expect to the template."""
    turns = [{"query": TierText.of(turn.query, "query")} for turn in dialog.turns]
    for entry, turn in zip(turns, dialog.turns, strict=True):
        if turn.response is not None:
            entry["response"] = TierText.of(turn.response, "response")
    thinking = {} if options.think is None else {"enable_thinking": options.think, "thinking": options.think}
    tiers = {
        "system_info": TierText.of(dialog.system_info, "system_info"),
        "user_info": TierText.of(dialog.user_info, "user_info"),
    }
    prompt = chat.template.render(
        messages=messages,
        turns=turns,
        bos_token=chat.bos_token,
        eos_token=chat.eos_token,
        add_generation_prompt=True,
        tools=None,
        documents=None,
        functions=None,
        **thinking,
        **(tiers if chat.native else {}),
    )
    return Rendering(chat.name, chat.native, messages, prompt, chat.template.source)


def native_messages(dialog: Dialog) -> Iterator[list[dict[str, Any]]]:
    """Yield the messages of a dialog for a template that knows the role `user_info`."""
    head = [
        {"role": "system", "content": TierText.of(dialog.system_info, "system_info")},
        {"role": "user_info", "content": TierText.of(dialog.user_info, "user_info")},
    ]
    yield head + turn_messages(dialog)


def turn_messages(dialog: Dialog) -> list[dict[str, Any]]:
    """List the turns as user and assistant messages."""
    messages = []
    for turn in dialog.turns:
        messages.append({"role": "user", "content": TierText.of(turn.query, "query")})
        if turn.response is not None:
            messages.append({"role": "assistant", "content": TierText.of(turn.response, "response")})
    return messages


def wrapped_messages(dialog: Dialog, chat: ChatTemplate, options: RenderOptions) -> Iterator[list[dict[str, Any]]]:
    """Yield the ways to put the meta-prompt into system, user and assistant messages, the best first."""
    system_info = TierText.of(dialog.system_info, "system_info")
    user_info = TierText.of(dialog.user_info, "user_info")
    meta_prompt = chat.meta_prompt.render(system_info=system_info, user_info=user_info)
    messages = turn_messages(dialog)
    if options.remind and dialog.system_info and dialog.user_info and messages:
        messages[-1] = {"role": "user", "content": chat.reminder.render(query=messages[-1]["content"])}
    layouts = [messages]
    if meta_prompt:
        first = (
            {"role": "user", "content": join_text([meta_prompt, "\n\n", messages[0]["content"]])} if messages else None
        )
        layouts = [[{"role": "system", "content": meta_prompt}, *messages]]
        layouts += [[first, *messages[1:]]] if first else []  # for a template that refuses or drops a system message
    yield from layouts
    for layout in layouts:  # for a template that expects a list of parts
        yield [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in layout]


def shipped_templates() -> dict[str, Path]:
    """Return the chat templates that come with the toolkit, by name."""
    own = ("meta_prompt", "reminder")
    return {path.stem: path for path in sorted(files.part_folder("templates").glob("*.jinja")) if path.stem not in own}


def choose_template(name: str, model: ModelFile) -> ChatTemplate:
    """Choose the template for a model: `auto`, a shipped name, a name inside the GGUF, or a file.

    Raises:
        TemplateError: the model has none and none was given, or it does not parse.
        UsageError: no template has that name. NotFound: no file at that path.
    """
    shipped, embedded = shipped_templates(), model.templates
    choices = ", ".join([*shipped, *(key for key in embedded if key != "default")])
    native: bool | None = None
    if name == "auto" and "default" in embedded:
        source, label, why = embedded["default"], "embedded", "the model carries it"
        if "metaalign.template" in model.metadata:
            native, label = True, model.metadata["metaalign.template"]
            why = "the model was tuned on it (metaalign.template)"
    elif name == "auto":
        raise TemplateError(
            f"{model.path} carries no chat template: name the one it was tuned on: --template {choices}, or a file"
        )
    elif files.looks_like_path(name, ".jinja"):
        source, label, why = (
            files.read_text(Path(name).expanduser(), "the template"),
            name,
            "the file given by --template",
        )
    elif name in shipped:
        source, label, why = files.read_text(shipped[name], "the template"), name, "named by --template"
    elif name in embedded:
        source, label, why = embedded[name], name, "named by --template, carried by the model"
    else:
        raise UsageError(f"no template {name!r}: choose from auto, {choices}, or give a file")
    template = Template(source, str(model.path) if label == "embedded" else label)
    if native is None:
        native = template.mentions("user_info")
    meta_prompt, reminder = (
        Template(files.read_text(files.part_folder("templates") / f"{own}.jinja", "the template"), own)
        for own in ("meta_prompt", "reminder")
    )
    return ChatTemplate(template, native, label, why, meta_prompt, reminder, model.token("bos"), model.token("eos"))


def conversion_template(name: str, checkpoint: Any) -> tuple[str | None, str | None]:
    """Choose the chat template that `convert` writes: its name if it is native, and its text (None: the checkpoint's).

    Raises:
        UsageError, NotFound, TemplateError: as `choose_template`.
    """
    shipped = shipped_templates()
    markers = {"<|system_info|>", "<|user_info|>", "<|user|>", "<|assistant|>", "<|end|>"}
    if name == "auto":
        name = "metaalign" if markers <= checkpoint.tokens else "keep"
    if name == "keep":
        own = checkpoint.chat_template
        return ("embedded" if own and Template(own, checkpoint.name).mentions("user_info") else None), None
    if files.looks_like_path(name, ".jinja"):
        text, label = files.read_text(Path(name).expanduser(), "the template"), Path(name).stem
    elif name in shipped:
        text, label = files.read_text(shipped[name], "the template"), name
    else:
        raise UsageError(f"no template {name!r}: choose from auto, keep, {', '.join(shipped)}, or give a file")
    return (label if Template(text, name).mentions("user_info") else None), text


# =====================================================================================================================
#  4  Tier-safe tokens
# =====================================================================================================================


BYTES_PER_TOKEN = 512  # no vocabulary in the wild has a longer token; bounds what a context could ever hold
LIKELY_BYTES = 16  # of a token, at most, in any text that people write: more are worth asking the vocabulary
MARKUP = re.compile(r"<\|[^<>|\s]+\|>|<</?\w+>>|</?\w+>|\[/?[A-Z_]+\]|<｜[^<>｜\s]+｜>")


class Vocabulary(Protocol):
    """What tokenising needs of a vocabulary; the engine's is llama.cpp's."""

    bos: int | None  # the token to begin with, if the vocabulary wants one
    escapes_spaces: bool  # SentencePiece: U+2581 stands for a space
    space_prefix: bool  # SentencePiece: a space is put before text that follows a special token

    @property
    def longest(self) -> int:
        """Bytes of the longest token."""

    @property
    def size(self) -> int:
        """Number of tokens."""

    def encode(self, text: str, special: bool) -> list[int]:
        """Tokenise; `special` recognises control tokens in the text."""

    def piece(self, token: int) -> bytes:
        """Return the bytes a token stands for."""

    def attributes(self, token: int) -> int:
        """Return llama.cpp's attribute bits of a token."""

    def is_end(self, token: int) -> bool:
        """Tell whether a token ends a generation."""

    def spell(self, text: str) -> list[int]:
        """Write text one character, or one byte, per token."""


class Token(NamedTuple):
    """A token of the prompt."""

    id: int
    data: bytes
    tier: Tier | None  # None: scaffold

    @property
    def text(self) -> str:
        """Return the token's bytes as text, U+FFFD for what is incomplete."""
        return self.data.decode("utf-8", "replace")


class Tokens(NamedTuple):
    """A tokenised prompt."""

    tokens: list[Token]
    forged: list[str]  # marker words of the template that a tier's text contains: ids cannot protect those

    @property
    def ids(self) -> list[int]:
        """List the ids."""
        return [token.id for token in self.tokens]

    @property
    def ending(self) -> str:
        """Return the scaffold behind the last text of a tier."""
        tail = itertools.takewhile(lambda token: token.tier is None, reversed(self.tokens))
        return b"".join(token.data for token in reversed(list(tail))).decode("utf-8", "replace")

    def queries(self) -> list[int]:
        """List where the queries begin: what comes before is known before they are asked."""
        tiers = [None, *(token.tier for token in self.tokens)]
        return [at for at, (before, tier) in enumerate(itertools.pairwise(tiers)) if tier == "query" != before]


class Markers:
    """The tokens that only the scaffold of a template may use: `token in markers`."""

    def __init__(self, source: str, vocabulary: Vocabulary) -> None:
        self._source, self._vocabulary = source, vocabulary
        self._known: dict[int, bool] = {}

    def __contains__(self, token: int) -> bool:
        known = self._known.get(token)
        if known is None:
            known = self._known[token] = self._is_marker(token)
        return known

    def _is_marker(self, token: int) -> bool:
        attributes = self._vocabulary.attributes(token)
        if attributes & (ATTR_CONTROL | ATTR_UNKNOWN) or self._vocabulary.is_end(token):
            return True
        text = self._vocabulary.piece(token).decode("utf-8", "replace")
        if not attributes & ATTR_USER_DEFINED or not text.strip():
            return False
        return text in self._source or bool(re.fullmatch(r"<[|｜].*[|｜]>", text, re.DOTALL))


def tokenize(rendering: Rendering, vocabulary: Vocabulary, context: int) -> Tokens:
    """Tokenise a rendered dialog so that no tier's text becomes a control token.

    Raises:
        ContextOverflow: the text cannot fit a context of this many tokens, whatever its tokens are.
        TierViolation: an id in a tier is one that only the scaffold may use, or characters were lost.
    """
    prompt, size = rendering.prompt, len(rendering.prompt.encode())
    if size > context * LIKELY_BYTES and size > context * min(vocabulary.longest, BYTES_PER_TOKEN):
        raise ContextOverflow(
            f"the prompt has {size:,} bytes; a context of {context:,} tokens can never hold them: shorten it"
        )
    tokens: list[Token] = []
    words: set[str] = set()
    markers = Markers(rendering.source, vocabulary)
    for part in cut_at_markers(prompt, markers, vocabulary):
        if isinstance(part, int):
            tokens.append(Token(part, vocabulary.piece(part), None))
        elif part:
            tokens += encode_fragment(part, markers, vocabulary)
            words |= marker_words(part)
    if vocabulary.bos is not None and not (tokens and tokens[0].id == vocabulary.bos):
        tokens.insert(0, Token(vocabulary.bos, vocabulary.piece(vocabulary.bos), None))
    for token in tokens:
        if token.tier and token.id in markers:
            raise TierViolation(
                f"{token.tier} would become the control token {token.text!r}: this vocabulary cannot hold that text"
            )
    said = [text for text, tier in prompt.pieces() if tier]
    return Tokens(tokens, sorted(word for word in words if any(word in text for text in said)))


def cut_at_markers(prompt: TierText, markers: Markers, vocabulary: Vocabulary) -> Iterator[int | TierText]:
    """Split a prompt at the markers of its scaffold: yield marker ids and, between them, text."""
    fragment: list[str] = []
    for text, tier in prompt.pieces():
        if tier:
            fragment.append(TierText.of(text, tier))
            continue
        at = 0
        for token in vocabulary.encode(text, special=True):
            if token not in markers:
                continue
            marker = vocabulary.piece(token).decode("utf-8", "replace")
            start = text.find(marker, at)
            if not marker or start < 0:
                continue
            before, at = text[at:start], start + len(marker)
            attributes = vocabulary.attributes(token)
            yield join_text([*fragment, before.rstrip() if attributes & ATTR_LSTRIP else before])
            yield token
            fragment = []
            if attributes & ATTR_RSTRIP:  # as llama.cpp does, but never into a tier's text
                at += len(text[at:]) - len(text[at:].lstrip())
        fragment.append(text[at:])
    yield join_text(fragment)


def encode_fragment(fragment: TierText, markers: Markers, vocabulary: Vocabulary) -> Iterator[Token]:
    """Tokenise text between two markers and give each token its tier; a marker in a tier's text is spelled out.

    Raises:
        TierViolation: the tokens do not say what the text says.
    """
    if vocabulary.escapes_spaces:
        fragment = TierText.build(str.replace(fragment, "\u2581", " "), fragment.spans)
    expected, owners, at = fragment.encode(), byte_owners(fragment), 0
    after_special, spelled = True, False  # SentencePiece puts a space in front of what follows a special token
    for token in vocabulary.encode(fragment, special=False):
        data, attributes = vocabulary.piece(token), vocabulary.attributes(token)
        user_defined = bool(attributes & ATTR_USER_DEFINED)
        extra = 1 if vocabulary.space_prefix and after_special and not user_defined else 0
        said = data[extra:]
        forged = bool(attributes & ATTR_BYTE) and not expected.startswith(said, at)
        if forged:  # `<0x0A>` in a text may become the byte token of that name
            said = b"<0x%02X>" % data[0]
        if not expected.startswith(said, at):
            break
        while owners and owners[0][1] <= at:
            owners.pop(0)
        tier = owners[0][2] if owners and owners[0][0] < at + len(said) else None
        at += len(said)
        again = spelled and extra == 1  # the space belongs to a special token that is none any more
        spelled = forged or bool(tier and token in markers)
        if spelled or again:
            yield from (Token(letter, vocabulary.piece(letter), tier) for letter in vocabulary.spell(said.decode()))
        else:
            yield Token(token, data, tier)
        after_special = user_defined
    if at != len(expected):
        raise TierViolation(
            "some character has no token in this vocabulary, and would be lost: take it out of the text"
        )


def byte_owners(fragment: TierText) -> list[tuple[int, int, Tier]]:
    """List the spans of a text in bytes of its UTF-8."""
    owners, at = [], 0
    for text, tier in fragment.pieces():
        end = at + len(text.encode())
        if tier:
            owners.append((at, end, tier))
        at = end
    return owners


def marker_words(fragment: TierText) -> set[str]:
    """Find the markers next to a tier's text that are words, not tokens: `[/INST]`, `### Query:`."""
    words: set[str] = set()
    runs = list(fragment.pieces())
    for index, (text, tier) in enumerate(runs):
        if tier or len(runs) == 1:
            continue
        found = MARKUP.findall(text)
        lines = [line.strip() for line in text.split("\n") if line.strip()]
        if lines:
            found += ([lines[-1]] if index + 1 < len(runs) else []) + ([lines[0]] if index else [])
        words |= {word for word in found if re.search(r"[^\w\s]", word)}
    return words


# =====================================================================================================================
#  5  Settings and adapters
# =====================================================================================================================


Strength = float | Literal["auto"]
LEAST_CONTEXT = 16  # tokens
BOUNDS: Mapping[str, tuple[float, float]] = {  # of what Python's callers give; the command line has its own ranges
    "max_tokens": (1, math.inf),
    "temperature": (0, math.inf),
    "top_k": (0, math.inf),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repeat_penalty": (0.1, math.inf),
}


class Adapter(NamedTuple):
    """A LoRA adapter to lay over a model, and how hard."""

    path: str
    scale: float
    identity: str  # of the file


def split_scale(name: str) -> tuple[str, float]:
    """Return the path of an adapter and the scale behind its last colon, 1 without; a drive's colon is none.

    Raises:
        UsageError: the scale is no number.
    """
    head, colon, tail = name.rpartition(":")
    if not colon or Path(name).expanduser().exists():
        return name, 1.0
    try:
        scale = float(tail)
    except ValueError:
        if Path(head).expanduser().exists():
            raise UsageError(f"the scale of the adapter {head} is no number: {tail!r}: write PATH:0.5") from None
        return name, 1.0
    if not math.isfinite(scale):
        raise UsageError(f"the scale of the adapter {head} is {tail}: write a number, as PATH:0.5")
    return head, scale


def find_adapters(names: Sequence[str]) -> tuple[Adapter, ...]:
    """Find the files of some adapters, `PATH[:SCALE]`, which `convert --lora-only` makes.

    Raises:
        NotFound: one is not there. LoadError: one is no adapter. UsageError: a scale is no number, or one comes twice.
    """
    found: list[Adapter] = []
    for name in names:
        path, scale = split_scale(name)
        place = Path(path).expanduser()
        if place.is_dir():
            way = f"metaalign-edge convert BASE --lora {path} --lora-only"
            raise LoadError(f"the adapter {path} is a folder: {way} makes a GGUF of it")
        if not place.is_file():
            raise NotFound(f"no adapter {path}: give the path of a GGUF file, with a scale behind a colon or without")
        if os.access(place, os.R_OK) and not is_gguf(place):
            way = "metaalign-edge convert BASE --lora DIR --lora-only"
            raise LoadError(f"the adapter {path} is not a GGUF file: {way} makes one")
        file = ModelFile(place)
        if file.purpose != "adapter":
            raise LoadError(f"{path} is a model, not an adapter: give it with -m, or an adapter with --lora")
        if any(one.identity == file.identity for one in found):
            raise UsageError(f"the adapter {path} is given twice: give it once, with the sum of the scales")
        found.append(Adapter(str(place), scale, file.identity))
    return tuple(found)


def name_adapters(adapters: Sequence[Adapter]) -> str:
    """List adapters as the command line has them."""
    return ", ".join(f"{adapter.path}:{adapter.scale:g}" for adapter in adapters)


@dataclass(frozen=True)
class Settings:
    """What the command line says about loading, decoding and sampling; travels to the engine unchanged."""

    context: int | None = None  # tokens per sequence; None: as the model and the dialog need
    gpu_layers: str = "auto"  # auto, all, or a number
    threads: int | None = None  # None: one per physical core
    sequences: int = 1  # that the plan of the memory counts with, and how many of them an answer takes
    lanes: int = 1
    max_tokens: int | None = None  # None: as many as the context holds
    temperature: float | None = None  # None, here and below: as the model recommends, else the built-in value
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    seed: int = 0
    stop: tuple[str, ...] = ()
    verbose: bool = False
    system_strength: float = 1.0  # see Guidance
    pref_strength: Strength = 1.0
    adapters: tuple[Adapter, ...] = ()
    schema: Schema | None = None  # of the answer

    def deciding(self) -> list[Any]:
        """Return what decides the text of an answer, in JSON's types."""
        aside = ("gpu_layers", "threads", "sequences", "lanes", "verbose")
        return [value for name, value in asdict(self).items() if name not in aside]


def checked_gpu_layers(value: str, flag: str = "-ngl") -> str:
    """Return how many layers go to the GPU.

    Raises:
        UsageError: it is something else.
    """
    if value in ("auto", "all") or value.isdecimal():
        return value
    raise UsageError(f"{flag} takes auto, all or a number of layers, not {value!r}")


def checked_context(value: str | None, flag: str = "-c") -> int | None:
    """Return how many tokens a context has; None if nothing says so, or auto.

    Raises:
        UsageError: it is something else, or too small for any dialog.
    """
    if value is None or value == "auto":
        return None
    if not value.isdecimal() or int(value) < LEAST_CONTEXT:
        raise UsageError(f"{flag} takes auto or a number of tokens, at least {LEAST_CONTEXT}, not {value!r}")
    return int(value)


# =====================================================================================================================
#  6  Model
# =====================================================================================================================


TINY_MODEL = 1 << 25  # bytes; below, threads wait for each other longer than they compute, and all is loaded at once


def without_vocabulary(file: ModelFile) -> Any:
    """Return what makes llama.cpp load a file's weights as if it had so many tokens, but no words for them."""
    llama, size = library.llama_cpp(), file.metadata.get("tokenizer.ggml.tokens")
    integer, text = llama.LLAMA_KV_OVERRIDE_TYPE_INT, llama.LLAMA_KV_OVERRIDE_TYPE_STR
    overrides = (llama.llama_model_kv_override * 3)()  # the last one stays empty: it ends them
    overrides[0].tag, overrides[0].key, overrides[0].value.val_str = text, b"tokenizer.ggml.model", b"no_vocab"
    if isinstance(size, GGUFArray):
        key = f"{file.architecture}.vocab_size".encode()[:127]  # a longer name is no architecture
        overrides[1].tag, overrides[1].key, overrides[1].value.val_i64 = integer, key, size.length
    return overrides


class Model(Closing):
    """A GGUF loaded by llama.cpp. Close it, or use it in a `with`.

    llama.cpp loads it twice at the same time: the vocabulary without weights, and the weights without a vocabulary.
    With a `loading` both may still be on their way, and each is waited for, and its error raised, when it is asked for.

    A program opens one with `Model.open`, and hands it to `generate`, `stream` and `compare`.

    Raises:
        LoadError: it does not fit, or llama.cpp refuses the file. Interrupted: Ctrl-C while it loaded.
    """

    chat_template: ChatTemplate | None = None  # as chosen by `Model.open`
    session: Any = None  # the context that a program's calls share; it ends with the model

    def __init__(
        self, file: ModelFile, settings: Settings, interrupt: Interrupt | None = None, loading: Loading | None = None
    ) -> None:
        self.file, self.settings, self._interrupt = file, settings, interrupt
        self.ready = math.inf  # when all of it was loaded
        self._awaited = {"vocabulary", "weights"}
        self._adapters: dict[str, Any] = {}
        self._held = contextlib.ExitStack()
        self._loading = loading or Loading(file.path, settings.verbose)
        self._held.enter_context(self._loading)
        self._loads: Background | None = None
        self._unwanted = False  # closed while they load
        try:
            self.plan = plan_for(file, settings, library.gpus())
            self.plan.check(file.path)
            self.gpu_layers = self.plan.offloaded
            self.bytes = self.plan.footprint.bytes
            self._loads = Background(self._load)
            if not loading:
                self.pointer, self.vocabulary  # noqa: B018
                for adapter in settings.adapters:
                    self.adapter(adapter)
        except EdgeError:
            self.close()
            raise

    @functools.cached_property
    def pointer(self) -> Any:
        """Wait for the weights, and return llama.cpp's pointer to them.

        Raises:
            LoadError: llama.cpp refuses the file, or an adapter. Interrupted: Ctrl-C while it loaded.
        """
        with STOPWATCH("model"):
            pointer = cast(Background, self._loads).result()
        if not pointer:
            if self._interrupt:
                self._interrupt.check()
            self.vocabulary  # noqa: B018  # its error is the better one
            raise LoadError(f"cannot load {self.file.path}: {LOG.reason()}")
        self._arrived("weights")
        return pointer

    def _arrived(self, part: str) -> None:
        self._awaited.discard(part)
        if not self._awaited:
            self.ready = time.monotonic()

    @functools.cached_property
    def vocabulary(self) -> LlamaVocabulary:
        """Wait for the vocabulary.

        Raises:
            LoadError: as `Loading.take`.
        """
        with STOPWATCH("vocabulary"):
            found = self._loading.take(self.file)
            self._held.enter_context(found)
        self._arrived("vocabulary")
        return found

    @property
    def load_ms(self) -> float:
        """Return how long all of it took to load, in milliseconds; wait for that."""
        self.pointer  # noqa: B018
        self.vocabulary  # noqa: B018
        return (self.ready - self._loading.began) * 1000

    def _load(self) -> Any:
        """Load the weights; return llama.cpp's pointer, which is null if they do not load."""
        llama, interrupt = library.llama_cpp(), self._interrupt
        params, overrides = llama.llama_model_default_params(), without_vocabulary(self.file)
        params.n_gpu_layers, params.kv_overrides = self.gpu_layers, overrides
        going = llama.llama_progress_callback(
            lambda _progress, _data: not (self._unwanted or (interrupt and interrupt.raised))
        )
        params.progress_callback = going
        return llama.llama_model_load_from_file(os.fsencode(self.file.path), params)

    @classmethod
    def open(
        cls,
        name: str | os.PathLike[str] | None = None,
        *,
        template: str = "auto",
        context: int | None = None,
        gpu_layers: str | int = "auto",
        threads: int | None = None,
        lora: Sequence[str] = (),
        verbose: bool = False,
    ) -> Model:
        """Load a model for `generate`, `stream` and `compare`: by its path or name, else the embedded one.

        >>> with Model.open() as model:
        ...     print(model.file.architecture)
        llama

        Args:
            template, context, gpu_layers, threads, lora: as the options --template, -c, -ngl, -t and --lora of `chat`.
            verbose: llama.cpp's log goes to stderr.

        Raises:
            NotFound: there is no such model or adapter. LoadError: llama.cpp refuses it.
            TemplateError: it carries no template, and none is given. UsageError: no template has that name, or a
                number is none.
        """
        size = checked_context(None if context is None else str(context), "context")
        layers = checked_gpu_layers(str(gpu_layers), "gpu_layers")
        if threads is not None and not (isinstance(threads, int) and threads > 0):
            raise UsageError(f"threads takes a number from 1 on, not {threads!r}")
        file = ModelFile(models.local_model(None if name is None else os.fspath(name)))
        chosen, interrupt = choose_template(template, file), Interrupt()
        settings = Settings(size, layers, threads, verbose=verbose, adapters=find_adapters(lora))
        try:
            with interrupt:
                model = cls(file, settings, interrupt)
        except Interrupted:
            raise KeyboardInterrupt from None
        model.chat_template = chosen
        return model

    def adapter(self, adapter: Adapter) -> Any:
        """Load an adapter's weights, once; llama.cpp frees them with the model.

        Raises:
            LoadError: it was made for another model.
        """
        if adapter.identity not in self._adapters:
            made_for = ModelFile(Path(adapter.path)).architecture
            if made_for != self.file.architecture:
                raise LoadError(
                    f"the adapter {adapter.path} is for {made_for}, and {self.file.path} is {self.file.architecture}: "
                    "take the adapter of this model"
                )
            LOG.errors.clear()
            pointer = library.llama_cpp().llama_adapter_lora_init(self.pointer, os.fsencode(adapter.path))
            if not pointer:
                raise LoadError(f"the adapter {adapter.path} does not fit {self.file.path}: {LOG.reason()}")
            self._adapters[adapter.identity] = pointer
        return self._adapters[adapter.identity]

    def close(self) -> None:
        """Free the model; again is harmless."""
        if self.session:
            self.session.close()
        if self._loads:
            self._unwanted = True
            if pointer := self._loads.result():
                library.llama_cpp().llama_model_free(pointer)
            self._loads = None
        self.pointer = None
        self._held.close()


def threads_for(model: Model, settings: Settings) -> int:
    """Return the number of CPU threads: those asked for, else one per core, or a single one for a tiny model."""
    if settings.threads:
        return settings.threads
    return 1 if model.bytes < TINY_MODEL else library.physical_cores()


def least_context(file: ModelFile, settings: Settings) -> int:
    """Return how many tokens a context has, unless a dialog needs more."""
    return settings.context or min(file.context, DEFAULT_CONTEXT)


def plan_for(file: ModelFile, settings: Settings, devices: Sequence[Device]) -> Plan:
    """Plan where a model goes, by what is free now in main memory, and on these devices.

    Raises:
        LoadError: the list of tensors is damaged. NotFound: a part of the model is missing.
    """
    context = least_context(file, settings)
    plan = memory.make_plan(
        Footprint.of(file), memory.free_memory(), devices, context, settings.sequences, settings.gpu_layers
    )
    return replace(plan, lanes=settings.lanes)


def largest_context(file: ModelFile, settings: Settings) -> int:
    """Return the largest context that fits now, of the model's own at most; layers on a GPU stay there.

    Raises:
        UsageError: what a context of this model takes is not known. LoadError: none fits.
    """
    plan = plan_for(file, settings, library.gpus())
    if not plan.footprint.foretold:
        raise UsageError(f"what a context of {file.path} takes is not known ({file.architecture}): give -c a number")
    context = plan.largest(file.context)
    if not context:
        plan.check(file.path)
    return context or min(CELLS, file.context)


def check_memory(model: Model, context: int, sequences: int) -> None:
    """Refuse a context that the memory which is free by now cannot hold.

    Raises:
        LoadError: with the numbers, and what would fit.
    """
    free = (memory.free_memory(), *(device.free for device in library.gpus()))
    replace(model.plan, context=context, sequences=sequences, free=free, loaded=True).check(model.file.path)


# =====================================================================================================================
#  7  Engine and sampler
# =====================================================================================================================


@dataclass
class SequenceState:
    """One sequence of a context: its tokens that are in the KV cache, in order."""

    id: int
    tokens: list[int] = field(default_factory=list)


class Feed(NamedTuple):
    """Tokens to append to a sequence in one step."""

    sequence: SequenceState
    tokens: Sequence[int]
    logits: bool = True  # compute the logits after the last of them


class Engine(Closing):
    """A llama.cpp context with room for some sequences. Close it, or use it in a `with`.

    Raises:
        LoadError: llama.cpp cannot make the context (memory, a file without weights).
    """

    def __init__(
        self, model: Model, settings: Settings, interrupt: Interrupt, context: int, sequences: int = 1
    ) -> None:
        llama = self._llama = library.llama_cpp()
        LOG.errors.clear()
        self.model, self.context, self.interrupt = model, context, interrupt
        params = llama.llama_context_default_params()
        params.n_ctx = context * sequences
        params.n_batch = params.n_ubatch = max(PREFILL_CHUNK, sequences)
        params.n_seq_max, params.kv_unified = sequences, sequences > 1
        params.n_outputs_max = sequences  # otherwise there is room for the logits of every token of a batch
        params.n_threads = params.n_threads_batch = threads_for(model, settings)
        params.no_perf = True
        self._abort = llama.ggml_abort_callback(lambda _data: interrupt.raised)
        check_memory(model, context, sequences)
        holds = params.n_ctx == context * sequences  # a number of 32 bits
        with STOPWATCH("context"):
            self.pointer = llama.llama_init_from_model(model.pointer, params) if holds else None
        if not self.pointer:
            size, less = f"{context:,}", "a smaller -c"
            if sequences > 1:
                size, less = f"{sequences} times {size}", f"{less} or fewer at a time"
            raise LoadError(f"cannot make a context of {size} tokens for {model.file.path}: {LOG.reason()}: try {less}")
        self._memory = llama.llama_get_memory(self.pointer)
        self.sequences = [SequenceState(number) for number in range(sequences)]
        self.adapters: tuple[Adapter, ...] = ()
        self.adapt(settings.adapters)
        self.room = max(PREFILL_CHUNK, sequences)  # tokens of one step at most
        self._make_batch()

    def _make_batch(self) -> None:
        """Lay llama.cpp's batch out over arrays that a slice fills at once: each token in a list of one sequence."""
        room, integer = self.room, ctypes.c_int32
        arrays: Any = [(integer * room)() for _ in range(3)]
        self._tokens, self._positions, self._owners = arrays
        self._asked: Any = (ctypes.c_int8 * room)()
        first = ctypes.addressof(self._owners)
        lists = (ctypes.c_void_p * room)(*range(first, first + 4 * room, 4))
        owners, ones = ctypes.cast(lists, ctypes.POINTER(ctypes.POINTER(integer))), (integer * room)(*[1] * room)
        self._batch = self._llama.llama_batch(0, self._tokens, None, self._positions, ones, owners, self._asked)

    def close(self) -> None:
        """Free the context; again is harmless."""
        if self.pointer:
            self._llama.llama_free(self.pointer)
            self.pointer = None

    def adapt(self, adapters: Sequence[Adapter]) -> None:
        """Lay other adapters over the model; what was read under the old ones is forgotten.

        Raises:
            LoadError: one does not fit the model; all stays as it was.
        """
        if tuple(adapters) == self.adapters:
            return
        llama, count = self._llama, len(adapters)
        pointers = (llama.llama_adapter_lora_p_ctypes * count)(*map(self.model.adapter, adapters))
        scales = (ctypes.c_float * count)(*(adapter.scale for adapter in adapters))
        if llama.llama_set_adapters_lora(self.pointer, pointers, count, scales):
            raise LoadError(f"llama.cpp cannot use the adapters of {self.model.file.path}: {LOG.reason()}")
        self.adapters = tuple(adapters)
        for sequence in self.sequences:
            self.cut(sequence, 0)

    def cut(self, sequence: SequenceState, length: int) -> int:
        """Forget a sequence's tokens from a length on, or all of them if its state cannot be cut; return what stays."""
        forget, memory = self._llama.llama_memory_seq_rm, self._memory
        lost = length < len(sequence.tokens) and not self._is_whole(sequence)
        if lost or not forget(memory, sequence.id, length, -1):
            forget(memory, sequence.id, -1, -1)
            length = 0
        del sequence.tokens[length:]
        return length

    def share(self, source: SequenceState, sequence: SequenceState, length: int) -> None:
        """Let a sequence begin as another one does; the cache holds those tokens once. Nothing if that cannot be."""
        if self._is_whole(source):
            self.cut(sequence, 0)
            self._llama.llama_memory_seq_cp(self._memory, source.id, sequence.id, 0, length)
            sequence.tokens += source.tokens[:length]

    def key(self, tokens: Sequence[int]) -> str:
        """Return the name of the state after these tokens: a digest of all that decides it."""
        import hashlib

        identity = [1, self.model.file.identity, library.build(), self.model.gpu_layers]
        identity += [[adapter.identity, adapter.scale] for adapter in self.adapters]
        numbers = struct.pack(f"<{len(tokens)}i", *tokens)
        return hashlib.blake2b(json.dumps(identity).encode() + numbers, digest_size=20).hexdigest()

    def state(self, sequence: SequenceState) -> bytearray:
        """Return what the cache holds of a sequence."""
        size = self._llama.llama_state_seq_get_size(self.pointer, sequence.id)
        data = bytearray(size)
        view = (ctypes.c_uint8 * size).from_buffer(data)
        written = self._llama.llama_state_seq_get_data(self.pointer, view, size, sequence.id)
        return data if written == size else bytearray()

    def restore(self, sequence: SequenceState, tokens: Sequence[int], data: bytearray) -> bool:
        """Bring a sequence to the state after these tokens; it is empty if llama.cpp does not take the data."""
        self.cut(sequence, 0)
        view = (ctypes.c_uint8 * len(data)).from_buffer(data)
        if not self._llama.llama_state_seq_set_data(self.pointer, view, len(data), sequence.id):
            self.cut(sequence, 0)
            return False
        sequence.tokens += tokens
        return True

    def _is_whole(self, sequence: SequenceState) -> bool:
        """Tell whether the cache has all positions: a recurrent state has the last, a sliding window may lose some."""
        return bool(self._llama.llama_memory_seq_pos_min(self._memory, sequence.id) <= 0)

    def step(self, feeds: Sequence[Feed]) -> list[int]:
        """Decode tokens of several sequences in one llama_decode; return each feed's row of logits (-1: none asked).

        Raises:
            Interrupted: Ctrl-C during prefill. ContextOverflow: the KV cache is full. ValueError: more tokens than
                `room`, which is PREFILL_CHUNK, or one a sequence if those are more.
        """
        tokens: list[int] = []
        positions: list[int] = []
        owners: list[int] = []
        rows = []
        for sequence, fed, logits in feeds:
            start = len(sequence.tokens)
            tokens += fed
            positions += range(start, start + len(fed))
            owners += [sequence.id] * len(fed)
            rows.append(len(tokens) - 1 if logits else -1)
        size = len(tokens)
        if size > self.room:
            raise ValueError(f"a step takes at most {self.room} tokens")
        asked = bytearray(size)
        for row in rows:
            if row >= 0:
                asked[row] = 1
        self._tokens[:size], self._positions[:size], self._owners[:size] = tokens, positions, owners
        self._asked[:size] = asked
        self._batch.n_tokens = size
        status = self._decode(prefill=size > len(feeds))
        if status == 0:
            for sequence, fed, _ in feeds:
                sequence.tokens += fed
            return rows
        for sequence, _, _ in feeds:  # what was computed before the stop is not accounted for: drop it
            self.cut(sequence, len(sequence.tokens))
        self.interrupt.check()
        if status == 1:
            raise ContextOverflow(f"the context of {self.context:,} tokens is full: raise -c")
        raise LoadError(f"llama.cpp failed to decode (status {status}): {LOG.reason()}")

    def _decode(self, prefill: bool) -> int:
        """Decode the batch; return llama.cpp's status. A prefill on the CPU can be interrupted."""
        if not prefill or self.model.gpu_layers:  # llama.cpp asks its abort callback on the CPU only
            return int(self._llama.llama_decode(self.pointer, self._batch))
        self._llama.llama_set_abort_callback(self.pointer, self._abort, None)
        try:
            return int(self._llama.llama_decode(self.pointer, self._batch))
        finally:  # not while generating: it costs some 0.3 ms a token there
            self._llama.llama_set_abort_callback(self.pointer, self._llama.ggml_abort_callback(), None)

    def logits(self, row: int) -> Any:
        """Return a row of logits that the latest step was asked for, as an array over llama.cpp's own memory."""
        import numpy as np

        pointer = self._llama.llama_get_logits_ith(self.pointer, row)
        return np.ctypeslib.as_array(pointer, (self.model.vocabulary.size,))


def in_common(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Count the tokens with which both begin."""
    return next(
        (at for at, (one, other) in enumerate(zip(ours, theirs, strict=False)) if one != other),
        min(len(ours), len(theirs)),
    )


NO_TOKEN = -1  # what is drawn where nothing may follow


class Sampler(Closing):
    """llama.cpp's sampler chain. Close it, or use it in a `with`."""

    def __init__(self, file: ModelFile, settings: Settings) -> None:
        llama = self._llama = library.llama_cpp()
        self.pointer = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())

        def value(flag: float | None, key: str, built_in: float) -> float:
            return flag if flag is not None else file.metadata.get(f"general.sampling.{key}", built_in)

        temperature = value(settings.temperature, "temp", 0.7)
        top_k = int(value(settings.top_k, "top_k", 40))
        if settings.temperature and settings.top_k is None and top_k == 1:
            top_k = 40  # the model's own "greedy, please" gives way to a temperature that was asked for
        penalty = value(settings.repeat_penalty, "penalty_repeat", 1.0)
        size = file.metadata["tokenizer.ggml.tokens"].length
        chain = [llama.llama_sampler_init_penalties(size, 64, penalty, 0.0, 0.0)] if penalty != 1.0 else []
        self.greedy = not chain and (temperature <= 0 or top_k == 1)  # the likeliest token and nothing else
        if temperature <= 0 or top_k == 1:
            chain.append(llama.llama_sampler_init_greedy())
        else:
            chain += [
                llama.llama_sampler_init_top_k(top_k),
                llama.llama_sampler_init_top_p(value(settings.top_p, "top_p", 0.95), 1),
                llama.llama_sampler_init_min_p(value(settings.min_p, "min_p", 0.05), 1),
                llama.llama_sampler_init_temp(temperature),
                llama.llama_sampler_init_dist(settings.seed),
            ]
        for sampler in chain:
            llama.llama_sampler_chain_add(self.pointer, sampler)

    def close(self) -> None:
        """Free the chain; again is harmless."""
        if self.pointer:
            self._llama.llama_sampler_free(self.pointer)
            self.pointer = None

    def draw(self, engine: Engine, row: int, several: bool = False) -> int:
        """Draw the next token from a row of logits and accept it.

        llama.cpp's greedy sampler makes a list of the whole vocabulary first. Where there are several rows to draw
        from, numpy pays for its import: of equal logits both take the first.
        """
        if several and self.greedy:
            return int(engine.logits(row).argmax())
        return int(self._llama.llama_sampler_sample(self.pointer, engine.pointer, row))


# =====================================================================================================================
#  8  Guidance
# =====================================================================================================================


MOST_STRENGTH = 100  # beyond, single precision drowns in what is weighed
PLAUSIBLE = math.log(0.1)  # a token must be a tenth as likely as the likeliest, given all that is evaluated
IMPLAUSIBLE = 1e4  # taken from the logits of the others: they come last, but a grammar may leave nothing else


class Guidance:
    """Which contexts of a dialog are evaluated, and how their logits become the ones that are drawn from.

    `dialogs` are the contexts whose coefficients are not zero, the most conditioned first. With strengths of 1, and
    for a tier that is empty, contexts fall together: a single one is the model as it is.
    """

    def __init__(self, dialog: Dialog, system: float, pref: Strength) -> None:
        self._system = system if dialog.system_info.strip() else 1.0
        self._pref: Strength = pref if dialog.user_info.strip() else self._system
        contexts = (dialog, replace(dialog, user_info=""), replace(dialog, system_info="", user_info=""))
        unknown = math.nan  # an adaptive strength: no coefficient of it is zero
        coefficients = self._coefficients(unknown if self._pref == "auto" else self._pref)
        used = [(dialog, value) for dialog, value in zip(contexts, coefficients, strict=True) if value != 0]
        self.dialogs = [dialog for dialog, _ in used]
        self._fixed = tuple(value for _, value in used)

    def _coefficients(self, pref: float) -> tuple[float, float, float]:
        """Return those of l2, l1 and l0."""
        return pref, self._system - pref, 1 - self._system

    def combine(self, rows: Sequence[Any]) -> None:
        """Combine logits in place, in the first row; the others are spent.

        Args:
            rows: one float32 array of the vocabulary's size for each of `dialogs`, in their order.
        """
        import numpy as np

        coefficients: tuple[float, ...] = self._fixed
        if self._pref == "auto":  # AdaCAD (arXiv 2409.07394): the strength grows with what the preference changes
            coefficients = self._coefficients(1 + divergence(rows[0], rows[1]))[: len(rows)]
        conditioned, *others = rows
        plausible = np.flatnonzero(conditioned >= conditioned.max() + PLAUSIBLE)  # a handful, of 150,000
        combined = conditioned[plausible] * coefficients[0]
        for row, coefficient in zip(others, coefficients[1:], strict=True):
            combined += row[plausible] * coefficient
        conditioned -= IMPLAUSIBLE
        conditioned[plausible] = combined


def divergence(one: Any, other: Any) -> float:
    """Return the Jensen-Shannon divergence of two distributions given as logits, in bits: from 0 to 1 (Lin, 1991)."""
    import numpy as np

    first, second = (np.exp(row - row.max()) for row in (one, other))
    first, second = first / first.sum(), second / second.sum()
    middle = np.maximum((first + second) / 2, np.finfo(np.float32).tiny)

    def surprise(row: Any) -> float:
        return float((row * np.log2(np.maximum(row, np.finfo(np.float32).tiny) / middle)).sum())

    return min(max((surprise(first) + surprise(second)) / 2, 0.0), 1.0)


def checked_strength(flag: str, value: str | float) -> float:
    """Return a strength as a number that logits can be weighed with.

    Raises:
        UsageError: it is none, negative or too large.
    """
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 <= number <= MOST_STRENGTH:
        raise UsageError(f"{flag} takes a number from 0 to {MOST_STRENGTH}, not {value!r}")
    return number


# =====================================================================================================================
#  9  Answer
# =====================================================================================================================


FinishReason = Literal["stop", "length", "interrupted"]


@dataclass
class Answer:
    """What `--json` prints of one answer."""

    model: str
    template: str
    system_info: str
    user_info: str
    query: str
    response: str = ""
    reasoning: str | None = None
    finish_reason: FinishReason = "stop"
    input_tokens: int = 0
    cached_tokens: int = 0  # of the input, those that were in the KV cache already
    output_tokens: int = 0
    load_ms: float = 0.0
    first_token_ms: float = 0.0  # from the prompt to the first token
    duration_ms: float = 0.0  # from the prompt to the end
    tokens_per_second: float = 0.0  # of the output, after the first token
    seed: int = 0
    truncated: int = 0  # turns dropped to fit the context


def overlap(text: AnyStr, mark: AnyStr) -> int:
    """Return how much of the beginning of a mark stands at the end of a text."""
    return next((size for size in range(len(mark) - 1, 0, -1) if text.endswith(mark[:size])), 0)


class Incremental:
    """Token bytes to text: never half a character, never a stop text or the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.stopped = False

    def feed(self, data: bytes) -> str:
        """Take a token's bytes; return the text that is certain by now."""
        self._held += self._decoder.decode(data)
        ends = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            self.stopped = True
            self._held = self._held[: min(ends)]
            return self.rest()
        keep = max((overlap(self._held, stop) for stop in self._stops), default=0)
        ready, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return ready

    def rest(self) -> str:
        """Return what was held back; an unfinished character is dropped."""
        held, self._held = self._held, ""
        return held


# How models mark their reasoning. gpt-oss is not among them: its channels are messages of their own.
THINKING = (
    ("<think>", "</think>"),  # Qwen 3, QwQ, DeepSeek R1, SmolLM3, GLM 4.5, Nemotron, MiMo, Phi 4 reasoning
    ("[THINK]", "[/THINK]"),  # Magistral, Ministral 3
    ("<thought>", "</thought>"),  # EXAONE Deep
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
)


def thinking_marks(source: str, vocabulary: Vocabulary) -> tuple[str, str] | None:
    """Return by what a model marks its reasoning: what its template names, or has a token; None if it has neither."""
    if named := next((marks for marks in THINKING if marks[1] in source), None):
        return named
    return next((marks for marks in THINKING if len(vocabulary.encode(marks[1], special=True)) == 1), None)


class Thinking:
    """Parts the bytes of an answer into reasoning and what is said.

    Reasoning stands at the beginning, between two marks, of which the prompt may have written the first. Anywhere else
    a mark is text. White space around reasoning belongs to nobody.
    """

    def __init__(self, marks: tuple[str, str] | None, opened: bool = False) -> None:
        self._begin, self._end = (mark.encode() for mark in marks or ("", ""))
        self.state: Literal["before", "inside", "behind", "answer"] = "before" if marks else "answer"
        if opened:
            self.state = "inside"
        self.run_on = b""  # what is said already by the token that ends the reasoning
        self._held, self._begun = b"", False

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """Take a token's bytes; return those of the reasoning and of the answer that are certain by now."""
        self._held += data
        state, thought, said = self.state, b"", b""
        if self.state == "before":
            text = self._held.lstrip()
            if text.startswith(self._begin):
                self.state, self._held = "inside", text[len(self._begin) :]
            elif not self._begin.startswith(text):
                self.state = "answer"
        if self.state == "inside":
            thought = self._reason()
        if self.state == "behind":
            self._held = self._held.lstrip()
            self.state = "answer" if self._held else "behind"
        if self.state == "answer":
            said, self._held = self._held, b""
            self.run_on = said if state == "inside" else b""
        return thought, said

    def _reason(self) -> bytes:
        """Take from what is held the reasoning that is certain."""
        thought, end, behind = self._held.partition(self._end)
        if end:
            self.state = "behind"
        else:
            thought = thought[: len(thought) - overlap(thought, self._end)]
        thought = thought.rstrip()
        self._held = behind if end else self._held[len(thought) :]
        thought = thought if self._begun else thought.lstrip()
        self._begun = self._begun or bool(thought)
        return thought

    def rest(self) -> tuple[bytes, bytes]:
        """Return what was held back, when there is no more to come."""
        held, self._held = self._held.rstrip(), b""
        return (held, b"") if self.state == "inside" else (b"", held)


SHORTLIST = 1024  # tokens


class SchemaSampler(Sampler):
    """A sampler whose text is JSON of a schema, from where a model's reasoning ends.

    The chain draws first, and the grammar looks at that one token. Where it refuses, it looks at the likeliest others,
    and at all of them only if none of those fits: for a large vocabulary that takes 10 ms. The distribution is as if
    the grammar came first, but for what top-k and the like keep. No marker is drawn, nor what is no UTF-8: to the
    grammar their letters are text.

    Raises:
        UsageError: llama.cpp does not take the grammar.
    """

    def __init__(
        self,
        model: Model,
        settings: Settings,
        grammar: str,
        markers: Markers,
        thinking: Thinking,
        marks: tuple[str, str] | None,
    ) -> None:
        super().__init__(model.file, settings)
        llama, self._vocabulary, self._markers, self._thinking = self._llama, model.vocabulary, markers, thinking
        vocabulary, root = model.vocabulary.pointer, b"after" if marks else b"root"
        self._shortlist = llama.llama_sampler_init_top_k(SHORTLIST)
        self._grammar = llama.llama_sampler_init_grammar(vocabulary, grammar.encode(), root)
        if not self._grammar:
            self.close()
            raise UsageError(f"llama.cpp cannot follow this schema: {LOG.reason()}: make it simpler")
        opening = model.vocabulary.encode(marks[0], special=True) if marks else []
        self._instead = opening[0] if len(opening) == 1 else NO_TOKEN  # a model may think first
        self._text = codecs.getincrementaldecoder("utf-8")()
        self._started = False
        self._size = size = model.vocabulary.size
        self._entries = (llama.llama_token_data * size)()  # number, logit, share
        memory = memoryview(self._entries).cast("B")
        memory.cast("i")[::3] = array.array("i", range(size))
        self._all, self._logits = bytes(memory), memory.cast("f")[1::3]

    def close(self) -> None:
        """Free the chain and the grammar; again is harmless."""
        super().close()
        for sampler in filter(None, (self._grammar, self._shortlist)):
            self._llama.llama_sampler_free(sampler)
        self._grammar = self._shortlist = None

    def draw(self, engine: Engine, row: int, several: bool = False) -> int:
        """Draw the next token from a row of logits and accept it; NO_TOKEN if none goes on."""
        if self._thinking.state == "inside":
            return super().draw(engine, row, several)
        first, self._started = not self._started, True
        if first and not self._catch_up(self._thinking.run_on):
            return NO_TOKEN
        logits = ctypes.string_at(self._llama.llama_get_logits_ith(engine.pointer, row), 4 * self._size)
        barred: list[int] = []
        wide = False  # look at all tokens, not only the likeliest
        for attempt in itertools.count():
            candidates = self._candidates(logits, barred)
            if attempt and not wide:
                self._llama.llama_sampler_apply(self._shortlist, candidates)
            if attempt:
                self._llama.llama_sampler_apply(self._grammar, candidates)
                candidates.sorted = False
            self._llama.llama_sampler_apply(self.pointer, candidates)
            chosen = candidates.data[candidates.selected]
            token = int(chosen.id)
            if chosen.logit == -math.inf:
                if wide:
                    return NO_TOKEN
                wide = True
                continue
            if first and token == self._instead and self._thinking.state == "before":
                self._started = False
                break
            if self._is_barred(token):
                barred.append(token)
            elif attempt or self._fits(token):
                self._accept(token)
                break
        self._llama.llama_sampler_accept(self.pointer, token)
        return token

    def _catch_up(self, said: bytes) -> bool:
        """Let the grammar see what the token that ended the reasoning says already; tell whether that fits."""
        for letter in self._vocabulary.spell(said.decode("utf-8", "replace")):
            if not self._fits(letter):
                return False
            self._accept(letter)
        return True

    def _accept(self, token: int) -> None:
        self._llama.llama_sampler_accept(self._grammar, token)
        self._text.decode(self._vocabulary.piece(token))

    def _candidates(self, logits: bytes, barred: Sequence[int]) -> Any:
        """Lay out all tokens with their logits as llama.cpp's samplers take them."""
        ctypes.memmove(self._entries, self._all, len(self._all))  # they sort them
        self._logits[:] = memoryview(logits).cast("f")
        for token in barred:
            self._entries[token].logit = -math.inf
        return self._array(self._entries, self._size)

    def _array(self, entries: Any, size: int) -> Any:
        return self._llama.llama_token_data_array(data=entries, size=size, selected=-1, sorted=False)

    def _fits(self, token: int) -> bool:
        """Tell whether the grammar takes a token; one that it refuses would end the process if it were accepted."""
        entries = (self._llama.llama_token_data * 1)((token, 0.0, 0.0))
        self._llama.llama_sampler_apply(self._grammar, self._array(entries, 1))
        return bool(entries[0].logit != -math.inf)

    def _is_barred(self, token: int) -> bool:
        """Tell whether a token is no text of a JSON document; one that is may be half a character."""
        if self._vocabulary.is_end(token):
            return False
        if token in self._markers:
            return True
        state = self._text.getstate()
        try:
            self._text.decode(self._vocabulary.piece(token))
        except UnicodeDecodeError:
            return True
        finally:
            self._text.setstate(state)
        return False


class Draft:
    """An answer while it is written: tokens go in, text comes out, and the figures are kept."""

    def __init__(
        self,
        answer: Answer,
        settings: Settings,
        vocabulary: Vocabulary,
        context: int,
        thinking: Thinking,
        think: Callable[[str], None],
    ) -> None:
        """Begin; `think` sees the reasoning as it comes, which is no part of the text, and white space when it ends."""
        self.answer, self.ended = answer, False
        self._thinking, self._thought, self._think = thinking, Incremental(()), think
        self._vocabulary, self._text = vocabulary, Incremental(settings.stop)
        self._most = min(settings.max_tokens or context, context - answer.input_tokens)
        self._started = self._first = time.monotonic()

    def add(self, token: int) -> str:
        """Take a token and return the text that is certain by now; `ended` says whether it was the last."""
        answer = self.answer
        if not answer.output_tokens:
            self._first = time.monotonic()
        if token == NO_TOKEN or self._vocabulary.is_end(token):
            self.ended = True
            return ""
        answer.output_tokens += 1
        thought, said = self._thinking.feed(self._vocabulary.piece(token))
        self._reason(self._thought.feed(thought))
        piece = self._text.feed(said)
        self._say(piece)
        if self._text.stopped:
            self.ended = True
        elif answer.output_tokens >= self._most:
            answer.finish_reason, self.ended = "length", True
        return piece

    def _reason(self, piece: str) -> None:
        if piece:
            self.answer.reasoning = (self.answer.reasoning or "") + piece
            self._think(piece)

    def _say(self, piece: str) -> None:
        if piece and not self.answer.response and self.answer.reasoning:
            self._think("\n\n")
        self.answer.response += piece

    def close(self) -> str:
        """Write down the figures and return the text that was held back."""
        answer, ended = self.answer, time.monotonic()
        thought, said = self._thinking.rest()
        self._reason(self._thought.feed(thought))
        piece = self._text.feed(said) + self._text.rest()
        self._say(piece)
        if answer.reasoning and not answer.response:  # it ended in the middle of it
            self._think("\n")
        answer.first_token_ms = round((self._first - self._started) * 1000, 1)
        answer.duration_ms = round((ended - self._started) * 1000, 1)
        answer.tokens_per_second = (
            round((answer.output_tokens - 1) / (ended - self._first), 1) if answer.output_tokens > 1 else 0.0
        )
        return piece


# =====================================================================================================================
# 10  Scheduler
# =====================================================================================================================


LONG_WAY = 1 << 31  # bytes of weights times tokens, some 50 ms: a state that is reached by less is not worth a file


class Outline(NamedTuple):
    """What is to be read for an answer that has no word yet."""

    answer: Answer
    guidance: Guidance
    prompts: list[list[int]]  # of the guidance's contexts
    stops: list[list[int]]  # of each prompt, where its queries begin, as far as the way there is long
    context: int  # tokens that a sequence needs
    scaffold: str  # with which the prompt ends: it may open the reasoning


@dataclass(frozen=True)
class Job:
    """A dialog to be answered."""

    dialog: Dialog
    seed: int = 0
    tag: Any = None  # the caller's own
    max_tokens: int | None = None  # as the settings say
    show: Callable[[str], None] = lambda _: None  # sees the text as it comes
    think: Callable[[str], None] = lambda _: None  # and the reasoning
    schema: Schema | None = None  # as the settings say


@dataclass(eq=False)
class Lane:
    """One context of a running job: a sequence, and the tokens that it has yet to read.

    Those are what is left of the prompt, then the latest token of the answer. With `after`, the sequence is empty, and
    begins as another does as soon as that one has read so many tokens.
    """

    sequence: SequenceState
    prompt: list[int]
    pending: list[int]
    after: tuple[SequenceState, int] | None = None
    stops: Sequence[int] = ()  # tokens at which a step ends: so a state is the same whether it is computed or loaded

    @property
    def known(self) -> list[int]:
        """Return what the sequence will hold before it waits for others: all but the token whose logits are wanted."""
        return self.sequence.tokens + self.pending[:-1]

    @property
    def due(self) -> int:
        """Return how many tokens the next step may take; of the prompt, the last one only if nothing else is left."""
        known = len(self.sequence.tokens)
        return next((stop - known for stop in self.stops if stop > known), len(self.pending))

    def begin(self, engine: Engine) -> None:
        """Begin as the other sequence, if that one is so far."""
        if self.after and len(self.after[0].tokens) >= self.after[1]:
            engine.share(self.after[0], self.sequence, self.after[1])
            self.pending, self.after = self.prompt[len(self.sequence.tokens) :], None


@dataclass(eq=False)
class Running:
    """A job that is being answered, in a sequence for each of its contexts."""

    job: Job
    guidance: Guidance
    lanes: list[Lane]
    draft: Draft
    sampler: Sampler

    def join(self, engine: Engine) -> None:
        """Let the contexts that wait for another sequence begin as it does, where it is so far."""
        for lane in self.lanes:
            if lane.after:
                lane.begin(engine)
                if lane is self.lanes[0]:
                    self.draft.answer.cached_tokens = len(lane.sequence.tokens)

    @property
    def reading(self) -> bool:
        """Tell whether a prompt has not been read yet."""
        return any(lane.after or len(lane.pending) > 1 for lane in self.lanes)


class Session(Closing):
    """A model, its template and a context of some sequences: dialogs become prompts that fit, and prompts answers.

    A job takes a sequence for each context of its guidance. What any sequence knows, or is about to read, is not read
    again: another one begins as it does.
    """

    def __init__(
        self,
        model: Model,
        chat_template: ChatTemplate,
        settings: Settings,
        options: RenderOptions,
        interrupt: Interrupt,
        parallel: int = 1,
        states: States | None = None,
    ) -> None:
        self.model, self.template, self.parallel = model, chat_template, parallel
        self.states = states
        self._unsaved: list[tuple[str, bytearray]] = []
        self.settings, self.options, self.interrupt = settings, options, interrupt
        self.engine: Engine | None = None
        self.forged: list[str] = []  # marker words in the tiers of the latest prompt
        self._untold_ms = 0.0  # of contexts that were made since the latest answer began
        self._told_of_model = False
        try:
            with self.interrupt:
                if context := self.at_once():
                    self.open(context, parallel * len(self.guidance(Dialog("both", "tiers")).dialogs))
                self.marks = thinking_marks(chat_template.template.source, model.vocabulary)
                self.interrupt.check()
        except EdgeError:
            self.close()
            raise

    def close(self) -> None:
        """Free the context and write down the states; again is harmless."""
        with self.interrupt:  # Ctrl-C would be lost in llama.cpp, or lose a state
            if self.engine:
                self.engine.close()
                self.engine = None
            self._save()

    def _save(self) -> None:
        """Write down the states that were taken, now that nobody waits for an answer."""
        for key, data in self._unsaved:
            with STOPWATCH("states"):
                cast(States, self.states).save(key, data)
        self._unsaved.clear()

    def at_once(self) -> int | None:
        """Return how many tokens of each sequence are made room for before the first dialog is seen; None: it decides.

        That costs nothing while the vocabulary is still loading.
        """
        return None

    @property
    def limit(self) -> int:
        """The largest context a dialog may use."""
        return self.settings.context or self.model.file.context

    def guidance(self, dialog: Dialog) -> Guidance:
        """Return how a dialog is guided under these settings."""
        return Guidance(dialog, self.settings.system_strength, self.settings.pref_strength)

    def outline(self, dialog: Dialog, seed: int = 0, most: int | None = None) -> Outline:
        """Drop the oldest turns until a dialog and its answer, of so many tokens at most, fit in each of its contexts.

        Raises:
            ContextOverflow: the Info tiers and the newest query alone do not fit.
        """
        fitted, most = dialog, most or self.settings.max_tokens
        while True:
            guidance = self.guidance(fitted)
            read = [self._tokenize(one) for one in guidance.dialogs]
            prompts, longest = [tokens.ids for tokens in read], max(len(tokens.tokens) for tokens in read)
            needed = longest + (most or longest // 3 + 1)
            context = self.settings.context or min(self.limit, max(DEFAULT_CONTEXT, -(-needed // 256) * 256))
            reserved = most or context // 4
            if longest + reserved <= context:
                break
            if len(fitted.turns) <= 1:
                raise ContextOverflow(
                    f"the prompt has {longest:,} tokens and the answer reserves {reserved:,}; "
                    f"the context holds {context:,}: shorten the text, lower -n or raise -c"
                )
            fitted = replace(fitted, turns=fitted.turns[1:])
        self.forged = read[0].forged
        answer = Answer(
            model=self.model.file.path.name,
            template=self.template.name,
            system_info=dialog.system_info,
            user_info=dialog.user_info,
            query=dialog.turns[-1].query,
            input_tokens=len(prompts[0]),
            seed=seed,
            truncated=len(dialog.turns) - len(fitted.turns),
        )
        stops = [[at for at in tokens.queries() if at * self.model.bytes >= LONG_WAY] for tokens in read]
        return Outline(answer, guidance, prompts, stops, context, read[0].ending)

    @STOPWATCH("tokens")
    def _tokenize(self, dialog: Dialog) -> Tokens:
        return tokenize(render(dialog, self.template, self.options), self.model.vocabulary, self.limit)

    def open(self, context: int, sequences: int) -> None:
        """Make the context anew.

        Raises:
            LoadError: llama.cpp cannot make it.
        """
        self.close()
        self.model.pointer  # noqa: B018  # that time is the model's
        started = time.monotonic()
        self.engine = Engine(self.model, self.settings, self.interrupt, context, sequences)
        if math.isfinite(self.model.ready):  # otherwise that time is a part of the model's
            self._untold_ms += (time.monotonic() - started) * 1000

    def prepare(self, outline: Outline) -> Engine:
        """Return a context with room for an answer, and tell it what was loaded for it.

        Raises:
            LoadError: llama.cpp cannot make it. RuntimeError: it is closed.
        """
        if self.engine is None:
            raise RuntimeError("the context is closed")
        untold_ms, self._untold_ms = self._untold_ms, 0.0
        if not self._told_of_model:
            self._told_of_model = True
            untold_ms += self.model.load_ms
        outline.answer.load_ms = round(untold_ms, 1)
        return self.engine

    def run(
        self, jobs: Iterable[Job], before: Callable[[Answer], None] = lambda _: None
    ) -> Iterator[tuple[Job, Answer | EdgeError]]:
        """Yield each job with its answer, or with the error that kept it from one, as they come to an end.

        The next job is taken whenever there is room for it, and `before` sees its answer before it is begun.

        Raises:
            Interrupted: Ctrl-C; what has been written of the answers is theirs, and `interrupted` their finish reason.
            RuntimeError: closed.
        """
        self._save()
        waiting = iter(jobs)
        active: list[Running] = []
        try:
            while True:
                while len(active) < self.parallel and (job := next(waiting, None)) is not None:
                    try:
                        active.append(self._begin(job, active, before))
                    except EdgeError as error:
                        yield job, error
                if not active:
                    return
                self.interrupt.check()
                finished = self._advance(active)
                for running in finished:
                    active.remove(running)
                    self._end(running)
                for running in finished:
                    yield running.job, running.draft.answer
        except Interrupted:
            for running in active:
                running.draft.answer.finish_reason = "interrupted"
                running.job.show(running.draft.close())
            raise
        finally:
            for running in active:
                running.sampler.close()

    def _begin(self, job: Job, active: Sequence[Running], before: Callable[[Answer], None]) -> Running:
        """Give each of a job's contexts a sequence."""
        settings = replace(
            self.settings,
            seed=job.seed,
            max_tokens=job.max_tokens or self.settings.max_tokens,
            schema=job.schema or self.settings.schema,
        )
        outline = self.outline(job.dialog, job.seed, job.max_tokens)
        answer = outline.answer
        before(answer)
        engine = self.prepare(outline)
        busy = {lane.sequence.id: lane for running in active for lane in running.lanes}
        lanes = []
        for prompt, stops in zip(outline.prompts, outline.stops, strict=True):
            lane = place(engine, prompt, busy)
            self._fetch(engine, lane, stops)
            busy[lane.sequence.id] = lane
            lanes.append(lane)
        answer.cached_tokens = len(lanes[0].prompt) - len(lanes[0].pending)
        begin, end = self.marks or ("", "")
        thinking = Thinking(self.marks, outline.scaffold.rfind(begin) > outline.scaffold.rfind(end))
        draft = Draft(answer, settings, self.model.vocabulary, engine.context, thinking, job.think)
        return Running(job, outline.guidance, lanes, draft, self._sampler(settings, thinking))

    def _sampler(self, settings: Settings, thinking: Thinking) -> Sampler:
        """Return what draws the tokens of an answer."""
        if settings.schema is None:
            return Sampler(self.model.file, settings)
        markers = Markers(self.template.template.source, self.model.vocabulary)
        return SchemaSampler(self.model, settings, settings.schema.grammar, markers, thinking, self.marks)

    def adapt(self, adapters: Sequence[Adapter]) -> None:
        """Lay other adapters over the model, from the next answer on; what was read under the old ones is forgotten.

        Raises:
            LoadError: one does not fit the model; all stays as it was.
        """
        for adapter in adapters:
            self.model.adapter(adapter)
        if self.engine:
            self.engine.adapt(adapters)
        self.settings = replace(self.settings, adapters=tuple(adapters))

    def _fetch(self, engine: Engine, lane: Lane, stops: Sequence[int]) -> None:
        """Load the longest state on disk that begins a prompt, if it is longer than what the lane begins with."""
        lane.stops = stops
        known = lane.after[1] if lane.after else len(lane.sequence.tokens)
        for stop in reversed(stops):
            if self.states is None or stop <= known:
                return
            with STOPWATCH("states"):
                data = self.states.load(engine.key(lane.prompt[:stop]))
            if data and engine.restore(lane.sequence, lane.prompt[:stop], data):
                lane.pending, lane.after = lane.prompt[stop:], None
                return

    def _keep(self, engine: Engine, lane: Lane) -> None:
        """Take the state at a lane's last stop, to be written when nobody waits any more."""
        known, last = len(lane.sequence.tokens), lane.stops[-1]
        if known >= last:
            lane.stops = ()
        if known != last or self.states is None or not self.states.fills:
            return
        key = engine.key(lane.sequence.tokens)
        if not self.states.has(key) and (data := engine.state(lane.sequence)):
            self._unsaved.append((key, data))

    def _advance(self, active: Sequence[Running]) -> list[Running]:
        """Write a token of every answer and read of the newcomers' prompts what has room; return what is finished.

        The contexts of a job end their prompts in one step, so that the logits of all are there to be combined.
        """
        engine = cast(Engine, self.engine)
        feeds, writing, room = [], [], engine.room
        for running in sorted(active, key=lambda running: running.reading):  # answers first
            lanes = [lane for lane in running.lanes if not lane.after]
            ready = len(lanes) == len(running.lanes) and sum(len(lane.pending) for lane in lanes) <= room
            ready = ready and all(lane.due == len(lane.pending) for lane in lanes)
            for lane in lanes:
                size = len(lane.pending) if ready else min(lane.due, len(lane.pending) - 1, room)
                if size:
                    feeds.append(Feed(lane.sequence, lane.pending[:size], logits=ready))
                    lane.pending, room = lane.pending[size:], room - size
            if ready:
                writing.append(running)
        with STOPWATCH("prompt" if any(len(feed.tokens) > 1 for feed in feeds) else "answer"):
            rows = iter([row for row in engine.step(feeds) if row >= 0])
        for running in active:
            running.join(engine)
            for lane in running.lanes:
                if lane.stops:
                    self._keep(engine, lane)
        for running in writing:
            mine = [next(rows) for _ in running.lanes]
            if len(mine) > 1:
                running.guidance.combine([engine.logits(row) for row in mine])
            token = running.sampler.draw(engine, mine[0], several=len(feeds) > 1)
            running.job.show(running.draft.add(token))
            for lane in running.lanes:
                lane.pending = [token]
        return [running for running in writing if running.draft.ended]

    def _end(self, running: Running) -> None:
        """Complete an answer."""
        running.job.show(running.draft.close())
        running.sampler.close()


class Chat(Session):
    """One conversation: answers a dialog at a time, and what was said stays in the KV cache for the next.

    The context grows when a dialog needs it; the Info tiers and the newest query are pinned, the oldest turns go first.
    `think` sees the reasoning of a model that thinks, as it comes.
    """

    think: Callable[[str], None] = staticmethod(lambda _: None)

    def at_once(self) -> int | None:
        """Return as much as any dialog has; only a strength may need more sequences than one."""
        guided = self.settings.system_strength != 1 or self.settings.pref_strength != 1
        return None if guided else least_context(self.model.file, self.settings)

    def prepare(self, outline: Outline) -> Engine:
        """Return the context, made anew if the dialog needs more of it."""
        engine, sequences = self.engine, len(outline.prompts)
        if engine is None or engine.context < outline.context or len(engine.sequences) < sequences:
            self.open(outline.context, sequences)
        return super().prepare(outline)

    def answer(
        self, dialog: Dialog, seed: int, show: Callable[[str], None], before: Callable[[Answer], None]
    ) -> Answer:
        """Answer the newest query, showing text as it comes; an interruption is a finish reason, not an exception."""
        begun: list[Answer] = []

        def begin(answer: Answer) -> None:
            begun.append(answer)
            before(answer)

        try:
            ((_, answer),) = self.run([Job(dialog, seed, show=show, think=self.think)], begin)
        except Interrupted:
            return begun[0]
        if isinstance(answer, EdgeError):
            raise answer
        return answer

    def stream(self, job: Job) -> Generator[str, None, Answer]:
        """Yield an answer's text as it is written, and return it with its figures; closed early, it stops at once.

        Raises:
            Interrupted: Ctrl-C while it is being written; between two pieces, that is the caller's.
            RuntimeError: the context is closed.
        """
        pieces: list[str] = []
        with self.interrupt:
            running = self._begin(replace(job, show=pieces.append), [], lambda _: None)
        try:
            while not running.draft.ended:
                if self.engine is None:
                    raise RuntimeError("the context is closed")
                with self.interrupt:
                    self._advance([running])
                    self.interrupt.check()
                yield from filter(None, pieces)
                pieces.clear()
            self._end(running)
            yield from filter(None, pieces)
            return running.draft.answer
        finally:
            running.sampler.close()


class Parallel(Session):
    """Many dialogs answered together in one context; when one ends, the next job begins at once.

    The context is made once, with as many tokens for each sequence: those given, else `-c`, else the smaller of the
    model's own and DEFAULT_CONTEXT. All of it is allocated.

    A job gets the answer that `Chat` gives, but for rounding: what else is in a batch changes the last bits of its
    logits. Of 1,600 dialogs put to the embedded model at temperature 0, as many as 5 got another text.

    Raises:
        LoadError: llama.cpp cannot make the context (memory; it has 256 sequences at most).
    """

    def __init__(
        self,
        model: Model,
        chat_template: ChatTemplate,
        settings: Settings,
        options: RenderOptions,
        interrupt: Interrupt,
        parallel: int,
        context: int | None = None,
        states: States | None = None,
    ) -> None:
        context = context or least_context(model.file, settings)
        super().__init__(model, chat_template, replace(settings, context=context), options, interrupt, parallel, states)

    def at_once(self) -> int | None:
        """Return all there will be."""
        return self.settings.context

    def _end(self, running: Running) -> None:
        """Complete an answer and leave its prompt in the cache, for one that begins alike."""
        super()._end(running)
        for lane in running.lanes:
            cast(Engine, self.engine).cut(lane.sequence, len(lane.prompt))


def parallel_for(session: Session, dialogs: Sequence[Dialog]) -> Parallel:
    """Return a context, made as a session's, in which these dialogs can be answered together.

    Raises:
        ContextOverflow: one does not fit. LoadError: there is no memory for it.
    """
    need = max(session.outline(dialog).context for dialog in dialogs)
    made = (session.model, session.template, session.settings, session.options, session.interrupt)
    return Parallel(*made, len(dialogs), need, session.states)


def place(engine: Engine, prompt: list[int], busy: Mapping[int, Lane]) -> Lane:
    """Give a prompt the free sequence that shares most with it, or the beginning of a busy one.

    Args:
        busy: the lanes that have a sequence, by its number.
    """
    read = prompt[:-1]  # the last token is always fed, for its logits
    known = {one.id: busy[one.id].known if one.id in busy else one.tokens for one in engine.sequences}
    count = {number: in_common(tokens, read) for number, tokens in known.items()}
    free = [sequence for sequence in engine.sequences if sequence.id not in busy]
    sequence = max(free, key=lambda sequence: (count[sequence.id], -len(sequence.tokens)))
    source = max(engine.sequences, key=lambda sequence: count[sequence.id])
    if count[source.id] <= count[sequence.id]:
        return Lane(sequence, prompt, prompt[engine.cut(sequence, count[sequence.id]) :])
    engine.cut(sequence, 0)
    lane = Lane(sequence, prompt, prompt, (source, count[source.id]))
    lane.begin(engine)
    return lane


# =====================================================================================================================
# 11  Python
# =====================================================================================================================


class Options(TypedDict, total=False):
    """What a call may say besides its dialog; each as the option of `chat` that is called so."""

    max_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repeat_penalty: float | None
    seed: int | None  # drawn, and reported in the answer, unless it is given
    stop: Sequence[str]
    system_strength: float
    pref_strength: Strength
    schema: Mapping[str, Any] | str | None  # JSON Schema, or fields as `name, age int`; whether it fits, you check
    remind: bool
    think: bool | None


class Shared(Chat):
    """The context of a model that a program's calls share: one answer at a time, and what was read stays known."""

    def __init__(self, model: Model) -> None:
        chosen = model.chat_template or choose_template("auto", model.file)
        super().__init__(model, chosen, model.settings, AS_USUAL, Interrupt())
        self._free, self._writer = threading.Lock(), 0  # a thread

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for the answers of other threads to end.

        Raises:
            RuntimeError: this thread itself is in the middle of one. KeyboardInterrupt: Ctrl-C.
        """
        if self._writer == threading.get_ident():
            raise RuntimeError("an answer is still being written: read its stream to the end, or close it")
        with self._free:
            self._writer, self.interrupt.raised = threading.get_ident(), False
            try:
                yield
            except Interrupted:
                raise KeyboardInterrupt from None
            finally:
                self._writer = 0

    def take(self, options: Options) -> int:
        """Let options be in force for the next answer, and return its seed.

        Raises:
            TypeError: there is no such option. UsageError: it is out of range, or no schema.
        """
        if unknown := options.keys() - Options.__annotations__:
            raise TypeError(f"no option {min(unknown)!r}: there are {', '.join(Options.__annotations__)}")
        given: dict[str, Any] = {"seed": None, **options}
        self.options = RenderOptions(given.pop("remind", True), given.pop("think", None))
        seed = given.pop("seed")
        seed = random.SystemRandom().randrange(2**32) if seed is None else seed
        if not 0 <= seed < 2**32:
            raise UsageError(f"seed takes a number from 0 to {2**32 - 1}, not {seed}")
        for name, (least, most) in BOUNDS.items():
            value = given.get(name)
            if value is not None and not least <= value <= most:
                up = "on" if most == math.inf else f"to {most}"
                raise UsageError(f"{name} takes a number from {least} {up}, not {value}")
        for strength in ("system_strength", "pref_strength"):
            if given.get(strength, "auto") != "auto":
                checked_strength(strength, given[strength])
        schema = given.pop("schema", None)
        given |= {"stop": tuple(given.get("stop", ())), "seed": seed}
        given["schema"] = schema and (
            structured.expand_schema(schema) if isinstance(schema, str) else structured.make_schema(dict(schema))
        )
        self.settings = replace(self.model.settings, **given)
        return int(seed)


def shared(model: Model) -> Shared:
    """Return the context that a model's calls share.

    Raises:
        RuntimeError: the model is closed.
    """
    if not model.pointer:
        raise RuntimeError("the model is closed")
    if model.session is None:
        model.session = Shared(model)
    return cast(Shared, model.session)


def as_dialog(query: str | Dialog, system: str, pref: str) -> Dialog:
    """Return a dialog that ends with a query.

    Raises:
        UsageError: there is none, or a dialog and tiers besides. NotFound: no such profile.
    """
    if isinstance(query, str):
        query = Dialog(system, profiles.expand_profile(pref), [Turn(query)])
    elif system or pref:
        raise UsageError("a Dialog has its System Info and User Info already: leave system and pref out")
    if not query.turns or query.turns[-1].response is not None or not query.turns[-1].query.strip():
        raise UsageError("no query: the last turn of a dialog is the one to be answered")
    return query


def stream(
    model: Model, query: str | Dialog, *, system: str = "", pref: str = "", **options: Unpack[Options]
) -> Generator[str, None, Answer]:
    """Yield the text of an answer as it is written; with `yield from`, return the answer with its figures.

    Closed before its end (`break` and `close()`, or `contextlib.closing`), it stops at once; the model is ready for the
    next call. Threads may share a model: their answers wait for each other.

    >>> with Model.open() as model:
    ...     for piece in stream(model, "What is tea?", pref="one sentence", temperature=0):
    ...         print(piece, end="")
    Tea is a drink made by pouring hot water over dried leaves.

    Raises:
        UsageError, NotFound, TemplateError, TierViolation, ContextOverflow, LoadError: as `chat` fails.
        RuntimeError: the model is closed, or this thread is in the middle of another stream of it.
    """
    session, dialog = shared(model), as_dialog(query, system, pref)
    with session.turn():
        return (yield from session.stream(Job(dialog, session.take(options))))


def generate(
    model: Model, query: str | Dialog, *, system: str = "", pref: str = "", **options: Unpack[Options]
) -> Answer:
    """Answer a query, or the newest one of a dialog, under System Info and a preference (a text, or @profile).

    What the model has read of one dialog, the next one that begins alike does not wait for.

    >>> with Model.open() as model:
    ...     answer = generate(model, "What is the moon?", pref="Answer in capital letters.", temperature=0)
    ...     print(answer.finish_reason, answer.response[:13])
    stop THE MOON IS A

    Raises:
        As `stream`.
    """
    writing = stream(model, query, system=system, pref=pref, **options)
    while True:
        try:
            next(writing)
        except StopIteration as end:
            return cast(Answer, end.value)


def compare(
    model: Model,
    query: str | Dialog,
    preferences: Sequence[str],
    *,
    system: str = "",
    **options: Unpack[Options],
) -> list[Answer]:
    """Answer one query under several preferences, decoded together; an empty one is the answer without any.

    >>> with Model.open() as model:
    ...     answers = compare(model, "What is bread?", ["in capitals", "in lower case"], temperature=0)
    ...     print([answer.response[:7] for answer in answers])
    ['BREAD I', 'bread i']

    Raises:
        As `stream`.
    """
    session, dialog = shared(model), as_dialog(query, system, "")
    dialogs = [replace(dialog, user_info=profiles.expand_profile(wish)) for wish in preferences]
    if not dialogs:
        raise UsageError("compare needs a preference: an empty one is the answer without any")
    with session.turn(), session.interrupt:
        seed = session.take(options)
        with parallel_for(session, dialogs) as together:
            answers = dict(together.run(Job(one, seed, at) for at, one in enumerate(dialogs)))
    failed = next((one for one in answers.values() if isinstance(one, EdgeError)), None)
    if failed:
        raise failed
    in_order = sorted(answers.items(), key=lambda item: cast(int, item[0].tag))
    return [cast(Answer, answer) for _, answer in in_order]


# =====================================================================================================================
# 12  Main
# =====================================================================================================================


def exit_code(error: Exception) -> int | None:
    """Return the exit code of an error of ours or of the command line; None for a surprise."""
    return getattr(error, "exit_code", None)  # Typer's usage errors have one, too


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; return its exit code. Every error ends here, as one line on stderr."""
    try:
        from metaalign_edge_commands import program

        given = sys.argv[1:] if arguments is None else list(arguments)
        status = program(args=given, prog_name="metaalign-edge", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except (OutputClosed, SystemExit):  # the other one is Rich's and Click's, where a help page finds the pipe closed
        sys.stdout = cast(TextIO, open(os.devnull, "w"))  # noqa: SIM115  so that the flush at exit finds no closed pipe
        return 0
    except KeyboardInterrupt:
        return Interrupted.exit_code
    except Interrupted as error:
        return error.exit_code
    except Exception as error:
        code = exit_code(error)
        text = error.format_message() if hasattr(error, "format_message") else str(error)  # Typer's
        if code is None:
            text = f"unexpected {type(error).__name__}: {error}: please report it with the command"
        if text:  # Typer shows the help where there are no arguments, and says no more
            say(f"metaalign-edge: {one_line(text)}")
        return 1 if code is None else code


def main() -> None:
    """Be the console script.

    The process ends without freeing what it holds: the system takes a vocabulary, a mapped file and Python's modules
    back 70 ms sooner.
    """
    library.is_program = True  # not a host's process
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            encoding = "utf-8" if os.name == "nt" else None  # a pipe there would have the code page of old
            stream.reconfigure(encoding=encoding, errors="replace")  # no terminal lacks so much as to lose an answer
    status = run()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
