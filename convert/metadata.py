"""The keys `general.*`: names and makers of the model, and how they sample from it.

The heuristics of the gguf library guess the names, so that they are those of llama.cpp's converter. Their input is read
and checked here; it leaves out `_name_or_path`, which is often a path on somebody's disk.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import yaml  # type: ignore[import-untyped]  # its types are a package of their own

from .folder import MB, Folder

README_LIMIT = 8 * MB
FRONT_MATTER_LIMIT = 256_000  # characters
# Names in generation_config.json (the first that is there counts), name in GGUF, type; in the order of writing.
SAMPLING = (
    (("sequence",), "sequence", str),
    (("top_k",), "top_k", int),
    (("top_p",), "top_p", float),
    (("min_p",), "min_p", float),
    (("xtc_probability",), "xtc_probability", float),
    (("xtc_threshold",), "xtc_threshold", float),
    (("temperature",), "temp", float),
    (("penalty_last_n",), "penalty_last_n", int),
    (("penalty_repeat", "repetition_penalty"), "penalty_repeat", float),
    (("mirostat",), "mirostat", int),
    (("mirostat_tau",), "mirostat_tau", float),
    (("mirostat_eta",), "mirostat_eta", float),
)
TEXTS = (
    "name", "author", "version", "organization", "finetune", "basename", "description", "size_label", "license_name",
    "license_link", "source_url", "source_doi", "source_uuid", "source_repo_url",
)  # fmt: skip
LISTS = {
    "license", "tags", "pipeline_tag", "language", "languages", "base_model", "base_models", "base_model_sources",
    "dataset", "datasets", "dataset_sources",
}  # fmt: skip  # the keys of a model card that may hold more than one text
PATH = re.compile(r"(base_model:(\w+:)?)?(~?/|\.\.?/|[A-Za-z]:\\)")  # a path, also behind a tag's `base_model:`
# For a model with such a name, llama.cpp looks up the tokens of Phi-3, and fails where they are missing.
PHI3 = re.compile(r"phi-?3", re.IGNORECASE)


def read_metadata(folder: Folder, parameters: int) -> gguf.Metadata:
    """Collect the metadata of a model. parameters: their number; for an adapter, the negative of it."""
    params = {"_name_or_path": folder.hub_id} if folder.hub_id else {}
    guess = gguf.Metadata.apply_metadata_heuristic
    try:
        metadata = guess(gguf.Metadata(), _model_card(folder), params, Path(folder.name), parameters)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):  # a card that the heuristics trip over
        metadata = guess(gguf.Metadata(), {}, params, Path(folder.name), parameters)
    _only_texts(metadata)
    metadata.name = PHI3.sub("Phi 3", metadata.name or folder.name)
    if parameters > 0:
        metadata.size_label = metadata.size_label or gguf.size_label(parameters, parameters, 0, 0)
    return metadata


def _model_card(folder: Folder) -> dict[str, Any]:
    """Read the front matter of README.md; one that is no YAML is ignored, as a README is only prose."""
    lines = (folder.text("README.md", README_LIMIT) or "").splitlines()
    if not lines or lines[0] != "---" or "---" not in lines[1:]:
        return {}
    front = "\n".join(lines[1 : lines.index("---", 1)]) + "\n"
    if len(front) > FRONT_MATTER_LIMIT:
        return {}
    # In YAML, "no" is False and tabs are errors; in model cards, "no" means Norwegian and a tab two spaces.
    front = front.replace("- no\n", '- "no"\n').replace("\t", "  ")
    try:
        card = yaml.safe_load(front)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    if not isinstance(card, dict):
        return {}
    kept = {key: value for key, value in card.items() if key in LISTS or not isinstance(value, (dict, list))}
    return {key: _entries(value) for key, value in kept.items() if not _is_path(value)}


def _entries(value: Any) -> Any:
    """Turn the items of a list that are neither texts nor objects into texts, which the heuristics expect."""
    if not isinstance(value, list):
        return value
    return [item if isinstance(item, (str, dict)) else str(item) for item in value if not _is_path(item)]


def _is_path(value: Any) -> bool:
    """Say whether a value is a path on somebody's disk: training programs write some where an id belongs."""
    return isinstance(value, str) and PATH.match(value) is not None


def read_sampling(folder: Folder) -> Iterator[tuple[str, int | float | str]]:
    """Yield GGUF keys and values for how the makers sample from the model; values of a wrong type are left out."""
    generation = folder.json("generation_config.json")
    for names, key, kind in SAMPLING:
        value: Any = next((generation[name] for name in names if generation.get(name) is not None), None)
        if kind is str and isinstance(value, str):
            yield f"general.sampling.{key}", value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) >= 2**31:
            continue
        if kind is float or (kind is int and value == int(value)):
            yield f"general.sampling.{key}", kind(value)


def _only_texts(metadata: gguf.Metadata) -> None:
    """Turn numbers and dates, which YAML made of texts, back into texts, and drop lists and objects."""
    for name in TEXTS:
        setattr(metadata, name, _text(getattr(metadata, name)))
    licenses = metadata.license if isinstance(metadata.license, list) else [metadata.license]
    metadata.license = ",".join(text for text in map(_text, licenses) if text) or None
    for name in ("tags", "languages"):
        values = getattr(metadata, name)
        if values is not None:
            setattr(metadata, name, [text for text in map(_text, values) if text])
    for name in ("base_models", "datasets"):
        entries = getattr(metadata, name)
        if entries is not None:
            kept = [{key: _text(value) for key, value in entry.items() if _text(value)} for entry in entries]
            setattr(metadata, name, kept)


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, (dict, list)):
        return None
    return str(value).encode("utf-8", "replace").decode("utf-8")
