"""Answer a query under several preferences at once, side by side. A lone - is the answer without any."""

from __future__ import annotations

import contextlib
from typing import cast

import typer

from metaalign_edge import Dialog, Turn
from metaalign_edge_runtime.errors import UsageError, one_line

from .options import command
from .options.groups import (
    JsonOption,
    MetaPrompt,
    ModelOptions,
    NoCacheOption,
    QueryArgument,
    RenderingOptions,
    SamplingOptions,
    StdinOption,
    StrengthOptions,
    Verbosity,
    gathered,
    prompt_cache,
)
from .options.loading import open_scheduler
from .options.query import read_query
from .terminal import report
from .terminal.columns import Columns, answer_together
from .terminal.documents import answer_document


@command
def compare(
    context: typer.Context,
    query: QueryArgument = None,
    *,
    meta_prompt: MetaPrompt,
    rendered: RenderingOptions,
    strengths: StrengthOptions,
    loaded: ModelOptions,
    sampling: SamplingOptions,
    as_json: JsonOption = False,
    no_cache: NoCacheOption = False,
    no_stdin: StdinOption = False,
    talk: Verbosity,
) -> None:
    """Answer a query under several preferences at once, side by side. A lone - is the answer without any.

    Examples:

        metaalign-edge compare --pref @child --pref @expert "What is a volcano?"

        metaalign-edge compare --pref - --pref @json+@child --json "What is tea?"
    """
    screen, preferences = talk.screen(), meta_prompt.preferences()
    if len(preferences) < 2:
        raise UsageError("compare needs two preferences or more: give each with --pref (a lone - is none)")
    asked, system_info = Turn(cast(str, read_query(query, no_stdin, repl=False))), meta_prompt.system_info()
    dialogs = [Dialog(system_info, one.text, (asked,)) for one in preferences]
    settings = gathered(context, loaded, sampling, strengths, talk)
    opened = open_scheduler(loaded, rendered, settings, screen, prompt_cache(no_cache), len(dialogs))
    with opened as scheduler, scheduler.interrupt:
        heads = [one.given for one in preferences]
        with contextlib.nullcontext() if as_json else Columns(heads, screen) as columns:
            answers = answer_together(scheduler, dialogs, columns, screen, rendered.strict_tiers)
        compared = list(zip(heads, answers, strict=False))
        if as_json:
            screen.json([{"pref": head, **answer_document(answer, settings.schema)} for head, answer in compared])
        screen.detail("\n".join(map(report.describe, answers)))
        scheduler.interrupt.check()
        for head, answer in compared:
            report.check_answer(answer, settings.schema, screen, f"the answer under {one_line(head)}")
