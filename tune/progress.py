"""Show how training goes: a bar on a terminal, lines in a file, and the loss as a curve."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import TracebackType

__all__ = ["Progress", "draw_losses"]


class Progress:
    """A bar with the loss, the speed and the time left; off a terminal, a line every so many steps."""

    def __init__(self, name: str, total: int, start: int, every: int, losses: list[float]) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self.losses = losses  # of every step so far
        self._name, self._total, self._start, self._every = name, total, start, every
        self._clock, self._tokens, self._before = time.monotonic(), 0, len(losses)
        self._bar: Bar | None = None
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Bar(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task(name, total=total, completed=start)

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def step(self, loss: float, tokens: int) -> None:
        """Count one step."""
        self.losses.append(loss)
        self._tokens += tokens
        done, spent = self._start + len(self.losses) - self._before, time.monotonic() - self._clock
        recent = self.losses[-min(self._every, len(self.losses)) :]
        told = f"loss {sum(recent) / len(recent):.4f}  {self._tokens / spent:6.0f} tokens/s"
        if self._bar:
            self._bar.update(self._task, completed=done, description=f"{self._name}  {told}")
        elif done % self._every == 0 or done == self._total:
            print(f"{self._name} step {done:5d}/{self._total}  {told}  {spent:5.0f} s", flush=True)


def draw_losses(curves: dict[str, list[float]], path: Path) -> None:
    """Draw losses against steps, one panel a curve, smoothed, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(5.5 * len(curves), 3.4), squeeze=False)
    for axis, (name, losses) in zip(axes[0], curves.items(), strict=True):
        smooth, average = [], losses[0] if losses else 0.0
        for loss in losses:
            average += 0.05 * (loss - average)
            smooth.append(average)
        axis.plot(losses, linewidth=0.4, alpha=0.35, color="tab:blue")
        axis.plot(smooth, linewidth=1.4, color="tab:blue")
        axis.set(title=name, xlabel="step", ylabel="loss")
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
