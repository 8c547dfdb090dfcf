"""Answer a query under several preferences at once, side by side. A lone - is the answer without any."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from typing import cast

import metaalign_edge as edge
from metaalign_edge import Dialog, Session, Turn
from metaalign_edge_runtime.errors import UsageError, one_line
from metaalign_edge_runtime.llama.interrupt import Interrupt
from metaalign_edge_runtime.stores import profiles

from .options import command
from .options.groups import (
    JsonOption,
    Loaded,
    MetaPrompt,
    NoCacheOption,
    QueryArgument,
    Rendered,
    Sampling,
    StdinOption,
    Strengths,
    Talk,
    gathered,
    kept_states,
)
from .options.loading import load_model
from .options.query import read_query
from .terminal import report
from .terminal.columns import Columns, answer_together


@command
def compare(
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
    dialogs = [Dialog(meta_prompt.system_info(), profiles.wish_text(wish), (asked,)) for wish in wishes]
    settings = gathered(loaded, sampling, strengths, talk)
    interrupt, options, states = Interrupt(), rendered.options(), kept_states(no_cache)
    model, chosen, settings = load_model(loaded, rendered, settings, interrupt, screen, len(dialogs))
    with interrupt:
        with model:
            report.explain(model, chosen, settings, screen)
            one = Session(model, chosen, settings, options, interrupt, states=states)
            with (
                edge.parallel_for(one, dialogs) as session,
                contextlib.nullcontext() if as_json else Columns(wishes, screen) as columns,
            ):
                answers = answer_together(session, dialogs, columns, screen, rendered.strict_tiers)
        if as_json:
            screen.json([{"pref": wish, **asdict(answer)} for wish, answer in zip(wishes, answers, strict=False)])
        screen.detail("\n".join(map(report.describe, answers)))
        interrupt.check()
        for wish, answer in zip(wishes, answers, strict=False):
            report.check_answer(answer, settings.schema, screen, f"the answer under {one_line(wish)}")
