"""Asking a model the cases of a suite, for `eval`.

Every answer to a suite is the model's own, those of earlier turns too. Each is written down as it comes: a run that
was stopped goes on where it was, and one that is complete prints its results again without the model.
"""

from __future__ import annotations

import json
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import metaalign_edge as edge
from metaalign_edge import Answer, ChatTemplate, Dialog, Model, RenderOptions, Request, Scheduler, Settings, Turn
from metaalign_edge_preferences import findings
from metaalign_edge_preferences import answers as transcripts
from metaalign_edge_preferences.suite import InvalidSuite
from metaalign_edge_runtime.errors import CannotWrite, EdgeError, Interrupted, NotFound, UsageError, one_line
from metaalign_edge_runtime.llama.gguf import ModelFile
from metaalign_edge_runtime.llama.interrupt import Interrupt
from metaalign_edge_runtime.llama.memory import Plan
from metaalign_edge_runtime.stores import files

from ..terminal import report
from ..terminal.progress import answers_bar
from ..terminal.screen import Screen

EVAL_TOKENS = {"builtin": 512, "ifeval": 1280}  # of an answer at most; the second is lm-eval's own


def find_suite(name: str, seed: int, size: int | None, tier: str) -> Any:
    """Compose the built-in suite, or read a file: of one's own, or of IFEval's, whose instructions go to `tier`.

    Raises:
        UsageError: the file is no suite, or IFEval's checkers are not installed. NotFound: it cannot be read.
    """
    try:
        return findings.find_suite(name, seed, size, tier)
    except InvalidSuite as error:
        raise UsageError(one_line(error)) from None
    except OSError as error:
        raise NotFound(f"cannot read the suite {name}: {error.strerror}") from None


@dataclass(frozen=True)
class Candidate:
    """A model under evaluation, its template, and its answers."""

    file: ModelFile
    chosen: ChatTemplate
    settings: Settings
    plan: Plan
    run: Any  # preferences.findings.Run


