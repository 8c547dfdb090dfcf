"""The Hugging Face hub: what it lists, which of it suits this machine, and what its errors mean."""

from __future__ import annotations

import functools
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import CannotWrite, EdgeError, LoadError, NetworkError, NotFound, UsageError, in_bytes, one_line
from ..llama import memory
from ..llama.gguf import parts_of
from . import models
from .models import Stored

TRIES = 3  # attempts to reach the hub, or to receive more of a file
PAUSE = 1.0  # seconds between two attempts
ROOM = 0.6  # the share of free memory that weights may take; contexts and other programs need the rest
USUAL = ("Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")  # below four bits a model loses much, above eight it gains nothing


@functools.cache
def hub() -> Any:
    """Import huggingface_hub, without its telemetry, its log below errors and, off a terminal, its progress bars.

    Raises:
        UsageError: HF_ENDPOINT is no address of a server.
    """
    hub_address()  # huggingface_hub reads HF_ENDPOINT where it is imported
    import huggingface_hub.constants
    import huggingface_hub.errors
    import huggingface_hub.utils

    module: Any = huggingface_hub  # its types lack some documented names
    module.constants.HF_HUB_DISABLE_TELEMETRY = True  # it would ask for a list of programs to look out for
    module.utils.logging.set_verbosity_error()
    if sys.stderr is None or not sys.stderr.isatty():
        module.utils.disable_progress_bars()
    return module


def hub_address() -> str:
    """Return the hub's address: HF_ENDPOINT, else the public one.

    Raises:
        UsageError: HF_ENDPOINT is no address of a server.
    """
    from urllib.parse import urlsplit

    address = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    try:
        parts = urlsplit(address)
        sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # brackets, or a port that is no number
        sound = False
    if not sound:
        raise UsageError("HF_ENDPOINT is no address of a hub: write one as https://huggingface.co")
    return address


def is_offline(wanted: bool) -> bool:
    """Tell whether no connection may be opened: by --offline, or by HF_HUB_OFFLINE."""
    return wanted or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def absent(name: str) -> NetworkError:
    """Return the error for a repository that is not on this machine while offline."""
    return NetworkError(f"{name} is not on this machine, and offline nothing is downloaded: pull it with a network")


def hub_error(error: Exception, repository: str) -> EdgeError:
    """Translate an exception of huggingface_hub into an error of ours that says what to do."""
    errors = hub().errors
    if isinstance(error, errors.LocalEntryNotFoundError):
        return hub_error(error.__cause__, repository) if isinstance(error.__cause__, Exception) else absent(repository)
    status = getattr(getattr(error, "response", None), "status_code", None)
    page = f"{hub_address()}/{repository}"
    if isinstance(error, EdgeError):
        return error
    if isinstance(error, errors.GatedRepoError):
        return NetworkError(f"{repository} is gated: accept its licence on {page}, and set HF_TOKEN to your token")
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return NotFound(f"no hub repository {repository}, or a private one: look at {page}, or set HF_TOKEN")
    if status == 404:
        return NotFound(f"the hub has lost a file of {repository}: look at {page}")
    if status in (401, 403):
        return NetworkError(f"the hub refuses {repository} ({status}): set HF_TOKEN to a token that may read it")
    if status == 429:
        return NetworkError(f"the hub had too many requests from here ({status}): wait some minutes, or set HF_TOKEN")
    if status:
        return NetworkError(f"the hub fails on {repository} ({status}): try again later")
    if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError | TimeoutError):
        return CannotWrite(
            f"cannot write to {models.hub_folder()}: {error.strerror}: make room, or set HF_HOME to another folder"
        )
    if isinstance(error, ImportError):  # httpx names the package that a proxy of this kind needs
        return NetworkError(f"{repository} is not here, and the hub is out of reach: {one_line(error)}")
    if isinstance(error, errors.HTTPError | OSError):
        way = f" by way of the proxy in {found}" if (found := proxy_variable()) else ""
        return NetworkError(
            f"{repository} is not here, and {hub_address()} cannot be reached{way} ({type(error).__name__}): try again"
        )
    return NetworkError(f"the hub's answer on {repository} makes no sense ({type(error).__name__}): try again later")


def proxy_variable() -> str:
    """Return the name of the environment variable whose proxy stands before the hub; "" where none does."""
    from urllib.parse import urlsplit
    from urllib.request import getproxies, proxy_bypass

    address, proxies = urlsplit(hub_address()), getproxies()
    kind = next((kind for kind in (address.scheme, "all") if proxies.get(kind)), None)
    return f"{kind}_proxy" if kind and not proxy_bypass(address.hostname or "") else ""


