"""Groups of options, NamedTuples, as parameters of a function: Typer sees every option of theirs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

import typer


def spread(
    function: Callable[..., None], before: Callable[[typer.Context, dict[str, Any]], None] | None = None
) -> Callable[..., None]:
    """Return the function with the options of its groups for parameters; `before` may change what is given for them."""
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, Any] = {}
    seen = [inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    taken = inspect.signature(function).parameters
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

    @functools.wraps(function)
    def called(context: typer.Context, **given: Any) -> None:
        if before:
            before(context, given)
        built = {name: group(*(given.pop(field) for field in group._fields)) for name, group in groups.items()}
        function(**given, **built, **({"context": context} if "context" in taken else {}))

    called.__signature__ = inspect.Signature(seen)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in seen}
    return called
