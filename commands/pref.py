"""Give preferences names, and choose those that always apply."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from metaalign_edge_runtime.errors import CannotWrite, EdgeError, UsageError, one_line
from metaalign_edge_runtime.stores import config, files, profiles

from .options import in_files
from .options.groups import JsonOption, QuietOption, option
from .options.in_files import Setting
from .options.query import read_stdin
from .terminal.screen import Screen, at_terminal

app = typer.Typer(no_args_is_help=True, help=__doc__)
ProfileArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="A profile's name, with or without @.", show_default=False)
]
ProfilesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[NAME]...", help="Names, with or without @.", show_default=False)
]


@app.command("add")
def pref_add(
    name: ProfileArgument,
    text: Annotated[
        str | None, typer.Argument(metavar="TEXT", help="The preference. Default: stdin.", show_default=False)
    ] = None,
    file: Annotated[Path | None, option("--file", help="Read the text from a file.")] = None,
    force: Annotated[bool, option("--force", help="Replace a profile that exists.")] = False,
    quiet: QuietOption = False,
) -> None:
    """Give a preference a name: from then on it is `--pref @NAME`.

    Examples:

        metaalign-edge pref add brief "Answer in two sentences at most."

        metaalign-edge pref add --file about-me.txt me

        fortune | metaalign-edge pref add --force mood
    """
    name = profiles.profile_name(name)
    if text is not None and file is not None:
        raise UsageError("TEXT and --file both say what you prefer: choose one")
    if file is not None:
        text = files.read_text(file, "--file")
    elif text is None:
        text = read_stdin()
        if not text:
            raise UsageError("no text: give it as an argument, with --file, or pipe it in")
    profiles.store_profile(name, text, force=force)
    Screen(quiet).note(
        f"@{name} is kept: use it with --pref @{name}, or always with `metaalign-edge pref default {name}`"
    )


@app.command("list")
def pref_list(as_json: JsonOption = False) -> None:
    """List the profiles, your own and the built-in ones; a * marks those that apply by default.

    Examples:

        metaalign-edge pref list

        metaalign-edge pref list --json
    """
    screen, built_in = Screen(), profiles.built_in_profiles()
    own, defaults = profiles.own_profiles(), in_files.default_profiles()
    found: list[dict[str, Any]] = []
    for name in profiles.known_profiles():
        try:
            text = profiles.profile_text(name)
        except EdgeError as error:
            screen.note(f"metaalign-edge: warning: {one_line(error)}")
            text = ""
        kind = {"own": name in own, "built_in": name in built_in, "default": name in defaults}
        found.append({"name": name, "text": text, **kind})
    if as_json:
        screen.json(found)
        return
    rows = [
        [
            f"{'*' if one['default'] else ' '} @{one['name']}",
            "built-in" if not one["own"] else "own, wins" if one["built_in"] else "own",
            one_line(one["text"]) if one["text"] else "",
        ]
        for one in found
    ]
    screen.lines(screen.lay_out(["  profile", "kind", "text"], rows))


@app.command("show")
def pref_show(name: ProfileArgument, as_json: JsonOption = False) -> None:
    """Print the text of a profile.

    Examples:

        metaalign-edge pref show concise
    """
    name, screen = profiles.profile_name(name), Screen()
    text = profiles.profile_text(name)
    own = name in profiles.own_profiles()
    built_in = name in profiles.built_in_profiles()
    kind = {"own": own, "built_in": built_in, "default": name in in_files.default_profiles()}
    screen.json({"name": name, "text": text, **kind}) if as_json else screen.write(f"{text}\n")


@app.command("edit")
def pref_edit(name: ProfileArgument, quiet: QuietOption = False) -> None:
    """Edit a profile in $VISUAL or $EDITOR. Editing a built-in one makes one of your own, which replaces it.

    If the text is unchanged or empty, nothing changes.

    Examples:

        EDITOR=nano metaalign-edge pref edit brief
    """
    name, screen = profiles.profile_name(name), Screen(quiet)
    before = profiles.own_profile(name)
    old = profiles.profile_text(name) if before is None else before
    with edited(old, f"{name}.txt") as text:
        if text in ("", old):
            screen.note(f"@{name} stays as it was: the text is {'empty' if not text else 'unchanged'}")
            return
        profiles.store_profile(name, text, before)
    screen.note(f"@{name} is changed")


@contextlib.contextmanager
def edited(text: str, name: str) -> Iterator[str]:
    """Open a text in the user's editor, in a temporary file of this name; yield the edited text.

    The file is removed, or kept and named in the error if the editor or what follows fails.

    Raises:
        UsageError: no editor can be started, or the edited text is not UTF-8. EdgeError: the editor failed.
    """
    import shlex
    import subprocess
    import tempfile

    windows = os.name == "nt"
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR")
    if not editor and not at_terminal(sys.stdin):
        raise UsageError("no terminal for an editor: set VISUAL or EDITOR, or use `metaalign-edge pref add --force`")
    editor = editor or ("notepad" if windows else "vi")
    try:
        drafts = files.data_folder() / "drafts"  # not TMPDIR, where a killed editor would leave it for others to read
        files.make_private(drafts)
        draft = Path(tempfile.mkdtemp(dir=drafts)) / name
    except OSError as error:
        reason = f"{error.strerror} (METAALIGN_EDGE_DATA names another folder)"
        raise CannotWrite(f"cannot write {error.filename or drafts}: {reason}") from None
    try:
        draft.touch(files.PRIVATE)
        draft.write_bytes(f"{text}\n".encode())
        status = subprocess.run([*shlex.split(editor, posix=not windows), str(draft)]).returncode
    except (OSError, ValueError) as error:
        shutil.rmtree(draft.parent, ignore_errors=True)
        raise UsageError(f"cannot start the editor {editor!r}: {one_line(error)}: set VISUAL or EDITOR") from None
    try:
        if status:
            raise EdgeError(f"the editor {editor!r} ended with {status}, so nothing is changed")
        yield files.read_text(draft, "the draft").strip()
    except EdgeError as error:
        raise type(error)(f"{error}; what you wrote is in {draft}") from None
    shutil.rmtree(draft.parent, ignore_errors=True)


@app.command("rm")
def pref_rm(names: ProfilesArgument = None, quiet: QuietOption = False) -> None:
    """Remove profiles of your own.

    Examples:

        metaalign-edge pref rm brief mood
    """
    if not names:
        raise UsageError("name the profiles to remove: `metaalign-edge pref list` shows them")
    bare = list(dict.fromkeys(map(profiles.profile_name, names)))
    gone = set(bare) - profiles.built_in_profiles().keys()
    if lost := gone & set(in_files.default_profiles()):
        raise UsageError(
            f"@{min(lost)} applies by default: change that first, with `metaalign-edge pref default NAME` or --none"
        )
    profiles.remove_profiles(bare)
    Screen(quiet).note(f"{', '.join(f'@{name}' for name in bare)} removed")


@app.command("default")
def pref_default(
    context: typer.Context,
    names: ProfilesArgument = None,
    none: Annotated[bool, option("--none", help="Apply no preference by default.")] = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Choose the profiles that apply to every chat, batch and render, in this order; without a name, show them.

    Examples:

        metaalign-edge pref default brief metric

        metaalign-edge pref default --none
    """
    screen = Screen(quiet)
    if none and names:
        raise UsageError("--none and a name contradict each other: choose one")
    if names:
        bare = [profiles.profile_name(name) for name in names]
        for name in bare:
            profiles.profile_text(name)
        config.store_setting("pref", [f"@{name}" for name in bare])
    elif none:
        config.store_setting("pref", None)
    if none or names:
        in_files.note_nearer(in_files.settable_key("pref"), context, screen)
        return
    setting = in_files.config_in_force().get("pref")
    preferences = [] if setting is None else setting()
    if as_json:
        screen.json(preferences)
    elif preferences:
        screen.lines(preferences)
        screen.note(f"from {cast(Setting, setting).origin}")
    else:
        screen.note("no preference applies by default: `metaalign-edge pref default NAME` chooses one")
