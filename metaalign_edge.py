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
from collections import deque
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
    shortened,
)
from metaalign_edge_runtime.llama import library, memory
from metaalign_edge_runtime.llama.gguf import DEFAULT_CONTEXT, GGUFArray, ModelFile, changed, is_gguf
from metaalign_edge_runtime.llama.interrupt import Interrupt
from metaalign_edge_runtime.llama.library import LOG, Background, Closing
from metaalign_edge_runtime.llama.memory import CELLS, PREFILL_CHUNK, Device, Footprint, Plan
from metaalign_edge_runtime.llama.token_texts import token_texts
from metaalign_edge_runtime.llama.vocabulary import (
    ATTR_BYTE,
    ATTR_CONTROL,
    ATTR_LSTRIP,
    ATTR_RSTRIP,
    ATTR_UNKNOWN,
    ATTR_USER_DEFINED,
    LlamaVocabulary,
    VocabularyLoader,
)
from metaalign_edge_runtime.stores import files, models, profiles
from metaalign_edge_runtime.stores.prompt_cache import PromptCache
from metaalign_edge_runtime.structured import Schema, mask
from metaalign_edge_runtime.structured.mask import Constraint
from metaalign_edge_templates.sandbox import Refusal, Template, TemplateFailure
from metaalign_edge_templates.tier_text import Tier, TierText, join_text

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

# What a program needs; see Python
__all__ = [
    "Answer", "ContextOverflow", "Dialog", "EdgeError", "LoadError", "Model", "NetworkError", "NotFound",
    "TemplateError", "TierViolation", "Turn", "UsageError", "compare", "generate", "stream",
]  # fmt: skip


# =====================================================================================================================
#  1  Stopwatch
# =====================================================================================================================
# Where the milliseconds of a command line call go; `chat -v` prints it.


class Stopwatch:
    """Adds up the time of a call by laps, in milliseconds. A lap is a `with`; laps do not nest.

    Work in another thread counts only while the main thread waits for it.
    """

    def __init__(self) -> None:
        self.laps = {"start": 1000 * time.process_time()}  # Python's own start, and the imports above
        self._begun = time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, lap: str) -> Iterator[None]:
        """Add the time that the body takes to a lap; in another thread, to none."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.laps[lap] = self.laps.get(lap, 0.0) + 1000 * (time.perf_counter() - begun)

    def mark(self, lap: str) -> None:
        """Give a lap all the time that has passed so far outside of laps."""
        self.laps[lap] = self.laps["start"] + 1000 * (time.perf_counter() - self._begun) - sum(self.laps.values())

    def __str__(self) -> str:
        total = self.laps["start"] + 1000 * (time.perf_counter() - self._begun)
        laps = {**self.laps, "other": total - sum(self.laps.values())}
        return f"{total:.0f} ms: " + ", ".join(f"{lap} {spent:.0f}" for lap, spent in laps.items())


STOPWATCH = Stopwatch()


# =====================================================================================================================
#  2  Dialog
# =====================================================================================================================
# What is said in which tier. Everything below is about how a model comes to read it, and to follow it.


@dataclass(frozen=True)
class Turn:
    """A question, and the answer it was given; None for the newest question, which has none yet."""

    query: str
    response: str | None = None


@dataclass(frozen=True)
class Dialog:
    """The text of each tier. The prompt is a pure function of it; the last turn has no response yet.

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
        """Return the dialog that goes on: its newest query gets this response, and another query follows."""
        *earlier, last = self.turns
        return replace(self, turns=[*earlier, replace(last, response=response), Turn(query)])


# =====================================================================================================================
#  3  Rendering
# =====================================================================================================================
# A dialog becomes a prompt by a chat template: natively, if the template knows User Info, else by a wrap that puts the
# meta-prompt into system and user messages.


class RenderOptions(NamedTuple):
    """How a dialog becomes a prompt."""

    remind: bool = True  # wrapped only: say next to the newest query that System Info wins, when both tiers have text
    think: bool | None = None  # the template variable `enable_thinking`; None leaves it undefined


AS_USUAL = RenderOptions()


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template, how it was chosen, and the templates that wrap a meta-prompt for it."""

    template: Template
    native: bool  # it has a place for User Info; otherwise the meta-prompt is wrapped into the messages
    name: str
    why: str  # how it was chosen, for -v
    meta_prompt: Template  # the wrap: both Info tiers as one message
    reminder: Template  # the wrap: the newest query, with the line that System Info wins
    bos_token: str = ""  # the text of the model's token, which a template may write
    eos_token: str = ""

    @property
    def identity(self) -> str:
        """A digest of all templates that decide the prompt."""
        return files.digest([*(one.source for one in (self.template, self.meta_prompt, self.reminder)), self.native])


@dataclass(frozen=True)
class Rendering:
    """A rendered dialog: the prompt, and the messages that the template was given."""

    template: str
    native: bool
    messages: list[dict[str, Any]]
    prompt: TierText
    source: str  # the template's own text: a user-defined token that it contains is a marker

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
        except (Refusal, TemplateFailure) as error:  # the template may take the same dialog in another layout
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
    """Render messages; the template also gets the variables that Hugging Face's chat templates expect."""
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
        layouts += [[first, *messages[1:]]] if first else []  # some templates refuse or drop a system message
    yield from layouts
    for layout in layouts:  # some templates expect a message's content as a list of parts
        yield [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in layout]


def shipped_templates() -> dict[str, Path]:
    """Return the chat templates that come with the toolkit, by name."""
    own = ("meta_prompt", "reminder")
    return {
        path.stem: path for path in sorted(files.package_folder("templates").glob("*.jinja")) if path.stem not in own
    }


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
        source, label = files.read_text(Path(name).expanduser(), "the template"), name
        why = "the file given by --template"
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
        Template(files.read_text(files.package_folder("templates") / f"{own}.jinja", "the template"), own)
        for own in ("meta_prompt", "reminder")
    )
    return ChatTemplate(template, native, label, why, meta_prompt, reminder, model.token("bos"), model.token("eos"))


class TemplateSource(Protocol):
    """A checkpoint as far as the choice of its template needs it; `convert` opens checkpoints."""

    @property
    def name(self) -> str:
        """The name of its folder, for messages."""

    @property
    def tokens(self) -> frozenset[str]:
        """The texts of its vocabulary."""

    @property
    def chat_template(self) -> str | None:
        """The text of its chat template; None if it has none."""


def conversion_template(name: str, checkpoint: TemplateSource) -> tuple[str | None, str | None]:
    """Choose the chat template that `convert` writes into a GGUF.

    Returns:
        Its name if it is native, else None; and its text, None to keep the checkpoint's own.

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
# Text in a tier is data. The rendered prompt is cut at the special tokens of its scaffold, and only there; the text
# between two of them is tokenised in one piece, as the reference does it, with special tokens off; then the ids are
# checked. A forged <|im_end|> is stopped in `tokenize`.

BYTES_PER_TOKEN = 512  # no known vocabulary has a longer token: a context of n tokens holds 512 n bytes at most
LIKELY_BYTES = 16  # bytes per token that written text does not exceed: only above it is the longest token looked up
MARKUP = re.compile(r"<\|[^<>|\s]+\|>|<</?\w+>>|</?\w+>|\[/?[A-Z_]+\]|<｜[^<>｜\s]+｜>")


class Vocabulary(Protocol):
    """The interface of a vocabulary that tokenising needs; LlamaVocabulary has it."""

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
    imitated_markers: list[str]  # markers of the template that are words, not tokens, and stand in a tier's text

    @property
    def ids(self) -> list[int]:
        """List the ids."""
        return [token.id for token in self.tokens]

    @property
    def ending(self) -> str:
        """The scaffold behind the last text of a tier; it may open the model's reasoning."""
        tail = itertools.takewhile(lambda token: token.tier is None, reversed(self.tokens))
        return b"".join(token.data for token in reversed(list(tail))).decode("utf-8", "replace")

    def queries(self) -> list[int]:
        """List the positions at which queries begin: the prefix before one can be computed before it is asked."""
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
        imitated = bool(attributes & ATTR_BYTE) and not expected.startswith(said, at)
        if imitated:  # `<0x0A>` in a text may become the byte token of that name
            said = b"<0x%02X>" % data[0]
        if not expected.startswith(said, at):
            break
        while owners and owners[0][1] <= at:
            owners.pop(0)
        tier = owners[0][2] if owners and owners[0][0] < at + len(said) else None
        at += len(said)
        again = spelled and extra == 1  # its space follows a special token that has just been spelled out
        spelled = imitated or bool(tier and token in markers)
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
    """List the spans of a text's tiers as offsets into its UTF-8 bytes: start, end, tier."""
    owners, at = [], 0
    for text, tier in fragment.pieces():
        end = at + len(text.encode())
        if tier:
            owners.append((at, end, tier))
        at = end
    return owners


