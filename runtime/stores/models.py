"""The models on this machine: in the hub's cache, in other programs' folders, and the embedded one."""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import LoadError, NotFound, did_you_mean
from ..llama.gguf import PART, ModelFile, parts_of
from . import config, files


def embedded_model() -> Path:
    """Return the model that comes with the toolkit."""
    return files.package_folder("models") / "metaalign-demo-q8_0.gguf"


REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(.+))?")  # user/repo[:QUANT], on the hub
QUANTIZATION = re.compile(
    r"(?:^|[-_./])((?:UD-)?(?:I?Q[1-8]|TQ[12]|MXFP4|NVFP4|BF16|FP?16|FP?32)(?:_[A-Z0-9]+)*)(?=[-_./]|$)", re.IGNORECASE
)
SIDE_FILE = re.compile(
    r"(?:^|[-_./])(?:mmproj|imatrix|lora|adapter|embed(?:dings?)?|rerank(?:er)?|c?vector|vocab|mtp|draft)(?=[-_.]|$)",
    re.IGNORECASE,
)


def quantization_of(name: str) -> str:
    """Return the quantisation in a GGUF's name or its folder's, such as Q4_K_M; an empty string without one."""
    found = QUANTIZATION.findall(PART.sub("", name).removesuffix(".gguf"))
    return re.sub("^FP", "F", found[-1].upper()) if found else ""


def is_main_part(name: str) -> bool:
    """Tell by its name whether a file is a model or its first part, not a projector, an adapter or the like."""
    part = PART.search(name)
    own = Path(name).name
    plain = own.lower().endswith(".gguf") and not own.startswith(".") and not SIDE_FILE.search(own)
    return plain and (part is None or int(part[1]) == 1)


