"""Measure whether a model follows preferences: a program decides, and every rate has its 95 % interval."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import metaalign_edge as edge
from metaalign_edge import RenderOptions
from metaalign_edge_preferences import findings
from metaalign_edge_runtime.llama.interrupt import Interrupt

from .measure import adherence, outputs
from .options import command
from .options.groups import (
    DIALOG,
    MODEL,
    OUTPUT,
    ChartOption,
    JsonOption,
    MaxTokensOption,
    ModelOptions,
    ParallelOption,
    RemindOption,
    StrengthOptions,
    TemplateOption,
    TempOption,
    ThinkOption,
    Verbosity,
    option,
)

SuiteOption = Annotated[
    str, option("--suite", help="builtin, ifeval, or a file: a suite of your own or IFEval's rows.")
]
AgainstOption = Annotated[
    str | None, option("--against", help="A second model to compare with, over the same cases.", panel=MODEL)
]
AgainstTemplateOption = Annotated[
    str | None,
    option("--against-template", help="The second's template; without --against, the same model's.", panel=DIALOG),
]
SizeOption = Annotated[
    int | None,
    option("--size", help="Cases a section of the built-in suite (60); of a file, its first.", min=1),
]
SuiteSeedOption = Annotated[
    int, option("--seed", help="Draws the built-in suite, and where --temp is not 0 the answers.", env="SEED", min=0)
]
TierOption = Annotated[
    str, option("--ifeval-tier", help="Where IFEval's instructions stand: system, user or query (as published).")
]
ReportOption = Annotated[Path | None, option("--report", help="Write a page to read: OUT.html.", panel=OUTPUT)]
GridOption = Annotated[
    str | None,
    option("--strength", help="Ask at several strengths of a tier: pref=0,1,1.5,2 or system=1,2,4.", panel=DIALOG),
]
AnswersOption = Annotated[
    Path | None, option("--answers", help="Keep the answers in this file. Default: in the cache.", panel=OUTPUT)
]


@command
def eval(
    suite: SuiteOption = "builtin",
    against: AgainstOption = None,
    size: SizeOption = None,
    seed: SuiteSeedOption = 0,
    parallel: ParallelOption = 8,
    ifeval_tier: TierOption = "system",
    template: TemplateOption = "auto",
    against_template: AgainstTemplateOption = None,
    remind: RemindOption = True,
    think: ThinkOption = None,
    max_tokens: MaxTokensOption = None,
    temp: TempOption = 0.0,
    strength: GridOption = None,
    as_json: JsonOption = False,
    report: ReportOption = None,
    chart: ChartOption = None,
    answers: AnswersOption = None,
    *,
    strengths: StrengthOptions,
    loaded: ModelOptions,
    talk: Verbosity,
) -> None:
    """Measure whether a model follows preferences: a program decides, and every rate has its 95 % interval.

    A run that was stopped goes on where it was when the same command is given again.

    Examples:

        metaalign-edge eval --size 10

        metaalign-edge eval -m model-Q4_K_M.gguf --against model-F16.gguf --report report.html
    """
    screen, options, interrupt = talk.screen(), RenderOptions(remind, think), Interrupt()
    settings = strengths.added(loaded.settings())
    settings = replace(settings, max_tokens=max_tokens, temperature=temp, seed=seed, verbose=talk.verbose)
    outputs.check_outputs(report, chart)
    tier, grid = adherence.read_grid(strength) if strength is not None else ("", [])
    names = [f".{tier}-{one:g}" for one in grid] or ["", ".against"]
    models = [(loaded.model, template, settings)]
    if grid:
        models = [(loaded.model, template, replace(settings, **{f"{tier}_strength": one})) for one in grid]  # type: ignore[arg-type]
    if against is not None or against_template is not None:
        models.append(adherence.rival(models, against, against_template))
    chosen = []
    for name, wanted, how in models:  # before the suite is composed
        file = loaded._replace(model=name).file(screen)
        plan = edge.plan_for(file, how, answers=parallel)
        chosen.append((file, edge.choose_template(wanted, file), how.planned(plan), plan))
    asked = adherence.find_suite(suite, seed, size, ifeval_tier)
    files = [answers and answers.with_name(f"{answers.stem}{name}{answers.suffix}") for name in names]
    candidates = [
        adherence.make_candidate(*one, options, asked, path) for one, path in zip(chosen, files, strict=False)
    ]
    if asked.unchecked:
        kinds = ", ".join(asked.unchecked)
        screen.note(f"metaalign-edge: warning: not checked: {kinds}: get `python -m nltk.downloader punkt_tab`")
    for candidate in candidates:
        adherence.interview(candidate, asked, options, parallel, interrupt, screen)
    runs = [candidate.run for candidate in candidates]
    found = findings.Sweep(asked, runs, tier, grid) if grid else findings.Findings(asked, runs)
    outputs.write_outputs(found, report, chart)
    screen.json(found.document()) if as_json else screen.write(found.text(screen.lay_out))
