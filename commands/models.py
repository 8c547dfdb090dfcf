"""List, describe and remove the models on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

import metaalign_edge as edge
from metaalign_edge import MARKUP
from metaalign_edge_runtime.errors import CannotWrite, EdgeError, NotFound, UsageError, counted, in_bytes
from metaalign_edge_runtime.llama import memory
from metaalign_edge_runtime.llama.gguf import ModelFile
from metaalign_edge_runtime.stores import config, hub, models
from metaalign_edge_runtime.stores.models import Stored

from .options import in_files
from .options.groups import JsonOption, QuietOption, option
from .terminal.screen import Screen

app = typer.Typer(no_args_is_help=True, help=__doc__)
NameArgument = Annotated[
    str | None, typer.Argument(metavar="NAME", help="A name that `models list` shows, or a path.", show_default=False)
]


@app.command("list")
def models_list(as_json: JsonOption = False) -> None:
    """List the models on this machine; a * marks the one that is used without -m.

    They lie in the hub's cache, in the folder of your own (`config set models DIR`), and where llama.cpp, LM Studio and
    ollama keep theirs. A damaged or incomplete file is listed with its error.

    Examples:

        metaalign-edge models list

        metaalign-edge models list --json
    """
    screen, rows = Screen(), []
    found, default = models.stored_models(), models.default_model()
    if default and not any(default.absolute() == one.path.absolute() for one in found):
        found.append(Stored(str(default), default))  # a path of the user's
    for one in found:
        mark = {"default": default is not None and default.absolute() == one.path.absolute()}
        try:
            file = ModelFile(one.path)
            if file.purpose == "model":
                rows.append(models.model_row(one.name, file) | mark)
        except EdgeError as error:
            rows.append(models.damaged_row(one, error) | mark)
    if as_json:
        screen.json(rows)
        return
    names = [f"{'*' if row['default'] else ' '} {row['name']}" for row in rows]
    cells = [
        [name, in_bytes(row["bytes"]), "-", "-", "-", "-", f"damaged: {row['error']}"]
        if row["error"]
        else [
            name,
            in_bytes(row["bytes"]),
            row["architecture"],
            f"{row['parameters'] / 1e6:,.0f} M",
            row["quantization"],
            f"{row['context']:,}",
            row["template"] or "none",
        ]
        for name, row in zip(names, rows, strict=True)
    ]
    heads = ["  model", "size", "architecture", "parameters", "quantization", "context", "template"]
    screen.lines(screen.lay_out(heads, cells))
    if left := models.unfinished_downloads():
        size = in_bytes(sum(path.stat().st_size for path in left))
        screen.note(f"unfinished downloads: {size}; `pull` goes on with them, `models rm --unfinished` removes them")


@app.command("show")
def models_show(name: NameArgument = None, as_json: JsonOption = False) -> None:
    """Describe a model: its size, template, tiers and license, and the memory that its context takes.

    Examples:

        metaalign-edge models show

        metaalign-edge models show Qwen/Qwen2.5-0.5B-Instruct-GGUF:Q8_0 --json
    """
    screen, file = Screen(), models.open_model(models.local_model(name))
    tokens, words = split_markers(file)
    native = edge.choose_template("auto", file).native if "default" in file.templates else None
    by_layer = memory.cache_bytes(file)
    kv = sum(by_layer) if by_layer else None
    document = {
        **models.model_row(models.name_of(file.path), file),
        "parts": [str(part) for part in file.paths],
        "native": native,
        "marker_tokens": tokens,
        "marker_words": words,
        "kv_bytes_per_1000_tokens": kv and 1000 * kv,
        "license": file.text("general.license") or None,
    }
    if as_json:
        screen.json(document)
        return
    way = {True: "native: it knows the three tiers", False: "wrapped", None: "name one with --template"}[native]
    rows = {
        "model": document["name"],
        "file": f"{file.path}" + (f" and {counted(len(file.paths) - 1, 'more part')}" if len(file.paths) > 1 else ""),
        "size": in_bytes(file.bytes),
        "architecture": file.architecture,
        "parameters": f"{document['parameters']:,}",
        "quantization": document["quantization"],
        "context": f"{file.context:,} tokens, {in_bytes(1000 * kv) if kv else 'it varies how much'} for each 1,000",
        "template": f"{document['template'] or 'none'}, {way}",
        "tokens": " ".join(tokens) or "none of the template's markers",
        "words": " ".join(words) or "none",
        "license": document["license"] or "the file does not say",
    }
    screen.lines(f"{head:<14}{text}" for head, text in rows.items())


def split_markers(file: ModelFile) -> tuple[list[str], list[str]]:
    """Return the markers of a model's template: those that are tokens, which no text can imitate, and the others."""
    found = dict.fromkeys(marker.strip() for marker in MARKUP.findall(file.templates.get("default", "")))
    texts, kinds = list(file.items("tokenizer.ggml.tokens")), list(file.items("tokenizer.ggml.token_type"))
    special = {text for text, kind in zip(texts, kinds, strict=False) if kind in (3, 4)}  # control, user-defined
    return [marker for marker in found if marker in special], [marker for marker in found if marker not in special]


