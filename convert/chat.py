"""Chat templates: found wherever a checkpoint keeps them, and copied, never rendered."""

from __future__ import annotations

from collections.abc import Mapping
from string import ascii_letters, digits
from typing import Any

from metaalign_edge_runtime.errors import LoadError

from .folder import Folder

ORIGINAL = "original"  # the name under which a replaced template is kept


def read_templates(folder: Folder) -> dict[str, str]:
    """Read the checkpoint's chat templates: name -> template, `default` for the one in use.

    A file of its own wins over tokenizer_config.json, as it does in transformers.
    """
    found = _named(folder.json("tokenizer_config.json").get("chat_template"), "tokenizer_config.json")
    found |= _named(folder.json("chat_template.json").get("chat_template"), "chat_template.json")
    text = folder.text("chat_template.jinja")
    if text is not None:
        found["default"] = text
    more = folder.root / "additional_chat_templates"
    if more.is_dir():
        for path in sorted(more.glob("*.jinja")):
            found[_plain(path.stem)] = folder.text(f"additional_chat_templates/{path.name}") or ""
    for name, template in found.items():
        if "\0" in template:
            raise LoadError(f"the chat template {name!r} holds a NUL character, which GGUF cannot")
    return {name: template for name, template in found.items() if template}


def _named(value: Any, source: str) -> dict[str, str]:
    """Take one template, a list of `{name, template}`, or a mapping of names to templates."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        value = {entry.get("name"): entry.get("template") for entry in value}
    if not isinstance(value, Mapping) or not all(isinstance(part, str) for pair in value.items() for part in pair):
        raise LoadError(f"{source}: its chat_template is neither a text nor a list of named texts")
    return {_plain(name): template for name, template in value.items()}


def _plain(name: str) -> str:
    """Make a name fit for a GGUF key."""
    return "".join(letter if letter in ascii_letters + digits else "_" for letter in name)


def templates_to_write(own: Mapping[str, str], chosen: str | None) -> dict[str, str]:
    """Return what goes into the file: the chosen template first in rank, the checkpoint's own never lost."""
    if chosen is None or own.get("default") in (None, chosen):
        return {**own, **({} if chosen is None else {"default": chosen})}
    return {**own, ORIGINAL: own["default"], "default": chosen}
