"""Measure whether a model follows preferences: a program decides, and every rate has its 95 % interval."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, NamedTuple

import metaalign_edge as edge
from metaalign_edge import RenderOptions
from metaalign_edge_preferences.answers import Answers
from metaalign_edge_preferences.findings import Findings, Suite, Sweep, find_suite

from .measure import adherence, outputs
from .measure.adherence import Choice
from .options import command
from .options.groups import (
    DIALOG,
    MODEL,
    OUTPUT,
    SAMPLING,
    ChartOption,
    JsonOption,
    ModelOptions,
    ParallelOption,
    RemindOption,
    StrengthOptions,
    TemplateArgsOption,
    TemplateOption,
    ThinkOption,
    Verbosity,
    option,
    template_args,
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
    int, option("--seed", help="Draws the built-in suite, and where --temp is not 0 the answers.", env=True, min=0)
]
EvalTempOption = Annotated[
    float, option("--temp", help="Temperature; 0 always takes the likeliest token.", panel=SAMPLING, env=True, min=0.0)
]
EvalMaxTokensOption = Annotated[
    int | None,
    option(
        "-n",
        "--max-tokens",
        help="Longest answer, in tokens. Default: as the suite has it.",
        panel=SAMPLING,
        env=True,
        min=1,
    ),
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


class SuiteChoice(NamedTuple):
    """Which cases are asked."""

    suite: SuiteOption = "builtin"
    size: SizeOption = None
    seed: SuiteSeedOption = 0
    ifeval_tier: TierOption = "system"

    def read(self) -> Suite:
        """Compose or read the suite.

        Raises:
            UsageError, NotFound: as `find_suite`.
        """
        return find_suite(self.suite, self.seed, self.size, self.ifeval_tier)


class Second(NamedTuple):
    """The model with which the first is compared."""

    against: AgainstOption = None
    against_template: AgainstTemplateOption = None


class Outputs(NamedTuple):
    """The options that say where results and answers are written."""

    as_json: JsonOption = False
    report: ReportOption = None
    chart: ChartOption = None
    answers: AnswersOption = None

    def answers_of(self, choice: Choice) -> Path | None:
        """Return the file of a model's answers, if the user named one."""
        return self.answers and self.answers.with_name(f"{self.answers.stem}{choice.suffix}{self.answers.suffix}")


@command
def eval(
    *,
    suite: SuiteChoice,
    parallel: ParallelOption = 8,
    template: TemplateOption = "auto",
    second: Second,
    remind: RemindOption = True,
    think: ThinkOption = None,
    template_arg: TemplateArgsOption = None,
    max_tokens: EvalMaxTokensOption = None,
    temp: EvalTempOption = 0.0,
    strength: GridOption = None,
    written: Outputs,
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
    screen, options = talk.screen(), RenderOptions(remind, think, template_args(template_arg))
    settings = strengths.added(loaded.settings())
    settings = replace(settings, max_tokens=max_tokens, temperature=temp, seed=suite.seed, verbose=talk.llama_log)
    outputs.check_outputs(written.report, written.chart)
    grid = None if strength is None else adherence.read_grid(strength)
    choices = adherence.choose_models(Choice(loaded.model, template, settings), grid, *second)
    models = []  # a missing model is reported before the suite is composed
    for choice in choices:
        file = loaded._replace(model=choice.model).file(screen)
        plan = edge.plan_for(file, choice.settings, answers=parallel)
        chosen = edge.choose_template(choice.template, file)
        models.append((file, chosen, choice.settings.planned(plan), plan, written.answers_of(choice)))
    cases = suite.read()
    opened: dict[Path, Answers] = {}
    candidates = [adherence.make_candidate(*model, options, cases, opened) for model in models]
    if kinds := ", ".join(cases.unchecked):
        screen.note(f"metaalign-edge: warning: not checked: {kinds}: get `python -m nltk.downloader punkt_tab`")
    for candidate in candidates:
        adherence.ask_model(candidate, cases, options, parallel, screen)
    runs = [candidate.run for candidate in candidates]
    found = Sweep(cases, runs, grid.tier, grid.strengths) if grid else Findings(cases, runs)
    outputs.write_outputs(found, written.report, written.chart)
    screen.json(found.document()) if written.as_json else screen.write(found.text(screen.lay_out))
