"""A conversation at a terminal: reads lines, and answers them or runs them as slash commands."""

from __future__ import annotations

import contextlib
import shutil

from metaalign_edge_runtime.errors import CONTROLS, EdgeError, one_line, say, shortened

from . import repl_commands
from .line_editor import is_plain, line_editor, read_text_of_lines
from .repl_state import ReplState
from .unseen import keys_unseen


class Repl(ReplState):
    """A conversation at a terminal, and the loop that reads it."""

    def run(self) -> None:
        """Read lines and answer them until the user leaves.

        Raises:
            CannotWrite: the session still cannot be written at the end.
        """
        read_line = line_editor(repl_commands.completions)
        self.screen.note("/help lists the commands, Ctrl-D leaves")
        with contextlib.nullcontext() if is_plain() else keys_unseen():
            while self.running:
                try:
                    self._take(read_text_of_lines(read_line, self.prompt()).replace("\r\n", "\n"))
                except EOFError:
                    break
                except KeyboardInterrupt:
                    continue
                except EdgeError as error:
                    say(f"metaalign-edge: {one_line(error)}")
        if self.conversation.turns():
            self.conversation.save()

    def _take(self, text: str) -> None:
        """Answer a question, or run a slash command; `exit` and `quit` alone are /exit."""
        if text.rstrip() in ("exit", "quit"):
            self.running = False
        elif text.startswith("/"):
            repl_commands.run(self, text)
        else:
            self.ask(text.strip())

    def prompt(self) -> str:
        """Return the prompt: the label of the preference in force, cut to a third of the terminal's width."""
        width = max(4, shutil.get_terminal_size().columns // 3)
        label = shortened(self.conversation.label.translate(CONTROLS), width)
        return f"[{label}] > " if label else "> "
