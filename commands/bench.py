"""Measure a model's speed here: reading, writing, several answers at a time, strengths, the first token."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Annotated

import metaalign_edge as edge
from metaalign_edge_preferences import report as pages
from metaalign_edge_runtime.llama.interrupt import Interrupt
from metaalign_edge_runtime.stores import files

from .measure import outputs, speeds
from .measure.speeds import BENCH_PROMPT, BENCH_TOKENS
from .options import command
from .options.groups import ChartOption, JsonOption, ModelOptions, TemplateOption, Verbosity, option


@command
def bench(
    rounds: Annotated[
        int, option("--rounds", help="Measurements of each kind; the median counts.", min=1, max=100)
    ] = 5,
    template: TemplateOption = "auto",
    as_json: JsonOption = False,
    chart: ChartOption = None,
    *,
    model_options: ModelOptions,
    verbosity: Verbosity,
) -> None:
    """Measure a model's speed here: reading, writing, several answers at a time, strengths, the first token.

    Examples:

        metaalign-edge bench

        metaalign-edge bench -m model.gguf -t 4 --json
    """
    screen, interrupt, settings = verbosity.screen(), Interrupt(), model_options.settings()
    outputs.check_outputs(None, chart)
    file = model_options.file(screen)
    settings = replace(settings, context=BENCH_PROMPT + BENCH_TOKENS)
    edge.choose_template(template, file)
    with interrupt:
        found = speeds.measure(
            file, replace(settings, temperature=0.0, verbose=verbosity.llama_log), template, rounds, interrupt
        )
    if chart:
        title = f"{found.model}: what this machine makes of it"
        files.write_whole(chart, pages.draw(found.charts(), title, chart.suffix[1:].lower()))
    heads = ["", found.model, "", ""]
    screen.json(asdict(found)) if as_json else screen.lines(screen.lay_out(heads, found.rows()))
