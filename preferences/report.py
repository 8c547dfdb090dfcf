"""The results of `eval` as table rows, charts, examples of misses and a page; one model, or two side by side.

Results are a tree: names lead to branches, and each leaf is a `Rate` (suite.summary, ifeval.summary).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from textwrap import wrap
from typing import Any

from . import families
from .dialogs import Check
from .statistics import Difference, Rate, difference, rate
from .suite import SECTIONS, Judged, summary

__all__ = [
    "Bar", "Chart", "Curves", "Example", "Examples", "Group", "Page", "Row", "branches", "charts", "compare", "curves",
    "document", "draw", "examples", "groups", "leaves", "percent", "results", "table", "verdicts", "write_page",
]  # fmt: skip

Place = tuple[str, ...]  # the names that lead to a leaf
Tree = Mapping[str, Any]
Summary = Callable[[Sequence[Judged]], Tree]

SIGNIFICANT = 0.05
_EXAMPLES = 3  # of each section
_TEMPLATE = Path(__file__).parent / "report.html.jinja"
_NOT_TEXT = dict.fromkeys([*range(9), 11, 12, *range(14, 32), *range(127, 160)])  # control characters

# what each leaf is the rate of
_MEANING: dict[Place, str] = {
    ("adherence", "seen"): SECTIONS["seen"],
    ("adherence", "held_out", "combination"): SECTIONS["combination"],
    ("adherence", "held_out", "frame"): SECTIONS["frame"],
    ("adherence", "held_out", "word"): SECTIONS["word"],
    ("adherence", "explicit"): "one preference that is asked for outright",
    ("adherence", "implicit"): "one preference that who the user is only implies",
    ("adherence", "not_by_default"): "one preference that the model's own plain answer would not satisfy",
    ("adherence", "topic_transfer"): SECTIONS["topic"],
    ("adherence", "own"): "the cases of a file of your own",
    ("conflict", "system"): f"{SECTIONS['conflict']}: System Info wins, as it should",
    ("conflict", "user"): f"{SECTIONS['conflict']}: User Info wins (less is better)",
    ("conflict", "neither"): f"{SECTIONS['conflict']}: neither is met, or both are",
    ("conflict", "control"): f"{SECTIONS['control']}, and User Info is obeyed",
    ("steerability",): f"{SECTIONS['opposite']}: both are obeyed",
    ("facts",): "under a preference that leaves the content alone, the first fact of the plain answer is still there",
    ("plain", "plain"): SECTIONS["plain"],
    ("plain", "form"): SECTIONS["form"],
    ("plain", "unknown"): SECTIONS["unknown"],
    ("combined", "two"): SECTIONS["two"],
    ("combined", "three"): SECTIONS["three"],
    ("multi_turn", "same"): SECTIONS["turns"],
    ("multi_turn", "changed"): SECTIONS["midway"],
    ("opinions", "background"): SECTIONS["background"],
    ("opinions", "stranger"): SECTIONS["stranger"],
    ("opinions", "consensus"): SECTIONS["consensus"],
    ("priority",): SECTIONS["priority"],
    ("ifeval", "prompt_strict"): "every instruction of a prompt is followed",
    ("ifeval", "instruction_strict"): "an instruction is followed",
}


_CURVES: dict[str, dict[str, Place]] = {
    "Obeyed": {
        "seen wordings": ("adherence", "seen"),
        "new combinations": ("adherence", "held_out", "combination"),
        "new key words": ("adherence", "held_out", "word"),
        "your own cases": ("adherence", "own"),
        "two at once": ("combined", "two"),
        "three at once": ("combined", "three"),
        "opposites, both": ("steerability",),
    },
    "Who wins a conflict": {
        "System Info": ("conflict", "system"),
        "User Info": ("conflict", "user"),
        "neither": ("conflict", "neither"),
    },
    "What must not suffer": {
        "facts": ("facts",),
        "plain answers": ("plain", "plain"),
        "what is unknown": ("plain", "unknown"),
        "consensus": ("opinions", "consensus"),
    },
}


@dataclass(frozen=True)
class Row:
    """A rate as reports show it, with the second model's if there is one."""

    path: Place  # in the tree
    alone: bool  # whether its group has no other row
    group: str
    name: str  # within its group; the group's own where it is alone in the tree
    meaning: str
    rate: Rate
    other: Rate | None = None
    difference: Difference | None = None