def marker_words(fragment: TierText) -> set[str]:
    """Find markers of the scaffold next to a tier's text that are words in this vocabulary: `[/INST]`, `### Query:`."""
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
# One object says how a model is loaded and how it decodes and samples. It travels from the command line to the engine.

Strength = float | Literal["auto"]
LEAST_CONTEXT = 16  # tokens: no dialog fits less
MOST_CONTEXT = 2**31 - 1  # tokens: llama.cpp counts positions in 32 bits
MOST_THREADS = 512  # llama.cpp's limit
BOUNDS: Mapping[str, tuple[float, float]] = {  # least and largest value of an option that a Python program gives
    "max_tokens": (1, math.inf),
    "temperature": (0, math.inf),
    "top_k": (0, math.inf),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repeat_penalty": (0.1, math.inf),
}


class Adapter(NamedTuple):
    """A LoRA adapter to lay over a model."""

    path: str
    scale: float  # factor of its weights: 1 as trained
    identity: str  # changes when the file does


def split_scale(name: str) -> tuple[str, float]:
    """Split `PATH:SCALE`; the scale is 1 where none is given. The colon of a Windows drive does not count.

    Raises:
        UsageError: the scale is not a number.
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
    """Open adapters, each given as `PATH[:SCALE]`: GGUF files that `convert --lora-only` makes.

    Raises:
        NotFound: a file is missing. LoadError: a file is not an adapter. UsageError: a scale is not a number, or an
            adapter is given twice.
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
    """Write adapters as the command line takes them: `PATH:SCALE, PATH:SCALE`."""
    return ", ".join(f"{adapter.path}:{adapter.scale:g}" for adapter in adapters)


@dataclass(frozen=True)
class Settings:
    """How a model is loaded, and how it decodes and samples."""

    context: int | Literal["auto"] | None = None  # tokens per sequence; None: as the model and the dialog need
    gpu_layers: str = "auto"  # auto, all, or a number
    threads: int | None = None  # None: one per physical core
    max_tokens: int | None = None  # of the answer; None: as many as the context holds
    temperature: float | None = None  # None, here and below: the model's own value, else the built-in one
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
    schema: Schema | None = None  # that the answer must fit

    @property
    def contexts(self) -> int:
        """Contexts that a dialog with both tiers is evaluated in at these strengths, 1 to 3; see Guidance."""
        system, pref = self.system_strength, math.nan if self.pref_strength == "auto" else self.pref_strength
        return sum(coefficient != 0 for coefficient in (pref, system - pref, 1 - system))

    def planned(self, plan: Plan) -> Settings:
        """Return the settings with -c auto as the number of tokens that was planned."""
        return replace(self, context=plan.context) if self.context == "auto" else self

    def deciding(self) -> list[Any]:
        """List the values that decide the text of an answer, in JSON's types: another value, another text."""
        aside = ("gpu_layers", "threads", "verbose")
        return [value for name, value in asdict(self).items() if name not in aside]


def checked_gpu_layers(value: str, flag: str = "-ngl") -> str:
    """Return the value of -ngl: auto, all or a number of layers.

    Raises:
        UsageError: it is anything else.
    """
    if value in ("auto", "all") or value.isdecimal():
        return value
    raise UsageError(f"{flag} takes auto, all or a number of layers, not {value!r}")


def checked_context(value: str | None, flag: str = "-c") -> int | Literal["auto"] | None:
    """Return the value of -c: a number of tokens, or auto; None if it is not given.

    Raises:
        UsageError: it is anything else, or too small for any dialog.
    """
    if value is None or value == "auto":
        return "auto" if value else None
    if not value.isdecimal() or len(value) > 10 or not LEAST_CONTEXT <= int(value) <= MOST_CONTEXT:
        bounds = f"from {LEAST_CONTEXT} to {MOST_CONTEXT}"
        raise UsageError(f"{flag} takes auto or a number of tokens {bounds}, not {shortened(repr(value), 40)}")
    return int(value)


# =====================================================================================================================
#  6  Model
# =====================================================================================================================
# A GGUF in memory. It is opened by a recipe: read the file, plan where its layers go, load it in threads, wait.

TINY_MODEL = 1 << 25  # bytes of weights: below it, one thread is faster than several that wait for each other


def without_vocabulary(file: ModelFile) -> Any:
    """Return overrides of a file's metadata by which llama.cpp loads weights alone: no words, but as many tokens."""
    llama, size = library.llama_cpp(), file.metadata.get("tokenizer.ggml.tokens")
    integer, text = llama.LLAMA_KV_OVERRIDE_TYPE_INT, llama.LLAMA_KV_OVERRIDE_TYPE_STR
    overrides = (llama.llama_model_kv_override * 3)()  # an empty one ends the list
    overrides[0].tag, overrides[0].key, overrides[0].value.val_str = text, b"tokenizer.ggml.model", b"no_vocab"
    if isinstance(size, GGUFArray):
        key = f"{file.architecture}.vocab_size".encode()[:127]  # llama.cpp's limit; no architecture has a longer name
        overrides[1].tag, overrides[1].key, overrides[1].value.val_i64 = integer, key, size.length
    return overrides


class Model(Closing):
    """A GGUF loaded by llama.cpp. Close it, or use it in a `with`, which waits until it is loaded.

    Two threads load it at the same time, weights without a vocabulary and the vocabulary without weights; `wait` waits
    for both. A program opens a model with `Model.open`, and hands it to `generate`, `stream` and `compare`.

    Attributes:
        plan: where its layers go, and what that takes.
        settings: with -c auto as a number.
        pointer: llama.cpp's pointer to the weights; None before `wait`, and when the model is closed.
        load_ms: milliseconds that loading took.

    Raises:
        LoadError: it does not fit the memory.
    """

    chat_template: ChatTemplate | None = None  # as chosen by `Model.open`
    session: ModelSession | None = None  # the context that a program's calls share; it ends with the model
    vocabulary: LlamaVocabulary
    load_ms = 0.0

    def __init__(
        self, file: ModelFile, settings: Settings, interrupt: Interrupt | None = None, plan: Plan | None = None
    ) -> None:
        self.file, self._interrupt = file, interrupt
        self.plan = plan or plan_for(file, settings)
        self.plan.check(file.path)
        self.settings = settings.planned(self.plan)
        self.pointer: Any = None
        self.adapters: dict[str, tuple[Any, int]] = {}  # by identity: llama.cpp's pointer, and when the file changed
        self._held = contextlib.ExitStack()
        self._unwanted = False  # set by `close`: loading stops
        self._began = time.monotonic()
        self._words = self._held.enter_context(VocabularyLoader(file.path, settings.verbose))
        self._weights: Background | None = Background(self._load)

    @property
    def gpu_layers(self) -> int:
        """The layers that lie on devices, the output counted as one."""
        return self.plan.offloaded

    def __enter__(self) -> Self:
        return self.wait()

    def wait(self) -> Self:
        """Wait until weights, vocabulary and adapters are loaded. Again, it returns at once.

        Raises:
            LoadError: llama.cpp refuses the file, or an adapter. Interrupted: Ctrl-C while it loaded.
        """
        if self.pointer or self._weights is None:
            return self
        try:
            pointer = self._weights.result()
            if self._interrupt:
                self._interrupt.check()
            self.vocabulary = self._held.enter_context(self._words.take(self.file))  # first: its error names the cause
            if not pointer:
                raise LoadError(f"cannot load {self.file.path}: {LOG.reason()}")
            self.pointer, self.load_ms = pointer, (time.monotonic() - self._began) * 1000
            for adapter in self.settings.adapters:
                self.adapter(adapter)
        except EdgeError:
            self.close()
            raise
        return self

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
        """Load a model, by its path or name, else the embedded one.

        >>> with Model.open() as model:
        ...     print(model.file.architecture)
        llama

        Args:
            template, context, gpu_layers, threads, lora: as the options --template, -c, -ngl, -t and --lora of `chat`.
            verbose: llama.cpp's log goes to stderr.

        Raises:
            NotFound, LoadError: there is no such model or adapter, or llama.cpp refuses it. UsageError, TemplateError:
                a number is none, no template has that name, or there is none.
        """
        size = checked_context(None if context is None else str(context), "context")
        layers = checked_gpu_layers(str(gpu_layers), "gpu_layers")
        if threads is not None and not (isinstance(threads, int) and 0 < threads <= MOST_THREADS):
            raise UsageError(f"threads takes a number from 1 to {MOST_THREADS}, not {threads!r}")
        file = ModelFile(models.local_model(None if name is None else os.fspath(name)))
        chosen, interrupt = choose_template(template, file), Interrupt()
        settings = Settings(size, layers, threads, verbose=verbose, adapters=find_adapters(lora))
        try:
            with interrupt:
                model = cls(file, settings, interrupt).wait()
        except Interrupted:
            raise KeyboardInterrupt from None
        model.chat_template = chosen
        return model

    def adapter(self, adapter: Adapter) -> Any:
        """Load an adapter's weights, once; llama.cpp frees them with the model.

        Raises:
            LoadError: it was made for another model.
        """
        if adapter.identity not in self.adapters:
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
            self.adapters[adapter.identity] = pointer, changed(Path(adapter.path))
        return self.adapters[adapter.identity][0]

    def close(self) -> None:
        """Free the model; again is harmless."""
        if self.session:
            self.session.close()
        if self._weights:
            self._unwanted = True
            if pointer := self._weights.result():
                library.llama_cpp().llama_model_free(pointer)
            self._weights = None
        self.pointer = None
        self._held.close()


