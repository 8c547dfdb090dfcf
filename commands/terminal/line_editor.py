"""The line editor of a conversation: prompt_toolkit, or plain input on a dumb terminal.

prompt_toolkit adds 80 ms to the start of a conversation, where readline would add 3. In return, pasted lines are one
question, Tab opens a menu, and Windows and macOS, whose Pythons lack GNU readline, have the same editor.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from typing import Any, cast

from metaalign_edge_runtime.stores import files


def is_plain() -> bool:
    """Tell whether the terminal cannot move its cursor, so that lines are edited as the terminal does it."""
    return os.environ.get("TERM") in ("dumb", "unknown")


def line_editor(complete: Callable[[str], list[tuple[str, int]]]) -> Callable[[str], str]:
    """Return a function that shows a prompt and reads a line: with history and completion, or plain on a dumb terminal.

    Args:
        complete: takes the line up to the cursor; lists completions, each with the number of characters it replaces.
    """
    if is_plain():
        return plain_line
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import Completer, Completion
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings

    class Offers(Completer):
        def get_completions(self, document: Any, complete_event: Any) -> Iterable[Completion]:
            for text, length in complete(document.text_before_cursor):
                yield Completion(text, -length)

    class Kept(FileHistory):
        def append_string(self, string: str) -> None:
            if not string.startswith(" "):  # kept out of the history, as shells do
                super().append_string(string)

        def store_string(self, string: str) -> None:
            with contextlib.suppress(OSError):
                super().store_string(string)

    path, history = files.data_folder() / "history", cast(History, InMemoryHistory())
    with contextlib.suppress(OSError):  # no history where it cannot be written
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        history = Kept(str(path))
    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    editor: PromptSession[str] = PromptSession(
        history=history,
        completer=Offers(),
        complete_while_typing=False,  # a screen reader would read every menu aloud
        key_bindings=keys,
        prompt_continuation=". ",
        enable_suspend=True,  # by Ctrl-Z
    )
    return editor.prompt


def plain_line(prompt: str) -> str:
    """Read a line with the terminal's own editing."""
    try:
        return input(prompt)
    except (EOFError, KeyboardInterrupt):
        print()
        raise


def read_text_of_lines(line: Callable[[str], str], prompt: str) -> str:
    """Read one line, or a text of several lines between two \"\"\"."""
    text = line(prompt)
    if not text.startswith('"""'):
        return text
    text = text[3:]
    while not text.rstrip().endswith('"""'):
        text += "\n" + line(". ")
    return text.rstrip()[:-3].strip("\n")
