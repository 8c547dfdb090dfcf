"""Conversations, and sessions: a session is a conversation that is kept on disk, as JSON Lines."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import CannotWrite, NotFound, UsageError, did_you_mean, one_line
from . import files
from .jsonl import JsonLines

STAMP = "%Y-%m-%dT%H:%M:%SZ"  # the format of times in a session's file
SESSION_VERSION = 1  # of the format of a session's file
LINE_TEXTS = {"meta_prompt": ("system_info", "user_info"), "turn": ("query", "response")}  # the texts each kind needs
Line = dict[str, Any]


def session_path(name: str) -> Path:
    """Return the path of the session of this name, which need not exist.

    Raises:
        UsageError: no session can have that name.
    """
    return files.data_folder() / "sessions" / f"{files.file_name(name, 'session')}.jsonl"


def log_path() -> Path:
    """Return the path of a new session for one answer, which is named after the time."""
    return session_path(f"log-{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}")


def session_paths() -> list[Path]:
    """List the paths of the sessions, the one that was used last first."""
    used = {}
    for path in (files.data_folder() / "sessions").glob("*.jsonl"):
        with contextlib.suppress(OSError):
            used[path] = path.stat().st_mtime_ns
    return sorted(used, key=lambda path: (-used[path], path))


def session_names() -> list[str]:
    """List the names of the sessions, the one that was used last first."""
    return [path.stem for path in session_paths()]


def existing_session(name: str) -> Path:
    """Return the path of the session of this name.

    Raises:
        UsageError: no session can have that name. NotFound: there is no such session.
    """
    path, names = session_path(name), session_names()
    if not path.is_file():
        hint = did_you_mean(name, names, f"there are {', '.join(names) or 'none yet'}")
        raise NotFound(f"no session {name}: {hint}")
    return path


def session_line(text: bytes) -> Line:
    """Read a line of a session.

    Raises:
        ValueError: it is no such line; says why.
    """
    line = json.loads(text)
    if not isinstance(line, dict):
        raise ValueError("no JSON object")
    for name in LINE_TEXTS.get(str(line.get("kind")), ()):
        if not isinstance(line.get(name), str):
            raise ValueError(f"its {name} is no text")
        line[name].encode()  # a lone surrogate is none, either
    return line


class Conversation:
    """The lines of a conversation: its meta-prompts, queries and answers. With a path it is a session.

    After a header there is a `meta_prompt` line wherever System Info or User Info changed, a `turn` line for each
    answer, and a `clear` line where the user cleared the conversation. An answer that was given anew names the turn
    that it `replaces`. Lines and fields of other names are kept and not read. The file is only appended to.
    """

    def __init__(self, path: Path | None = None, lines: Iterable[Line] = ()) -> None:
        self.path, self.lines = path, list(lines)
        self._saved = len(self.lines)  # how many of them are on the disk
        if not self.lines:
            self._add("session", version=SESSION_VERSION, toolkit=f"metaalign-edge {__version__}")

    @classmethod
    def read(cls, path: Path) -> Conversation:
        """Read a session; without a file it is empty. A torn last line does not count.

        Raises:
            UsageError: a line is spoilt, or a newer program wrote the file. NotFound: it cannot be read.
        """
        try:
            *whole, torn = path.read_bytes().split(b"\n")
        except (FileNotFoundError, NotADirectoryError):
            return cls(path)
        except OSError as error:
            raise NotFound(f"cannot read the session {path}: {error.strerror}") from None
        lines = []
        for number, text in enumerate(whole, 1):
            try:
                lines += [session_line(text)] if text.strip() else []
            except (ValueError, RecursionError) as error:
                raise UsageError(
                    f"line {number} of the session {path} is spoilt ({one_line(error)}): mend or delete that line, and "
                    "the session goes on; all other lines are as they were"
                ) from None
        with contextlib.suppress(ValueError, RecursionError):
            lines.append(session_line(torn))
        if lines and (lines[0].get("kind"), lines[0].get("version")) != ("session", SESSION_VERSION):
            raise UsageError(
                f"{path} does not begin with the header of a session of version {SESSION_VERSION}: put its first line "
                "back, or update this program if a newer one wrote it"
            )
        return cls(path, lines)

    @property
    def name(self) -> str | None:
        """The session's name, if it is one."""
        return self.path.stem if self.path else None

    @property
    def meta_prompt(self) -> Line:
        """The latest `meta_prompt` line: System Info and User Info as they are now."""
        return self._in_force(self.lines)

    @property
    def label(self) -> str:
        """A short form of the current preference."""
        return str(self.meta_prompt.get("label", ""))

    @staticmethod
    def _in_force(lines: Sequence[Line]) -> Line:
        nothing = {"kind": "meta_prompt", "system_info": "", "user_info": ""}
        return next((line for line in reversed(lines) if line.get("kind") == "meta_prompt"), nothing)

    def turns(self) -> list[Line]:
        """Return the turns that were not replaced, each with its meta-prompt; `forgotten`: it was cleared."""
        found: dict[str, Line] = {}
        tiers = self._in_force(())
        for place, line in enumerate(self.lines):
            if line.get("kind") == "meta_prompt":
                tiers = {name: line[name] for name in LINE_TEXTS["meta_prompt"]}
            elif line.get("kind") == "clear":
                found = {name: {**turn, "forgotten": True} for name, turn in found.items()}
            elif line.get("kind") == "turn":
                found.pop(str(line.get("replaces")), None)
                name = str(line.get("id", place))
                found[name] = {**line, **tiers, "id": name, "forgotten": False}
        return list(found.values())

    def pairs(self) -> list[tuple[str, str]]:
        """Return the queries and responses that the next prompt contains."""
        return [(turn["query"], turn["response"]) for turn in self.turns() if not turn["forgotten"]]

    def model(self) -> tuple[str, str]:
        """Return the name and the path of the model that answered last, each empty where it is not known."""
        latest = next((turn for turn in reversed(self.turns()) if turn.get("model")), {})
        return str(latest.get("model", "")), str(latest.get("model_path", ""))

    def set(self, system_info: str, user_info: str, label: str) -> None:
        """Add a `meta_prompt` line if the meta-prompt changes."""
        latest = self.meta_prompt
        if (latest["system_info"], latest["user_info"]) != (system_info, user_info):
            self._add("meta_prompt", system_info=system_info, user_info=user_info, label=label)

    def add(self, answer: Mapping[str, Any], again: bool = False) -> None:
        """Add an answer with its figures; `again`: it replaces the last turn."""
        figures = {name: value for name, value in answer.items() if name not in LINE_TEXTS["meta_prompt"]}
        replaces = {"replaces": self.turns()[-1]["id"]} if again else {}
        self._add("turn", id=os.urandom(6).hex(), **replaces, **figures)

    def clear(self) -> None:
        """Leave the turns so far out of the next prompts."""
        self._add("clear")

    def _add(self, kind: str, **fields: Any) -> None:
        self.lines.append({"kind": kind, "at": time.strftime(STAMP, time.gmtime()), **fields})

    def save(self) -> None:
        """Write the new lines to the disk, if this is a session. Lines that could not be written are tried again.

        Raises:
            CannotWrite: the disk is full, or cannot be written.
        """
        if self.path is None or self._saved == len(self.lines) or len(self.lines) == 1:  # nothing to keep but a header
            return
        try:
            with files.locked(self.path.parent):  # of the folder: `sessions rm` removes no session while it is written
                self.path.parent.mkdir(mode=0o700, exist_ok=True)
                with contextlib.closing(JsonLines(self.path, 0o600)) as file:
                    self._append(file)
        except OSError as error:
            raise CannotWrite(
                f"cannot write the session {self.path}: {error.strerror} (METAALIGN_EDGE_DATA names another folder)"
            ) from None
        self._saved = len(self.lines)

    def _append(self, file: JsonLines) -> None:
        """Write the new lines, or all of them where the file has none."""
        there = readable(line for _, line in file.read())
        if last := readable([file.torn]):  # whole but for its newline: so an editor may leave it
            there += last
            file.keep_torn()
        new = self.lines[max(self._saved, 1) :] if file.end else self.lines  # the file has its header
        if file.end:  # another process may have had another meta-prompt meanwhile
            ours, theirs = self._in_force(self.lines[: self._saved]), self._in_force(there)
            new = [ours, *new] if any(ours[name] != theirs.get(name) for name in LINE_TEXTS["meta_prompt"]) else new
        file.append(*(json.dumps(line, ensure_ascii=False) for line in new))


def readable(texts: Iterable[bytes]) -> list[Line]:
    """Return those lines of a session that can be read."""
    lines = []
    for text in texts:
        with contextlib.suppress(ValueError, RecursionError):
            lines.append(session_line(text))
    return lines