def hub_folder() -> Path:
    """Return the hub's own cache folder, found as huggingface_hub does; importing that library takes 0.2 s."""
    get = os.environ.get
    home = get("HF_HOME") or os.path.join(get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    named = get("HF_HUB_CACHE") or get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    folder = os.path.expandvars(os.path.expanduser(named))
    return Path(os.devnull if folder.startswith("~") else folder)  # a user without a home has none


def other_folders() -> list[Path]:
    """List the folders in which llama.cpp's programs and LM Studio keep GGUFs."""
    from platformdirs import PlatformDirs

    llama = os.environ.get("LLAMA_CACHE") or os.path.join(PlatformDirs(opinion=False).user_cache_dir, "llama.cpp")
    places = [llama, "~/.lmstudio/models", "~/.cache/lm-studio/models"]
    return [Path(os.path.expanduser(place)) for place in places]


class Stored(NamedTuple):
    """A model on this machine."""

    name: str  # as -m takes it: user/repo:QUANT, or the file's name without .gguf
    path: Path  # of its first part
    repository: str = ""  # user/repo, where the folder's name tells it
    file: str = ""  # its path in the repository
    in_hub: bool = False  # in the hub's own cache; other programs' folders are only read


def stored_models() -> list[Stored]:
    """List the models in the hub's cache, in other programs' folders, and the embedded one. No file is opened."""
    found: list[Stored] = []
    for folder in dict.fromkeys([hub_folder(), *other_folders()]):
        found += models_within(folder, in_hub=folder == hub_folder())
    distinct = {(one.repository, one.file) for one in found}
    alike = Counter((repository, quantization_of(file)) for repository, file in distinct)
    named: dict[str, Stored] = {}
    for one in found:
        tag = quantization_of(one.file)
        alone = tag and alike[one.repository, tag] == 1
        name = f"{one.repository}:{tag if alone else one.file}" if one.repository else one.path.stem
        name = name if name not in named else str(one.path)
        named[name] = one._replace(name=name)
    return [*named.values(), Stored("metaalign-demo", embedded_model())]


NO_MODELS = (".", "datasets--", "spaces--", "kernels--")  # beginnings of the names of folders that hold no models


def modified(path: Path) -> float:
    """Return the modification time of a file or link, in seconds since 1970; 0 if it is gone."""
    with contextlib.suppress(OSError):
        return path.lstat().st_mtime
    return 0.0


def models_within(folder: Path, in_hub: bool) -> list[Stored]:
    """List the models below a folder: of each file of a repository in the hub's cache, the newest version."""
    found: dict[tuple[str, str], Stored] = {}
    for place, below, names in os.walk(folder):
        below[:] = sorted(name for name in below if name not in ("blobs", "refs") and not name.startswith(NO_MODELS))
        for name in sorted(filter(is_main_part, names)):
            path = Path(place) / name
            repository, file = "", name
            parts = path.relative_to(folder).parts
            if parts[0].startswith("models--") and parts[1:2] == ("snapshots",) and len(parts) > 3:
                repository, file = parts[0].removeprefix("models--").replace("--", "/"), "/".join(parts[3:])
            elif len(parts) > 2:  # LM Studio's publisher/repository/file
                repository, file = "/".join(parts[:2]), "/".join(parts[2:])
            key = (repository, file) if repository else ("", str(path))
            if key not in found or modified(path) >= modified(found[key].path):
                found[key] = Stored("", path, repository, file, in_hub)
    return list(found.values())


def model_names() -> list[str]:
    """List the names that -m takes for the models on this machine."""
    return [one.name for one in stored_models()]


def still_there(path: Path) -> Path | None:
    """Return the path of a model that was used before, or that of a newer version of it in the hub's cache.

    None: it is not there any more. The embedded one always is, wherever this toolkit was installed before.
    """
    if path.is_absolute() and os.path.isfile(path):
        return path
    if path.name == embedded_model().name:
        return embedded_model()

    def versionless(place: Path) -> str:
        return re.sub("(/snapshots)/[^/]+/", r"\1/", place.absolute().as_posix())

    return next((one.path for one in stored_models() if versionless(one.path) == versionless(path)), None)


def name_of(path: Path) -> str:
    """Return the name under which the model at a path is listed; the path itself if it is not listed."""
    return next((one.name for one in stored_models() if one.path.absolute() == path.absolute()), str(path))


def stored_as(wanted: str) -> list[Stored]:
    """List the models on this machine with this name or user/repo[:QUANT], the newest first."""
    models, low = stored_models(), wanted.lower()
    exact = [one for one in models if one.name.lower() == low]
    repository, _, tag = low.partition(":")
    found = exact or [
        one
        for one in models
        if one.repository.lower() == repository
        and (not tag or tag in (quantization_of(one.file).lower(), one.file.lower(), Path(one.file).name.lower()))
    ]
    return sorted(found, key=lambda one: -modified(one.path))


def resolve_model(name: str | None) -> Path | None:
    """Find a model's file on this machine: the default, a path, user/repo[:QUANT], or a name that `models list` shows.

    None: it names a repository of the hub, and nothing of it is here.

    Raises:
        NotFound: there is no such file, and no such name.
    """
    if not name:
        chosen = config.setting("model")
        return resolve_model(chosen) if chosen else embedded_model()
    path, repository = Path(name).expanduser(), REPOSITORY.fullmatch(name)
    if os.path.isfile(path):  # Path.is_file raises if the name is too long, or its folder closed
        return path
    if os.path.isdir(path):
        raise NotFound(
            f"{name} is a folder: convert a checkpoint with `metaalign-edge convert {name}`, or give a GGUF file"
        )
    if (repository and (repository[2] or not name.endswith(".gguf"))) or not files.looks_like_path(name, ".gguf"):
        if found := stored_as(name):
            return found[0].path
        if repository:
            return None
        hint = did_you_mean(name, model_names(), "`metaalign-edge models list` shows what there is")
        raise NotFound(f"no model file and no model {name}: {hint}")
    raise NotFound(f"no model file {name}: give the path of a GGUF file, or leave -m out for the default model")


def local_model(name: str | None) -> Path:
    """Return the path of the model that -m names; nothing is downloaded.

    Raises:
        NotFound: there is no such one on this machine.
    """
    if (path := resolve_model(name)) is None:
        wanted = name or config.setting("model")
        raise NotFound(f"{wanted} is not on this machine: `metaalign-edge pull {wanted}` downloads it")
    return path


def open_model(path: Path) -> ModelFile:
    """Read a model's metadata.

    Raises:
        NotFound: there is no such file. LoadError: it is bad, or no model.
    """
    file = ModelFile(path)
    if file.purpose in ("adapter", "mmproj", "imatrix"):
        raise LoadError(f"{path} is no model but a file for one ({file.purpose}): name the model itself with -m")
    return file


def model_row(name: str, file: ModelFile) -> dict[str, Any]:
    """Return a model's row of `models list`.

    Raises:
        LoadError: it is damaged.
    """
    file.check_whole()
    return {
        "name": name,
        "path": str(file.path),
        "bytes": file.bytes,
        "architecture": file.architecture,
        "parameters": file.parameters,
        "quantization": file.quantization,
        "context": file.context,
        "template": file.metadata.get("metaalign.template") or ("embedded" if file.templates else None),
        "error": None,
    }


def damaged_row(one: Stored, error: Exception) -> dict[str, Any]:
    """Return the row of `models list` for a model that cannot be loaded."""
    nothing = dict.fromkeys(("architecture", "parameters", "quantization", "context", "template"))
    size = sum(part.stat().st_size for part in parts_of(one.path) if part.is_file())
    return {"name": one.name, "path": str(one.path), "bytes": size, **nothing, "error": str(error)}


def unfinished_downloads() -> list[Path]:
    """List the unfinished downloads in the hub's cache, ours and other programs'."""
    return sorted(hub_folder().glob("models--*/blobs/*.incomplete"))
