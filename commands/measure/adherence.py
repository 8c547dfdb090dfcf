"""Ask a model the cases of a suite, for `eval`.

The model writes every answer itself, those to earlier turns too. Each is written down as it comes: a run that was
stopped goes on where it was, and one that is complete prints its results again without loading the model.
"""

from __future__ import annotations

import json
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import metaalign_edge as edge
from metaalign_edge import Answer, ChatTemplate, Dialog, RenderOptions, Request, Scheduler, Settings, Turn
from metaalign_edge_preferences.answers import Answers
from metaalign_edge_preferences.findings import Run, Suite
from metaalign_edge_preferences.suite import Case
from metaalign_edge_runtime.errors import EdgeError, Interrupted, UsageError, counted, one_line
from metaalign_edge_runtime.llama.gguf import ModelFile
from metaalign_edge_runtime.llama.memory import Plan
from metaalign_edge_runtime.stores import files

from ..options.loading import open_slots
from ..terminal.progress import answers_bar
from ..terminal.screen import Screen

EVAL_TOKENS = {"builtin": 512, "ifeval": 1280}  # of an answer at most; the second is lm-eval's own


@dataclass(frozen=True)
class Candidate:
    """A model under evaluation: its file, template and settings, and its run of the suite."""

    file: ModelFile
    chosen: ChatTemplate
    settings: Settings
    plan: Plan
    run: Run


