"""Answer many rows, several at a time. Killed at any moment, the same command goes on where it was."""

from __future__ import annotations

import contextlib
import functools
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

import metaalign_edge as edge
from metaalign_edge import Model, Scheduler
from metaalign_edge_runtime.errors import EdgeError, Interrupted
from metaalign_edge_runtime.llama.interrupt import Interrupt
from metaalign_edge_runtime.stores import files

from .batches.rows import open_rows, read_rows
from .batches.work import Batch, open_ledger
from .options import command
from .options.groups import (
    OUTPUT,
    ForceOption,
    Loaded,
    MetaPrompt,
    NoCacheOption,
    ParallelOption,
    Rendered,
    Sampling,
    Strengths,
    Talk,
    gathered,
    kept_states,
    option,
)
from .terminal import report
from .terminal.progress import answers_bar
from .terminal.screen import Screen

WINDOW = 8  # rows for each sequence that are read ahead, so that neighbours begin alike


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


@command
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
    settings = gathered(loaded, sampling, strengths, talk)
    plan = edge.plan_for(file, settings, answers=parallel)
    settings = settings.planned(plan)
    chosen, interrupt, options = edge.choose_template(rendered.template, file), Interrupt(), rendered.options()
    deciding = replace(settings, seed=settings.seed if sampling.seed is not None else -1).deciding()
    run = files.digest([edge.__version__, file.identity, chosen.identity, *options, *deciding])[:16]
    unknown: set[str] = set()
    with contextlib.ExitStack() as stack:
        lines, name = stack.enter_context(open_rows(source))
        ledger = stack.enter_context(open_ledger(output, source, run, force))
        work = Batch(read_rows(lines, standing, settings.seed, unknown), ledger, screen, name, settings.schema)
        jobs = work.jobs(WINDOW * parallel)
        if (first := next(jobs, None)) is not None:  # otherwise there is nothing to load a model for
            stack.enter_context(interrupt)
            model = stack.enter_context(Model(file, settings, interrupt, plan))
            report.explain(model, chosen, settings, screen)
            kept = kept_states(no_cache, fills=False)
            size = edge.least_context(file, settings)
            made = Scheduler(model, chosen, settings, options, interrupt, parallel, size, kept)
            session, before = (
                stack.enter_context(made),
                functools.partial(report.warn, screen=screen, strict=rendered.strict_tiers),
            )
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