@dataclass(frozen=True)
class Group:
    """Rows that belong together."""

    name: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Bar:
    """A value with its interval, on the scale of its chart."""

    value: float
    low: float
    high: float
    text: str


@dataclass(frozen=True)
class Chart:
    """Horizontal bars from zero: for each label one, or two where two models are compared."""

    title: str
    caption: str
    low: float  # the scale
    high: float
    labels: tuple[tuple[str, tuple[Bar, ...]], ...]

    @property
    def ticks(self) -> tuple[float, ...]:
        """Return the values that the scale names."""
        middle = (self.low + self.high) / 2
        return (self.low, (self.low + middle) / 2, middle, (middle + self.high) / 2, self.high)


@dataclass(frozen=True)
class Curves:
    """Lines of shares in per cent, one for each label, with a point at each of `places`."""

    title: str
    caption: str
    places: tuple[float, ...]  # on the horizontal axis
    lines: tuple[tuple[str, tuple[Bar, ...]], ...]


@dataclass(frozen=True)
class Example:
    """An answer that missed."""

    id: str
    system_info: str
    user_info: str
    earlier: tuple[str, ...]  # questions
    question: str
    answer: str
    failed: tuple[str, ...]


@dataclass(frozen=True)
class Examples:
    """The first misses of a section."""

    section: str
    meaning: str
    missed: int
    n: int
    shown: tuple[Example, ...]


@dataclass(frozen=True)
class Page:
    """The variables of the report's template."""

    title: str
    model: str
    other: str  # the model that it is compared with, or nothing
    date: str
    command: str
    facts: tuple[tuple[str, str], ...]
    groups: tuple[Group, ...]
    charts: tuple[Chart | Curves, ...]
    verdicts: Mapping[str, Sequence[str]]  # the families that are worse, better, not distinguishable
    examples: tuple[Examples, ...]
    errors: tuple[Mapping[str, str], ...]
    grid: tuple[Sequence[str], Sequence[Sequence[str]]] | None = None  # headings and rows, in place of groups


# --- rates ------------------------------------------------------------------------------------------------------------


def results(judged: Iterable[Judged]) -> dict[str, Any]:
    """Return the suite's summary, and a rate for every section that only a file of the user's own has."""
    found = list(judged)
    tree = summary(found)
    own = dict.fromkeys(one.case.section for one in found if one.case.section not in (*SECTIONS, "own"))
    if own:
        tree["sections"] = {name: rate(one.obeyed for one in found if one.case.section == name) for name in own}
    return tree


def leaves(tree: Tree, path: Place = ()) -> Iterator[tuple[Place, Rate]]:
    """Yield every rate of a tree with its path, in order."""
    for name, branch in tree.items():
        if isinstance(branch, Rate):
            yield (*path, name), branch
        else:
            yield from leaves(branch, (*path, name))


def document(tree: Tree) -> dict[str, Any]:
    """Return a tree of rates or differences as a JSON document."""
    return {
        name: {key: round(value, 4) for key, value in asdict(branch).items()}
        if isinstance(branch, (Rate, Difference))
        else document(branch)
        for name, branch in tree.items()
    }


