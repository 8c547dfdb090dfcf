"""The work of a batch: choosing the rows that need an answer, and writing the answers."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from metaalign_edge import Answer, Prompt, Request, Scheduler
from metaalign_edge_runtime.errors import (
    EdgeError,
    Interrupted,
    NoAnswer,
    SchemaViolation,
    UsageError,
    counted,
    one_line,
    say,
)
from metaalign_edge_runtime.stores.ledger import Ledger
from metaalign_edge_runtime.structured import Schema

from ..terminal import report
from ..terminal.progress import answers_bar
from ..terminal.screen import Screen
from ..terminal.status import waiting
from .rows import Row


class InOrder:
    """Finished rows on stdout: each is written as soon as all before it have been."""

    def __init__(self, screen: Screen) -> None:
        self._screen, self._next, self._waiting = screen, 0, dict[int, str]()

    def add(self, row: Mapping[str, Any]) -> None:
        """Take a finished row."""
        self._waiting[row["index"]] = json.dumps(row, ensure_ascii=False)
        while self._next in self._waiting:
            self._screen.write(self._waiting.pop(self._next) + "\n")
            self._next += 1


class Batch:
    """Rows on their way to a file (`ledger`) or to stdout, and the count of those that were answered or failed.

    Args:
        source: the name of the input in messages.
        schema: the schema of rows that give none.
    """

    def __init__(
        self, rows: Iterator[Row], ledger: Ledger | None, screen: Screen, source: str, schema: Schema | None
    ) -> None:
        self._rows, self._ledger, self._screen, self._source, self._schema = rows, ledger, screen, source, schema
        self._stdout = InOrder(screen)
        self._asked: dict[int, Row] = {}  # by index, while their answers are written
        self.total = self.before = self.answered = self.failed = 0  # before: answered by an earlier call
        self.cut = 0  # answered ones that `-n` or the context cut

    @property
    def done(self) -> int:
        """Count the rows that were read and wait for no answer."""
        return self.total - len(self._asked)

    def requests(self, window: int) -> Iterator[Request]:
        """Yield the requests of the rows that have no answer yet.

        Args:
            window: rows that are read ahead, and sorted so that those with the same meta-prompt follow each other.
        """
        while rows := list(itertools.islice(self._rows, window)):
            requests = []
            for row in rows:
                self.total += 1
                if row.request is None:
                    self._finish(row, {}, f"line {row.line}: {row.error}")
                elif self._ledger and self._ledger.has(row.index, row.digest):
                    self.before += 1
                else:
                    self._asked[row.index] = row
                    requests.append(row.request)
            yield from sorted(
                requests, key=lambda request: (request.dialog.system_info, request.dialog.user_info, request.tag)
            )

    def answer(
        self,
        scheduler: Scheduler,
        requests: Iterable[Request],
        warn: Callable[[Prompt], None],
        tell: Callable[[int, int], None],
    ) -> None:
        """Answer the requests and write down each as it ends. `warn` sees each prompt first; `tell` counts rows,
        those that were answered now, and those that needed no answer.

        Raises:
            Interrupted: Ctrl-C; what was finished is kept. CannotWrite: the disk is full. OutputClosed: nobody reads
                stdout any more.
        """
        try:
            done = self.done
            for request, answer in scheduler.run(requests, warn):
                self._settle(request, answer)
                tell(1, self.done - done - 1)
                done = self.done
        except Interrupted:
            again = "; the same command goes on from there" if self._ledger else ""
            self._screen.note(f"interrupted: {counted(self.before + self.answered, 'row')} answered{again}")
            raise

    def _settle(self, request: Request, answer: Answer | EdgeError) -> None:
        row = self._asked.pop(request.tag)
        if isinstance(answer, EdgeError):
            self._finish(row, {}, f"line {row.line}: {one_line(answer)}")
            return
        error, whose, schema = None, f"the answer to line {row.line}", request.schema or self._schema
        try:
            report.refuse_answer(answer, schema, whose)
            report.note_unknown_mark(answer, schema, self._screen, whose)
            self.cut += answer.finish_reason == "length"
        except (NoAnswer, SchemaViolation) as wrong:  # the row keeps the answer besides the error
            error = one_line(wrong)
        self._finish(row, asdict(answer), error)

    def _finish(self, row: Row, answer: dict[str, Any], error: str | None) -> None:
        document = {"index": row.index, "id": row.id, "error": error, **answer}
        document.pop("sampling", None)  # of all rows the same: -v says it once
        if error is None:
            self.answered += 1
        else:
            self.failed += 1
            say(f"metaalign-edge: {self._source}, {error}")
        if self._ledger:
            self._ledger.add(document, row.digest)
        else:
            self._stdout.add(document)

    def sum_up(self) -> None:
        """Say how many rows came to which end.

        Raises:
            EdgeError: at least one row failed.
        """
        counts = f"{self.answered:,} answered, {self.before:,} before, {self.failed:,} failed"
        self._screen.note(f"{counted(self.total, 'row')}: {counts}")
        if self.cut:
            were = f"{counted(self.cut, 'answer')} {'was' if self.cut == 1 else 'were'} cut"
            self._screen.note(f"metaalign-edge: warning: {were} (finish_reason length): raise -n, or -c")
        if self.failed:
            raise EdgeError(f"{self.failed:,} of {counted(self.total, 'row')} failed; the others are complete")


@contextlib.contextmanager
def show_rows(
    work: Batch, screen: Screen, name: str, total: int | None, seen: bool
) -> Iterator[Callable[[int, int], None]]:
    """Show how far a batch is, by a bar, or below the rows if these are seen; yield what `Batch.answer` tells.

    Args:
        total: rows of the input; None: not known.
        seen: the rows go to stdout, where a terminal shows them.
    """
    if not (seen and screen.terminal):
        with answers_bar(screen, name, work.done, total) as tell:
            yield tell
        return
    of = "" if total is None else f" of {total:,}"
    with waiting(screen, lambda: f"{work.done:,}{of} rows are done"):
        yield lambda _written, _there: None


@contextlib.contextmanager
def open_ledger(output: Path | None, source: str, run: str, force: bool) -> Iterator[Ledger | None]:
    """Open the file that `batch` writes; yield None if it writes to stdout.

    Raises:
        UsageError: the file is the input, or holds another run's rows. CannotWrite: the file cannot be written.
    """
    if output is None:
        yield None
        return
    if source != "-" and os.path.exists(output) and os.path.exists(source) and output.samefile(source):
        raise UsageError(f"{output} is the input: name another with -o")
    with Ledger(output, run, force) as ledger:
        yield ledger
