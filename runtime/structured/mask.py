"""Which tokens a schema allows next, by llguidance."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..errors import UsageError, one_line

# White space is one blank or none behind `,` and `:`, and nowhere else: small models lose themselves in it.
LAYOUT: Any = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}


def refusal(document: Any) -> str:
    """Return why llguidance cannot take a schema, in its words; an empty text if it can."""
    from llguidance import LLMatcher

    try:
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(document), overrides=LAYOUT)
    except ValueError as error:  # no JSON to Rust: half a pair of surrogates, or 128 levels
        return one_line(error)
    failed, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    return one_line(messages[0]) if failed else ""


class Vocabulary:
    """The tokens of a model, as a constraint sees them.

    Args:
        text: returns what a token stands for.
        is_end: tells whether a token ends an answer.
        is_barred: tells whether a token may not stand in an answer, though it has a text.
        texts: returns what all tokens stand for, and nothing for those that are no text. It is called late or never.
    """

    def __init__(
        self,
        text: Callable[[int], bytes],
        is_end: Callable[[int], bool],
        is_barred: Callable[[int], bool],
        texts: Callable[[], Sequence[bytes]],
    ) -> None:
        self.text, self.is_end, self.is_barred, self._texts = text, is_end, is_barred, texts

    @functools.cached_property
    def texts(self) -> Sequence[bytes]:
        """What all tokens stand for."""
        return self._texts()

    @functools.cached_property
    def by_first(self) -> list[list[int]]:
        """The tokens that begin with each byte."""
        found: list[list[int]] = [[] for _ in range(256)]
        for token, text in enumerate(self.texts):
            if text:
                found[text[0]].append(token)
        return found

    @functools.cached_property
    def ends(self) -> list[int]:
        """The tokens that end an answer; in some files they count as text."""
        likely = (token for token, text in enumerate(self.texts) if not text or text.startswith((b"<", b"[")))
        return [token for token in likely if self.is_end(token)]


@functools.cache
def letters() -> Any:
    """Return llguidance's vocabulary of the 256 bytes.

    It takes no time, where a vocabulary of 150,000 tokens takes llguidance 0.3 s; and one token after the other is
    looked at anyway.
    """
    from llguidance import LLTokenizer

    return LLTokenizer("byte", slices=[])


class Constraint:
    """One answer that is held to a schema while it is written.

    Args:
        mask: a schema, as JSON that llguidance takes.
        blank_lines: up to two line breaks may come before it, as models write them behind their reasoning.
        opening: a token that may come first instead, and is not taken for a part of the answer.

    Raises:
        UsageError: llguidance cannot follow the schema.
    """

    def __init__(
        self, mask: str, vocabulary: Vocabulary, blank_lines: bool = False, opening: int | None = None
    ) -> None:
        from llguidance import LLMatcher

        rules = (
            f"start: {'LINES? ' if blank_lines else ''}answer",
            "LINES: /\\n{1,2}/",
            f"answer: %json {mask}",
        )
        self._vocabulary, self._opening = vocabulary, opening
        self._matcher = LLMatcher(letters(), "\n".join(rules), log_level=0)
        self._failed = False  # what is written does not fit, or is too much for llguidance: no token will fit
        if reason := self._matcher.get_error():
            raise UsageError(f"llguidance cannot follow this schema: {one_line(reason)[:200]}: make it simpler")

    @property
    def may_end(self) -> bool:
        """Tell whether the answer is complete; a number may go on all the same."""
        return not self._failed and self._matcher.is_accepting()

    def fits(self, token: int) -> bool:
        """Tell whether a token may come next: some 3 microseconds."""
        if self._failed or self._vocabulary.is_end(token):
            return self.may_end
        return token == self._opening or self._goes_on(token, self._vocabulary.text(token))

    def _goes_on(self, token: int, text: bytes) -> bool:
        fits = bool(text) and self._matcher.validate_tokens(list(text)) == len(text)
        return fits and not self._vocabulary.is_barred(token)

    def fitting(self, tokens: Iterable[int] | None = None) -> list[int]:
        """Return those of some tokens that may come next, or of all; but for the one that may come instead."""
        if self._failed:
            return []
        vocabulary, first = self._vocabulary, self._matcher.compute_logit_bias()  # of each byte: may it come next
        if tokens is None:
            ends = vocabulary.ends
            tokens = itertools.chain(*itertools.compress(vocabulary.by_first, first))
        else:
            tokens = list(tokens)
            ends = list(filter(vocabulary.is_end, tokens))
        found = ends if self.may_end else []
        others = ((token, vocabulary.text(token)) for token in tokens if not vocabulary.is_end(token))
        return found + [token for token, text in others if text and first[text[0]] and self._goes_on(token, text)]

    def accept(self, token: int) -> None:
        """Take a token that fits."""
        self.accept_text(self._vocabulary.text(token))

    def accept_text(self, data: bytes) -> None:
        """Take what is written already; if it does not fit, no token will."""
        self._opening = None
        self._failed = self._matcher.try_consume_tokens(list(data)) < len(data)
