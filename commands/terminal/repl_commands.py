"""The slash commands of a conversation at a terminal: `/pref`, `/again`, …; a function each."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import metaalign_edge as edge
from metaalign_edge_runtime.errors import UsageError, did_you_mean, say
from metaalign_edge_runtime.stores import files, profiles, session_text, sessions
from metaalign_edge_runtime.stores.sessions import Conversation

from . import report
from .columns import Columns, answer_together
from .repl_state import ReplState

Run = Callable[[ReplState, str], None]  # takes the conversation and the text behind the command's name


class Command(NamedTuple):
    """A slash command."""

    takes: str  # its arguments, as /help shows them
    help: str
    run: Run
    choices: Callable[[], Iterable[str]]  # what Tab offers as its arguments


COMMANDS: dict[str, Command] = {}  # by name, `/pref`, in the order of /help
OTHER_NAMES = {"/quit": "/exit", "/bye": "/exit"}  # as other programs call them
KEYS = {
    '"""': "begins and ends a text of several lines; Alt-Enter breaks a line",
    "Tab, Ctrl-R": "complete a command, a profile, a session; search what was asked before",
    "Ctrl-C, Ctrl-D": "stop an answer, or clear the line; leave",
    "Ctrl-Z": "go back to the shell, whose `fg` comes back here",
}
THINKING: dict[str, bool | None] = {"on": True, "off": False, "auto": None}


def command(name: str, takes: str = "", *, choices: Callable[[], Iterable[str]] = tuple) -> Callable[[Run], Run]:
    """Register a function as a slash command; its help is the first line of its docstring."""

    def register(function: Run) -> Run:
        first = (function.__doc__ or "").partition("\n")[0].removesuffix(".")
        COMMANDS[name] = Command(takes, first[:1].lower() + first[1:], function, choices)
        return function

    return register


def run(repl: ReplState, line: str) -> None:
    """Run the slash command of a line.

    Raises:
        UsageError: there is no command of that name. EdgeError: the command fails.
    """
    name, _, text = line.partition(" ")
    name = name.strip()
    if (found := COMMANDS.get(OTHER_NAMES.get(name, name))) is None:
        guess = did_you_mean(name, COMMANDS, "/help lists them")
        raise UsageError(f"no command {name}: {guess} (a space before it makes it a question)")
    found.run(repl, text.strip())


def completions(line: str) -> list[tuple[str, int]]:
    """List what Tab offers at the end of a line, each with the number of characters before the cursor it replaces."""
    name, space, _ = line.partition(" ")
    if not space:
        return [(known, len(line)) for known in COMMANDS if line.startswith("/") and known.startswith(line)]
    begun = re.split(r"\s|\+(?=@)", line)[-1]
    choices = COMMANDS[name].choices() if name in COMMANDS else ()
    return [(choice, len(begun)) for choice in choices if choice.startswith(begun)]


@command("/pref", "[@NAME|TEXT|-]", choices=profiles.profile_words)
def set_preference(repl: ReplState, text: str) -> None:
    """Show or set User Info, the preference (- clears it)."""
    if text:
        label = "" if text == "-" else session_text.label_of([text])
        repl.set_tiers(user_info=profiles.preference_text(text), label=label)
    say(f"User Info: {repl.conversation.meta_prompt['user_info'] or '(empty)'}")


@command("/system", "[TEXT|-]")
def set_system(repl: ReplState, text: str) -> None:
    """Show or set System Info (- clears it)."""
    if text:
        repl.set_tiers(system_info="" if text == "-" else text)
    say(f"System Info: {repl.conversation.meta_prompt['system_info'] or '(empty)'}")


@command("/again", "@NAME|TEXT", choices=profiles.profile_words)
def ask_again(repl: ReplState, text: str) -> None:
    """Answer the last question under another preference, this once; /keep makes it stay."""
    repl.last_query()  # raises if nothing was asked yet
    if not text:
        raise UsageError("/again takes a preference: /again @name, or a text (/regen asks again under the same)")
    dialog = repl.last_query_under(text)
    repl.alternative = ("" if text == "-" else session_text.label_of([text]), repl.answer(dialog))


@command("/keep")
def keep_alternative(repl: ReplState, _: str) -> None:
    """Put the answer of /again in the last one's place, and go on with its preference."""
    if repl.alternative is None:
        raise UsageError("there is nothing to keep: /again @name asks the last question under another preference")
    (label, answer), repl.alternative = repl.alternative, None
    repl.conversation.set(answer.system_info, answer.user_info, label)
    repl.remember(answer, again=True)
    say("the answer takes the last one's place, and its preference stays")


@command("/regen")
def regenerate(repl: ReplState, _: str) -> None:
    """Answer the last question anew."""
    repl.ask(repl.last_query(), again=True)


@command("/compare", "@A @B …", choices=profiles.profile_words)
def compare(repl: ReplState, text: str) -> None:
    """Answer the last question under several preferences, side by side."""
    import shlex

    repl.last_query()
    try:
        preferences = shlex.split(text)
    except ValueError:
        advice = "put each preference that has spaces in quotes"
        raise UsageError(f"a quote is left open in {text!r}: {advice}") from None
    if len(preferences) < 2:
        raise UsageError('/compare takes two preferences or more: /compare @child "in French" - (a lone - is none)')
    dialogs = [repl.last_query_under(preference) for preference in preferences]
    repl.chat.interrupt.raised = False
    with (
        repl.chat.interrupt,
        repl.chat.beside(len(dialogs)) as session,
        Columns(preferences, repl.screen) as columns,
    ):
        answers = answer_together(session, dialogs, columns, repl.screen, repl.strict)
    for answer in answers:
        repl.screen.detail(report.describe(answer))


