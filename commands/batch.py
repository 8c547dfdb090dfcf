"""Answer many rows, several at a time. Killed at any moment, the same command goes on where it was."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

import metaalign_edge as edge
from metaalign_edge_runtime.stores import files

from .batches.rows import count_rows, open_rows, read_rows
from .batches.work import Batch, open_ledger, show_rows
from .options import command
from .options.groups import (
    OUTPUT,
    ForceOption,
    MetaPrompt,
    ModelOptions,
    NoCacheOption,
    ParallelOption,
    RenderingOptions,
    SamplingOptions,
    StrengthOptions,
    Verbosity,
    gathered,
    option,
    prompt_cache,
)
from .options.loading import open_slots
from .terminal import report

WINDOW = 8  # rows that are read ahead for each answer written at the same time

BatchArgument = Annotated[
    str,
    typer.Argument(
        metavar="IN.jsonl",
        help="A row a line, - is stdin: {query, pref or user_info, system or system_info, turns, id, max_tokens, seed, "
        "json_schema}.",
        show_default=False,
    ),
]
RowsOption = Annotated[
    Path | None, option("-o", "--output", help="Append finished rows here. Default: stdout.", panel=OUTPUT)
]


@command
def batch(
    context: typer.Context,
    source: BatchArgument,
    output: RowsOption = None,
    parallel: ParallelOption = 8,
    force: ForceOption = False,
    no_cache: NoCacheOption = False,
    *,
    meta_prompt: MetaPrompt,
    rendered: RenderingOptions,
    strengths: StrengthOptions,
    loaded: ModelOptions,
    sampling: SamplingOptions,
    talk: Verbosity,
) -> None:
    """Answer many rows, several at a time. Killed at any moment, the same command goes on where it was.

    Each finished row is written to OUT at once, and when all are there they are put in order.

    Examples:

        metaalign-edge batch questions.jsonl -o answers.jsonl --parallel 16

        echo '{"query": "What is tea?", "pref": "@json"}' | metaalign-edge batch -
    """
    screen, defaults = talk.screen(), meta_prompt.dialog()
    file = loaded.file(screen)
    settings = gathered(context, loaded, sampling, strengths, talk)
    plan = edge.plan_for(file, settings, answers=parallel)
    settings, unknown = settings.planned(plan), set[str]()
    chosen, options = edge.choose_template(rendered.template, file), rendered.options()
    deciding = (settings if sampling.seed is not None else replace(settings, seed=-1)).deciding()
    run = files.digest([edge.__version__, file.identity, chosen.identity, *options, *deciding])[:16]
    with open_rows(source) as (lines, name), open_ledger(output, source, run, force) as ledger:
        work = Batch(read_rows(lines, defaults, settings.seed, unknown), ledger, screen, name, settings.schema)
        requests = work.requests(WINDOW * parallel)
        if first := next(requests, None):  # if no row needs an answer, the model is not loaded
            states = prompt_cache(no_cache, read_only=True)
            with (
                open_slots(file, chosen, settings, options, plan, parallel, screen, states) as scheduler,
                show_rows(work, screen, file.path.name, count_rows(source), seen=ledger is None) as tell,
            ):
                warn = functools.partial(report.warn, screen=screen, strict=rendered.strict_tiers)
                work.answer(scheduler, itertools.chain([first], requests), warn, tell)
        if unknown:
            screen.note(f"metaalign-edge: warning: fields that mean nothing here: {', '.join(sorted(unknown))}")
        if ledger:
            ledger.finish(work.total)
    work.sum_up()