def threads_for(model: Model, settings: Settings) -> int:
    """Return the number of CPU threads: -t, else one per physical core, or a single one for a tiny model."""
    if settings.threads:
        return settings.threads
    return 1 if model.plan.footprint.bytes < TINY_MODEL else library.physical_cores()


def least_context(file: ModelFile, settings: Settings) -> int:
    """Return the tokens that a context has, unless a dialog needs more."""
    return settings.context if isinstance(settings.context, int) else min(file.context, DEFAULT_CONTEXT)


def plan_for(
    file: ModelFile,
    settings: Settings,
    devices: Sequence[Device] | None = None,
    answers: int = 1,
    dialogs: int = 1,
) -> Plan:
    """Plan where a model goes, by what is free now in main memory and on the devices; -c auto becomes a number.

    Args:
        devices: those of llama.cpp in this process, unless they are given.
        answers: answers at a time that there must be room for.
        dialogs: dialogs of each answer: the columns of `compare`.

    Raises:
        LoadError: the list of tensors is damaged, or no context fits. NotFound: a part of the model is missing.
        UsageError: -c auto, and what a context of this model takes is not known.
    """
    if devices is None:
        library.start(settings.verbose)
        devices = library.gpus()
    sequences_per_answer = dialogs * settings.contexts
    footprint, free, context = Footprint.of(file), memory.free_memory(), least_context(file, settings)
    plan = memory.make_plan(footprint, free, devices, context, answers * sequences_per_answer, settings.gpu_layers)
    plan = replace(plan, sequences_per_answer=sequences_per_answer)
    if settings.context != "auto":
        return plan
    if not plan.footprint.foretold:
        raise UsageError(f"what a context of {file.path} takes is not known ({file.architecture}): give -c a number")
    largest = plan.largest(file.context)
    if not largest:
        plan.check(file.path)
    return replace(plan, context=largest or min(CELLS, file.context))


def check_memory(model: Model, context: int, sequences: int) -> None:
    """Refuse a context that does not fit into the memory that is free now, after the weights were loaded.

    Raises:
        LoadError: with the numbers, and what would fit.
    """
    free = (memory.free_memory(), *(device.free for device in library.gpus()))
    replace(model.plan, context=context, sequences=sequences, free=free, loaded=True).check(model.file.path)


# =====================================================================================================================
#  7  Engine and sampler
# =====================================================================================================================
# A context of llama.cpp holds several sequences in one unified KV cache; a step decodes any number of them in one
# llama_decode.


@dataclass
class SequenceState:
    """A sequence of a context, and its tokens that are in the KV cache, in order."""

    id: int
    tokens: list[int] = field(default_factory=list)


class BatchEntry(NamedTuple):
    """Tokens to append to a sequence in one decode."""

    sequence: SequenceState
    tokens: Sequence[int]
    logits: bool = True  # compute the logits after the last token


class TokenBatch:
    """llama.cpp's batch of tokens, over arrays that are allocated once. Each token belongs to one sequence."""

    def __init__(self, size: int) -> None:
        self._size, integer = size, ctypes.c_int32
        arrays: Any = [(integer * size)() for _ in range(3)]
        self._tokens, self._positions, self._owners = arrays
        self._wanted: Any = (ctypes.c_int8 * size)()  # 1 where logits are computed
        first = ctypes.addressof(self._owners)
        lists = (ctypes.c_void_p * size)(*range(first, first + 4 * size, 4))
        owners, ones = ctypes.cast(lists, ctypes.POINTER(ctypes.POINTER(integer))), (integer * size)(*[1] * size)
        batch = library.llama_cpp().llama_batch
        self.struct: Any = batch(0, self._tokens, None, self._positions, ones, owners, self._wanted)

    def fill(self, entries: Sequence[BatchEntry]) -> list[int]:
        """Lay out the tokens of several sequences; return the row of logits of each (-1: none is computed).

        Raises:
            ValueError: more tokens than the batch has room for.
        """
        tokens: list[int] = []
        positions: list[int] = []
        owners: list[int] = []
        rows = []
        for sequence, fed, logits in entries:
            start = len(sequence.tokens)
            tokens += fed
            positions += range(start, start + len(fed))
            owners += [sequence.id] * len(fed)
            rows.append(len(tokens) - 1 if logits else -1)
        size = len(tokens)
        if size > self._size:
            raise ValueError(f"a step takes at most {self._size} tokens")
        wanted = bytearray(size)
        for row in rows:
            if row >= 0:
                wanted[row] = 1
        self._tokens[:size], self._positions[:size], self._owners[:size] = tokens, positions, owners
        self._wanted[:size] = wanted
        self.struct.n_tokens = size
        return rows


