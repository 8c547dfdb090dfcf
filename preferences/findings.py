"""`eval` without the model: which suite is asked, the verdicts on the answers, and the results for people and JSON."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from metaalign_edge_runtime.errors import UsageError, counted

from . import ifeval
from .answers import Answers
from .report import (
    SIGNIFICANT,
    Group,
    Page,
    Place,
    branches,
    charts,
    compare,
    curves,
    document,
    examples,
    groups,
    leaves,
    percent,
    results,
    table,
    verdicts,
)
from .statistics import Difference
from .suite import COMPARED, SECTIONS, SIZE, Case, Judged, builtin, read_suite

__all__ = ["Findings", "Outcome", "Run", "Suite", "Sweep", "find_suite", "judge", "sound"]

_IFEVAL = {"prompt": "IFEval: every instruction", "part": "IFEval: some instructions"}


@dataclass(frozen=True)
class Suite:
    """The cases that `eval` asks."""

    name: str  # builtin, or a file
    kind: str  # builtin, own or ifeval
    cases: list[Case]
    seed: int
    size: int | None
    unchecked: list[str]  # IFEval's instructions that cannot be checked here

    @cached_property
    def all_cases(self) -> list[Case]:
        """Return the cases and, for some sections, their questions once more without a meta-prompt (Case.plain)."""
        plain = {case.queries[-1]: case.plain for case in self.cases if case.section in COMPARED}
        return [*self.cases, *plain.values()]

    @property
    def drawn(self) -> str:
        """Say which suite it is."""
        return f"{self.name}, seed {self.seed}" + (f", size {self.size}" if self.size else "")

    def spread(self, judged: list[Judged]) -> list[Judged]:
        """Return the judged answers that rates are counted from: IFEval counts each instruction, too."""
        return judged if self.kind != "ifeval" else ifeval.judged_by_instruction(judged)

    @property
    def summary(self) -> Callable[[Sequence[Judged]], dict[str, Any]]:
        """Return the function that turns judged answers into rates."""
        return ifeval.summary if self.kind == "ifeval" else results


def find_suite(name: str, seed: int, size: int | None, tier: str) -> Suite:
    """Compose the built-in suite, or read a file: the user's own, or IFEval's, whose instructions go to `tier`.

    Raises:
        UsageError: the file is no suite, or IFEval's checkers are not installed. NotFound: it cannot be read.
    """
    if tier not in ifeval.TIERS:
        raise UsageError(f"--ifeval-tier takes {', '.join(ifeval.TIERS)}, not {tier!r}")
    if name == "builtin":
        return Suite(name, name, builtin(seed, size or SIZE), seed, size or SIZE, [])
    if name == "ifeval":
        raise UsageError(ifeval.WHERE)
    path = Path(os.path.expanduser(name))
    if not ifeval.is_ifeval(path):
        return Suite(name, "own", read_suite(path)[:size], seed, size, [])
    if ifeval.missing():
        raise UsageError(ifeval.MISSING)
    try:
        cases, unchecked = ifeval.read_ifeval(path, tier)
    except ImportError as error:
        raise UsageError(f"lm-eval does not load ({error}): {ifeval.MISSING}") from error
    return Suite(name, "ifeval", cases[:size], seed, size, unchecked)


# --- verdicts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A model, the way it was asked, and its answers."""

    name: str
    path: str
    template: str
    native: bool
    max_tokens: int
    temperature: float
    answers: Answers


@dataclass(frozen=True)
class Outcome:
    """A model's judged answers, and the rates that they come to."""

    counted: list[Judged]  # from which the rates are counted
    errors: list[dict[str, str]]  # cases without an answer or a verdict: they count as missed
    unfinished: int  # answers that were cut off at -n
    truncated: int  # answers to dialogs whose oldest turns did not fit
    seconds: float
    tree: dict[str, Any]


def judge(suite: Suite, answers: Answers) -> Outcome:
    """Judge the answers; a case that has none, or whose checker fails, counts as missed."""
    responses = [answers.responses(number) for number in range(len(suite.all_cases))]
    first_plain = len(suite.cases)
    plain = {case.queries[0]: responses[number] for number, case in enumerate(suite.all_cases) if number >= first_plain}
    judged, errors = [], []
    for number, case in enumerate(suite.cases):
        if reason := answers.failed(number):
            errors.append({"id": case.id, "reason": reason})
        answer = responses[number][-1] if len(responses[number]) == len(case.queries) else ""
        yardstick = next(iter(plain.get(case.queries[-1], [])), "")
        judged.append(Judged(case, answer, yardstick))
    found = [sound(one, errors) for one in suite.spread(judged)]
    records = [record for turns in answers.records.values() for record in turns]
    return Outcome(
        counted=found,
        errors=list({(error["id"], error["reason"]): error for error in errors}.values()),
        unfinished=sum(record.get("finish_reason") == "length" for record in records),
        truncated=sum(bool(record.get("truncated")) for record in records),
        seconds=answers.seconds,
        tree=suite.summary(found),
    )


