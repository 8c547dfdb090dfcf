"""The page and the chart that `eval` and `bench` can write."""

from __future__ import annotations

import functools
import importlib.util
import sys
import time
from pathlib import Path

import metaalign_edge as edge
from metaalign_edge_preferences import report as pages
from metaalign_edge_preferences.findings import Findings, Sweep
from metaalign_edge_runtime.errors import UsageError
from metaalign_edge_runtime.stores import files

from ..terminal.screen import Screen


def check_outputs(report: Path | None, chart: Path | None) -> None:
    """Check that the report and the chart can be written, before a model answers for hours.

    Raises:
        UsageError: the chart is neither .png nor .svg, or matplotlib is missing. CannotWrite: a file cannot be written.
    """
    if chart and chart.suffix.lower() not in (".png", ".svg"):
        raise UsageError(f"--chart writes .png or .svg, not {chart.name}")
    if chart and importlib.util.find_spec("matplotlib") is None:
        raise UsageError('--chart draws with matplotlib: pip install "metaalign-edge[chart]"')
    for path in filter(None, (report, chart)):
        files.write_whole(path, None)


def write_outputs(found: Findings | Sweep, report: Path | None, chart: Path | None) -> None:
    """Write the report and the chart of what `eval` found.

    Raises:
        CannotWrite: one cannot be written.
    """
    if not (report or chart):
        return
    import shlex

    command, program = shlex.join(["metaalign-edge", *sys.argv[1:]]), f"metaalign-edge {edge.__version__}"
    page = found.page(command, time.strftime("%Y-%m-%d"), program)
    if report:
        files.write_whole(report, pages.write_page(page).encode("utf-8", "replace"))
    if chart:
        files.write_whole(chart, pages.draw(page.charts, page.title, chart.suffix[1:].lower()))


def print_findings(found: Findings | Sweep, screen: Screen, as_json: bool) -> None:
    """Print what `eval` found, as text with tables or as JSON."""
    lay_out = functools.partial(screen.lay_out, spare=True)  # the last column only says what the others mean
    screen.json(found.document()) if as_json else screen.write(found.text(lay_out))