class Engine(Closing):
    """A context of llama.cpp: sequences in one KV cache, and the decoding of tokens. Close it, or use it in a `with`.

    Args:
        context: tokens for each sequence.

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
        params.n_outputs_max = sequences  # rows of logits to reserve; llama.cpp's default is one for each batch token
        params.n_threads = params.n_threads_batch = threads_for(model, settings)
        params.no_perf = True
        self._abort = llama.ggml_abort_callback(lambda _data: interrupt.raised)
        check_memory(model, context, sequences)
        holds = params.n_ctx == context * sequences  # n_ctx has 32 bits
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
        self.set_adapters(settings.adapters)
        self.batch_size = params.n_batch  # the most tokens of one decode
        self._batch = TokenBatch(self.batch_size)

    def close(self) -> None:
        """Free the context; again is harmless."""
        if self.pointer:
            self._llama.llama_free(self.pointer)
            self.pointer = None

    def set_adapters(self, adapters: Sequence[Adapter]) -> None:
        """Lay other adapters over the model; the KV cache is emptied, as it was computed under the old ones.

        Raises:
            LoadError: an adapter does not fit the model; the old ones stay.
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
            self.truncate(sequence, 0)

    def truncate(self, sequence: SequenceState, length: int) -> int:
        """Drop a sequence's tokens behind `length`, or all where its state cannot be cut; return what length stays."""
        forget, cache = self._llama.llama_memory_seq_rm, self._memory
        lost = length < len(sequence.tokens) and not self._is_whole(sequence)
        if lost or not forget(cache, sequence.id, length, -1):
            forget(cache, sequence.id, -1, -1)
            length = 0
        del sequence.tokens[length:]
        return length

    def copy_prefix(self, source: SequenceState, sequence: SequenceState, length: int) -> None:
        """Copy the first tokens of one sequence to another; the cache holds them once. Not done for a partial state."""
        if self._is_whole(source):
            self.truncate(sequence, 0)
            self._llama.llama_memory_seq_cp(self._memory, source.id, sequence.id, 0, length)
            sequence.tokens += source.tokens[:length]

    def key(self, tokens: Sequence[int]) -> str:
        """Return a digest of all that decides the KV state after these tokens: its name on disk."""
        import hashlib

        model = self.model
        identity = [1, model.file.opened, library.build(), model.gpu_layers]
        identity += [[one.identity, one.scale, model.adapters[one.identity][1]] for one in self.adapters]
        numbers = struct.pack(f"<{len(tokens)}i", *tokens)
        return hashlib.blake2b(json.dumps(identity).encode() + numbers, digest_size=20).hexdigest()

    def state(self, sequence: SequenceState) -> bytearray:
        """Return the KV state of a sequence as bytes; none if llama.cpp does not give it."""
        size = self._llama.llama_state_seq_get_size(self.pointer, sequence.id)
        data = bytearray(size)
        view = (ctypes.c_uint8 * size).from_buffer(data)
        written = self._llama.llama_state_seq_get_data(self.pointer, view, size, sequence.id)
        return data if written == size else bytearray()

    def restore(self, sequence: SequenceState, tokens: Sequence[int], data: bytearray) -> bool:
        """Set a sequence to the KV state after these tokens; False, and an empty sequence, if llama.cpp refuses it."""
        self.truncate(sequence, 0)
        view = (ctypes.c_uint8 * len(data)).from_buffer(data)
        if not self._llama.llama_state_seq_set_data(self.pointer, view, len(data), sequence.id):
            self.truncate(sequence, 0)
            return False
        sequence.tokens += tokens
        return True

    def _is_whole(self, sequence: SequenceState) -> bool:
        """Tell whether the cache holds every position: a recurrent state holds the last one, a sliding window some."""
        return bool(self._llama.llama_memory_seq_pos_min(self._memory, sequence.id) <= 0)

    def decode(self, entries: Sequence[BatchEntry]) -> list[int]:
        """Decode tokens of several sequences in one llama_decode; return the row of logits of each (-1: none wanted).

        Raises:
            Interrupted: Ctrl-C during prefill. ContextOverflow: the KV cache is full. ValueError: more tokens than
                `batch_size`.
        """
        rows = self._batch.fill(entries)
        status = self._llama_decode(prefill=sum(len(feed.tokens) for feed in entries) > len(entries))
        if status == 0:
            for sequence, fed, _ in entries:
                sequence.tokens += fed
            return rows
        for sequence, _, _ in entries:  # llama.cpp may have computed some of the tokens: drop them from the cache
            self.truncate(sequence, len(sequence.tokens))
        self.interrupt.check()
        if status == 1:
            raise ContextOverflow(f"the context of {self.context:,} tokens is full: raise -c")
        raise LoadError(f"llama.cpp failed to decode (status {status}): {LOG.reason()}")

    def _llama_decode(self, prefill: bool) -> int:
        """Decode the batch; return llama.cpp's status. A prefill on the CPU can be interrupted."""
        if not prefill or self.model.gpu_layers:  # GPU backends have no abort callback
            return int(self._llama.llama_decode(self.pointer, self._batch.struct))
        self._llama.llama_set_abort_callback(self.pointer, self._abort, None)
        try:
            return int(self._llama.llama_decode(self.pointer, self._batch.struct))
        finally:  # it costs some 0.3 ms per decode, too much where one writes a single token
            self._llama.llama_set_abort_callback(self.pointer, self._llama.ggml_abort_callback(), None)

    def logits(self, row: int) -> Any:
        """Return a row of logits of the latest decode: float32, one per token id, in llama.cpp's own memory."""
        import numpy as np

        pointer = self._llama.llama_get_logits_ith(self.pointer, row)
        return np.ctypeslib.as_array(pointer, (self.model.vocabulary.size,))