def sound(one: Judged, errors: list[dict[str, str]]) -> Judged:
    """Return a judged answer if its checkers can judge it. If one raises, note that in `errors` and return a miss."""
    for check in (*one.case.checks, *one.case.losing):
        try:
            check.holds(one.response)
            check.holds(one.yardstick)
        except Exception as error:  # the user's own pattern may raise anything
            said = " ".join(str(error).split())
            reason = f"the checker {check.checker} of {check.key} failed: {type(error).__name__}: {said}"
            errors.append({"id": one.case.id, "reason": reason})
            never = replace(check, checker="mentions", parameters={"text": "\0"})
            missed = replace(one.case, checks=(never,), losing=(never,) if one.case.losing else ())
            return replace(one, case=missed, response="", yardstick="")
    return one


# --- results ----------------------------------------------------------------------------------------------------------


class Findings:
    """The results of one model, or of two and their differences."""

    def __init__(self, suite: Suite, runs: Sequence[Run]) -> None:
        """Judge the answers."""
        self.suite, self.runs = suite, runs
        self.outcomes = [judge(suite, run.answers) for run in runs]
        self.differences: Mapping[Place, Difference] = {}
        if len(runs) > 1:
            first, second = self.outcomes
            self.differences = compare(first.counted, second.counted, suite.summary)

    @property
    def names(self) -> list[str]:
        """Return the models' names: those of their files, or with paths or templates if that tells them apart."""
        names, paths = [run.name for run in self.runs], [run.path for run in self.runs]
        templates = [f"{run.name} ({run.template})" for run in self.runs]
        return next((ways for ways in (names, paths, templates) if len({*ways}) == len(ways)), names)

    def document(self) -> dict[str, Any]:
        """Return the document that `--json` prints."""
        first, *other = map(self._document, self.runs, self.outcomes)
        if other:
            differences = document(branches(self.differences))
            first["against"] = {**other[0], "differences": differences, "families": verdicts(self.differences)}
        return first

    def _document(self, run: Run, outcome: Outcome) -> dict[str, Any]:
        suite = self.suite
        return {
            "model": run.name,
            "n": len(suite.cases),
            **document(outcome.tree),
            "seconds": round(outcome.seconds, 1),
            "suite": suite.name,
            "seed": suite.seed,
            "size": suite.size,
            "template": run.template,
            "max_tokens": run.max_tokens,
            "temperature": run.temperature,
            "unfinished": outcome.unfinished,
            "truncated": outcome.truncated,
            **({"unchecked": suite.unchecked} if suite.kind == "ifeval" else {}),
            "errors": outcome.errors,
        }

    def groups(self) -> list[Group]:
        """Return the rates as rows."""
        first, *second = (outcome.tree for outcome in self.outcomes)
        return groups(first, second[0] if second else None, self.differences)

    def text(self, lay_out: Callable[[list[str], list[list[str]]], Iterable[str]]) -> str:
        """Return the results as text; `lay_out` turns a table's headings and rows into lines."""
        suite, names = self.suite, self.names
        heads, rows = table(self.groups(), len(names) > 1)
        asked = f"{suite.drawn}, {counted(len(suite.cases), 'case')}"
        lines = [f"{' against '.join(names)}: {asked}", "", *lay_out(heads, rows)]
        if len(names) > 1:
            lines += ["", f"points: {names[0]} minus {names[1]}; families at p < 0.05:"]
            for kind, found in verdicts(self.differences).items():
                lines.append(f"  {kind.replace('_', ' ')}: {', '.join(found) or 'none'}")
        for name, run, outcome in zip(names, self.runs, self.outcomes, strict=True):
            if outcome.unfinished:
                cut = counted(outcome.unfinished, "answer")
                lines += ["", f"{name}: {cut} cut off after {counted(run.max_tokens, 'token')} (-n)"]
            if outcome.truncated:
                short = counted(outcome.truncated, "dialog")
                lines += ["", f"{name}: {short} without the oldest turns, to fit the context (-c)"]
            if outcome.errors:
                lines += ["", f"{name}: {len(outcome.errors)} could not be answered or judged, and count as missed:"]
                lines += [f"  {error['id']}: {error['reason']}" for error in outcome.errors]
        return "\n".join(lines) + "\n"

    def page(self, command: str, date: str, program: str) -> Page:
        """Return the page of `--report`."""
        suite, first, names, rows = self.suite, self.runs[0], self.names, self.groups()
        templates = dict.fromkeys(f"{run.template}, {'native' if run.native else 'wrapped'}" for run in self.runs)
        facts = {
            "Suite": suite.drawn,
            "Cases": f"{len(suite.cases):,}",
            "Template": " against ".join(templates),
            "Decoding": f"temperature {first.temperature:g}, {first.max_tokens} tokens at most",
            "Program": program,
            **({"Not checked": ", ".join(suite.unchecked)} if suite.unchecked else {}),
        }
        whole = [one for one in self.outcomes[0].counted if one.case.section != "instruction"]
        return Page(
            title=f"Is it followed? {names[0]}",
            model=names[0],
            other=names[1] if len(names) > 1 else "",
            date=date,
            command=command,
            facts=tuple(facts.items()),
            groups=tuple(rows),
            charts=tuple(charts(rows, names)),
            verdicts=verdicts(self.differences),
            examples=tuple(examples(whole, SECTIONS | _IFEVAL)),
            errors=tuple(
                {"id": f"{name}, {error['id']}", "reason": error["reason"]}
                for name, outcome in zip(names, self.outcomes, strict=True)
                for error in outcome.errors
            ),
        )


