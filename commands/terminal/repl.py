"""A conversation at a terminal, turn by turn."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import metaalign_edge as edge
from metaalign_edge import Answer, Dialog, Request, Scheduler
from metaalign_edge_runtime.errors import CONTROLS, EdgeError, UsageError, nearest, one_line, say, shortened
from metaalign_edge_runtime.stores import files, profiles, session_text, sessions
from metaalign_edge_runtime.stores.sessions import Conversation

from . import report
from .columns import Columns, answer_together
from .line_editor import line_editor, read_text_of_lines
from .reply import Reply
from .screen import Aside, Screen


def dialog_of(transcript: Conversation, query: str, again: bool = False) -> Dialog:
    """Return a conversation with a query that follows, or with `again` takes the place of the last one."""
    tiers, past = transcript.meta_prompt, transcript.pairs()
    return Dialog.of(tiers["system_info"], tiers["user_info"], past[: len(past) - again], query)


class Word(NamedTuple):
    """A command of a conversation."""

    takes: str
    help: str
    method: Callable[[Any, str], None]
    choices: Sequence[str] | Callable[[], Iterable[str]] = ()  # what Tab offers after it


class Repl:
    """A conversation at a terminal. The head of the prompt may change at any time; the turns stay."""

    def __init__(
        self, chat: Scheduler, transcript: Conversation, screen: Screen, strict: bool, markdown: bool = False
    ) -> None:
        self.chat, self.transcript, self.screen, self.strict = chat, transcript, screen, strict
        self.markdown, self.seed = markdown, chat.settings.seed
        self.latest: Answer | None = None
        self.aside: tuple[str, Answer] | None = None  # the latest /again: its preference's short form, and the answer
        self.going = True

    def run(self) -> None:
        """Read and answer until the user leaves.

        Raises:
            CannotWrite: the session still cannot be written at the end.
        """
        line = line_editor(self.completions)
        self.screen.note("/help lists the commands, Ctrl-D leaves")
        while self.going:
            try:
                text = read_text_of_lines(line, self.prompt()).replace("\r\n", "\n")
                self.obey(text) if text.startswith("/") else self.ask(text.strip())
            except EOFError:
                break
            except KeyboardInterrupt:
                continue
            except EdgeError as error:
                say(f"metaalign-edge: {one_line(error)}")
        if self.transcript.turns():
            self.transcript.save()

    def prompt(self) -> str:
        """Return the prompt, with the preference in force as far as there is room."""
        room = max(4, shutil.get_terminal_size().columns // 3)
        label = shortened(self.transcript.label.translate(CONTROLS), room)
        return f"[{label}] > " if label else "> "

    def obey(self, line: str) -> None:
        """Carry out a command.

        Raises:
            UsageError: there is none of that name.
        """
        name, _, text = line.partition(" ")
        if (word := self.WORDS.get(name.strip())) is None:
            guess = nearest(name, self.WORDS, "/help lists them")
            raise UsageError(f"no command {name}: {guess} (a space before it makes it a question)")
        word.method(self, text.strip())

    def answer(self, dialog: Dialog) -> Answer:
        """Answer the newest query of a dialog on the screen; what an interrupted answer had said is kept."""
        reply = Reply(self.screen, self.markdown)
        self.chat.interrupt.raised = False
        with self.chat.interrupt, reply.alone():
            request = Request(dialog, self.seed, show=reply.show, think=Aside(self.screen).write)
            answer = edge.answer_one(self.chat, request, lambda prompt: report.warn(prompt, self.screen, self.strict))
        self.seed, self.latest = (self.seed + 1) % 2**32, answer
        reply.end(answer.response)
        self.screen.detail(report.describe(answer))
        return answer

    def ask(self, query: str, again: bool = False) -> None:
        """Answer a query, or the last one `again`, and remember it."""
        if query:
            self.aside = None
            self.remember(self.answer(dialog_of(self.transcript, query, again)), again)

    def remember(self, answer: Answer, again: bool) -> None:
        """Note an answer, in the place of the last one if it was asked `again`."""
        self.transcript.add(asdict(answer), again)
        self.transcript.save()
        report.check_answer(answer, self.chat.settings.schema, self.screen)

    def last_query(self) -> str:
        """Return the last question.

        Raises:
            UsageError: there is none.
        """
        if not (pairs := self.transcript.pairs()):
            raise UsageError("there is no question to answer again: ask one")
        return pairs[-1][0]

    def change(self, **tiers: str) -> None:
        """Change the meta-prompt, and write that down."""
        self.aside = None
        now = {"label": "", **self.transcript.meta_prompt, **tiers}
        self.transcript.set(now["system_info"], now["user_info"], now["label"])
        self.transcript.save()

    def pref(self, text: str) -> None:
        """Show or set User Info."""
        if text:
            self.change(user_info=profiles.wish_text(text), label="" if text == "-" else session_text.label_of([text]))
        say(f"User Info: {self.transcript.meta_prompt['user_info'] or '(empty)'}")

    def system(self, text: str) -> None:
        """Show or set System Info."""
        if text:
            self.change(system_info="" if text == "-" else text)
        say(f"System Info: {self.transcript.meta_prompt['system_info'] or '(empty)'}")

    def again(self, text: str) -> None:
        """Answer the last question under another preference."""
        query = self.last_query()
        if not text:
            raise UsageError("/again takes a preference: /again @name, or a text (/regen asks again under the same)")
        dialog = replace(dialog_of(self.transcript, query, again=True), user_info=profiles.wish_text(text))
        self.aside = ("" if text == "-" else session_text.label_of([text]), self.answer(dialog))

    def keep(self, _: str) -> None:
        """Take over the latest /again."""
        if self.aside is None:
            raise UsageError("there is nothing to keep: /again @name asks the last question under another preference")
        (label, answer), self.aside = self.aside, None
        self.transcript.set(answer.system_info, answer.user_info, label)
        self.remember(answer, again=True)
        say("the answer takes the last one's place, and its preference stays")

    def regen(self, _: str) -> None:
        """Answer the last question again."""
        self.ask(self.last_query(), again=True)

    def compare(self, text: str) -> None:
        """Answer the last question under several preferences."""
        import shlex

        query = self.last_query()
        try:
            wishes = shlex.split(text)
        except ValueError:
            advice = "put each preference that has spaces in quotes"
            raise UsageError(f"a quote is left open in {text!r}: {advice}") from None
        if len(wishes) < 2:
            raise UsageError('/compare takes two preferences or more: /compare @child "in French" - (a lone - is none)')
        dialogs = [
            replace(dialog_of(self.transcript, query, again=True), user_info=profiles.wish_text(wish))
            for wish in wishes
        ]
        self.chat.interrupt.raised = False
        with (
            self.chat.interrupt,
            self.chat.beside(len(dialogs)) as session,
            Columns(wishes, self.screen) as columns,
        ):
            answers = answer_together(session, dialogs, columns, self.screen, self.strict)
        for answer in answers:
            self.screen.detail(report.describe(answer))

    def strength(self, text: str) -> None:
        """Show or set how hard a tier pulls."""
        settings = self.chat.settings
        tier, _, number = text.partition(" ")
        if text and tier not in ("pref", "system"):
            raise UsageError("/strength takes a tier and a number: /strength pref 2, or /strength system 1.5")
        if text:
            auto = tier == "pref" and number.strip() == "auto"
            value: Any = "auto" if auto else edge.checked_strength(f"/strength {tier}", number.strip())
            settings = self.chat.settings = replace(settings, **{f"{tier}_strength": value})
        say(f"strength: {report.shown_strengths(settings)}")

    def think(self, text: str) -> None:
        """Show or set whether the model is to think."""
        states: dict[str, bool | None] = {"on": True, "off": False, "auto": None}
        if text and text not in states:
            raise UsageError(f"/think takes on, off or auto, not {text!r}")
        if text:
            self.chat.options = self.chat.options._replace(think=states[text])
        (state,) = (name for name, value in states.items() if value is self.chat.options.think)
        say(f"thinking: {state}" + (" (as the template does)" if state == "auto" else ""))

    def lora(self, text: str) -> None:
        """Show or set the adapters that are laid over the model."""
        if text:
            self.chat.set_adapters(() if text == "-" else edge.find_adapters([text]))
        say(f"adapters: {edge.name_adapters(self.chat.settings.adapters) or '(none)'}")

    def stats(self, _: str) -> None:
        """Show the figures of the latest answer."""
        if (answer := self.latest) is None:
            raise UsageError("there is no answer yet: ask a question")
        room = self.chat.engine.context if self.chat.engine else 0
        rows = {
            "in": f"{answer.input_tokens:,} tokens, {answer.cached_tokens:,} of them known already",
            "out": f"{answer.output_tokens:,} tokens, {answer.tokens_per_second:.1f} a second ({answer.finish_reason})",
            "first": f"after {answer.first_token_ms:.0f} ms",
            "context": f"{answer.input_tokens + answer.output_tokens:,} of {room:,} tokens",
            "seed": str(answer.seed),
            "strength": report.shown_strengths(self.chat.settings),
            "model": answer.model,
            "template": answer.template,
            "session": self.transcript.name or "none: /save NAME begins one",
        }
        say("\n".join(f"{name:<9} {value}" for name, value in rows.items()))

    def store(self, text: str) -> None:
        """Keep the conversation as a session, or export it."""
        path = Path(text).expanduser()
        if not text:
            raise UsageError("/save takes a name for a session, or a file: /save work, /save talk.md, /save talk.json")
        if path.suffix in (".md", ".json"):
            if path.exists():
                raise UsageError(f"{path} exists: name another file")
            files.write_whole(path, session_text.exported(self.transcript, path.suffix[1:]).encode("utf-8", "replace"))
            say(f"written to {path}")
            return
        path = sessions.session_path(text)
        if path.exists():
            raise UsageError(f"there is a session {text}: choose another name, or `metaalign-edge sessions rm {text}`")
        kept = Conversation(path)
        kept.lines = self.transcript.lines
        kept.save()
        self.transcript = kept
        say(f"this is session {text} from now on: metaalign-edge chat --session {text}")

    def load(self, text: str) -> None:
        """Go on with a session."""
        path = sessions.existing_session(text)
        if self.transcript.path is None and self.transcript.turns():
            raise UsageError("this conversation is not kept anywhere: /save it first, or /clear it")
        self.transcript, self.aside = Conversation.read(path), None
        say(session_text.describe_session(self.transcript))

    def clear(self, _: str) -> None:
        """Forget the turns."""
        self.aside = None
        if self.transcript.pairs():
            self.transcript.clear()
            self.transcript.save()
        say("the conversation is forgotten; the meta-prompt stays")

    def help(self, _: str) -> None:
        """List the commands."""
        import textwrap

        columns = shutil.get_terminal_size().columns
        margin, rows = 27 if columns > 60 else 2, []
        for head, help in [
            *((f"{name} {word.takes}".strip(), word.help) for name, word in self.WORDS.items()),
            *self.KEYS,
        ]:
            first = f"{head:<{margin}}" if columns > 60 else f"{head}\n{' ' * margin}"
            rows.append(first + f"\n{' ' * margin}".join(textwrap.wrap(help, max(12, columns - margin - 1))))
        say("\n".join(rows))

    def leave(self, _: str) -> None:
        """End the conversation."""
        self.going = False

    @classmethod
    def completions(cls, line: str) -> list[tuple[str, int]]:
        """List what Tab offers at the end of a line, each with how many characters of it that takes the place of."""
        head, space, _ = line.partition(" ")
        if not space:
            return [(name, len(line)) for name in cls.WORDS if line.startswith("/") and name.startswith(line)]
        word, begun = cls.WORDS.get(head), re.split(r"\s|\+(?=@)", line)[-1]
        choices = (word.choices() if callable(word.choices) else word.choices) if word else ()
        return [(choice, len(begun)) for choice in choices if choice.startswith(begun)]

    KEYS = (
        ('"""', "begins and ends a text of several lines; Alt-Enter breaks a line"),
        ("Tab, Ctrl-R", "complete a command, a profile, a session; search what was asked before"),
        ("Ctrl-C, Ctrl-D", "stop an answer, or clear the line; leave"),
    )
    WORDS: Mapping[str, Word] = {
        "/pref": Word(
            "[@NAME|TEXT|-]", "show or set User Info, the preference (- clears it)", pref, profiles.profile_words
        ),
        "/system": Word("[TEXT|-]", "show or set System Info (- clears it)", system),
        "/again": Word(
            "@NAME|TEXT",
            "the last question under another preference, this once; /keep makes it stay",
            again,
            profiles.profile_words,
        ),
        "/keep": Word("", "the answer of /again takes the last one's place, and its preference stays", keep),
        "/regen": Word("", "answer the last question anew", regen),
        "/compare": Word("@A @B …", "the last question under several, side by side", compare, profiles.profile_words),
        "/strength": Word("[pref|system N]", "how hard a tier pulls; 1 is as usual", strength, ("pref", "system")),
        "/think": Word("[on|off|auto]", "let a thinking model think", think, ("on", "off", "auto")),
        "/lora": Word("[PATH[:SCALE]|-]", "show or set the adapter over the model (- takes it away)", lora),
        "/stats": Word("", "figures of the latest answer", stats),
        "/save": Word("NAME|FILE", "keep this conversation as a session; or write it to FILE.md or FILE.json", store),
        "/load": Word("NAME", "go on with a session", load, sessions.session_names),
        "/clear": Word("", "forget the conversation, keep the meta-prompt", clear),
        "/help": Word("", "this list", help),
        "/exit": Word("", "leave", leave),
    }
