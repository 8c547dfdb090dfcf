"""Download a model into the hub's own cache, and print its path. A stopped download is resumed."""

from __future__ import annotations

import functools
from typing import Annotated

import typer

from metaalign_edge_runtime.errors import LoadError, UsageError, in_bytes
from metaalign_edge_runtime.llama import memory
from metaalign_edge_runtime.llama.gguf import ModelFile
from metaalign_edge_runtime.stores import download, hub, models
from metaalign_edge_runtime.stores.hub import ROOM
from metaalign_edge_runtime.stores.models import REPOSITORY

from .options.groups import JsonOption, OfflineOption, QuietOption, VerboseOption, option
from .terminal.progress import progress_bar
from .terminal.screen import Screen


def pull(
    wanted: Annotated[
        str,
        typer.Argument(metavar="REPO[:QUANT]", help="On the hub: user/repo, user/repo:Q4_K_M or user/repo:FILE."),
    ],
    show: Annotated[
        bool, option("--list", help="List the repository's models and mark the one to be taken; download nothing.")
    ] = False,
    update: Annotated[
        bool, option("--update", help="Ask the hub for a newer version of a model that is here.")
    ] = False,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Download a model into the hub's own cache, and print its path. A stopped download is resumed.

    Without QUANT, the best quantization that fits this machine is taken. HF_HOME, HF_HUB_CACHE and HF_TOKEN count.

    Examples:

        metaalign-edge pull Qwen/Qwen2.5-0.5B-Instruct-GGUF

        metaalign-edge pull bartowski/Llama-3.2-1B-Instruct-GGUF:Q4_K_M

        metaalign-edge pull bartowski/Llama-3.2-1B-Instruct-GGUF --list
    """
    screen, named = Screen(quiet, verbose), REPOSITORY.fullmatch(wanted)
    if not named:
        raise UsageError(f"{wanted!r} is no repository of the hub: they are called user/repo, or user/repo:QUANT")
    repository, tag = named[1], named[2] or ""
    here = [] if show or update else models.stored_as(wanted)
    if not here and hub.is_offline(offline):
        raise hub.absent(wanted)
    if show:
        show_choices(repository, tag, as_json, screen)
        return
    path = (
        here[0].path
        if here
        else download.download_model(repository, tag, screen.note, functools.partial(progress_bar, screen))
    )
    try:
        row = models.model_row(models.name_of(path), ModelFile(path))
    except LoadError as error:
        raise LoadError(f"{error}: `metaalign-edge models rm {wanted}`, then pull it again") from None
    if here:
        screen.note(f"{row['name']} is here already; --update asks the hub for a newer one")
    screen.json({**row, "downloaded": not here}) if as_json else screen.write(f"{path}\n")


def show_choices(repository: str, wanted: str, as_json: bool, screen: Screen) -> None:
    """Print the models of a repository, and mark the one that `pull` would take.

    Raises:
        NotFound, NetworkError, UsageError: as `read_repository` and `choose`.
    """
    _, choices = hub.read_repository(repository)
    free = memory.free_memory()
    taken = hub.choose(repository, choices, wanted, screen.note) if wanted else hub.best_choice(choices, free)
    rows = [
        {
            "name": f"{repository}:{choice.tag}",
            "quantization": choice.quantization or None,
            "files": [file.name for file in choice.files],
            "bytes": choice.bytes,
            "fits": choice.bytes <= ROOM * free,
            "taken": choice is taken,
        }
        for choice in choices
    ]
    if as_json:
        screen.json(rows)
        return
    notes = [
        "taken" if row["taken"] else "" if row["fits"] else f"over {100 * ROOM:.0f} % of the free memory"
        for row in rows
    ]
    cells = [[choice.tag, in_bytes(choice.bytes), note] for choice, note in zip(choices, notes, strict=True)]
    screen.lines(screen.lay_out(["model", "size", ""], cells))
