"""List, show, search, export and remove the conversations kept by chat --session NAME."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from metaalign_edge_runtime.errors import CannotWrite, EdgeError, UsageError, one_line
from metaalign_edge_runtime.stores import files, session_text, sessions
from metaalign_edge_runtime.stores.sessions import Conversation

from .options.groups import ForceOption, JsonOption, QuietOption, option
from .terminal import tables
from .terminal.screen import Screen

app = typer.Typer(no_args_is_help=True, help=__doc__)
SessionArgument = Annotated[str, typer.Argument(metavar="NAME", help="A session's name.", show_default=False)]


@app.command("list")
def sessions_list(as_json: JsonOption = False) -> None:
    """List the sessions, the last used first.

    Example:

        metaalign-edge sessions list --json
    """
    screen = Screen()
    found = [summary(path) for path in sessions.session_paths()]
    if as_json:
        screen.json(found)
        return
    if not found:
        screen.note("no sessions yet: metaalign-edge chat --session NAME begins one")
        return
    rows = [
        [
            row["name"],
            str(row["turns"] or 0),
            session_text.local_time(str(row["last"] or "")),
            f"({row['error']})" if row["error"] else row["preference"],
        ]
        for row in found
    ]
    screen.lines(tables.aligned(["session", "turns", "last used", "preference"], rows))


def summary(path: Path) -> dict[str, Any]:
    """Return a session's row for `list`; of one that cannot be read, its name and the error."""
    nothing = dict.fromkeys(("turns", "first", "last", "model", "preference"))
    try:
        conversation = Conversation.read(path)
    except EdgeError as error:
        return {"name": path.stem, **nothing, "path": str(path), "error": one_line(error)}
    turns = conversation.turns()
    first, last = (turns[0], turns[-1]) if turns else ({}, {})
    return {
        "name": path.stem,
        "turns": len(turns),
        "first": first.get("at"),
        "last": last.get("at"),
        "model": last.get("model"),
        "preference": conversation.label or session_text.label_of([conversation.meta_prompt["user_info"]]),
        "path": str(path),
        "error": None,
    }


@app.command("show")
def sessions_show(name: SessionArgument, as_json: JsonOption = False) -> None:
    """Show the turns of a session, and the meta-prompt wherever it changed.

    Example:

        metaalign-edge sessions show garden
    """
    screen, conversation = Screen(), Conversation.read(sessions.existing_session(name))
    if as_json:
        screen.json(session_text.as_document(conversation))
    else:
        screen.write(session_text.as_text(conversation))


@app.command("search")
def sessions_search(
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What was said, in part.", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """Find what was said, whatever its case, in the questions and answers of all sessions.

    Examples:

        metaalign-edge sessions search "sow peas"

        metaalign-edge sessions search peas --json | jq -r ".[].session"
    """
    screen, found = Screen(), []
    if not text.strip():
        raise UsageError("the text to search for is empty: give a word of what was said")
    for path in sessions.session_paths():
        try:
            found += [{"session": path.stem, **row} for row in session_text.search(Conversation.read(path), text)]
        except EdgeError as error:
            screen.note(f"metaalign-edge: warning: {one_line(error)}")
    if as_json:
        screen.json(found)
    elif found:
        rows = [[row["session"], str(row["turn"]), row["excerpt"]] for row in found]
        screen.lines(tables.aligned(["session", "turn", "text"], rows))
    else:
        screen.note(f"no session has {text!r} in a question or an answer")


@app.command("rm")
def sessions_rm(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Sessions' names.", show_default=False)],
    quiet: QuietOption = False,
) -> None:
    """Remove sessions: all that are named, or none if one of them does not exist.

    Example:

        metaalign-edge sessions rm garden kitchen
    """
    paths = [sessions.existing_session(name) for name in dict.fromkeys(names)]
    try:
        with files.locked(paths[0].parent):
            for path in paths:
                path.unlink()
    except OSError as error:
        raise CannotWrite(f"cannot remove {error.filename}: {error.strerror}") from None
    Screen(quiet).note(f"removed: {', '.join(path.stem for path in paths)}")


@app.command("export")
def sessions_export(
    name: SessionArgument,
    output: Annotated[Path | None, option("-o", "--output", help="Write to this file. Default: stdout.")] = None,
    form: Annotated[
        str | None, option("--format", help="md or json. Default: as the file's name ends, else md.", metavar="md|json")
    ] = None,
    force: ForceOption = False,
) -> None:
    """Write a session as Markdown or JSON, with each preference where it changed.

    Examples:

        metaalign-edge sessions export garden -o garden.md

        metaalign-edge sessions export garden --format json | jq .turns
    """
    form = form or ("json" if output and output.suffix.lower() == ".json" else "md")
    if form not in ("md", "json"):
        raise UsageError(f"--format takes md or json, not {form!r}")
    text = session_text.exported(Conversation.read(sessions.existing_session(name)), form)
    if output is None:
        Screen().write(text)
        return
    if output.is_file() and not force:
        raise UsageError(f"{output} exists: name another, or --force replaces it")
    files.write_whole(output, text.encode("utf-8", "replace"))
