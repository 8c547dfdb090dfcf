"""A batch at work: which rows have to be asked, and where their answers go."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from metaalign_edge import Answer, Request
from metaalign_edge_runtime.errors import EdgeError, SchemaViolation, UsageError, one_line, say
from metaalign_edge_runtime.stores.ledger import Ledger
from metaalign_edge_runtime.structured import Schema

from ..terminal import report
from ..terminal.screen import Screen
from .rows import Row


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
