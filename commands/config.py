"""Show and set what options are when they are not given."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from metaalign_edge_runtime.errors import NotFound, UsageError, one_line
from metaalign_edge_runtime.stores import config, files

from .options import in_files
from .options.groups import JsonOption, QuietOption
from .options.in_files import Setting
from .terminal.screen import Screen

app = typer.Typer(no_args_is_help=True, help=__doc__)
KeyArgument = Annotated[
    str, typer.Argument(metavar="KEY", help="An option's name: max_tokens for --max-tokens.", show_default=False)
]


@app.command("show")
def config_show(context: typer.Context, as_json: JsonOption = False) -> None:
    """List every setting with its value here, and the file or variable that gives it.

    Examples:

        metaalign-edge config show

        metaalign-edge config show --json
    """
    screen, values = Screen(), in_files.in_force(context)
    if as_json:
        screen.json({key: one._asdict() for key, one in values.items()})
        return
    rows = [[key, one_line(" ".join(in_files.written(one.value)) or "-"), one.origin] for key, one in values.items()]
    widths = [max(len(row[place]) for row in rows) for place in (0, 1)]
    screen.lines(f"{key:<{widths[0]}}  {value:<{min(widths[1], 40)}}  {origin}" for key, value, origin in rows)


@app.command("path")
def config_path() -> None:
    """Print the path of the settings, a TOML file. It need not exist.

    Examples:

        $EDITOR "$(metaalign-edge config path)"
    """
    Screen().write(f"{config.config_file()}\n")


@app.command("get")
def config_get(context: typer.Context, key: KeyArgument, as_json: JsonOption = False) -> None:
    """Print the value that a setting has here; several texts are a line each.

    Examples:

        metaalign-edge config get model
    """
    name, screen = in_files.settable_key(key).name, Screen()
    value = in_files.in_force(context)[name].value
    if as_json:
        screen.json(value)
    elif value is None:
        raise NotFound(f"{name} is not set: set it with `metaalign-edge config set {name} VALUE`")
    else:
        screen.lines(in_files.written(value))


@app.command("set")
def config_set(
    context: typer.Context,
    key: KeyArgument,
    values: Annotated[
        list[str], typer.Argument(metavar="VALUE...", help="One value; pref and stop take several.", show_default=False)
    ],
    quiet: QuietOption = False,
) -> None:
    """Set what an option is when it is not given. Comments in the file are kept.

    Examples:

        metaalign-edge config set max_tokens 300

        metaalign-edge config set pref @concise "I live in Rome."
    """
    taken = in_files.settable_key(key)
    if len(values) > 1 and not taken.multiple:
        raise UsageError(f"{taken.name} takes one value, not {len(values)}: put a text in quotes")
    try:
        found = taken.type_cast_value(None, values if taken.multiple else values[0])
    except typer.BadParameter as error:
        raise UsageError(f"{taken.name}: {error.message}") from None
    value = list(found) if taken.multiple else found
    place = os.path.expanduser(values[0])
    if taken.name == "models" or (taken.name == "model" and os.path.isfile(place)):
        value = os.path.abspath(place)  # valid from any working folder
    for text in values:
        files.check_utf8(text, f"the value of {taken.name}")
    Setting(taken, value, "config set").check()
    config.store_setting(taken.name, value)
    in_files.note_nearer(taken, context, Screen(quiet))


@app.command("unset")
def config_unset(key: KeyArgument) -> None:
    """Remove a setting, also one that no option is named after.

    Examples:

        metaalign-edge config unset max_tokens
    """
    name = key if key in config.read_toml(config.config_file()) else in_files.settable_key(key).name
    config.store_setting(name, None)