class Sweep:
    """The results of one model at several strengths of one tier, and how each differs from those at strength 1."""

    def __init__(self, suite: Suite, runs: Sequence[Run], tier: str, strengths: Sequence[float]) -> None:
        """Judge the answers; `runs` are in the order of `strengths`."""
        self.tier, self.strengths = tier, strengths
        self.points = [Findings(suite, [run]) for run in runs]
        plain = next((point for strength, point in zip(strengths, self.points, strict=True) if strength == 1), None)
        self.differences: list[Mapping[Place, Difference]] = [
            compare(point.outcomes[0].counted, plain.outcomes[0].counted, suite.summary)
            if plain and point is not plain
            else {}
            for point in self.points
        ]

    def document(self) -> dict[str, Any]:
        """Return the document that `--json` prints."""
        first = self.points[0].document()
        shared = ("model", "n", "suite", "seed", "size", "template", "max_tokens", "temperature")
        found = []
        for strength, point, differences in zip(self.strengths, self.points, self.differences, strict=True):
            own = {name: value for name, value in point.document().items() if name not in shared}
            found.append({"strength": strength, **own, "differences": document(branches(differences))})
        return {**{name: first[name] for name in shared}, "tier": self.tier, "strengths": found}

    def grid(self) -> tuple[list[str], list[list[str]]]:
        """Return a table's headings and rows: rates by strength, starred if they differ from those at 1."""
        heads = ["", *(f"{strength:g}" for strength in self.strengths), "n", "what"]
        rows: list[list[str]] = []
        found = [dict(leaves(point.outcomes[0].tree)) for point in self.points]
        for group in self.points[0].groups():
            rows += [] if group.rows[0].alone else [[group.name]]
            for row in group.rows:
                cells = [
                    percent(rates[row.path].rate) + " *" * (row.path in gaps and gaps[row.path].p < SIGNIFICANT)
                    for rates, gaps in zip(found, self.differences, strict=True)
                ]
                rows.append([row.name if row.alone else f"  {row.name}", *cells, str(row.rate.n), row.meaning])
        return heads, rows

    def text(self, lay_out: Callable[[list[str], list[list[str]]], Iterable[str]]) -> str:
        """Return the results as text; `lay_out` turns a table's headings and rows into lines."""
        one = self.points[0]
        lines = [
            f"{one.names[0]}, {self.tier} strength: {one.suite.drawn}, {counted(len(one.suite.cases), 'case')}",
            "",
        ]
        lines += [*lay_out(*self.grid()), "", "*: p < 0.05 against a strength of 1, over the same cases (McNemar)"]
        return "\n".join(lines) + "\n"

    def page(self, command: str, date: str, program: str) -> Page:
        """Return the page of `--report`; its examples are those of the last strength."""
        page, over = self.points[-1].page(command, date, program), f"the strength of {_TIERS[self.tier]}"
        drawn = curves(self.strengths, [point.outcomes[0].tree for point in self.points], over)
        errors = (error for point in self.points for error in point.page(command, date, program).errors)
        return replace(page, groups=(), charts=tuple(drawn), grid=self.grid(), errors=tuple(errors))


_TIERS = {"system": "System Info", "pref": "User Info"}