def common_prefix(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Count the tokens at the beginning that two lists have in common."""
    return next(
        (at for at, (one, other) in enumerate(zip(ours, theirs, strict=False)) if one != other),
        min(len(ours), len(theirs)),
    )


NO_TOKEN = -1  # drawn where a schema allows no token


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
            top_k = 40  # a model that recommends greedy decoding must not undo --temp
        penalty = value(settings.repeat_penalty, "penalty_repeat", 1.0)
        size = file.metadata["tokenizer.ggml.tokens"].length
        chain = [llama.llama_sampler_init_penalties(size, 64, penalty, 0.0, 0.0)] if penalty != 1.0 else []
        self.greedy = not chain and (temperature <= 0 or top_k == 1)  # the likeliest token is always drawn
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

        llama.cpp's greedy sampler first copies the vocabulary, 150,000 entries. With several rows, numpy's argmax is
        worth the import of numpy. Of equal logits both take the first.
        """
        if several and self.greedy:
            return int(engine.logits(row).argmax())
        return int(self._llama.llama_sampler_sample(self.pointer, engine.pointer, row))


# =====================================================================================================================
#  8  Guidance
# =====================================================================================================================
# A strength for each tier. With l0 the logits given the query alone, l1 given System Info too, and l2 given both tiers,
#
#     l = (1 - s) l0 + (s - u) l1 + u l2        that is, l0 + s (l1 - l0) + u (l2 - l1)
#
# Classifier-free guidance (arXiv 2306.17806) and context-aware decoding (arXiv 2305.14739) are cases of it. As the
# coefficients sum to 1, the softmax constant of a context adds the same number to every token, so no softmax is needed.

MOST_STRENGTH = 100  # beyond it, rounding errors of single precision decide
PLAUSIBLE = math.log(0.1)  # in the most conditioned context a token needs a tenth of the best one's probability
IMPLAUSIBLE = 1e4  # subtracted from the logits of all other tokens: a schema may allow nothing but those


class Guidance:
    """The contexts in which a dialog is evaluated, and how their logits are combined into those that are sampled.

    Attributes:
        dialogs: the contexts whose coefficients are not zero, the most conditioned one first. An empty tier makes two
            contexts equal, which count as one. With strengths of 1 a single context is left: the model as it is.
    """

    def __init__(self, dialog: Dialog, system: float, pref: Strength) -> None:
        self._system = system if dialog.system_info.strip() else 1.0
        self._pref: Strength = pref if dialog.user_info.strip() else self._system
        contexts = (dialog, replace(dialog, user_info=""), replace(dialog, system_info="", user_info=""))
        unknown = math.nan  # stands for an adaptive strength: its coefficients are not zero
        coefficients = self._coefficients(unknown if self._pref == "auto" else self._pref)
        used = [(dialog, value) for dialog, value in zip(contexts, coefficients, strict=True) if value != 0]
        self.dialogs = [dialog for dialog, _ in used]
        self._fixed = tuple(value for _, value in used)

    def _coefficients(self, pref: float) -> tuple[float, float, float]:
        """Return the coefficients of l2, l1 and l0."""
        return pref, self._system - pref, 1 - self._system

    def combine(self, rows: Sequence[Any]) -> None:
        """Combine logits into the first row. This is where the strength of a preference enters them.

        Args:
            rows: one float32 array of the vocabulary's size for each of `dialogs`, in their order.
        """
        import numpy as np

        coefficients: tuple[float, ...] = self._fixed
        if self._pref == "auto":  # AdaCAD (arXiv 2409.07394): stronger where the preference changes more
            coefficients = self._coefficients(1 + divergence(rows[0], rows[1]))[: len(rows)]
        conditioned, *others = rows
        plausible = np.flatnonzero(conditioned >= conditioned.max() + PLAUSIBLE)  # some ten of 150,000
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
    """Return a strength as a number.

    Raises:
        UsageError: it is not a number, negative or too large.
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
# From tokens to text: reasoning is told from what is said, stop texts are cut off, a schema is kept, figures are taken.

FinishReason = Literal["stop", "length", "interrupted"]


@dataclass
class Answer:
    """An answer and its figures: the fields of `--json`."""

    model: str
    template: str
    system_info: str
    user_info: str
    query: str
    response: str = ""
    reasoning: str | None = None
    finish_reason: FinishReason = "stop"
    input_tokens: int = 0
    cached_tokens: int = 0  # tokens of the input that were in the KV cache already
    output_tokens: int = 0
    load_ms: float = 0.0  # what was loaded for this answer: model, context
    first_token_ms: float = 0.0  # from the prompt to the first token
    duration_ms: float = 0.0  # from the prompt to the end
    tokens_per_second: float = 0.0  # of the output, after the first token
    seed: int = 0
    truncated: int = 0  # turns dropped to fit the context


def overlap(text: AnyStr, mark: AnyStr) -> int:
    """Return the length of the longest beginning of a mark that the text ends with."""
    return next((size for size in range(len(mark) - 1, 0, -1) if text.endswith(mark[:size])), 0)


class StopFilter:
    """Turns token bytes into text, and ends at a stop text. Half a character, or half a stop text, is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.stopped = False

    def feed(self, data: bytes) -> str:
        """Take a token's bytes; return the text that no later byte can change."""
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


# The marks of reasoning by model. gpt-oss is not among them: its channels are messages of their own.
REASONING_MARKS = (
    ("<think>", "</think>"),  # Qwen 3, QwQ, DeepSeek R1, SmolLM3, GLM 4.5, Nemotron, MiMo, Phi 4 reasoning
    ("[THINK]", "[/THINK]"),  # Magistral, Ministral 3
    ("<thought>", "</thought>"),  # EXAONE Deep
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
)


def reasoning_marks(source: str, vocabulary: Vocabulary) -> tuple[str, str] | None:
    """Return the marks of a model's reasoning: those in its template, else those that are tokens, else None."""
    if named := next((marks for marks in REASONING_MARKS if marks[1] in source), None):
        return named
    return next((marks for marks in REASONING_MARKS if len(vocabulary.encode(marks[1], special=True)) == 1), None)


class ReasoningSplitter:
    """Splits the bytes of an answer into reasoning and response.

    Reasoning is what stands between two marks at the beginning; the prompt may have written the first one (`opened`).
    Marks anywhere else are text. White space around the reasoning is dropped.
    """

    def __init__(self, marks: tuple[str, str] | None, opened: bool = False) -> None:
        self._begin, self._end = (mark.encode() for mark in marks or ("", ""))
        self.state: Literal["before", "inside", "behind", "answer"] = "before" if marks else "answer"
        if opened:
            self.state = "inside"
        self._held, self._begun = b"", False

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """Take a token's bytes; return the bytes of reasoning and of response that no later byte can change."""
        self._held += data
        thought, said = b"", b""
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
        return thought, said

    def _reason(self) -> bytes:
        """Return the reasoning among the bytes held back, up to what may be the beginning of the end mark."""
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
        """Return the bytes held back, at the end of the answer."""
        held, self._held = self._held.rstrip(), b""
        return (held, b"") if self.state == "inside" else (b"", held)


SHORTLIST = 1024  # the likeliest tokens, among which one that fits a schema is looked for first


class SchemaSampler(Sampler):
    """A sampler whose tokens can be held to a schema.

    The chain draws a token, and the constraint checks that one. If it does not fit, the chain draws again from those of
    the SHORTLIST that fit; all tokens are checked only if none of these does. The distribution is that of a masked
    vocabulary, except that top-k, top-p and min-p count tokens that do not fit.
    """

    def __init__(self, file: ModelFile, settings: Settings) -> None:
        super().__init__(file, settings)
        self._size = size = file.metadata["tokenizer.ggml.tokens"].length
        self._shortlist = self._llama.llama_sampler_init_top_k(SHORTLIST)
        self._entries = (self._llama.llama_token_data * size)()  # id, logit, probability
        cells = memoryview(self._entries).cast("B")
        self._numbers, self._logits = cells.cast("i")[::3], cells.cast("f")[1::3]
        self._numbers[:] = array.array("i", range(size))
        self._all = bytes(cells)

    def close(self) -> None:
        """Free the chain; again is harmless."""
        super().close()
        if self._shortlist:
            self._llama.llama_sampler_free(self._shortlist)
            self._shortlist = None

    def draw_fitting(self, engine: Engine, row: int, constraint: Constraint) -> int:
        """Draw a token that fits from a row of logits, and accept it; NO_TOKEN if none fits."""
        pointer = self._llama.llama_get_logits_ith(engine.pointer, row)
        logits = memoryview(ctypes.string_at(pointer, 4 * self._size)).cast("f")
        token = self._choose(self._lay_out(logits))
        if not constraint.fits(token):
            likely = self._lay_out(logits)
            self._llama.llama_sampler_apply(self._shortlist, likely)
            fitting = constraint.fitting(self._numbers[: likely.size].tolist()) or constraint.fitting()
            if not fitting:
                return NO_TOKEN
            self._numbers[: len(fitting)] = array.array("i", fitting)
            self._logits[: len(fitting)] = array.array("f", map(logits.__getitem__, fitting))
            token = self._choose(self._candidates(len(fitting)))
        self._llama.llama_sampler_accept(self.pointer, token)
        return token

    def _lay_out(self, logits: memoryview[float]) -> Any:
        """Return all tokens with their logits as llama.cpp's samplers take them."""
        ctypes.memmove(self._entries, self._all, len(self._all))  # samplers have sorted the entries
        self._logits[:] = logits
        return self._candidates(self._size)

    def _candidates(self, size: int) -> Any:
        return self._llama.llama_token_data_array(data=self._entries, size=size, selected=-1, sorted=False)

    def _choose(self, candidates: Any) -> int:
        self._llama.llama_sampler_apply(self.pointer, candidates)
        return int(candidates.data[candidates.selected].id)


class AnswerBuilder:
    """Builds an answer: tokens go in, text comes out, figures are taken.

    It owns the state that reasoning and schema share: where the reasoning ends, the schema begins to hold.
    """

    def __init__(
        self,
        answer: Answer,
        settings: Settings,
        vocabulary: Vocabulary,
        context: int,
        splitter: ReasoningSplitter,
        think: Callable[[str], None],
        constraint: Constraint | None = None,
    ) -> None:
        """Begin. `think` is called with the reasoning as it comes, and with line breaks where the reasoning ends."""
        self.answer, self.ended = answer, False
        self._splitter, self._thought, self._think = splitter, StopFilter(()), think
        self._constraint = constraint
        self._vocabulary, self._text = vocabulary, StopFilter(settings.stop)
        self._most = min(settings.max_tokens or context, context - answer.input_tokens)
        self._started = self._first = time.monotonic()

    @property
    def constraint(self) -> Constraint | None:
        """The constraint that the next token must fit; None without a schema, and inside reasoning."""
        return None if self._splitter.state == "inside" else self._constraint

    def add(self, token: int) -> str:
        """Take a token; return the text that no later token can change. `ended` tells whether it was the last one."""
        answer = self.answer
        if not answer.output_tokens:
            self._first = time.monotonic()
        if token == NO_TOKEN or self._vocabulary.is_end(token):
            self.ended = True
            return ""
        answer.output_tokens += 1
        held = self.constraint
        thought, said = self._splitter.feed(self._vocabulary.piece(token))
        if held and self.constraint:
            held.accept(token)
        elif self.constraint:  # this token ends the reasoning, and may begin the response
            self.constraint.accept_text(said)
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
        """Complete the figures; return the text that was held back."""
        answer, ended = self.answer, time.monotonic()
        thought, said = self._splitter.rest()
        self._reason(self._thought.feed(thought))
        piece = self._text.feed(said) + self._text.rest()
        self._say(piece)
        if answer.reasoning and not answer.response:  # the answer ended inside its reasoning
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
# Requests become prompts that fit the context, prompts become answers, as many at a time as there are slots.

CACHE_WORTH_SAVING = 1 << 31  # weight bytes x prompt tokens; below it, reading the prefix anew takes under 50 ms


@dataclass(frozen=True)
class Request:
    """A dialog to be answered."""

    dialog: Dialog
    seed: int = 0
    tag: Any = None  # the caller's own
    max_tokens: int | None = None  # None: as the settings say
    show: Callable[[str], None] = lambda _: None  # is given the text as it comes
    think: Callable[[str], None] = lambda _: None  # is given the reasoning as it comes
    schema: Schema | None = None  # None: as the settings say


@dataclass(frozen=True, eq=False)
class Prompt:
    """A request as token ids: its dialog rendered and tokenised once for each context of its guidance."""

    request: Request
    settings: Settings  # the scheduler's, with what the request itself says
    answer: Answer
    guidance: Guidance
    contexts: list[list[int]]  # token ids of each context, the most conditioned first
    checkpoints: list[list[int]]  # of each context, the lengths of prefixes that are worth a file: up to a query
    size: int  # tokens of a sequence that holds prompt and answer
    ending: str  # the scaffold behind the last text of a tier: it may open the reasoning
    imitated_markers: list[str]  # marker words of the template in a tier's text: ids cannot protect those


def make_prompt(
    request: Request, model: Model, template: ChatTemplate, settings: Settings, options: RenderOptions
) -> Prompt:
    """Render and tokenise a dialog, without its oldest turns where it would not fit with its answer.

    Raises:
        ContextOverflow: the Info tiers and the newest query alone do not fit.
        TemplateError, TierViolation: as `render` and `tokenize`.
    """
    dialog, most = request.dialog, request.max_tokens or settings.max_tokens
    settings = replace(settings, seed=request.seed, max_tokens=most, schema=request.schema or settings.schema)
    limit = settings.context if isinstance(settings.context, int) else model.file.context
    while True:
        guidance = Guidance(dialog, settings.system_strength, settings.pref_strength)
        with STOPWATCH("tokens"):
            read = [tokenize(render(one, template, options), model.vocabulary, limit) for one in guidance.dialogs]
        longest = max(len(tokens.tokens) for tokens in read)
        needed = longest + (most or longest // 3 + 1)
        fixed = isinstance(settings.context, int)
        size = limit if fixed else min(limit, max(DEFAULT_CONTEXT, -(-needed // CELLS) * CELLS))
        reserved = most or size // 4
        if longest + reserved <= size:
            break
        if len(dialog.turns) <= 1:
            raise ContextOverflow(
                f"the prompt has {longest:,} tokens and the answer reserves {reserved:,}; "
                f"the context holds {size:,}: shorten the text, lower -n or raise -c"
            )
        dialog = replace(dialog, turns=dialog.turns[1:])
    answer = Answer(
        model=model.file.path.name,
        template=template.name,
        system_info=dialog.system_info,
        user_info=dialog.user_info,
        query=dialog.turns[-1].query,
        input_tokens=len(read[0].tokens),
        seed=request.seed,
        truncated=len(request.dialog.turns) - len(dialog.turns),
    )
    checkpoints = [
        [at for at in one.queries() if at * model.plan.footprint.bytes >= CACHE_WORTH_SAVING] for one in read
    ]
    contexts = [tokens.ids for tokens in read]
    return Prompt(
        request, settings, answer, guidance, contexts, checkpoints, size, read[0].ending, read[0].imitated_markers
    )


@dataclass(eq=False)
class Slot:
    """A KV-cache sequence that one context of a request is decoded into.

    |<-- sequence.tokens: decoded -->|<-- pending -->|     then one sampled token at a time
    """

    sequence: SequenceState
    prompt: list[int]
    pending: list[int]
    waits_for: tuple[SequenceState, int] | None = None  # (other sequence, length): copy its prefix once decoded
    checkpoints: Sequence[int] = ()  # prefix lengths where a decode must end: equal splits give equal bits

    @property
    def known(self) -> list[int]:
        """The tokens that the sequence holds once its prompt is decoded, without the last one, which is for logits."""
        return self.sequence.tokens + self.pending[:-1]

    @property
    def next_size(self) -> int:
        """The number of tokens that the next decode may take: up to the next checkpoint, else all pending ones."""
        done = len(self.sequence.tokens)
        return next((end - done for end in self.checkpoints if end > done), len(self.pending))

    def copy_prefix(self, engine: Engine) -> None:
        """Copy the prefix of the other sequence, if it is decoded there."""
        if self.waits_for and len(self.waits_for[0].tokens) >= self.waits_for[1]:
            engine.copy_prefix(self.waits_for[0], self.sequence, self.waits_for[1])
            self.pending, self.waits_for = self.prompt[len(self.sequence.tokens) :], None


@dataclass(eq=False)
class ActiveRequest:
    """A request that is being answered, in a slot for each of its contexts."""

    request: Request
    guidance: Guidance
    slots: list[Slot]
    builder: AnswerBuilder
    sampler: Sampler

    def copy_prefixes(self, engine: Engine) -> None:
        """Copy the prefixes that slots wait for, where they are decoded by now."""
        for slot in self.slots:
            if slot.waits_for:
                slot.copy_prefix(engine)
                if slot is self.slots[0]:
                    self.builder.answer.cached_tokens = len(slot.sequence.tokens)

    def draw(self, engine: Engine, row: int, several: bool) -> int:
        """Draw the next token from a row of logits; every slot is to read it."""
        if constraint := self.builder.constraint:
            token = cast(SchemaSampler, self.sampler).draw_fitting(engine, row, constraint)
        else:
            token = self.sampler.draw(engine, row, several)
        for slot in self.slots:
            slot.pending = [token]
        return token

    @property
    def reading(self) -> bool:
        """Whether some of the prompt is still to be decoded."""
        return any(slot.waits_for or len(slot.pending) > 1 for slot in self.slots)

    @property
    def may_sample(self) -> bool:
        """Whether the next decode can end the prompts of all contexts, so that their logits can be combined."""
        return all(not slot.waits_for and slot.next_size == len(slot.pending) for slot in self.slots)


class Checkpoints:
    """Prefixes of prompts in the cache on disk: loaded into slots, taken from slots, written between answers."""

    def __init__(self, cache: PromptCache | None) -> None:
        self.cache = cache
        self._unsaved: list[tuple[str, bytearray]] = []

    def load(self, engine: Engine, slot: Slot, lengths: Sequence[int]) -> None:
        """Load the longest prefix on disk, if it is longer than the one that the slot has."""
        slot.checkpoints = lengths
        known = slot.waits_for[1] if slot.waits_for else len(slot.sequence.tokens)
        for length in reversed(lengths):
            if self.cache is None or length <= known:
                return
            with STOPWATCH("states"):
                data = self.cache.load(engine.key(slot.prompt[:length]))
            if data and engine.restore(slot.sequence, slot.prompt[:length], data):
                slot.pending, slot.waits_for = slot.prompt[length:], None
                return

    def take(self, engine: Engine, slot: Slot) -> None:
        """Take the KV state of a slot that has reached its last checkpoint."""
        if not slot.checkpoints:
            return
        known, last = len(slot.sequence.tokens), slot.checkpoints[-1]
        if known >= last:
            slot.checkpoints = ()
        if known != last or self.cache is None or self.cache.read_only:
            return
        key = engine.key(slot.sequence.tokens)
        if not self.cache.has(key) and (data := engine.state(slot.sequence)):
            self._unsaved.append((key, data))

    def save(self) -> None:
        """Write the states that were taken."""
        for key, data in self._unsaved:
            with STOPWATCH("states"):
                cast(PromptCache, self.cache).save(key, data)
        self._unsaved.clear()


class Decoder(Closing):
    """A context of llama.cpp, and the requests that are being answered in it: a decode writes a token of every answer.

    The context is made by `open`, and anew when it is called again.
    """

    def __init__(self, model: Model, template: ChatTemplate, interrupt: Interrupt, cache: PromptCache | None) -> None:
        self.engine: Engine | None = None
        self.active: list[ActiveRequest] = []
        self.unreported_ms = model.load_ms  # of loading, which the next answer reports
        self.checkpoints = Checkpoints(cache)
        self._model, self._template, self._interrupt = model, template, interrupt
        self._marks = reasoning_marks(template.template.source, model.vocabulary)
        words, markers = model.vocabulary, Markers(template.template.source, model.vocabulary)
        self._vocabulary = mask.Vocabulary(
            words.piece, words.is_end, markers.__contains__, lambda: token_texts(model.file)
        )

    def open(self, settings: Settings, size: int, sequences: int) -> None:
        """Make a context of `size` tokens for each sequence, in place of the one that there is.

        Raises:
            LoadError: llama.cpp cannot make it. Interrupted: Ctrl-C meanwhile.
        """
        with self._interrupt:
            self.close()
            started = time.monotonic()
            self.engine = Engine(self._model, settings, self._interrupt, size, sequences)
            self.unreported_ms += (time.monotonic() - started) * 1000
            self._interrupt.check()

    def close(self) -> None:
        """Free the context and write down prefixes; again is harmless."""
        self.cancel()
        with self._interrupt:  # Ctrl-C would be lost in llama.cpp, or lose a prefix
            if self.engine:
                self.engine.close()
                self.engine = None
            self.checkpoints.save()

    def cancel(self) -> None:
        """Drop every request; what has been written of an answer is in its `Answer`."""
        for one in self.active:
            one.sampler.close()
        self.active.clear()

    def interrupted(self) -> None:
        """Complete what has been written of the answers, as far as it goes."""
        for one in self.active:
            one.builder.answer.finish_reason = "interrupted"
            one.request.show(one.builder.close())

    def fits(self, prompt: Prompt) -> bool:
        """Tell whether there are free sequences for a request, of the size that it needs."""
        if self.engine is None or self.engine.context < prompt.size:
            return False
        busy = sum(len(one.slots) for one in self.active)
        return len(self.engine.sequences) - busy >= len(prompt.contexts)

    def begin(self, prompt: Prompt) -> None:
        """Give each of a request's contexts a sequence.

        Raises:
            UsageError: no mask can follow the schema.
        """
        schema = prompt.settings.schema
        constraint = self._constraint(schema) if schema else None
        engine, answer = cast(Engine, self.engine), prompt.answer
        busy = {slot.sequence.id: slot for one in self.active for slot in one.slots}
        slots = []
        for tokens, checkpoints in zip(prompt.contexts, prompt.checkpoints, strict=True):
            slot = assign_slot(engine, tokens, busy)
            self.checkpoints.load(engine, slot, checkpoints)
            busy[slot.sequence.id] = slot
            slots.append(slot)
        answer.cached_tokens = len(slots[0].prompt) - len(slots[0].pending)
        answer.load_ms, self.unreported_ms = round(self.unreported_ms, 1), 0.0
        begin, end = self._marks or ("", "")
        splitter = ReasoningSplitter(self._marks, prompt.ending.rfind(begin) > prompt.ending.rfind(end))
        vocabulary, request = self._model.vocabulary, prompt.request
        builder = AnswerBuilder(
            answer, prompt.settings, vocabulary, engine.context, splitter, request.think, constraint
        )
        sampler = (SchemaSampler if constraint else Sampler)(self._model.file, prompt.settings)
        self.active.append(ActiveRequest(request, prompt.guidance, slots, builder, sampler))

    def _constraint(self, schema: Schema) -> Constraint:
        """Return what holds an answer to a schema; a model that can think may do that first."""
        opening = self._model.vocabulary.encode(self._marks[0], special=True) if self._marks else []
        return Constraint(
            schema.mask,
            self._vocabulary,
            blank_lines=self._marks is not None,
            opening=opening[0] if len(opening) == 1 else None,
        )

    def decode(self) -> list[ActiveRequest]:
        """Write a token of every answer and read of the prompts what has room; return the answers that ended.

        The contexts of a request end their prompts in one decode, so that the logits of all are there to be combined.
        """
        engine = cast(Engine, self.engine)
        entries, writing, room = [], [], engine.batch_size
        for one in sorted(self.active, key=lambda one: one.reading):  # answers first, prompts fill the room
            sample = one.may_sample and sum(len(slot.pending) for slot in one.slots) <= room
            for slot in (slot for slot in one.slots if not slot.waits_for):
                size = len(slot.pending) if sample else min(slot.next_size, len(slot.pending) - 1, room)
                if size:
                    entries.append(BatchEntry(slot.sequence, slot.pending[:size], logits=sample))
                    slot.pending, room = slot.pending[size:], room - size
            writing += [one] if sample else []
        with STOPWATCH("prompt" if any(len(feed.tokens) > 1 for feed in entries) else "answer"):
            rows = iter([row for row in engine.decode(entries) if row >= 0])
        for one in self.active:
            one.copy_prefixes(engine)
            for slot in one.slots:
                self.checkpoints.take(engine, slot)
        for one in writing:
            mine = [next(rows) for _ in one.slots]
            if len(mine) > 1:
                one.guidance.combine([engine.logits(row) for row in mine])
            token = one.draw(engine, mine[0], several=len(entries) > 1)
            one.request.show(one.builder.add(token))
        return [one for one in writing if one.builder.ended]

    def end(self, one: ActiveRequest, prompt_only: bool) -> None:
        """Complete an answer. With `prompt_only` the cache keeps its prompt alone, for one that begins alike."""
        self.active.remove(one)
        one.request.show(one.builder.close())
        one.sampler.close()
        if prompt_only:
            for slot in one.slots:
                cast(Engine, self.engine).truncate(slot.sequence, len(slot.prompt))


class Scheduler(Closing):
    """Answers requests, as many at a time as it has slots, with one llama_decode a step for all of them.

    A request takes a sequence for each of its contexts. A prefix that some sequence holds, or is about to decode, is
    copied, not decoded again. The number of slots changes an answer by rounding only: the rest of a batch changes the
    last bits of the logits. Of 2,319 answers of the embedded model at temperature 0, 8 were another text with 8 slots.

    Args:
        slots: requests that are answered at a time.
        context: tokens for each sequence, allocated at once; None: as the requests need, anew when they need more.
        cache: where prefixes of prompts are kept on disk.

    Raises:
        LoadError: llama.cpp cannot make the context (memory; it has 256 sequences at most).
    """

    def __init__(
        self,
        model: Model,
        template: ChatTemplate,
        settings: Settings,
        options: RenderOptions,
        interrupt: Interrupt,
        slots: int = 1,
        context: int | None = None,
        cache: PromptCache | None = None,
    ) -> None:
        self.model, self.template, self.slots, self.interrupt = model, template, slots, interrupt
        self.settings, self.options = replace(settings, context=context) if context else settings, options
        self._decoder = Decoder(model, template, interrupt, cache)
        self._waiting: deque[Prompt] = deque()
        self._closed = False
        if context:
            self._decoder.open(self.settings, context, slots * settings.contexts)

    def beside(self, slots: int) -> Scheduler:
        """Return another scheduler on the same model, with the same settings."""
        made = (self.model, self.template, self.settings, self.options, self.interrupt, slots)
        other = Scheduler(*made, cache=self._decoder.checkpoints.cache)
        other._decoder.unreported_ms = 0.0
        return other

    @property
    def engine(self) -> Engine | None:
        """llama.cpp's context; None before the first request, and when it is closed."""
        return self._decoder.engine

    def close(self) -> None:
        """Free the context and write down prefixes; again is harmless."""
        self._closed = True
        self._waiting.clear()
        self._decoder.close()

    def submit(self, request: Request, before: Callable[[Prompt], None] = lambda _: None) -> Prompt:
        """Take a request; it begins in a step that has a slot for it. Return how the model will read it.

        `before` is given that first, and may refuse it by an error.

        Raises:
            ContextOverflow, TemplateError, TierViolation: it cannot be answered. RuntimeError: the scheduler is closed.
        """
        if self._closed:
            raise RuntimeError("the context is closed")
        prompt = make_prompt(request, self.model, self.template, self.settings, self.options)
        before(prompt)
        self._waiting.append(prompt)
        return prompt

    @property
    def unfinished(self) -> int:
        """Count the requests that are waiting or being answered."""
        return len(self._waiting) + len(self._decoder.active)

    def step(self) -> list[tuple[Request, Answer | EdgeError]]:
        """Begin what has a slot, write a token of every answer, and return the requests that came to an end.

        Raises:
            Interrupted: Ctrl-C. LoadError: llama.cpp cannot make a context. RuntimeError: the scheduler is closed.
        """
        if self._closed:
            raise RuntimeError("the context is closed")
        ended: list[tuple[Request, Answer | EdgeError]] = []
        while self._waiting and self._has_room():
            prompt = self._waiting.popleft()
            try:
                self._decoder.begin(prompt)
            except EdgeError as error:
                ended.append((prompt.request, error))
        self.interrupt.check()
        for one in self._decoder.decode() if self._decoder.active else ():
            self._decoder.end(one, prompt_only=self.slots > 1)
            ended.append((one.request, one.builder.answer))
        return ended

    def _has_room(self) -> bool:
        """Tell whether the next request can begin; the context is made anew for it once no other is being answered."""
        decoder, soon = self._decoder, list(itertools.islice(self._waiting, self.slots))
        if len(decoder.active) < self.slots and decoder.fits(soon[0]):
            return True
        if not decoder.active:
            decoder.open(self.settings, max(one.size for one in soon), sum(len(one.contexts) for one in soon))
        return not decoder.active

    def cancel(self) -> None:
        """Drop every request; what has been written of an answer is in its `Answer`."""
        self._waiting.clear()
        self._decoder.cancel()

    def run(
        self, requests: Iterable[Request], before: Callable[[Prompt], None] = lambda _: None
    ) -> Iterator[tuple[Request, Answer | EdgeError]]:
        """Yield each request with its answer, or with the error that kept it from one, as they come to an end.

        The next request is taken whenever there is a slot for it; `before` as in `submit`.

        Raises:
            Interrupted: Ctrl-C; what has been written of the answers is theirs, and `interrupted` their finish reason.
            RuntimeError: the scheduler is closed.
        """
        self._decoder.checkpoints.save()
        coming = iter(requests)
        try:
            while True:
                while self.unfinished < self.slots and (request := next(coming, None)) is not None:
                    try:
                        self.submit(request, before)
                    except EdgeError as error:
                        yield request, error
                if not self.unfinished:
                    return
                yield from self.step()
        except Interrupted:
            self._decoder.interrupted()
            for prompt in self._waiting:
                prompt.answer.finish_reason = "interrupted"
            raise
        finally:
            self.cancel()

    def set_adapters(self, adapters: Sequence[Adapter]) -> None:
        """Lay other adapters over the model, from the next answer on; what was read under the old ones is forgotten.

        Raises:
            LoadError: one does not fit the model; all stays as it was.
        """
        for adapter in adapters:
            self.model.adapter(adapter)
        if self.engine:
            self.engine.set_adapters(adapters)
        self.settings = replace(self.settings, adapters=tuple(adapters))


def answer_one(scheduler: Scheduler, request: Request, before: Callable[[Prompt], None] = lambda _: None) -> Answer:
    """Answer one request; an interruption is a finish reason, not an exception.

    Raises:
        EdgeError: it cannot be answered.
    """
    begun: list[Answer] = []

    def begin(prompt: Prompt) -> None:
        begun.append(prompt.answer)
        before(prompt)

    try:
        ((_, answer),) = scheduler.run([request], begin)
    except Interrupted:
        return begun[0]
    return answered(answer)


def answered(answer: Answer | EdgeError) -> Answer:
    """Return an answer, or raise the error that stands in its place."""
    if isinstance(answer, EdgeError):
        raise answer
    return answer


def assign_slot(engine: Engine, prompt: list[int], busy: Mapping[int, Slot]) -> Slot:
    """Give a prompt the free sequence that has the longest prefix of it, or the prefix of a busy one.

    Args:
        busy: the slots in use, by the number of their sequence.
    """
    read = prompt[:-1]  # the last token is always decoded, for its logits
    known = {one.id: busy[one.id].known if one.id in busy else one.tokens for one in engine.sequences}
    count = {number: common_prefix(tokens, read) for number, tokens in known.items()}
    free = [sequence for sequence in engine.sequences if sequence.id not in busy]
    sequence = max(free, key=lambda sequence: (count[sequence.id], -len(sequence.tokens)))
    source = max(engine.sequences, key=lambda sequence: count[sequence.id])
    if count[source.id] <= count[sequence.id]:
        return Slot(sequence, prompt, prompt[engine.truncate(sequence, count[sequence.id]) :])
    engine.truncate(sequence, 0)
    slot = Slot(sequence, prompt, prompt, (source, count[source.id]))
    slot.copy_prefix(engine)
    return slot


# =====================================================================================================================
# 11  Python
# =====================================================================================================================
# What a program needs: a model that is open, and three functions. Nothing is written to stdout, stderr or the disk.


class Options(TypedDict, total=False):
    """The options of a call, each as the option of `chat` of that name."""

    max_tokens: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repeat_penalty: float | None
    seed: int | None  # None: drawn; the answer reports it
    stop: Sequence[str]
    system_strength: float
    pref_strength: Strength
    schema: Mapping[str, Any] | str | None  # JSON Schema, or fields as `name, age int`; the final check is the caller's
    remind: bool
    think: bool | None


class ModelSession(Closing):
    """The scheduler that all calls of a model share: one answer at a time; the KV cache stays for the next call."""

    def __init__(self, model: Model) -> None:
        chosen = model.chat_template or choose_template("auto", model.file)
        self.scheduler = Scheduler(model, chosen, model.settings, AS_USUAL, Interrupt())
        self._free, self._writer = threading.Lock(), 0  # the thread that writes an answer, 0 if none does

    def close(self) -> None:
        """Free the context; again is harmless."""
        self.scheduler.close()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for the answers of other threads to end.

        Raises:
            RuntimeError: this thread itself is in the middle of one. KeyboardInterrupt: Ctrl-C.
        """
        if self._writer == threading.get_ident():
            raise RuntimeError("an answer is still being written: read its stream to the end, or close it")
        with self._free:
            self._writer, self.scheduler.interrupt.raised = threading.get_ident(), False
            try:
                yield
            except Interrupted:
                raise KeyboardInterrupt from None
            finally:
                self._writer = 0

    def take(self, options: Options) -> int:
        """Set the options of the next answer, and return its seed.

        Raises:
            TypeError: there is no such option. UsageError: it is out of range, or no schema.
        """
        if unknown := options.keys() - Options.__annotations__:
            raise TypeError(f"no option {min(unknown)!r}: there are {', '.join(Options.__annotations__)}")
        given: dict[str, Any] = {"seed": None, **options}
        self.scheduler.options = RenderOptions(given.pop("remind", True), given.pop("think", None))
        seed = given.pop("seed")
        seed = random.SystemRandom().randrange(2**32) if seed is None else seed
        if not 0 <= seed < 2**32:
            raise UsageError(f"seed takes a number from 0 to {2**32 - 1}, not {seed}")
        for name, (least, most) in BOUNDS.items():
            value = given.get(name)
            if value is not None and (not least <= value <= most or value == math.inf):
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
        self.scheduler.settings = replace(self.scheduler.model.settings, **given)
        return int(seed)

    def stream(self, request: Request) -> Generator[str, None, Answer]:
        """Yield an answer's text as it is written, and return it with its figures; closed early, it stops at once.

        Raises:
            Interrupted: Ctrl-C while it is being written; between two pieces, that is the caller's.
            RuntimeError: the context is closed.
        """
        pieces: list[str] = []
        scheduler = self.scheduler
        scheduler.submit(replace(request, show=pieces.append))
        try:
            while True:
                with scheduler.interrupt:
                    ended = scheduler.step()
                    scheduler.interrupt.check()
                yield from filter(None, pieces)
                pieces.clear()
                for _, answer in ended:
                    return answered(answer)
        finally:
            scheduler.cancel()

    def compare(self, dialogs: Sequence[Dialog], seed: int) -> list[Answer]:
        """Answer dialogs together.

        Raises:
            EdgeError: one cannot be answered. Interrupted: Ctrl-C.
        """
        requests = [Request(dialog, seed, number) for number, dialog in enumerate(dialogs)]
        with self.scheduler.interrupt, self.scheduler.beside(len(dialogs)) as together:
            answers = {request.tag: answer for request, answer in together.run(requests)}
        return [answered(answers[number]) for number in range(len(dialogs))]


def session_of(model: Model) -> ModelSession:
    """Return the session that a model's calls share; the first call makes it.

    Raises:
        RuntimeError: the model is closed.
    """
    if not model.pointer:
        raise RuntimeError("the model is closed")
    if model.session is None:
        model.session = ModelSession(model)
    return model.session


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
    session, dialog = session_of(model), as_dialog(query, system, pref)
    with session.turn():
        return (yield from session.stream(Request(dialog, session.take(options))))


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
    session, dialog = session_of(model), as_dialog(query, system, "")
    dialogs = [replace(dialog, user_info=profiles.expand_profile(pref)) for pref in preferences]
    if not dialogs:
        raise UsageError("compare needs a preference: an empty one is the answer without any")
    with session.turn():
        return session.compare(dialogs, session.take(options))


# =====================================================================================================================
# 12  Main
# =====================================================================================================================
# The command line: every error ends here, as one line on stderr and an exit code.


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
    except ModuleNotFoundError as error:  # a bare checkout under a Python without the dependencies
        lacks = f"the Python package {error.name} is missing"
        say(f"metaalign-edge: {lacks}: `pip install .` in the folder of this program installs all that it needs")
        return LoadError.exit_code
    except Exception as error:
        code = exit_code(error)
        text = error.format_message() if hasattr(error, "format_message") else str(error)  # Typer's
        if code is None:
            text = f"unexpected {type(error).__name__}: {error}: please report it with the command"
        if text:  # Typer shows the help where there are no arguments, and says no more
            say(f"metaalign-edge: {one_line(text)}")
        return 1 if code is None else code


def main() -> None:
    """Run the console script, and end the process.

    It ends at once: Python's own clean-up of modules would take longer, and frees nothing that the system does not.
    """
    library.is_program = True  # not a host's process
    for file in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(file, io.TextIOWrapper):
            encoding = "utf-8" if os.name == "nt" else None  # a pipe there would have the code page of old
            file.reconfigure(encoding=encoding, errors="replace")  # no terminal lacks so much as to lose an answer
    status = run()
    for file in filter(None, (sys.stdout, sys.stderr)):
        with contextlib.suppress(OSError, ValueError):
            file.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