def is_passing(error: Exception) -> bool:
    """Tell whether another attempt may succeed: the connection broke, or the server failed (status 500 and above)."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return isinstance(error, hub().errors.HTTPError) and (status is None or status >= 500)


def with_retries(ask: Callable[[], Any], repository: str) -> Any:
    """Ask the hub, again after a passing failure: TRIES times in all, PAUSE seconds apart.

    Raises:
        NotFound, NetworkError: it does not answer; see `hub_error`.
    """
    for more in reversed(range(TRIES)):
        try:
            return ask()
        except Exception as error:
            if not (more and is_passing(error)):
                raise hub_error(error, repository) from error
            time.sleep(PAUSE)
    raise AssertionError


Note = Callable[[str], None]  # takes a line for the user
Progress = Callable[[str, int, int], None]  # takes a file's name, the bytes received and the bytes in all


class HubFile(NamedTuple):
    """A file of a repository, as the hub lists it."""

    name: str
    bytes: int


class Choice(NamedTuple):
    """A model of a repository: a GGUF, or all parts of one."""

    tag: str  # behind the colon of -m: its quantisation, or its file name where several have the same
    files: tuple[HubFile, ...]

    @property
    def bytes(self) -> int:
        """Return the size of all parts."""
        return sum(file.bytes for file in self.files)

    @property
    def quantization(self) -> str:
        """The quantisation in its name; an empty string without one."""
        return models.quantization_of(self.files[0].name)

    def is_called(self, wanted: str) -> bool:
        """Tell whether `wanted`, the text behind the colon of -m, is its quantisation or its file name."""
        name = self.files[0].name.lower()
        return wanted.lower() in (self.quantization.lower(), name, Path(name).name)


def read_repository(repository: str) -> tuple[str, list[Choice]]:
    """Ask the hub for a repository's newest commit, and the models in it, the smallest first.

    Raises:
        NotFound: there is none, or no model in it. NetworkError: the hub does not answer, or refuses.
    """
    client = hub().HfApi(endpoint=hub_address())
    patience = hub().constants.HF_HUB_DOWNLOAD_TIMEOUT
    found = with_retries(lambda: client.model_info(repository, files_metadata=True, timeout=patience), repository)
    sizes = {file.rfilename: file.size for file in found.siblings or []}
    whole = [[part.as_posix() for part in parts_of(Path(name))] for name in filter(models.is_main_part, sizes)]
    whole = [parts for parts in whole if all(part in sizes for part in parts)]
    if not re.fullmatch("[0-9a-f]{40}", str(found.sha)) or not all(
        isinstance(sizes[part], int) and sizes[part] > 0 for parts in whole for part in parts
    ):
        raise NetworkError(f"the hub's answer on {repository} makes no sense (no commit, or no sizes): try again later")
    if not whole:
        convert = any(name.endswith(".safetensors") for name in sizes)
        hint = f"`metaalign-edge convert {repository}` makes one" if convert else "look for one that ends in -GGUF"
        raise NotFound(f"{repository} has no whole GGUF model: {hint}")
    alike = Counter(models.quantization_of(parts[0]) for parts in whole)
    choices = [
        Choice(
            tag if (tag := models.quantization_of(parts[0])) and alike[tag] == 1 else parts[0],
            tuple(HubFile(part, sizes[part]) for part in parts),
        )
        for parts in whole
    ]
    return found.sha, sorted(choices, key=lambda choice: (choice.bytes, choice.tag))


def best_choice(choices: Sequence[Choice], free: float) -> Choice | None:
    """Return the largest usual quantisation whose weights fit the free memory, else the largest of all that do."""
    fitting = [choice for choice in choices if choice.bytes <= ROOM * free]
    usual = [choice for choice in fitting if choice.quantization in USUAL]
    return max(usual or fitting, key=lambda choice: choice.bytes, default=None)


def choose(repository: str, choices: Sequence[Choice], wanted: str, note: Note) -> Choice:
    """Return the model of a repository that `wanted` names, or the best one for this machine if it is empty; note why.

    Raises:
        NotFound: there is no such one. UsageError: there are several. LoadError: none fits this machine.
    """
    listed = [f"{choice.tag} ({in_bytes(choice.bytes)})" for choice in choices]
    if wanted:
        found = [choice for choice in choices if choice.is_called(wanted)]
        if not found:
            raise NotFound(f"{repository} has no {wanted}: it has {', '.join(listed)}")
        if len(found) > 1:
            raise UsageError(f"{repository} has several {wanted}: name the file: {', '.join(one.tag for one in found)}")
        return found[0]
    free = memory.free_memory()
    share = f"{100 * ROOM:.0f} % of the {in_bytes(free)} of free memory"
    best = best_choice(choices, free)
    if best is None:
        raise LoadError(f"no model of {repository} fits into {share}: name one to have it anyway: {', '.join(listed)}")
    if len(choices) > 1:
        taken = listed.pop(choices.index(best))
        note(f"taking {taken}, the best that fits into {share}; there are also {', '.join(listed)}")
    return best


def find_checkpoint(source: str, note: Note, offline: bool = False) -> Path:
    """Return a checkpoint's folder; a hub id is fetched into the hub's own cache.

    Raises:
        NotFound: no such folder or repository. NetworkError: the hub is unreachable, or refuses.
    """
    path = Path(source).expanduser()
    if path.exists() or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", source):
        return path
    note(f"fetching {source} from the hub")
    wanted = ["*.json", "*.safetensors", "*.jinja", "*.model", "README.md"]
    try:
        return Path(hub().snapshot_download(source, allow_patterns=wanted, local_files_only=is_offline(offline)))
    except Exception as error:
        raise hub_error(error, source) from error


def remove_models(stored: Sequence[Stored]) -> int:
    """Remove models, all parts and all versions, from the hub's cache; return how many bytes that frees.

    Raises:
        CannotWrite: something is left.
    """
    if not stored:
        return 0
    parts = {(one.repository, part.as_posix()) for one in stored for part in parts_of(Path(one.file))}
    cache, gone, revisions = hub().scan_cache_dir(models.hub_folder()), [], []
    for repository in cache.repos:
        for revision in repository.revisions:
            place = revision.snapshot_path
            mine = [
                file
                for file in revision.files
                if (repository.repo_id, file.file_path.relative_to(place).as_posix()) in parts
            ]
            if len(mine) == len(revision.files):
                revisions.append(revision.commit_hash)
            else:
                gone += mine
    freed = 0
    for strategy in (cache.delete_files(*gone), cache.delete_revisions(*revisions)):
        strategy.execute()
        freed += strategy.expected_freed_size
    if left := [one.path for one in stored if one.path.exists()]:
        raise CannotWrite(f"cannot remove {left[0]}: look at who owns it")
    return freed