@command("/strength", "[pref|system N]", choices=lambda: ("pref", "system"))
def set_strength(repl: ReplState, text: str) -> None:
    """Show or set how hard a tier steers the answer: 1 is the model as it is."""
    tier, _, number = text.partition(" ")
    if text and tier not in ("pref", "system"):
        raise UsageError("/strength takes a tier and a number: /strength pref 2, or /strength system 1.5")
    if text:
        auto = tier == "pref" and number.strip() == "auto"
        value: Any = "auto" if auto else edge.checked_strength(f"/strength {tier}", number.strip())
        repl.chat.settings = replace(repl.chat.settings, **{f"{tier}_strength": value})
    say(f"strength: {report.shown_strengths(repl.chat.settings)}")


@command("/think", "[on|off|auto]", choices=lambda: THINKING)
def set_thinking(repl: ReplState, text: str) -> None:
    """Show or set whether a thinking model thinks; auto leaves it to the template."""
    if text and text not in THINKING:
        raise UsageError(f"/think takes on, off or auto, not {text!r}")
    if text:
        repl.chat.options = repl.chat.options._replace(think=THINKING[text])
    (state,) = (name for name, value in THINKING.items() if value is repl.chat.options.think)
    say(f"thinking: {state}" + (" (as the template does)" if state == "auto" else ""))


@command("/lora", "[PATH[:SCALE]|-]")
def set_adapter(repl: ReplState, text: str) -> None:
    """Show or set the LoRA adapter on the model (- takes it off)."""
    if text:
        repl.chat.set_adapters(() if text == "-" else edge.find_adapters([text]))
    say(f"adapters: {edge.name_adapters(repl.chat.settings.adapters) or '(none)'}")


@command("/stats")
def show_figures(repl: ReplState, _: str) -> None:
    """Show the figures of the latest answer."""
    if (answer := repl.latest) is None:
        raise UsageError("there is no answer yet: ask a question")
    context = repl.chat.engine.context if repl.chat.engine else 0
    rows = {
        "in": f"{answer.input_tokens:,} tokens, {answer.cached_tokens:,} of them known already",
        "out": f"{answer.output_tokens:,} tokens, {answer.tokens_per_second:.1f} a second ({answer.finish_reason})",
        "first": f"after {answer.first_token_ms:.0f} ms",
        "context": f"{answer.input_tokens + answer.output_tokens:,} of {context:,} tokens",
        "seed": str(answer.seed),
        "strength": report.shown_strengths(repl.chat.settings),
        "model": answer.model,
        "template": answer.template,
        "session": repl.conversation.name or "none: /save NAME begins one",
    }
    say("\n".join(f"{name:<9} {value}" for name, value in rows.items()))


@command("/save", "NAME|FILE")
def save(repl: ReplState, text: str) -> None:
    """Keep this conversation as the session NAME, or export it to FILE.md or FILE.json."""
    path = Path(text).expanduser()
    if not text:
        raise UsageError("/save takes a name for a session, or a file: /save work, /save talk.md, /save talk.json")
    if path.suffix in (".md", ".json"):
        if path.exists():
            raise UsageError(f"{path} exists: name another file")
        files.write_whole(path, session_text.exported(repl.conversation, path.suffix[1:]).encode("utf-8", "replace"))
        say(f"written to {path}")
        return
    path = sessions.session_path(text)
    if path.exists():
        raise UsageError(f"there is a session {text}: choose another name, or `metaalign-edge sessions rm {text}`")
    saved = Conversation(path)
    saved.lines = repl.conversation.lines
    saved.save()
    repl.conversation = saved
    say(f"this is session {text} from now on: metaalign-edge chat --session {text}")


@command("/load", "NAME", choices=sessions.session_names)
def load(repl: ReplState, text: str) -> None:
    """Go on with the session NAME."""
    path = sessions.existing_session(text)
    if repl.conversation.path is None and repl.conversation.turns():
        raise UsageError("this conversation is not kept anywhere: /save it first, or /clear it")
    repl.conversation, repl.alternative = Conversation.read(path), None
    say(session_text.describe_session(repl.conversation))
    report.note_other_model(repl.conversation, repl.chat.model.file.path.name, repl.screen)


@command("/clear")
def clear(repl: ReplState, _: str) -> None:
    """Forget the conversation, keep the meta-prompt."""
    repl.alternative = None
    if repl.conversation.pairs():
        repl.conversation.clear()
        repl.conversation.save()
    say("the conversation is forgotten; the meta-prompt stays")


@command("/help")
def show_help(_: ReplState, __: str) -> None:
    """List the commands and the keys."""
    import textwrap

    columns = shutil.get_terminal_size().columns
    margin, rows = 27 if columns > 60 else 2, []
    described = {f"{name} {one.takes}".strip(): one.help for name, one in COMMANDS.items()} | KEYS
    for head, text in described.items():
        first = f"{head:<{margin}}" if columns > 60 else f"{head}\n{' ' * margin}"
        rows.append(first + f"\n{' ' * margin}".join(textwrap.wrap(text, max(12, columns - margin - 1))))
    say("\n".join(rows))


@command("/exit")
def leave(repl: ReplState, _: str) -> None:
    """End the conversation (as /quit, /bye, exit and quit do)."""
    repl.running = False
