"""How a recipe that is run from the command line ends: with an exit code, and with one line on stderr if it fails."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import metaalign_edge as edge
from metaalign_edge_runtime.errors import CannotWrite, Interrupted, LoadError, one_line

__all__ = ["finish", "require", "say"]

# A full disk, as tokenizers and safetensors say it, and torch, twice.
FULL = ("os error 28", "PytorchStreamWriter", "unexpected pos")


def require(*modules: str) -> None:
    """Check that the libraries are installed. Raises LoadError if one is not."""
    for name in modules:
        if not find_spec(name):
            raise LoadError(f'{name} is not installed: pip install "metaalign-edge[tune]"')


def say(name: str, text: str) -> None:
    """Say something on stderr, in one line."""
    print(f"{name}: {one_line(text)}", file=sys.stderr, flush=True)


def finish(name: str, out: Path, again: str, work: Callable[[], int | None]) -> int:
    """Do the work that writes `out` and return its exit code; `again` says how to go on after it was stopped."""
    try:
        return work() or 0
    except KeyboardInterrupt:
        say(name, f"interrupted; {again}")
        return Interrupted.exit_code
    except Exception as error:
        told = _explained(error, out, again)
        code = edge.exit_code(told)
        surprise = f"unexpected {type(error).__name__}: {error}: please report it with the command"
        say(name, str(told) if code else surprise)
        return code or 1


def _explained(error: Exception, out: Path, again: str) -> Exception:
    """Return the toolkit's error that explains a library's error, or the error itself."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or any(words in str(error) for words in FULL):
        return CannotWrite(f"{out}: the disk is full; make room, and {again}")
    if isinstance(error, OSError) and error.errno:
        return CannotWrite(f"{error.filename or out}: {error.strerror}")
    if type(error).__name__ == "OutOfMemoryError":  # torch's
        return LoadError("the GPU's memory is too small: lower --batch or --max-length, or leave out --full")
    return error
