"""A file is written whole or not at all: its temporary file, who else writes it, and what killed writers leave."""

from __future__ import annotations

import errno
import os
import pwd
import stat
from pathlib import Path

import pytest

import metaalign_edge as edge  # noqa: F401  # in a checkout it finds the folders
from metaalign_edge_runtime.stores import files, models


def names(folder: Path) -> set[str]:
    """List what lies in a folder."""
    return {path.name for path in folder.iterdir()}


def test_a_file_gets_its_name_when_it_is_whole(tmp_path: Path) -> None:
    with files.replacing(tmp_path / "x", durable=True) as part:
        part.write_text("new")
        assert names(tmp_path) == {part.name}
    assert (tmp_path / "x").read_text() == "new" and names(tmp_path) == {"x"}


def test_what_fails_leaves_what_there_was(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("old")
    with pytest.raises(ZeroDivisionError), files.replacing(tmp_path / "x") as part:
        part.write_text("half")
        raise ZeroDivisionError
    with files.replacing(tmp_path / "x", keep=False) as part:
        part.write_text("only tried")
    assert (tmp_path / "x").read_text() == "old" and names(tmp_path) == {"x"}


def test_a_user_without_a_home_has_folders_in_which_nothing_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(number: int) -> None:
        raise KeyError(number)

    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)  # as for a user that a container was started with
    for kind in ("cache", "config", "data"):
        assert files.system_folder(kind).parent == Path(os.devnull)
    assert not any(folder.exists() for folder in models.other_folders())


def test_two_writers_of_a_file_do_not_meet_and_the_last_one_wins(tmp_path: Path) -> None:
    with files.replacing(tmp_path / "x") as first, files.replacing(tmp_path / "x") as second:
        first.write_text("first")
        second.write_text("second")
    assert (tmp_path / "x").read_text() == "first" and names(tmp_path) == {"x"}


def test_a_writer_that_must_be_alone_refuses_to_be_the_second(tmp_path: Path) -> None:
    with files.replacing(tmp_path / "x") as part:
        with pytest.raises(BlockingIOError), files.replacing(tmp_path / "x", alone=True):
            pass
        part.write_text("first")
    assert (tmp_path / "x").read_text() == "first"


def test_what_killed_writers_left_is_removed_at_once(tmp_path: Path) -> None:
    for name in (".x.metaalign-part", ".other.3.metaalign-part", ".x.1234", ".x.lock"):
        (tmp_path / name).write_text("half")
    (tmp_path / ".link.metaalign-part").symlink_to(tmp_path / ".x.lock")
    with files.replacing(tmp_path / "x", alone=True) as part:
        part.write_text("whole")
    assert names(tmp_path) == {"x", ".x.1234", ".x.lock", ".link.metaalign-part"}


def test_where_nothing_can_be_locked_a_file_is_left_behind_after_an_hour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    for name in (".x.metaalign-part", ".old.metaalign-part"):
        (tmp_path / name).write_text("half")
    os.utime(tmp_path / ".old.metaalign-part", (1, 1))
    with files.replacing(tmp_path / "x") as part:
        part.write_text("whole")
    assert names(tmp_path) == {"x", ".x.metaalign-part"} and (tmp_path / "x").read_text() == "whole"


def test_permissions_are_those_of_a_new_file_or_as_asked_for(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    for name, mode in (("any", 0o666), ("mine", 0o600)):
        with files.replacing(tmp_path / name, mode=mode) as part:
            part.write_text("x")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes["any"] == modes["plain"] and modes["mine"] == 0o600


def test_an_error_names_the_file_that_the_user_knows(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere" / "x", tmp_path / ("x" * 256), tmp_path):
        with pytest.raises(OSError) as caught, files.replacing(path):
            pass
        assert caught.value.filename == str(path)
    with pytest.raises(FileNotFoundError) as missing, files.replacing(tmp_path / "x") as part:
        part.unlink()
    assert missing.value.filename == str(tmp_path / "x")
