"""JSON Lines that are appended to: whole lines, whatever becomes of the process, the disk or the last line."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from metaalign_edge_runtime.errors import UsageError
from metaalign_edge_runtime.stores.jsonl import JsonLines, open_named

LINES = ['{"a": "é"}', "{}", '{"b": 2}']


def test_a_line_torn_at_any_byte_gives_way_to_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    file = JsonLines(path)
    assert [file.append(*LINES[:2]), file.append(LINES[2])] == [0, 15]
    file.close()
    data = path.read_bytes()
    for end in range(15, len(data)):
        path.write_bytes(data[:end])
        file = JsonLines(path)
        assert list(file.read()) == [(0, data[:12]), (12, b"{}\n")]
        assert (file.torn, file.end, path.read_bytes()) == (data[15:end], 15, data[:end])  # reading changes nothing
        assert file.append("[]") == 15 and path.read_bytes() == data[:15] + b"[]\n"
        file.close()


def test_a_last_line_that_lacks_only_its_newline_can_be_kept(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"{}\n[]")
    file = JsonLines(path)
    assert [line for _, line in file.read()] == [b"{}\n"] and file.torn == b"[]"
    file.keep_torn()
    assert file.append("1") == 6 and path.read_bytes() == b"{}\n[]\n1\n"
    file.cut(3)
    assert file.append("2") == 3 and path.read_bytes() == b"{}\n2\n"
    with file.reader() as other:
        other.seek(3)
        assert other.readline() == b"2\n"


def test_a_full_disk_leaves_the_file_as_it_was_and_later_there_is_room_again(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "lines")
    file.append(*LINES)
    before = (tmp_path / "lines").read_bytes()
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 4, limits[1]))
        with pytest.raises(OSError):
            file.append(*LINES)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "lines").read_bytes() == before
    file.append(*LINES)
    assert (tmp_path / "lines").read_bytes() == 2 * before


def test_one_process_at_a_time_has_it_open(tmp_path: Path) -> None:
    code = "import sys, metaalign_edge; from pathlib import Path; from metaalign_edge_runtime.stores import jsonl; "
    code += "file = jsonl.JsonLines(Path(sys.argv[1])); print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path / "lines")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout and other.stdout.readline() == b"\n"
        with pytest.raises(UsageError, match=r"another process is writing .* name another with -o"):
            open_named(tmp_path / "lines", "-o")
        other.kill()
    open_named(tmp_path / "lines", "-o").close()
    with pytest.raises(UsageError, match="is no file: name another with -o"):
        open_named(tmp_path, "-o")
