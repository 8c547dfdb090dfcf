#!/usr/bin/env python3
"""metaalign-edge: one local model that follows any preference at inference time.

A meta-aligned model reads three tiers: System Info (what the provider wants), User Info (who the user is and
what they prefer) and User Query. Editing the first two, the meta-prompt, is the whole of inference-time alignment.
This file renders the dialog, keeps tier text from posing as control tokens, and runs the model with llama.cpp.

Contents, in dependency order (nothing refers upward):

     1  Constants, and what a call costs
     2  Errors
     3  Dialog
     4  Tier text
     5  Template sandbox
     6  Rendering
     7  Tier-safe tokens
     8  Files and folders
     9  States on disk
    10  Settings and profiles
    11  Sessions on disk
    12  Models on disk
    13  Templates and schemas
    14  Memory
    15  What a call asks for
    16  llama.cpp
    17  Vocabulary
    18  Model
    19  Engine
    20  Guidance
    21  Text of an answer
    22  Sessions
    23  Presentation
    24  Batch
    25  Evaluation
    26  Bench
    27  Hub
    28  Doctor
    29  Conversations
    30  Options
    31  Answers
    32  Conversion
    33  What stays
    34  Models and sessions
    35  Measurements
    36  Help and completion
    37  Python
    38  Main
"""

from __future__ import annotations

import os
import signal
import sys

is_program = os.path.basename(sys.argv[0]).partition(".")[0] in ("metaalign-edge", "metaalign_edge")
if is_program and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `main`: Ctrl-C in an import below would be a traceback

import array
import bisect
import codecs
import contextlib
import copy
import ctypes
import errno
import functools
import glob
import importlib.util
import inspect
import io
import itertools
import json
import math
import mmap
import random
import re
import shutil
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePath
from types import BuiltinMethodType, MethodType, ModuleType, TracebackType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    AnyStr,
    ClassVar,
    Literal,
    NamedTuple,
    Protocol,
    SupportsIndex,
    TextIO,
    TypedDict,
    cast,
    get_type_hints,
)

import typer
import typer.main

if TYPE_CHECKING:
    import jinja2
    from typing_extensions import Self, Unpack

# What a program needs; see Python
__all__ = [
    "Answer", "ContextOverflow", "Dialog", "EdgeError", "LoadError", "Model", "NetworkError", "NotFound",
    "TemplateError", "TierViolation", "Turn", "UsageError", "compare", "generate", "stream",
]  # fmt: skip


# =====================================================================================================================
#  1  Constants, and what a call costs
# =====================================================================================================================

__version__ = "0.1.0"

Tier = Literal["system_info", "user_info", "query", "response"]
Strength = float | Literal["auto"]
TIERS: tuple[Tier, ...] = ("system_info", "user_info", "query", "response")

LEAST_CONTEXT = 16  # tokens
DEFAULT_CONTEXT = 4096  # tokens per sequence, unless the model has fewer or the dialog needs more
PREFILL_CHUNK = 512  # tokens between two looks at the interrupt flag where llama.cpp has no abort callback (GPUs)
BOUNDS: Mapping[str, tuple[float, float]] = {  # of what Python's callers give; the command line has its own ranges
    "max_tokens": (1, math.inf),
    "temperature": (0, math.inf),
    "top_k": (0, math.inf),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repeat_penalty": (0.1, math.inf),
}
TINY_MODEL = 1 << 25  # bytes; below, threads wait for each other longer than they compute, and all is loaded at once
LONG_WAY = 1 << 31  # bytes of weights times tokens, some 50 ms: a state that is reached by less is not worth a file
TEXT_STACK = 1024  # bytes of stack per byte of text: llama.cpp's regex fallback recurses per character (400 were seen)
BINARY = getattr(os, "O_BINARY", 0)  # without it, Windows writes two bytes for a newline
BYTES_PER_TOKEN = 512  # no vocabulary in the wild has a longer token; bounds what a context could ever hold
LIKELY_BYTES = 16  # of a token, at most, in any text that people write: more are worth asking the vocabulary


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


class Background:
    """Work that a thread does, in C for the most part, while this one goes on. It begins at once."""

    _busy, _usual = 0, 0.0  # how many there are, and what the interval was before the first

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work, self._awaited = work, True
        self._found: Any = None
        self._error: BaseException | None = None
        if is_program:  # a host's interval is its own, and its threads may load several models at a time
            if not Background._busy:
                Background._usual = sys.getswitchinterval()
            Background._busy += 1
            sys.setswitchinterval(1e-5)  # seconds; llama.cpp would wait longer for this thread at each line it logs
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._found = self._work()
        except BaseException as error:
            self._error = error

    def result(self) -> Any:
        """Wait for what the work returns, or raises."""
        self._thread.join()
        if self._awaited and is_program:
            Background._busy -= 1
            if not Background._busy:
                sys.setswitchinterval(Background._usual)
        self._awaited = False
        if self._error:
            raise self._error
        return self._found


class Closing:
    """What is closed, at the latest at the end of a `with`."""

    def close(self) -> None:
        """Give back what it holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def peak_mb() -> float:
    """Return the process's highest memory use in MB, 0 where the system does not say."""
    try:  # Linux: getrusage would include what the parent used before it started this program
        (line,) = [row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmHWM")]
        return int(line.split()[1]) * 1024 / 1e6
    except (OSError, ValueError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def trim_memory() -> None:
    """Give back to the system what is free: glibc keeps it for the thread that freed it, 20 MB after a vocabulary."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library, another system
        ctypes.CDLL(None).malloc_trim(0)


# =====================================================================================================================
#  2  Errors
# =====================================================================================================================


class EdgeError(Exception):
    """Root of every error a user can cause; its text is one line: what, where, what to do next."""

    exit_code = 1


class UsageError(EdgeError):
    """The arguments or the input make no sense together."""

    exit_code = 2


class NotFound(EdgeError):
    """A model or file is not there."""

    exit_code = 3


class NetworkError(EdgeError):
    """The hub is unreachable, or refuses."""

    exit_code = 4


class LoadError(EdgeError):
    """A model file is bad, or does not fit the memory."""

    exit_code = 5


class ContextOverflow(EdgeError):
    """The pinned part of the dialog does not fit the context."""

    exit_code = 6


class TemplateError(EdgeError):
    """A template is missing, does not render, or breaks its budget."""

    exit_code = 7


class TierViolation(EdgeError):
    """Text in a tier would become more than text."""

    exit_code = 7


class SchemaViolation(EdgeError):
    """An answer does not fit the schema that was asked for."""

    exit_code = 7


class CannotWrite(EdgeError):
    """An output cannot be written."""

    exit_code = 8


class Interrupted(EdgeError):
    """The user pressed Ctrl-C."""

    exit_code = 130


def one_line(error: object) -> str:
    """Squeeze the text of an exception into one line."""
    return " ".join(str(error).split()) or type(error).__name__


def shortened(text: object, most: int) -> str:
    """Return a text in one line, cut where it has more than so many characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= most else line[: most - 1] + "…"


def counted(number: int, what: str) -> str:
    """Return how many there are of something: `1 state`, `2 states`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def digest(document: Any) -> str:
    """Return 32 hexadecimal digits that stand for a JSON document."""
    import hashlib  # four milliseconds

    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:32]


# =====================================================================================================================
#  3  Dialog
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
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise UsageError(f"the {name} holds bytes that are not UTF-8 (a lone surrogate): re-encode the text")

    def texts(self) -> Iterator[tuple[str, str]]:
        """Yield every text with the name of its tier."""
        yield "System Info", self.system_info
        yield "User Info", self.user_info
        for turn in self.turns:
            yield "User Query", turn.query
            if turn.response is not None:
                yield "Response", turn.response

    def then(self, response: str, query: str) -> Dialog:
        """Return the dialog after this answer to its newest query, with another query."""
        *earlier, last = self.turns
        return replace(self, turns=[*earlier, replace(last, response=response), Turn(query)])


class RenderOptions(NamedTuple):
    """How a dialog becomes a prompt."""

    remind: bool = True  # restate the priority next to the newest query when both tiers speak (wrapped only)
    think: bool | None = None  # `enable_thinking` of templates that know it; None passes nothing


AS_USUAL = RenderOptions()


# =====================================================================================================================
#  4  Tier text
# =====================================================================================================================


class Span(NamedTuple):
    """Characters [start, end) that came from a tier."""

    start: int
    end: int
    tier: Tier


class TierText(str):
    """A string that remembers which of its characters came from which tier; the others are scaffold.

    A template may cut, strip, join and change it in any way it likes: every operation either carries the spans along
    or, where positions are lost, gives the whole result to the tier. So no text of a tier can pass as scaffold.
    """

    spans: tuple[Span, ...]

    @classmethod
    def of(cls, text: str, tier: Tier) -> TierText:
        """Mark a whole text as one tier's."""
        return cls.build(text, [Span(0, len(text), tier)])

    @classmethod
    def build(cls, text: str, spans: Iterable[Span]) -> TierText:
        """Make a text with these spans; empty ones vanish, neighbours of one tier merge."""
        self = super().__new__(cls, text)
        merged: list[Span] = []
        for span in spans:
            if span.start >= span.end:
                continue
            if merged and merged[-1].tier == span.tier and merged[-1].end == span.start:
                merged[-1] = Span(merged[-1].start, span.end, span.tier)
            else:
                merged.append(span)
        self.spans = tuple(merged)
        return self

    def pieces(self) -> Iterator[tuple[str, Tier | None]]:
        """Yield the maximal runs of one owner in order; scaffold has the owner None."""
        at = 0
        for start, end, tier in self.spans:
            if at < start:
                yield str.__getitem__(self, slice(at, start)), None
            yield str.__getitem__(self, slice(start, end)), tier
            at = end
        if at < len(self):
            yield str.__getitem__(self, slice(at, None)), None

    def holds(self, tier: Tier) -> bool:
        """Tell whether any character came from this tier."""
        return any(span.tier == tier for span in self.spans)

    def _whole(self, text: str) -> TierText:
        return TierText.build(text, [Span(0, len(text), self.spans[-1].tier)] if self.spans else [])

    def _same_length(self, text: str) -> TierText:
        return TierText.build(text, self.spans) if len(text) == len(self) else self._whole(text)

    def _cut(self, pieces: Iterable[str]) -> list[TierText]:
        """Give the pieces of a split, in order, their spans back."""
        found, at = [], 0
        for piece in pieces:
            at = self.find(piece, at)
            found.append(self[at : at + len(piece)])
            at += len(piece)
        return found

    def __str__(self) -> str:
        return self

    def __getitem__(self, key: SupportsIndex | slice) -> TierText:
        text = str.__getitem__(self, key)
        if not isinstance(key, slice):
            start = key.__index__() % len(self)
            step = 1
        else:
            start, _, step = key.indices(len(self))
        if step != 1:
            return self._whole(text)
        stop = start + len(text)
        return TierText.build(
            text,
            (Span(max(s, start) - start, min(e, stop) - start, t) for s, e, t in self.spans if s < stop and e > start),
        )

    def __iter__(self) -> Iterator[TierText]:
        return (self[index] for index in range(len(self)))

    def __add__(self, other: str) -> TierText:
        return join_text([self, other])

    def __radd__(self, other: str) -> TierText:
        return join_text([other, self])

    def __mul__(self, times: SupportsIndex) -> TierText:
        return join_text([self] * times.__index__())

    __rmul__ = __mul__

    def strip(self, chars: str | None = None, /) -> TierText:
        """Strip both ends."""
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None, /) -> TierText:
        """Strip the left end."""
        return self[len(self) - len(str.lstrip(self, chars)) :]

    def rstrip(self, chars: str | None = None, /) -> TierText:
        """Strip the right end."""
        return self[: len(str.rstrip(self, chars))]

    def removeprefix(self, prefix: str, /) -> TierText:
        """Remove a prefix if it is there."""
        return self[len(self) - len(str.removeprefix(self, prefix)) :]

    def removesuffix(self, suffix: str, /) -> TierText:
        """Remove a suffix if it is there."""
        return self[: len(str.removesuffix(self, suffix))]

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[TierText]:  # type: ignore[override]
        """Split from the left."""
        pieces = str.split(self, sep, maxsplit)
        return self._cut(pieces) if sep is None else self._cut_at(pieces, sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[TierText]:  # type: ignore[override]
        """Split from the right."""
        pieces = str.rsplit(self, sep, maxsplit)
        return self._cut(pieces) if sep is None else self._cut_at(pieces, sep)

    def _cut_at(self, pieces: Iterable[str], sep: str) -> list[TierText]:
        found, at = [], 0
        for piece in pieces:
            found.append(self[at : at + len(piece)])
            at += len(piece) + len(sep)
        return found

    def splitlines(self, keepends: bool = False) -> list[TierText]:  # type: ignore[override]
        """Split at line boundaries."""
        found, at = [], 0
        for line, whole in zip(str.splitlines(self), str.splitlines(self, True), strict=True):
            found.append(self[at : at + len(whole if keepends else line)])
            at += len(whole)
        return found

    def partition(self, sep: str, /) -> tuple[TierText, TierText, TierText]:
        """Split once from the left, in three."""
        before, middle, _ = str.partition(self, sep)
        a, b = len(before), len(before) + len(middle)
        return self[:a], self[a:b], self[b:]

    def rpartition(self, sep: str, /) -> tuple[TierText, TierText, TierText]:
        """Split once from the right, in three."""
        before, middle, _ = str.rpartition(self, sep)
        a, b = len(before), len(before) + len(middle)
        return self[:a], self[a:b], self[b:]

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> TierText:
        """Replace occurrences; what replaces them keeps its own owner."""
        if not old:
            return join_text([self, new])._whole(str.replace(self, old, new, count))
        parts = self.split(old, count)
        return join_text([part for piece in parts for part in (piece, new)][:-1])

    def join(self, iterable: Iterable[str], /) -> TierText:
        """Join texts with this one between them."""
        return join_text([part for piece in iterable for part in (piece, self)][:-1])

    def upper(self) -> TierText:
        """Upper-case."""
        return self._same_length(str.upper(self))

    def lower(self) -> TierText:
        """Lower-case."""
        return self._same_length(str.lower(self))

    def title(self) -> TierText:
        """Title-case."""
        return self._same_length(str.title(self))

    def capitalize(self) -> TierText:
        """Capitalise the first letter."""
        return self._same_length(str.capitalize(self))

    def zfill(self, width: SupportsIndex, /) -> TierText:
        """Pad with zeros on the left."""
        return self._whole(str.zfill(self, width))


def join_text(parts: Iterable[str]) -> TierText:
    """Concatenate texts, each with its owner; a plain string is scaffold."""
    spans: list[Span] = []
    parts, at = list(parts), 0
    for part in parts:
        if isinstance(part, TierText):
            spans += [Span(start + at, end + at, tier) for start, end, tier in part.spans]
        at += len(part)
    return TierText.build("".join(parts), spans)


def tier_within(value: Any) -> Tier | None:
    """Return a tier whose text is somewhere in a value of a template, the last found; None if there is none."""
    if isinstance(value, TierText):
        return value.spans[-1].tier if value.spans else None
    if isinstance(value, str | int | float | None):
        return None
    if isinstance(value, Mapping):
        return tier_within([*value.keys(), *value.values()])
    if isinstance(value, list | tuple | set | frozenset):
        return next((tier for item in reversed(list(value)) if (tier := tier_within(item))), None)
    return "query" if isinstance(value, Iterator) else None  # a lazy sequence cannot be looked into: assume the worst


# =====================================================================================================================
#  5  Template sandbox
# =====================================================================================================================
# A GGUF's template is somebody else's program. Jinja's immutable sandbox keeps it from Python's internals; what is
# added here bounds what it may spend, and follows the tiers' text through everything it does. jinja2 is imported on
# first use (it would be a third of the start-up of `--help`), hence the mixin, married to Jinja's in `sandbox_class`.

BUDGET_STEPS = 300_000  # loop iterations, calls and filters of one rendering; real templates need some thousands
BUDGET_SECONDS = 5.0
BUDGET_TEXT = 1 << 24  # characters of any one string
BUDGET_NODES = 1 << 17  # values in any one list or dict
TEMPLATE_SIZE = 1 << 20  # characters of a template's source

# What chat templates in the wild use; each can be bounded. The rest of Jinja's filters (`center`, `sum`, `batch`, …)
# would only serve to burn time or memory.
FILTERS = (
    "abs capitalize count d default dictsort e escape first float format indent int items join last length list lower "
    "map max min reject rejectattr replace reverse round safe select selectattr sort string title tojson trim unique "
    "upper"
).split()
EXACT_FILTERS = "capitalize d default first last lower reverse string trim upper".split()  # a string's own methods
STRING_METHODS = (
    "capitalize count endswith find format index isalnum isalpha isdecimal isdigit islower isnumeric isspace istitle "
    "isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split "
    "splitlines startswith strip title upper zfill"
).split()


class Refusal(Exception):
    """A template called `raise_exception`: it will not render this dialog."""


class TemplateFailure(TemplateError):
    """A template failed on these messages; another shape of message may suit it."""


class OverBudget(Exception):
    """A template spent more than a chat template ever needs."""


class TierSandbox:
    """The part of the sandbox that is ours: budgets, and the tiers' text followed through every operation."""

    rendered: tuple[type, ...]  # callables of a template whose result `concat` wrote
    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "**", "%"])
    steps = 0
    deadline = 0.0

    def begin(self) -> None:
        """Start a rendering with a fresh budget."""
        self.steps, self.deadline = 0, time.monotonic() + BUDGET_SECONDS

    def step(self) -> None:
        """Count one step."""
        self.steps += 1
        if self.steps > BUDGET_STEPS:
            raise OverBudget(f"it takes more than {BUDGET_STEPS:,} steps")
        if time.monotonic() > self.deadline:
            raise OverBudget(f"it takes more than {BUDGET_SECONDS:g} seconds")

    def concat(self, parts: Iterable[str]) -> str:
        """Join what a template writes, in place of Jinja's own."""
        parts, size = list(parts), 0
        for part in parts:
            size += len(part)
            if size > BUDGET_TEXT:
                raise OverBudget(f"it writes more than {BUDGET_TEXT:,} characters")
        return join_text(parts) if any(isinstance(part, TierText) for part in parts) else "".join(parts)

    def tilde(self, *operands: Any) -> str:
        """Do what the operator `~` does."""
        return self.concat([self.written(operand) for operand in operands])

    def looped(self, iterable: Any) -> Iterator[Any]:
        """Count the iterations of a `for`."""
        for item in iterable:
            self.step()
            yield item

    def bounded(self, value: Any) -> Any:
        """Return a value unchanged if it is of a size that a chat template may need."""
        nodes = size = 0
        waiting = [value]
        while waiting:
            nodes += 1
            item = waiting.pop()
            if isinstance(item, str):
                size += len(item)
            elif isinstance(item, int):
                self.allow(item.bit_length(), 4096)
            elif isinstance(item, Mapping):
                waiting += [*item.keys(), *item.values()]
            elif isinstance(item, list | tuple | set | frozenset):
                waiting += item
            if size > BUDGET_TEXT or nodes + len(waiting) > BUDGET_NODES:
                raise OverBudget("it builds a value larger than any chat template needs")
        return value

    def allow(self, size: int, most: int = BUDGET_TEXT) -> None:
        """Refuse an operation whose result would have this size."""
        if size > most:
            raise OverBudget("it makes a value larger than any chat template needs")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute a binary operator; growth is bounded before it happens."""
        self.step()
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "*" and not numbers:
            thing, times = (right, left) if isinstance(left, int) else (left, right)
            self.allow(len(thing) * times, BUDGET_TEXT if isinstance(thing, str) else BUDGET_NODES)
        elif operator == "**" and (not numbers or abs(right) > 64 or abs(left) > 1e6):
            raise OverBudget("it raises a number to a power no chat template needs")
        elif operator == "%" and isinstance(left, str):
            values = right if isinstance(right, tuple | Mapping) else (right,)
            return self.formatted(left, values, lambda: str(left) % right)
        result = self.binop_table[operator](left, right)  # type: ignore[attr-defined]
        return self.owned(self.bounded(result), [left, right])

    def formatted(self, pattern: str, values: Any, render: Callable[[], str]) -> str:
        """Fill a format string; the tier of any value takes the whole result."""
        self.bounded(values)
        longest = max(map(len, map(str, values.values() if isinstance(values, Mapping) else values)), default=0)
        wide = re.search(r"\d{4}|\*", pattern)
        self.allow(BUDGET_TEXT + 1 if wide else (pattern.count("%") + pattern.count("{")) * longest)
        return cast(str, self.owned(render(), [pattern, values], exact=False))

    def owned(self, result: Any, inputs: Any, exact: bool = True) -> Any:
        """Give a string that was computed from a tier's text to that tier, unless its own spans are `exact`."""
        if not isinstance(result, str) or (exact and isinstance(result, TierText)):
            return result
        tier = tier_within(inputs)
        return TierText.of(str.__str__(result), tier) if tier else result

    def written(self, value: Any) -> str:
        """Turn a value into the text that a template writes of it."""
        return value if isinstance(value, str) else cast(str, self.owned(str(self.bounded(value)), value))

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        """Refuse what the sandbox forbids at once; Jinja would let it pass as an undefined value."""
        raise OverBudget(f"it reaches for {attribute!r} of a {type(obj).__name__}, which no chat template needs")

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Replace `str.format` by the sandbox's, with bounds and with the tiers followed."""
        if super().wrap_str_format(value) is None:  # type: ignore[misc]
            return None
        plain = super().wrap_str_format(str.__str__(value.__self__).format)  # type: ignore[misc]

        def fill(*args: Any, **kwargs: Any) -> str:
            return self.formatted(value.__self__, {**dict(enumerate(args)), **kwargs}, lambda: plain(*args, **kwargs))

        return fill

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Allow on strings only the methods that can be bounded and followed."""
        if isinstance(obj, str) and attr not in STRING_METHODS:
            return False
        return bool(super().is_safe_attribute(obj, attr, value))  # type: ignore[misc]

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function of the template's, following the tiers through it."""
        self.step()
        owner = getattr(function, "__self__", None)
        if owner is self:  # our own `tilde`, `looped`, `bounded`
            return function(*args)
        if isinstance(function, BuiltinMethodType | MethodType) and isinstance(owner, str):
            named = {name: value for name, value in kwargs.items() if not name.startswith("_")}  # not Jinja's own
            return self.string_method(owner, function.__name__, args, named)
        result = super().call(context, function, *args, **kwargs)  # type: ignore[misc]
        if isinstance(function, self.rendered):  # written by `concat`, which follows exactly
            return result
        return self.owned(self.bounded(result), [args, kwargs])

    def string_method(self, text: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a string's method, on a tier text if any operand is one."""
        self.bounded([args, kwargs])
        if name == "replace" and len(args) > 1:
            self.allow((text.count(args[0]) + 1) * len(args[1]))
        if name == "join" and args:
            return self.joined(args[0], text)
        if name == "zfill" and args:
            self.allow(args[0])
        if tier_within([args, kwargs]):
            text = join_text([text])
        return self.owned(getattr(text, name)(*args, **kwargs), [text])

    def guarded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a filter: it counts as a step, its values are bounded, tiers are followed."""

        @functools.wraps(function)  # carries `jinja_pass_arg` along
        def filtered(*args: Any, **kwargs: Any) -> Any:
            self.step()
            values = [*args[1:], *kwargs.values()] if hasattr(function, "jinja_pass_arg") else [*args, *kwargs.values()]
            self.bounded(values)
            if name == "replace":
                return self.string_method(self.written(values[0]), "replace", tuple(values[1:]), {})
            if name == "format":
                return self.formatted(self.written(values[0]), kwargs or args[1:], lambda: function(*args, **kwargs))
            if name == "indent" and len(values) > 1:
                self.allow(values[0].count("\n") * (len(values[1]) if isinstance(values[1], str) else values[1]))
            result = function(*args, **kwargs)
            return self.owned(self.bounded(result), values, exact=name in EXACT_FILTERS)

        return filtered

    def joined(self, values: Iterable[Any], d: str = "", attribute: str | None = None) -> str:
        """Do what the filter `join` does, following each part."""
        if attribute is not None:
            values = (self.getattr(value, attribute) for value in values)  # type: ignore[attr-defined]
        parts = [self.written(value) for value in self.looped(values)]
        return self.concat([part for piece in parts for part in (piece, d)][:-1])


def to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Do what transformers' `tojson` does: JSON without HTML escapes."""
    if isinstance(indent, int) and indent > 16:
        raise OverBudget("it indents JSON wider than any chat template needs")  # some values times any depth
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.cache
def sandbox_class() -> Any:
    """Marry `TierSandbox` to Jinja's immutable sandbox, importing jinja2 only now."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.runtime import LoopContext, Macro
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.visitor import NodeTransformer

    class Metered(NodeTransformer):
        """Route loops, `~` and literal containers through the environment, which counts and bounds them."""

        def through(self, method: str, *arguments: Any) -> nodes.Call:
            return nodes.Call(nodes.EnvironmentAttribute(method), list(arguments), [], None, None)

        def visit_For(self, node: nodes.For) -> nodes.Node:
            self.generic_visit(node)
            node.iter = self.through("looped", node.iter)
            return node

        def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
            self.generic_visit(node)
            return self.through("tilde", *node.nodes)

        def visit_container(self, node: Any) -> nodes.Node:
            self.generic_visit(node)
            return node if getattr(node, "ctx", "load") == "store" else self.through("bounded", node)

        visit_List = visit_Dict = visit_Tuple = visit_container

    class Generation(Extension):
        """The tag {% generation %}, by which transformers marks what is trained: passed through."""

        tags = {"generation"}  # noqa: RUF012  Jinja's own declaration

        def parse(self, parser: Any) -> Any:
            parser.stream.skip(1)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Sandbox(TierSandbox, ImmutableSandboxedEnvironment):
        rendered = (Macro, LoopContext)

        def __init__(self) -> None:
            super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
            self.finalize = self.written
            builtin = {**self.filters, "tojson": to_json}
            self.filters = {name: self.guarded(name, builtin[name]) for name in FILTERS}
            self.filters["join"] = self.joined
            self.globals.pop("lipsum")

        def compile_metered(self, source: str) -> jinja2.Template:
            return self.from_string(Metered().visit(self.parse(source)))

    return Sandbox


class Template:
    """A compiled template. `render` raises `Refusal` or `TemplateError`, never anything else."""

    def __init__(self, source: str, name: str) -> None:
        self.source, self.name = source, name
        if len(source) > TEMPLATE_SIZE:
            raise TemplateError(f"the template of {name} has {len(source):,} characters: no chat template needs that")
        self._sandbox: Any = sandbox_class()()
        try:
            self._compiled = self._sandbox.compile_metered(source)
        except Exception as error:
            raise TemplateError(
                f"the template of {name} does not parse: {one_line(error)}: give another with --template"
            ) from error

    def mentions(self, word: str) -> bool:
        """Tell whether the template uses this name, as a variable or as a role."""
        from jinja2 import nodes

        tree = self._sandbox.parse(self.source)
        names = {node.name for node in tree.find_all(nodes.Name)}
        return word in names | {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}

    def render(self, **variables: Any) -> TierText:
        """Render within the budget.

        Raises:
            Refusal: the template called `raise_exception`.
            TemplateError: it failed, or spent more than its budget.
        """

        def raise_exception(message: Any) -> None:
            raise Refusal(one_line(message))

        def strftime_now(pattern: str) -> str:
            return time.strftime(pattern)

        self._sandbox.begin()
        try:
            text = self._compiled.render(**variables, raise_exception=raise_exception, strftime_now=strftime_now)
        except Refusal:
            raise
        except RecursionError:
            raise TemplateError(
                f"the template of {self.name} nests without end: give another with --template"
            ) from None
        except Exception as error:
            hostile = type(error).__name__ in ("OverBudget", "SecurityError", "MemoryError")
            kind = TemplateError if hostile else TemplateFailure
            raise kind(
                f"the template of {self.name} failed: {one_line(error)}: give another with --template"
            ) from error
        return join_text([text])


# =====================================================================================================================
#  6  Rendering
# =====================================================================================================================


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
        return digest([*(one.source for one in (self.template, self.meta_prompt, self.reminder)), self.native])


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


# =====================================================================================================================
#  7  Tier-safe tokens
# =====================================================================================================================
# Text in a tier is data. The rendered prompt is cut at the special tokens of its scaffold, and only there; what lies
# between is tokenised in one piece (as the reference does) with special tokens off; then the ids are checked.

ATTR_UNKNOWN, ATTR_UNUSED, ATTR_NORMAL, ATTR_CONTROL, ATTR_USER_DEFINED, ATTR_BYTE = 1, 2, 4, 8, 16, 32  # llama.h
ATTR_LSTRIP, ATTR_RSTRIP = 128, 256
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
#  8  Files and folders
# =====================================================================================================================


@functools.cache
def part(name: str) -> ModuleType:
    """Import one of the folders beside this file, as installed or, in a bare checkout, under the same module name."""
    module_name, folder = f"metaalign_edge_{name}", checkout_folder(name)
    if not folder or module_name in sys.modules:
        return importlib.import_module(module_name)
    spec = importlib.util.spec_from_file_location(
        module_name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec and spec.loader
    sys.modules.setdefault("metaalign_edge", sys.modules[__name__])  # as a script it is __main__
    module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def checkout_folder(name: str) -> Path | None:
    """Return a part's folder beside this file; None where the parts are installed."""
    folder = Path(__file__).resolve().parent / name
    checkout = folder.with_name("pyproject.toml").is_file() and (folder / "__init__.py").is_file()
    return folder if checkout else None


def part_folder(name: str) -> Path:
    """Return the folder of a part, which is not imported for that."""
    if folder := checkout_folder(name):
        return folder
    spec = importlib.util.find_spec(f"metaalign_edge_{name}")
    assert spec and spec.origin
    return Path(spec.origin).parent


def system_folder(kind: Literal["cache", "config", "data"]) -> Path:
    """Return where this system keeps a program's files of a kind; a user without a home has none that exists."""
    from platformdirs import PlatformDirs

    folder = Path(getattr(PlatformDirs("metaalign-edge", appauthor=False), f"user_{kind}_dir"))
    return folder if folder.is_absolute() else Path(os.devnull) / "metaalign-edge"


def cache_folder() -> Path:
    """Return the folder for what can be made again: METAALIGN_EDGE_CACHE, else the system's."""
    return Path(os.environ.get("METAALIGN_EDGE_CACHE") or system_folder("cache"))


def config_folder() -> Path:
    """Return the folder for what the user decides: METAALIGN_EDGE_CONFIG, else the system's."""
    return Path(os.environ.get("METAALIGN_EDGE_CONFIG") or system_folder("config"))


def data_folder() -> Path:
    """Return the folder for what was said: METAALIGN_EDGE_DATA, else the system's."""
    return Path(os.environ.get("METAALIGN_EDGE_DATA") or system_folder("data"))


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that other processes of this program wait for; it is named after a file, and lies beside it.

    Raises:
        OSError: the folder cannot be written.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("a+b") as file:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)  # type: ignore[attr-defined]  # released with the file
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def replacing(path: Path, keep: bool = True) -> Iterator[Path]:
    """Yield the path to write to; what is written gets its own name at the end, or is removed if it fails.

    A pipe, a terminal or `/dev/null` is written as it is: it must not be replaced by a file.

    Raises:
        OSError: it is a folder, or cannot be given its name.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        yield path
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    sweep(path.parent, f".{glob.escape(path.name)}.*")
    try:
        yield temporary
        if keep:
            os.replace(temporary, path)
    except OSError as error:
        if error.filename == str(temporary):  # say the name that the user knows
            error.filename = str(path)
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def sweep(folder: Path, pattern: str) -> None:
    """Remove what killed processes left of their writing; an hour old, it is nobody's any more."""
    for left in folder.glob(pattern):
        with contextlib.suppress(OSError):
            if left.suffix[1:].isdecimal() and left.lstat().st_mtime < time.time() - 3600:
                left.unlink()


def room_at(folder: Path) -> tuple[Path, int]:
    """Return a folder, or the nearest one above it that exists, and how many bytes are free there."""
    there = next((one for one in (folder, *folder.parents) if one.exists()), Path(os.sep))
    return there, shutil.disk_usage(there).free


def from_bytes(data: bytes) -> str:
    """Decode a text that may come from Windows: with a byte order mark, and two characters at the end of a line.

    Raises:
        UnicodeDecodeError: it is not UTF-8.
    """
    return data.decode("utf-8-sig").replace("\r\n", "\n")


def read_text(path: Path, what: str) -> str:
    """Read a user's text file.

    Raises:
        NotFound: it is not there or not readable. UsageError: it is not UTF-8.
    """
    try:
        return from_bytes(path.read_bytes())
    except UnicodeDecodeError as error:
        raise UsageError(f"{what} {path} is not UTF-8 text (byte {error.start}): re-encode it") from None
    except OSError as error:
        raise NotFound(f"cannot read {what} {path}: {error.strerror}") from None


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all, where a link at its place leads, and with the rights it had.

    Raises:
        OSError: it cannot be written.
    """
    path = path.resolve()
    with replacing(path) as part:
        part.write_bytes(text.encode())
        if path.exists():
            shutil.copymode(path, part)


def write_whole(path: Path, data: bytes | None) -> None:
    """Write a file that is there whole or not at all; None only tries.

    Raises:
        CannotWrite: it cannot be written.
    """
    try:
        with replacing(path, keep=data is not None) as part:
            if data is not None or part != path:  # a pipe would wait for its reader
                part.write_bytes(data or b"")
    except OSError as error:
        raise CannotWrite(f"cannot write {path}: {error.strerror}") from None


def file_name(name: str, what: str) -> str:
    """Return a name that the user gives to something which is kept in a file.

    Raises:
        UsageError: a file could not have that name on every system.
    """
    if not re.fullmatch(r"\w[\w.-]{,49}", name):
        rule = "letters, digits, _ . and -, 50 at most, neither a dot nor a dash first"
        raise UsageError(f"{name!r} cannot name a {what}: {rule}")
    if re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name, re.IGNORECASE):
        raise UsageError(f"{name!r} cannot name a {what}: Windows keeps that name for a device; choose another")
    return name


def looks_like_path(name: str, suffix: str) -> bool:
    """Tell whether a name is meant as a path."""
    return "/" in name or os.sep in name or name.startswith((".", "~")) or name.endswith(suffix) or os.path.isfile(name)


# =====================================================================================================================
#  9  States on disk
# =====================================================================================================================
# What a model has read of a meta-prompt is kept, so that the next call need not read it. Each file tells by a checksum
# whether it is whole; a call that finds none, or a damaged one, reads the meta-prompt itself.

STATE_MAGIC = b"MAEKV\x00\x00\x01"  # of a file that holds a state, with the version of its layout
STATE_HEAD = struct.Struct("<8sQ32s")  # magic, hits, digest of what follows
STATES_BYTES = 1 << 30  # of all files together; the least recently used go first


class StateFile(NamedTuple):
    """A state on the disk."""

    path: Path
    bytes: int
    used: float  # when, in seconds since 1970
    hits: int


class States:
    """KV states of prompts' beginnings on disk: what took seconds to compute is there in milliseconds.

    A file is named after a digest of all that
    decides its content. One that is cut, altered or foreign is removed and never trusted; where nothing can be written,
    nothing is kept. They hold what was said, in a form: no other user may read them. `fills` is off where there are
    only some to be read.
    """

    def __init__(self, folder: Path | None = None, most: int = STATES_BYTES, fills: bool = True) -> None:
        self.folder, self.most, self.fills = folder or cache_folder() / "states", most, fills

    @STOPWATCH("states")
    def load(self, key: str) -> bytearray | None:
        """Return a state, and count the hit; None if there is none."""
        path = self.folder / f"{key}.kv"
        try:
            with path.open("r+b", buffering=0) as file:
                head = file.read(STATE_HEAD.size)
                data = bytearray(max(0, os.fstat(file.fileno()).st_size - STATE_HEAD.size))
                file.readinto(data)
                magic, hits, checksum = STATE_HEAD.unpack(head) if len(head) == STATE_HEAD.size else (b"", 0, b"")
                if magic == STATE_MAGIC and checksum == state_checksum(key, data):
                    file.seek(0)
                    file.write(STATE_HEAD.pack(magic, hits + 1, checksum))  # its time is now, too
                    return data
            path.unlink()
        except OSError:
            pass
        return None

    def has(self, key: str) -> bool:
        """Tell whether there is a file of that name."""
        return (self.folder / f"{key}.kv").exists()

    @STOPWATCH("states")
    def save(self, key: str, data: bytes | bytearray) -> None:
        """Write a state, whole or not at all, and make room for it; a disk that is full loses nothing but time."""
        if STATE_HEAD.size + len(data) > self.most:
            return
        with contextlib.suppress(OSError):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with (
                replacing(self.folder / f"{key}.kv") as part,
                os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | BINARY, 0o600), "wb") as file,
            ):
                file.write(STATE_HEAD.pack(STATE_MAGIC, 0, state_checksum(key, data)))
                file.write(data)
            self._evict()

    def files(self) -> list[StateFile]:
        """List the states, the most recently used first."""
        found = []
        with contextlib.suppress(OSError):
            for path in self.folder.glob("*.kv"):
                with contextlib.suppress(OSError, struct.error), path.open("rb") as file:
                    stat = os.fstat(file.fileno())
                    hits = STATE_HEAD.unpack(file.read(STATE_HEAD.size))[1]
                    found.append(StateFile(path, stat.st_size, stat.st_mtime, hits))
        return sorted(found, key=lambda file: -file.used)

    def _evict(self) -> None:
        """Remove the least recently used beyond the limit, and what a killed process left."""
        total = 0
        for file in self.files():
            total += file.bytes
            if total > self.most:
                file.path.unlink(missing_ok=True)
        sweep(self.folder, ".*")

    def clear(self) -> int:
        """Remove all states; return how many there were.

        Raises:
            CannotWrite: one cannot be removed.
        """
        files = self.files()
        try:
            for path in [*(file.path for file in files), *self.folder.glob(".*"), *self.folder.glob("*.kv")]:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise CannotWrite(f"cannot remove {error.filename}: {error.strerror}") from None
        return len(files)


def state_checksum(key: str, data: bytes | bytearray) -> bytes:
    """Return 32 bytes that stand for a state and the name it is filed under."""
    import hashlib

    checksum = hashlib.sha256(key.encode())  # twice as fast as blake2b where a processor helps
    checksum.update(data)
    return checksum.digest()


# =====================================================================================================================
# 10  Settings and profiles
# =====================================================================================================================
# What the user decides once: TOML for settings, a text file for each profile, and a project's own file.

Value = str | int | float | bool | list[str]  # of a setting in a file
PROJECT_KEYS = ("system", "pref", "model")  # nothing that runs code or reads another file


def config_file() -> Path:
    """Return the file of the user's settings."""
    return config_folder() / "config.toml"


