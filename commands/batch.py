"""Answer many rows, several at a time. Killed at any moment, the same command goes on where it was."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

import metaalign_edge as edge
from metaalign_edge import Answer, Dialog, Model, Request, Scheduler, Turn
from metaalign_edge_runtime import structured
from metaalign_edge_runtime.errors import EdgeError, Interrupted, NotFound, SchemaViolation, UsageError, one_line, say
from metaalign_edge_runtime.llama.interrupt import Interrupt
from metaalign_edge_runtime.stores import files, profiles
from metaalign_edge_runtime.stores.ledger import Ledger
from metaalign_edge_runtime.structured import Schema

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
    kept_states,
    option,
)
from .terminal import report
from .terminal.progress import answers_bar
from .terminal.screen import Screen

ROW = {"id", "query", "pref", "user_info", "system_info", "turns", "max_tokens", "seed", "json_schema"}
WINDOW = 8  # rows for each sequence that are read ahead, so that neighbours begin alike


class BadRow(ValueError):
    """A line is no row; the text says why."""


@dataclass(frozen=True)
class Row:
    """A line of the input."""

    index: int  # from 0, without blank lines
    line: int  # from 1
    id: Any
    job: Request | None  # its tag is the row's index
    asked: str  # a digest of what it asks for
    error: str | None


def read_rows(lines: Iterable[bytes], standing: Dialog, seed: int, unknown: set[str]) -> Iterator[Row]:
    """Yield the rows of a JSONL file, the bad ones with what is wrong.

    Args:
        standing: its tiers are those of rows that have none of their own.
        unknown: is filled with the names of fields that mean nothing.
    """
    index = 0
    for line, data in enumerate(lines, 1):
        if not data.strip():
            continue
        found: Any = None
        try:
            found = json.loads(data)
            job, error = read_row(found, standing, seed, index), None
            unknown |= found.keys() - ROW
        except UnicodeDecodeError as wrong:
            job, error = None, f"it is not UTF-8 (byte {wrong.start})"
        except json.JSONDecodeError as wrong:
            job, error = None, f"it is no JSON ({wrong.msg}, column {wrong.colno})"
        except (ValueError, EdgeError, RecursionError) as wrong:  # a BadRow, or a number of thousands of digits
            job, error = None, one_line(wrong)
        known = found if isinstance(found, dict) else {}
        own = [known.get(key) for key in ("seed", "json_schema") if key == "seed" or key in known]
        asked = files.digest([asdict(job.dialog), job.max_tokens, *own]) if job else ""
        yield Row(index, line, known.get("id"), job, asked, error)
        index += 1


def read_row(found: Any, standing: Dialog, seed: int, index: int) -> Request:
    """Make a job of a row.

    Raises:
        BadRow: a field is missing or of another type. EdgeError: there is no such profile, or no such text.
    """
    if not isinstance(found, dict):
        raise BadRow(f"it is a {type(found).__name__}, not an object with a `query`")

    def text(holder: Any, key: str) -> str | None:
        value = holder.get(key) if isinstance(holder, dict) else holder
        if value is not None and not isinstance(value, str):
            raise BadRow(f"`{key}` is a {type(value).__name__}, not a text")
        return value

    def number(key: str, least: int, most: int) -> int | None:
        value = found.get(key)
        if value is not None and not (type(value) is int and least <= value <= most):
            raise BadRow(f"`{key}` is not a number from {least} to {most}")
        return value

    query, turns = text(found, "query"), found.get("turns") or []
    if not query or not query.strip():
        raise BadRow("`query` is missing or empty")
    if found.get("pref") is not None and found.get("user_info") is not None:
        raise BadRow("`pref` and `user_info` are the same tier: give one")
    wishes = found["pref"] if isinstance(found.get("pref"), list) else [found.get("pref")]
    user_info = text(found, "user_info")
    if any(wish is not None for wish in wishes):
        user_info = "\n".join(profiles.expand_profile(text(wish, "pref") or "") for wish in wishes)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadRow("`turns` is not a list of {query, response}")
    past = [(text(turn, "query"), text(turn, "response")) for turn in turns]
    if not all(query is not None and response is not None for query, response in past):
        raise BadRow("a turn lacks its `query` or its `response`")
    system_info = text(found, "system_info")
    dialog = Dialog(
        standing.system_info if system_info is None else system_info,
        standing.user_info if user_info is None else user_info,
        (*(Turn(query or "", response) for query, response in past), Turn(query)),
    )
    row_seed, shape = number("seed", 0, 2**32 - 1), found.get("json_schema")
    if not isinstance(shape, dict | str | None):
        raise BadRow(f"`json_schema` is a {type(shape).__name__}, not a schema or its short form")
    return Request(
        dialog,
        seed if row_seed is None else row_seed,
        index,
        number("max_tokens", 1, 2**31 - 1),
        schema=None if shape is None else row_schema(json.dumps(shape) if isinstance(shape, dict) else shape),
    )


@functools.lru_cache(64)  # rows are often alike
def row_schema(text: str) -> Schema:
    """Read a row's schema. A row is data: it names no file.

    Raises:
        UsageError: it is none.
    """
    return structured.parse_schema(text) if text.lstrip().startswith("{") else structured.expand_schema(text)


class InOrder:
    """Rows for stdout: each is written as soon as all before it have been."""

    def __init__(self, screen: Screen) -> None:
        self._screen, self._next, self._waiting = screen, 0, dict[int, str]()

    def add(self, row: Mapping[str, Any]) -> None:
        """Take a finished row."""
        self._waiting[row["index"]] = json.dumps(row, ensure_ascii=False)
        while self._next in self._waiting:
            self._screen.write(self._waiting.pop(self._next) + "\n")
            self._next += 1


class Batch:
    """Rows on their way to a file or to stdout, and how many of them have come to what end."""

    def __init__(
        self, rows: Iterator[Row], ledger: Ledger | None, screen: Screen, name: str, schema: Schema | None = None
    ) -> None:
        self._rows, self._ledger, self._screen, self._name, self._schema = rows, ledger, screen, name, schema
        self._stdout = InOrder(screen)
        self._open: dict[int, Row] = {}
        self.total = self.before = self.answered = self.failed = 0

    def jobs(self, window: int) -> Iterator[Request]:
        """Yield what has to be asked; of so many rows at a time, those that begin alike one after the other."""
        while rows := list(itertools.islice(self._rows, window)):
            jobs = []
            for row in rows:
                self.total += 1
                if row.job is None:
                    self._settle(row, {}, f"line {row.line}: {row.error}")
                elif self._ledger and self._ledger.has(row.index, row.asked):
                    self.before += 1
                else:
                    self._open[row.index] = row
                    jobs.append(row.job)
            yield from sorted(jobs, key=lambda job: (job.dialog.system_info, job.dialog.user_info, job.tag))

    def settle(self, job: Request, answer: Answer | EdgeError) -> None:
        """Write down how a job ended.

        Raises:
            CannotWrite: it cannot be written. OutputClosed: nobody reads stdout any more.
        """
        row = self._open.pop(job.tag)
        if isinstance(answer, EdgeError):
            self._settle(row, {}, f"line {row.line}: {one_line(answer)}")
            return
        try:
            report.check_answer(answer, job.schema or self._schema, self._screen, f"the answer to line {row.line}")
        except SchemaViolation as violation:  # the row says what was answered, too
            self._settle(row, asdict(answer), one_line(violation))
        else:
            self._settle(row, asdict(answer), None)

    def _settle(self, row: Row, answer: dict[str, Any], error: str | None) -> None:
        document = {"index": row.index, "id": row.id, "error": error, **answer}
        if error is None:
            self.answered += 1
        else:
            self.failed += 1
            say(f"metaalign-edge: {self._name}, {error}")
        if self._ledger:
            self._ledger.add(document, row.asked)
        else:
            self._stdout.add(document)


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


@contextlib.contextmanager
def open_ledger(output: Path | None, source: str, run: str, force: bool) -> Iterator[Ledger | None]:
    """Open what `batch` writes to, if it is a file.

    Raises:
        UsageError: it is the input, or holds another run's rows. CannotWrite: it cannot be written.
    """
    if output is None:
        yield None
        return
    if source != "-" and output.exists() and output.samefile(source):
        raise UsageError(f"{output} is the input: name another with -o")
    with Ledger(output, run, force) as ledger:
        yield ledger


@contextlib.contextmanager
def open_rows(source: str) -> Iterator[tuple[Iterable[bytes], str]]:
    """Open a JSONL file, or stdin; yield its lines and what to call it.

    Raises:
        NotFound: it is not there or not readable. UsageError: stdin is a terminal.
    """
    if source == "-":
        if sys.stdin is None or sys.stdin.isatty():
            raise UsageError("stdin is a terminal: pipe rows in, or name a file")
        yield sys.stdin.buffer, "stdin"
        return
    try:
        with Path(source).expanduser().open("rb") as file:
            yield file, source
    except OSError as error:
        raise NotFound(f"cannot read {source}: {error.strerror}") from None
