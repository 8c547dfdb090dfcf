"""A conversation at a terminal as slash commands see it: what they read and change, and how it answers."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from typing import Any

import metaalign_edge as edge
from metaalign_edge import Answer, Dialog, Request, Scheduler
from metaalign_edge_runtime.errors import UsageError
from metaalign_edge_runtime.stores import profiles
from metaalign_edge_runtime.stores.sessions import Conversation

from . import report
from .reply import AnswerPrinter
from .screen import ReasoningPrinter, Screen


def dialog_of(conversation: Conversation, query: str, again: bool = False) -> Dialog:
    """Return the dialog of a conversation that ends with a query; `again`: the query replaces the last turn."""
    tiers, past = conversation.meta_prompt, conversation.pairs()
    return Dialog.of(tiers["system_info"], tiers["user_info"], past[: len(past) - again], query)


def turn_of(answer: Answer, scheduler: Scheduler) -> dict[str, Any]:
    """Return an answer as a session keeps it: its figures, and which file the model is."""
    return {**asdict(answer), "model_path": os.path.abspath(scheduler.model.file.path)}


class ReplState:
    """A conversation at a terminal. Its meta-prompt may change at any time; the turns stay."""

    def __init__(
        self, chat: Scheduler, conversation: Conversation, screen: Screen, strict: bool, markdown: bool = False
    ) -> None:
        self.chat, self.conversation, self.screen, self.strict = chat, conversation, screen, strict
        self.markdown, self.seed = markdown, chat.settings.seed
        self.latest: Answer | None = None
        self.alternative: tuple[str, Answer] | None = None  # of the latest /again: the preference's label, the answer
        self.running = True

    def ask(self, query: str, again: bool = False) -> None:
        """Answer a query and remember the answer; `again`: the query is the last one, and replaces its turn."""
        if query:
            self.alternative = None
            self.remember(self.answer(dialog_of(self.conversation, query, again)), again)

    def answer(self, dialog: Dialog) -> Answer:
        """Write the answer to a dialog's newest query on the screen; Ctrl-C ends it early and keeps what it said."""
        printer = AnswerPrinter(self.screen, self.markdown)
        self.chat.interrupt.raised = False
        with self.chat.interrupt:
            request = Request(dialog, self.seed, show=printer.show, think=ReasoningPrinter(self.screen).write)
            answer = edge.answer_one(self.chat, request, lambda prompt: report.warn(prompt, self.screen, self.strict))
        self.seed, self.latest = (self.seed + 1) % 2**32, answer
        printer.end(answer.response)
        self.screen.detail(report.describe(answer))
        return answer

    def remember(self, answer: Answer, again: bool) -> None:
        """Add an answer to the conversation; `again`: in place of the last turn."""
        self.conversation.add(turn_of(answer, self.chat), again)
        self.conversation.save()
        report.check_answer(answer, self.chat.settings.schema, self.screen)

    def last_query(self) -> str:
        """Return the last question.

        Raises:
            UsageError: nothing was asked yet.
        """
        if not (pairs := self.conversation.pairs()):
            raise UsageError("there is no question to answer again: ask one")
        return pairs[-1][0]

    def last_query_under(self, preference: str) -> Dialog:
        """Return the dialog that asks the last question again under another preference.

        Raises:
            UsageError: nothing was asked yet. NotFound: the preference names a profile that does not exist.
        """
        dialog = dialog_of(self.conversation, self.last_query(), again=True)
        return replace(dialog, user_info=profiles.preference_text(preference))

    def set_tiers(self, **tiers: str) -> None:
        """Change the meta-prompt from here on (system_info, or user_info and its label), in the session's file too."""
        self.alternative = None
        tiers = {"label": "", **self.conversation.meta_prompt, **tiers}
        self.conversation.set(tiers["system_info"], tiers["user_info"], tiers["label"])
        self.conversation.save()