def profiles_folder() -> Path:
    """Return the folder of the user's own profiles: a text file each."""
    return config_folder() / "preferences"


def nearest(word: str, words: Iterable[str], otherwise: str) -> str:
    """Ask whether one of the words was meant that are most like one that does not exist; else say something else."""
    import difflib

    word, spelled = word.casefold(), {one.casefold(): one for one in words}
    found = [one for one in spelled if one.startswith(word[:3]) and (one.startswith(word) or word.startswith(one))]
    found = found or difflib.get_close_matches(word, spelled, cutoff=0.65)
    return f"do you mean {' or '.join(spelled[one] for one in found[:2])}?" if found else otherwise


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file; one that is not there, or in a folder closed to us, says nothing.

    Raises:
        UsageError: it is no TOML, or not UTF-8. NotFound: it cannot be read.
    """
    if not os.path.isfile(path):  # Path.is_file raises in a closed folder
        return {}
    text = read_text(path, "the settings")
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        found: dict[str, Any] = tomllib.loads(text)
        return found
    except (ValueError, RecursionError) as error:
        advice = "mend it (a text stands in quotes), or remove the file"
        raise UsageError(f"{path} is no TOML: {one_line(error)}: {advice}") from None


def read_settings(path: Path, known: Iterable[str]) -> dict[str, Any]:
    """Read the settings in a file, by key; a model's path is found from where the file lies.

    Raises:
        UsageError: it has a key that is not known, or is no TOML. NotFound: it cannot be read.
    """
    found, known = read_toml(path), list(known)
    for key in found:
        if key not in known:
            alike = nearest(key, known, f"it takes {', '.join(known)}")
            raise UsageError(f"{path}: no setting {key!r}: {alike}")
    model = found.get("model")
    if isinstance(model, str):
        place = path.parent / os.path.expanduser(model)
        if model.startswith((".", "~")) or model.endswith(".gguf") or os.path.isfile(place):
            found["model"] = os.path.normpath(place)
    return found


@contextlib.contextmanager
def changing(path: Path) -> Iterator[None]:
    """Hold what the user decides in a file or a folder against other processes, to change it.

    Raises:
        CannotWrite: it cannot be changed.
    """
    try:
        with locked(path):
            yield
    except OSError as error:
        reason = f"{error.strerror} (METAALIGN_EDGE_CONFIG names another folder)"
        raise CannotWrite(f"cannot write {error.filename or path}: {reason}") from None


def setting(key: str) -> Any:
    """Return what the user's file says; None if it says nothing.

    Raises:
        UsageError: it is no TOML. NotFound: it cannot be read.
    """
    return read_toml(config_file()).get(key)


def store_setting(key: str, value: Value | None) -> None:
    """Write a setting to the user's file, or remove it if it is None; comments and all else stay.

    Raises:
        UsageError: the file is no TOML. NotFound: it cannot be read. CannotWrite: it cannot be written.
    """
    import tomlkit  # 50 milliseconds

    path = config_file()
    with changing(path):
        document = tomlkit.document()
        read_toml(path)  # says what is wrong with it, and where
        if os.path.isfile(path):
            document = tomlkit.parse(read_text(path, "the settings"))
        if value is not None:
            document[key] = value
        elif key in document:
            del document[key]
        else:
            return
        write_text(path, tomlkit.dumps(document))


def profile_name(name: str) -> str:
    """Return the name of a profile that is given as `name` or `@name`.

    Raises:
        UsageError: it is none.
    """
    return file_name(name.removeprefix("@"), "profile")


@functools.cache
def built_in_profiles() -> dict[str, str]:
    """Return the profiles that come along: name and text."""
    return read_toml(part_folder("preferences") / "profiles.toml")


def own_profiles() -> list[str]:
    """List the names of the user's own profiles."""
    with contextlib.suppress(OSError):
        names = (path.stem for path in profiles_folder().glob("*.txt"))
        return sorted(name for name in names if re.fullmatch(r"\w[\w.-]*", name))
    return []


def known_profiles() -> list[str]:
    """List the names of all profiles, the user's own and the built-in ones."""
    return sorted({*own_profiles(), *built_in_profiles()})


def own_profile(name: str) -> str | None:
    """Return the text of a profile of the user's own; None if there is none.

    Raises:
        UsageError: it is not UTF-8. NotFound: it cannot be read.
    """
    path = profiles_folder() / f"{name}.txt"
    return read_text(path, "the profile").strip() if os.path.isfile(path) else None


def profile_text(name: str) -> str:
    """Return the text of a profile: the user's own, else the built-in one.

    Raises:
        NotFound: there is none. UsageError: it is empty, or not UTF-8.
    """
    text = own_profile(name)
    if text is None:
        built_in = built_in_profiles()
        if name not in built_in:
            alike = nearest(f"@{name}", [f"@{one}" for one in known_profiles()], "`metaalign-edge pref list` shows all")
            raise NotFound(f"no preference profile @{name}: {alike}")
        text = built_in[name]
    if not text:
        raise UsageError(
            f"the profile {profiles_folder() / name}.txt is empty: fill it with `metaalign-edge pref edit {name}`"
        )
    return text


def expand_profile(wish: str) -> str:
    """Return the text of a profile, `@name`, or of several, `@one+@two`; any other wish as it is.

    Raises:
        NotFound: there is no such profile. UsageError: it is empty, or not UTF-8.
    """
    names = profile_names(wish)
    return "\n".join(map(profile_text, names)) if names else wish


def profile_names(wish: str) -> list[str]:
    """List the profiles that a wish names, `@one+@two`; none if it is a text."""
    return wish[1:].split("+@") if re.fullmatch(r"@[\w.-]+(\+@[\w.-]+)*", wish) else []


def store_profile(name: str, text: str, before: str | None = None, force: bool = False) -> None:
    """Write a profile of the user's own in place of the text `before` (None: there is none yet), or of any by force.

    Raises:
        UsageError: the text is empty or not UTF-8, or another one stands there. CannotWrite: it cannot be written.
    """
    text = Dialog(user_info=text).user_info.replace("\r\n", "\n").strip()
    if not text:
        raise UsageError(f"the text of @{name} is empty: say what you prefer")
    with changing(profiles_folder()):
        profiles_folder().mkdir(mode=0o700, exist_ok=True)
        for other in known_profiles():
            if other != name and other.casefold() == name.casefold():
                raise UsageError(f"there is @{other}, which is the same file on some systems: choose another name")
        if not force and own_profile(name) != before:
            raise UsageError(
                f"there is a profile @{name} already: --force replaces it"
                if before is None
                else f"another process changed @{name} meanwhile, so it stays as that left it"
            )
        write_text(profiles_folder() / f"{name}.txt", text + "\n")


def remove_profiles(names: Sequence[str]) -> None:
    """Remove profiles of the user's own: all of them, or none if one is not there.

    Raises:
        UsageError: one is built in. NotFound: there is none. CannotWrite: one cannot be removed.
    """
    with changing(profiles_folder()):
        for name in names:
            if name in own_profiles():
                continue
            if name in built_in_profiles():
                raise UsageError(f"@{name} is built in and stays; an own profile of that name would win over it")
            alike = nearest(f"@{name}", [f"@{one}" for one in own_profiles()], "`metaalign-edge pref list` shows all")
            raise NotFound(f"no preference profile @{name} of your own: {alike}")
        for name in names:
            (profiles_folder() / f"{name}.txt").unlink(missing_ok=True)


class Project(NamedTuple):
    """What the nearest `.metaalign.toml` says, upwards from the working folder."""

    path: Path
    settings: dict[str, Any]
    owner: int | None  # the id of another user, whose file it is; None: the user's own

    def is_known(self) -> bool:
        """Tell whether the user has been told what it sets, and it has set that since."""
        with contextlib.suppress(OSError):
            return self.owner is None and self._memory().read_bytes() == self._digest().encode()
        return False

    def remember(self) -> None:
        """Remember that the user has been told; where nothing can be written, it is told again."""
        with contextlib.suppress(OSError):
            self._memory().parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_text(self._memory(), self._digest())

    def _memory(self) -> Path:
        return data_folder() / "projects" / digest(os.fsencode(self.path).hex())

    def _digest(self) -> str:
        return digest(repr(self.settings))


def find_project() -> Project | None:
    """Find the project that the working folder lies in; METAALIGN_EDGE_PROJECT=0 finds none.

    Raises:
        UsageError: its file has a key that means nothing, or is no TOML. NotFound: it cannot be read.
    """
    if os.environ.get("METAALIGN_EDGE_PROJECT") == "0":
        return None
    try:
        here = Path.cwd()
    except OSError:  # the working folder has been removed
        return None
    for folder in (here, *here.parents):
        path = folder / ".metaalign.toml"
        if os.path.isfile(path):
            owner = path.stat().st_uid
            mine = not hasattr(os, "geteuid") or owner == os.geteuid()  # Windows has no such ids
            return Project(path, read_settings(path, PROJECT_KEYS), None if mine else owner)
    return None


# =====================================================================================================================
# 11  Sessions on disk
# =====================================================================================================================
# A session is JSON Lines: what was said, a line a turn, each on the disk before the next one is asked for.

STAMP = "%Y-%m-%dT%H:%M:%SZ"  # of times in a session's file
SESSION_VERSION = 1  # of the lines of a session's file
LINE_TEXTS = {"meta_prompt": ("system_info", "user_info"), "turn": ("query", "response")}  # that such a line must have
Line = dict[str, Any]


def session_path(name: str) -> Path:
    """Return where the session of this name lies, or will.

    Raises:
        UsageError: it is no name.
    """
    return data_folder() / "sessions" / f"{file_name(name, 'session')}.jsonl"


def session_paths() -> list[Path]:
    """List the sessions, the one that was used last first."""
    used = {}
    for path in (data_folder() / "sessions").glob("*.jsonl"):
        with contextlib.suppress(OSError):
            used[path] = path.stat().st_mtime_ns
    return sorted(used, key=lambda path: (-used[path], path))


def session_names() -> list[str]:
    """List the sessions, the one that was used last first."""
    return [path.stem for path in session_paths()]


def existing_session(name: str) -> Path:
    """Return where the session of this name lies.

    Raises:
        UsageError: it is no name. NotFound: there is none.
    """
    path, names = session_path(name), session_names()
    if not path.is_file():
        hint = nearest(name, names, f"there are {', '.join(names) or 'none yet'}")
        raise NotFound(f"no session {name}: {hint}")
    return path


def session_line(text: bytes) -> Line:
    """Read a line of a session.

    Raises:
        ValueError: it is none; says why.
    """
    line = json.loads(text)
    if not isinstance(line, dict):
        raise ValueError("no JSON object")
    for name in LINE_TEXTS.get(str(line.get("kind")), ()):
        if not isinstance(line.get(name), str):
            raise ValueError(f"its {name} is no text")
        line[name].encode()  # a lone surrogate is none, either
    return line


class Transcript:
    """What was said in a conversation, as lines of JSON; with a path, they are a session, kept in that file.

    After a header there is a `meta_prompt` line wherever System Info or User Info changed, a `turn` line for each
    answer, and a `clear` line where the turns before were to be forgotten; an answer that was given anew says what it
    `replaces`. Other lines and fields are left alone. A file is only appended to, whole lines at a time.
    """

    def __init__(self, path: Path | None = None, lines: Iterable[Line] = ()) -> None:
        self.path, self.lines = path, list(lines)
        self._saved = len(self.lines)  # of them, those that are on the disk
        if not self.lines:
            self._add("session", version=SESSION_VERSION, toolkit=f"metaalign-edge {__version__}")

    @classmethod
    def read(cls, path: Path) -> Transcript:
        """Read a session; where there is no file it has yet to begin. A last line that was torn off does not count.

        Raises:
            UsageError: a line is spoilt, or the file is a newer program's. NotFound: it cannot be read.
        """
        try:
            *whole, torn = path.read_bytes().split(b"\n")
        except (FileNotFoundError, NotADirectoryError):
            return cls(path)
        except OSError as error:
            raise NotFound(f"cannot read the session {path}: {error.strerror}") from None
        lines = []
        for number, text in enumerate(whole, 1):
            try:
                lines += [session_line(text)] if text.strip() else []
            except (ValueError, RecursionError) as error:
                raise UsageError(
                    f"line {number} of the session {path} is spoilt ({one_line(error)}): mend or delete that line, and "
                    "the session goes on; all other lines are as they were"
                ) from None
        with contextlib.suppress(ValueError, RecursionError):
            lines.append(session_line(torn))
        if lines and (lines[0].get("kind"), lines[0].get("version")) != ("session", SESSION_VERSION):
            raise UsageError(
                f"{path} does not begin with the header of a session of version {SESSION_VERSION}: put its first line "
                "back, or update this program if a newer one wrote it"
            )
        return cls(path, lines)

    @property
    def name(self) -> str | None:
        """The session's name, if it is one."""
        return self.path.stem if self.path else None

    @property
    def meta_prompt(self) -> Line:
        """The latest line that says what System Info and User Info are."""
        return self._in_force(self.lines)

    @property
    def label(self) -> str:
        """A short form of the preference in force."""
        return str(self.meta_prompt.get("label", ""))

    @staticmethod
    def _in_force(lines: Sequence[Line]) -> Line:
        nothing = {"kind": "meta_prompt", "system_info": "", "user_info": ""}
        return next((line for line in reversed(lines) if line.get("kind") == "meta_prompt"), nothing)

    def turns(self) -> list[Line]:
        """Return the turns that stand, each with the meta-prompt it was given under and whether it is `forgotten`."""
        found: dict[str, Line] = {}
        tiers = self._in_force(())
        for place, line in enumerate(self.lines):
            if line.get("kind") == "meta_prompt":
                tiers = {name: line[name] for name in LINE_TEXTS["meta_prompt"]}
            elif line.get("kind") == "clear":
                found = {name: {**turn, "forgotten": True} for name, turn in found.items()}
            elif line.get("kind") == "turn":
                found.pop(str(line.get("replaces")), None)
                name = str(line.get("id", place))
                found[name] = {**line, **tiers, "id": name, "forgotten": False}
        return list(found.values())

    def dialog(self, query: str | None = None, again: bool = False) -> Dialog:
        """Return what is said so far, with a query if there is one; `again` in the place of the last turn."""
        turns = [Turn(turn["query"], turn["response"]) for turn in self.turns() if not turn["forgotten"]]
        turns = turns[: len(turns) - again] + ([] if query is None else [Turn(query)])
        return Dialog(self.meta_prompt["system_info"], self.meta_prompt["user_info"], tuple(turns))

    def set(self, system_info: str, user_info: str, label: str) -> None:
        """Note the meta-prompt, where it changes."""
        latest = self.meta_prompt
        if (latest["system_info"], latest["user_info"]) != (system_info, user_info):
            self._add("meta_prompt", system_info=system_info, user_info=user_info, label=label)

    def add(self, answer: Mapping[str, Any], again: bool = False) -> None:
        """Note an answer and its figures; `again` in the place of the last turn."""
        figures = {name: value for name, value in answer.items() if name not in LINE_TEXTS["meta_prompt"]}
        replaces = {"replaces": self.turns()[-1]["id"]} if again else {}
        self._add("turn", id=os.urandom(6).hex(), **replaces, **figures)

    def clear(self) -> None:
        """Note that the turns so far are to be forgotten."""
        self._add("clear")

    def _add(self, kind: str, **fields: Any) -> None:
        self.lines.append({"kind": kind, "at": time.strftime(STAMP, time.gmtime()), **fields})

    def save(self) -> None:
        """Bring what is new to the disk, if this is a session. What fails is tried again the next time.

        Raises:
            CannotWrite: the disk is full, or cannot be written.
        """
        if self.path is None or self._saved == len(self.lines) or len(self.lines) == 1:  # a header alone says nothing
            return
        try:
            with locked(self.path.parent):  # one lock for all: nothing is left of a session that is removed
                self.path.parent.mkdir(mode=0o700, exist_ok=True)
                with open(self.path, "a+b", 0, opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
                    self._append(file)
        except OSError as error:
            raise CannotWrite(
                f"cannot write the session {self.path}: {error.strerror} (METAALIGN_EDGE_DATA names another folder)"
            ) from None
        self._saved = len(self.lines)

    def _append(self, file: io.FileIO) -> None:
        """Write the new lines, or all where the file is empty, after the last whole line, or else nothing."""
        file.seek(0)
        whole, newline, torn = file.readall().rpartition(b"\n")
        end, before = len(whole) + len(newline), b""
        if torn:
            try:
                session_line(torn)  # an editor has left out the end of the line
                end, before = end + len(torn), b"\n"
            except (ValueError, RecursionError):
                file.truncate(end)
        new = self.lines[max(self._saved, 1) :] if end else self.lines  # its header is there
        if end:  # another process may have had another meta-prompt meanwhile
            ours, theirs = self._in_force(self.lines[: self._saved]), self._in_force(readable(whole + b"\n" + torn))
            new = [ours, *new] if any(ours[name] != theirs.get(name) for name in LINE_TEXTS["meta_prompt"]) else new
        text = before + b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in new)
        try:
            rest = memoryview(text)
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(end)
            raise


def readable(data: bytes) -> list[Line]:
    """Return those lines of a session that can be read."""
    lines = []
    for text in data.split(b"\n"):
        with contextlib.suppress(ValueError, RecursionError):
            lines.append(session_line(text))
    return lines


# =====================================================================================================================
# 12  Models on disk
# =====================================================================================================================
# A GGUF's metadata is read without llama.cpp, as far as it is asked for; and models are found where programs keep them.


class GGUFArray(NamedTuple):
    """Where an array of a GGUF's metadata lies. Vocabularies have 150,000 strings: they are read when asked for."""

    kind: int
    length: int
    offset: int


PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")  # how llama.cpp ends the name of a part of a GGUF that was split


def parts_of(path: Path) -> list[Path]:
    """List the parts of a GGUF by the name of one of them, the first first; of any other file, itself alone."""
    if not (found := PART.search(path.name)):
        return [path]
    stem, count = path.name[: found.start()], found[2]
    return [path.with_name(f"{stem}-{number:05}-of-{count}.gguf") for number in range(1, int(count) + 1)]


def identity(parts: Iterable[Path]) -> str:
    """Return what changes when one of these files does, without reading them.

    Raises:
        OSError: one is not there.
    """
    stats = [(part.resolve(), part.stat()) for part in parts]
    return "; ".join(f"{path}, {stat.st_size} bytes, {stat.st_mtime_ns}" for path, stat in stats)


class TensorInfo(NamedTuple):
    """What a GGUF says of a tensor."""

    name: str
    shape: tuple[int, ...]
    kind: int  # its ggml type
    offset: int  # from where the weights begin


def is_gguf(path: Path) -> bool:
    """Tell by its first bytes whether a file is a GGUF."""
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


class GGUFReader:
    """Reads a GGUF's metadata from some place on. Each reading has its own: threads may share a file.

    Raises:
        struct.error, UnicodeDecodeError, KeyError, OverflowError: the file is damaged.
    """

    SCALARS: Mapping[int, str] = dict(
        zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), map("<{}".format, "BbHhIif?Qqd"), strict=True)
    )
    STRING, ARRAY = 8, 9

    def __init__(self, data: mmap.mmap, at: int) -> None:
        self._data, self.at = data, at

    def scalar(self, form: str) -> Any:
        """Read a number."""
        (value,) = struct.unpack_from(form, self._data, self.at)
        self.at += struct.calcsize(form)
        return value

    def string(self) -> str:
        """Read a text."""
        length = self.scalar("<Q")
        if self.at + length > len(self._data):
            raise struct.error
        self.at += length
        return self._data[self.at - length : self.at].decode("utf-8")

    def strings(self, length: int) -> Iterator[str]:
        """Read so many texts, 300,000 perhaps."""
        begin, size_at = self.at, struct.Struct("<Q").unpack_from
        self.skip(self.STRING, length)
        data, at = self._data[begin : self.at], 0
        for _ in range(length):
            start = at + 8
            at = start + size_at(data, at)[0]
            yield data[start:at].decode("utf-8")

    def value(self, kind: int) -> Any:
        """Read a value of a kind; of an array, where it lies."""
        if kind == self.STRING:
            return self.string()
        if kind != self.ARRAY:
            return self.scalar(self.SCALARS[kind])
        inner, length = self.scalar("<I"), self.scalar("<Q")
        array = GGUFArray(inner, length, self.at)
        self.skip(inner, length)
        return array

    def skip(self, kind: int, length: int) -> None:
        """Pass over some values of a kind."""
        if kind in self.SCALARS:
            self.at += struct.calcsize(self.SCALARS[kind]) * length
        else:
            if kind == self.ARRAY:
                raise KeyError(kind)
            data, at, size_at = self._data, self.at, struct.Struct("<Q").unpack_from  # for 300,000 strings
            for _ in range(length):
                at += 8 + size_at(data, at)[0]
            self.at = at
        if self.at > len(self._data):
            raise struct.error


