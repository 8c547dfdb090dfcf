"""Chat templates of a checkpoint: found in all places where it may keep them, and copied, never rendered."""

from __future__ import annotations

import os
from collections.abc import Mapping
from string import ascii_letters, digits
from typing import Any

from metaalign_edge_runtime.errors import LoadError

from .folder import Folder

ORIGINAL = "original"  # name that the checkpoint's own template gets in the file if another replaces it


def read_templates(folder: Folder) -> dict[str, str]:
    """Read the chat templates of a checkpoint: name -> template; `default` is the one in use.

    A separate file comes before tokenizer_config.json, as in transformers.
    """
    found = _named(folder.json("tokenizer_config.json").get("chat_template"), "tokenizer_config.json")
    found |= _named(folder.json("chat_template.json").get("chat_template"), "chat_template.json")
    text = folder.text("chat_template.jinja")
    if text is not None:
        found["default"] = text
    more = folder.root / "additional_chat_templates"
    if os.path.isdir(more):
        for path in sorted(more.glob("*.jinja")):
            found[_plain(path.stem)] = folder.text(f"additional_chat_templates/{path.name}") or ""
    for name, template in found.items():
        if "\0" in template:
            raise LoadError(f"the chat template {name!r} holds a NUL character, which GGUF cannot")
    return {name: template for name, template in found.items() if template}


def _named(value: Any, source: str) -> dict[str, str]:
    """Read `chat_template`: one template, a list of `{name, template}`, or a mapping of names to templates."""
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
    """Return a name with only those letters that a GGUF key may have."""
    return "".join(letter if letter in ascii_letters + digits else "_" for letter in name)


def templates_to_write(own: Mapping[str, str], chosen: str | None) -> dict[str, str]:
    """Return the templates for the GGUF file: `chosen` as the default, and all of the checkpoint's own."""
    if chosen is None or own.get("default") in (None, chosen):
        return {**own, **({} if chosen is None else {"default": chosen})}
    return {**own, ORIGINAL: own["default"], "default": chosen}