def make_candidate(
    file: ModelFile,
    chosen: ChatTemplate,
    settings: Settings,
    plan: Plan,
    named: Path | None,
    options: RenderOptions,
    suite: Suite,
    opened: dict[Path, Answers],
) -> Candidate:
    """Read a model's answers so far, without loading it.

    Args:
        named: the file of its answers, if the user named one.
        opened: the files of answers that are open, by path. A model that is compared with itself has but one.

    Raises:
        UsageError: the file of answers is another run's. CannotWrite: the user named it, and it cannot be written.
    """
    context = edge.least_context(file, settings)
    most = settings.max_tokens or min(EVAL_TOKENS.get(suite.kind, EVAL_TOKENS["builtin"]), max(1, context // 3))
    settings = replace(settings, max_tokens=most)
    identity = {
        "version": edge.__version__,
        "model": file.identity,
        "suite": files.digest([case.document() for case in suite.all_cases]),
        "template": chosen.identity,
        "settings": json.dumps([*settings.deciding(), *options]),
    }
    path = named or files.cache_folder() / "answers" / f"{files.digest(identity)}.jsonl"
    if path not in opened:
        opened[path] = Answers(path, identity, named is not None)
    run = Run(
        name=file.path.name,
        path=str(file.path),
        template=chosen.name,
        native=chosen.native,
        max_tokens=most,
        temperature=settings.temperature or 0.0,
        answers=opened[path],
    )
    return Candidate(file, chosen, settings, plan, run)


def ask_model(candidate: Candidate, suite: Suite, options: RenderOptions, parallel: int, screen: Screen) -> None:
    """Ask a model the questions of a suite that it has not answered yet, and close its file of answers.

    Raises:
        Interrupted: Ctrl-C; what was answered is kept. LoadError: the model cannot be loaded. CannotWrite: the answers
            cannot be kept where the user wants them.
    """
    name, answers, cases = candidate.run.name, candidate.run.answers, suite.all_cases
    left, done, lost = answers.unanswered(cases), answers.count(cases), answers.lost
    total = sum(len(case.queries) for case in cases)
    screen.note(f"{name}: {counted(total, 'answer')}, {done:,} of them given already ({answers.where})")
    answers.start()
    try:
        if left:
            file, chosen, settings, plan = candidate.file, candidate.chosen, candidate.settings, candidate.plan
            with (
                open_slots(file, chosen, settings, options, plan, min(parallel, len(left)), screen) as scheduler,
                answers_bar(screen, name, done, total) as tell,
            ):
                ask_cases(scheduler, cases, left, answers, tell)
    except Interrupted:
        kept = f"{answers.count(cases):,} of {total:,} answers, {answers.where}"
        screen.note(f"interrupted: {kept}" + ("" if answers.lost else "; the same command goes on from there"))
        raise
    finally:
        if answers.lost != lost:
            screen.note(f"metaalign-edge: warning: {answers.where}")
        answers.close()


def ask_cases(
    scheduler: Scheduler, cases: Sequence[Case], left: Sequence[int], answers: Answers, tell: Callable[[int, int], None]
) -> None:
    """Ask the cases whose numbers are `left`, long dialogs first.

    A dialog's next turn is asked as soon as the last one is answered, while the dialog is cached. An error settles all
    the questions of a case that are left. `tell` learns how many questions each answer settles.

    Raises:
        CannotWrite: the answers cannot be kept where the user wants them.
    """
    waiting = deque(sorted(left, key=lambda number: -len(cases[number].queries)))

    def settle(number: int, turn: int, answer: Answer | EdgeError) -> None:
        case, failed = cases[number], isinstance(answer, EdgeError)
        answers.add(number, turn, case.id, answer_record(answer))
        if not failed and turn + 1 < len(case.queries):
            waiting.appendleft(number)
        tell(len(case.queries) - turn if failed else 1, 0)

    def requests() -> Iterator[Request]:
        while waiting:
            number = waiting.popleft()
            responses = answers.responses(number)
            try:
                dialog = case_dialog(cases[number], responses)
            except UsageError as error:
                settle(number, len(responses), error)
                continue
            seed = random.Random(f"{scheduler.settings.seed}/{number}/{len(responses)}").getrandbits(32)
            yield Request(dialog, seed, number)

    while waiting:  # the last answer of a round may have been an early turn's
        for request, answer in scheduler.run(requests()):
            settle(request.tag, len(request.dialog.turns) - 1, answer)


def answer_record(answer: Answer | EdgeError) -> dict[str, Any]:
    """Return the record of an answer, or of the error in its place, for the file of answers."""
    if isinstance(answer, EdgeError):
        return {"error": one_line(answer)}
    return {"response": answer.response, "finish_reason": answer.finish_reason, "truncated": answer.truncated}


def case_dialog(case: Case, responses: Sequence[str]) -> Dialog:
    """Return a case's dialog up to the question that follows these responses, under the meta-prompt of that turn."""
    last = len(responses) + 1 == len(case.queries)
    system_info, user_info = (case.system_info, case.user_info) if last or case.earlier is None else case.earlier
    turns = [Turn(query, response) for query, response in zip(case.queries, responses, strict=False)]
    return Dialog(system_info, user_info, (*turns, Turn(case.queries[len(responses)])))


class Choice(NamedTuple):
    """A model as the command line names it, with the template and settings under which it is asked."""

    model: str | None
    template: str
    settings: Settings
    suffix: str = ""  # of the name of its file of answers


def choose_models(first: Choice, grid: Grid | None, against: str | None, template: str | None) -> list[Choice]:
    """Return the models whose answers are compared: one, one at every strength of a grid, or one and a second.

    Raises:
        UsageError: both a grid and a second model are given.
    """
    if grid:
        if against is not None or template is not None:
            raise UsageError("--strength compares a model with itself: leave --against out")
        return [
            first._replace(settings=grid.at(one, first.settings), suffix=grid.suffix(one)) for one in grid.strengths
        ]
    if against is None and template is None:
        return [first]
    return [first, second_model(first, against, template)]


def second_model(first: Choice, against: str | None, template: str | None) -> Choice:
    """Return the model with which the first is compared; what is not given is as for the first."""
    return Choice(
        first.model if against is None else against,
        first.template if template is None else template,
        first.settings if against is None else replace(first.settings, adapters=()),
        ".against",
    )


class Grid(NamedTuple):
    """The strengths of one tier that are compared."""

    tier: str  # system or pref
    strengths: list[float]  # rising

    def at(self, strength: float, settings: Settings) -> Settings:
        """Return the settings with one of the strengths."""
        if self.tier == "system":
            return replace(settings, system_strength=strength)
        return replace(settings, pref_strength=strength)

    def suffix(self, strength: float) -> str:
        """Return the suffix by which the strengths' files of answers are told apart."""
        return f".{self.tier}-{strength:g}"


def read_grid(text: str) -> Grid:
    """Read a tier and its strengths, `pref=0,1,2`.

    Raises:
        UsageError: the tier is unknown, a strength is not a valid number, or fewer than two strengths are given.
    """
    tier, _, numbers = text.partition("=")
    if tier not in ("system", "pref") or not numbers:
        raise UsageError(f"--strength takes a tier and numbers, pref=0,1,2 or system=1,2,4, not {text!r}")
    strengths = sorted({edge.checked_strength("--strength", number) for number in numbers.split(",")})
    if len(strengths) < 2:
        raise UsageError(f"--strength compares at least two strengths, as pref=1,2: {text!r} has one")
    return Grid(tier, strengths)
