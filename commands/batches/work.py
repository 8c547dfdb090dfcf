"""The work of a batch: choosing the rows that need an answer, and writing the answers."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from metaalign_edge import Answer, Prompt, Request, Scheduler
from metaalign_edge_runtime.errors import EdgeError, Interrupted, SchemaViolation, UsageError, one_line, say
from metaalign_edge_runtime.stores.ledger import Ledger
from metaalign_edge_runtime.structured import Schema

from ..terminal import report
from ..terminal.documents import answer_document
from ..terminal.screen import Screen
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
        tell: Callable[[int], None],
    ) -> None:
        """Answer the requests and write down each as it ends. `warn` sees each prompt first; `tell` counts answers.

        Raises:
            Interrupted: Ctrl-C; what was finished is kept. CannotWrite: the disk is full. OutputClosed: nobody reads
                stdout any more.
        """
        try:
            for request, answer in scheduler.run(requests, warn):
                self._settle(request, answer)
                tell(1)
        except Interrupted:
            again = "; the same command goes on from there" if self._ledger else ""
            self._screen.note(f"interrupted: {self.before + self.answered:,} rows are answered{again}")
            raise

    def _settle(self, request: Request, answer: Answer | EdgeError) -> None:
        row = self._asked.pop(request.tag)
        if isinstance(answer, EdgeError):
            self._finish(row, {}, f"line {row.line}: {one_line(answer)}")
            return
        schema = request.schema or self._schema
        document = answer_document(answer, schema)
        try:
            report.check_answer(answer, schema, self._screen, f"the answer to line {row.line}")
        except SchemaViolation as violation:  # the row keeps the answer besides the error
            self._finish(row, document, one_line(violation))
        else:
            self._finish(row, document, None)

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
        self._screen.note(f"{self.total:,} rows: {counts}")
        if self.failed:
            raise EdgeError(f"{self.failed:,} of {self.total:,} rows failed; the others are complete")


@contextlib.contextmanager
def open_ledger(output: Path | None, source: str, run: str, force: bool) -> Iterator[Ledger | None]:
    """Open the file that `batch` writes; yield None if it writes to stdout.

    Raises:
        UsageError: the file is the input, or holds another run's rows. CannotWrite: the file cannot be written.
    """
    if output is None:
        yield None
        return
    if source != "-" and output.exists() and output.samefile(source):
        raise UsageError(f"{output} is the input: name another with -o")
    with Ledger(output, run, force) as ledger:
        yield ledger