@app.command("rm")
def models_rm(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME...", help="Names that `models list` shows.", show_default=False)
    ] = None,
    unfinished: Annotated[bool, option("--unfinished", help="Remove the rest of stopped downloads.")] = False,
    quiet: QuietOption = False,
) -> None:
    """Remove models from the hub's cache. Models in other programs' folders are left alone.

    Examples:

        metaalign-edge models rm Qwen/Qwen2.5-0.5B-Instruct-GGUF:Q8_0

        metaalign-edge models rm --unfinished
    """
    if not names and not unfinished:
        raise UsageError("name the models to remove: `metaalign-edge models list` shows them")
    gone = [removable(name) for name in names or []]
    freed = hub.remove_models(gone)
    for path in models.unfinished_downloads() if unfinished else []:
        freed += path.stat().st_size
        try:
            path.unlink()
        except OSError as error:
            raise CannotWrite(f"cannot remove {path}: {error.strerror}") from None
    if config.setting("model") in [one.name for one in gone]:
        config.store_setting("model", None)
    Screen(quiet).note(f"{in_bytes(freed)} freed")


def removable(name: str) -> Stored:
    """Return the model of this name in the hub's cache.

    Raises:
        NotFound: it does not exist. UsageError: it is not in the hub's cache, or several have this name.
    """
    found = models.stored_as(name)
    if not found:
        raise NotFound(f"no model {name}: `metaalign-edge models list` shows what there is; a path is removed with rm")
    if not all(one.in_hub for one in found):
        raise UsageError(f"{found[0].path} is not in the hub's cache: only what is there is removed here")
    if len(found) > 1:
        raise UsageError(f"{name} means several: name one of {', '.join(one.name for one in found)}")
    return found[0]


@app.command("default")
def models_default(
    context: typer.Context,
    name: NameArgument = None,
    none: Annotated[bool, option("--none", help="Go back to the embedded model.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show the model that is used without -m, or choose another one.

    Examples:

        metaalign-edge models default Qwen/Qwen2.5-0.5B-Instruct-GGUF:Q8_0

        metaalign-edge models default --none
    """
    if name and none:
        raise UsageError("--none takes no name")
    if name:
        file = models.open_model(models.local_model(name))
        config.store_setting("model", models.name_of(file.path.absolute()))
    elif none:
        config.store_setting("model", None)
    chosen = config.setting("model") or models.EMBEDDED
    path = models.resolve_model(chosen)
    screen = Screen()
    screen.json({"name": chosen, "path": path and str(path)}) if as_json else screen.write(f"{chosen}\n")
    in_files.note_nearer(in_files.settable_key("model"), context, screen)