def compare(first: Sequence[Judged], second: Sequence[Judged], of: Summary) -> dict[Place, Difference]:
    """Return how two models differ, rate by rate, over the same cases in the same order.

    Args:
        of: makes the tree of rates. Called with one case (or both of a pair), it gives rates of 0 or 1: the verdicts.
    """
    units: dict[str, list[int]] = {}
    for number, one in enumerate(first):
        units.setdefault(one.case.pair or str(number), []).append(number)
    pairs: dict[Place, list[tuple[bool, bool]]] = {}
    for numbers in units.values():
        ours, theirs = (dict(leaves(of([judged[number] for number in numbers]))) for judged in (first, second))
        for path, found in ours.items():
            other = theirs.get(path)
            if other is not None and found.n == other.n == 1:  # for facts, both models need a yardstick
                pairs.setdefault(path, []).append((found.rate == 1, other.rate == 1))
    return {path: difference(found) for path, found in pairs.items()}


def branches(found: Mapping[Place, Difference]) -> dict[str, Any]:
    """Return a tree from its leaves."""
    tree: dict[str, Any] = {}
    for path, leaf in found.items():
        branch = tree
        for name in path[:-1]:
            branch = branch.setdefault(name, {})
        branch[path[-1]] = leaf
    return tree


def verdicts(differences: Mapping[Place, Difference]) -> dict[str, list[str]]:
    """Sort the families by whether the first model is worse, better, or not distinguishable (p of 0.05 or more)."""
    found: dict[str, list[str]] = {"worse": [], "better": [], "not_distinguishable": []}
    for path, one in sorted(differences.items()):
        if "by_family" in path or "by_instruction" in path:
            kind = "not_distinguishable" if one.p >= SIGNIFICANT else "worse" if one.points < 0 else "better"
            found[kind].append(path[-1])
    return found


# --- rows -------------------------------------------------------------------------------------------------------------


def groups(tree: Tree, other: Tree | None = None, differences: Mapping[Place, Difference] | None = None) -> list[Group]:
    """Return the rates that have cases as rows, grouped as in the tree; families have a group of their own."""
    others = dict(leaves(other or {}))
    found: dict[str, list[Row]] = {}
    for path, one in leaves(tree):
        if one.n:
            parted = "by_family" in path or "by_instruction" in path
            group = " ".join(path[:-1]).replace("_", " ") if parted else path[0].replace("_", " ")
            name = path[-1] if parted else " ".join(path[1:] or path).replace("_", " ")
            gap = (differences or {}).get(path)
            row = Row(path, len(path) == 1, group, name, _meaning(path), one, others.get(path), gap)
            found.setdefault(group, []).append(row)
    return [Group(name, tuple(rows)) for name, rows in found.items()]


def _meaning(path: Place) -> str:
    if "by_family" in path and path[-1] in families():
        asks = families()[path[-1]].asks.rstrip(".")
        return asks[0].lower() + asks[1:]
    return _MEANING.get(path, "")


def table(found: Iterable[Group], two: bool) -> tuple[list[str], list[list[str]]]:
    """Return the headings and the rows of a table for people; a group's name is a row with one cell."""
    heads = ["", "rate", "against", "points", "95 %", "p", "n"] if two else ["", "rate", "95 %", "n"]
    rows: list[list[str]] = []
    for group in found:
        rows += [] if group.rows[0].alone else [[group.name]]
        for row in group.rows:
            rows.append([row.name if row.alone else f"  {row.name}", *_cells(row, two), row.meaning])
    return [*heads, "what"], rows


def _cells(row: Row, two: bool) -> list[str]:
    one = row.rate
    if not two:
        return [percent(one.rate), f"{100 * one.low:.1f}-{100 * one.high:.1f}", str(one.n)]
    gap = row.difference
    if gap is None or row.other is None:
        return [percent(one.rate), percent(row.other.rate) if row.other else "", "", "", "", ""]
    figures = [f"{gap.points:+.1f}", f"{gap.low:+.1f} to {gap.high:+.1f}", chance(gap.p), str(gap.n)]
    return [percent(one.rate), percent(row.other.rate), *figures]


