"""What people type: a file here is a command, found by its name. Its first line is its line in `--help`."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
import typer.main

from metaalign_edge_runtime import __version__

FOLDER = Path(__file__).resolve().parent


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
        one.command(name)(getattr(module, name))
    built = typer.main.get_command(one)
    built.name = name
    return built


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

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the name of the command that is called, the command itself, and the arguments that are left for it."""
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
        name="metaalign-edge",
        cls=Commands,
        no_args_is_help=True,
        add_completion=False,  # Typer's own loses the first TAB in zsh, and @ in bash; see `completion`
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        epilog="metaalign-edge COMMAND --help shows a command's options and examples.",
    )
    every.callback()(root)
    return typer.main.get_command(every)


program = build_root()
