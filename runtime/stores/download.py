"""Downloads into the hub's own cache, which go on where they stopped and are compared with their checksums.

huggingface_hub keeps nothing of a download that was stopped, and compares no checksums.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ..errors import CannotWrite, NetworkError, in_bytes
from . import config, files, hub, models
from .hub import PAUSE, TRIES, HubFile, Note, Progress


class Download(NamedTuple):
    """A file on its way into the hub's cache."""

    file: HubFile
    url: str
    checksum: str  # SHA-256 of a file in LFS, SHA-1 of one in git
    blob: Path  # its path when it is complete

    @property
    def partial(self) -> Path:
        """The path of the file until it is complete."""
        return self.blob.with_name(f"{self.blob.name}.incomplete")

    @property
    def have(self) -> int:
        """The bytes that are on this machine."""
        for path in (self.blob, self.partial):
            with contextlib.suppress(OSError):
                return path.stat().st_size
        return 0


def find_download(repository: str, commit: str, file: HubFile) -> Download:
    """Ask the hub for a file's address and checksum.

    Raises:
        NotFound, NetworkError: it does not answer, or contradicts itself.
    """
    url = hub.hub().hf_hub_url(repository, file.name, revision=commit, endpoint=hub.hub_address())
    found = hub.with_retries(lambda: hub.hub().get_hf_file_metadata(url, endpoint=hub.hub_address()), repository)
    if found.size != file.bytes or not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", found.etag or ""):
        raise NetworkError(
            f"the hub says that {file.name} has {file.bytes:,} bytes, and then {found.size or 0:,} with the checksum "
            f"{found.etag}: nothing was downloaded"
        )
    folder = models.hub_folder() / f"models--{repository.replace('/', '--')}"
    return Download(file, url, found.etag, folder / "blobs" / found.etag)


def receive(download: Download, repository: str, tell: Callable[[int], None]) -> None:
    """Receive the missing bytes of a file. After a broken connection it goes on there, as long as more bytes come.

    Raises:
        NetworkError: there comes no more, or too much. CannotWrite: the disk is full.
    """
    tries, size, patience = TRIES, download.file.bytes, hub.hub().constants.HF_HUB_DOWNLOAD_TIMEOUT
    while (have := download.have) < size:
        headers = {**hub.hub().utils.build_hf_headers(), "Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        error: Exception = NetworkError(f"the hub ends {download.file.name} before its {size:,} bytes: try again later")
        try:
            with (
                download.partial.open("ab") as out,
                hub.hub().utils.get_session().stream("GET", download.url, headers=headers, timeout=patience) as answer,
            ):
                hub.hub().utils.hf_raise_for_status(answer)
                if answer.status_code != 206:  # the server knows no ranges, and sends the whole file
                    out.seek(0)
                    out.truncate()
                for data in answer.iter_bytes():
                    out.write(data)
                    tell(out.tell())
                    if out.tell() > size:
                        break
        except Exception as found:
            if not hub.is_passing(found):
                raise hub.hub_error(found, repository) from found
            error = found
        tries = TRIES if download.have > have else tries - 1
        if not tries:
            raise hub.hub_error(error, repository) from error
        if download.have < size:
            time.sleep(PAUSE)


def check_download(download: Download) -> None:
    """Compare a received file with its checksum; a wrong one is removed.

    Raises:
        NetworkError: it is not what the hub said it would be.
    """
    import hashlib

    size = download.partial.stat().st_size
    checksum = hashlib.sha256() if len(download.checksum) == 64 else hashlib.sha1(b"blob %d\0" % size)
    with download.partial.open("rb") as file:
        while data := file.read(1 << 20):
            checksum.update(data)
    if size != download.file.bytes or checksum.hexdigest() != download.checksum:
        download.partial.unlink()
        raise NetworkError(f"what came as {download.file.name} is not what the hub promised: it was removed; try again")


def fetch(download: Download, repository: str, commit: str, tell: Callable[[int], None]) -> Path:
    """Download a file, unless it is here, and give it its name in the hub's cache.

    Raises:
        NetworkError: it does not come, or not as promised. CannotWrite: there is no writing.
    """
    folder = download.blob.parent.parent
    try:
        download.blob.parent.mkdir(parents=True, exist_ok=True)
        with files.locked(models.hub_folder() / ".locks" / folder.name / download.blob.name):
            if not download.blob.exists():
                receive(download, repository, tell)
                check_download(download)
                os.replace(download.partial, download.blob)
        (folder / "refs").mkdir(exist_ok=True)
        with files.replacing(folder / "refs" / "main") as part:
            part.write_text(commit, "ascii")
        place = {"cache_dir": models.hub_folder(), "endpoint": hub.hub_address()}
        return Path(hub.hub().hf_hub_download(repository, download.file.name, revision=commit, **place))
    except Exception as error:
        found = hub.hub_error(error, repository)
        if isinstance(found, CannotWrite):
            found = CannotWrite(f"{found}; {in_bytes(download.file.bytes - download.have)} more are needed")
        raise found from error


def download_model(
    repository: str, wanted: str, note: Note, bar: Callable[[], contextlib.AbstractContextManager[Progress]]
) -> Path:
    """Download a model into the hub's own cache; return where it, or its first part, lies.

    What was stopped goes on where it was.

    Args:
        bar: shows progress in a `with`, which yields what is to be told of it.

    Raises:
        NotFound: there is no such one. NetworkError: the hub does not give it. LoadError: nothing fits this machine.
        CannotWrite: there is no room for it.
    """
    commit, choices = hub.read_repository(repository)
    choice = hub.choose(repository, choices, wanted, note)
    downloads = [find_download(repository, commit, file) for file in choice.files]
    have = sum(download.have for download in downloads)
    going_on = f", of which {in_bytes(have)} are here" if have else ""
    note(f"downloading {repository}:{choice.tag}, {in_bytes(choice.bytes)}{going_on}, to {models.hub_folder()}")
    place, free = files.room_at(models.hub_folder())
    if choice.bytes - have > free:
        raise CannotWrite(
            f"{repository}:{choice.tag} needs {in_bytes(choice.bytes - have)} on the disk, and {place} has "
            f"{in_bytes(free)}: make room, or set HF_HOME to another folder"
        )
    paths, before = [], 0
    try:
        with bar() as progress:

            def tell(before: int, have: int) -> None:
                progress(choice.tag, before + have, choice.bytes)

            for download in downloads:
                paths.append(fetch(download, repository, commit, functools.partial(tell, before)))
                before += download.file.bytes
    except KeyboardInterrupt:
        note("interrupted: the same command goes on from there")
        raise
    return paths[0]


def find_model(
    name: str | None, offline: bool, note: Note, bar: Callable[[], contextlib.AbstractContextManager[Progress]]
) -> Path:
    """Return the path of the model that -m names; one of the hub is downloaded if need be, unless offline.

    Raises:
        NotFound: there is no such one. NetworkError, CannotWrite: it cannot be had from the hub.
    """
    if path := models.resolve_model(name):
        return path
    wanted = name or config.setting("model") or ""
    if hub.is_offline(offline):
        raise hub.absent(wanted)
    repository, _, quantization = wanted.partition(":")
    return download_model(repository, quantization, note, bar)