class ModelFile:
    """The metadata of a GGUF file, or of one in several parts, read without llama.cpp.

    Raises:
        NotFound: there is no such file. LoadError: it is empty, truncated or no GGUF, or a part is missing.
    """

    def __init__(self, path: Path, number: int = 0) -> None:
        self.path, self.paths = path, [path]
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size == 0:
                    raise LoadError(f"{path} is empty: download or convert it again")
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise NotFound(f"cannot read the model {path}: {error.strerror}") from None
        if self._data[:4] != b"GGUF":
            raise LoadError(f"{path} is not a GGUF file: make one with `metaalign-edge convert`")
        try:
            self.metadata = self._read()
        except (struct.error, UnicodeDecodeError, KeyError, OverflowError):
            raise LoadError(f"{path} is truncated or damaged in its metadata: download or convert it again") from None
        count = self.metadata.get("split.count")
        if isinstance(count, int) and count > 1:
            self._check_parts(count, number)

    def _check_parts(self, count: int, number: int) -> None:
        """Find the other parts; this must be the one of that number, from 0."""
        self.paths, own = parts_of(self.path), self.metadata.get("split.no", 0)
        if len(self.paths) != count:
            raise LoadError(
                f"{self.path} is one of {count} parts: it must be called NAME-{own + 1:05}-of-{count:05}.gguf"
            )
        if own != number:
            raise LoadError(f"{self.path} is part {own + 1} of {count}: give the first, {self.paths[0].name}")
        if missing := [part.name for part in self.paths if not part.is_file()]:
            raise LoadError(f"{self.path} lacks its part {', '.join(missing)}: download it again")

    def _read(self) -> dict[str, Any]:
        reader = GGUFReader(self._data, 4)
        version = reader.scalar("<I")
        if version not in (2, 3):
            raise LoadError(f"{self.path} is GGUF version {version}; 2 and 3 can be read (a big-endian file cannot)")
        self.tensor_count, keys = reader.scalar("<Q"), reader.scalar("<Q")
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = reader.string()
            metadata[key] = reader.value(reader.scalar("<I"))
        self._infos = reader.at
        self._forget_pages()
        return metadata

    def _forget_pages(self) -> None:
        """Let the system take back the pages that were read: they count as this process's, llama.cpp's own besides."""
        if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            self._data.madvise(mmap.MADV_DONTNEED)

    def items(self, key: str) -> Iterator[Any]:
        """Yield the items of an array of strings or numbers; nothing if the key is not there."""
        array = self.metadata.get(key)
        if isinstance(array, GGUFArray):
            reader = GGUFReader(self._data, array.offset)
            if array.kind == reader.STRING:
                yield from reader.strings(array.length)
            else:
                for _ in range(array.length):
                    yield reader.value(array.kind)

    def token(self, name: str) -> str:
        """Return the text of a special token such as `bos`; an empty string if the model names none."""
        index = self.metadata.get(f"tokenizer.ggml.{name}_token_id")
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        if index is None or not isinstance(tokens, GGUFArray) or not 0 <= index < tokens.length:
            return ""
        reader = GGUFReader(self._data, tokens.offset)
        reader.skip(tokens.kind, index)
        text = str(reader.value(tokens.kind))
        self._forget_pages()
        return text

    def number(self, key: str, default: int = 0) -> int:
        """Return a whole number of the architecture's; where it has one for each layer, the largest."""
        key = f"{self.architecture}.{key}"
        values = self.items(key) if isinstance(self.metadata.get(key), GGUFArray) else [self.metadata.get(key)]
        return max((value for value in values if isinstance(value, int) and value >= 0), default=default)

    @property
    def architecture(self) -> str:
        """Return the GGUF name of the architecture."""
        return str(self.metadata.get("general.architecture", "unknown"))

    @property
    def context(self) -> int:
        """Return the number of tokens the model was trained to see."""
        return int(self.metadata.get(f"{self.architecture}.context_length", DEFAULT_CONTEXT))

    @property
    def identity(self) -> str:
        """Return what changes when the file does, or a part of it, without reading it."""
        return identity(self.paths)

    @property
    def bytes(self) -> int:
        """Return the size of all parts."""
        return sum(part.stat().st_size for part in self.paths)

    def tensor_infos(self) -> Iterator[TensorInfo]:
        """Yield what this part says of its tensors.

        Raises:
            LoadError: it is damaged there.
        """
        reader = GGUFReader(self._data, self._infos)
        try:
            for _ in range(self.tensor_count):
                name, dimensions = reader.string(), reader.scalar("<I")
                shape = tuple(reader.scalar("<Q") for _ in range(dimensions))
                yield TensorInfo(name, shape, reader.scalar("<I"), reader.scalar("<Q"))
            self._infos_end = reader.at
        except (struct.error, UnicodeDecodeError, OverflowError):
            raise LoadError(f"{self.path} is truncated or damaged in its list of tensors: download it again") from None

    def _weights(self) -> int:
        """Return where the weights begin, behind the list of tensors, which has just been read."""
        unit = self.metadata.get("general.alignment")
        unit = unit if isinstance(unit, int) and unit > 0 else 32
        return -(-self._infos_end // unit) * unit

    def tensors(self) -> dict[str, int]:
        """Return how many bytes each tensor of this part takes, by its name: as far as the next one, or the end.

        Raises:
            LoadError: their list is damaged.
        """
        infos = sorted(self.tensor_infos(), key=lambda info: info.offset)
        ends = [*(info.offset for info in infos[1:]), len(self._data) - self._weights()]
        return {info.name: max(0, end - info.offset) for info, end in zip(infos, ends, strict=False)}

    def files(self) -> list[ModelFile]:
        """Open all parts."""
        return [self, *(ModelFile(part, number) for number, part in enumerate(self.paths) if number)]

    @property
    def parameters(self) -> int:
        """Return the number of weights, of all parts."""
        return sum(math.prod(tensor.shape) for file in self.files() for tensor in file.tensor_infos())

    @property
    def quantization(self) -> str:
        """Return llama.cpp's name of how most weights are stored."""
        from gguf.constants import LlamaFileType

        try:
            name = LlamaFileType(self.metadata["general.file_type"]).name
        except (KeyError, ValueError):
            return "unknown"
        return name.removeprefix("MOSTLY_").removeprefix("ALL_")

    def check_whole(self) -> None:
        """Make sure that no part ends before its weights do.

        Raises:
            LoadError: one does, or is damaged.
        """
        from gguf.constants import GGML_QUANT_SIZES

        sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
        for file in self.files():
            end = 0
            for tensor in file.tensor_infos():
                block, size = sizes.get(tensor.kind, (1, 0))  # a type of tomorrow
                end = max(end, tensor.offset + math.prod(tensor.shape) // block * size)
            if file._weights() + end > len(file._data):
                raise LoadError(f"{file.path} ends before its weights do: download it again")

    @property
    def purpose(self) -> str:
        """Return what the file is for: `model`, or what else llama.cpp's programs keep in a GGUF."""
        kind, causal = str(self.metadata.get("general.type", "model")), f"{self.architecture}.attention.causal"
        if kind != "model" or self.architecture == "clip":
            return "mmproj" if kind == "model" else kind
        if not self.tensor_count and len(self.paths) == 1:
            return "vocabulary"
        embeds = self.metadata.get(causal) is False or self.metadata.get(f"{self.architecture}.pooling_type")
        return "embedding" if embeds else kind

    @property
    def templates(self) -> dict[str, str]:
        """Return the chat templates in the file by name, the default one first as `default`."""
        prefix = "tokenizer.chat_template"
        found = {"default": self.metadata[prefix]} if prefix in self.metadata else {}
        return found | {
            key[len(prefix) + 1 :]: text for key, text in self.metadata.items() if key.startswith(prefix + ".")
        }


def embedded_model() -> Path:
    """Return the model that comes with the toolkit."""
    return part_folder("models") / "metaalign-demo-q8_0.gguf"


REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(.+))?")  # user/repo[:QUANT], on the hub
QUANTIZATION = re.compile(
    r"(?:^|[-_./])((?:UD-)?(?:I?Q[1-8]|TQ[12]|MXFP4|NVFP4|BF16|FP?16|FP?32)(?:_[A-Z0-9]+)*)(?=[-_./]|$)", re.IGNORECASE
)
SIDE_FILE = re.compile(
    r"(?:^|[-_./])(?:mmproj|imatrix|lora|adapter|embed(?:dings?)?|rerank(?:er)?|c?vector|vocab|mtp|draft)(?=[-_.]|$)",
    re.IGNORECASE,
)


def quantization_of(name: str) -> str:
    """Return the quantisation that a GGUF's name, or its folder's, tells; nothing if none does."""
    found = QUANTIZATION.findall(PART.sub("", name).removesuffix(".gguf"))
    return re.sub("^FP", "F", found[-1].upper()) if found else ""


def is_main_part(name: str) -> bool:
    """Tell by its name whether a file is a model, or the first part of one: no projector, adapter or the like."""
    part = PART.search(name)
    own = Path(name).name
    plain = own.lower().endswith(".gguf") and not own.startswith(".") and not SIDE_FILE.search(own)
    return plain and (part is None or int(part[1]) == 1)


def hub_folder() -> Path:
    """Return the hub's own cache, where huggingface_hub finds it, too; importing that takes a fifth of a second."""
    get = os.environ.get
    home = get("HF_HOME") or os.path.join(get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    named = get("HF_HUB_CACHE") or get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    folder = os.path.expandvars(os.path.expanduser(named))
    return Path(os.devnull if folder.startswith("~") else folder)  # a user without a home has none


def other_folders() -> list[Path]:
    """List where llama.cpp's own programs and LM Studio keep GGUFs."""
    from platformdirs import PlatformDirs

    llama = os.environ.get("LLAMA_CACHE") or os.path.join(PlatformDirs(opinion=False).user_cache_dir, "llama.cpp")
    places = [llama, "~/.lmstudio/models", "~/.cache/lm-studio/models"]
    return [Path(os.path.expanduser(place)) for place in places]


class Stored(NamedTuple):
    """A model that lies on this machine."""

    name: str  # as -m takes it: user/repo:QUANT, or the file's name without .gguf
    path: Path  # of its first part
    repository: str = ""  # user/repo, if the folder tells
    file: str = ""  # its name there
    in_hub: bool = False  # in the hub's own cache; other programs' folders are only read


def stored_models() -> list[Stored]:
    """List the models in the hub's cache, in other programs' folders, and the embedded one. No file is opened."""
    found: list[Stored] = []
    for folder in dict.fromkeys([hub_folder(), *other_folders()]):
        found += models_within(folder, in_hub=folder == hub_folder())
    files = {(one.repository, one.file) for one in found}
    alike = Counter((repository, quantization_of(file)) for repository, file in files)
    named: dict[str, Stored] = {}
    for one in found:
        tag = quantization_of(one.file)
        alone = tag and alike[one.repository, tag] == 1
        name = f"{one.repository}:{tag if alone else one.file}" if one.repository else one.path.stem
        name = name if name not in named else str(one.path)
        named[name] = one._replace(name=name)
    return [*named.values(), Stored("metaalign-demo", embedded_model())]


NO_MODELS = (".", "datasets--", "spaces--", "kernels--")  # how folders begin that are not looked into


def modified(path: Path) -> float:
    """Return when a file, or a link to one, was made, in seconds since 1970; 0 if it has gone meanwhile."""
    with contextlib.suppress(OSError):
        return path.lstat().st_mtime
    return 0.0


def models_within(folder: Path, in_hub: bool) -> list[Stored]:
    """List the models below a folder: of each file of a repository in the hub's cache, the newest version."""
    found: dict[tuple[str, str], Stored] = {}
    for place, below, names in os.walk(folder):
        below[:] = sorted(name for name in below if name not in ("blobs", "refs") and not name.startswith(NO_MODELS))
        for name in sorted(filter(is_main_part, names)):
            path = Path(place) / name
            repository, file = "", name
            parts = path.relative_to(folder).parts
            if parts[0].startswith("models--") and parts[1:2] == ("snapshots",) and len(parts) > 3:
                repository, file = parts[0].removeprefix("models--").replace("--", "/"), "/".join(parts[3:])
            elif len(parts) > 2:  # LM Studio's publisher/repository/file
                repository, file = "/".join(parts[:2]), "/".join(parts[2:])
            key = (repository, file) if repository else ("", str(path))
            if key not in found or modified(path) >= modified(found[key].path):
                found[key] = Stored("", path, repository, file, in_hub)
    return list(found.values())


def model_names() -> list[str]:
    """List the names that -m takes for the models on this machine."""
    return [one.name for one in stored_models()]


def name_of(path: Path) -> str:
    """Return the name of a model that lies there; a path that none is listed with is its own."""
    return next((one.name for one in stored_models() if one.path.absolute() == path.absolute()), str(path))


def stored_as(wanted: str) -> list[Stored]:
    """List the models that a name or user/repo[:QUANT] means, of those on this machine; the newest first."""
    models, low = stored_models(), wanted.lower()
    exact = [one for one in models if one.name.lower() == low]
    repository, _, tag = low.partition(":")
    found = exact or [
        one
        for one in models
        if one.repository.lower() == repository
        and (not tag or tag in (quantization_of(one.file).lower(), one.file.lower(), Path(one.file).name.lower()))
    ]
    return sorted(found, key=lambda one: -modified(one.path))


def resolve_model(name: str | None) -> Path | None:
    """Find a model's file on this machine: the default, a path, user/repo[:QUANT], or a name that `models list` shows.

    None: it names a repository of the hub, and nothing of it is here.

    Raises:
        NotFound: there is no such file, and no such name.
    """
    if not name:
        chosen = setting("model")
        return resolve_model(chosen) if chosen else embedded_model()
    path, repository = Path(name).expanduser(), REPOSITORY.fullmatch(name)
    if os.path.isfile(path):  # Path.is_file raises if the name is too long, or its folder closed
        return path
    if os.path.isdir(path):
        raise NotFound(
            f"{name} is a folder: convert a checkpoint with `metaalign-edge convert {name}`, or give a GGUF file"
        )
    if (repository and (repository[2] or not name.endswith(".gguf"))) or not looks_like_path(name, ".gguf"):
        if found := stored_as(name):
            return found[0].path
        if repository:
            return None
        hint = nearest(name, model_names(), "`metaalign-edge models list` shows what there is")
        raise NotFound(f"no model file and no model {name}: {hint}")
    raise NotFound(f"no model file {name}: give the path of a GGUF file, or leave -m out for the default model")


# =====================================================================================================================
# 13  Templates and schemas
# =====================================================================================================================


def shipped_templates() -> dict[str, Path]:
    """Return the chat templates that come with the toolkit, by name."""
    own = ("meta_prompt", "reminder", "report.html")
    return {path.stem: path for path in sorted(part_folder("templates").glob("*.jinja")) if path.stem not in own}


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
    elif looks_like_path(name, ".jinja"):
        source, label, why = read_text(Path(name).expanduser(), "the template"), name, "the file given by --template"
    elif name in shipped:
        source, label, why = read_text(shipped[name], "the template"), name, "named by --template"
    elif name in embedded:
        source, label, why = embedded[name], name, "named by --template, carried by the model"
    else:
        raise UsageError(f"no template {name!r}: choose from auto, {choices}, or give a file")
    template = Template(source, str(model.path) if label == "embedded" else label)
    if native is None:
        native = template.mentions("user_info")
    meta_prompt, reminder = (
        Template(read_text(part_folder("templates") / f"{own}.jinja", "the template"), own)
        for own in ("meta_prompt", "reminder")
    )
    return ChatTemplate(template, native, label, why, meta_prompt, reminder, model.token("bos"), model.token("eos"))


@dataclass(frozen=True)
class Schema:
    """What an answer has to fit."""

    document: dict[str, Any]  # JSON Schema
    grammar: str  # the same for llama.cpp
    left: tuple[str, ...]  # what the grammar cannot say, and only the check of the answer sees


def read_schema(text: str) -> Schema:
    """Read a schema: a file's, JSON, or the short form `name, age int`.

    Raises:
        NotFound: the file is not there. UsageError: it is no JSON, or no schema that an answer can fit.
    """
    inline = text.lstrip().startswith("{")
    file = not inline and (looks_like_path(text, ".json") if not re.search(r"[\s,]", text) else text.endswith(".json"))
    if not (inline or file):
        return expand_schema(text)
    if file:
        return parse_schema(read_text(Path(text).expanduser(), "the schema"), f"the schema {text}")
    return parse_schema(text)


def parse_schema(text: str, where: str = "the schema") -> Schema:
    """Read a schema that is JSON.

    Raises:
        UsageError: it is none, or no schema that an answer can fit.
    """
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where} is no JSON: {error.msg} (line {error.lineno}, column {error.colno})") from None
    except RecursionError:
        raise UsageError(f"{where} nests too deep") from None
    except ValueError as error:  # a number of thousands of digits
        raise UsageError(f"{where} cannot be used: {one_line(error)}") from None
    return make_schema(document, where)


def expand_schema(text: str) -> Schema:
    """Read the short form of a schema.

    Raises:
        UsageError: it is none.
    """
    try:
        document = part("schema").expand(text)
    except part("schema").InvalidSchema as error:
        raise UsageError(f"the schema's short form: {one_line(error)}") from None
    return make_schema(document)


def make_schema(document: Any, where: str = "the schema") -> Schema:
    """Turn a JSON Schema into a grammar.

    Raises:
        UsageError: it is none, or no answer can fit it.
    """
    schemas = part("schema")
    try:
        schemas.check_schema(document)
        grammar = schemas.convert(document)
    except (ValueError, OverflowError, RecursionError) as error:  # an InvalidSchema, or NaN for a number
        raise UsageError(f"{where} cannot be used: {one_line(error)}") from None
    return Schema(document, grammar.text, tuple(grammar.left))


# =====================================================================================================================
# 14  Memory
# =====================================================================================================================
# Will it fit? What a model takes is computed from its file's metadata, before anything is loaded: the weights and the
# KV cache to the byte, what llama.cpp computes in to some per cent. Which layer goes where is llama.cpp's own rule.

SPARE = 1 << 29  # bytes of a GPU that -ngl auto leaves free: for its driver, and for what others take meanwhile
SHARE = 0.9  # of what is free that -c auto, and advice, use
CELLS = 256  # tokens; llama.cpp makes a context a multiple of it
MOST_LAYERS = 512  # that llama.cpp loads
UNFORETOLD = (  # what architectures have whose cache is of another kind: compressed, shared by layers, recurrent
    "attention.kv_lora_rank attention.key_length_swa attention.shared_kv_layers attention.indexer.head_count "
    "attention.recurrent_layers nextn_predict_layers ssm.state_size wkv.head_size kda.head_dim altup.num_inputs"
).split()


class Device(NamedTuple):
    """A device of llama.cpp's."""

    name: str
    description: str
    kind: int  # 0 is the CPU, 1 a GPU, 2 one that shares main memory (ggml-backend.h)
    free: int  # bytes, here and below
    total: int


class Need(NamedTuple):
    """What a place has to hold."""

    weights: int
    cache: int  # keys and values, and states that do not grow
    compute: int  # numbers between layers, and logits


def cache_bytes(file: ModelFile) -> tuple[int, ...] | None:
    """Return what a token takes in the KV cache, layer by layer, in bytes: keys and values, 16 bits a number.

    A sliding window saves nothing: we let llama.cpp keep all tokens, so that a conversation can be cut anywhere.
    None where it is not foretold: caches that are compressed, or shared by layers, and most recurrent states.
    """
    if any(f"{file.architecture}.{key}" in file.metadata for key in UNFORETOLD):
        return None
    layers, heads = min(file.number("block_count"), MOST_LAYERS), file.number("attention.head_count", 1)
    each = file.number("embedding_length") // max(1, heads)
    width = file.number("attention.key_length", each) + file.number("attention.value_length", each)
    by_layer = [count for count in file.items(f"{file.architecture}.attention.head_count_kv") if isinstance(count, int)]
    if len(by_layer) != layers:
        by_layer = [file.number("attention.head_count_kv", heads)] * layers
    return tuple(2 * width * count for count in by_layer)


def state_bytes(file: ModelFile, cache: Sequence[int]) -> tuple[int, ...]:
    """Return what a sequence takes however long it is, layer by layer, in bytes: the inputs of a convolution (LFM2)."""
    state = 4 * max(0, file.number("shortconv.l_cache") - 1) * file.number("embedding_length")
    return tuple(0 if grows else state for grows in cache)


def step_numbers(file: ModelFile) -> int:
    """Return how many 32-bit numbers llama.cpp keeps of a token while it computes, at most: found by trying.

    The widest place of a layer decides: its feed-forward network, what its experts say together, or its attention.
    """
    width, heads = file.number("embedding_length"), file.number("attention.head_count", 1)
    each = file.number("attention.key_length", width // max(1, heads))
    queries, keys = heads * each, file.number("attention.head_count_kv", heads) * each
    experts, inner = file.number("expert_used_count"), file.number("feed_forward_length")
    expert = file.number("expert_feed_forward_length", inner)
    forward = 3 * max(inner, experts * expert) + 3 * width + max(width, queries)
    return max(forward, 2 * experts * (width + expert), 2 * (queries + keys + 2 * width))


@dataclass(frozen=True)
class Footprint:
    """What decides how much memory a model takes."""

    weights: tuple[int, ...]  # bytes of each layer and, last, of the output
    embedding: int  # bytes of the input's weights, which stay in main memory
    tied: bool  # the output multiplies by them, too
    cache: tuple[int, ...]  # bytes of a token, by layer
    states: tuple[int, ...]  # bytes of a sequence, by layer
    foretold: bool  # those are known; otherwise they count as nothing
    numbers: int  # see `step_numbers`
    masks: int  # of attention: a sliding window has its own
    vocabulary: int  # tokens

    @classmethod
    def of(cls, file: ModelFile) -> Footprint:
        """Read it from a model's metadata.

        Raises:
            LoadError: the list of tensors is damaged. NotFound: a part of the model is missing.
        """
        layers = min(file.number("block_count"), MOST_LAYERS)
        weights, embedding, tied = [0] * (layers + 1), 0, True
        for part in file.files():
            for name, size in part.tensors().items():
                number = name.split(".")[1] if name.startswith("blk.") else ""
                if name.startswith("token_embd."):
                    embedding += size
                else:
                    weights[min(int(number), layers) if number.isdecimal() else layers] += size
                tied = tied and name != "output.weight"
        cache, names = cache_bytes(file), file.metadata.get("tokenizer.ggml.tokens")
        known = cache or (0,) * layers
        return cls(
            weights=tuple(weights),
            embedding=embedding,
            tied=tied,
            cache=known,
            states=state_bytes(file, known) if cache else known,
            foretold=cache is not None,
            numbers=step_numbers(file),
            masks=2 if file.number("attention.sliding_window") else 1,
            vocabulary=names.length if isinstance(names, GGUFArray) else file.number("vocab_size"),
        )

    @property
    def bytes(self) -> int:
        """Return the size of all weights."""
        return sum(self.weights) + self.embedding

    def needs(self, places: Sequence[int], context: int, sequences: int) -> list[Need]:
        """Return what each place has to hold if the layers lie there: main memory, then the devices.

        Args:
            places: of each layer and of the output, as `placed` gives them.
        """
        cells, last = -(-context * sequences // CELLS) * CELLS, len(places) - 1
        batch, logits = min(cells, max(PREFILL_CHUNK, sequences)), 4 * self.vocabulary * sequences
        compute = logits + max(logits, batch * (4 * self.numbers + 2 * cells * self.masks))
        stay = max((self.weights[layer] for layer, place in enumerate(places) if not place), default=0)
        found = [Need(self.embedding, 0, compute)]
        found += [Need(0, 0, compute + stay)] * max(places)  # a long prompt visits the GPU for every layer
        for layer, place in enumerate(places):
            weights, cache, compute = found[place]
            weights += self.weights[layer]
            if layer < last:
                cache += self.cache[layer] * cells + self.states[layer] * sequences
            elif place and self.tied:
                weights += self.embedding
            found[place] = Need(weights, cache, compute)
        return found


def placed(layers: int, offloaded: int, free: Sequence[int]) -> list[int]:
    """Return where llama.cpp puts each of the layers, the output the last of them: 0 is main memory, 1 a first device.

    The last ones go to the devices, to each a share that is as large as what it has free (`load_tensors`).
    """
    offloaded = min(offloaded, layers) if free else 0
    ends = list(itertools.accumulate(free))
    shares = [end / max(1, ends[-1]) for end in ends]
    on = [min(bisect.bisect_right(shares, number / offloaded), len(free) - 1) + 1 for number in range(offloaded)]
    return [0] * (layers - offloaded) + on


@dataclass(frozen=True)
class Plan:
    """Where a model goes, what that takes, and what is free there."""

    footprint: Footprint
    places: tuple[int, ...]
    context: int  # tokens of each sequence
    sequences: int
    free: tuple[float, ...]  # bytes of main memory, and of each device
    names: tuple[str, ...] = ()  # of the devices
    lanes: int = 1  # sequences of an answer
    loaded: bool = False  # what is free on a device is what the weights left

    @property
    def offloaded(self) -> int:
        """Return how many layers lie on devices, the output counted as one."""
        return sum(place > 0 for place in self.places)

    @property
    def needs(self) -> list[Need]:
        """Return what main memory has to hold, then each device that is used."""
        return self.footprint.needs(self.places, self.context, self.sequences)

    def tight(self, roomy: bool = False, whole: bool = False) -> list[int]:
        """List the places that cannot hold their part, or with `roomy` not with some room to spare.

        Weights in main memory count with `whole` only: what of the file does not stay there is read again.
        """
        found = []
        for place, (need, free) in enumerate(zip(self.needs, self.free, strict=False)):
            counted = not self.loaded if place else whole
            room = free if not roomy else free - SPARE if place else SHARE * free
            if need.weights * counted + need.cache + need.compute > room:
                found.append(place)
        return found

    @property
    def crawls(self) -> bool:
        """Tell whether main memory cannot keep the weights besides: they are read from the disk for every token."""
        return sum(self.needs[0]) > self.free[0]

    def largest(self, most: int) -> int:
        """Return the largest context that fits with some room to spare, of `most` tokens at most; 0 if none does."""
        contexts = range(CELLS, most + CELLS, CELLS)
        return min(most, self._last(contexts, lambda context: replace(self, context=context)))

    def together(self) -> int:
        """Return how many answers at a time fit with some room to spare, if not all of them; 0 if none does."""
        answers = range(1, self.sequences // self.lanes)
        return self._last(answers, lambda count: replace(self, sequences=count * self.lanes))

    @staticmethod
    def _last(counts: range, planned: Callable[[int], Plan]) -> int:
        """Return the largest count whose plan fits, if possible beside the weights; 0 if none does."""

        def tight(whole: bool, count: int) -> bool:
            return bool(planned(count).tight(roomy=True, whole=whole))

        for whole in (True, False):
            if fits := bisect.bisect_left(counts, True, key=functools.partial(tight, whole)):
                return counts[fits - 1]
        return 0

    def check(self, path: Path) -> None:
        """Refuse what does not fit: the system would grant it, and end the process later.

        Raises:
            LoadError: with the numbers, and what would fit.
        """
        for place in self.tight()[:1]:
            need, where = self.needs[place], f" on {self.names[place - 1]}" if place else ""
            weights = f"{in_bytes(need.weights)} of weights, " if place and not self.loaded else ""
            takes = f"{weights}{in_bytes(need.cache)} of cache and {in_bytes(need.compute)} to compute in"
            ways = [f"-c {fits}"] if (fits := self.largest(self.context)) else []
            ways += [f"--parallel {fits}"] if (fits := self.together()) else []
            ways += ["-ngl auto"] if weights else []
            advice = f"{' or '.join(ways)} would fit" if ways else "take a smaller model, or end other programs"
            free = f"{in_bytes(self.free[place])} are free{where}"
            raise LoadError(f"a context of {self.size} takes {takes} for {path}, and {free}: {advice}")

    @property
    def size(self) -> str:
        """Return the context in words."""
        return f"{self.sequences} times {self.context:,} tokens" if self.sequences > 1 else f"{self.context:,} tokens"

    def __str__(self) -> str:
        places = zip(("in main memory", *(f"on {name}" for name in self.names)), self.needs, self.free, strict=False)
        return f"{self.size}: " + "; ".join(
            f"{in_bytes(need.weights)} of weights, {in_bytes(need.cache)} of cache and {in_bytes(need.compute)} "
            f"to compute in, of {in_bytes(free)} free {name}"
            for name, need, free in places
        )


def make_plan(
    footprint: Footprint, main: float, devices: Sequence[Device], context: int, sequences: int, wish: str = "auto"
) -> Plan:
    """Plan where a model goes: with `auto`, as many layers on the devices as fit there with their part of the cache.

    Args:
        main: bytes that are free in main memory.
        wish: auto, all, or a number of layers.
    """
    layers, free = len(footprint.weights), [device.free for device in devices]
    nowhere = Plan(footprint, (), context, sequences, (main, *free), tuple(device.name for device in devices))

    def laid_out(offloaded: int) -> Plan:
        return replace(nowhere, places=tuple(placed(layers, offloaded, free)))

    if wish != "auto":
        return laid_out(layers if wish == "all" else int(wish))
    plans = (laid_out(offloaded) for offloaded in range(layers if devices else 0, 0, -1))
    return next((plan for plan in plans if not any(plan.tight(roomy=True))), laid_out(0))


def usable(devices: Sequence[Device]) -> list[Device]:
    """List the devices that llama.cpp offloads layers to: those with memory of their own, else those without."""
    found = [device for device in devices if device.kind in (1, 2)]
    found = [one if one.total else one._replace(free=int(free_memory())) for one in found]  # it does not say
    return [device for device in found if device.kind == 1] or found


def in_bytes(count: float) -> str:
    """Return a number of bytes as a reader takes it in."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def memory_limits() -> dict[str, float]:
    """Return how many bytes can still be taken, swap apart: of the system, and of the container, as far as they say."""
    found = {}
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        (free,) = [1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
        found["free"] = free
    with contextlib.suppress(OSError, ValueError, KeyError):  # a container's share; "max" is none
        group = Path("/sys/fs/cgroup")
        limit, taken = (int((group / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
        counts = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        found["free for this container"] = limit - taken + float(counts["file"])  # what copies files makes room
    return found


def physical_memory() -> float:
    """Return how many bytes of main memory there are; infinity where the system does not say."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):
        return math.inf


def free_memory() -> float:
    """Return how many bytes can still be taken, swap apart; where no one says, all there are, or infinity."""
    return min(memory_limits().values(), default=physical_memory())


# =====================================================================================================================
# 15  What a call asks for
# =====================================================================================================================


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


class Interrupt:
    """Ctrl-C as a flag: an exception inside a ctypes callback would be lost, and llama.cpp be left in the middle.

    A second Ctrl-C while the first is still being honoured ends the process at once. One `with` may hold another.
    """

    undo: ClassVar[list[Callable[[], object]]] = []  # gives a terminal back what was taken from it

    def __init__(self) -> None:
        self.raised = False
        self._depth = 0
        self._before: Any = None

    def __enter__(self) -> Interrupt:
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # a script's background job: its Ctrl-C is not ours
        if not self._depth and threading.current_thread() is threading.main_thread() and not ignored:
            self._before = signal.signal(signal.SIGINT, self._raise)
        self._depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if not self._depth and self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def _raise(self, number: int, frame: object) -> None:
        if self.raised:
            self.leave(Interrupted.exit_code)
        self.raised = True

    @classmethod
    def leave(cls, code: int) -> None:
        """End the process at once, from wherever it is."""
        for undo in reversed(cls.undo):
            with contextlib.suppress(Exception):  # the terminal may be gone
                undo()
        os._exit(code)

    def check(self) -> None:
        """Raise `Interrupted` if Ctrl-C was pressed."""
        if self.raised:
            raise Interrupted("interrupted")


@contextlib.contextmanager
def undone_at_once(undo: Callable[[], object]) -> Iterator[None]:
    """Have what ends the process at once, as a second Ctrl-C, undo what is done to the terminal inside."""
    Interrupt.undo.append(undo)
    try:
        yield
    finally:
        Interrupt.undo.remove(undo)


def hidden_cursor(stream: TextIO) -> contextlib.AbstractContextManager[None]:
    """Have the cursor shown again that Rich hides on a terminal, whatever happens."""
    return undone_at_once(lambda: os.write(stream.fileno(), b"\x1b[?25h"))


# =====================================================================================================================
# 16  llama.cpp
# =====================================================================================================================
# The low-level interface of llama-cpp-python: its log, and the devices that a model can lie on.


class Log:
    """llama.cpp's log: shown with -v, otherwise only its last errors are kept, to say why a load failed."""

    def __init__(self) -> None:
        self.verbose = False
        self.level = 0  # of the line that is being written
        self.errors: list[str] = []
        self._metadata: set[str] = set()  # lines that say what is in a file
        self._callback: Any = None
        self._last: Any = None

    def attach(self, verbose: bool) -> None:
        """Take over llama.cpp's log; again, as llama-cpp-python takes it for itself where it is imported whole."""
        llama, self.verbose = llama_cpp(), verbose
        self._metadata.clear()
        self._callback = self._callback or llama.llama_log_callback(self._write)
        llama.llama_log_set(self._callback, None)
        if is_program and not self._last:
            self._last = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(self._give_up)
            ggml_library("ggml-base").ggml_set_abort_callback(self._last)

    @staticmethod
    def _give_up(message: bytes) -> None:
        """Say in a line why llama.cpp is about to end the process, which it does with a page of addresses."""
        where, _, what = message.decode("utf-8", "replace").partition(": ")
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(
                f"metaalign-edge: llama.cpp gave up: {one_line(what)} ({PurePath(where).name}): a model with which it "
                "always does is damaged: download or convert it again\n"
            )
            sys.stderr.flush()
        Interrupt.leave(LoadError.exit_code)

    def _write(self, level: int, text: bytes, _: Any) -> None:
        line = text.decode("utf-8", "replace")
        self.level = level if level != 5 else self.level  # GGML_LOG_LEVEL_CONT
        if level == 4 and line.strip():  # GGML_LOG_LEVEL_ERROR
            self.errors.append(one_line(line).removeprefix("llama_model_load: ").removeprefix("error loading model: "))
        if line.startswith("llama_model_loader: "):  # the vocabulary and the weights say the same
            if line in self._metadata:
                return
            self._metadata.add(line)
        if self.verbose and self.level != 1:  # GGML_LOG_LEVEL_DEBUG: a thousand lines, in which ours would drown
            sys.stderr.write(line)

    def reason(self) -> str:
        """Return and forget the first error since the last call."""
        errors, self.errors = self.errors, []
        return errors[0] if errors else "llama.cpp gives no reason"


LOG = Log()


@functools.cache
def llama_cpp() -> Any:
    """Import the low-level interface and start llama.cpp's backends.

    Raises:
        LoadError: llama-cpp-python is missing or does not run on this machine.
    """
    # The package's __init__ imports numpy and the high-level class, five times the cost of the module we need: a bare
    # package of the same name stands in while that one is imported.
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise LoadError("llama-cpp-python is not installed: pip install llama-cpp-python")
    stand_in = ModuleType("llama_cpp")
    stand_in.__path__ = list(spec.submodule_search_locations)
    real = sys.modules.get("llama_cpp")
    sys.modules["llama_cpp"] = real or stand_in
    try:
        return importlib.import_module("llama_cpp.llama_cpp")
    except (ImportError, OSError, RuntimeError) as error:
        raise LoadError(f"llama-cpp-python does not load ({one_line(error)}): reinstall it") from error
    finally:
        if real is None:
            del sys.modules["llama_cpp"]


def ggml_library(name: str) -> Any:
    """Return one of ggml's libraries, whose functions llama-cpp-python does not bind.

    llama.cpp's own handle finds those that it is linked with; a wheel has no links, so their files are copies of those.
    """
    library = llama_cpp()._lib
    if os.name != "nt":
        return library
    return sys.modules["llama_cpp._ctypes_extensions"].load_shared_library(name, Path(library._name).parent)


@functools.cache
def build() -> str:
    """Return what tells this build of llama.cpp, and this processor's part in it, from others."""
    llama = llama_cpp()
    library = Path(llama._lib._name)
    return f"{library}, {library.stat().st_mtime_ns}, {llama.llama_print_system_info().decode('utf-8', 'replace')}"


def physical_cores() -> int:
    """Count the cores this process may use, hyper-threads of one core once: more threads only slow llama.cpp down."""
    try:
        allowed = os.sched_getaffinity(0)
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1
    siblings = Path("/sys/devices/system/cpu")
    try:
        cores = {(siblings / f"cpu{cpu}/topology/thread_siblings_list").read_text() for cpu in allowed}
    except OSError:
        return len(allowed)
    return len(cores)


def devices() -> list[Device]:
    """List llama.cpp's devices, the CPU among them."""
    registry, base = ggml_library("ggml"), ggml_library("ggml-base")
    registry.ggml_backend_dev_count.restype, registry.ggml_backend_dev_get.restype = ctypes.c_size_t, ctypes.c_void_p
    base.ggml_backend_dev_name.restype = base.ggml_backend_dev_description.restype = ctypes.c_char_p
    found = []
    for number in range(registry.ggml_backend_dev_count()):
        device = ctypes.c_void_p(registry.ggml_backend_dev_get(ctypes.c_size_t(number)))
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        base.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        name, description = base.ggml_backend_dev_name(device), base.ggml_backend_dev_description(device)
        kind = base.ggml_backend_dev_type(device)
        found.append(Device(name.decode(), description.decode("utf-8", "replace"), kind, free.value, total.value))
    return found


def drives_gpu() -> bool:
    """Tell whether llama.cpp runs in this process, and has started a GPU's driver."""
    return bool(llama_cpp.cache_info().currsize and llama_cpp().llama_supports_gpu_offload())


def gpus() -> list[Device]:
    """List the devices that layers can go to."""
    return usable(devices()) if llama_cpp().llama_supports_gpu_offload() else []


# =====================================================================================================================
# 17  Vocabulary
# =====================================================================================================================
# Tokens by llama.cpp.


class LlamaVocabulary(Closing):
    """llama.cpp's vocabulary, as `tokenize` needs it. `load_vocabulary` loads one. Close it, or use it in a `with`.

    Args:
        model: llama.cpp's pointer to a model; the vocabulary frees it.

    Raises:
        LoadError: it is of no kind that chat models have.
    """

    def __init__(self, model: Any, file: ModelFile) -> None:
        self._llama, self._model, self.file = llama_cpp(), model, file
        self.pointer = self._llama.llama_model_get_vocab(model)
        self.size: int = self._llama.llama_vocab_n_tokens(self.pointer)
        kind = self._llama.llama_vocab_type(self.pointer)
        if kind not in (1, 2):  # LLAMA_VOCAB_TYPE_SPM, LLAMA_VOCAB_TYPE_BPE
            self.close()
            name = file.metadata.get("tokenizer.ggml.model", "none")
            raise LoadError(
                f"{file.path} has a vocabulary of the kind {name!r}; chat models have SentencePiece or BPE ones"
            )
        self.escapes_spaces = kind == 1
        self.space_prefix = kind == 1 and bool(file.metadata.get("tokenizer.ggml.add_space_prefix", True))
        bos = self._llama.llama_vocab_bos(self.pointer)
        self.bos: int | None = bos if bos >= 0 and self._llama.llama_vocab_get_add_bos(self.pointer) else None
        self._pieces: dict[int, bytes] = {}
        self._buffer = ctypes.create_string_buffer(256)
        if not self.escapes_spaces:  # some BPE vocabularies write a space as SentencePiece does (Gemma 4)
            probe = b"".join(map(self.piece, self._encode("\u2581".encode(), special=False)))
            self.escapes_spaces = probe == b" "
            self._pieces.clear()

    def close(self) -> None:
        """Free it; again is harmless."""
        if self._model:
            self._llama.llama_model_free(self._model)
            self._model = None

    def encode(self, text: str, special: bool) -> list[int]:
        """Tokenise; long text on a thread with a stack for it, as llama.cpp's regex fallback recurses per character."""
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
        room = len(data) + 16  # never more tokens than bytes, but for the space that SentencePiece puts in front
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
        """Bytes of the longest token."""
        return max(len(self.piece(token)) for token in range(self.size))

    @functools.cached_property
    def _letters(self) -> dict[bytes, int]:
        """Tokens of one byte or one character, by their bytes; a byte token only where no ordinary one is."""
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
        """Write text one character, or one byte, per token.

        Raises:
            TierViolation: the vocabulary lacks a letter.
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


def load_words(path: str | Path) -> Any:
    """Return llama.cpp's pointer to the vocabulary of a file, which is null if it does not load."""
    llama = llama_cpp()
    params = llama.llama_model_default_params()
    params.vocab_only, params.n_gpu_layers = True, 0
    return llama.llama_model_load_from_file(os.fsencode(path), params)


class Loading(Closing):
    """A file's vocabulary, on its way: a thread loads it while this one goes on.

    llama.cpp takes some 0.25 s for 150,000 tokens. Close it, or use it in a `with`; a vocabulary that nobody has taken
    by its end is freed.

    Raises:
        LoadError: llama.cpp does not run on this machine.
    """

    def __init__(self, path: Path, verbose: bool = False) -> None:
        with STOPWATCH("library"):
            self._llama = llama_cpp()  # not in the thread: Python in both at a time is slower than one after the other
            LOG.attach(verbose)
            LOG.errors.clear()
            self._llama.llama_backend_init()
        self.began = time.monotonic()
        self._path = path
        self._loads: Background | None = None  # until it is taken
        if path.is_file():  # a pipe would be read up, or waited for
            self._loads = Background(self._load)

    def _load(self) -> Any:
        pointer = load_words(self._path)
        trim_memory()
        return pointer

    def close(self) -> None:
        """Wait for what nobody needs any more, and free it; again is harmless."""
        if self._loads and (pointer := self._loads.result()):
            self._llama.llama_model_free(pointer)
        self._loads = None

    def take(self, file: ModelFile) -> LlamaVocabulary:
        """Wait for the vocabulary, which is this file's, and return it. Close that, too.

        Raises:
            LoadError: llama.cpp refuses it, or it is of no kind that chat models have.
        """
        loads, self._loads = self._loads, None
        if not loads or not (pointer := loads.result()):
            raise LoadError(f"cannot load {file.path}: {LOG.reason()}")
        return LlamaVocabulary(pointer, file)


def load_vocabulary(file: ModelFile, verbose: bool = False) -> LlamaVocabulary:
    """Load a vocabulary without the weights. Close it, or use it in a `with`.

    Raises:
        LoadError: as `Loading.take`.
    """
    with Loading(file.path, verbose) as loading:
        return loading.take(file)


# =====================================================================================================================
# 18  Model
# =====================================================================================================================
# A GGUF in memory: where its layers go, its weights, and what is free for a context.


def without_vocabulary(file: ModelFile) -> Any:
    """Return what makes llama.cpp load a file's weights as if it had so many tokens, but no words for them."""
    llama, size = llama_cpp(), file.metadata.get("tokenizer.ggml.tokens")
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
            self.plan = plan_for(file, settings, gpus())
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
        llama, interrupt = llama_cpp(), self._interrupt
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
        path = resolve_model(None if name is None else os.fspath(name))
        if path is None:
            raise NotFound(f"{name} is not on this machine: `metaalign-edge pull {name}` downloads it")
        file = ModelFile(path)
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
            pointer = llama_cpp().llama_adapter_lora_init(self.pointer, os.fsencode(adapter.path))
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
                llama_cpp().llama_model_free(pointer)
            self._loads = None
        self.pointer = None
        self._held.close()


def threads_for(model: Model, settings: Settings) -> int:
    """Return the number of CPU threads: those asked for, else one per core, or a single one for a tiny model."""
    if settings.threads:
        return settings.threads
    return 1 if model.bytes < TINY_MODEL else physical_cores()


def least_context(file: ModelFile, settings: Settings) -> int:
    """Return how many tokens a context has, unless a dialog needs more."""
    return settings.context or min(file.context, DEFAULT_CONTEXT)


def plan_for(file: ModelFile, settings: Settings, devices: Sequence[Device]) -> Plan:
    """Plan where a model goes, by what is free now in main memory, and on these devices.

    Raises:
        LoadError: the list of tensors is damaged. NotFound: a part of the model is missing.
    """
    context = least_context(file, settings)
    plan = make_plan(Footprint.of(file), free_memory(), devices, context, settings.sequences, settings.gpu_layers)
    return replace(plan, lanes=settings.lanes)


def largest_context(file: ModelFile, settings: Settings) -> int:
    """Return the largest context that fits now, of the model's own at most; layers on a GPU stay there.

    Raises:
        UsageError: what a context of this model takes is not known. LoadError: none fits.
    """
    plan = plan_for(file, settings, gpus())
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
    free = (free_memory(), *(device.free for device in gpus()))
    replace(model.plan, context=context, sequences=sequences, free=free, loaded=True).check(model.file.path)


# =====================================================================================================================
# 19  Engine
# =====================================================================================================================
# A context holds several sequences in one unified KV cache, and a step decodes any number of them in one llama_decode.


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
        llama = self._llama = llama_cpp()
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

        identity = [1, self.model.file.identity, build(), self.model.gpu_layers]
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
        llama = self._llama = llama_cpp()
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
# 20  Guidance
# =====================================================================================================================
# A strength for each tier. With l0 the logits given the query alone, l1 given System Info too, and l2 given both tiers,
#
#     l = (1 - s) l0 + (s - u) l1 + u l2        that is, l0 + s (l1 - l0) + u (l2 - l1)
#
# Classifier-free guidance (arXiv 2306.17806) and context-aware decoding (arXiv 2305.14739) are cases of it. As the
# coefficients sum to 1, what a softmax would take from each context is the same for all tokens, so none is needed.

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
# 21  Text of an answer
# =====================================================================================================================
# An answer with its figures, and how a token's bytes become text: between stop sequences, reasoning and a schema.

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
# 22  Sessions
# =====================================================================================================================
# A model, its template and a context: dialogs become prompts that fit, prompts answers, any number of them at a time.


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
# 23  Presentation
# =====================================================================================================================
# stdout is the answer, or one JSON document; everything else is on stderr.

CONTROLS = dict.fromkeys([*range(9), 11, 12, *range(14, 32), *range(127, 160)])  # what could steer a terminal


def aligned(heads: list[str], rows: list[list[str]]) -> list[str]:
    """Return lines with the columns aligned: the first and the last to the left, figures to the right."""
    cells = [heads, *rows]
    widths = [max(len(row[place]) for row in cells if len(row) > place + 1) for place in range(len(heads) - 1)]
    lines = []
    for first, *figures in cells:
        middle = "".join(f"  {cell:>{width}}" for cell, width in zip(figures[:-1], widths[1:], strict=False))
        lines.append(f"{first:<{widths[0]}}{middle}  {figures[-1] if figures else ''}".rstrip())
    return lines


def rich_table(heads: list[str], rows: list[list[str]]) -> list[str]:
    """Return the lines of a table for this terminal, without colours; the last column only if it has room.

    Where there is none for a table, its columns are only aligned.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    width = shutil.get_terminal_size().columns
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    taken = [max(len(row[place]) for row in (heads, *rows) if len(row) > place) for place in range(len(heads) - 1)]
    if width < sum(taken[1:]) + 3 * len(taken) + 16:
        return aligned(heads, rows)
    if width < sum(taken) + 3 * len(taken) + 24:
        heads, rows = [*heads[:-1], ""], [row[: len(heads) - 1] for row in rows]
    for place, head in enumerate(heads):
        figures = 0 < place < len(heads) - 1
        table.add_column(Text(head), justify="right" if figures else "left", no_wrap=figures)
    for row in rows:
        table.add_row(*map(Text, row))
    buffer = io.StringIO()
    Console(file=buffer, width=width, color_system=None).print(table)
    return [line.rstrip() for line in buffer.getvalue().splitlines() if line.strip()]


def at_terminal(stream: TextIO | None) -> bool:
    """Tell whether a stream, which may be closed, is a terminal."""
    return stream is not None and stream.isatty()


class OutputClosed(Exception):
    """Whoever read stdout has gone; that is no error."""


class Screen:
    """The two streams, and how much to say on the second."""

    def __init__(self, quiet: bool = False, verbose: bool = False) -> None:
        self.quiet, self.verbose = quiet, verbose
        self.terminal = at_terminal(sys.stdout)

    def write(self, text: str) -> None:
        """Write to stdout at once.

        Raises:
            OutputClosed: the reader has gone. CannotWrite: the disk is full, or stdout is closed.
        """
        if sys.stdout is None:
            raise CannotWrite("stdout is closed: redirect it to a file or to /dev/null")
        try:
            sys.stdout.write(text.translate(CONTROLS) if self.terminal else text)
            sys.stdout.flush()
        except BrokenPipeError:
            raise OutputClosed from None
        except OSError as error:
            raise CannotWrite(f"cannot write to stdout: {error.strerror}") from None

    def json(self, document: Any) -> None:
        """Write one JSON document to stdout."""
        self.write(json.dumps(document, ensure_ascii=False, indent=2 if self.terminal else None) + "\n")

    def lay_out(self, heads: list[str], rows: list[list[str]]) -> list[str]:
        """Return the lines of a table: drawn on a terminal, else with the columns aligned."""
        return (rich_table if self.terminal else aligned)(heads, rows)

    def lines(self, lines: Iterable[str]) -> None:
        """Write lines to stdout."""
        self.write("".join(f"{line}\n" for line in lines))

    def note(self, text: str) -> None:
        """Say something on stderr, unless -q."""
        if not self.quiet:
            self.say(text)

    def detail(self, text: str) -> None:
        """Say something on stderr with -v only."""
        if self.verbose:
            self.say(text)

    @staticmethod
    def say(text: str) -> None:
        """Say something on stderr, also with -q."""
        with contextlib.suppress(OSError, AttributeError):  # a closed stderr loses words, not the answer
            sys.stderr.write(text.translate(CONTROLS) + "\n")
            sys.stderr.flush()


class Aside:
    """A model's reasoning on stderr: dim on a terminal, plain elsewhere and with -v only, never with -q."""

    def __init__(self, screen: Screen) -> None:
        terminal = at_terminal(sys.stderr)
        plain = not terminal or bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
        self._dim, self._usual = ("", "") if plain else ("\x1b[2m", "\x1b[22m")
        self._shown = (terminal or screen.verbose) and not screen.quiet

    def write(self, text: str) -> None:
        """Show a piece of it."""
        if self._shown:
            with contextlib.suppress(OSError):
                sys.stderr.write(f"{self._dim}{text.translate(CONTROLS)}{self._usual}")
                sys.stderr.flush()


@contextlib.contextmanager
def progress_bar(screen: Screen) -> Iterator[Callable[[str, int, int], None]]:
    """Show a progress bar on stderr if that is a terminal; yield what is to be told of progress."""
    if screen.quiet or not at_terminal(sys.stderr):
        yield lambda _what, _done, _total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    name, size = TextColumn("{task.description}", markup=False), DownloadColumn()
    columns = (name, BarColumn(), size, TransferSpeedColumn(), TimeRemainingColumn())
    with hidden_cursor(sys.stderr), Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("", total=None)
        yield lambda what, done, total: bars.update(task, description=what, completed=done, total=total)


@contextlib.contextmanager
def stopping_at(progress: Callable[[str, int, int], None]) -> Iterator[Callable[[str, int, int], None]]:
    """Yield what tells of progress, too, but raises `Interrupted` after Ctrl-C.

    An exception that comes at any moment may find a lock taken that other threads wait for.
    """
    with Interrupt() as interrupt:

        def told(what: str, done: int, total: int) -> None:
            interrupt.check()
            progress(what, done, total)

        yield told


@contextlib.contextmanager
def answers_bar(screen: Screen, name: str, done: int, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show on a terminal's stderr how many answers are done, how fast, and the time left; yield what counts more."""
    if screen.quiet or not at_terminal(sys.stderr):
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    speed = TextColumn("{task.fields[speed]:.1f} answers/s")
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), speed)
    started = time.monotonic()
    bar, console = (*columns, TimeRemainingColumn()), Console(stderr=True)
    with hidden_cursor(sys.stderr), Progress(*bar, console=console, transient=True, redirect_stdout=False) as bars:
        task = bars.add_task(name, total=total, completed=done, speed=0.0)
        mine = 0

        def tell(more: int) -> None:
            nonlocal mine
            mine += more
            bars.update(task, advance=more, speed=mine / max(0.001, time.monotonic() - started))

        yield tell


def check_answer(answer: Answer, schema: Schema | None, screen: Screen, whose: str = "the answer") -> None:
    """Say if a model was cut while it was thinking, and refuse an answer that does not fit its schema.

    Raises:
        SchemaViolation: what failed, and where.
    """
    cut = f"{whose} was cut at {answer.output_tokens:,} tokens"
    thinking = answer.finish_reason == "length" and answer.reasoning and not answer.response
    if thinking:
        cut += " while the model was still thinking"
    if schema is None or answer.finish_reason == "interrupted":
        if thinking:
            screen.note(f"metaalign-edge: warning: {cut}: raise -n or -c, or say --no-think")
        return
    fault = part("schema").fault(answer.response, schema.document)
    if fault and answer.finish_reason == "length":
        raise SchemaViolation(f"{cut}{'' if thinking else ' before the JSON was complete'}: raise -n or -c")
    if fault:
        raise SchemaViolation(f"{whose} does not fit the schema: {fault}")


def describe(answer: Answer) -> str:
    """Sum up an answer in one line for -v."""
    return (
        f"{answer.input_tokens} tokens in ({answer.cached_tokens} cached), {answer.output_tokens} out "
        f"({answer.finish_reason}), first after {answer.first_token_ms:.0f} ms, "
        f"{answer.tokens_per_second:.1f} tokens/s, loaded in {answer.load_ms:.0f} ms, seed {answer.seed}"
    )


def explain(model: Model, chosen: ChatTemplate, settings: Settings, screen: Screen) -> None:
    """Say with -v what was chosen, and why."""
    device = (
        "the GPU"
        if model.gpu_layers
        else "the CPU (this build of llama.cpp has no GPU)"
        if settings.gpu_layers != "0" and not gpus()
        else "the CPU"
    )
    plan = model.plan
    every = model.gpu_layers == len(plan.places)
    layers = "all layers" if every else f"{model.gpu_layers} layers" if model.gpu_layers else "everything"
    if plan.crawls:
        main = plan.needs[0]
        screen.note(
            f"metaalign-edge: warning: {in_bytes(sum(main))} are needed for {model.file.path.name}, and "
            f"{in_bytes(plan.free[0])} are free: its weights are read from the disk again and again, at a crawl; "
            "take a smaller quantisation"
        )
    screen.detail(f"model {model.file.path}: {model.file.architecture}")
    screen.detail(f"template {chosen.name}, {'native' if chosen.native else 'wrapped'}: {chosen.why}")
    screen.detail(f"memory for {plan}")
    screen.detail(f"{layers} on {device}, threads: {threads_for(model, settings)}, seed {settings.seed}")
    if settings.adapters:
        screen.detail(f"adapters {name_adapters(settings.adapters)}")
    if settings.schema and settings.schema.left:
        left = ", ".join(settings.schema.left)
        screen.note(f"metaalign-edge: note: the answer is held to the schema but for {left}, seen at the end only")
    if (settings.system_strength, settings.pref_strength) != (1.0, 1.0):
        screen.detail(f"guided: System Info {settings.system_strength:g}, User Info {settings.pref_strength}")


def token_table(tokens: Sequence[Token]) -> str:
    """Lay out tokens as lines: id, tier, text."""
    width = max((len(token.tier or "scaffold") for token in tokens), default=0)
    return "".join(
        f"{token.id:>7}  {token.tier or 'scaffold':<{width}}  {json.dumps(token.text, ensure_ascii=False)}\n"
        for token in tokens
    )


COLUMN = 24  # characters; with less room than that for each, answers are shown one after the other


class Columns:
    """Answers that are written together: side by side where a terminal is wide enough, else one after the other."""

    def __init__(self, heads: Sequence[str], screen: Screen) -> None:
        self._heads, self._screen = [one_line(head).translate(CONTROLS) for head in heads], screen
        self._texts = [""] * len(heads)
        self._at, self._done = -1, set[int]()  # of those one after the other
        self._live: Any = None
        self._shown = hidden_cursor(sys.stdout)
        if screen.terminal and shutil.get_terminal_size().columns >= COLUMN * len(heads):
            from rich.live import Live

            self._live = Live(get_renderable=self._table, transient=True, refresh_per_second=12)

    def __enter__(self) -> Columns:
        if self._live:
            self._shown.__enter__()
            self._live.start()
        else:
            self._head(0)
        return self

    def __exit__(self, *_: object) -> None:
        """Leave what was said so far on the screen."""
        if self._live:
            self._live.stop()
            self._shown.__exit__(None, None, None)
            self._live.console.print(self._table())
            return
        for place in range(len(self._heads)):
            self.end(place)

    def _table(self) -> Any:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=True)
        for head in self._heads:
            table.add_column(Text(head), ratio=1, overflow="fold")
        waiting = ["" if place in self._done else "…" for place in range(len(self._texts))]
        table.add_row(
            *(Text(text.translate(CONTROLS) or mark) for text, mark in zip(self._texts, waiting, strict=True))
        )
        return table

    def _head(self, place: int) -> None:
        self._at = place
        self._screen.write(("\n" if place else "") + f"[{self._heads[place]}]\n" + self._texts[place])

    def show(self, place: int, piece: str) -> None:
        """Add to an answer."""
        self._texts[place] += piece
        if not self._live and place == self._at:
            self._screen.write(piece)

    def end(self, place: int) -> None:
        """Note that an answer is complete."""
        self._done.add(place)
        while not self._live and self._at in self._done:
            if not self._texts[self._at].endswith("\n"):
                self._screen.write("\n")
            self._at += 1
            if self._at < len(self._heads):
                self._head(self._at)


def answer_together(
    session: Parallel, dialogs: Sequence[Dialog], columns: Columns | None, screen: Screen, strict: bool
) -> list[Answer]:
    """Answer dialogs in one batch, in columns if there are any; Ctrl-C leaves what has been written.

    Raises:
        EdgeError: one cannot be answered.
    """
    answers: list[Answer] = []

    def before(answer: Answer) -> None:
        answers.append(answer)
        warn(session, answer, screen, strict)

    show = columns.show if columns else lambda _place, _piece: None
    jobs = [Job(one, session.settings.seed, at, show=functools.partial(show, at)) for at, one in enumerate(dialogs)]
    with contextlib.suppress(Interrupted):
        for job, answer in session.run(jobs, before):
            if isinstance(answer, EdgeError):
                raise answer
            if columns:
                columns.end(job.tag)
    return answers


def warn(chat: Session, answer: Answer, screen: Screen, strict: bool) -> None:
    """Say what was dropped, and what a tier forges that ids cannot protect.

    Raises:
        TierViolation: something is forged and `strict` is set.
    """
    if answer.truncated:
        screen.note(f"metaalign-edge: warning: {answer.truncated} of the oldest turns dropped to fit the context")
    check_forged(chat.forged, screen, strict)


def check_forged(forged: Sequence[str], screen: Screen, strict: bool) -> None:
    """Warn of, or with `strict` refuse, template markers in a tier's text that are words in this vocabulary."""
    if not forged:
        return
    said = f"a tier's text contains {', '.join(forged)}, by which this template marks its turns"
    if strict:
        raise TierViolation(f"{said}: take it out")
    screen.note(f"metaalign-edge: warning: {said} (--strict-tiers refuses)")


# =====================================================================================================================
# 24  Batch
# =====================================================================================================================
# A line of JSON in, a line of JSON out. What is finished is on the disk, whatever happens next.

ROW = {"id", "query", "pref", "user_info", "system_info", "turns", "max_tokens", "seed", "json_schema"}
WINDOW = 8  # rows for each sequence that are read ahead, so that neighbours begin alike


class BadRow(ValueError):
    """A line is no row; the text says why."""


@dataclass(frozen=True)
class Row:
    """A line of the input."""

    index: int  # from 0, without blank lines
    line: int  # from 1
    id: Any
    job: Job | None  # its tag is the row's index
    asked: str  # a digest of what it asks for
    error: str | None


def read_rows(lines: Iterable[bytes], standing: Dialog, seed: int, unknown: set[str]) -> Iterator[Row]:
    """Yield the rows of a JSONL file, the bad ones with what is wrong.

    Args:
        standing: its tiers are those of rows that have none of their own.
        unknown: is filled with the names of fields that mean nothing.
    """
    index = 0
    for line, data in enumerate(lines, 1):
        if not data.strip():
            continue
        found: Any = None
        try:
            found = json.loads(data)
            job, error = read_row(found, standing, seed, index), None
            unknown |= found.keys() - ROW
        except UnicodeDecodeError as wrong:
            job, error = None, f"it is not UTF-8 (byte {wrong.start})"
        except json.JSONDecodeError as wrong:
            job, error = None, f"it is no JSON ({wrong.msg}, column {wrong.colno})"
        except (ValueError, EdgeError, RecursionError) as wrong:  # a BadRow, or a number of thousands of digits
            job, error = None, one_line(wrong)
        known = found if isinstance(found, dict) else {}
        own = [known.get(key) for key in ("seed", "json_schema") if key == "seed" or key in known]
        asked = digest([asdict(job.dialog), job.max_tokens, *own]) if job else ""
        yield Row(index, line, known.get("id"), job, asked, error)
        index += 1


def read_row(found: Any, standing: Dialog, seed: int, index: int) -> Job:
    """Make a job of a row.

    Raises:
        BadRow: a field is missing or of another type. EdgeError: there is no such profile, or no such text.
    """
    if not isinstance(found, dict):
        raise BadRow(f"it is a {type(found).__name__}, not an object with a `query`")

    def text(holder: Any, key: str) -> str | None:
        value = holder.get(key) if isinstance(holder, dict) else holder
        if value is not None and not isinstance(value, str):
            raise BadRow(f"`{key}` is a {type(value).__name__}, not a text")
        return value

    def number(key: str, least: int, most: int) -> int | None:
        value = found.get(key)
        if value is not None and not (type(value) is int and least <= value <= most):
            raise BadRow(f"`{key}` is not a number from {least} to {most}")
        return value

    query, turns = text(found, "query"), found.get("turns") or []
    if not query or not query.strip():
        raise BadRow("`query` is missing or empty")
    if found.get("pref") is not None and found.get("user_info") is not None:
        raise BadRow("`pref` and `user_info` are the same tier: give one")
    wishes = found["pref"] if isinstance(found.get("pref"), list) else [found.get("pref")]
    user_info = text(found, "user_info")
    if any(wish is not None for wish in wishes):
        user_info = "\n".join(expand_profile(text(wish, "pref") or "") for wish in wishes)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadRow("`turns` is not a list of {query, response}")
    past = [(text(turn, "query"), text(turn, "response")) for turn in turns]
    if not all(query is not None and response is not None for query, response in past):
        raise BadRow("a turn lacks its `query` or its `response`")
    system_info = text(found, "system_info")
    dialog = Dialog(
        standing.system_info if system_info is None else system_info,
        standing.user_info if user_info is None else user_info,
        (*(Turn(query or "", response) for query, response in past), Turn(query)),
    )
    row_seed, shape = number("seed", 0, 2**32 - 1), found.get("json_schema")
    if not isinstance(shape, dict | str | None):
        raise BadRow(f"`json_schema` is a {type(shape).__name__}, not a schema or its short form")
    return Job(
        dialog,
        seed if row_seed is None else row_seed,
        index,
        number("max_tokens", 1, 2**31 - 1),
        schema=None if shape is None else row_schema(json.dumps(shape) if isinstance(shape, dict) else shape),
    )


@functools.lru_cache(64)  # rows are often alike
def row_schema(text: str) -> Schema:
    """Read a row's schema. A row is data: it names no file.

    Raises:
        UsageError: it is none.
    """
    return parse_schema(text) if text.lstrip().startswith("{") else expand_schema(text)


class Ledger(Closing):
    """What a batch has finished: rows appended to a file as they end, and put in order when all are there.

    Raises:
        UsageError: the file holds something else, or another process writes it. CannotWrite: it cannot be written.
    """

    def __init__(self, path: Path, run: str, force: bool) -> None:
        """Open the file, and read what an earlier call of the same run left. run: what that is told from others by."""
        self.path, self.run = path, run
        self._places: dict[int, tuple[int, str]] = {}  # of a row, where it begins, and the digest of what was asked
        try:
            if path.exists() and not path.is_file():
                raise UsageError(f"{path} is no file: name another with -o")
            self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | BINARY, 0o666), "r+b")
        except OSError as error:
            raise CannotWrite(f"cannot write {path}: {error.strerror}") from None
        try:
            self._lock()
            if force:
                self._file.truncate(0)
            self._read()
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):
            self._file.close()

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"another process is writing {self.path}: wait for it, or name another with -o") from None

    def _read(self) -> None:
        at = 0
        for line in self._file:
            if not line.endswith(b"\n"):  # killed in the middle of it
                break
            try:
                row = json.loads(line)
                index, run, asked = row["index"], row["run"], row["asked"]
            except (ValueError, KeyError, TypeError, RecursionError):
                raise UsageError(f"{self.path} holds something else than a batch's rows: --force replaces it") from None
            if run != self.run:
                raise UsageError(
                    f"{self.path} holds the rows of another run (its model or options differ): --force replaces it"
                )
            if row["error"] is None:
                self._places[index] = (at, asked)
            at += len(line)
        self._file.seek(at)
        self._file.truncate()

    def has(self, index: int, asked: str) -> bool:
        """Tell whether a row has been answered, and what was asked is the same."""
        return self._places.get(index, (0, ""))[1] == asked

    def add(self, row: Mapping[str, Any], asked: str) -> None:
        """Write down a finished row; it is on the disk when this returns.

        Raises:
            CannotWrite: the disk is full.
        """
        document = {**row, "run": self.run, "asked": asked}
        try:
            at = self._file.tell()
            self._file.write(json.dumps(document, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            again = "the same command goes on from here"
            raise CannotWrite(f"cannot write {self.path}: {error.strerror}; {again}") from None
        self._places[row["index"]] = (at, asked)

    def finish(self, count: int) -> None:
        """Put the first `count` rows in order, in a new file that takes the place of this one.

        Raises:
            CannotWrite: the disk is full; the rows stay as they are.
        """
        try:
            with replacing(self.path) as part:
                with part.open("wb") as ordered:
                    for index in range(count):
                        self._file.seek(self._places[index][0])
                        ordered.write(self._file.readline())
                    ordered.flush()
                    os.fsync(ordered.fileno())
                shutil.copymode(self.path, part)
                if os.name == "nt":  # where what is open cannot be replaced
                    self._file.close()
        except OSError as error:
            raise CannotWrite(f"cannot write {self.path}: {error.strerror}") from None


class InOrder:
    """Rows for stdout: each is written as soon as all before it have been."""

    def __init__(self, screen: Screen) -> None:
        self._screen, self._next, self._waiting = screen, 0, dict[int, str]()

    def add(self, row: Mapping[str, Any]) -> None:
        """Take a finished row."""
        self._waiting[row["index"]] = json.dumps(row, ensure_ascii=False)
        while self._next in self._waiting:
            self._screen.write(self._waiting.pop(self._next) + "\n")
            self._next += 1


class Batch:
    """Rows on their way to a file or to stdout, and how many of them have come to what end."""

    def __init__(
        self, rows: Iterator[Row], ledger: Ledger | None, screen: Screen, name: str, schema: Schema | None = None
    ) -> None:
        self._rows, self._ledger, self._screen, self._name, self._schema = rows, ledger, screen, name, schema
        self._stdout = InOrder(screen)
        self._open: dict[int, Row] = {}
        self.total = self.before = self.answered = self.failed = 0

    def jobs(self, window: int) -> Iterator[Job]:
        """Yield what has to be asked; of so many rows at a time, those that begin alike one after the other."""
        while rows := list(itertools.islice(self._rows, window)):
            jobs = []
            for row in rows:
                self.total += 1
                if row.job is None:
                    self._settle(row, {}, f"line {row.line}: {row.error}")
                elif self._ledger and self._ledger.has(row.index, row.asked):
                    self.before += 1
                else:
                    self._open[row.index] = row
                    jobs.append(row.job)
            yield from sorted(jobs, key=lambda job: (job.dialog.system_info, job.dialog.user_info, job.tag))

    def settle(self, job: Job, answer: Answer | EdgeError) -> None:
        """Write down how a job ended.

        Raises:
            CannotWrite: it cannot be written. OutputClosed: nobody reads stdout any more.
        """
        row = self._open.pop(job.tag)
        if isinstance(answer, EdgeError):
            self._settle(row, {}, f"line {row.line}: {one_line(answer)}")
            return
        try:
            check_answer(answer, job.schema or self._schema, self._screen, f"the answer to line {row.line}")
        except SchemaViolation as violation:  # the row says what was answered, too
            self._settle(row, asdict(answer), one_line(violation))
        else:
            self._settle(row, asdict(answer), None)

    def _settle(self, row: Row, answer: dict[str, Any], error: str | None) -> None:
        document = {"index": row.index, "id": row.id, "error": error, **answer}
        if error is None:
            self.answered += 1
        else:
            self.failed += 1
            self._screen.say(f"metaalign-edge: {self._name}, {error}")
        if self._ledger:
            self._ledger.add(document, row.asked)
        else:
            self._stdout.add(document)


# =====================================================================================================================
# 25  Evaluation
# =====================================================================================================================
# Every answer to a suite is the model's own, those of earlier turns too. Each is written down as it comes: a run that
# was stopped goes on where it was, and one that is complete prints its results again without the model.

EVAL_TOKENS = {"builtin": 512, "ifeval": 1280}  # of an answer at most; the second is lm-eval's own


def preferences(name: str) -> Any:
    """Import a module of the preferences: suite, findings, transcript or report."""
    return importlib.import_module(f"{part('preferences').__name__}.{name}")


def find_suite(name: str, seed: int, size: int | None, tier: str) -> Any:
    """Compose the built-in suite, or read a file: of one's own, or of IFEval's, whose instructions go to `tier`.

    Raises:
        UsageError: the file is no suite, or IFEval's checkers are not installed. NotFound: it cannot be read.
    """
    try:
        return preferences("findings").find_suite(name, seed, size, tier)
    except preferences("suite").InvalidSuite as error:
        raise UsageError(one_line(error)) from None
    except OSError as error:
        raise NotFound(f"cannot read the suite {name}: {error.strerror}") from None


@dataclass(frozen=True)
class Candidate:
    """A model under evaluation, its template, and its answers."""

    file: ModelFile
    chosen: ChatTemplate
    settings: Settings
    run: Any  # preferences.findings.Run


def make_candidate(
    file: ModelFile, chosen: ChatTemplate, settings: Settings, options: RenderOptions, suite: Any, answers: Path | None
) -> Candidate:
    """Find a model's answers so far, without loading it.

    Raises:
        UsageError: the file of answers is another run's. CannotWrite: the user named it, and it cannot be written.
    """
    room = least_context(file, settings)
    most = settings.max_tokens or min(EVAL_TOKENS.get(suite.kind, EVAL_TOKENS["builtin"]), max(1, room // 3))
    settings = replace(settings, max_tokens=most)
    run = {
        "version": __version__,
        "model": file.identity,
        "suite": digest([case.document() for case in suite.asked]),
        "template": chosen.identity,
        "settings": json.dumps([*settings.deciding(), *options]),
    }
    path = answers or cache_folder() / "answers" / f"{digest(run)}.jsonl"
    transcripts = preferences("transcript")
    try:
        transcript = transcripts.Transcript(path, run, answers is not None)
    except transcripts.ForeignFile as error:
        raise UsageError(one_line(error)) from None
    except OSError as error:
        raise CannotWrite(f"cannot write {path}: {error.strerror}") from None
    where = (file.path.name, str(file.path), chosen.name, chosen.native)
    asked = preferences("findings").Run(*where, most, settings.temperature, transcript)
    return Candidate(file, chosen, settings, asked)


def interview(
    candidate: Candidate, suite: Any, options: RenderOptions, parallel: int, interrupt: Interrupt, screen: Screen
) -> None:
    """Put to a model what its transcript has no answer to yet.

    Raises:
        Interrupted: Ctrl-C; what was answered is kept. LoadError: the model cannot be loaded. CannotWrite.
    """
    name, transcript, asked = candidate.run.name, candidate.run.transcript, suite.asked
    left, done, lost = transcript.left(asked), transcript.count(asked), transcript.lost
    total = sum(len(case.queries) for case in asked)
    transcript.start()
    screen.note(f"{name}: {total:,} answers, {done:,} of them given already ({transcript.where})")
    if not left:
        return
    try:
        with interrupt, Model(candidate.file, candidate.settings, interrupt) as model:
            explain(model, candidate.chosen, candidate.settings, screen)
            room = min(parallel, len(left))
            with (
                Parallel(model, candidate.chosen, candidate.settings, options, interrupt, room) as session,
                answers_bar(screen, name, done, total) as tell,
            ):
                ask_all(session, asked, left, transcript, tell)
    except Interrupted:
        kept = f"{transcript.count(asked):,} of {total:,} answers, {transcript.where}"
        screen.note(f"interrupted: {kept}" + ("" if transcript.lost else "; the same command goes on from there"))
        raise
    finally:
        if transcript.lost != lost:
            screen.note(f"metaalign-edge: warning: {transcript.where}")
        transcript.close()


def ask_all(
    session: Parallel, asked: Sequence[Any], left: Sequence[int], transcript: Any, tell: Callable[[int], None]
) -> None:
    """Ask what is left, long dialogs first; a dialog goes on as soon as its turn is answered, while it is cached.

    `tell` learns how many questions are settled by each answer; an error settles the rest of its case.

    Raises:
        CannotWrite: the answers cannot be kept where the user wants them.
    """
    waiting = deque(sorted(left, key=lambda number: -len(asked[number].queries)))

    def settle(number: int, turn: int, answer: Answer | EdgeError) -> None:
        case, failed = asked[number], isinstance(answer, EdgeError)
        try:
            transcript.add(number, turn, case.id, answer_record(answer))
        except OSError as error:
            raise CannotWrite(f"cannot write {transcript.path}: {error.strerror}") from None
        if not failed and turn + 1 < len(case.queries):
            waiting.appendleft(number)
        tell(len(case.queries) - turn if failed else 1)

    def jobs() -> Iterator[Job]:
        while waiting:
            number = waiting.popleft()
            said = transcript.said(number)
            try:
                dialog = case_dialog(asked[number], said)
            except UsageError as error:
                settle(number, len(said), error)
                continue
            seed = random.Random(f"{session.settings.seed}/{number}/{len(said)}").getrandbits(32)
            yield Job(dialog, seed, number)

    while waiting:  # again, should the last answer of a round have been an early turn's
        for job, answer in session.run(jobs()):
            settle(job.tag, len(job.dialog.turns) - 1, answer)


def answer_record(answer: Answer | EdgeError) -> dict[str, Any]:
    """Return what a transcript keeps of an answer, or of why there is none."""
    if isinstance(answer, EdgeError):
        return {"error": one_line(answer)}
    return {"response": answer.response, "finish_reason": answer.finish_reason, "truncated": answer.truncated}


def case_dialog(case: Any, said: Sequence[str]) -> Dialog:
    """Return a case's dialog up to the question that follows these answers, under the meta-prompt of that time."""
    last = len(said) + 1 == len(case.queries)
    system_info, user_info = (case.system_info, case.user_info) if last or case.earlier is None else case.earlier
    turns = [Turn(query, response) for query, response in zip(case.queries, said, strict=False)]
    return Dialog(system_info, user_info, (*turns, Turn(case.queries[len(said)])))


def check_outputs(report: Path | None, chart: Path | None) -> None:
    """Make sure, before the hours of answers, that what shall be written can be.

    Raises:
        UsageError: the chart is of no known kind, or needs matplotlib. CannotWrite: no file can be made there.
    """
    if chart and chart.suffix.lower() not in (".png", ".svg"):
        raise UsageError(f"--chart writes .png or .svg, not {chart.name}")
    if chart and importlib.util.find_spec("matplotlib") is None:
        raise UsageError('--chart draws with matplotlib: pip install "metaalign-edge[eval]"')
    for path in filter(None, (report, chart)):
        write_whole(path, None)


def write_outputs(found: Any, report: Path | None, chart: Path | None) -> None:
    """Write the report and the chart of a run's findings.

    Raises:
        CannotWrite: one cannot be written.
    """
    if not (report or chart):
        return
    import shlex

    command, program = shlex.join(["metaalign-edge", *sys.argv[1:]]), f"metaalign-edge {__version__}"
    pages, page = preferences("report"), found.page(command, time.strftime("%Y-%m-%d"), program)
    if report:
        source = read_text(part_folder("templates") / "report.html.jinja", "the template")
        write_whole(report, pages.write_page(source, page).encode("utf-8", "replace"))
    if chart:
        write_whole(chart, pages.draw(page.charts, page.title, chart.suffix[1:].lower()))


# =====================================================================================================================
# 26  Bench
# =====================================================================================================================

BENCH_PROMPT, BENCH_TOKENS = 512, 48  # tokens that are read, and that are written, in a measurement
BENCH_TOGETHER = (2, 4, 8)  # sequences


@dataclass(frozen=True)
class Speeds:
    """What this machine makes of a model: medians of some rounds."""

    model: str
    prefill_tps: float  # tokens per second, here and below
    decode_tps: float
    parallel: dict[str, float]  # of all sequences together, by their number
    guided_tps: float  # with two contexts
    first_token_ms: float  # a whole call of `chat` that writes one token after a meta-prompt of BENCH_PROMPT tokens
    first_token_cached_ms: float  # the same once its state is on the disk
    peak_mb: float  # of memory, of such a call; 0 where the system does not say

    def rows(self) -> list[list[str]]:
        """Return the lines of a table: what, how much, in relation to what, the unit."""

        def line(what: str, figure: float, unit: str, base: float | None = None) -> list[str]:
            return [what, f"{figure:,.1f}", "" if base is None else f"{figure / base:.2f}", unit]

        call, alone = f"ms, a call with a meta-prompt of {BENCH_PROMPT} tokens", self.decode_tps
        return [
            line("read a prompt", self.prefill_tps, "tokens/s"),
            line("write an answer", alone, "tokens/s", alone),
            *(
                line(f"write {count} at a time", tps, "tokens/s together", alone)
                for count, tps in self.parallel.items()
            ),
            line("write with a strength", self.guided_tps, "tokens/s, two contexts", alone),
            line("first token", self.first_token_ms, call, self.first_token_ms),
            line("first token, cached", self.first_token_cached_ms, "ms, its state on the disk", self.first_token_ms),
            line("memory", self.peak_mb, "MB at most, of such a call"),
        ]

    def charts(self) -> list[Any]:
        """Return the speeds and the times as bars."""
        pages = preferences("report")
        found = []
        for title, unit, kind in (("Speed", "Tokens per second", "tokens/s"), ("A call", "Milliseconds", "ms,")):
            shown = [(what, float(figure.replace(",", ""))) for what, figure, _, said in self.rows() if kind in said]
            most = max(figure for _, figure in shown)
            power = 10 ** math.floor(math.log10(most))
            top = next(size * power for size in (2, 4, 6, 8, 10) if size * power >= most)
            labels = tuple((what, (pages.Bar(figure, figure, figure, f"{figure:,.1f}"),)) for what, figure in shown)
            found.append(pages.Chart(title, f"{unit}, the median of some rounds.", 0, top, labels))
        return found


class Bench(Closing):
    """A loaded model's speeds. Use it in a `with`.

    Raises:
        LoadError: llama.cpp cannot make the context. Interrupted: Ctrl-C, in any measurement.
    """

    def __init__(
        self, model: Model, settings: Settings, interrupt: Interrupt, together: Sequence[int] = BENCH_TOGETHER
    ) -> None:
        self._interrupt = interrupt
        self._engine = Engine(model, settings, interrupt, BENCH_PROMPT + BENCH_TOKENS, max(2, *together))
        vocabulary = model.vocabulary
        usual = [token for token in range(vocabulary.size) if vocabulary.attributes(token) & ATTR_NORMAL]
        self._prompt = random.Random(0).choices(usual, k=BENCH_PROMPT)

    def close(self) -> None:
        """Free the context."""
        self._engine.close()

    def _begin(self, count: int, length: int) -> list[SequenceState]:
        """Return sequences that have read the first `length` tokens of the prompt."""
        engine = self._engine
        first, *others = engine.sequences[:count]
        for sequence in engine.sequences:
            engine.cut(sequence, 0)
        for start in range(0, length, engine.room):
            self._interrupt.check()
            engine.logits(engine.step([Feed(first, self._prompt[start : min(start + engine.room, length)])])[0])
        for sequence in others:
            engine.share(first, sequence, length)
            if not sequence.tokens:  # a state that cannot be shared
                engine.step([Feed(sequence, self._prompt[:length], logits=False)])
        return [first, *others]

    def read(self) -> float:
        """Return the speed of reading, in tokens per second."""
        started = time.perf_counter()
        self._begin(1, BENCH_PROMPT)
        return BENCH_PROMPT / (time.perf_counter() - started)

    def write(self, count: int, guidance: Guidance | None = None) -> float:
        """Return the speed of writing in some sequences, of all together; with guidance, they are contexts of one."""
        sequences = self._begin(count, BENCH_PROMPT // 4)
        tokens, started = [self._prompt[-1]] * count, time.perf_counter()
        for _ in range(BENCH_TOKENS):
            self._interrupt.check()
            rows = self._engine.step([Feed(one, [token]) for one, token in zip(sequences, tokens, strict=True)])
            if guidance:
                guidance.combine([self._engine.logits(row) for row in rows])
                rows = rows[:1] * count
            tokens = [int(self._engine.logits(row).argmax()) for row in rows]
        return BENCH_TOKENS * (1 if guidance else count) / (time.perf_counter() - started)


def measure(file: ModelFile, settings: Settings, template: str, rounds: int, interrupt: Interrupt) -> Speeds:
    """Measure a model: in each round every way once, after a round that only brings the file into memory.

    Raises:
        Interrupted: Ctrl-C. LoadError: the model cannot be loaded. EdgeError: a call of `chat` fails.
    """
    from statistics import median

    found: dict[str, list[float]] = {}
    with Model(file, settings, interrupt) as model, Bench(model, settings, interrupt) as bench:
        guidance = Guidance(Dialog("", "a preference", ()), 1.0, 2.0)
        for _ in range(rounds + 1):
            figures = {"read": bench.read(), "write": bench.write(1), "guided": bench.write(2, guidance)}
            figures |= {str(count): bench.write(count) for count in BENCH_TOGETHER}
            for name, figure in figures.items():
                found.setdefault(name, []).append(figure)
        each = len(model.vocabulary.encode(" patient patient", special=False)) / 2
    meta_prompt = " patient" * int(BENCH_PROMPT / each)
    calls = [time_calls(file, settings, template, meta_prompt, interrupt) for _ in range(rounds)]
    speeds = {name: round(median(figures[1:]), 1) for name, figures in found.items()}
    first, cached, peak = (round(median(figures), 1) for figures in zip(*calls, strict=True))
    return Speeds(
        model=file.path.name,
        prefill_tps=speeds["read"],
        decode_tps=speeds["write"],
        parallel={str(count): speeds[str(count)] for count in BENCH_TOGETHER},
        guided_tps=speeds["guided"],
        first_token_ms=first,
        first_token_cached_ms=cached,
        peak_mb=peak,
    )


def time_calls(
    file: ModelFile, settings: Settings, template: str, meta_prompt: str, interrupt: Interrupt
) -> tuple[float, float, float]:
    """Call `chat` twice; return the milliseconds of both, the second with a state on the disk, and the peak in MB.

    Raises:
        EdgeError: a call fails. Interrupted: Ctrl-C.
    """
    import subprocess
    import tempfile

    code = "import sys, metaalign_edge as edge; code = edge.run(); print(edge.peak_mb()); sys.exit(code)"
    command = [sys.executable, "-c", code, "chat", "-m", str(file.path), "-n", "1", "--no-stdin", "-q"]
    command += ["--template", template, "-ngl", settings.gpu_layers, "--system", meta_prompt, "tea?"]
    command += ["-t", str(settings.threads)] if settings.threads else []
    command += [word for one in settings.adapters for word in ("--lora", f"{one.path}:{one.scale}")]
    times, peak = [], 0.0
    with tempfile.TemporaryDirectory(prefix="metaalign-edge-") as folder:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("METAALIGN_EDGE_")}
        environment |= {"METAALIGN_EDGE_CACHE": folder, "PYTHONPATH": os.pathsep.join(sys.path)}
        environment |= {"METAALIGN_EDGE_CONFIG": folder, "METAALIGN_EDGE_PROJECT": "0"}  # nothing of the user's
        for _ in range(2):
            interrupt.check()
            started = time.perf_counter()
            ended = subprocess.run(command, capture_output=True, text=True, env=environment)
            times.append((time.perf_counter() - started) * 1000)
            if ended.returncode:
                interrupt.check()
                raise EdgeError(f"a call of chat failed: {one_line(ended.stderr)}")
            peak = max(peak, float(ended.stdout.splitlines()[-1]))
    return times[0], times[1], peak


# =====================================================================================================================
# 27  Hub
# =====================================================================================================================
# huggingface_hub keeps nothing of a download that was stopped, and compares no checksums. So what is large is fetched
# here, into its place in the hub's own cache; the library does the rest.

TRIES = 3  # to reach the hub, or to get more of a file
PAUSE = 1.0  # seconds before the next try
ROOM = 0.6  # of the free memory may be taken by weights; the rest is for contexts and for other programs
USUAL = ("Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")  # below four bits a model loses much, above eight it gains nothing


@functools.cache
def hub() -> Any:
    """Import huggingface_hub, and keep it from talking: what is to be said is said here."""
    huggingface_hub: Any = importlib.import_module("huggingface_hub")
    for module in ("utils", "errors", "constants"):
        importlib.import_module(f"huggingface_hub.{module}")
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True  # it would ask for a list of programs to look out for
    huggingface_hub.utils.logging.set_verbosity_error()
    if not at_terminal(sys.stderr):
        huggingface_hub.utils.disable_progress_bars()
    return huggingface_hub


def hub_address() -> str:
    """Return where the hub is: HF_ENDPOINT, else the public one."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def is_offline(wanted: bool) -> bool:
    """Tell whether no socket may be opened: it was wanted, or the hub's own variable says so."""
    return wanted or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def absent(name: str) -> NetworkError:
    """Return the error of what is not here and, offline, cannot be had."""
    return NetworkError(f"{name} is not on this machine, and offline nothing is downloaded: pull it with a network")


def hub_error(error: Exception, repository: str) -> EdgeError:
    """Return what an exception of huggingface_hub's means, and what to do."""
    errors = hub().errors
    if isinstance(error, errors.LocalEntryNotFoundError):
        return hub_error(error.__cause__, repository) if isinstance(error.__cause__, Exception) else absent(repository)
    status = getattr(getattr(error, "response", None), "status_code", None)
    page = f"{hub_address()}/{repository}"
    if isinstance(error, EdgeError):
        return error
    if isinstance(error, errors.GatedRepoError):
        return NetworkError(f"{repository} is gated: accept its licence on {page}, and set HF_TOKEN to your token")
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return NotFound(f"no hub repository {repository}, or a private one: look at {page}, or set HF_TOKEN")
    if status == 404:
        return NotFound(f"the hub has lost a file of {repository}: look at {page}")
    if status in (401, 403):
        return NetworkError(f"the hub refuses {repository} ({status}): set HF_TOKEN to a token that may read it")
    if status == 429:
        return NetworkError(f"the hub had too many requests from here ({status}): wait some minutes, or set HF_TOKEN")
    if status:
        return NetworkError(f"the hub fails on {repository} ({status}): try again later")
    if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError | TimeoutError):
        return CannotWrite(
            f"cannot write to {hub_folder()}: {error.strerror}: make room, or set HF_HOME to another folder"
        )
    if isinstance(error, errors.HTTPError | OSError):
        return NetworkError(
            f"{repository} is not here, and {hub_address()} cannot be reached ({type(error).__name__}): try again"
        )
    return NetworkError(f"the hub's answer on {repository} makes no sense ({type(error).__name__}): try again later")


def is_passing(error: Exception) -> bool:
    """Tell whether the next try may go better: a connection that broke, a server that failed."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return isinstance(error, hub().errors.HTTPError) and (status is None or status >= 500)


def asked(ask: Callable[[], Any], repository: str) -> Any:
    """Ask the hub something; a few times, if need be.

    Raises:
        NotFound, NetworkError: it does not answer; see `hub_error`.
    """
    for more in reversed(range(TRIES)):
        try:
            return ask()
        except Exception as error:
            if not (more and is_passing(error)):
                raise hub_error(error, repository) from error
            time.sleep(PAUSE)
    raise AssertionError


class HubFile(NamedTuple):
    """A file of a repository, as the hub lists it."""

    name: str
    bytes: int


class Choice(NamedTuple):
    """A model of a repository: a GGUF, or all parts of one."""

    tag: str  # what -m takes behind the colon: its quantisation, or its name where several have the same
    files: tuple[HubFile, ...]

    @property
    def bytes(self) -> int:
        """Return the size of all parts."""
        return sum(file.bytes for file in self.files)

    @property
    def quantization(self) -> str:
        """Return its quantisation, nothing if its name tells none."""
        return quantization_of(self.files[0].name)

    def is_called(self, wanted: str) -> bool:
        """Tell whether this is what stands behind a colon: a quantisation, or a file."""
        name = self.files[0].name.lower()
        return wanted.lower() in (self.quantization.lower(), name, Path(name).name)


def read_repository(repository: str) -> tuple[str, list[Choice]]:
    """Ask the hub for a repository's newest commit, and the models in it, the smallest first.

    Raises:
        NotFound: there is none, or no model in it. NetworkError: the hub does not answer, or refuses.
    """
    client = hub().HfApi(endpoint=hub_address())
    patience = hub().constants.HF_HUB_DOWNLOAD_TIMEOUT
    found = asked(lambda: client.model_info(repository, files_metadata=True, timeout=patience), repository)
    sizes = {file.rfilename: file.size for file in found.siblings or []}
    models = [[part.as_posix() for part in parts_of(Path(name))] for name in filter(is_main_part, sizes)]
    models = [parts for parts in models if all(part in sizes for part in parts)]
    if not re.fullmatch("[0-9a-f]{40}", str(found.sha)) or not all(
        isinstance(sizes[part], int) and sizes[part] > 0 for parts in models for part in parts
    ):
        raise NetworkError(f"the hub's answer on {repository} makes no sense (no commit, or no sizes): try again later")
    if not models:
        convert = any(name.endswith(".safetensors") for name in sizes)
        hint = f"`metaalign-edge convert {repository}` makes one" if convert else "look for one that ends in -GGUF"
        raise NotFound(f"{repository} has no whole GGUF model: {hint}")
    alike = Counter(quantization_of(parts[0]) for parts in models)
    choices = [
        Choice(
            tag if (tag := quantization_of(parts[0])) and alike[tag] == 1 else parts[0],
            tuple(HubFile(part, sizes[part]) for part in parts),
        )
        for parts in models
    ]
    return found.sha, sorted(choices, key=lambda choice: (choice.bytes, choice.tag))


def best_choice(choices: Sequence[Choice], free: float) -> Choice | None:
    """Return the largest usual quantisation whose weights fit the free memory, else the largest of all that do."""
    fitting = [choice for choice in choices if choice.bytes <= ROOM * free]
    usual = [choice for choice in fitting if choice.quantization in USUAL]
    return max(usual or fitting, key=lambda choice: choice.bytes, default=None)


def choose(repository: str, choices: Sequence[Choice], wanted: str, screen: Screen) -> Choice:
    """Return the model that is wanted; where nothing is, the one that suits this machine, and say why.

    Raises:
        NotFound: there is no such one. UsageError: there are several. LoadError: none fits this machine.
    """
    listed = [f"{choice.tag} ({in_bytes(choice.bytes)})" for choice in choices]
    if wanted:
        found = [choice for choice in choices if choice.is_called(wanted)]
        if not found:
            raise NotFound(f"{repository} has no {wanted}: it has {', '.join(listed)}")
        if len(found) > 1:
            raise UsageError(f"{repository} has several {wanted}: name the file: {', '.join(one.tag for one in found)}")
        return found[0]
    free = free_memory()
    memory = f"{100 * ROOM:.0f} % of the {in_bytes(free)} of free memory"
    best = best_choice(choices, free)
    if best is None:
        raise LoadError(f"no model of {repository} fits into {memory}: name one to have it anyway: {', '.join(listed)}")
    if len(choices) > 1:
        taken = listed.pop(choices.index(best))
        screen.note(f"taking {taken}, the best that fits into {memory}; there are also {', '.join(listed)}")
    return best


class Download(NamedTuple):
    """A file on its way into the hub's cache."""

    file: HubFile
    url: str
    checksum: str  # of LFS, SHA-256; of git, SHA-1
    blob: Path  # where it belongs

    @property
    def partial(self) -> Path:
        """Return where it lies until it is whole."""
        return self.blob.with_name(f"{self.blob.name}.incomplete")

    @property
    def have(self) -> int:
        """Return how many bytes are here."""
        for path in (self.blob, self.partial):
            with contextlib.suppress(OSError):
                return path.stat().st_size
        return 0


def find_download(repository: str, commit: str, file: HubFile) -> Download:
    """Ask the hub for a file's address and checksum.

    Raises:
        NotFound, NetworkError: it does not answer, or contradicts itself.
    """
    url = hub().hf_hub_url(repository, file.name, revision=commit, endpoint=hub_address())
    found = asked(lambda: hub().get_hf_file_metadata(url, endpoint=hub_address()), repository)
    if found.size != file.bytes or not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", found.etag or ""):
        raise NetworkError(
            f"the hub says that {file.name} has {file.bytes:,} bytes, and then {found.size or 0:,} with the checksum "
            f"{found.etag}: nothing was downloaded"
        )
    folder = hub_folder() / f"models--{repository.replace('/', '--')}"
    return Download(file, url, found.etag, folder / "blobs" / found.etag)


def receive(download: Download, repository: str, tell: Callable[[int], None]) -> None:
    """Get what is missing of a file. A connection that breaks is taken up where it broke, as long as more comes.

    Raises:
        NetworkError: there comes no more, or too much. CannotWrite: the disk is full.
    """
    tries, size, patience = TRIES, download.file.bytes, hub().constants.HF_HUB_DOWNLOAD_TIMEOUT
    while (have := download.have) < size:
        headers = {**hub().utils.build_hf_headers(), "Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        error: Exception = NetworkError(f"the hub ends {download.file.name} before its {size:,} bytes: try again later")
        try:
            with (
                download.partial.open("ab") as out,
                hub().utils.get_session().stream("GET", download.url, headers=headers, timeout=patience) as answer,
            ):
                hub().utils.hf_raise_for_status(answer)
                if answer.status_code != 206:  # it begins anew
                    out.seek(0)
                    out.truncate()
                for data in answer.iter_bytes():
                    out.write(data)
                    tell(out.tell())
                    if out.tell() > size:
                        break
        except Exception as found:
            if not is_passing(found):
                raise hub_error(found, repository) from found
            error = found
        tries = TRIES if download.have > have else tries - 1
        if not tries:
            raise hub_error(error, repository) from error
        if download.have < size:
            time.sleep(PAUSE)


def check_download(download: Download) -> None:
    """Compare what was received with its checksum; what is wrong is removed.

    Raises:
        NetworkError: it is not what the hub said it would be.
    """
    import hashlib

    size = download.partial.stat().st_size
    checksum = hashlib.sha256() if len(download.checksum) == 64 else hashlib.sha1(b"blob %d\0" % size)
    with download.partial.open("rb") as file:
        while data := file.read(1 << 20):
            checksum.update(data)
    if size != download.file.bytes or checksum.hexdigest() != download.checksum:
        download.partial.unlink()
        raise NetworkError(f"what came as {download.file.name} is not what the hub promised: it was removed; try again")


def fetch(download: Download, repository: str, commit: str, tell: Callable[[int], None]) -> Path:
    """Download a file, unless it is here, and give it its name in the hub's cache.

    Raises:
        NetworkError: it does not come, or not as promised. CannotWrite: there is no writing.
    """
    folder = download.blob.parent.parent
    try:
        download.blob.parent.mkdir(parents=True, exist_ok=True)
        with locked(hub_folder() / ".locks" / folder.name / download.blob.name):
            if not download.blob.exists():
                receive(download, repository, tell)
                check_download(download)
                os.replace(download.partial, download.blob)
        (folder / "refs").mkdir(exist_ok=True)
        with replacing(folder / "refs" / "main") as part:
            part.write_text(commit, "ascii")
        place = {"cache_dir": hub_folder(), "endpoint": hub_address()}
        return Path(hub().hf_hub_download(repository, download.file.name, revision=commit, **place))
    except Exception as error:
        found = hub_error(error, repository)
        if isinstance(found, CannotWrite):
            found = CannotWrite(f"{found}; {in_bytes(download.file.bytes - download.have)} more are needed")
        raise found from error


def download_model(repository: str, wanted: str, screen: Screen) -> Path:
    """Download a model into the hub's own cache; return where it, or its first part, lies.

    What was stopped goes on where it was.

    Raises:
        NotFound: there is no such one. NetworkError: the hub does not give it. LoadError: nothing fits this machine.
        CannotWrite: there is no room for it.
    """
    commit, choices = read_repository(repository)
    choice = choose(repository, choices, wanted, screen)
    downloads = [find_download(repository, commit, file) for file in choice.files]
    have = sum(download.have for download in downloads)
    going_on = f", of which {in_bytes(have)} are here" if have else ""
    screen.note(f"downloading {repository}:{choice.tag}, {in_bytes(choice.bytes)}{going_on}, to {hub_folder()}")
    place, free = room_at(hub_folder())
    if choice.bytes - have > free:
        raise CannotWrite(
            f"{repository}:{choice.tag} needs {in_bytes(choice.bytes - have)} on the disk, and {place} has "
            f"{in_bytes(free)}: make room, or set HF_HOME to another folder"
        )
    paths, before = [], 0
    try:
        with progress_bar(screen) as bar:

            def tell(before: int, have: int) -> None:
                bar(choice.tag, before + have, choice.bytes)

            for download in downloads:
                paths.append(fetch(download, repository, commit, functools.partial(tell, before)))
                before += download.file.bytes
    except KeyboardInterrupt:
        screen.note("interrupted: the same command goes on from there")
        raise
    return paths[0]


def find_model(name: str | None, offline: bool | None, screen: Screen) -> Path:
    """Return where the model is that -m names; one of the hub's that is not here is downloaded, unless offline.

    None: nobody asked for a download.

    Raises:
        NotFound: there is no such one. NetworkError, CannotWrite: it cannot be had from the hub.
    """
    path, name = resolve_model(name), name or setting("model") or ""
    if path is None:
        if offline is None:
            raise NotFound(f"{name} is not on this machine: `metaalign-edge pull {name}` downloads it")
        if is_offline(offline):
            raise absent(name)
        repository, _, wanted = name.partition(":")
        path = download_model(repository, wanted, screen)
    return path


def open_model(path: Path) -> ModelFile:
    """Read a model's metadata.

    Raises:
        NotFound: there is no such file. LoadError: it is bad, or no model.
    """
    file = ModelFile(path)
    if file.purpose in ("adapter", "mmproj", "imatrix"):
        raise LoadError(f"{path} is no model but a file for one ({file.purpose}): name the model itself with -m")
    return file


def find_checkpoint(source: str, screen: Screen, offline: bool = False) -> Path:
    """Return a checkpoint's folder; a hub id is fetched into the hub's own cache.

    Raises:
        NotFound: no such folder or repository. NetworkError: the hub is unreachable, or refuses.
    """
    path = Path(source).expanduser()
    if path.exists() or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", source):
        return path
    screen.detail(f"fetching {source} from the hub")
    wanted = ["*.json", "*.safetensors", "*.jinja", "*.model", "README.md"]
    try:
        return Path(hub().snapshot_download(source, allow_patterns=wanted, local_files_only=is_offline(offline)))
    except Exception as error:
        raise hub_error(error, source) from error


# =====================================================================================================================
# 28  Doctor
# =====================================================================================================================
# Is it well? What can end a process (llama.cpp's library, a driver, a model) is tried in a child of this one, so that
# an illegal instruction is a line in a table.

START_SECONDS, MODEL_SECONDS, HUB_SECONDS = 60.0, 600.0, 5.0  # that the library, a model, and the hub may take
PROBE = Dialog("Be kind.", "One sentence.", (Turn("What is tea?"),))  # a dialog with all its tiers
REINSTALL = "pip install --force-reinstall --no-cache-dir llama-cpp-python"
FEATURES = {  # of processors: llama.cpp's name, then Linux's
    "AVX": "avx", "AVX2": "avx2", "F16C": "f16c", "FMA": "fma", "BMI2": "bmi2", "AVX_VNNI": "avx_vnni",
    "AVX512": "avx512f", "AVX512_VBMI": "avx512vbmi", "AVX512_VNNI": "avx512_vnni", "AVX512_BF16": "avx512_bf16",
    "AMX_INT8": "amx_int8", "NEON": "asimd", "DOTPROD": "asimddp", "MATMUL_INT8": "i8mm", "SVE": "sve",
}  # fmt: skip
MATTERS = ("AVX2", "FMA", "F16C", "NEON", "DOTPROD")  # without these it is slow by a factor, not by some per cent

Status = Literal["ok", "warning", "failed"]
Finding = tuple[Status, str]


class Check(NamedTuple):
    """What was looked at, and what was found."""

    name: str
    status: Status
    detail: str


def llama_facts() -> dict[str, Any]:
    """Return what llama.cpp says of itself, in JSON's types."""
    llama = llama_cpp()
    LOG.attach(False)
    llama.llama_backend_init()
    return {
        "library": str(llama._lib._name),
        "features": llama.llama_print_system_info().decode("utf-8", "replace"),
        "offloads": bool(llama.llama_supports_gpu_offload()),
        "devices": devices(),
    }


def try_model(path: Path, settings: Settings) -> list[str]:
    """Load a model and use it: vocabulary, end token, template, a tier-safe render, one decoded token.

    Raises:
        EdgeError: some of it fails.
    """
    file = ModelFile(path)
    interrupt = Interrupt()
    settings = replace(settings, max_tokens=1, temperature=0.0, context=min(file.context, 512))
    with interrupt, Model(file, settings, interrupt) as model:
        found = [f"loads, with {model.vocabulary.size:,} tokens and the end token {file.token('eos') or 'none'}"]
        if file.templates:
            with Chat(model, choose_template("auto", file), settings, RenderOptions(), interrupt) as session:
                answer = session.answer(PROBE, 0, lambda _: None, lambda _: None)
                interrupt.check()
                found.append(f"the template {answer.template} renders {answer.input_tokens} tier-safe tokens")
                found.append(check_logits(cast(Engine, session.engine)))
        else:
            found.append("carries no chat template: chat will need --template")
            with Engine(model, settings, interrupt, cast(int, settings.context)) as engine:
                engine.step([Feed(engine.sequences[0], [0])])
                found.append(check_logits(engine))
    return found


def check_logits(engine: Engine) -> str:
    """Say whether what the model computed last are numbers: infinite weights make them none."""
    logits = llama_cpp().llama_get_logits_ith(engine.pointer, -1)
    if all(map(math.isfinite, logits[: engine.model.vocabulary.size])):
        return "a token is decoded"
    return "warning: what the result computes are no numbers; use --outtype bf16 or f32, or look at the weights"


def be_child() -> None:
    """Do what the parent asks on the command line, and print the result or the error as JSON."""
    task, *arguments = json.loads(sys.argv[1])
    try:
        if task == "model":
            path, gpu_layers, threads = arguments
            result: Any = try_model(Path(path), Settings(gpu_layers=gpu_layers, threads=threads))
        else:
            result = llama_facts()
        print(json.dumps({"result": result}))
    except EdgeError as error:
        print(json.dumps({"error": one_line(error)}))


def in_child(seconds: float, *task: Any) -> Any:
    """Have a child process do something that may end it; return its result.

    Raises:
        EdgeError: it fails, is ended by a signal, or takes more than so many seconds.
    """
    import subprocess

    command = [sys.executable, "-c", "import metaalign_edge as edge; edge.be_child()", json.dumps(task)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        ended = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, env=environment, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        raise EdgeError(f"no answer within {seconds:g} seconds") from None
    if ended.returncode or not ended.stdout:
        raise EdgeError(ended_by(ended.returncode, ended.stderr.decode("utf-8", "replace")))
    answer = json.loads(ended.stdout.splitlines()[-1])
    if "error" in answer:
        raise EdgeError(answer["error"])
    return answer["result"]


def ended_by(code: int, said: str) -> str:
    """Say what ended a process."""
    lines = [line for line in said.splitlines() if line.strip()]
    reasons = {"SIGILL": "an instruction that this processor lacks", "SIGKILL": "most likely for want of memory"}
    name = "SIGILL" if code in (-4, 0xC000001D) else ""  # Windows' number for an illegal instruction
    with contextlib.suppress(ValueError):
        name = name or signal.Signals(-code).name
    if not name:
        return f"it ends with {code}: {lines[-1] if lines else 'without a word'}"
    return f"it is ended by {name}" + (f", {reasons[name]}" if name in reasons else "")


class Doctor:
    """Looks at everything that an answer needs."""

    def __init__(
        self, model: str | None, settings: Settings, network: bool, check: Callable[[], None] | None = None
    ) -> None:
        self.settings, self.network, self.model = settings, network, model
        self.check_settings = check or (lambda: None)  # raises what is wrong with those that stand in files
        self.file: ModelFile | None = None
        self.facts: dict[str, Any] | None = None  # of llama.cpp; None while it does not load
        self.looks: dict[str, Callable[[], Finding]] = {
            "program": self.program,
            "llama.cpp": self.llama,
            "devices": self.devices,
            "processor": self.processor,
            "memory": self.memory,
            "model": self.metadata,
            "template": self.template,
            "first token": self.first_token,
            "fit": self.fit,
            "cache": self.cache,
            "config": self.config,
            "data": lambda: self.folder(data_folder(), "METAALIGN_EDGE_DATA"),
            "terminal": self.terminal,
            "hub": self.hub,
        }

    def checks(self) -> Iterator[Check]:
        """Yield each check when it is done; what goes wrong in it is what it found."""
        for name, look in self.looks.items():
            try:
                yield Check(name, *look())
            except EdgeError as error:
                yield Check(name, "failed", one_line(error))
            except Exception as error:
                yield Check(name, "failed", f"unexpected {type(error).__name__}: {one_line(error)}")

    def program(self) -> Finding:
        """Look at this program and its Python."""
        import platform

        python = f"Python {platform.python_version()}, {sys.executable}"
        return "ok", f"metaalign-edge {__version__}, {python}, {platform.system()} {platform.machine()}"

    def llama(self) -> Finding:
        """Look whether llama.cpp's library loads, and is the one that this program was written for."""
        from importlib.metadata import PackageNotFoundError, requires, version

        started = time.perf_counter()
        try:
            self.facts = in_child(START_SECONDS, "llama")
        except EdgeError as error:
            raise EdgeError(f"it does not load: {one_line(error)}: {REINSTALL}") from None
        spent = 1000 * (time.perf_counter() - started)
        backends = ", ".join(re.findall(r"(\w+) : ", self.facts["features"]))
        detail = f"loads in {spent:.0f} ms, for {backends}, {self.facts['library']}"
        with contextlib.suppress(PackageNotFoundError):
            has = version("llama-cpp-python")
            detail = f"llama-cpp-python {has} {detail}"
            wants = [need for need in requires("metaalign-edge") or [] if need.startswith("llama-cpp-python==")]
            if wants and wants != [f"llama-cpp-python=={has}"]:
                return "warning", f"{detail}; this program was written for another: pip install {wants[0]}"
        return "ok", detail

    def devices(self) -> Finding:
        """Look at the devices that layers can go to."""
        if self.facts is None:
            return "warning", "not known, as llama.cpp does not load"
        found = self.gpus()
        if found:
            each = (
                f"{one.name} ({one.description}), {in_bytes(one.free)} of {in_bytes(one.total)} free" for one in found
            )
            return "ok", "; ".join(each)
        if self.facts["offloads"]:
            return "warning", "none, though this build of llama.cpp has a backend for one: look at the driver"
        if there := unused_gpu():
            name, flag = there
            how = f'CMAKE_ARGS="-DLLAVA_BUILD=OFF -D{flag}=on" {REINSTALL}'
            return "warning", f"the CPU alone, though there is {name}: {how}"
        return "ok", "the CPU alone: this build of llama.cpp has no GPU"

    def gpus(self) -> list[Device]:
        """Return the devices that layers can go to; none if llama.cpp does not load."""
        facts = self.facts or {"offloads": False}
        return usable([Device(*one) for one in facts["devices"]]) if facts["offloads"] else []

    def processor(self) -> Finding:
        """Look at what the processor can do, and what of it llama.cpp was built for."""
        cores = f"{physical_cores()} cores"
        flags: set[str] = set()
        with contextlib.suppress(OSError):  # not Linux
            lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
            flags = {flag for line in lines if line.lower().startswith(("flags", "features")) for flag in line.split()}
        has = {name for name, flag in FEATURES.items() if flag in flags}
        if self.facts is None:
            return "ok", f"{cores}; it has {', '.join(sorted(has)) or 'features that are not known'}"
        built = set(re.findall(r"(\w+) = 1", self.facts["features"]))
        detail = f"{cores}; llama.cpp is built for {', '.join(sorted(built & FEATURES.keys())) or 'any processor'}"
        unused = [name for name in sorted(has - built) if name in MATTERS]
        if flags and (lacking := sorted((built & FEATURES.keys()) - has)):
            return "warning", f"{detail}, but the processor lacks {', '.join(lacking)}: {REINSTALL}"
        if unused:
            return "warning", f"{detail}, not for {', '.join(unused)} that the processor has: {REINSTALL}"
        return "ok", detail

    def memory(self) -> Finding:
        """Look at the main memory."""
        limits = memory_limits()
        said = [f"{in_bytes(count)} {what}" for what, count in limits.items()]
        said += [f"{in_bytes(physical_memory())} in all"] if physical_memory() < math.inf else []
        return "ok", ", ".join(said) or "this system does not say"

    def metadata(self) -> Finding:
        """Look at the model's file."""
        self.file = open_model(find_model(self.model, None, Screen(quiet=True)))
        footprint = Footprint.of(self.file)
        size = in_bytes(sum(footprint.weights) + footprint.embedding)
        known = f"{self.file.architecture}, {size} of weights, {self.file.context:,} tokens of context"
        return "ok", f"{self.file.path}: {known}"

    def template(self) -> Finding:
        """Look whether the model's template renders a dialog with all three tiers."""
        file = self.loaded()
        if not file.templates:
            return "warning", "the model carries none: give one with --template"
        chosen = choose_template("auto", file)
        render(PROBE, chosen)
        return "ok", f"{chosen.name}, {'native' if chosen.native else 'wrapped'}: {chosen.why}; all three tiers render"

    def loaded(self) -> ModelFile:
        """Return the model's file.

        Raises:
            EdgeError: it cannot be read.
        """
        if self.file is None:
            raise EdgeError("not tried, as there is no model")
        return self.file

    def first_token(self) -> Finding:
        """Look whether the model loads, takes a dialog and says something."""
        path = str(self.loaded().path.absolute())
        if self.facts is None:
            return "warning", "not tried, as llama.cpp does not load"
        found = in_child(MODEL_SECONDS, "model", path, self.settings.gpu_layers, self.settings.threads)
        wrong = any(line.startswith("warning: ") for line in found)
        return "warning" if wrong else "ok", "; ".join(found).replace("warning: ", "")

    def fit(self) -> Finding:
        """Look whether the model fits the memory, and how much context does."""
        file = self.loaded()
        plan = plan_for(file, self.settings, self.gpus())
        plan.check(file.path)
        detail = f"{plan}; -c auto would take {plan.largest(file.context):,}" if plan.footprint.foretold else str(plan)
        detail += f"; {plan.offloaded} of {len(plan.places)} layers on the GPU" if plan.offloaded else ""
        if plan.crawls:
            again = "the weights are read from the disk again and again: take a smaller quantisation"
            return "warning", f"{detail}: {again}"
        return "ok", detail if plan.footprint.foretold else f"{detail}; what its cache takes is not foretold"

    def cache(self) -> Finding:
        """Look at the states of meta-prompts on the disk."""
        status, detail = self.folder(cache_folder(), "METAALIGN_EDGE_CACHE")
        states = States()
        files = states.files()
        held = f"{in_bytes(sum(file.bytes for file in files))} of {in_bytes(states.most)}"
        hits = counted(sum(file.hits for file in files), "hit")
        return status, f"{detail}; {counted(len(files), 'state')}, {held}, {hits}"

    def config(self) -> Finding:
        """Look at the settings and their folder."""
        self.check_settings()
        return self.folder(config_folder(), "METAALIGN_EDGE_CONFIG")

    @staticmethod
    def folder(folder: Path, variable: str) -> Finding:
        """Look whether a folder can be written, or made."""
        import tempfile

        there, free = room_at(folder)
        try:
            tempfile.TemporaryFile(dir=there).close()
        except OSError as error:
            return "warning", f"{folder}: {error.strerror}: nothing is kept there; {variable} names another"
        size = f"{in_bytes(free)} free"
        return "ok", f"{folder}, {size}" if there == folder else f"{folder}, to be made; {size}"

    @staticmethod
    def terminal() -> Finding:
        """Look at where the answers go."""
        from rich.console import Console

        encoding = (sys.stdout.encoding or "unknown") if sys.stdout else "none"
        place = "none: stdout is a pipe or a file"
        if at_terminal(sys.stdout):
            depth = {None: "no", "standard": "16", "256": "256"}
            colours = f"{depth.get(Console().color_system, 'all')} colours"
            place = f"{os.environ.get('TERM', 'no TERM')}, {shutil.get_terminal_size().columns} columns, {colours}"
        if encoding.lower().replace("-", "") != "utf8":
            return "warning", f"{place}, {encoding}: letters that it lacks become `?`; PYTHONUTF8=1 helps"
        return "ok", f"{place}, {encoding}"

    def hub(self) -> Finding:
        """Look whether the hub can be reached, if that may be asked."""
        if is_offline(False):
            return "ok", "offline, as HF_HUB_OFFLINE says: nothing is fetched"
        return ask_hub(hub_address()) if self.network else ("ok", f"{hub_address()}, not asked (--network asks)")


def ask_hub(endpoint: str) -> Finding:
    """Send the hub one request, and say what it answers.

    Raises:
        EdgeError: it cannot be reached.
    """
    from http.client import HTTPException
    from urllib.error import HTTPError
    from urllib.request import HTTPRedirectHandler, Request, build_opener

    if not endpoint.startswith(("http://", "https://")):
        raise EdgeError(f"HF_ENDPOINT={endpoint} is no address of a hub")
    stay = HTTPRedirectHandler()
    stay.redirect_request = lambda *_: None  # type: ignore[method-assign]  # another place would be another request
    started, status = time.perf_counter(), 200
    try:
        build_opener(stay).open(Request(endpoint, method="HEAD"), timeout=HUB_SECONDS).close()
    except HTTPError as error:
        status = error.code
    except (OSError, HTTPException) as error:
        raise EdgeError(f"{endpoint} cannot be reached: {one_line(getattr(error, 'reason', error))}") from None
    spent = 1000 * (time.perf_counter() - started)
    level: Status = "ok" if status < 400 else "warning" if status < 500 else "failed"
    return level, f"{endpoint} answers {status} in {spent:.0f} ms"


def unused_gpu() -> tuple[str, str] | None:
    """Name a GPU that this machine seems to have, and the flag that builds llama.cpp for it."""
    if Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi"):
        return "an NVIDIA GPU", "GGML_CUDA"
    if Path("/dev/kfd").exists():
        return "an AMD GPU", "GGML_HIP"
    return ("Metal", "GGML_METAL") if sys.platform == "darwin" else None


def check_lines(check: Check, width: int, columns: int | None) -> str:
    """Lay a check out as a line, or as the lines of a terminal of so many columns. width: of the longest name."""
    head = f"{check.status:<7}  {check.name:<{width}}  "
    if columns is None:
        return f"{head}{check.detail}\n"
    import textwrap

    options: dict[str, Any] = {"width": columns, "break_long_words": False, "break_on_hyphens": False}
    if columns < len(head) + COLUMN:
        detail = textwrap.fill(check.detail, initial_indent="  ", subsequent_indent="  ", **options)
        return f"{head.rstrip()}\n{detail}\n"
    return textwrap.fill(check.detail, initial_indent=head, subsequent_indent=" " * len(head), **options) + "\n"


# =====================================================================================================================
# 29  Conversations
# =====================================================================================================================
# What is said at a terminal, turn by turn, and how it is shown afterwards. The line editor is prompt_toolkit: it costs
# 80 ms at the start of a conversation where readline costs 3, and only there. For that, pasted lines are one question,
# Tab opens a menu, and all of it is the same on Windows and macOS, whose Pythons come without GNU readline.

LABEL = 24  # characters of a preference that are shown where there is little room
NARROW = 40  # columns; below, nothing is rendered


def label_of(wishes: Sequence[str]) -> str:
    """Return a short form of preferences: the names of profiles, or a text's beginning."""
    return shortened("+".join(wishes), LABEL)


class Reply:
    """An answer on its way to stdout. With `markdown`, its text gives way to the rendered one when it is complete.

    That is done only where the text can be taken back for certain: on a terminal that obeys, while the text is still on
    the screen, and terminals agree on its width. Otherwise it stays as it is; nothing is ever shown twice.
    """

    def __init__(self, screen: Screen, markdown: bool = False, stream: bool = True) -> None:
        self._screen, self._stream = screen, stream
        self._size = self._terminal() if markdown and not screen.verbose else None  # a log may come in between

    def _terminal(self) -> os.terminal_size | None:
        """Return the size of a terminal that can be written on anew; not what COLUMNS says of it."""
        if not self._screen.terminal or os.environ.get("TERM") in ("dumb", "unknown"):
            return None
        try:
            size = os.get_terminal_size(sys.stdout.fileno())
        except (OSError, ValueError):
            return None
        return size if size.columns >= NARROW else None

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep what is typed meanwhile off the screen, if the text is to be taken back; the next prompt shows it."""
        if self._size is None or os.name == "nt":  # Windows shows only what is being read
            yield
            return
        import termios

        before = termios.tcgetattr(sys.stdout)
        silent = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
        restore = functools.partial(termios.tcsetattr, sys.stdout, termios.TCSANOW, before)
        with undone_at_once(restore):
            termios.tcsetattr(sys.stdout, termios.TCSANOW, silent)
            try:
                yield
            finally:
                restore()

    def show(self, piece: str) -> None:
        """Take a piece."""
        if self._stream:
            self._screen.write(piece)

    def end(self, text: str) -> None:
        """Complete an answer, whose text this is."""
        rendered = self._rendering(text)
        if rendered is None or self._stream:
            self._screen.write(("" if self._stream else text) + ("" if text.endswith("\n") else "\n"))
        if rendered is not None:
            sys.stdout.write(rendered)
            sys.stdout.flush()

    def _rendering(self, text: str) -> str | None:
        """Return what makes the rendered text of what stands on the screen; None if that has to stay."""
        if self._size is None or not text.strip():
            return None
        back = ""
        if self._stream:
            rows = rows_of(text, self._size.columns)
            if rows is None or rows >= self._size.lines or self._terminal() != self._size:
                return None
            back = f"\x1b[{rows}A\x1b[J"
        rendered = rendered_markdown(text.translate(CONTROLS), self._size.columns)
        return None if rendered is None else back + rendered


def rows_of(text: str, columns: int) -> int | None:
    """Count the rows of a terminal that a text takes; None where terminals differ."""
    import unicodedata

    rows = 0
    for line in text.removesuffix("\n").split("\n"):
        rows, at = rows + 1, 0
        for character in line:
            if unicodedata.category(character)[0] in "CM":  # tabs, joiners, accents of their own
                return None
            width = 2 if unicodedata.east_asian_width(character) in "WF" else 1
            if at + width > columns:
                rows, at = rows + 1, 0
            at += width
    return rows


def rendered_markdown(text: str, columns: int) -> str | None:
    """Return Markdown as a terminal shows it; None on a console that knows no such colours."""
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console(width=columns, force_terminal=True)
    if console.legacy_windows:
        return None
    with console.capture() as captured:
        console.print(Markdown(text, code_theme="ansi_dark", hyperlinks=False))  # a link shows where it leads
    return captured.get()


def told(transcript: Transcript) -> Iterator[tuple[str, str]]:
    """Yield what stands in a conversation in order, each text with its tier; the meta-prompt wherever it changes."""
    shown = {"system_info": "", "user_info": ""}
    turns = transcript.turns()
    for place, turn in enumerate(turns):
        if place and turns[place - 1]["forgotten"] and not turn["forgotten"]:
            yield "forgotten", "What was said up to here was forgotten."
        for tier, name in (("system_info", "System Info"), ("user_info", "User Info")):
            if turn[tier] != shown[tier]:
                shown[tier] = turn[tier]
                yield name, turn[tier] or "(none)"
        yield "User Query", turn["query"]
        cut = " (interrupted)" if turn.get("finish_reason") == "interrupted" else ""
        yield "Response", (turn["response"].strip("\n") + cut).strip()


def as_markdown(transcript: Transcript) -> str:
    """Return a conversation as Markdown: what the model was told is quoted, what it answered stands as it is."""
    parts = [f"# {transcript.name or 'Conversation'}"]
    for tier, text in told(transcript):
        quoted = f"**{tier}:** {text}".replace("\n", "\n> ")
        parts.append({"Response": text, "forgotten": f"---\n\n*{text}*"}.get(tier, f"> {quoted}"))
    return "\n\n".join(parts) + "\n"


def as_text(transcript: Transcript) -> str:
    """Return a conversation as it looks at a terminal."""
    parts = []
    for tier, text in told(transcript):
        head = {"Response": "", "User Query": "\n> ", "forgotten": "\n"}.get(tier, f"\n{tier}: ")
        parts.append(head + text + "\n")
    return "".join(parts).removeprefix("\n")


def as_document(transcript: Transcript) -> dict[str, Any]:
    """Return a conversation as `--json` prints it: each turn with the meta-prompt that it was given under."""
    turns = [{name: value for name, value in turn.items() if name != "kind"} for turn in transcript.turns()]
    return {"session": transcript.name, "created": transcript.lines[0].get("at"), "turns": turns}


def exported(transcript: Transcript, form: str) -> str:
    """Return a conversation as `md` or `json`."""
    if form == "md":
        return as_markdown(transcript)
    return json.dumps(as_document(transcript), ensure_ascii=False, indent=2) + "\n"


def on_clock(when: float) -> str:
    """Return a time, in seconds since 1970, as a clock here shows it."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(when))


def local_time(stamp: str) -> str:
    """Return a session's time as a clock here shows it; what is no time, as it is."""
    import calendar

    try:
        return on_clock(calendar.timegm(time.strptime(stamp, STAMP)))
    except ValueError:
        return stamp


def shown_strength(settings: Settings) -> str:
    """Return the strength of User Info as text."""
    return "auto" if settings.pref_strength == "auto" else f"{settings.pref_strength:g}"


def wish_text(wish: str) -> str:
    """Return the text of a preference or of a profile; a lone dash is none."""
    return "" if wish == "-" else expand_profile(wish)


def describe_session(transcript: Transcript) -> str:
    """Sum up a session in one line."""
    turns = transcript.dialog().turns
    return (
        f"session {transcript.name}: {counted(len(turns), 'turn')} so far"
        if turns
        else f"session {transcript.name} begins"
    )


def line_editor(complete: Callable[[str], list[tuple[str, int]]]) -> Callable[[str], str]:
    """Return what reads a line: with history and completion, or on a dumb terminal as the terminal does it.

    Args:
        complete: lists what may stand at the end of a line, each with how many characters it takes the place of.
    """
    if os.environ.get("TERM") in ("dumb", "unknown"):
        return plain_line
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import Completer, Completion
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings

    class Offers(Completer):
        def get_completions(self, document: Any, complete_event: Any) -> Iterable[Completion]:
            for text, length in complete(document.text_before_cursor):
                yield Completion(text, -length)

    class Kept(FileHistory):
        def append_string(self, string: str) -> None:
            if not string.startswith(" "):  # as shells do
                super().append_string(string)

        def store_string(self, string: str) -> None:
            with contextlib.suppress(OSError):
                super().store_string(string)

    path, history = data_folder() / "history", cast(History, InMemoryHistory())
    with contextlib.suppress(OSError):  # nothing can be kept there
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        history = Kept(str(path))
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    editor: PromptSession[str] = PromptSession(
        history=history,
        completer=Offers(),
        complete_while_typing=False,  # a menu that nobody asked for is noise to a screen reader
        key_bindings=keys,
        prompt_continuation=". ",
    )
    return editor.prompt


def plain_line(prompt: str) -> str:
    """Read a line as the terminal edits it."""
    try:
        return input(prompt)
    except (EOFError, KeyboardInterrupt):
        print()
        raise


def read_text_of_lines(line: Callable[[str], str], prompt: str) -> str:
    """Read one line, or several between lines that begin and end with three quotes."""
    text = line(prompt)
    if not text.startswith('"""'):
        return text
    text = text[3:]
    while not text.rstrip().endswith('"""'):
        text += "\n" + line(". ")
    return text.rstrip()[:-3].strip("\n")


class Word(NamedTuple):
    """A command of a conversation."""

    takes: str
    help: str
    method: Callable[[Any, str], None]
    choices: Sequence[str] | Callable[[], Iterable[str]] = ()  # what Tab offers after it


def profile_words() -> list[str]:
    """List the profiles as they are written."""
    return [f"@{name}" for name in known_profiles()]


class Repl:
    """A conversation at a terminal. The head of the prompt may change at any time; the turns stay."""

    def __init__(
        self, chat: Chat, transcript: Transcript, screen: Screen, strict: bool, markdown: bool = False
    ) -> None:
        self.chat, self.transcript, self.screen, self.strict = chat, transcript, screen, strict
        self.markdown, self.seed = markdown, chat.settings.seed
        self.latest: Answer | None = None
        self.aside: tuple[str, Answer] | None = None  # the latest /again: its preference's short form, and the answer
        self.going = True

    def run(self) -> None:
        """Read and answer until the user leaves.

        Raises:
            CannotWrite: the session still cannot be written at the end.
        """
        line = line_editor(self.completions)
        self.screen.note("/help lists the commands, Ctrl-D leaves")
        while self.going:
            try:
                text = read_text_of_lines(line, self.prompt()).replace("\r\n", "\n")
                self.obey(text) if text.startswith("/") else self.ask(text.strip())
            except EOFError:
                break
            except KeyboardInterrupt:
                continue
            except EdgeError as error:
                self.screen.say(f"metaalign-edge: {one_line(error)}")
        if self.transcript.turns():
            self.transcript.save()

    def prompt(self) -> str:
        """Return the prompt, with the preference in force as far as there is room."""
        room = max(4, shutil.get_terminal_size().columns // 3)
        label = shortened(self.transcript.label.translate(CONTROLS), room)
        return f"[{label}] > " if label else "> "

    def obey(self, line: str) -> None:
        """Carry out a command.

        Raises:
            UsageError: there is none of that name.
        """
        name, _, text = line.partition(" ")
        if (word := self.WORDS.get(name.strip())) is None:
            guess = nearest(name, self.WORDS, "/help lists them")
            raise UsageError(f"no command {name}: {guess} (a space before it makes it a question)")
        word.method(self, text.strip())

    def answer(self, dialog: Dialog) -> Answer:
        """Answer the newest query of a dialog on the screen; what an interrupted answer had said is kept."""
        reply = Reply(self.screen, self.markdown)
        self.chat.interrupt.raised = False
        with self.chat.interrupt, reply.alone():
            answer = self.chat.answer(
                dialog, self.seed, reply.show, lambda begun: warn(self.chat, begun, self.screen, self.strict)
            )
        self.seed, self.latest = (self.seed + 1) % 2**32, answer
        reply.end(answer.response)
        self.screen.detail(describe(answer))
        return answer

    def ask(self, query: str, again: bool = False) -> None:
        """Answer a query, or the last one `again`, and remember it."""
        if query:
            self.aside = None
            self.remember(self.answer(self.transcript.dialog(query, again)), again)

    def remember(self, answer: Answer, again: bool) -> None:
        """Note an answer, in the place of the last one if it was asked `again`."""
        self.transcript.add(asdict(answer), again)
        self.transcript.save()
        check_answer(answer, self.chat.settings.schema, self.screen)

    def last_query(self) -> str:
        """Return the last question.

        Raises:
            UsageError: there is none.
        """
        if not (turns := self.transcript.dialog().turns):
            raise UsageError("there is no question to answer again: ask one")
        return turns[-1].query

    def change(self, **tiers: str) -> None:
        """Change the meta-prompt, and write that down."""
        self.aside = None
        now = {"label": "", **self.transcript.meta_prompt, **tiers}
        self.transcript.set(now["system_info"], now["user_info"], now["label"])
        self.transcript.save()

    def pref(self, text: str) -> None:
        """Show or set User Info."""
        if text:
            self.change(user_info=wish_text(text), label="" if text == "-" else label_of([text]))
        self.screen.say(f"User Info: {self.transcript.meta_prompt['user_info'] or '(empty)'}")

    def system(self, text: str) -> None:
        """Show or set System Info."""
        if text:
            self.change(system_info="" if text == "-" else text)
        self.screen.say(f"System Info: {self.transcript.meta_prompt['system_info'] or '(empty)'}")

    def again(self, text: str) -> None:
        """Answer the last question under another preference."""
        query = self.last_query()
        if not text:
            raise UsageError("/again takes a preference: /again @name, or a text (/regen asks again under the same)")
        dialog = replace(self.transcript.dialog(query, again=True), user_info=wish_text(text))
        self.aside = ("" if text == "-" else label_of([text]), self.answer(dialog))

    def keep(self, _: str) -> None:
        """Take over the latest /again."""
        if self.aside is None:
            raise UsageError("there is nothing to keep: /again @name asks the last question under another preference")
        (label, answer), self.aside = self.aside, None
        self.transcript.set(answer.system_info, answer.user_info, label)
        self.remember(answer, again=True)
        self.screen.say("the answer takes the last one's place, and its preference stays")

    def regen(self, _: str) -> None:
        """Answer the last question again."""
        self.ask(self.last_query(), again=True)

    def compare(self, text: str) -> None:
        """Answer the last question under several preferences."""
        import shlex

        query = self.last_query()
        try:
            wishes = shlex.split(text)
        except ValueError:
            advice = "put each preference that has spaces in quotes"
            raise UsageError(f"a quote is left open in {text!r}: {advice}") from None
        if len(wishes) < 2:
            raise UsageError('/compare takes two preferences or more: /compare @child "in French" - (a lone - is none)')
        dialogs = [replace(self.transcript.dialog(query, again=True), user_info=wish_text(wish)) for wish in wishes]
        self.chat.interrupt.raised = False
        with self.chat.interrupt, parallel_for(self.chat, dialogs) as session, Columns(wishes, self.screen) as columns:
            answers = answer_together(session, dialogs, columns, self.screen, self.strict)
        for answer in answers:
            self.screen.detail(describe(answer))

    def strength(self, text: str) -> None:
        """Show or set how hard a tier pulls."""
        settings = self.chat.settings
        tier, _, number = text.partition(" ")
        if text and tier not in ("pref", "system"):
            raise UsageError("/strength takes a tier and a number: /strength pref 2, or /strength system 1.5")
        if text:
            auto = tier == "pref" and number.strip() == "auto"
            value: Any = "auto" if auto else checked_strength(f"/strength {tier}", number.strip())
            settings = self.chat.settings = replace(settings, **{f"{tier}_strength": value})
        self.screen.say(f"strength: system {settings.system_strength:g}, pref {shown_strength(settings)}")

    def think(self, text: str) -> None:
        """Show or set whether the model is to think."""
        states: dict[str, bool | None] = {"on": True, "off": False, "auto": None}
        if text and text not in states:
            raise UsageError(f"/think takes on, off or auto, not {text!r}")
        if text:
            self.chat.options = self.chat.options._replace(think=states[text])
        (state,) = (name for name, value in states.items() if value is self.chat.options.think)
        self.screen.say(f"thinking: {state}" + (" (as the template does)" if state == "auto" else ""))

    def lora(self, text: str) -> None:
        """Show or set the adapters that are laid over the model."""
        if text:
            self.chat.adapt(() if text == "-" else find_adapters([text]))
        self.screen.say(f"adapters: {name_adapters(self.chat.settings.adapters) or '(none)'}")

    def stats(self, _: str) -> None:
        """Show the figures of the latest answer."""
        if (answer := self.latest) is None:
            raise UsageError("there is no answer yet: ask a question")
        room = self.chat.engine.context if self.chat.engine else 0
        rows = {
            "in": f"{answer.input_tokens:,} tokens, {answer.cached_tokens:,} of them known already",
            "out": f"{answer.output_tokens:,} tokens, {answer.tokens_per_second:.1f} a second ({answer.finish_reason})",
            "first": f"after {answer.first_token_ms:.0f} ms",
            "context": f"{answer.input_tokens + answer.output_tokens:,} of {room:,} tokens",
            "seed": str(answer.seed),
            "strength": f"system {self.chat.settings.system_strength:g}, pref {shown_strength(self.chat.settings)}",
            "model": answer.model,
            "template": answer.template,
            "session": self.transcript.name or "none: /save NAME begins one",
        }
        self.screen.say("\n".join(f"{name:<9} {value}" for name, value in rows.items()))

    def store(self, text: str) -> None:
        """Keep the conversation as a session, or export it."""
        path = Path(text).expanduser()
        if not text:
            raise UsageError("/save takes a name for a session, or a file: /save work, /save talk.md, /save talk.json")
        if path.suffix in (".md", ".json"):
            if path.exists():
                raise UsageError(f"{path} exists: name another file")
            write_whole(path, exported(self.transcript, path.suffix[1:]).encode("utf-8", "replace"))
            self.screen.say(f"written to {path}")
            return
        path = session_path(text)
        if path.exists():
            raise UsageError(f"there is a session {text}: choose another name, or `metaalign-edge sessions rm {text}`")
        kept = Transcript(path)
        kept.lines = self.transcript.lines
        kept.save()
        self.transcript = kept
        self.screen.say(f"this is session {text} from now on: metaalign-edge chat --session {text}")

    def load(self, text: str) -> None:
        """Go on with a session."""
        path = existing_session(text)
        if self.transcript.path is None and self.transcript.turns():
            raise UsageError("this conversation is not kept anywhere: /save it first, or /clear it")
        self.transcript, self.aside = Transcript.read(path), None
        self.screen.say(describe_session(self.transcript))

    def clear(self, _: str) -> None:
        """Forget the turns."""
        self.aside = None
        if self.transcript.dialog().turns:
            self.transcript.clear()
            self.transcript.save()
        self.screen.say("the conversation is forgotten; the meta-prompt stays")

    def help(self, _: str) -> None:
        """List the commands."""
        import textwrap

        columns = shutil.get_terminal_size().columns
        margin, rows = 27 if columns > 60 else 2, []
        for head, help in [
            *((f"{name} {word.takes}".strip(), word.help) for name, word in self.WORDS.items()),
            *self.KEYS,
        ]:
            first = f"{head:<{margin}}" if columns > 60 else f"{head}\n{' ' * margin}"
            rows.append(first + f"\n{' ' * margin}".join(textwrap.wrap(help, max(12, columns - margin - 1))))
        self.screen.say("\n".join(rows))

    def leave(self, _: str) -> None:
        """End the conversation."""
        self.going = False

    @classmethod
    def completions(cls, line: str) -> list[tuple[str, int]]:
        """List what Tab offers at the end of a line, each with how many characters of it that takes the place of."""
        head, space, _ = line.partition(" ")
        if not space:
            return [(name, len(line)) for name in cls.WORDS if line.startswith("/") and name.startswith(line)]
        word, begun = cls.WORDS.get(head), re.split(r"\s|\+(?=@)", line)[-1]
        choices = (word.choices() if callable(word.choices) else word.choices) if word else ()
        return [(choice, len(begun)) for choice in choices if choice.startswith(begun)]

    KEYS = (
        ('"""', "begins and ends a text of several lines; Alt-Enter breaks a line"),
        ("Tab, Ctrl-R", "complete a command, a profile, a session; search what was asked before"),
        ("Ctrl-C, Ctrl-D", "stop an answer, or clear the line; leave"),
    )
    WORDS: Mapping[str, Word] = {
        "/pref": Word("[@NAME|TEXT|-]", "show or set User Info, the preference (- clears it)", pref, profile_words),
        "/system": Word("[TEXT|-]", "show or set System Info (- clears it)", system),
        "/again": Word(
            "@NAME|TEXT",
            "the last question under another preference, this once; /keep makes it stay",
            again,
            profile_words,
        ),
        "/keep": Word("", "the answer of /again takes the last one's place, and its preference stays", keep),
        "/regen": Word("", "answer the last question anew", regen),
        "/compare": Word("@A @B …", "the last question under several, side by side", compare, profile_words),
        "/strength": Word("[pref|system N]", "how hard a tier pulls; 1 is as usual", strength, ("pref", "system")),
        "/think": Word("[on|off|auto]", "let a thinking model think", think, ("on", "off", "auto")),
        "/lora": Word("[PATH[:SCALE]|-]", "show or set the adapter over the model (- takes it away)", lora),
        "/stats": Word("", "figures of the latest answer", stats),
        "/save": Word("NAME|FILE", "keep this conversation as a session; or write it to FILE.md or FILE.json", store),
        "/load": Word("NAME", "go on with a session", load, session_names),
        "/clear": Word("", "forget the conversation, keep the meta-prompt", clear),
        "/help": Word("", "this list", help),
        "/exit": Word("", "leave", leave),
    }


# =====================================================================================================================
# 30  Options
# =====================================================================================================================
# The options that commands share, in groups that a command takes as one parameter, and what files say for them.

app = typer.Typer(
    name="metaalign-edge",
    no_args_is_help=True,
    add_completion=False,  # Typer's own loses the first TAB in zsh, and @ in bash; see `completion`
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def option(*names: str, help: str, panel: str | None = None, env: str | None = None, **more: Any) -> Any:
    """Declare a shared option; `env` names its variable METAALIGN_EDGE_…."""
    return typer.Option(*names, help=help, rich_help_panel=panel, envvar=env and f"METAALIGN_EDGE_{env}", **more)


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take groups of options, NamedTuples, where Typer sees every option of theirs."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {}
    seen = [inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    taken = inspect.signature(command).parameters
    for name, parameter in taken.items():
        if name == "context":
            continue
        if not hasattr(hints[name], "_fields"):
            seen.append(parameter.replace(annotation=hints[name], kind=parameter.KEYWORD_ONLY))
            continue
        groups[name] = hints[name]
        defaults = hints[name]._field_defaults
        seen += [
            inspect.Parameter(field, parameter.KEYWORD_ONLY, default=defaults[field], annotation=annotation)
            for field, annotation in get_type_hints(hints[name], include_extras=True).items()
        ]

    @functools.wraps(command)
    def spread(context: typer.Context, **given: Any) -> None:
        obey_settings(context, given)
        built = {name: group(*(given.pop(field) for field in group._fields)) for name, group in groups.items()}
        command(**given, **built, **({"context": context} if "context" in taken else {}))

    spread.__signature__ = inspect.Signature(seen)  # type: ignore[attr-defined]
    spread.__annotations__ = {parameter.name: parameter.annotation for parameter in seen}
    return spread


# What stands in files reaches a command through Click's `default_map`: after a flag and a variable, and before what is
# built in. A setting is named like the option.

ALSO_SETTINGS = ("pref", "stop", "strict_tiers", "remind", "think", "stream", "quiet", "verbose")  # without a variable
ASIDE: Mapping[str, tuple[str, ...]] = {  # settings that a command leaves aside
    "compare": ("pref",),  # its columns are those that are asked for
    "eval": ("max_tokens", "temp", "seed", "remind", "think", "system_strength", "pref_strength"),  # it measures
}
SHOWN = 60  # characters of a setting that are shown where it takes effect
REPLACED_BY = {  # flags of another name
    "system": ("system_file",),
    "pref": ("pref_file", "no_pref"),
    "quiet": ("verbose",),
    "verbose": ("quiet",),
}


@dataclass(frozen=True)
class Setting:
    """A value of a file, as Click's default_map takes it: looked at when its option is not given."""

    option: Any  # Click's
    value: Any
    origin: str  # the file, or the variable
    project: Project | None = None

    def __call__(self) -> Any:
        """Return the value as a command line would give it.

        Raises:
            UsageError: the option does not take it.
        """
        flag, several = self.option.is_flag, self.option.multiple
        parts = self.value if several and isinstance(self.value, list) else [self.value]
        for part in parts:
            if not isinstance(part, bool if flag else str | int | float) or (isinstance(part, bool) and not flag):
                kind = "true or false" if flag else "a text or a number" + (", or a list of them" if several else "")
                raise self._refusal(UsageError, f"it takes {kind}, not {part!r}")
        given = [part if flag else str(part) for part in parts]
        try:
            self.option.type_cast_value(None, given if several else given[0])
        except typer.BadParameter as error:
            raise self._refusal(UsageError, error.message) from None
        return given if several else given[0]

    def __str__(self) -> str:
        """Return the value for people."""
        return ", ".join(written(self.value))

    def check(self) -> None:
        """Make sure of what an option's type does not know.

        Raises:
            UsageError: no such context, strength or layers, an empty preference. NotFound: no such profile or file.
        """
        given, name = self(), self.option.name
        try:
            if name == "gpu_layers":
                checked_gpu_layers(given)
            elif name == "ctx_size":
                checked_context(given)
            elif name in ("system_strength", "pref_strength") and given != "auto":
                checked_strength(self.option.opts[0], given)
            elif name == "pref":
                MetaPrompt(pref=given).dialog()
            elif name == "model" and (os.path.isabs(given) or "/" not in given):
                resolve_model(given)
            elif name == "template" and looks_like_path(given, ".jinja"):
                read_text(Path(given).expanduser(), "the template")
        except (UsageError, NotFound) as error:
            raise self._refusal(type(error), error) from None

    def _refusal(self, kind: type[EdgeError], reason: object) -> EdgeError:
        return kind(f"{self.origin}: {self.option.name}: {reason}")


def settable(command: Any) -> dict[str, Any]:
    """Return the options of a command, or of all commands of a group, that a file may set, by name."""
    found: dict[str, Any] = {}
    for one in getattr(command, "commands", {"": command}).values():
        for option in one.params:
            if getattr(option, "envvar", None) or option.name in ALSO_SETTINGS:
                found.setdefault(option.name, option)
    return found


def written(value: Any) -> list[str]:
    """Return a setting's value for people and scripts: a line for each text."""
    parts = value if isinstance(value, list | tuple) else [value]
    return [str(part).lower() if isinstance(part, bool) else str(part) for part in parts if part is not None]


@functools.cache
def all_commands() -> Any:
    """Build Click's commands, every one of them."""
    return typer.main.get_command(app)


def called_command(name: str) -> Any:
    """Build the command of a name with what stands around it, as that is all a call needs; all if it is none."""
    one = copy.copy(app)
    one.registered_commands = [
        it for it in app.registered_commands if name == (it.name or getattr(it.callback, "__name__", ""))
    ]
    one.registered_groups = [group for group in app.registered_groups if group.name == name]
    return typer.main.get_command(one) if one.registered_commands or one.registered_groups else all_commands()


def standing() -> dict[str, Setting]:
    """Return what stands in files, by name: the user's, then the project's, then the environment's preference.

    Raises:
        UsageError, NotFound: a file is damaged, or has a key that means nothing.
    """
    path, project, pref = config_file(), find_project(), os.environ.get("METAALIGN_EDGE_PREF")
    if not (project or pref or os.path.isfile(path)):
        return {}
    known = settable(all_commands())
    found = {key: Setting(known[key], value, str(path)) for key, value in read_settings(path, known).items()}
    if project:
        found |= {
            key: Setting(known[key], value, str(project.path), project) for key, value in project.settings.items()
        }
    if pref:  # Click would split it at its spaces
        found["pref"] = Setting(known["pref"], pref, "METAALIGN_EDGE_PREF")
    return found


def check_standing() -> None:
    """Check everything that stands in files.

    Raises:
        UsageError, NotFound: something makes no sense.
    """
    for setting in standing().values():
        setting.check()


def take_settings(context: typer.Context) -> None:
    """Hand a command what stands in files for it; what is wrong with them is said by its options."""
    root, name = cast(Any, context.command), context.invoked_subcommand or ""
    called, aside = root.commands[name], ASIDE.get(name, ())
    taken = {key: option for key, option in settable(called).items() if key not in aside}
    if hasattr(called, "commands") or taken.keys() <= {"quiet", "verbose"}:
        return
    try:
        found = standing()
        defaults: dict[str, Any] = {key: replace(found[key], option=taken[key]) for key in found if key in taken}
        if name == "doctor":
            check_standing()
    except EdgeError as error:
        if name == "doctor":  # looks without them, and says what is wrong with them
            return
        damage = error  # raised only now, so that --help helps

        def complain() -> None:
            raise damage

        defaults = dict.fromkeys(taken, complain)
    context.default_map = {name: defaults}


def obey_settings(context: typer.Context, given: dict[str, Any]) -> None:
    """Drop what a flag of another name replaces, check what is in force of the files, and say where it comes from.

    Raises:
        UsageError, NotFound: something in force makes no sense.
    """
    source = {name: getattr(context.get_parameter_source(name), "name", "") for name in given}
    for name, flags in REPLACED_BY.items():
        wanted = any(given.get(flag) and source[flag] == "COMMANDLINE" for flag in flags)
        if wanted and source.get(name) != "COMMANDLINE":
            given[name], source[name] = None, ""
    defaults = context.default_map or {}
    settings = [defaults[name] for name in given if source[name] == "DEFAULT_MAP"]
    screen = Screen(given.get("quiet", False), given.get("verbose", False))
    for setting in settings:
        setting.check()
    if project := next((setting.project for setting in settings if setting.project), None):
        announce(project, screen)
    for setting in settings:
        screen.detail(f"{setting.option.name}: {shortened(setting, SHOWN)} (from {setting.origin})")


def announce(project: Project, screen: Screen) -> None:
    """Say what a project sets, at its first use; of another user's, at every use."""
    if screen.quiet or project.is_known():
        return
    texts = {key: shortened(", ".join(written(value)), SHOWN) for key, value in project.settings.items()}
    sets = ", ".join(f"{key} {json.dumps(text, ensure_ascii=False)}" for key, text in texts.items())
    whose = "" if project.owner is None else f", another user's file (uid {project.owner}),"
    screen.note(f"metaalign-edge: note: {project.path}{whose} sets {sets} (METAALIGN_EDGE_PROJECT=0 ignores it)")
    project.remember()


OPEN = contextlib.ExitStack()  # what a call holds to its end
DIALOG, MODEL, SAMPLING, OUTPUT = "Dialog", "Model", "Sampling", "Output"

QueryArgument = Annotated[
    str | None,
    typer.Argument(metavar="QUERY", help="The question. stdin, when piped, is put before it.", show_default=False),
]
ModelOption = Annotated[
    str | None,
    option(
        "-m",
        "--model",
        help="A GGUF file, user/repo[:QUANT] on the hub, or a name of `models list`. Default: the embedded one.",
        panel=MODEL,
        env="MODEL",
    ),
]
OfflineOption = Annotated[
    bool,
    option(
        "--offline", help="Open no connection; what is not on this machine is an error.", panel=MODEL, env="OFFLINE"
    ),
]
SystemOption = Annotated[
    str | None, option("-s", "--system", help="System Info: what the provider wants.", panel=DIALOG, env="SYSTEM")
]
SystemFileOption = Annotated[Path | None, option("--system-file", help="Read System Info from a file.", panel=DIALOG)]
PrefOption = Annotated[
    list[str] | None, option("--pref", help="User Info: a text, or @concise and the like. Repeat to add.", panel=DIALOG)
]
PrefFileOption = Annotated[Path | None, option("--pref-file", help="Read User Info from a file.", panel=DIALOG)]
NoPrefOption = Annotated[bool, option("--no-pref", help="Ignore the preferences that stand.", panel=DIALOG)]
TemplateOption = Annotated[
    str, option("--template", help="auto, a shipped name, or a Jinja file.", panel=DIALOG, env="TEMPLATE")
]
StrictOption = Annotated[
    bool, option("--strict-tiers", help="Refuse text that imitates a marker which is no token.", panel=DIALOG)
]
RemindOption = Annotated[
    bool, option("--remind/--no-remind", help="Restate the priority next to the query (wrapped only).", panel=DIALOG)
]
SystemStrengthOption = Annotated[
    float,
    option(
        "--system-strength",
        help="How hard System Info pulls: 1 as the model was trained, 2 twice as far, 0 not at all.",
        panel=DIALOG,
        env="SYSTEM_STRENGTH",
    ),
]
PrefStrengthOption = Annotated[
    str,
    option(
        "--pref-strength",
        help="How hard User Info pulls, or auto: as hard as it changes each token.",
        panel=DIALOG,
        env="PREF_STRENGTH",
    ),
]
ThinkOption = Annotated[
    bool | None, option("--think/--no-think", help="Tell a thinking model's template.", panel=DIALOG)
]
StdinOption = Annotated[bool, option("--no-stdin", help="Leave stdin alone (in loops).", panel=DIALOG)]
MaxTokensOption = Annotated[
    int | None,
    option("-n", "--max-tokens", help="Tokens of the answer at most.", panel=SAMPLING, env="MAX_TOKENS", min=1),
]
ContextOption = Annotated[
    str | None,
    option(
        "-c",
        "--ctx-size",
        help="Tokens of the context, or auto: as many as the model knows and memory holds.",
        panel=MODEL,
        env="CTX_SIZE",
    ),
]
GpuOption = Annotated[
    str, option("-ngl", "--gpu-layers", help="Layers on the GPU: auto, all or a number.", panel=MODEL, env="GPU_LAYERS")
]
ThreadsOption = Annotated[
    int | None,
    option(
        "-t",
        "--threads",
        help="CPU threads. Default: one per core, one for a tiny model.",
        panel=MODEL,
        env="THREADS",
        min=1,
    ),
]
TempOption = Annotated[
    float | None, option("--temp", help="Temperature; 0 is greedy.", panel=SAMPLING, env="TEMP", min=0.0)
]
TopKOption = Annotated[
    int | None, option("--top-k", help="Keep the k likeliest tokens; 0 keeps all.", panel=SAMPLING, env="TOP_K", min=0)
]
TopPOption = Annotated[
    float | None,
    option(
        "--top-p", help="Keep the likeliest tokens up to this share.", panel=SAMPLING, env="TOP_P", min=0.0, max=1.0
    ),
]
MinPOption = Annotated[
    float | None,
    option(
        "--min-p", help="Drop tokens below this share of the likeliest.", panel=SAMPLING, env="MIN_P", min=0.0, max=1.0
    ),
]
PenaltyOption = Annotated[
    float | None,
    option("--repeat-penalty", help="Above 1 discourages repetition.", panel=SAMPLING, env="REPEAT_PENALTY", min=0.1),
]
SeedOption = Annotated[
    int | None, option("--seed", help="Draw the same text again.", panel=SAMPLING, env="SEED", min=0, max=2**32 - 1)
]
SchemaOption = Annotated[
    str | None,
    option(
        "-j",
        "--json-schema",
        help="Answer in JSON of this schema: a file, JSON, or fields as 'name, age int'.",
        panel=SAMPLING,
    ),
]
AdapterOption = Annotated[
    list[str] | None,
    option("--lora", help="Lay a GGUF adapter over the model: PATH or PATH:SCALE. Repeat to add.", panel=MODEL),
]
StopOption = Annotated[
    list[str] | None, option("--stop", help="End the answer before this text. Repeat to add.", panel=SAMPLING)
]
ParallelOption = Annotated[
    int, option("--parallel", help="Answers written at a time.", panel=MODEL, env="PARALLEL", min=1, max=256)
]
ForceOption = Annotated[bool, option("--force", help="Replace an output that exists.")]
NoCacheOption = Annotated[
    bool,
    option(
        "--no-cache",
        help="Neither load nor keep what was read of the meta-prompt.",
        panel=MODEL,
        env="NO_CACHE",
    ),
]
JsonOption = Annotated[bool, option("--json", help="One JSON document on stdout.", panel=OUTPUT)]
SessionOption = Annotated[
    str | None,
    option("--session", metavar="NAME", help="Go on with a conversation of this name, or begin it.", panel=DIALOG),
]
ContinueOption = Annotated[
    bool, option("-C", "--continue", help="Go on with the session that was used last.", panel=DIALOG)
]
MarkdownOption = Annotated[
    bool,
    option("--markdown/--no-markdown", help="On a terminal, render the answer when it is complete.", panel=OUTPUT),
]
StreamOption = Annotated[bool, option("--stream/--no-stream", help="Print text as it comes.", panel=OUTPUT)]
QuietOption = Annotated[bool, option("-q", "--quiet", help="Only errors on stderr.", panel=OUTPUT)]
VerboseOption = Annotated[
    bool, option("-v", "--verbose", help="Say what is chosen, and llama.cpp's log.", panel=OUTPUT)
]


def print_version(wanted: bool) -> None:
    """Print the version and leave, if it was asked for."""
    if wanted:
        Screen().write(f"metaalign-edge {__version__}\n")
        raise typer.Exit


VersionOption = Annotated[
    bool, typer.Option("--version", help="Print the version.", callback=print_version, is_eager=True)
]


class MetaPrompt(NamedTuple):
    """What the two Info tiers say."""

    system: SystemOption = None
    system_file: SystemFileOption = None
    pref: PrefOption = None
    pref_file: PrefFileOption = None
    no_pref: NoPrefOption = False

    def system_info(self) -> str:
        """Return System Info.

        Raises:
            UsageError: it has two sources. NotFound: the file is not there.
        """
        if self.system is not None and self.system_file is not None:
            raise UsageError("--system and --system-file both give System Info: choose one")
        if self.system_file is not None:
            return read_text(self.system_file, "--system-file").removesuffix("\n")
        return self.system or ""

    def wishes(self) -> list[str]:
        """Return the preferences as they are given.

        Raises:
            UsageError: one is empty. NotFound: the file is not there.
        """
        wishes = list(self.pref or [])
        if self.pref_file is not None:
            wishes.append(read_text(self.pref_file, "--pref-file").removesuffix("\n"))
        if any(not wish.strip() for wish in wishes):
            raise UsageError("the preference is empty: say what you prefer, or leave --pref out")
        return wishes

    def dialog(self) -> Dialog:
        """Return a dialog without turns, the preferences joined.

        Raises:
            UsageError, NotFound: as above, or there is no such profile.
        """
        return Dialog(self.system_info(), "\n".join(map(expand_profile, self.wishes())))


class Rendered(NamedTuple):
    """How a dialog becomes a prompt."""

    template: TemplateOption = "auto"
    strict_tiers: StrictOption = False
    remind: RemindOption = True
    think: ThinkOption = None

    def options(self) -> RenderOptions:
        """Return those that concern the rendering."""
        return RenderOptions(self.remind, self.think)


class Loaded(NamedTuple):
    """Which model is loaded, and how."""

    model: ModelOption = None
    ctx_size: ContextOption = None
    gpu_layers: GpuOption = "auto"
    threads: ThreadsOption = None
    offline: OfflineOption = False
    lora: AdapterOption = None

    def path(self, screen: Screen) -> Path:
        """Return where the model is.

        Raises:
            EdgeError: as `find_model`.
        """
        return find_model(self.model, self.offline, screen)

    def file(self, screen: Screen) -> ModelFile:
        """Read the model's metadata.

        Raises:
            EdgeError: as `find_model` and `open_model`.
        """
        return open_model(self.path(screen))

    def settings(self) -> Settings:
        """Return what the engine has to know.

        Raises:
            UsageError: the number of tokens or of layers is none, or a scale. NotFound, LoadError: an adapter is not
                there, or none.
        """
        layers, adapters = checked_gpu_layers(self.gpu_layers), find_adapters(self.lora or ())
        return Settings(checked_context(self.ctx_size), layers, self.threads, adapters=adapters)

    def fitted(self, settings: Settings, file: ModelFile, parallel: int = 1, columns: int = 1) -> Settings:
        """Return the settings for so many answers at a time, each of so many dialogs, with -c auto as a number.

        Raises:
            UsageError: what a context of this model takes is not known. LoadError: none fits.
        """
        contexts = Guidance(Dialog("both", "tiers"), settings.system_strength, settings.pref_strength).dialogs
        lanes = columns * len(contexts)
        settings = replace(settings, sequences=parallel * lanes, lanes=lanes)
        return replace(settings, context=largest_context(file, settings)) if self.ctx_size == "auto" else settings


class Strengths(NamedTuple):
    """How hard each tier pulls."""

    system_strength: SystemStrengthOption = 1.0
    pref_strength: PrefStrengthOption = "1"

    def added(self, settings: Settings) -> Settings:
        """Return the settings with these strengths.

        Raises:
            UsageError: one is no strength.
        """
        system, pref = checked_strength("--system-strength", self.system_strength), self.pref_strength
        return replace(
            settings,
            system_strength=system,
            pref_strength="auto" if pref == "auto" else checked_strength("--pref-strength", pref),
        )


class Sampling(NamedTuple):
    """How tokens are drawn."""

    max_tokens: MaxTokensOption = None
    temp: TempOption = None
    top_k: TopKOption = None
    top_p: TopPOption = None
    min_p: MinPOption = None
    repeat_penalty: PenaltyOption = None
    seed: SeedOption = None
    stop: StopOption = None
    json_schema: SchemaOption = None

    def added(self, settings: Settings) -> Settings:
        """Return the settings with these; a seed is drawn unless there is one.

        Raises:
            UsageError, NotFound: the schema is none, or not there.
        """
        return replace(
            settings,
            max_tokens=self.max_tokens,
            temperature=self.temp,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repeat_penalty=self.repeat_penalty,
            seed=random.SystemRandom().randrange(2**32) if self.seed is None else self.seed,
            stop=tuple(self.stop or ()),
            schema=None if self.json_schema is None else read_schema(self.json_schema),
        )


def kept_states(no_cache: bool, fills: bool = True) -> States | None:
    """Return the states on the disk, unless --no-cache."""
    return None if no_cache else States(fills=fills)


class Talk(NamedTuple):
    """How much is said on stderr."""

    quiet: QuietOption = False
    verbose: VerboseOption = False

    def screen(self) -> Screen:
        """Return the streams."""
        return Screen(self.quiet, self.verbose)


@app.callback(epilog="metaalign-edge COMMAND --help shows a command's options and examples.")
def root(context: typer.Context, version: VersionOption = False) -> None:
    """One local model that follows any preference at inference time.

    System Info says what the provider wants, User Info (--pref) who you are and what you prefer.

    When the two conflict, System Info wins. Everything runs on this machine, offline.
    """
    take_settings(context)


def gathered(loaded: Loaded, sampling: Sampling, strengths: Strengths, talk: Talk) -> Settings:
    """Return the settings of a command that answers."""
    return replace(strengths.added(sampling.added(loaded.settings())), verbose=talk.verbose)


# =====================================================================================================================
# 31  Answers
# =====================================================================================================================
# The commands that render and answer.

STDIN_LIMIT = 1 << 23  # bytes; no context holds more, and /dev/zero never ends


def read_stdin() -> str:
    """Read what is piped in, without its final newline; nothing at a terminal.

    Raises:
        UsageError: stdin is not text. ContextOverflow: there is no end to it.
    """
    if sys.stdin is None or sys.stdin.isatty():
        return ""
    try:
        data = sys.stdin.buffer.read(STDIN_LIMIT + 1)
        text = from_bytes(data)
    except UnicodeDecodeError as error:
        raise UsageError(f"stdin is not UTF-8 text (byte {error.start}): pipe text, or use --no-stdin") from None
    except OSError as error:
        raise UsageError(f"cannot read stdin ({error.strerror}): pipe text, or use --no-stdin") from None
    if len(data) > STDIN_LIMIT:
        raise ContextOverflow(f"stdin has more than {STDIN_LIMIT:,} bytes: no context holds that")
    return text.removesuffix("\n")


def read_query(argument: str | None, no_stdin: bool, repl: bool) -> str | None:
    """Read the query from the argument and a piped stdin; None asks for a conversation.

    Raises:
        UsageError: there is no query, or stdin is not text.
    """
    piped = "" if no_stdin else read_stdin()
    query = "\n\n".join(text for text in (piped, argument or "") if text.strip())
    if query:
        return query
    if repl and argument is None and not no_stdin and at_terminal(sys.stdin) and at_terminal(sys.stdout):
        return None
    raise UsageError("no query: give it as an argument or pipe it in")


def load_model(
    loaded: Loaded,
    rendered: Rendered,
    settings: Settings,
    interrupt: Interrupt,
    screen: Screen,
    columns: int = 1,
) -> tuple[Model, ChatTemplate, Settings]:
    """Load a model, and choose its template meanwhile.

    Raises:
        NotFound, NetworkError, LoadError: there is no such model, or it is none. Interrupted: Ctrl-C.
        TemplateError, UsageError: there is no such template.
    """
    path = loaded.path(screen)
    STOPWATCH.mark("options")
    with interrupt, contextlib.ExitStack() as unless_loaded:
        loading = unless_loaded.enter_context(Loading(path, settings.verbose))
        with STOPWATCH("metadata"):
            file = open_model(path)
            settings = loaded.fitted(settings, file, columns=columns)
        model = unless_loaded.enter_context(Model(file, settings, interrupt, loading))
        with STOPWATCH("template"):
            chosen = choose_template(rendered.template, file)
        unless_loaded.pop_all()
        return model, chosen, settings


def introduce(transcript: Transcript, model: str, screen: Screen, talking: bool) -> None:
    """Say which session goes on, and whether another model answered last."""
    if transcript.path is None:
        return
    (screen.note if talking else screen.detail)(describe_session(transcript))
    before = [str(turn["model"]) for turn in transcript.turns() if turn.get("model")]
    if before and before[-1] != model:
        screen.note(f"metaalign-edge: note: in this session {before[-1]} answered last; this is {model} (-m chooses)")


def answer_once(
    session: Chat, transcript: Transcript, query: str, screen: Screen, strict: bool, reply: Reply | None
) -> None:
    """Answer one query on stdout, as JSON without a `reply`; a session keeps it, also what was cut off.

    Raises:
        Interrupted: Ctrl-C; what there was of the answer is printed.
    """
    begun: list[Answer] = []

    def before(answer: Answer) -> None:
        warn(session, answer, screen, strict)
        begun.append(answer)

    complete = False
    try:
        with session.interrupt, reply.alone() if reply else contextlib.nullcontext():
            show = reply.show if reply else lambda _: None
            answer = session.answer(transcript.dialog(query), session.settings.seed, show, before)
        complete = True
        if reply:
            reply.end(answer.response)
        else:
            screen.json({**asdict(answer), **({"session": transcript.name} if transcript.path else {})})
    finally:
        for answer in begun:
            answer.finish_reason = answer.finish_reason if complete else "interrupted"  # stdout was closed, say
            transcript.add(asdict(answer))
            transcript.save()
    screen.detail(describe(answer))
    screen.detail(f"time {STOPWATCH}; memory {peak_mb():.0f} MB at most")
    session.interrupt.check()
    check_answer(answer, session.settings.schema, screen)


def go_on(name: str | None, newest: bool) -> Transcript:
    """Return the session of a name, or the one that was used last; without either, a conversation that is not kept.

    Raises:
        UsageError: both are asked for, it is no name, or the session is spoilt. NotFound: there is no session yet.
    """
    if name is not None and newest:
        raise UsageError("--session and --continue both choose a session: give one")
    if name is not None:
        return Transcript.read(session_path(name))
    if not newest:
        return Transcript()
    if not (paths := session_paths()):
        raise NotFound("no session to go on with: `metaalign-edge chat --session NAME` begins one")
    return Transcript.read(paths[0])


def set_meta_prompt(transcript: Transcript, meta_prompt: MetaPrompt, context: typer.Context) -> None:
    """Let the command line's tiers be the conversation's; those that it does not give stay as the session has them.

    Raises:
        UsageError, NotFound: as MetaPrompt does.
    """

    def stays(*names: str) -> bool:
        sources = [context.get_parameter_source(name) for name in names]
        return len(transcript.lines) > 1 and not any(source and source.name == "COMMANDLINE" for source in sources)

    given, latest, label = meta_prompt.dialog(), transcript.meta_prompt, label_of(meta_prompt.wishes())
    system_info = latest["system_info"] if stays("system", "system_file") else given.system_info
    if stays("pref", "pref_file", "no_pref"):
        transcript.set(system_info, latest["user_info"], transcript.label)
    else:
        transcript.set(system_info, given.user_info, label)


@app.command()
@grouped
def chat(
    context: typer.Context,
    query: QueryArgument = None,
    *,
    meta_prompt: MetaPrompt,
    name: SessionOption = None,
    newest: ContinueOption = False,
    rendered: Rendered,
    strengths: Strengths,
    loaded: Loaded,
    sampling: Sampling,
    as_json: JsonOption = False,
    stream: StreamOption = True,
    markdown: MarkdownOption = False,
    no_cache: NoCacheOption = False,
    no_stdin: StdinOption = False,
    talk: Talk,
) -> None:
    """Answer a query under a preference; without a query, at a terminal, hold a conversation.

    Examples:

        metaalign-edge chat --pref "Answer in capital letters." "What is the moon?"

        echo "What is tea?" | metaalign-edge chat --pref "one sentence"

        metaalign-edge chat -m model.gguf --system "Be brief." --pref "I'm a zookeeper."

        metaalign-edge chat --json-schema "name, age int" "Who was the oldest human?"

        metaalign-edge chat --session garden "When do I sow peas?"

        metaalign-edge chat --continue "And beans?"
    """
    screen, transcript = talk.screen(), go_on(name, newest)
    set_meta_prompt(transcript, meta_prompt, context)
    settings = gathered(loaded, sampling, strengths, talk)
    asked = read_query(query, no_stdin, repl=not as_json)
    interrupt, states = Interrupt(), kept_states(no_cache)
    model, chosen, settings = load_model(loaded, rendered, settings, interrupt, screen)
    OPEN.enter_context(model)
    with Chat(model, chosen, settings, rendered.options(), interrupt, states=states) as session:
        explain(model, chosen, settings, screen)
        session.think = Aside(screen).write
        introduce(transcript, model.file.path.name, screen, talking=asked is None)
        markdown = markdown and settings.schema is None  # JSON would lose its stars and underscores
        if asked is None:
            Repl(session, transcript, screen, rendered.strict_tiers, markdown).run()
        else:
            reply = None if as_json else Reply(screen, markdown, stream)
            answer_once(session, transcript, asked, screen, rendered.strict_tiers, reply)


@app.command("compare")
@grouped
def compare_command(
    query: QueryArgument = None,
    *,
    meta_prompt: MetaPrompt,
    rendered: Rendered,
    strengths: Strengths,
    loaded: Loaded,
    sampling: Sampling,
    as_json: JsonOption = False,
    no_cache: NoCacheOption = False,
    no_stdin: StdinOption = False,
    talk: Talk,
) -> None:
    """Answer a query under several preferences at once, side by side. A lone - is the answer without any.

    Examples:

        metaalign-edge compare --pref @child --pref @expert "What is a volcano?"

        metaalign-edge compare --pref - --pref @json+@child --json "What is tea?"
    """
    screen, wishes = talk.screen(), meta_prompt.wishes()
    if len(wishes) < 2:
        raise UsageError("compare needs two preferences or more: give each with --pref (a lone - is none)")
    asked = Turn(cast(str, read_query(query, no_stdin, repl=False)))
    dialogs = [Dialog(meta_prompt.system_info(), wish_text(wish), (asked,)) for wish in wishes]
    settings = gathered(loaded, sampling, strengths, talk)
    interrupt, options, states = Interrupt(), rendered.options(), kept_states(no_cache)
    model, chosen, settings = load_model(loaded, rendered, settings, interrupt, screen, len(dialogs))
    with interrupt:
        with model:
            explain(model, chosen, settings, screen)
            one = Session(model, chosen, settings, options, interrupt, states=states)
            with (
                parallel_for(one, dialogs) as session,
                contextlib.nullcontext() if as_json else Columns(wishes, screen) as columns,
            ):
                answers = answer_together(session, dialogs, columns, screen, rendered.strict_tiers)
        if as_json:
            screen.json([{"pref": wish, **asdict(answer)} for wish, answer in zip(wishes, answers, strict=False)])
        screen.detail("\n".join(map(describe, answers)))
        interrupt.check()
        for wish, answer in zip(wishes, answers, strict=False):
            check_answer(answer, settings.schema, screen, f"the answer under {one_line(wish)}")


BatchArgument = Annotated[
    str,
    typer.Argument(
        metavar="IN.jsonl",
        help="A row a line, - is stdin: {query, pref or user_info, system_info, turns, id, max_tokens, seed, "
        "json_schema}.",
        show_default=False,
    ),
]
RowsOption = Annotated[
    Path | None, option("-o", "--output", help="Append finished rows here. Default: stdout.", panel=OUTPUT)
]


@app.command()
@grouped
def batch(
    source: BatchArgument,
    output: RowsOption = None,
    parallel: ParallelOption = 8,
    force: ForceOption = False,
    no_cache: NoCacheOption = False,
    *,
    meta_prompt: MetaPrompt,
    rendered: Rendered,
    strengths: Strengths,
    loaded: Loaded,
    sampling: Sampling,
    talk: Talk,
) -> None:
    """Answer many rows, several at a time. Killed at any moment, the same command goes on where it was.

    Each finished row is written to OUT at once, and when all are there they are put in order.

    Examples:

        metaalign-edge batch questions.jsonl -o answers.jsonl --parallel 16

        echo '{"query": "What is tea?", "pref": "@json"}' | metaalign-edge batch -
    """
    screen, standing = talk.screen(), meta_prompt.dialog()
    file = loaded.file(screen)
    settings = loaded.fitted(gathered(loaded, sampling, strengths, talk), file, parallel)
    chosen, interrupt, options = choose_template(rendered.template, file), Interrupt(), rendered.options()
    deciding = replace(settings, seed=settings.seed if sampling.seed is not None else -1).deciding()
    run = digest([__version__, file.identity, chosen.identity, *options, *deciding])[:16]
    unknown: set[str] = set()
    with contextlib.ExitStack() as stack:
        lines, name = stack.enter_context(open_rows(source))
        ledger = stack.enter_context(open_ledger(output, source, run, force))
        work = Batch(read_rows(lines, standing, settings.seed, unknown), ledger, screen, name, settings.schema)
        jobs = work.jobs(WINDOW * parallel)
        if (first := next(jobs, None)) is not None:  # otherwise there is nothing to load a model for
            stack.enter_context(interrupt)
            model = stack.enter_context(Model(file, settings, interrupt))
            explain(model, chosen, settings, screen)
            kept = kept_states(no_cache, fills=False)
            session = stack.enter_context(Parallel(model, chosen, settings, options, interrupt, parallel, states=kept))
            before = functools.partial(warn, session, screen=screen, strict=rendered.strict_tiers)
            hidden = Screen(quiet=True) if ledger is None and screen.terminal else screen  # the rows are seen there
            tell = stack.enter_context(answers_bar(hidden, file.path.name, 0, None))
            try:
                for job, answer in session.run(itertools.chain([first], jobs), before):
                    work.settle(job, answer)
                    tell(1)
            except Interrupted:
                again = "; the same command goes on from there" if ledger else ""
                screen.note(f"interrupted: {work.before + work.answered:,} rows are answered{again}")
                raise
        if unknown:
            screen.note(f"metaalign-edge: warning: fields that mean nothing here: {', '.join(sorted(unknown))}")
        if ledger:
            ledger.finish(work.total)
    screen.note(f"{work.total:,} rows: {work.answered:,} answered, {work.before:,} before, {work.failed:,} failed")
    if work.failed:
        raise EdgeError(f"{work.failed:,} of {work.total:,} rows failed; the others are complete")


@contextlib.contextmanager
def open_ledger(output: Path | None, source: str, run: str, force: bool) -> Iterator[Ledger | None]:
    """Open what `batch` writes to, if it is a file.

    Raises:
        UsageError: it is the input, or holds another run's rows. CannotWrite: it cannot be written.
    """
    if output is None:
        yield None
        return
    if source != "-" and output.exists() and output.samefile(source):
        raise UsageError(f"{output} is the input: name another with -o")
    with Ledger(output, run, force) as ledger:
        yield ledger


@contextlib.contextmanager
def open_rows(source: str) -> Iterator[tuple[Iterable[bytes], str]]:
    """Open a JSONL file, or stdin; yield its lines and what to call it.

    Raises:
        NotFound: it is not there or not readable. UsageError: stdin is a terminal.
    """
    if source == "-":
        if sys.stdin is None or sys.stdin.isatty():
            raise UsageError("stdin is a terminal: pipe rows in, or name a file")
        yield sys.stdin.buffer, "stdin"
        return
    try:
        with Path(source).expanduser().open("rb") as file:
            yield file, source
    except OSError as error:
        raise NotFound(f"cannot read {source}: {error.strerror}") from None


@app.command("render")
@grouped
def render_command(
    query: QueryArgument = None,
    model: ModelOption = None,
    offline: OfflineOption = False,
    *,
    meta_prompt: MetaPrompt,
    rendered: Rendered,
    tokens: Annotated[bool, option("--tokens", help="Show each token, its id and its tier.", panel=OUTPUT)] = False,
    count: Annotated[
        bool, option("--count", help="Only count the tokens; --json: of each tier.", panel=OUTPUT)
    ] = False,
    as_json: JsonOption = False,
    no_stdin: StdinOption = False,
    talk: Talk,
) -> None:
    """Print exactly what the model is fed. --tokens loads the vocabulary only, so it is quick on any model.

    Examples:

        metaalign-edge render --pref "one sentence" "What is tea?"

        metaalign-edge render --tokens --json -m model.gguf "What is tea?"

        metaalign-edge render --count < long.txt
    """
    screen, dialog = talk.screen(), meta_prompt.dialog()
    dialog = replace(dialog, turns=(Turn(cast(str, read_query(query, no_stdin, repl=False))),))
    file = open_model(find_model(model, offline, screen))
    chosen = choose_template(rendered.template, file)
    screen.detail(f"template {chosen.name}: {chosen.why}")
    rendering = render(dialog, chosen, rendered.options())
    rows: list[Token] | None = None
    if tokens or count or rendered.strict_tiers:
        with load_vocabulary(file, talk.verbose) as vocabulary:
            tokenized = tokenize(rendering, vocabulary, file.context)
        check_forged(tokenized.forged, screen, rendered.strict_tiers)
        rows = tokenized.tokens if tokens or count else None
    elif not as_json:
        screen.note("metaalign-edge: note: tiers are checked on token ids; --tokens shows and checks them")
    if rows is not None and count:
        screen.json(token_counts(rows)) if as_json else screen.write(f"{len(rows)}\n")
    elif as_json:
        screen.json(rendering_document(rendering, rows))
    elif rows is not None:
        screen.write(token_table(rows))
    else:
        screen.write(rendering.prompt + ("\n" if screen.terminal else ""))


def token_counts(tokens: Sequence[Token]) -> dict[str, Any]:
    """Count the tokens of each tier, and of the scaffold between them."""
    counts: Counter[str] = Counter(token.tier or "scaffold" for token in tokens)
    return {"total": len(tokens), **{tier: counts[tier] for tier in (*TIERS, "scaffold")}}


def rendering_document(rendering: Rendering, tokens: list[Token] | None) -> dict[str, Any]:
    """Make the JSON document of `render`."""
    return {
        "template": rendering.template,
        "native": rendering.native,
        "messages": rendering.messages,
        "prompt": rendering.prompt,
        "tokens": tokens
        and [{"id": token.id, "text": token.text, "tier": token.tier or "scaffold"} for token in tokens],
    }


# =====================================================================================================================
# 32  Conversion
# =====================================================================================================================

SourceArgument = Annotated[
    str,
    typer.Argument(
        metavar="SRC",
        help="A Hugging Face checkpoint folder, user/repo on the hub, or a GGUF file to quantise anew.",
        show_default=False,
    ),
]
OutputOption = Annotated[
    Path | None, option("-o", "--output", help="The GGUF to write. Default: NAME-OUTTYPE.gguf here.")
]
OuttypeOption = Annotated[
    str | None,
    option(
        "--outtype",
        help="f32, f16, bf16, q8_0, or any type of llama.cpp's: Q4_K_M, Q6_K, IQ4_XS, … "
        "Default: q8_0; of an adapter, f32.",
    ),
]
LoraOption = Annotated[
    list[str] | None, option("--lora", help="A LoRA adapter of PEFT's to merge, DIR or DIR:SCALE; repeatable.")
]
LoraOnlyOption = Annotated[bool, option("--lora-only", help="Write the adapter as a GGUF of its own instead.")]
CarriedTemplateOption = Annotated[
    str, option("--template", help="A name or a file to carry as chat template; keep: the checkpoint's own.")
]
PreOption = Annotated[
    str | None, option("--pre", help="llama.cpp's name of the pre-tokenizer, where it cannot be found.")
]
DryRunOption = Annotated[bool, option("--dry-run", help="Show the plan, and write nothing.")]
CheckOption = Annotated[bool, option("--check/--no-check", help="Load the result and decode a token.")]
QUANTISATION = "Quantisation, in llama-quantize's words"

ImatrixOption = Annotated[
    Path | None, option("--imatrix", help="An importance matrix, as llama-imatrix writes it.", panel=QUANTISATION)
]
LeaveOutputOption = Annotated[
    bool, option("--leave-output-tensor", help="Keep output.weight as it is stored.", panel=QUANTISATION)
]
OutputTypeOption = Annotated[
    str | None, option("--output-tensor-type", help="A type for output.weight.", panel=QUANTISATION)
]
EmbeddingTypeOption = Annotated[
    str | None, option("--token-embedding-type", help="A type for token_embd.weight.", panel=QUANTISATION)
]
TensorTypeOption = Annotated[
    list[str] | None,
    option("--tensor-type", help="PATTERN=TYPE for the tensors so named. Repeat to add.", panel=QUANTISATION),
]
PureOption = Annotated[bool, option("--pure", help="One type for all matrices, no mixture.", panel=QUANTISATION)]


@app.command()
def convert(
    source: SourceArgument,
    output: OutputOption = None,
    outtype: OuttypeOption = None,
    lora: LoraOption = None,
    lora_only: LoraOnlyOption = False,
    template: CarriedTemplateOption = "auto",
    pre: PreOption = None,
    imatrix: ImatrixOption = None,
    leave_output: LeaveOutputOption = False,
    output_type: OutputTypeOption = None,
    embedding_type: EmbeddingTypeOption = None,
    tensor_type: TensorTypeOption = None,
    pure: PureOption = False,
    dry_run: DryRunOption = False,
    check: CheckOption = True,
    force: ForceOption = False,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Convert a tuned Hugging Face checkpoint to GGUF, without torch.

    A checkpoint whose tokenizer has the tier tokens gets the native three-tier template.

    Examples:

        metaalign-edge convert my-tuned-model -o my-model.gguf

        metaalign-edge convert my-tuned-model --outtype Q4_K_M --template keep

        metaalign-edge convert base-model --lora my-adapter -o my-model.gguf

        metaalign-edge convert my-model-f16.gguf --outtype Q6_K --dry-run
    """
    screen = Screen(quiet, verbose)
    converter = part("convert")
    try:
        outtype = converter.canonical(outtype or ("f32" if lora_only else "q8_0"))
    except converter.ConvertError as error:
        raise UsageError(str(error)) from None
    types = (output_type, embedding_type, tuple(tensor_type or ()))
    options = converter.Options(imatrix, leave_output, *types, pure)
    if lora_only and (len(lora or []) != 1 or dry_run or options):
        raise UsageError("--lora-only writes one adapter: name it with one --lora, without --dry-run or quantisation")
    if is_gguf(Path(source).expanduser()):
        if pre is not None or lora or template not in ("auto", "keep"):
            raise UsageError(
                f"--pre, --lora and --template are for checkpoints: {source} is a GGUF file and keeps what it has"
            )
        target = output or Path(f"{stem_of(source)}-{outtype}.gguf")
        converter.check_output(target, force)
        plan = converter.plan_gguf(Path(source).expanduser(), outtype, options=options)
    else:
        checkpoint = converter.open_checkpoint(find_checkpoint(source, screen, offline))
        adapters = [open_lora(name, checkpoint, offline, screen) for name in lora or []]
        if lora_only:
            target = output or Path(f"{adapters[0].name}-{outtype}.gguf")
            result = converter.write_adapter(checkpoint, adapters[0], target, outtype=outtype, force=force)
            report_conversion(result, as_json, screen)
            return
        target = output or Path(f"{Path(checkpoint.name).name}-{outtype}.gguf")
        converter.check_output(target, force)
        checkpoint = converter.merge(checkpoint, adapters) if adapters else checkpoint
        name, text = conversion_template(template, checkpoint)
        plan = converter.plan_checkpoint(
            checkpoint, outtype, chat_template=text, template_name=name, pre=pre, check=check, options=options
        )
    if dry_run:
        show_plan(plan, target, as_json, screen)
        return
    verify = functools.partial(verify_conversion, settings=Settings(verbose=verbose)) if check else None
    with progress_bar(screen) as bar, stopping_at(bar) as progress:
        result = converter.write_plan(plan, target, force=force, progress=progress, verify=verify)
    report_conversion(result, as_json, screen)


def open_lora(name: str, checkpoint: Any, offline: bool, screen: Screen) -> Any:
    """Open the LoRA adapter `name`, a folder or a hub id, with `:SCALE` behind it or without."""
    folder, scale = split_scale(name)
    return part("convert").open_adapter(find_checkpoint(folder, screen, offline), checkpoint, scale)


def stem_of(source: str) -> str:
    """Return a GGUF file's name without the type that stands at its end."""
    converter = part("convert")
    name = Path(source).stem
    stem, _, kind = name.rpartition("-")
    try:
        converter.canonical(kind)
    except converter.ConvertError:
        return name
    return stem or name


def show_plan(plan: Any, target: Path, as_json: bool, screen: Screen) -> None:
    """Print what `convert` would write, and what it would need."""
    free = shutil.disk_usage(target.parent).free
    memory = peak_mb() + plan.memory / 1e6
    tensors = {kind: {"count": count, "bytes": size} for kind, (count, size) in plan.by_type().items()}
    document = {
        "output": str(target),
        "architecture": plan.architecture,
        "parameters": plan.parameters,
        "outtype": plan.outtype,
        "bytes": plan.bytes,
        "template": plan.template,
        "tensors": tensors,
        "free_bytes": free,
        "memory_mb": round(memory),
        "checks": list(plan.checks),
    }
    if as_json:
        screen.json(document)
        return
    template = plan.template or "none"
    rows = [f"{target}: {plan.architecture}, {plan.parameters:,} parameters, {plan.outtype}, template {template}"]
    rows += [f"  {kind:<8}{row['count']:>6} tensors{row['bytes'] / 1e6:>12,.1f} MB" for kind, row in tensors.items()]
    rows += [
        f"  disk    {plan.bytes / 1e6:,.1f} MB needed, {free / 1e6:,.0f} MB free",
        f"  memory  about {memory:,.0f} MB, and more for the checks, unless --no-check",
        *(f"  note    {line}" for line in plan.checks),
    ]
    screen.lines(rows)


def report_conversion(result: Any, as_json: bool, screen: Screen) -> None:
    """Say what `convert` did, and what was checked; warnings even without -v."""
    for line in result.checks:
        if line.startswith("warning: "):
            screen.note(f"metaalign-edge: {line}")
        else:
            screen.detail(f"checked: {line}")
    if as_json:
        screen.json({**asdict(result), "output": str(result.output), "checks": list(result.checks)})
        return
    screen.note(
        f"{result.output}: {result.architecture}, {result.parameters:,} parameters, {result.outtype}, "
        f"{result.bytes / 1e6:.1f} MB, template {result.template or 'none'}, {result.seconds:.1f} s"
    )


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
    if looks_like_path(name, ".jinja"):
        text, label = read_text(Path(name).expanduser(), "the template"), Path(name).stem
    elif name in shipped:
        text, label = read_text(shipped[name], "the template"), name
    else:
        raise UsageError(f"no template {name!r}: choose from auto, keep, {', '.join(shipped)}, or give a file")
    return (label if Template(text, name).mentions("user_info") else None), text


def verify_conversion(path: Path, settings: Settings) -> list[str]:
    """Check a conversion before it gets its name; see `try_model`.

    Raises:
        EdgeError: of the kind that `try_model` raises; nothing stays.
    """
    try:
        return try_model(path, replace(settings, gpu_layers="0"))
    except (LoadError, TemplateError, TierViolation, ContextOverflow) as error:
        raise type(error)(f"the result fails its check, so it was removed (--no-check keeps it): {error}") from error


# =====================================================================================================================
# 33  What stays
# =====================================================================================================================
# States, preferences and settings: what is kept between calls, and where.

cache = typer.Typer(no_args_is_help=True, help="What was read of meta-prompts, kept on the disk.")
app.add_typer(cache, name="cache")


@cache.command("show")
def cache_show(as_json: JsonOption = False) -> None:
    """List what is kept: how large, how often it saved the reading of a meta-prompt, and when last."""
    screen, states = Screen(), States()
    files = states.files()
    size = sum(file.bytes for file in files)
    document = {
        "folder": str(states.folder),
        "bytes": size,
        "limit": states.most,
        "hits": sum(file.hits for file in files),
        "states": [
            {"name": file.path.stem, "bytes": file.bytes, "hits": file.hits, "used": file.used} for file in files
        ],
    }
    if as_json:
        screen.json(document)
        return
    heads = ["state", "MB", "hits", "last used"]
    rows = [
        [file.path.stem[:12], f"{file.bytes / 1e6:.1f}", str(file.hits), on_clock(file.used)]
        for file in files
    ]
    lines = aligned(heads, rows) if rows else []
    total = f"{counted(len(files), 'state')}, {size / 1e6:,.1f} of {states.most / 1e6:,.0f} MB, {states.folder}"
    screen.lines([*lines, total])


@cache.command("clear")
def cache_clear(quiet: QuietOption = False) -> None:
    """Remove all states. The next call reads its meta-prompt again."""
    Screen(quiet).note(f"{counted(States().clear(), 'state')} removed")


pref = typer.Typer(no_args_is_help=True, help="Preferences with a name, and the ones that stand.")
app.add_typer(pref, name="pref")

ProfileArgument = Annotated[str, typer.Argument(metavar="NAME", help="A profile: brief or @brief.", show_default=False)]
ProfilesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[NAME]...", help="Profiles: brief or @brief.", show_default=False)
]


@pref.command("add")
def pref_add(
    name: ProfileArgument,
    text: Annotated[
        str | None, typer.Argument(metavar="TEXT", help="What you prefer. Default: stdin.", show_default=False)
    ] = None,
    file: Annotated[Path | None, option("--file", help="Read the text from a file.")] = None,
    force: Annotated[bool, option("--force", help="Replace a profile that exists.")] = False,
    quiet: QuietOption = False,
) -> None:
    """Give a preference a name: from then on it is `--pref @NAME`.

    Examples:

        metaalign-edge pref add brief "Answer in two sentences at most."

        metaalign-edge pref add --file about-me.txt me

        fortune | metaalign-edge pref add --force mood
    """
    name = profile_name(name)
    if text is not None and file is not None:
        raise UsageError("TEXT and --file both say what you prefer: choose one")
    if file is not None:
        text = read_text(file, "--file")
    elif text is None:
        text = read_stdin()
        if not text:
            raise UsageError("no text: give it as an argument, with --file, or pipe it in")
    store_profile(name, text, force=force)
    Screen(quiet).note(
        f"@{name} is kept: use it with --pref @{name}, or always with `metaalign-edge pref default {name}`"
    )


@pref.command("list")
def pref_list(as_json: JsonOption = False) -> None:
    """List the profiles: your own, the built-in ones, and with a * those that stand.

    Examples:

        metaalign-edge pref list

        metaalign-edge pref list --json
    """
    screen, built_in = Screen(), built_in_profiles()
    own, stands = own_profiles(), standing_profiles()
    found: list[dict[str, Any]] = []
    for name in known_profiles():
        try:
            text = profile_text(name)
        except EdgeError as error:
            screen.note(f"metaalign-edge: warning: {one_line(error)}")
            text = ""
        kind = {"own": name in own, "built_in": name in built_in, "default": name in stands}
        found.append({"name": name, "text": text, **kind})
    if as_json:
        screen.json(found)
        return
    rows = [
        [
            f"{'*' if one['default'] else ' '} @{one['name']}",
            "built-in" if not one["own"] else "own, wins" if one["built_in"] else "own",
            one_line(one["text"]) if one["text"] else "",
        ]
        for one in found
    ]
    wide = screen.terminal and shutil.get_terminal_size().columns >= 60  # narrower, a table would cut the names
    screen.lines((rich_table if wide else aligned)(["  profile", "kind", "text"], rows))


@pref.command("show")
def pref_show(name: ProfileArgument, as_json: JsonOption = False) -> None:
    """Print the text of a profile.

    Examples:

        metaalign-edge pref show concise
    """
    name, screen = profile_name(name), Screen()
    text, own, built_in = profile_text(name), name in own_profiles(), name in built_in_profiles()
    kind = {"own": own, "built_in": built_in, "default": name in standing_profiles()}
    screen.json({"name": name, "text": text, **kind}) if as_json else screen.write(f"{text}\n")


@pref.command("edit")
def pref_edit(name: ProfileArgument, quiet: QuietOption = False) -> None:
    """Edit a profile in $VISUAL or $EDITOR; a built-in one becomes one of your own, which wins.

    A text that is unchanged or empty leaves all as it was.

    Examples:

        EDITOR=nano metaalign-edge pref edit brief
    """
    name, screen = profile_name(name), Screen(quiet)
    before = own_profile(name)
    old = profile_text(name) if before is None else before
    with edited(old, f"{name}.txt") as text:
        if text in ("", old):
            screen.note(f"@{name} stays as it was: the text is {'empty' if not text else 'unchanged'}")
            return
        store_profile(name, text, before)
    screen.note(f"@{name} is changed")


@contextlib.contextmanager
def edited(text: str, name: str) -> Iterator[str]:
    """Let the user edit a text in a file of a name; yield what became of it. If that fails, the file stays.

    Raises:
        UsageError: no editor can be started, or it leaves something that is not UTF-8. EdgeError: the editor failed.
    """
    import shlex
    import subprocess
    import tempfile

    windows = os.name == "nt"
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR")
    if not editor and not at_terminal(sys.stdin):
        raise UsageError("no terminal for an editor: set VISUAL or EDITOR, or use `metaalign-edge pref add --force`")
    editor = editor or ("notepad" if windows else "vi")
    draft = Path(tempfile.mkdtemp(prefix="metaalign-edge-")) / name
    try:
        draft.write_bytes(f"{text}\n".encode())
        status = subprocess.run([*shlex.split(editor, posix=not windows), str(draft)]).returncode
    except (OSError, ValueError) as error:
        shutil.rmtree(draft.parent, ignore_errors=True)
        raise UsageError(f"cannot start the editor {editor!r}: {one_line(error)}: set VISUAL or EDITOR") from None
    try:
        if status:
            raise EdgeError(f"the editor {editor!r} ended with {status}, so nothing is changed")
        yield read_text(draft, "the draft").strip()
    except EdgeError as error:
        raise type(error)(f"{error}; what you wrote is in {draft}") from None
    shutil.rmtree(draft.parent, ignore_errors=True)


@pref.command("rm")
def pref_rm(names: ProfilesArgument = None, quiet: QuietOption = False) -> None:
    """Remove profiles of your own.

    Examples:

        metaalign-edge pref rm brief mood
    """
    if not names:
        raise UsageError("name the profiles to remove: `metaalign-edge pref list` shows them")
    bare = list(dict.fromkeys(map(profile_name, names)))
    gone = set(bare) - built_in_profiles().keys()
    if lost := gone & set(standing_profiles()):
        first = min(lost)
        raise UsageError(
            f"@{first} stands by default: change that first, with `metaalign-edge pref default NAME` or --none"
        )
    remove_profiles(bare)
    Screen(quiet).note(f"{', '.join(f'@{name}' for name in bare)} removed")


@pref.command("default")
def pref_default(
    context: typer.Context,
    names: ProfilesArgument = None,
    none: Annotated[bool, option("--none", help="Let no preference stand.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Say which profiles apply to every chat, batch and render, joined in this order; without a name, show them.

    Examples:

        metaalign-edge pref default brief metric

        metaalign-edge pref default --none
    """
    screen = Screen(quiet)
    if none and names:
        raise UsageError("--none and a name contradict each other: choose one")
    if names:
        bare = [profile_name(name) for name in names]
        for name in bare:
            profile_text(name)
        store_setting("pref", [f"@{name}" for name in bare])
    elif none:
        store_setting("pref", None)
    if none or names:
        note_nearer(settable_key("pref"), context, screen)
        return
    setting = standing().get("pref")
    wishes = [] if setting is None else setting()
    if as_json:
        screen.json(wishes)
    elif wishes:
        screen.lines(wishes)
        screen.note(f"from {cast(Setting, setting).origin}")
    else:
        screen.note("no preference stands: `metaalign-edge pref default NAME` sets one")


def standing_profiles() -> list[str]:
    """List the profiles that stand here, by name.

    Raises:
        UsageError, NotFound: a file of settings makes no sense.
    """
    setting = standing().get("pref")
    return [name for wish in setting() for name in profile_names(wish)] if setting else []


config = typer.Typer(no_args_is_help=True, help="What the options are when they are not given.")
app.add_typer(config, name="config")
KeyArgument = Annotated[
    str, typer.Argument(metavar="KEY", help="An option's name: max_tokens for --max-tokens.", show_default=False)
]


class InForce(NamedTuple):
    """The value of a setting, and what gave it."""

    value: Any  # None: the model, or the machine, decides
    origin: str


def in_force(context: typer.Context) -> dict[str, InForce]:
    """Return every setting as it is in force here for a command without flags.

    Raises:
        UsageError, NotFound: a file of settings makes no sense.
    """
    known, found = settable(all_commands()), standing()
    values: dict[str, InForce] = {}
    for name, option in known.items():
        if (given := option.value_from_envvar(context)) is not None:
            values[name] = InForce(option.type_cast_value(context, given), option.envvar)
        elif name in found:
            values[name] = InForce(option.type_cast_value(context, found[name]()), found[name].origin)
        else:
            values[name] = InForce(option.default, "built-in")
    return values


def settable_key(key: str) -> Any:
    """Return the option that a setting is named after.

    Raises:
        UsageError: there is none.
    """
    known = settable(all_commands())
    name = key.removeprefix("--").replace("-", "_")
    if name not in known:
        raise UsageError(f"no setting {key!r}: {nearest(name, known, '`metaalign-edge config show` lists all')}")
    return known[name]


def note_nearer(option: Any, context: typer.Context, screen: Screen) -> None:
    """Say what comes before the user's file here, if anything does, for a setting that was just changed there."""
    nearer = option.envvar if option.value_from_envvar(context) is not None else None
    with contextlib.suppress(EdgeError):  # of another setting, which is not what was asked for
        found = standing().get(option.name)
        nearer = nearer or (found and found.origin)
    if nearer and nearer != str(config_file()):
        screen.note(f"metaalign-edge: note: here {nearer} comes before it")


@config.command("show")
def config_show(context: typer.Context, as_json: JsonOption = False) -> None:
    """List every setting: its value in force here, and what gives it.

    Examples:

        metaalign-edge config show

        metaalign-edge config show --json
    """
    screen, values = Screen(), in_force(context)
    if as_json:
        screen.json({key: one._asdict() for key, one in values.items()})
        return
    rows = [[key, one_line(" ".join(written(one.value)) or "-"), one.origin] for key, one in values.items()]
    widths = [max(len(row[place]) for row in rows) for place in (0, 1)]
    screen.lines(f"{key:<{widths[0]}}  {value:<{min(widths[1], 40)}}  {origin}" for key, value, origin in rows)


@config.command("path")
def config_path() -> None:
    """Print where the settings lie: a TOML file, which need not be there.

    Examples:

        $EDITOR "$(metaalign-edge config path)"
    """
    Screen().write(f"{config_file()}\n")


@config.command("get")
def config_get(context: typer.Context, key: KeyArgument, as_json: JsonOption = False) -> None:
    """Print the value of a setting that is in force here; of several texts, a line each.

    Examples:

        metaalign-edge config get model
    """
    name, screen = settable_key(key).name, Screen()
    value = in_force(context)[name].value
    if as_json:
        screen.json(value)
    elif value is None:
        raise NotFound(f"{name} is not set: set it with `metaalign-edge config set {name} VALUE`")
    else:
        screen.lines(written(value))


@config.command("set")
def config_set(
    context: typer.Context,
    key: KeyArgument,
    values: Annotated[
        list[str], typer.Argument(metavar="VALUE...", help="One; of pref and stop, any.", show_default=False)
    ],
    quiet: QuietOption = False,
) -> None:
    """Set what an option is when it is not given. Comments in the file stay.

    Examples:

        metaalign-edge config set max_tokens 300

        metaalign-edge config set pref @concise "I live in Rome."
    """
    taken = settable_key(key)
    if len(values) > 1 and not taken.multiple:
        raise UsageError(f"{taken.name} takes one value, not {len(values)}: put a text in quotes")
    try:
        found = taken.type_cast_value(None, values if taken.multiple else values[0])
    except typer.BadParameter as error:
        raise UsageError(f"{taken.name}: {error.message}") from None
    value = list(found) if taken.multiple else found
    if taken.name == "model" and (place := Path(values[0]).expanduser()).is_file():
        value = os.path.abspath(place)  # whatever the working folder will be
    for text in values:
        Dialog(text)  # refuses what is not UTF-8
    Setting(taken, value, "config set").check()
    store_setting(taken.name, value)
    note_nearer(taken, context, Screen(quiet))


@config.command("unset")
def config_unset(key: KeyArgument) -> None:
    """Remove a setting, also one that means nothing.

    Examples:

        metaalign-edge config unset max_tokens
    """
    name = key if key in read_toml(config_file()) else settable_key(key).name
    store_setting(name, None)


@app.command()
def paths(as_json: JsonOption = False) -> None:
    """Print where everything lies, one a line, and how large the caches are.

    Examples:

        metaalign-edge paths

        metaalign-edge paths --json
    """
    screen, project = Screen(), find_project()
    places = {
        "settings": config_file(),
        "profiles": profiles_folder(),
        "project": project and project.path,
        "states": cache_folder() / "states",
        "answers": cache_folder() / "answers",
        "data": data_folder(),
        "hub": hub_folder(),
    }
    sizes = {name: folder_bytes(cast(Path, places[name])) for name in ("states", "answers")}
    if as_json:
        screen.json({name: {"path": path and str(path), "bytes": sizes.get(name)} for name, path in places.items()})
        return
    for name, path in places.items():
        size = f"  ({sizes[name] / 1e6:,.1f} MB)" if name in sizes else ""
        screen.write(f"{name:<10}{path or '-'}{size}\n")


def folder_bytes(folder: Path) -> int:
    """Return the size of all files in a folder; 0 if there is none."""
    sizes = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            sizes += path.stat().st_size if path.is_file() else 0
    return sizes


# =====================================================================================================================
# 34  Models and sessions
# =====================================================================================================================

RepositoryArgument = Annotated[
    str, typer.Argument(metavar="REPO[:QUANT]", help="A repository of the hub: user/repo, user/repo:Q4_K_M or :FILE.")
]
ListOption = Annotated[bool, option("--list", help="Show what there is, and what would be taken; download nothing.")]
UpdateOption = Annotated[bool, option("--update", help="Ask the hub for a newer version of what is here.")]


@app.command()
def pull(
    wanted: RepositoryArgument,
    show: ListOption = False,
    update: UpdateOption = False,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Download a model into the hub's own cache, and print its path. What was stopped goes on where it was.

    Without QUANT, the best that fits this machine is taken. HF_HOME, HF_HUB_CACHE and HF_TOKEN are honoured.

    Examples:

        metaalign-edge pull Qwen/Qwen2.5-0.5B-Instruct-GGUF

        metaalign-edge pull bartowski/Llama-3.2-1B-Instruct-GGUF:Q4_K_M

        metaalign-edge pull bartowski/Llama-3.2-1B-Instruct-GGUF --list
    """
    screen, named = Screen(quiet, verbose), REPOSITORY.fullmatch(wanted)
    if not named:
        raise UsageError(f"{wanted!r} is no repository of the hub: they are called user/repo, or user/repo:QUANT")
    repository, tag = named[1], named[2] or ""
    here = [] if show or update else stored_as(wanted)
    if not here and is_offline(offline):
        raise absent(wanted)
    if show:
        show_choices(repository, tag, as_json, screen)
        return
    path = here[0].path if here else download_model(repository, tag, screen)
    try:
        row = model_row(name_of(path), ModelFile(path))
    except LoadError as error:
        raise LoadError(f"{error}: `metaalign-edge models rm {wanted}`, then pull it again") from None
    if here:
        screen.note(f"{row['name']} is here already; --update asks the hub for a newer one")
    screen.json({**row, "downloaded": not here}) if as_json else screen.write(f"{path}\n")


def show_choices(repository: str, wanted: str, as_json: bool, screen: Screen) -> None:
    """Print the models of a repository, and which one `pull` would take.

    Raises:
        NotFound, NetworkError, UsageError: as `read_repository` and `choose`.
    """
    _, choices = read_repository(repository)
    free = free_memory()
    taken = choose(repository, choices, wanted, Screen(quiet=True)) if wanted else best_choice(choices, free)
    rows = [
        {
            "name": f"{repository}:{choice.tag}",
            "quantization": choice.quantization or None,
            "files": [file.name for file in choice.files],
            "bytes": choice.bytes,
            "fits": choice.bytes <= ROOM * free,
            "taken": choice is taken,
        }
        for choice in choices
    ]
    if as_json:
        screen.json(rows)
        return
    notes = [
        "taken" if row["taken"] else "" if row["fits"] else f"over {100 * ROOM:.0f} % of the free memory"
        for row in rows
    ]
    cells = [[choice.tag, in_bytes(choice.bytes), note] for choice, note in zip(choices, notes, strict=True)]
    screen.lines(screen.lay_out(["model", "size", ""], cells))


models = typer.Typer(no_args_is_help=True, help="The models on this machine.")
app.add_typer(models, name="models")
NameArgument = Annotated[
    str | None, typer.Argument(metavar="NAME", help="A name that `models list` shows, or a path.", show_default=False)
]
NamesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="NAME...", help="Names that `models list` shows.", show_default=False)
]
UnfinishedOption = Annotated[bool, option("--unfinished", help="Remove what stopped downloads left.")]
NoDefaultOption = Annotated[bool, option("--none", help="Go back to the embedded model.")]


def model_row(name: str, file: ModelFile) -> dict[str, Any]:
    """Return what `models list` says of a model.

    Raises:
        LoadError: it is damaged.
    """
    file.check_whole()
    return {
        "name": name,
        "path": str(file.path),
        "bytes": file.bytes,
        "architecture": file.architecture,
        "parameters": file.parameters,
        "quantization": file.quantization,
        "context": file.context,
        "template": file.metadata.get("metaalign.template") or ("embedded" if file.templates else None),
        "error": None,
    }


def damaged_row(one: Stored, error: Exception) -> dict[str, Any]:
    """Return what `models list` says of a model that cannot be loaded."""
    nothing = dict.fromkeys(("architecture", "parameters", "quantization", "context", "template"))
    size = sum(part.stat().st_size for part in parts_of(one.path) if part.is_file())
    return {"name": one.name, "path": str(one.path), "bytes": size, **nothing, "error": str(error)}


def unfinished_downloads() -> list[Path]:
    """List what downloads into the hub's cache have left there, ours and other programs'."""
    return sorted(hub_folder().glob("models--*/blobs/*.incomplete"))


@models.command("list")
def models_list(as_json: JsonOption = False) -> None:
    """List the models in the hub's cache, in the folders of llama.cpp and LM Studio, and the embedded one.

    A file that is damaged, or only half there, is listed with its error.

    Examples:

        metaalign-edge models list

        metaalign-edge models list --json
    """
    screen, rows = Screen(), []
    for one in stored_models():
        try:
            file = ModelFile(one.path)
            if file.purpose == "model":
                rows.append(model_row(one.name, file))
        except (EdgeError, ValueError, TypeError) as error:
            rows.append(damaged_row(one, error))
    if as_json:
        screen.json(rows)
        return
    cells = [
        [row["name"], in_bytes(row["bytes"]), "-", "-", "-", "-", f"damaged: {row['error']}"]
        if row["error"]
        else [
            row["name"],
            in_bytes(row["bytes"]),
            row["architecture"],
            f"{row['parameters'] / 1e6:,.0f} M",
            row["quantization"],
            f"{row['context']:,}",
            row["template"] or "none",
        ]
        for row in rows
    ]
    heads = ["model", "size", "architecture", "parameters", "quantisation", "context", "template"]
    screen.lines(screen.lay_out(heads, cells))
    if left := unfinished_downloads():
        size = in_bytes(sum(path.stat().st_size for path in left))
        screen.note(f"unfinished downloads: {size}; `pull` goes on with them, `models rm --unfinished` removes them")


@models.command("show")
def models_show(name: NameArgument = None, as_json: JsonOption = False) -> None:
    """Show what a model is: its size, its template and tiers, its licence, and what a context takes.

    Examples:

        metaalign-edge models show

        metaalign-edge models show Qwen/Qwen2.5-0.5B-Instruct-GGUF:Q8_0 --json
    """
    screen, file = Screen(), open_model(find_model(name, None, Screen()))
    tokens, words = split_markers(file)
    native = choose_template("auto", file).native if file.templates else None
    by_layer = cache_bytes(file)
    kv = sum(by_layer) if by_layer else None
    document = {
        **model_row(name_of(file.path), file),
        "parts": [str(part) for part in file.paths],
        "native": native,
        "marker_tokens": tokens,
        "marker_words": words,
        "kv_bytes_per_1000_tokens": kv and 1000 * kv,
        "licence": file.metadata.get("general.license"),
    }
    if as_json:
        screen.json(document)
        return
    way = {True: "native: it knows the three tiers", False: "wrapped", None: "name one with --template"}[native]
    rows = {
        "model": document["name"],
        "file": f"{file.path}" + (f" and {len(file.paths) - 1} more parts" if len(file.paths) > 1 else ""),
        "size": in_bytes(file.bytes),
        "architecture": file.architecture,
        "parameters": f"{document['parameters']:,}",
        "quantisation": document["quantization"],
        "context": f"{file.context:,} tokens, {in_bytes(1000 * kv) if kv else 'it varies how much'} for each 1,000",
        "template": f"{document['template'] or 'none'}, {way}",
        "tokens": " ".join(tokens) or "none of the template's markers",
        "words": " ".join(words) or "none",
        "licence": document["licence"] or "the file does not say",
    }
    screen.lines(f"{head:<14}{text}" for head, text in rows.items())


def split_markers(file: ModelFile) -> tuple[list[str], list[str]]:
    """Return the markers of a model's template: those that are tokens, which no text can forge, and mere words."""
    found = dict.fromkeys(marker.strip() for marker in MARKUP.findall(file.templates.get("default", "")))
    texts, kinds = list(file.items("tokenizer.ggml.tokens")), list(file.items("tokenizer.ggml.token_type"))
    special = {text for text, kind in zip(texts, kinds, strict=False) if kind in (3, 4)}  # control, user-defined
    return [marker for marker in found if marker in special], [marker for marker in found if marker not in special]


@models.command("rm")
def models_rm(names: NamesArgument = None, unfinished: UnfinishedOption = False, quiet: QuietOption = False) -> None:
    """Remove models from the hub's cache. What lies in other programs' folders is theirs, and is left alone.

    Examples:

        metaalign-edge models rm Qwen/Qwen2.5-0.5B-Instruct-GGUF:Q8_0

        metaalign-edge models rm --unfinished
    """
    if not names and not unfinished:
        raise UsageError("name the models to remove: `metaalign-edge models list` shows them")
    gone = [removable(name) for name in names or []]
    freed = remove_models(gone)
    for path in unfinished_downloads() if unfinished else []:
        freed += path.stat().st_size
        try:
            path.unlink()
        except OSError as error:
            raise CannotWrite(f"cannot remove {path}: {error.strerror}") from None
    if setting("model") in [one.name for one in gone]:
        store_setting("model", None)
    Screen(quiet).note(f"{in_bytes(freed)} freed")


def removable(name: str) -> Stored:
    """Return the model of that name, if it lies in the hub's cache.

    Raises:
        NotFound: it does not exist. UsageError: it is not in the hub's cache, or there are several.
    """
    found = stored_as(name)
    if not found:
        raise NotFound(f"no model {name}: `metaalign-edge models list` shows what there is; a path is removed with rm")
    if not all(one.in_hub for one in found):
        raise UsageError(f"{found[0].path} is not in the hub's cache: only what is there is removed here")
    if len(found) > 1:
        raise UsageError(f"{name} means several: name one of {', '.join(one.name for one in found)}")
    return found[0]


def remove_models(stored: Sequence[Stored]) -> int:
    """Remove models, all parts and all versions, from the hub's cache; return how many bytes that frees.

    Raises:
        CannotWrite: something is left.
    """
    if not stored:
        return 0
    parts = {(one.repository, part.as_posix()) for one in stored for part in parts_of(Path(one.file))}
    cache, gone, revisions = hub().scan_cache_dir(hub_folder()), [], []
    for repository in cache.repos:
        for revision in repository.revisions:
            place = revision.snapshot_path
            mine = [
                file
                for file in revision.files
                if (repository.repo_id, file.file_path.relative_to(place).as_posix()) in parts
            ]
            if len(mine) == len(revision.files):
                revisions.append(revision.commit_hash)
            else:
                gone += mine
    freed = 0
    for strategy in (cache.delete_files(*gone), cache.delete_revisions(*revisions)):
        strategy.execute()
        freed += strategy.expected_freed_size
    if left := [one.path for one in stored if one.path.exists()]:
        raise CannotWrite(f"cannot remove {left[0]}: look at who owns it")
    return freed


@models.command("default")
def models_default(
    context: typer.Context, name: NameArgument = None, none: NoDefaultOption = False, as_json: JsonOption = False
) -> None:
    """Show the model that is used without -m, or choose another one.

    Examples:

        metaalign-edge models default Qwen/Qwen2.5-0.5B-Instruct-GGUF:Q8_0

        metaalign-edge models default --none
    """
    if name and none:
        raise UsageError("--none takes no name")
    if name:
        file = open_model(find_model(name, None, Screen()))
        store_setting("model", name_of(file.path.absolute()))
    elif none:
        store_setting("model", None)
    chosen = setting("model") or "metaalign-demo"
    path = resolve_model(chosen)
    screen = Screen()
    screen.json({"name": chosen, "path": path and str(path)}) if as_json else screen.write(f"{chosen}\n")
    note_nearer(settable_key("model"), context, screen)


sessions = typer.Typer(no_args_is_help=True, help="Conversations that are kept: chat --session NAME, chat --continue.")
app.add_typer(sessions, name="sessions")

SessionArgument = Annotated[str, typer.Argument(metavar="NAME", help="A session.", show_default=False)]
SessionArguments = Annotated[list[str], typer.Argument(metavar="NAME...", help="Sessions.", show_default=False)]
FormatOption = Annotated[
    str | None, option("--format", help="md or json. Default: as the file's name ends, else md.", metavar="md|json")
]
ExportOption = Annotated[Path | None, option("-o", "--output", help="Write to this file. Default: stdout.")]


@sessions.command("list")
def sessions_list(as_json: JsonOption = False) -> None:
    """List the sessions, the one that was used last first.

    Example:

        metaalign-edge sessions list --json
    """
    screen = Screen()
    found = [summary(path) for path in session_paths()]
    if as_json:
        screen.json(found)
        return
    if not found:
        screen.note("no sessions yet: metaalign-edge chat --session NAME begins one")
        return
    rows = [
        [
            row["name"],
            str(row["turns"] or 0),
            local_time(str(row["last"] or "")),
            f"({row['error']})" if row["error"] else row["preference"],
        ]
        for row in found
    ]
    screen.lines(aligned(["session", "turns", "last used", "preference"], rows))


def summary(path: Path) -> dict[str, Any]:
    """Sum up a session, or say what is wrong with it."""
    nothing = dict.fromkeys(("turns", "first", "last", "model", "preference"))
    try:
        transcript = Transcript.read(path)
    except EdgeError as error:
        return {"name": path.stem, **nothing, "path": str(path), "error": one_line(error)}
    turns = transcript.turns()
    first, last = (turns[0], turns[-1]) if turns else ({}, {})
    return {
        "name": path.stem,
        "turns": len(turns),
        "first": first.get("at"),
        "last": last.get("at"),
        "model": last.get("model"),
        "preference": transcript.label or label_of([transcript.meta_prompt["user_info"]]),
        "path": str(path),
        "error": None,
    }


@sessions.command("show")
def sessions_show(name: SessionArgument, as_json: JsonOption = False) -> None:
    """Show what was said in a session, and the meta-prompt wherever it changed.

    Example:

        metaalign-edge sessions show garden
    """
    screen, transcript = Screen(), Transcript.read(existing_session(name))
    if as_json:
        screen.json(as_document(transcript))
    else:
        screen.write(as_text(transcript))


@sessions.command("rm")
def sessions_rm(names: SessionArguments, quiet: QuietOption = False) -> None:
    """Remove sessions; all of those named, or none if one is not there.

    Example:

        metaalign-edge sessions rm garden kitchen
    """
    paths = [existing_session(name) for name in dict.fromkeys(names)]
    try:
        with locked(paths[0].parent):
            for path in paths:
                path.unlink()
    except OSError as error:
        raise CannotWrite(f"cannot remove {error.filename}: {error.strerror}") from None
    Screen(quiet).note(f"removed: {', '.join(path.stem for path in paths)}")


@sessions.command("export")
def sessions_export(
    name: SessionArgument,
    output: ExportOption = None,
    form: FormatOption = None,
    force: ForceOption = False,
) -> None:
    """Write a session as Markdown or JSON; preferences stand where they changed.

    Examples:

        metaalign-edge sessions export garden -o garden.md

        metaalign-edge sessions export garden --format json | jq .turns
    """
    form = form or ("json" if output and output.suffix.lower() == ".json" else "md")
    if form not in ("md", "json"):
        raise UsageError(f"--format takes md or json, not {form!r}")
    text = exported(Transcript.read(existing_session(name)), form)
    if output is None:
        Screen().write(text)
        return
    if output.is_file() and not force:
        raise UsageError(f"{output} exists: name another, or --force replaces it")
    write_whole(output, text.encode("utf-8", "replace"))


# =====================================================================================================================
# 35  Measurements
# =====================================================================================================================

SuiteOption = Annotated[
    str, option("--suite", help="builtin, ifeval, or a file: a suite of your own or IFEval's rows.")
]
AgainstOption = Annotated[
    str | None, option("--against", help="A second model to compare with, over the same cases.", panel=MODEL)
]
AgainstTemplateOption = Annotated[
    str | None,
    option("--against-template", help="The second's template; without --against, the same model's.", panel=DIALOG),
]
SizeOption = Annotated[
    int | None,
    option("--size", help="Cases a section of the built-in suite (60); of a file, its first.", min=1),
]
SuiteSeedOption = Annotated[
    int, option("--seed", help="Draws the built-in suite, and where --temp is not 0 the answers.", env="SEED", min=0)
]
TierOption = Annotated[
    str, option("--ifeval-tier", help="Where IFEval's instructions stand: system, user or query (as published).")
]
ReportOption = Annotated[Path | None, option("--report", help="Write a page to read: OUT.html.", panel=OUTPUT)]
ChartOption = Annotated[
    Path | None, option("--chart", help="Draw the rates: OUT.png or OUT.svg (matplotlib).", panel=OUTPUT)
]
GridOption = Annotated[
    str | None,
    option("--strength", help="Ask at several strengths of a tier: pref=0,1,1.5,2 or system=1,2,4.", panel=DIALOG),
]
AnswersOption = Annotated[
    Path | None, option("--answers", help="Keep the answers in this file. Default: in the cache.", panel=OUTPUT)
]


RoundsOption = Annotated[int, option("--rounds", help="Measure so often, and take the median.", min=1, max=100)]


@app.command()
@grouped
def bench(
    rounds: RoundsOption = 5,
    template: TemplateOption = "auto",
    as_json: JsonOption = False,
    chart: ChartOption = None,
    *,
    loaded: Loaded,
    talk: Talk,
) -> None:
    """Measure what this machine makes of a model: reading, writing, many at a time, strengths, the start of a call.

    Examples:

        metaalign-edge bench

        metaalign-edge bench -m model.gguf -t 4 --json
    """
    screen, interrupt, settings = talk.screen(), Interrupt(), loaded.settings()
    check_outputs(None, chart)
    file = loaded.file(screen)
    settings = replace(settings, context=BENCH_PROMPT + BENCH_TOKENS, sequences=max(BENCH_TOGETHER))
    choose_template(template, file)
    with interrupt:
        found = measure(file, replace(settings, temperature=0.0, verbose=talk.verbose), template, rounds, interrupt)
    if chart:
        title = f"{found.model}: what this machine makes of it"
        write_whole(chart, preferences("report").draw(found.charts(), title, chart.suffix[1:].lower()))
    heads = ["", found.model, "", ""]
    screen.json(asdict(found)) if as_json else screen.lines(screen.lay_out(heads, found.rows()))


NetworkOption = Annotated[bool, option("--network", help="Ask the hub, too, whether it can be reached.")]


@app.command()
@grouped
def doctor(network: NetworkOption = False, as_json: JsonOption = False, *, loaded: Loaded) -> None:
    """Look whether all is well: llama.cpp, devices, memory, the model and whether it fits, folders, terminal, hub.

    Each check is ok, a warning, or failed. The exit code is 0 if none failed, else 1.

    Examples:

        metaalign-edge doctor

        metaalign-edge doctor -m model.gguf -c 8192 --json
    """
    screen, patient = Screen(), Doctor(loaded.model, loaded.settings(), network, check_standing)
    columns = shutil.get_terminal_size().columns if screen.terminal else None
    checks = []
    for check in patient.checks():
        checks.append(check)
        if not as_json:
            screen.write(check_lines(check, max(map(len, patient.looks)), columns))
    if as_json:
        screen.json({"checks": [check._asdict() for check in checks]})
    if failed := sum(check.status == "failed" for check in checks):
        raise EdgeError(f"{failed} of {len(checks)} checks failed")


@app.command("eval")
@grouped
def eval_command(
    suite: SuiteOption = "builtin",
    against: AgainstOption = None,
    size: SizeOption = None,
    seed: SuiteSeedOption = 0,
    parallel: ParallelOption = 8,
    ifeval_tier: TierOption = "system",
    template: TemplateOption = "auto",
    against_template: AgainstTemplateOption = None,
    remind: RemindOption = True,
    think: ThinkOption = None,
    max_tokens: MaxTokensOption = None,
    temp: TempOption = 0.0,
    strength: GridOption = None,
    as_json: JsonOption = False,
    report: ReportOption = None,
    chart: ChartOption = None,
    answers: AnswersOption = None,
    *,
    strengths: Strengths,
    loaded: Loaded,
    talk: Talk,
) -> None:
    """Measure whether a model follows preferences: a program decides, and every rate has its 95 % interval.

    A run that was stopped goes on where it was when the same command is given again.

    Examples:

        metaalign-edge eval --size 10

        metaalign-edge eval -m model-Q4_K_M.gguf --against model-F16.gguf --report report.html
    """
    screen, options, interrupt = talk.screen(), RenderOptions(remind, think), Interrupt()
    settings = strengths.added(loaded.settings())
    settings = replace(settings, max_tokens=max_tokens, temperature=temp, seed=seed, verbose=talk.verbose)
    check_outputs(report, chart)
    tier, grid = read_grid(strength) if strength is not None else ("", [])
    names = [f".{tier}-{one:g}" for one in grid] or ["", ".against"]
    models = [(loaded.model, template, settings)]
    if grid:
        models = [(loaded.model, template, replace(settings, **{f"{tier}_strength": one})) for one in grid]  # type: ignore[arg-type]
    if against is not None or against_template is not None:
        models.append(rival(models, against, against_template))
    chosen = []
    for name, wanted, how in models:  # before the suite is composed
        file = open_model(find_model(name, loaded.offline, screen))
        chosen.append((file, choose_template(wanted, file), loaded.fitted(how, file, parallel)))
    asked = find_suite(suite, seed, size, ifeval_tier)
    files = [answers and answers.with_name(f"{answers.stem}{name}{answers.suffix}") for name in names]
    candidates = [make_candidate(*one, options, asked, path) for one, path in zip(chosen, files, strict=False)]
    if asked.unchecked:
        kinds = ", ".join(asked.unchecked)
        screen.note(f"metaalign-edge: warning: not checked: {kinds}: get `python -m nltk.downloader punkt_tab`")
    for candidate in candidates:
        interview(candidate, asked, options, parallel, interrupt, screen)
    runs, findings = [candidate.run for candidate in candidates], preferences("findings")
    found = findings.Sweep(asked, runs, tier, grid) if grid else findings.Findings(asked, runs)
    write_outputs(found, report, chart)
    screen.json(found.document()) if as_json else screen.write(found.text(screen.lay_out))


def rival(
    models: Sequence[tuple[str | None, str, Settings]], against: str | None, template: str | None
) -> tuple[str | None, str, Settings]:
    """Return the model, template and settings that the one model is compared with: its own, where nothing else is said.

    Raises:
        UsageError: there are several, which are compared with each other.
    """
    if len(models) > 1:
        raise UsageError("--strength compares a model with itself: leave --against out")
    ((model, usual, settings),) = models
    settings = settings if against is None else replace(settings, adapters=())
    return model if against is None else against, usual if template is None else template, settings


def read_grid(text: str) -> tuple[str, list[float]]:
    """Read a tier and its strengths, `pref=0,1,2`; return those in order, each once.

    Raises:
        UsageError: there is no such tier, fewer than two strengths, or one that is none.
    """
    tier, _, numbers = text.partition("=")
    if tier not in ("system", "pref") or not numbers:
        raise UsageError(f"--strength takes a tier and numbers, pref=0,1,2 or system=1,2,4, not {text!r}")
    found = sorted({checked_strength("--strength", number) for number in numbers.split(",")})
    if len(found) < 2:
        raise UsageError(f"--strength compares at least two strengths, as pref=1,2: {text!r} has one")
    return tier, found


# =====================================================================================================================
# 36  Help and completion
# =====================================================================================================================


def topics() -> dict[str, tuple[str, str]]:
    """Return the heading and the text of each topic: the README's sections that say so.

    Raises:
        NotFound: the README is neither beside this file nor in what is installed.
    """
    import importlib.metadata

    path = Path(__file__).resolve().with_name("README.md")
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else None
        text = text or importlib.metadata.distribution("metaalign-edge").read_text("METADATA") or ""
    except (OSError, importlib.metadata.PackageNotFoundError):
        raise NotFound("the README is not installed: read it where this program comes from") from None
    found = {}
    for name, level, heading in re.findall(r"^<!-- topic: (.+) -->\n(#+) (.+)$", text, re.MULTILINE):
        section = text.partition(f"\n{level} {heading}\n")[2]
        section = re.split(rf"^#{{1,{len(level)}}} ", section, maxsplit=1, flags=re.MULTILINE)[0]
        found[name] = heading, re.sub(r"<!--.*?-->\n|</?sub>", "", section).strip("\n")
    return found


@app.command("help")
def help_command(
    topic: Annotated[
        list[str] | None, typer.Argument(metavar="TOPIC", help="A topic, or a command.", show_default=False)
    ] = None,
) -> None:
    """Explain a topic or a command; without one, list the topics.

    Examples:

        metaalign-edge help exit-codes

        metaalign-edge help chat

        metaalign-edge help models show
    """
    screen, known, commands = Screen(), topics(), all_commands().commands
    first, *more = topic or [""]
    if not first:
        width = max(map(len, known))
        screen.lines(f"{name:<{width}}  {heading}" for name, (heading, _) in known.items())
    elif first in known and not more:
        heading, text = known[first]
        if screen.terminal:
            from rich.console import Console
            from rich.markdown import Markdown

            Console().print(Markdown(f"# {heading}\n\n{text}"))
        else:
            screen.write(f"{heading}\n\n{text}\n")
    elif first in commands:
        all_commands()(args=[first, *more, "--help"], prog_name="metaalign-edge", standalone_mode=False)
    else:
        alike = nearest(first, [*known, *commands], "`metaalign-edge help` lists them")
        raise UsageError(f"no topic {' '.join([first, *more])!r}: {alike}")


def profile_values() -> dict[str, str]:
    """Return the profiles and what they say."""
    found = dict.fromkeys(profile_words(), "")
    for word in found:
        with contextlib.suppress(EdgeError):  # it cannot be read
            found[word] = profile_text(word[1:])
    return found


def model_values() -> dict[str, str]:
    """Return the names of the models on this machine."""
    return dict.fromkeys(model_names(), "")


def session_values() -> dict[str, str]:
    """Return the names of the sessions."""
    return dict.fromkeys(session_names(), "")


def template_values() -> dict[str, str]:
    """Return the names that --template takes."""
    return {"auto": "the model's own", **dict.fromkeys(shipped_templates(), "")}


SHELLS = {"bash": "bash", "zsh": "zsh", "fish": "fish", "powershell": "ps1"}  # and what their scripts end with

# What a shell completes: the values of a parameter, by its name, or by that behind its command's, with what they mean.
# Anywhere else, files.
VALUES: dict[str, Callable[[], dict[str, str]]] = {
    "pref": profile_values,
    "template": template_values,
    "against_template": template_values,
    "pref name": profile_values,
    "pref names": profile_values,
    "model": model_values,
    "against": model_values,
    "models name": model_values,
    "models names": model_values,
    "chat name": session_values,
    "sessions name": session_values,
    "sessions names": session_values,
    "ctx_size": lambda: {"auto": "as many as there is room for"},
    "gpu_layers": lambda: {"auto": "as many as there is room for", "all": ""},
    "pref_strength": lambda: {"auto": "as hard as the preference changes each token"},
    "ifeval_tier": lambda: {"system": "", "user": "", "query": "as published"},
    "topic": lambda: {name: heading for name, (heading, _) in topics().items()},
    "shell": lambda: dict.fromkeys(SHELLS, ""),
}


def suggestions(command: Any, words: Sequence[str]) -> list[tuple[str, str]]:
    """Return what may stand in place of the last word of a command line, with what it means.

    Args:
        command: the root of Typer's commands.
        words: those that follow the program's name, up to the cursor.
    """
    *before, word = words
    word, waiting, place, group = word.strip("\"'"), None, 0, ""
    for given in before:
        options = {name: one for one in command.params for name in (*one.opts, *one.secondary_opts)}
        if waiting is not None:
            waiting = None
        elif given.startswith("-"):
            waiting = options.get(given)
            waiting = None if getattr(waiting, "is_flag", True) else waiting
        elif hasattr(command, "commands"):
            command, group = command.commands.get(given), group or given
            if command is None:
                return []
        else:
            place += 1
    named = [one for one in command.params if one.param_type_name == "option" and not getattr(one, "hidden", False)]
    if waiting is not None:
        return values_of(group, waiting, word)
    if word.startswith("--") and "=" in word:
        name, _, value = word.partition("=")
        found = [values_of(group, one, value) for one in named if name in one.opts]
        return [(f"{name}={value}", says) for values in found for value, says in values]
    if word.startswith("-"):
        found = [[(name, one.help or "") for name in (*one.opts, *one.secondary_opts)] for one in named]
        return [(name, says) for names in found for name, says in names if name.startswith(word)]
    if hasattr(command, "commands"):
        shown = {name: one for name, one in command.commands.items() if name.startswith(word) and not one.hidden}
        return [(name, one.get_short_help_str(100)) for name, one in shown.items()]
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    last = len(arguments) - 1
    place = min(place, last) if arguments and arguments[last].nargs < 0 else place  # any number of them
    return values_of(group, arguments[place], word) if place <= last else []


def values_of(group: str, parameter: Any, word: str) -> list[tuple[str, str]]:
    """Return the values of a parameter that begin with a word; of joined profiles, the last may still change."""
    joined, plus, word = word.rpartition("+") if parameter.name == "pref" else ("", "", word)
    found = VALUES.get(f"{group} {parameter.name}", VALUES.get(parameter.name, dict))()
    return [(f"{joined}{plus}{value}", says) for value, says in found.items() if value.startswith(word)]


@app.command()
def completion(
    shell: Annotated[str, typer.Argument(help=f"{', '.join(SHELLS)}.", show_default=False)],
    words: Annotated[
        list[str] | None, typer.Argument(help="What the script asks: what could the last of these be?")
    ] = None,
) -> None:
    """Print what teaches a shell to complete commands, options, profiles, models and templates.

    Examples:

        eval "$(metaalign-edge completion bash)"

        metaalign-edge completion fish > ~/.config/fish/completions/metaalign-edge.fish
    """
    if shell not in SHELLS:
        raise UsageError(f"no completion for {shell!r}: there is one for {', '.join(SHELLS)}")
    if words is None:
        path = part_folder("completion") / f"metaalign-edge.{SHELLS[shell]}"
        Screen().write(read_text(path, "the completion"))
        return
    found = suggestions(all_commands(), words)
    Screen().lines(value if shell == "bash" or not says else f"{value}\t{one_line(says)}" for value, says in found)


# =====================================================================================================================
# 37  Python
# =====================================================================================================================
# What a program needs: a model that is open, and three functions. Nothing is written to stdout, stderr or the disk.


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
        given["schema"] = schema and (expand_schema(schema) if isinstance(schema, str) else make_schema(dict(schema)))
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
        query = Dialog(system, expand_profile(pref), [Turn(query)])
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
    dialogs = [replace(dialog, user_info=expand_profile(wish)) for wish in preferences]
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
# 38  Main
# =====================================================================================================================


def exit_code(error: Exception) -> int | None:
    """Return the exit code of an error of ours, of `convert` or of the command line; None for a surprise."""
    if isinstance(error, EdgeError):
        return error.exit_code
    converter = sys.modules.get("metaalign_edge_convert")
    if converter and isinstance(error, converter.ConvertError):
        kinds = {
            converter.SourceNotFound: NotFound,
            converter.OutputExists: UsageError,
            converter.CannotWrite: CannotWrite,
        }
        return next((edge.exit_code for kind, edge in kinds.items() if isinstance(error, kind)), LoadError.exit_code)
    return getattr(error, "exit_code", None)  # Typer's own usage errors


def run(arguments: Sequence[str] | None = None, leaving: bool = False) -> int:
    """Run a command line; return its exit code. Every error ends here, as one line on stderr.

    With `leaving` the process ends next: what is open goes with it.
    """
    try:
        arguments = sys.argv[1:] if arguments is None else arguments
        command = called_command(arguments[0] if arguments else "")
        status = command(args=arguments, prog_name="metaalign-edge", standalone_mode=False)
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
            Screen.say(f"metaalign-edge: {one_line(text)}")
        return 1 if code is None else code
    finally:
        if not leaving or drives_gpu():  # a driver wants back what it gave
            OPEN.close()


def main() -> None:
    """Be the console script.

    The process ends without freeing what it holds: the system takes a vocabulary, a mapped file and Python's modules
    back 70 ms sooner.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            encoding = "utf-8" if os.name == "nt" else None  # a pipe there would have the code page of old
            stream.reconfigure(encoding=encoding, errors="replace")  # no terminal lacks so much as to lose an answer
    status = run(leaving=True)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