def percent(share: float) -> str:
    """Write a share in per cent."""
    return f"{100 * share:.1f} %"


def chance(p: float) -> str:
    """Write a p-value."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


# --- charts -----------------------------------------------------------------------------------------------------------


def charts(found: Sequence[Group], names: Sequence[str]) -> list[Chart]:
    """Return the rates of sections and of families as bars, and the differences of two models."""
    parted = [group for group in found if group.name.endswith(("by family", "by instruction"))]
    drawn = []
    for title, some in (("By section", [g for g in found if g not in parted]), ("By family", parted)):
        rows = [row for group in some for row in group.rows]
        if rows:
            both = f" Upper bars: {names[0]}; lower bars: {names[1]}." if len(names) > 1 else ""
            caption = f"Share of cases, in per cent, with its 95 % interval (Wilson).{both}"
            labels = tuple((_label(row), _bars(row)) for row in rows)
            drawn.append(Chart(title if title != "By family" else some[0].name.capitalize(), caption, 0, 100, labels))
    gaps = [(row, row.difference) for group in found for row in group.rows if row.difference]
    if gaps:
        reach = max(10.0, *(max(-gap.low, gap.high) for _, gap in gaps))
        scale = next(size for size in (10, 20, 40, 60, 80, 100) if size >= min(reach, 100))
        caption = f"{names[0]} minus {names[1]}, in points, over the same cases, with the 95 % interval (Newcombe)."
        labels = tuple((_label(row), (Bar(gap.points, gap.low, gap.high, str(gap)),)) for row, gap in gaps)
        drawn.append(Chart("Paired differences", caption, -scale, scale, labels))
    return drawn


def _label(row: Row) -> str:
    if row.alone or row.group.endswith(("by family", "by instruction")):
        return row.name
    return f"{row.group}: {row.name}"


def _bars(row: Row) -> tuple[Bar, ...]:
    return tuple(map(_bar, [row.rate] + ([row.other] if row.other else [])))


def _bar(one: Rate) -> Bar:
    return Bar(100 * one.rate, 100 * one.low, 100 * one.high, str(one).strip())


def curves(places: Sequence[float], trees: Sequence[Tree], over: str) -> list[Curves]:
    """Return a chart for each entry of `_CURVES` that has cases. trees: the rates at each of `places`."""
    found = [dict(leaves(tree)) for tree in trees]
    drawn = []
    for title, paths in _CURVES.items():
        shown = {label: path for label, path in paths.items() if path in found[0] and found[0][path].n}
        lines = tuple((label, tuple(_bar(rates[path]) for rates in found)) for label, path in shown.items())
        if lines:
            caption = f"Share of cases, in per cent, with its 95 % interval (Wilson), over {over}."
            drawn.append(Curves(title, caption, tuple(places), lines))
    return drawn


def draw(found: Sequence[Chart | Curves], title: str, kind: str) -> bytes:
    """Draw the charts with matplotlib; return the file, `png` or `svg`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it reports its font cache
    import matplotlib
    from matplotlib.figure import Figure

    heights = [
        4.0 if isinstance(chart, Curves) else 1.2 + sum(0.12 + 0.2 * len(bars) for _, bars in chart.labels)
        for chart in found
    ]
    figure = Figure(figsize=(9, sum(heights) + 0.5), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(len(found), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, chart in zip(axes, found, strict=True):
        _draw_curves(axis, chart) if isinstance(chart, Curves) else _draw_bars(axis, chart)
        axis.set_title(chart.title, loc="left", parse_math=False)
        axis.set_xlabel("\n".join(wrap(chart.caption, 80)), parse_math=False, fontsize="small")
        axis.spines[["top", "right"]].set_visible(False)
    file = BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "metaalign-edge", "svg.fonttype": "none"}):
        figure.savefig(file, format=kind, dpi=120, metadata={"Date": None} if kind == "svg" else None)
    return file.getvalue()


