"""Print a script with which a shell completes commands, options, profiles, models and templates."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

import metaalign_edge as edge
from metaalign_edge_runtime.errors import EdgeError, UsageError, one_line
from metaalign_edge_runtime.stores import docs, files, models, profiles, sessions

from . import program
from .options import in_files
from .terminal.screen import Screen


def profile_values() -> dict[str, str]:
    """Return the profiles, each with its text."""
    found = dict.fromkeys(profiles.profile_words(), "")
    for word in found:
        with contextlib.suppress(EdgeError):  # a file that cannot be read
            found[word] = profiles.profile_text(word[1:])
    return found


def model_values() -> dict[str, str]:
    """Return the names of the models on this machine."""
    return dict.fromkeys(models.model_names(), "")


def session_values() -> dict[str, str]:
    """Return the names of the sessions."""
    return dict.fromkeys(sessions.session_names(), "")


def template_values() -> dict[str, str]:
    """Return the names that --template takes."""
    return {"auto": "the model's own", **dict.fromkeys(edge.shipped_templates(), "")}


def topic_values() -> dict[str, str]:
    """Return what `help` explains: the topics with their headings, then the commands."""
    headings = {name: topic.heading for name, topic in docs.topics().items()}
    return {**dict.fromkeys(program.commands, "a command"), **headings}


def outtype_values() -> dict[str, str]:
    """Return the types that a GGUF can be written in."""
    from metaalign_edge_convert import known_outtypes  # not at the top: it imports numpy

    return dict.fromkeys(known_outtypes(), "")


def key_values() -> dict[str, str]:
    """Return the names of the settings, each with what it sets."""
    return {key: one.help or "" for key, one in in_files.settings_by_name().items()}


SHELLS = {"bash": "bash", "zsh": "zsh", "fish": "fish", "powershell": "ps1"}  # the suffixes of their scripts
# What can be a parameter's value, with a description, by the parameter's name or "COMMAND NAME". Other parameters get
# no suggestions from here: the shell completes files.
VALUES: dict[str, Callable[[], dict[str, str]]] = {
    "pref": profile_values,
    "template": template_values,
    "against_template": template_values,
    "pref name": profile_values,
    "pref names": profile_values,
    "model": model_values,
    "against": model_values,
    "models name": model_values,
    "models names": model_values,
    "chat name": session_values,
    "sessions name": session_values,
    "sessions names": session_values,
    "ctx_size": lambda: {"auto": "as many as there is room for"},
    "gpu_layers": lambda: {"auto": "as many as there is room for", "all": ""},
    "pref_strength": lambda: {"auto": "as hard as the preference changes each token"},
    "ifeval_tier": lambda: {"system": "", "user": "", "query": "as published"},
    "outtype": outtype_values,
    "config key": key_values,
    "topic": topic_values,
    "shell": lambda: dict.fromkeys(SHELLS, ""),
}


def suggestions(command: Any, words: Sequence[str]) -> list[tuple[str, str]]:
    """Return the completions of a command line's last word, each with a description.

    Args:
        command: the root of Typer's commands.
        words: the line up to the cursor, without the program's name.
    """
    *before, word = command.whole([*words])
    word, waiting, group = word.strip("\"'"), None, ""
    taken: list[str] = []  # arguments of the command
    for given in before:
        options = {name: one for one in command.params for name in (*one.opts, *one.secondary_opts)}
        if waiting is not None:
            waiting = None
        elif given.startswith("-"):
            waiting = options.get(given)
            waiting = None if getattr(waiting, "is_flag", True) else waiting
        elif hasattr(command, "commands"):
            command, group = command.commands.get(given), group or given
            if command is None:
                return []
        else:
            taken.append(given)
    named = [one for one in command.params if one.param_type_name == "option" and not getattr(one, "hidden", False)]
    if waiting is not None:
        return values_of(group, waiting, word)
    if word.startswith("--") and "=" in word:
        name, _, value = word.partition("=")
        found = [values_of(group, one, value) for one in named if name in one.opts]
        return [(f"{name}={value}", says) for values in found for value, says in values]
    if word.startswith("-"):
        found = [[(name, one.help or "") for name in (*one.opts, *one.secondary_opts)] for one in named]
        return [(name, says) for names in found for name, says in names if name.startswith(word)]
    if hasattr(command, "commands"):
        shown = {name: one for name, one in command.commands.items() if name.startswith(word) and not one.hidden}
        return [(name, one.get_short_help_str(100)) for name, one in shown.items()]
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    last = len(arguments) - 1
    repeated = bool(arguments) and arguments[last].nargs < 0  # it takes any number of words
    place = min(len(taken), last) if repeated else len(taken)
    if (group, command.name) == ("config", "set") and taken:
        return values_of_setting(taken[0], word)
    return values_of(group, arguments[place], word) if place <= last else []


def values_of_setting(key: str, word: str) -> list[tuple[str, str]]:
    """Return the values of a setting that begin with a word; none if there is no such setting."""
    with contextlib.suppress(EdgeError):
        option = in_files.settable_key(key)
        if option.is_flag:
            return [(value, "") for value in ("true", "false") if value.startswith(word)]
        return values_of("", option, word)
    return []


def values_of(group: str, parameter: Any, word: str) -> list[tuple[str, str]]:
    """Return the values of a parameter that begin with a word; in `@one+@two`, the last profile is completed."""
    joined, plus, word = word.rpartition("+") if parameter.name == "pref" else ("", "", word)
    found = VALUES.get(f"{group} {parameter.name}", VALUES.get(parameter.name, dict))()
    return [(f"{joined}{plus}{value}", says) for value, says in found.items() if value.startswith(word)]


def completion(
    shell: Annotated[str, typer.Argument(metavar="SHELL", help=f"{', '.join(SHELLS)}.", show_default=False)],
    words: Annotated[
        list[str] | None,
        typer.Argument(help="For the script: the line so far, whose last word is completed.", hidden=True),
    ] = None,
) -> None:
    """Print a script with which a shell completes commands, options, profiles, models and templates.

    Examples:

        eval "$(metaalign-edge completion bash)"

        metaalign-edge completion fish > ~/.config/fish/completions/metaalign-edge.fish
    """
    if shell not in SHELLS:
        raise UsageError(f"no completion for {shell!r}: there is one for {', '.join(SHELLS)}")
    if words is None:
        path = files.package_folder("commands") / "shells" / f"metaalign-edge.{SHELLS[shell]}"
        Screen().write(files.read_text(path, "the completion"))
        return
    found = suggestions(program, words)
    Screen().lines(value if shell == "bash" or not says else f"{value}\t{one_line(says)}" for value, says in found)