def make_candidate(
    file: ModelFile,
    chosen: ChatTemplate,
    settings: Settings,
    plan: Plan,
    options: RenderOptions,
    suite: Any,
    answers: Path | None,
) -> Candidate:
    """Find a model's answers so far, without loading it.

    Raises:
        UsageError: the file of answers is another run's. CannotWrite: the user named it, and it cannot be written.
    """
    room = edge.least_context(file, settings)
    most = settings.max_tokens or min(EVAL_TOKENS.get(suite.kind, EVAL_TOKENS["builtin"]), max(1, room // 3))
    settings = replace(settings, max_tokens=most)
    run = {
        "version": edge.__version__,
        "model": file.identity,
        "suite": files.digest([case.document() for case in suite.asked]),
        "template": chosen.identity,
        "settings": json.dumps([*settings.deciding(), *options]),
    }
    path = answers or files.cache_folder() / "answers" / f"{files.digest(run)}.jsonl"
    try:
        transcript = transcripts.Transcript(path, run, answers is not None)
    except transcripts.ForeignFile as error:
        raise UsageError(one_line(error)) from None
    except OSError as error:
        raise CannotWrite(f"cannot write {path}: {error.strerror}") from None
    where = (file.path.name, str(file.path), chosen.name, chosen.native)
    asked = findings.Run(*where, most, settings.temperature or 0.0, transcript)
    return Candidate(file, chosen, settings, plan, asked)


def interview(
    candidate: Candidate, suite: Any, options: RenderOptions, parallel: int, interrupt: Interrupt, screen: Screen
) -> None:
    """Put to a model what its transcript has no answer to yet.

    Raises:
        Interrupted: Ctrl-C; what was answered is kept. LoadError: the model cannot be loaded. CannotWrite.
    """
    name, transcript, asked = candidate.run.name, candidate.run.transcript, suite.asked
    left, done, lost = transcript.left(asked), transcript.count(asked), transcript.lost
    total = sum(len(case.queries) for case in asked)
    transcript.start()
    screen.note(f"{name}: {total:,} answers, {done:,} of them given already ({transcript.where})")
    if not left:
        return
    try:
        with interrupt, Model(candidate.file, candidate.settings, interrupt, candidate.plan) as model:
            report.explain(model, candidate.chosen, candidate.settings, screen)
            slots, size = min(parallel, len(left)), edge.least_context(candidate.file, candidate.settings)
            with (
                Scheduler(model, candidate.chosen, candidate.settings, options, interrupt, slots, size) as session,
                answers_bar(screen, name, done, total) as tell,
            ):
                ask_all(session, asked, left, transcript, tell)
    except Interrupted:
        kept = f"{transcript.count(asked):,} of {total:,} answers, {transcript.where}"
        screen.note(f"interrupted: {kept}" + ("" if transcript.lost else "; the same command goes on from there"))
        raise
    finally:
        if transcript.lost != lost:
            screen.note(f"metaalign-edge: warning: {transcript.where}")
        transcript.close()


def ask_all(
    session: Scheduler, asked: Sequence[Any], left: Sequence[int], transcript: Any, tell: Callable[[int], None]
) -> None:
    """Ask what is left, long dialogs first; a dialog goes on as soon as its turn is answered, while it is cached.

    `tell` learns how many questions are settled by each answer; an error settles the rest of its case.

    Raises:
        CannotWrite: the answers cannot be kept where the user wants them.
    """
    waiting = deque(sorted(left, key=lambda number: -len(asked[number].queries)))

    def settle(number: int, turn: int, answer: Answer | EdgeError) -> None:
        case, failed = asked[number], isinstance(answer, EdgeError)
        try:
            transcript.add(number, turn, case.id, answer_record(answer))
        except OSError as error:
            raise CannotWrite(f"cannot write {transcript.path}: {error.strerror}") from None
        if not failed and turn + 1 < len(case.queries):
            waiting.appendleft(number)
        tell(len(case.queries) - turn if failed else 1)

    def jobs() -> Iterator[Request]:
        while waiting:
            number = waiting.popleft()
            said = transcript.said(number)
            try:
                dialog = case_dialog(asked[number], said)
            except UsageError as error:
                settle(number, len(said), error)
                continue
            seed = random.Random(f"{session.settings.seed}/{number}/{len(said)}").getrandbits(32)
            yield Request(dialog, seed, number)

    while waiting:  # again, should the last answer of a round have been an early turn's
        for job, answer in session.run(jobs()):
            settle(job.tag, len(job.dialog.turns) - 1, answer)


def answer_record(answer: Answer | EdgeError) -> dict[str, Any]:
    """Return what a transcript keeps of an answer, or of why there is none."""
    if isinstance(answer, EdgeError):
        return {"error": one_line(answer)}
    return {"response": answer.response, "finish_reason": answer.finish_reason, "truncated": answer.truncated}


def case_dialog(case: Any, said: Sequence[str]) -> Dialog:
    """Return a case's dialog up to the question that follows these answers, under the meta-prompt of that time."""
    last = len(said) + 1 == len(case.queries)
    system_info, user_info = (case.system_info, case.user_info) if last or case.earlier is None else case.earlier
    turns = [Turn(query, response) for query, response in zip(case.queries, said, strict=False)]
    return Dialog(system_info, user_info, (*turns, Turn(case.queries[len(said)])))


def rival(
    models: Sequence[tuple[str | None, str, Settings]], against: str | None, template: str | None
) -> tuple[str | None, str, Settings]:
    """Return the model, template and settings that the one model is compared with: its own, where nothing else is said.

    Raises:
        UsageError: there are several, which are compared with each other.
    """
    if len(models) > 1:
        raise UsageError("--strength compares a model with itself: leave --against out")
    ((model, usual, settings),) = models
    settings = settings if against is None else replace(settings, adapters=())
    return model if against is None else against, usual if template is None else template, settings


def read_grid(text: str) -> tuple[str, list[float]]:
    """Read a tier and its strengths, `pref=0,1,2`; return those in order, each once.

    Raises:
        UsageError: there is no such tier, fewer than two strengths, or one that is none.
    """
    tier, _, numbers = text.partition("=")
    if tier not in ("system", "pref") or not numbers:
        raise UsageError(f"--strength takes a tier and numbers, pref=0,1,2 or system=1,2,4, not {text!r}")
    found = sorted({edge.checked_strength("--strength", number) for number in numbers.split(",")})
    if len(found) < 2:
        raise UsageError(f"--strength compares at least two strengths, as pref=1,2: {text!r} has one")
    return tier, found
