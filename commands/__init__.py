"""What people type: a file here is a command, found by its name. Its first line is its line in `--help`."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
import typer.main

from metaalign_edge_runtime import __version__
from metaalign_edge_runtime.errors import UsageError, did_you_mean

FOLDER = Path(__file__).resolve().parent
HELP = ["-h", "--help"]
NAME, SHORT_NAME = "metaalign-edge", "mae"  # of the program; the second is an alias
CALLED = SHORT_NAME if Path(sys.argv[0]).stem == SHORT_NAME else NAME  # as help pages name it


class Folder(MutableMapping[str, Any]):
    """The commands by their names; each is imported and built when it is asked for."""

    def __init__(self) -> None:
        self._built: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._built:
            if name not in names():
                raise KeyError(name)
            self._built[name] = build(name)
        return self._built[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self._built[name] = command

    def __delitem__(self, name: str) -> None:
        del self._built[name]

    def __iter__(self) -> Iterator[str]:
        return iter(names())

    def __len__(self) -> int:
        return len(names())


@functools.cache
def names() -> tuple[str, ...]:
    """Return the names of all commands: those of the files in this folder."""
    return tuple(sorted(path.stem for path in FOLDER.glob("[a-z]*.py")))


def summary(name: str) -> str:
    """Return what a command does, as its file says in the first line."""
    with (FOLDER / f"{name}.py").open(encoding="utf-8") as file:
        return file.readline().strip().strip('"')


def build(name: str) -> Any:
    """Import a command and build it: its file's `app` if it has commands of its own, else the function of its name."""
    module = importlib.import_module(f"{__name__}.{name}")
    one = getattr(module, "app", None)
    if one is None:
        one = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        one.command(name, cls=Command)(getattr(module, name))
    built = typer.main.get_command(one)
    built.name = name
    for each in (built, *getattr(built, "commands", {}).values()):
        each.help = (each.help or "").replace(f"{NAME} ", f"{CALLED} ")  # in its examples
        if variables := [one.envvar for one in each.params if one.envvar]:
            each.epilog = f"Variables for options that are not given: {', '.join(variables)}."
    return built


def is_question(word: str) -> bool:
    """Tell whether the first word of a command line is a question, which is given to `chat`, and no command's name."""
    return len(word.split()) > 1 or word.endswith(("?", "\uff1f", "\u061f"))  # the others: Chinese, Arabic


class Command(typer.core.TyperCommand):
    """A command. Where it takes a question, it says that this stands in quotes."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read a command line.

        Raises:
            UsageError: it has more words than the command takes.
        """
        ctx.allow_extra_args = True
        extra = super().parse_args(ctx, args)
        if extra and any(one.name == "query" for one in self.params):
            raise UsageError(f"{self.name} takes one question, and {extra[0]!r} is a word more: put it all in quotes")
        if extra:
            raise UsageError(f"{self.name} does not take {' '.join(extra)!r}: see `{CALLED} {self.name} --help`")
        return extra


class Commands(typer.core.TyperGroup):
    """The group of all commands. Listing them imports none; calling one imports that one."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = Folder()

    def list_commands(self, ctx: Any) -> list[str]:
        """List the commands in the order of `--help`."""
        return list(names())

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return what `--help` lists of a command; None if there is none."""
        return typer.core.TyperCommand(cmd_name, help=summary(cmd_name)) if cmd_name in names() else None

    def whole(self, args: list[str]) -> list[str]:
        """Return a command line with its command: `chat`, where a question or an option of `chat` stands first."""
        first = args[0] if args else ""
        if first in names():
            return args
        own = {*HELP, *(word for one in self.params for word in one.opts)}
        if first.startswith("-") and first not in own and not set(args) & set(names()):
            options = {word for one in self.commands["chat"].params for word in (*one.opts, *one.secondary_opts)}
            chats = first.partition("=")[0] in options
        else:
            chats = is_question(first)
        return ["chat", *args] if chats else args

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read a command line up to its command."""
        return super().parse_args(ctx, self.whole(args))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the name of the command that is called, the command itself, and the arguments that are left for it.

        Raises:
            UsageError: there is no such command.
        """
        if args[0] not in names():
            alike = did_you_mean(args[0], names(), f"`{CALLED} --help` lists them")
            raise UsageError(f"no command {args[0]!r}: {alike} (a question stands in quotes)")
        name, listed, rest = super().resolve_command(ctx, args)
        return name, self.commands[name] if name else listed, rest


def print_version(wanted: bool) -> None:
    """Print the version and leave, if it was asked for."""
    if wanted:
        from .terminal.screen import Screen

        Screen().write(f"metaalign-edge {__version__}\n")
        raise typer.Exit


def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=print_version, is_eager=True)
    ] = False,
) -> None:
    """One local model that follows any preference at inference time.

    System Info says what the provider wants, User Info (--pref) who you are and what you prefer.

    When the two conflict, System Info wins. Everything runs on this machine, offline.
    """
    from .options import in_files

    in_files.take_settings(context)


def build_root() -> Any:
    """Build the group that a command line is given to."""
    every = typer.Typer(
        name=CALLED,
        cls=Commands,
        no_args_is_help=True,
        add_completion=False,  # Typer's own loses the first TAB in zsh, and @ in bash; see `completion`
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": HELP},
        epilog=f"{CALLED} COMMAND --help shows a command's options and examples.",
    )
    every.callback()(root)
    return typer.main.get_command(every)


program = build_root()
