"""Chat templates in a sandbox with a budget, through which the tiers' text is followed.

A GGUF's template is somebody else's program. Jinja's parser reads it; it is not compiled to Python, but evaluated by an
interpreter that knows chat templates and nothing else. Every step is counted, every value is bounded before it is
made, no call into Python takes longer than a moment, and every letter that is written has an owner. That is simpler
to trust than Jinja's sandbox in a process with limits: there is no Python object to reach for, nothing to forbid, and
no second process to start, feed and wait for; and Ctrl-C stops a template, too.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from metaalign_edge_runtime.errors import TemplateError, one_line, shortened

from .budget import Budget, NotAllowed, OverBudget
from .tier_text import TierText

SOURCE = 1 << 17  # characters of a template; the longest of a known model has 17,000
REASON = 240  # characters that are shown of what a template says


class Refusal(Exception):
    """A template called `raise_exception`: it will not render this dialog."""


class TemplateFailure(TemplateError):
    """A template failed on these messages; another shape of message may suit it."""


class Template:
    """A parsed template. `render` raises `Refusal` or `TemplateError`, never anything else."""

    def __init__(self, source: str, name: str) -> None:
        from .parser import parse  # Jinja takes a while to import

        self.source, self.name = source, name
        if len(source) > SOURCE:
            raise TemplateError(f"the template of {name} has {len(source):,} characters: no chat template needs that")
        try:
            self._tree = parse(source)
        except Exception as error:
            raise TemplateError(
                f"the template of {name} does not parse: {one_line(error)}: give another with --template"
            ) from error

    def mentions(self, word: str) -> bool:
        """Tell whether the template uses this name, as a variable or as a role."""
        from .parser import names_in

        return word in names_in(self._tree)

    def render(self, **variables: Any) -> TierText:
        """Render within the budget.

        Raises:
            Refusal: the template called `raise_exception`.
            TemplateError: it failed, or spent more than its budget.
        """
        from .interpreter import Interpreter

        functions: dict[str, Callable[..., Any]] = {"raise_exception": raise_exception, "strftime_now": strftime_now}
        try:
            return Interpreter(Budget(letters_in(variables)), functions).render(self._tree, variables)
        except Refusal:
            raise
        except RecursionError:
            raise TemplateError(
                f"the template of {self.name} nests without end: give another with --template"
            ) from None
        except Exception as error:
            hostile = isinstance(error, OverBudget | NotAllowed | MemoryError)
            kind = TemplateError if hostile else TemplateFailure
            raise kind(f"the template of {self.name} failed: {reason(error)}: give another with --template") from None


def raise_exception(message: Any = "") -> None:
    """Do what a template's `raise_exception` does; of what it says, the words that are its own are kept."""
    if not isinstance(message, TierText):
        raise Refusal(shortened(message, REASON) if isinstance(message, str) else "…")
    raise Refusal(shortened("".join("…" if tier else text for text, tier in message.pieces()), REASON))


def strftime_now(pattern: str) -> str:
    """Write the date and the time."""
    if not isinstance(pattern, str) or len(pattern) > REASON or re.search(r"%[^a-zA-Z%]*\d", pattern):
        raise NotAllowed("it writes a date wider than any chat template needs")
    return time.strftime(pattern)


def reason(error: Exception) -> str:
    """Say why a template failed, without a text that it was given: Python names kinds, not values, in these errors."""
    from jinja2 import UndefinedError

    if isinstance(error, OverBudget | NotAllowed | UndefinedError | TypeError | ArithmeticError):
        return shortened(str(error).replace(TierText.__name__, "str"), REASON) or type(error).__name__
    return type(error).__name__


def letters_in(value: Any) -> int:
    """Count the characters of what a template is given."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(letters_in, value.values()))
    return sum(map(letters_in, value)) if isinstance(value, Iterable) else 0
