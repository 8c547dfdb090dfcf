"""The tokens that a schema allows next, as llguidance computes them."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..errors import UsageError, one_line

# An answer's only white space is one optional space behind `,` and `:`: small models would repeat it without end.
LAYOUT: Any = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}


def refusal(document: Any) -> str:
    """Return llguidance's message on why it cannot follow a schema; "" if it can."""
    from llguidance import LLMatcher

    try:
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(document), overrides=LAYOUT)
    except ValueError as error:  # Rust's JSON parser refuses lone surrogates and 128 levels of nesting
        return one_line(error)
    failed, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    return one_line(messages[0]) if failed else ""


class Vocabulary:
    """The tokens of a model, as a constraint needs them.

    Args:
        text: returns the bytes of a token.
        is_end: tells whether a token ends an answer.
        is_barred: tells whether a token is forbidden in answers although it has text.
        texts: returns the bytes of all tokens, empty for tokens without text. It is slow, and called only when needed.
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
        """The bytes of all tokens."""
        return self._texts()

    @functools.cached_property
    def by_first(self) -> list[list[int]]:
        """The tokens by their first byte."""
        found: list[list[int]] = [[] for _ in range(256)]
        for token, text in enumerate(self.texts):
            if text:
                found[text[0]].append(token)
        return found

    @functools.cached_property
    def ends(self) -> list[int]:
        """The tokens that end an answer; some model files give them a text."""
        likely = (token for token, text in enumerate(self.texts) if not text or text.startswith((b"<", b"[")))
        return [token for token in likely if self.is_end(token)]


@functools.cache
def letters() -> Any:
    """Return llguidance's vocabulary of the 256 bytes.

    Tokens are checked one by one, byte by byte, so llguidance need not know them: 150,000 tokens would take it 0.3 s.
    """
    from llguidance import LLTokenizer

    return LLTokenizer("byte", slices=[])


class Constraint:
    """The state of one answer that has to fit a schema while it is written.

    Args:
        mask: a schema that llguidance can follow, as JSON.
        answer_with: returns the bytes that the answer would get by a token's bytes; None if these belong to what may
            stand before the answer, as reasoning does.

    Raises:
        UsageError: llguidance cannot follow the schema.
    """

    def __init__(
        self, mask: str, vocabulary: Vocabulary, answer_with: Callable[[bytes], bytes | None] = lambda data: data
    ) -> None:
        from llguidance import LLMatcher

        self._vocabulary, self._answer_with = vocabulary, answer_with
        self._matcher = LLMatcher(letters(), f"start: answer\nanswer: %json {mask}", log_level=0)
        self._failed = False  # the text so far does not fit, or exceeds llguidance's limits: no token fits any more
        if reason := self._matcher.get_error():
            raise UsageError(f"llguidance cannot follow this schema: {one_line(reason)[:200]}: make it simpler")

    @property
    def may_end(self) -> bool:
        """Whether the answer is complete. More tokens may still fit: a number can get more digits."""
        return not self._failed and self._matcher.is_accepting()

    def fits(self, token: int) -> bool:
        """Tell whether a token may come next, in about 3 microseconds."""
        if self._failed or self._vocabulary.is_end(token):
            return self.may_end
        return self._goes_on(token, self._vocabulary.text(token))

    def _goes_on(self, token: int, text: bytes) -> bool:
        added = self._answer_with(text)
        if added is None:
            return bool(text)
        fits = bool(added) and self._matcher.validate_tokens(list(added)) == len(added)
        return fits and not self._vocabulary.is_barred(token)

    def fitting(self, tokens: Iterable[int] | None = None) -> list[int]:
        """Return the tokens that may come next, of the given ones or of all.

        What may stand before the answer is among them only where some of it has been written: half a mark goes on.
        """
        if self._failed:
            return []
        vocabulary, first = self._vocabulary, self._matcher.compute_logit_bias()  # by byte: 0 if it may not come next
        if self._answer_with(b"") is None:
            tokens = range(len(vocabulary.texts)) if tokens is None else tokens
            return [token for token in tokens if not vocabulary.is_end(token) and self.fits(token)]
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
        """Append a token that fits to the answer."""
        self.accept_text(self._vocabulary.text(token))

    def accept_text(self, data: bytes) -> None:
        """Append bytes to the answer; if they do not fit, no token fits from then on."""
        self._failed = self._matcher.try_consume_tokens(list(data)) < len(data)
