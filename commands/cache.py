"""Show and clear the cache of prompt states on the disk."""

from __future__ import annotations

import typer

from metaalign_edge_runtime.errors import counted
from metaalign_edge_runtime.stores import session_text
from metaalign_edge_runtime.stores.prompt_cache import PromptCache

from .options.groups import JsonOption, QuietOption
from .terminal.screen import Screen

app = typer.Typer(no_args_is_help=True, help=__doc__)


@app.command("show")
def cache_show(as_json: JsonOption = False) -> None:
    """List the states: their size, how often each spared the model a prompt, and when it was used last."""
    screen, states = Screen(), PromptCache()
    files = states.files()
    size = sum(file.bytes for file in files)
    document = {
        "folder": str(states.folder),
        "bytes": size,
        "limit": states.most,
        "hits": sum(file.hits for file in files),
        "states": [
            {"name": file.path.stem, "bytes": file.bytes, "hits": file.hits, "used": file.used} for file in files
        ],
    }
    if as_json:
        screen.json(document)
        return
    heads = ["state", "MB", "hits", "last used"]
    rows = [
        [file.path.stem[:12], f"{file.bytes / 1e6:.1f}", str(file.hits), session_text.on_clock(file.used)]
        for file in files
    ]
    lines = screen.lay_out(heads, rows) if rows else []
    total = f"{counted(len(files), 'state')}, {size / 1e6:,.1f} of {states.most / 1e6:,.0f} MB, {states.folder}"
    screen.lines([*lines, total])


@app.command("clear")
def cache_clear(quiet: QuietOption = False) -> None:
    """Remove all states. The next call computes its meta-prompt again."""
    Screen(quiet).note(f"{counted(PromptCache().clear(), 'state')} removed")
