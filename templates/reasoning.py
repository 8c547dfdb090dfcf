"""How models tell their reasoning from their response: the formats as a table, and what splits an answer by them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

HEADER_LIMIT = 80  # bytes that a * in a mark stands for at most


class Format(NamedTuple):
    """The marks of one way to write reasoning and response. A * in a mark stands for any short text.

    Marks count at the beginning of an answer, where one ends, and behind another. Anywhere else they are text, unless
    they are control tokens, which never are.
    """

    opens: tuple[str, ...]  # before reasoning; the template may have written it
    closes: tuple[str, ...]  # behind reasoning; one that is also in `wraps` begins the response at the same time
    wraps: tuple[tuple[str, str], ...] = ()  # pairs around the response, which ends with the second
    skips: tuple[str, ...] = ()  # what else may stand before reasoning and response
    named_by: tuple[str, ...] = ()  # a template of this format has all of these, or they are tokens; else closes[0]
    control: bool = False  # the marks are control tokens


TAGGED = (("<response>", "</response>"), ("<answer>", "</answer>"), ("<output>", "</output>"))
COMMAND = (("<|START_RESPONSE|>", "<|END_RESPONSE|>"), ("<|START_TEXT|>", "<|END_TEXT|>"))
HARMONY_FINAL = "<|channel|>final*<|message|>"

# The wraps of a format whose marks are text count only where a template or a vocabulary has them.
FORMATS = (
    Format(  # gpt-oss (harmony): only the channel `final` is the response
        ("<|channel|>*<|message|>", "to=*<|message|>"),
        ("<|end|>", HARMONY_FINAL),
        (
            (HARMONY_FINAL, "<|end|>"),
            ("<|channel|>commentary" + HARMONY_FINAL, "<|end|>"),
            ("<|channel|>commentary to=assistant" + HARMONY_FINAL, "<|end|>"),
        ),
        ("<|start|>assistant",),
        ("<|channel|>", "<|message|>"),
        control=True,
    ),
    Format(  # Muse Glimmer: messages to itself, to tools and to the user
        ("to=*<|message|>",),
        ("<|eom|>",),
        tuple((begin, end) for begin in ("to=user<|message|>", "<|message|>") for end in ("<|eot|>", "<|eom|>")),
        ("<|start|>assistant",),
        ("<|message|>", "<|eom|>"),
        control=True,
    ),
    Format(  # Solar Open
        ("<|think|>",),
        ("<|end|>", "<|content|>"),
        (("<|content|>", "<|end|>"),),
        ("<|begin|>assistant",),
        ("<|begin|>", "<|think|>", "<|content|>"),
        control=True,
    ),
    Format(  # Kimi K3
        ("<|open|>think*<|sep|>",),
        ("<|close|>think<|sep|>", "<|open|>response*<|sep|>"),
        (("<|open|>response*<|sep|>", "<|close|>response<|sep|>"),),
        named_by=("<|open|>", "<|close|>", "<|sep|>"),
        control=True,
    ),
    Format(("<|channel>thought",), ("<channel|>",), skips=("<|channel>",), control=True),  # Gemma 4
    Format(  # Command R7B, Command A; North, Cohere 2 MoE
        ("<|START_THINKING|>",), ("<|END_THINKING|>", *(begin for begin, _ in COMMAND)), COMMAND, control=True
    ),
    Format(("<|inner_prefix|>",), ("<|inner_suffix|>",), control=True),  # Apertus
    Format(  # Functionary 3.2: no reasoning, but the recipient before the response
        (), (), (("all\n", "<|eot_id|>"),), named_by=(">>>all", ">>>${recipient}"), control=True
    ),
    Format(  # Apriel; its prompt may write the first one
        ("Here are my reasoning steps:",),
        ("[BEGIN FINAL RESPONSE]",),
        (("[BEGIN FINAL RESPONSE]", "[END FINAL RESPONSE]"),),
    ),
    Format(("Here is my thought process:",), ("Here is my response:",)),  # Granite 3.2
    # Qwen 3, QwQ, DeepSeek R1 and V3, SmolLM3, GLM, Nemotron, MiMo, Kimi K2, MiniMax M1 and M2, Phi 4 reasoning,
    # Granite 3.3, Hunyuan A13B, ERNIE, LFM2.5, Olmo 3, Ling, Laguna, Spark, Step, Reka, Bielik, MiniCPM
    Format(("<think>",), ("</think>",), TAGGED),
    Format(("[THINK]",), ("[/THINK]",)),  # Magistral, Ministral 3
    Format(("<thought>",), ("</thought>",), TAGGED),  # EXAONE Deep
    Format(("<Thought>",), ("</Thought>",), (("<Output>", "</Output>"),)),  # Marco-o1
    Format(("<seed:think>",), ("</seed:think>",)),  # Seed-OSS
    Format(("<mm:think>",), ("</mm:think>",)),  # MiniMax M3
    Format(("<think:*>",), ("</think:*>",), named_by=("</think{}>",)),  # Hunyuan 3
    Format(("◁think▷",), ("◁/think▷",)),  # Kimi VL
    Format(  # OpenThinker, Sky-T1
        ("<|begin_of_thought|>",),
        ("<|end_of_thought|>",),
        (("<|begin_of_solution|>", "<|end_of_solution|>"),),
    ),
    Format(("<thinking>",), ("</thinking>",), TAGGED),
    Format(("<reasoning>",), ("</reasoning>",), TAGGED),
)


def formats_of(source: str, is_token: Callable[[str], bool]) -> tuple[Format, ...]:
    """Return the formats that a model may write: those that its template names, else those whose marks are tokens.

    Args:
        source: the text of the template.
        is_token: tells whether a text is one token of the vocabulary.
    """

    def named(known: Callable[[str], bool]) -> tuple[Format, ...]:
        found = [one for one in FORMATS if all(map(known, one.named_by or one.closes[:1]))]
        return tuple(
            one if one.control else one._replace(wraps=tuple(pair for pair in one.wraps if written(pair[0])))
            for one in found
        )

    def written(mark: str) -> bool:
        return mark in source or is_token(mark)

    return named(source.__contains__) or named(is_token)


class Mark(NamedTuple):
    """A mark in bytes, and what it does."""

    text: bytes
    role: Literal["begin", "end", "open", "close", "skip"]  # of the response, the first two; of reasoning, the next
    format: Format

    def size(self, text: bytes) -> int:
        """Return the bytes of a text that are this mark at its beginning; 0 if none is, -1 if more may make one."""
        head, star, tail = self.text.partition(b"*")
        if not text.startswith(head):
            return -1 if head.startswith(text) else 0
        if not star:
            return len(head)
        end = text.find(tail, len(head))
        if end >= 0:
            return end + len(tail) if end <= len(head) + HEADER_LIMIT else 0
        return -1 if len(text) <= len(head) + HEADER_LIMIT else 0

    def last_in(self, text: bytes) -> int:
        """Return where this mark ends for the last time in a text, -1 if it is not there."""
        head, _, tail = map(re.escape, self.text.partition(b"*"))
        pattern = head + (b".{0,%d}?" % HEADER_LIMIT + tail if b"*" in self.text else b"")
        return max((found.end() for found in re.finditer(pattern, text, re.DOTALL)), default=-1)


def marks_of(form: Format, *roles: str) -> list[Mark]:
    """List the marks of a format that have one of the roles, the first ones to be tried first."""
    texts: list[tuple[Literal["begin", "open", "close", "skip"], Iterable[str]]] = [
        ("begin", dict.fromkeys(begin for begin, _ in form.wraps)),
        ("open", form.opens),
        ("close", form.closes),
        ("skip", form.skips),
    ]
    return [Mark(text.encode(), role, form) for role, some in texts if role in roles for text in some]


def inner_marks(form: Format) -> list[Mark]:
    """List the marks of a format that are no text even inside a response: control tokens."""
    return [mark for mark in marks_of(form, "open", "close") if form.control and mark.text.startswith(b"<")]


def first_mark(text: bytes, marks: Sequence[Mark]) -> tuple[int, Mark | None]:
    """Return the size of the mark that a text begins with, and the mark; -1 for a size that more text decides."""
    for mark in marks:
        if size := mark.size(text):
            return size, mark
    return 0, None


def next_mark(text: bytes, marks: Sequence[Mark]) -> tuple[int, int, Mark | None]:
    """Return where in a text the next mark begins, its size as in `first_mark`, and the mark."""
    firsts = {mark.text[0] for mark in marks}
    for at, byte in enumerate(text):
        if byte in firsts:
            size, mark = first_mark(text[at:], marks)
            if size:
                return at, size, mark
    return len(text), 0, None


def opened_by(formats: Sequence[Format], ending: bytes) -> Mark | None:
    """Return the mark behind which a prompt lets the answer go on; without formats, one that it ends with."""
    for one in formats or FORMATS:
        begins, opens, closes = (marks_of(one, role) for role in ("begin", "open", "close"))
        if formats and (begun := next((mark for mark in begins if mark.last_in(ending) == len(ending)), None)):
            return begun
        last = max((mark.last_in(ending) for mark in closes), default=-1) if formats else len(ending) - 1
        if ending and (opened := next((mark for mark in opens if mark.last_in(ending) > last), None)):
            return opened
    return None


# Opened by one of these, an answer begins with reasoning whatever the model's template says.
COMMON = [mark for one in FORMATS if not one.control for mark in marks_of(one, "open") if mark.text[:1] in b"<["]


class ReasoningSplitter:
    """Splits the bytes of an answer into reasoning and response, by the formats that the model may write.

    White space around reasoning, and inside the wrap of a response, is dropped. Without formats, only reasoning at the
    beginning is looked for.

    Args:
        ending: the end of the prompt: it may have opened the reasoning, or the response.
        to_schema: the response has to fit a schema, in whose strings marks are text.
    """

    def __init__(self, formats: Sequence[Format], ending: str = "", to_schema: bool = False) -> None:
        self.state: Literal["before", "inside", "answer", "over"] = "before"
        self._leading = [mark for one in formats for mark in marks_of(one, "begin", "open", "close", "skip")]
        if not formats:
            self._leading, self.state = ([], "answer") if to_schema else (COMMON, "before")
        self._to_schema, self._held, self._seen = to_schema, b"", False
        self._ending = list[Mark]()  # marks that end the response
        self._inner = [mark for one in formats for mark in inner_marks(one)]  # marks that count inside it, too
        self._closing, self._opening = list[Mark](), list[Mark]()  # of the reasoning that is open
        self._thought = self._begun = False  # whether any reasoning has text yet; whether the open one has
        self._trim = True  # white space is dropped until the response has text
        if mark := opened_by(formats, ending.rstrip().encode()):
            self._follow(mark)

    def _follow(self, mark: Mark) -> None:
        """Go on behind a mark."""
        self._seen, form = True, mark.format
        if mark.role == "end":
            self.state = "over"
        elif mark.role == "open":
            self.state, self._begun = "inside", False
            begins = {begin.text: begin for begin in marks_of(form, "begin")}
            self._closing = [begins.get(close.text, close) for close in marks_of(form, "close")]
            self._opening = marks_of(form, "open")
            self._leading = marks_of(form, "begin", "open", "close", "skip")
        elif mark.role == "begin":
            self.state, self._trim = "answer", True
            self._ending = [Mark(end.encode(), "end", form) for begin, end in form.wraps if begin.encode() == mark.text]
        elif self.state == "inside":
            self.state = "before"

    def closes(self, data: bytes) -> bool:
        """Tell whether a token with these bytes ends reasoning, and not the answer, though it may end a generation."""
        return self.state == "inside" and any(mark.size(data) == len(data) for mark in self._closing)

    def response_with(self, data: bytes) -> bytes | None:
        """Return what the response would get if these bytes came next; None if they go on with what may precede it."""
        if self.state != "before":
            return data
        held = self._held + data
        text = held.lstrip()
        if not text:
            return None if data and held in (b"\n", b"\n\n") else data
        while text:
            size, mark = first_mark(text, self._leading)
            if mark is None:
                return text
            if size < 0 or mark.role == "open":
                return None
            text = text[size:].lstrip()
            if mark.role == "begin":
                return text or None
        return None

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """Take a token's bytes; return the bytes of reasoning and of response that no later byte can change."""
        self._held += data
        thought, said = b"", b""
        going = True
        while going:
            state = self.state
            if state == "before":
                going = self._begin()
            elif state == "inside":
                piece, going = self._reason()
                thought += piece
            elif state == "answer":
                piece, going = self._respond()
                said += piece
            else:
                self._held, going = b"", False
        return thought, said

    def _begin(self) -> bool:
        """Follow the mark at the beginning of what is held, or begin the response; tell whether anything was done."""
        text = self._held.lstrip()
        size, mark = first_mark(text, self._leading)
        if not text or size < 0:
            return False
        if mark:
            self._held = text[size:]
            self._follow(mark)
        else:
            self.state, self._trim = "answer", self._seen or self._to_schema
        return True

    def _reason(self) -> tuple[bytes, bool]:
        """Return the reasoning that is held, up to a mark or what may become one, and whether a mark was followed."""
        if not self._begun:
            self._held = self._held.lstrip()
            size, _ = first_mark(self._held, self._opening)  # opened again
            if size and self._held:
                self._held = self._held[size:] if size > 0 else self._held
                return b"", size > 0
        at, size, mark = next_mark(self._held, self._closing)
        thought = self._held[:at].rstrip()
        between = b"\n\n" if thought and self._thought and not self._begun else b""
        self._thought, self._begun = self._thought or bool(thought), self._begun or bool(thought)
        found = mark is not None and size > 0
        self._held = self._held[at + size if found else len(thought) :]
        if mark and found:
            self._follow(mark)
        return between + thought, found

    def _respond(self) -> tuple[bytes, bool]:
        """Return the response that is held, up to a mark or what may become one, and whether a mark was followed."""
        if self._trim:
            self._held = self._held.lstrip()
        marks = [] if self._to_schema else self._ending + self._inner
        at, size, mark = next_mark(self._held, marks) if marks else (len(self._held), 0, None)
        said = self._held[:at]
        if self._ending and marks:
            said = said.rstrip()
        found = mark is not None and size > 0
        self._held = self._held[at + size if found else len(said) :]
        self._trim = self._trim and not said
        if mark and found:
            self._follow(mark)
        return said, found

    def rest(self) -> tuple[bytes, bytes]:
        """Return the bytes held back, at the end of the answer; half a control mark is nobody's."""
        held, self._held = self._held.rstrip(), b""
        if self.state == "inside":
            return held, b""
        at, _, mark = next_mark(held.lstrip(), self._leading + self._ending + self._inner)
        return b"", held.lstrip()[:at].rstrip() if mark and mark.format.control else held


HTML = frozenset(
    "a abbr article aside b blockquote body br button center code dd details div dl dt em fieldset figure footer form "
    "h1 h2 h3 h4 h5 h6 head header hr html i iframe img input kbd label li link main math meta nav ol option p pre q s "
    "samp script section select small span strong style sub summary sup svg table tbody td template textarea th thead "
    "title tr u ul var video xml".split()
)
TAG = re.compile(r"\s*(<[|｜/]?([\w:.▁-]{1,40})[|｜]?>|\[([A-Z][A-Z_ ]{1,40})\](?=.*\[/\3\]))", re.DOTALL)


def unknown_mark(response: str) -> str | None:
    """Return the control token or tag that a response begins with, though it is no format's; HTML is no such tag."""
    found = TAG.match(response)
    return found[1] if found and (found[2] or "").lower() not in HTML else None