def _draw_curves(axis: Any, chart: Curves) -> None:
    """Draw lines. Matplotlib must not read their labels as formulas."""
    aside = 0.008 * (chart.places[-1] - chart.places[0])  # lines apart, so that their intervals can be told apart
    for number, (label, points) in enumerate(chart.lines):
        places = [place + aside * (number - (len(chart.lines) - 1) / 2) for place in chart.places]
        values = [one.value for one in points]
        reach = [[max(0.0, one.value - one.low) for one in points], [max(0.0, one.high - one.value) for one in points]]
        axis.errorbar(places, values, yerr=reach, marker="o", markersize=3, capsize=2, linewidth=1.4, label=label)
    axis.set_ylim(0, 102)
    axis.set_xticks(chart.places, [f"{place:g}" for place in chart.places])
    axis.grid(alpha=0.3)
    for text in axis.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5)).get_texts():
        text.set_parse_math(False)


def _draw_bars(axis: Any, chart: Chart) -> None:
    """Draw bars. Matplotlib must not read their labels as formulas."""
    for number, (_, bars) in enumerate(chart.labels):
        height = 0.8 / len(bars)
        for place, bar in enumerate(bars):
            y = number - 0.4 + (place + 0.5) * height
            reach = [[max(0.0, bar.value - bar.low)], [max(0.0, bar.high - bar.value)]]
            axis.barh(y, bar.value, 0.85 * height, color=("#3b6fb6", "#c98a2b")[place % 2])
            axis.errorbar(bar.value, y, xerr=reach, color="#222222", capsize=2, linewidth=1)
    axis.set_yticks(range(len(chart.labels)), [label for label, _ in chart.labels], parse_math=False)
    axis.set_ylim(len(chart.labels) - 0.4, -0.6)
    axis.set_xlim(chart.low, chart.high)
    axis.set_xticks(chart.ticks)
    axis.axvline(0, color="#222222", linewidth=0.8)


# --- examples and the page --------------------------------------------------------------------------------------------


def examples(judged: Iterable[Judged], meanings: Mapping[str, str] = SECTIONS) -> list[Examples]:
    """Return, section by section, the first answers that missed."""
    found: dict[str, list[Judged]] = {}
    for one in judged:
        found.setdefault(one.case.section, []).append(one)
    shown = []
    for section, some in found.items():
        missed = [one for one in some if not one.obeyed or one.lost]
        if missed:
            first = tuple(_example(one) for one in missed[:_EXAMPLES])
            shown.append(Examples(section, meanings.get(section, ""), len(missed), len(some), first))
    return shown


def _example(one: Judged) -> Example:
    case = one.case
    failed = [f"{c.key} fails: {_signature(c)}" for c in case.checks if not c.holds(one.response)]
    if one.lost:
        failed += [f"{c.key} holds, which User Info asks for in vain: {_signature(c)}" for c in case.losing]
    if not case.checks:
        failed = [f"it says none of these: {' '.join(case.facts)}"]
    texts = (case.system_info, case.user_info, case.queries[-1], one.response)
    system_info, user_info, question, answer = (text.translate(_NOT_TEXT) for text in texts)
    earlier = tuple(text.translate(_NOT_TEXT) for text in case.queries[:-1])
    return Example(case.id, system_info, user_info, earlier, question, answer, tuple(failed))


def _signature(check: Check) -> str:
    """Return a check as a call."""
    return f"{check.checker}({', '.join(f'{name}={value!r}' for name, value in check.parameters.items())})"


def write_page(page: Page) -> str:
    """Render the report's template as HTML. All texts are escaped, the model's answers among them."""
    from jinja2 import Environment, StrictUndefined

    source = _TEMPLATE.read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": percent, "chance": chance}
    fields = {name: getattr(page, name) for name in Page.__dataclass_fields__}
    return environment.from_string(source).render(**fields)
