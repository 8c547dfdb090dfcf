"""Options become what a command takes: groups of them, and what files say."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

import typer

from . import in_files


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Let a command take groups of options, NamedTuples, where Typer sees every option of theirs."""
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
    def spread(context: typer.Context, **given: Any) -> None:
        in_files.obey_settings(context, given)
        built = {name: group(*(given.pop(field) for field in group._fields)) for name, group in groups.items()}
        function(**given, **built, **({"context": context} if "context" in taken else {}))

    spread.__signature__ = inspect.Signature(seen)  # type: ignore[attr-defined]
    spread.__annotations__ = {parameter.name: parameter.annotation for parameter in seen}
    return spread
