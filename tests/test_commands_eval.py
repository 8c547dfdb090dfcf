"""`eval`: what is asked, what is kept, how it is told, and what can go wrong. No model's quality is asserted."""

from __future__ import annotations

import importlib.util
import json
import os
import pty
import select
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
import pytest

import metaalign_edge as edge
from metaalign_edge_commands.measure import adherence
from metaalign_edge_commands.terminal import tables
from metaalign_edge_preferences import findings, ifeval, report
from metaalign_edge_preferences import suite as suites
from metaalign_edge_runtime.stores import files

Run = Callable[..., "subprocess.CompletedProcess[str]"]
COMMAND = [sys.executable, "-m", "metaalign_edge", "eval"]
TEMPLATE = Path(edge.__file__).parent / "preferences" / "report.html.jinja"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("METAALIGN_EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_suite(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return write_suite(
        tmp_path / "own.jsonl",
        {"id": "caps", "query": "What is tea?", "user_info": "Answer in capital letters.", "values": ["case.upper"]},
        {"id": "one", "query": "What is the moon?", "user_info": "One sentence.", "values": ["length.one"]},
        {"id": "fact", "query": "What is bread?", "facts": ["Bread is a food made from flour, water and salt."]},
        {"id": "talk", "section": "mine", "queries": ["What is rain?", "And snow?", "And ice?"],
         "system_info": "Be brief.", "earlier": ["", "I am a cook."], "values": ["length.one"]},
    )  # fmt: skip


def rates(tree: Any) -> Iterator[dict[str, float]]:
    """Yield every rate of a JSON document."""
    if isinstance(tree, dict):
        if {"rate", "n", "low", "high"} <= set(tree):
            yield tree
        for branch in tree.values():
            yield from rates(branch)


# --- the results ------------------------------------------------------------------------------------------------------


def test_the_json_document_has_the_fields_of_the_contract(run: Run, demo: Path) -> None:
    result = run("eval", "--size", "1", "-n", "24", "--json", timeout=240)
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    fields = "model n adherence conflict steerability facts plain combined multi_turn opinions priority seconds suite seed size template"
    assert [key for key in document if key in fields.split()] == fields.split()
    assert (document["model"], document["suite"], document["seed"], document["size"]) == (demo.name, "builtin", 0, 1)
    assert set(document["adherence"]) >= {
        "seen", "held_out", "by_family", "explicit", "implicit", "not_by_default", "topic_transfer"
    }  # fmt: skip
    assert set(document["adherence"]["held_out"]) == {"combination", "frame", "word"}
    assert set(document["conflict"]) == {"system", "user", "neither", "control"}
    assert document["n"] == len(suites.builtin(0, 1)) and document["errors"] == []
    assert document["template"] == "metaalign" and document["seconds"] > 0
    found = list(rates(document))
    assert len(found) > 25
    assert all(0 <= one["low"] <= one["rate"] <= one["high"] <= 1 and one["n"] >= 0 for one in found)
    assert result.stderr.count("\n") == 1 and "answers" in result.stderr  # one line off a terminal


def test_a_pipe_gets_aligned_text_without_a_sign_of_ansi(run: Run, tiny: Path, own: Path) -> None:
    result = run("eval", "-m", str(tiny), "--suite", str(own), "-n", "4", "-q")
    assert (result.returncode, result.stderr) == (0, "")
    head, blank, columns, *rows = result.stdout.splitlines()
    assert head == f"tiny.gguf: {own}, seed 0, 4 cases" and blank == ""
    ends = {row.index(" %") for row in rows if " %" in row}
    assert len(ends) == 1 and columns.split() == ["rate", "95", "%", "n", "what"]
    assert "\x1b" not in result.stdout and any(row.startswith("  mine ") for row in rows)


def test_a_terminal_gets_a_table_that_fits_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "70")
    rows = [
        ["adherence"],
        ["  seen", "50.0 %", "1.0-99.0", "2", "a long meaning " * 9],
        ["[b]x[/b]", "1", "2", "3", ""],
    ]
    lines = tables.rich_table(["", "rate", "95 %", "n", "what"], rows)
    assert all(len(line) <= 70 for line in lines) and len(lines) > 5
    assert "[b]x[/b]" in "".join(lines) and "\x1b" not in "".join(lines) and "meaning" in "".join(lines)
    monkeypatch.setenv("COLUMNS", "45")
    lines = tables.rich_table(["", "rate", "95 %", "n", "what"], rows)
    assert "1.0-99.0" in "".join(lines) and "meaning" not in "".join(lines)


def test_earlier_turns_are_the_models_own_and_stand_under_their_own_meta_prompt(tiny: Path, own: Path) -> None:
    talk = suites.read_suite(own)[-1]
    first, second, last = (adherence.case_dialog(talk, ["a", "b"][:turns]) for turns in range(3))
    assert first == edge.Dialog("", "I am a cook.", (edge.Turn("What is rain?"),))
    assert second.turns == (edge.Turn("What is rain?", "a"), edge.Turn("And snow?")) and not second.system_info
    assert (last.system_info, last.user_info, last.turns[1].response) == ("Be brief.", "", "b")
    answers = own.with_name("answers.jsonl")
    assert edge.run(["eval", "-m", str(tiny), "--suite", str(own), "-n", "4", "-q", "--answers", str(answers)]) == 0
    _, *kept = map(json.loads, answers.read_text().splitlines())
    assert sorted((one["id"], one["turn"]) for one in kept) == [
        ("caps", 0), ("fact", 0), ("one", 0), ("talk", 0), ("talk", 1), ("talk", 2),
    ]  # fmt: skip


def test_what_a_preference_changes_is_seen_against_the_same_questions_without_a_meta_prompt() -> None:
    suite = findings.find_suite("builtin", 0, 2, "system")
    plain = suite.all_cases[len(suite.cases) :]
    compared = [case for case in suite.cases if case.section in ("seen", "combination", "frame")]
    assert [case.queries for case in plain] == list(dict.fromkeys(case.queries for case in compared))
    assert len(plain) > 2 and not any(case.system_info or case.user_info for case in plain)


def test_a_conflict_has_a_control_without_system_info() -> None:
    cases = {case.id: case for case in suites.builtin(0, 3)}
    for number in range(3):
        case, control = cases[f"conflict/{number}"], cases[f"control/{number}"]
        assert case.system_info and not control.system_info and not control.losing
        assert (control.queries, control.user_info, control.checks) == (case.queries, case.user_info, case.losing)


def judged(*outcomes: bool, section: str = "seen") -> list[Any]:
    """Cases of the family `case`, obeyed or not."""
    check = suites.Check("case.upper", "letter_case", {"case": "upper"})
    cases = [suites.Case(f"{section}/{n}", section, ("Tea?",), checks=(check,)) for n in range(len(outcomes))]
    return [suites.Judged(case, "TEA." if right else "Tea.") for case, right in zip(cases, outcomes, strict=True)]


def test_each_rate_counts_its_own() -> None:
    upper, lower = (suites.Check(f"case.{case}", "letter_case", {"case": case}) for case in ("upper", "lower"))

    def conflict(answer: str) -> Any:
        return suites.Judged(suites.Case("c", "conflict", ("Tea?",), checks=(upper,), losing=(lower,)), answer)

    def seen(answer: str, plain: str) -> Any:
        case = suites.Case("s", "seen", ("Tea?",), checks=(upper,), facts=("Tea is a hot drink.",))
        return suites.Judged(case, answer, plain)

    plain = "Tea is a hot drink. It is brown."
    found = report.results([
        *map(conflict, ("TEA IS HOT.", "tea is hot.", "Tea is hot.", "tea is wet.")),
        suites.Judged(suites.Case("c", "control", ("Tea?",), checks=(lower,)), "tea is hot."),
        *(seen("TEA IS A HOT DRINK.", yardstick) for yardstick in (plain, plain.upper())),
        seen("IT IS BROWN.", plain),
        seen("TEA.", ""),
    ])  # fmt: skip
    counts = {key: (round(rate.rate * rate.n), rate.n) for key, rate in found["conflict"].items()}
    assert counts == {"system": (1, 4), "user": (2, 4), "neither": (1, 4), "control": (1, 1)}
    assert (found["adherence"]["seen"].n, found["adherence"]["not_by_default"].n) == (4, 2)
    assert (found["facts"].rate, found["facts"].n) == (pytest.approx(2 / 3), 3)  # of those with an answer to compare


def test_two_models_are_compared_case_by_case() -> None:
    first, second = judged(*[False] * 8, True, True), judged(*[True] * 9, False)
    differences = report.compare(first, second, report.results)
    seen = differences["adherence", "seen"]
    assert (seen.points, seen.n) == (-70.0, 10) and seen.p == pytest.approx(2 * 10 / 2**9)
    assert report.verdicts(differences) == {"worse": ["case"], "better": [], "not_distinguishable": []}
    assert report.verdicts(report.compare(second, first, report.results))["better"] == ["case"]
    same = report.compare(first, first, report.results)
    assert report.verdicts(same)["not_distinguishable"] == ["case"]


def test_pairs_are_compared_as_pairs() -> None:
    def pair(*outcomes: bool) -> list[Any]:
        found = judged(*outcomes, section="opposite")
        return [edge.replace(one, case=edge.replace(one.case, pair="p")) for one in found]

    differences = report.compare(pair(True, True), pair(True, False), report.results)
    assert (differences[("steerability",)].points, differences[("steerability",)].n) == (100.0, 1)


def test_against_adds_the_second_models_rates_and_the_differences(here: Run, tiny: Path, demo: Path, own: Path) -> None:
    arguments = ("eval", "-m", str(tiny), "--against", str(demo), "--suite", str(own), "-n", "8")
    result = here(*arguments, "--json")
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    other = document["against"]
    assert (document["model"], other["model"], other["n"]) == ("tiny.gguf", demo.name, 4)
    gap = other["differences"]["adherence"]["own"]
    assert set(gap) == {"points", "n", "low", "high", "p"} and gap["n"] == 3
    ours, theirs = document["adherence"]["own"]["rate"], other["adherence"]["own"]["rate"]
    assert gap["points"] == pytest.approx(100 * (ours - theirs), abs=0.02)
    assert set(other["families"]) == {"worse", "better", "not_distinguishable"}
    text = here(*arguments).stdout
    assert f"tiny.gguf against {demo.name}" in text and "not distinguishable: case, length" in text


def test_a_model_is_compared_with_itself_under_another_template(
    here: Run, demo: Path, own: Path, tmp_path: Path
) -> None:
    page, answers = tmp_path / "page.html", tmp_path / "answers.jsonl"
    shown = ("--json", "--report", str(page), "--answers", str(answers))
    result = here("eval", "--against-template", "chatml", "--suite", str(own), "-n", "8", *shown)
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert (document["template"], document["against"]["template"]) == ("metaalign", "chatml")
    assert (
        answers.read_text().splitlines()[1:] != answers.with_name("answers.against.jsonl").read_text().splitlines()[1:]
    )
    text = page.read_text()
    assert "metaalign, native against chatml, wrapped" in text and f"{demo.name} (chatml)" in text


def test_a_model_that_is_compared_with_itself_is_asked_once(here: Run, tiny: Path, own: Path, cache: Path) -> None:
    result = here("eval", "-m", str(tiny), "--against", str(tiny), "--suite", str(own), "-n", "3", "--json")
    assert result.returncode == 0, result.stderr
    (answers,) = cache.glob("answers/*")
    assert answers.read_bytes().count(b"\n") == 7 and "6 answers, 6 of them given" in result.stderr
    assert json.loads(result.stdout)["against"]["differences"]["adherence"]["own"]["points"] == 0


@pytest.mark.slow
def test_strengths_are_compared_with_that_of_one(here: Run, demo: Path, own: Path, tmp_path: Path) -> None:
    page, chart, answers = tmp_path / "page.html", tmp_path / "chart.svg", tmp_path / "answers.jsonl"
    asked = ("eval", "--suite", str(own), "-n", "30")
    outputs = ("--report", str(page), "--chart", str(chart), "--answers", str(answers))
    result = here(*asked, "--strength", "pref=1,0,1", *outputs, "--json")
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    none, usual = document["strengths"]
    assert (document["model"], document["tier"], none["strength"], usual["strength"]) == (demo.name, "pref", 0, 1)
    plain = json.loads(here(*asked, "--json").stdout)
    assert usual["differences"] == {} and all(usual[name] == plain[name] for name in ("adherence", "facts", "conflict"))
    gap, own_rates = none["differences"]["adherence"]["own"], [one["adherence"]["own"]["rate"] for one in (none, usual)]
    assert gap["points"] == pytest.approx(100 * (own_rates[0] - own_rates[1]), abs=0.02) and own_rates[0] < own_rates[1]
    assert [answers.with_name(f"answers.pref-{one}.jsonl").exists() for one in (0, 1)] == [True, True]
    text = here(*asked, "--strength", "pref=0,1").stdout
    lines = [line.split() for line in text.splitlines()]
    assert lines[0][:3] == [f"{demo.name},", "pref", "strength:"] and lines[2][:4] == ["0", "1", "n", "what"]
    assert f"{100 * own_rates[0]:.1f} %  {100 * own_rates[1]:.1f} %" in text and "*: p < 0.05" in text
    assert page.read_text().count("<svg") == 1 and "over the strength of User Info" in page.read_text()
    assert chart.read_text().count("your own cases") == 1


@pytest.mark.parametrize("arguments, said", [
    (("--strength", "2"), "takes a tier and numbers"),
    (("--strength", "user=1,2"), "takes a tier and numbers"),
    (("--strength", "pref="), "takes a tier and numbers"),
    (("--strength", "pref=1"), "at least two strengths"),
    (("--strength", "pref=1,1.0"), "at least two strengths"),
    (("--strength", "pref=1,two"), "takes a number from 0 to"),
    (("--strength", "system=-1,1"), "takes a number from 0 to"),
    (("--strength", "system=nan,1"), "takes a number from 0 to"),
    (("--strength", "pref=1,2", "--against", "x.gguf"), "leave --against out"),
    (("--strength", "pref=1,2", "--against-template", "plain"), "leave --against out"),
])  # fmt: skip
def test_strengths_that_cannot_be_compared_are_refused(
    arguments: tuple[str, ...], said: str, refuses: Callable[..., str]
) -> None:
    assert said in refuses(2, "eval", *arguments)


# --- what is kept -----------------------------------------------------------------------------------------------------


def without_time(text: str) -> dict[str, Any]:
    return {key: value for key, value in json.loads(text).items() if key != "seconds"}


def test_a_finished_run_prints_its_results_again_without_the_model(
    here: Run, tiny: Path, own: Path, cache: Path
) -> None:
    model = own.with_name("model.gguf")
    shutil.copy2(tiny, model)
    arguments = ("eval", "-m", str(model), "--suite", str(own), "-n", "5", "--json")
    first = here(*arguments)
    assert "0 of them given" in first.stderr
    before = model.stat()
    with model.open("r+b") as file:  # the same size and time, and no weights any more
        file.seek(before.st_size * 2 // 3)
        file.write(b"\xff" * (before.st_size - before.st_size * 2 // 3))
    os.utime(model, ns=(before.st_atime_ns, before.st_mtime_ns))
    again = here(*arguments)
    assert again.returncode == 0 and again.stdout == first.stdout and "6 of them given" in again.stderr
    (kept,) = (cache / "answers").iterdir()
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600 and stat.S_IMODE(kept.parent.stat().st_mode) == 0o700
    os.utime(model, ns=(0, 0))
    assert here(*arguments).returncode in (0, 5)  # another model now: it is asked again, or cannot be loaded
    assert len(list((cache / "answers").iterdir())) == 2


def stopped(arguments: list[str], answers: Path, number: int, lines: int) -> tuple[int, str]:
    """Start a run, send it a signal when some answers are written, and return its exit code and stderr."""
    process = subprocess.Popen(
        [*COMMAND, *arguments, "--answers", str(answers)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and (not answers.exists() or answers.read_bytes().count(b"\n") <= lines):
        time.sleep(0.01)
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    return process.returncode, error


@pytest.mark.parametrize("number, code", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_where_it_was(
    number: int, code: int, run: Run, tiny: Path, tmp_path: Path
) -> None:
    row = {"user_info": "Answer in capital letters.", "values": ["case.upper"]}
    topics = "tea bread rain snow wine salt glass paper iron gold silver honey butter cheese milk rice".split()
    rows = [{**row, "queries": [f"What is {topic}?", f"What else is {topic}?"]} for topic in topics * 3]
    suite, answers = write_suite(tmp_path / "long.jsonl", *rows), tmp_path / "answers.jsonl"
    arguments = ["-m", str(tiny), "--suite", str(suite), "-n", "100", "--json"]
    status, error = stopped(arguments, answers, number, 5)
    assert status == code and "Traceback" not in error, error
    if number == signal.SIGINT:
        assert f"kept in {answers}; the same command goes on" in error
    before = answers.read_bytes()
    kept = before[: before.rfind(b"\n") + 1]
    assert 5 < kept.count(b"\n") < 2 * len(rows)
    answers.write_bytes(kept + b'{"case": 3, "turn": 0, "resp')  # a line that was torn
    result = run("eval", *arguments, "--answers", str(answers), timeout=240)
    assert result.returncode == 0, result.stderr
    count = kept.count(b"\n") - 1
    assert f"{2 * len(rows)} answers, {count} of them given already" in result.stderr
    assert answers.read_bytes().startswith(kept)
    written = [json.loads(line) for line in answers.read_text().splitlines()[1:]]
    assert len({(one["case"], one["turn"]) for one in written}) == len(written) == 2 * len(rows)
    document = json.loads(result.stdout)
    assert document["adherence"]["own"]["n"] == len(rows) and document["errors"] == []
    assert document["seconds"] >= written[count - 1]["seconds"]  # both sessions count


def test_a_file_of_another_run_or_of_anything_else_is_refused_and_left_alone(
    refuses: Callable[..., str], here: Run, tiny: Path, own: Path, tmp_path: Path
) -> None:
    answers = tmp_path / "answers.jsonl"
    arguments = ("eval", "-m", str(tiny), "--suite", str(own), "-q", "--answers", str(answers))
    assert here(*arguments, "-n", "3").returncode == 0
    before = answers.read_bytes()
    line = refuses(2, *arguments, "-n", "4")
    assert "another run (other settings)" in line and str(answers) in line
    assert "(other suite)" in refuses(2, *arguments, "-n", "3", "--size", "2")
    assert answers.read_bytes() == before
    for text in (b"my diary", b"{}\n", b'{"metaalign_edge": 1}\n', b"\xff\xfe\n"):
        answers.write_bytes(text)
        assert "something else" in refuses(2, *arguments, "-n", "3")
        assert answers.read_bytes() == text
    answers.write_bytes(before.replace(b'"turn": 0', b'"turn"  0', 1))
    assert "damaged" in refuses(2, *arguments, "-n", "3")
    answers.write_bytes(before[:40])  # stopped within its first line
    assert here(*arguments, "-n", "3").returncode == 0 and answers.read_bytes().count(b"\n") == 7


def test_threads_and_the_number_of_sequences_may_change_between_two_sessions(here: Run, tiny: Path, own: Path) -> None:
    answers = own.with_name("answers.jsonl")
    arguments = ("eval", "-m", str(tiny), "--suite", str(own), "-n", "3", "-q", "--json", "--answers", str(answers))
    first = here(*arguments, "--parallel", "2")
    again = here(*arguments, "--parallel", "3", "-t", "2")
    assert first.returncode == 0 and first.stdout == again.stdout


def test_a_home_that_cannot_be_written_costs_the_resumption_and_no_more(
    here: Run, tiny: Path, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METAALIGN_EDGE_CACHE", "/dev/null/nowhere")
    result = here("eval", "-m", str(tiny), "--suite", str(own), "-n", "3", "--json")
    assert result.returncode == 0 and json.loads(result.stdout)["n"] == 4
    assert "nothing is kept" in result.stderr


def test_files_lie_where_the_system_wants_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert files.cache_folder() == tmp_path / "cache"
    kinds = {"cache": files.cache_folder, "config": files.config_folder, "data": files.data_folder}
    for kind, folder in kinds.items():
        monkeypatch.setenv(f"METAALIGN_EDGE_{kind.upper()}", str(tmp_path / "named" / kind))
        assert folder() == tmp_path / "named" / kind
        monkeypatch.delenv(f"METAALIGN_EDGE_{kind.upper()}")
        monkeypatch.delenv(f"XDG_{kind.upper()}_HOME", raising=False)
    home = tmp_path / "home"
    places = [home / ".cache", home / ".config", home / ".local" / "share"]
    assert [folder() for folder in kinds.values()] == [place / "metaalign-edge" for place in places]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert files.cache_folder() == tmp_path / "xdg" / "metaalign-edge"


def test_progress_is_shown_at_a_terminal(tiny: Path, own: Path) -> None:
    process, screen = pty.fork()
    if process == 0:
        os.execv(sys.executable, [*COMMAND, "-m", str(tiny), "--suite", str(own), "-n", "60", "--parallel", "1"])
    seen, deadline = "", time.monotonic() + 60
    while time.monotonic() < deadline:
        ready, _, _ = select.select([screen], [], [], 1)
        try:
            seen += os.read(screen, 65536).decode("utf-8", "replace") if ready else ""
        except OSError:
            break
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0, seen
    os.close(screen)
    assert "answers/s" in seen and "/6" in seen and "adherence" in seen


# --- the report -------------------------------------------------------------------------------------------------------


class Reader(HTMLParser):
    """What a page consists of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: dict[str, list[str]] = {}
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "rect", "line", "path", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("meta", "rect", "line", "path", "br"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.words.setdefault(self.open[-1], []).append(data)


HOSTILE = '</pre><script>alert("&amp;")</script>{{ 7 * 7 }}<img src=x onerror=1>'


def test_a_pipe_is_written_and_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "page")
    files.write_whole(tmp_path / "page", None)  # only tried: nobody reads yet
    writer = threading.Thread(target=files.write_whole, args=(tmp_path / "page", b"whole"))
    writer.start()
    assert (tmp_path / "page").read_bytes() == b"whole"
    writer.join()
    assert (tmp_path / "page").is_fifo() and list(tmp_path.iterdir()) == [tmp_path / "page"]


def test_the_report_is_one_page_that_loads_nothing_and_escapes_everything(
    here: Run, tiny: Path, demo: Path, tmp_path: Path
) -> None:
    suite = write_suite(
        tmp_path / "hostile.jsonl",
        {"id": HOSTILE, "query": HOSTILE, "user_info": HOSTILE, "section": "<i>s</i>", "values": ["format.json"]},
        {"query": "\x00\x1b[31m tea", "queries": ["\x00\x1b[31m tea", "more?"], "values": ["format.json", "title.yes"]},
        {"query": "tea? " * 2000, "values": ["case.upper"]},
    )
    page = tmp_path / "report.html"
    models = ("-m", str(tiny), "--against", str(demo))
    result = here("eval", *models, "--suite", str(suite), "-n", "6", "-q", "--report", str(page))
    assert result.returncode == 0, result.stderr
    text = page.read_text()
    found = Reader(text)
    assert found.tags.count("figure") == found.tags.count("figcaption") == found.tags.count("svg") == 3
    assert "caption" in found.tags and "title" in found.words and "script" not in found.tags and "img" not in found.tags
    assert not [name for _, name, _ in found.attributes if name.startswith("on") or name in ("src", "href")]
    assert "http:" not in text and "https:" not in text and "url(" not in text and "@import" not in text
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    assert HOSTILE in "".join(found.words["pre"]) and "49" not in "".join(found.words["pre"])
    assert not set(text) & {chr(code) for code in range(32) if chr(code) not in "\n\t"}
    assert "could not be answered" in text and "can never hold them" in text  # the third case
    assert "format.json fails: layout(layout=&#39;json&#39;)" in text
    assert sorted(path.name for path in tmp_path.glob("*report*")) == ["report.html"]


def test_the_template_asks_for_what_a_page_has() -> None:
    environment = jinja2.Environment()
    wanted = jinja2.meta.find_undeclared_variables(environment.parse(TEMPLATE.read_text()))
    assert wanted == set(report.Page.__dataclass_fields__)


def test_bars_have_the_length_of_their_figures() -> None:
    groups = report.groups(report.results(judged(True, True, True, False)))
    section, family = report.charts(groups, ["a"])
    assert (section.labels[0][0], family.labels[0][0]) == ("adherence: seen", "case")
    page = report.Page(
        title="t", model="m", other="", date="d", command="c", facts=(), groups=tuple(groups), charts=(section,),
        verdicts={}, examples=(), errors=(),
    )  # fmt: skip
    found = Reader(report.write_page(page))
    assert [value for tag, name, value in found.attributes if (tag, name) == ("rect", "width")] == ["270.0", "270.0"]
    low, high = section.labels[0][1][0].low, section.labels[0][1][0].high
    (whisker, *_) = [value for tag, name, value in found.attributes if (tag, name) == ("path", "d")]
    assert whisker.startswith(f"M{3.6 * low:.1f} ") and f"H{3.6 * high:.1f}" in whisker


def test_examples_are_the_first_three_misses_of_a_section_and_say_what_failed() -> None:
    (found,) = report.examples(judged(True, False, False, False, False))
    assert (found.section, found.missed, found.n, len(found.shown)) == ("seen", 4, 5, 3)
    assert [one.id for one in found.shown] == ["seen/1", "seen/2", "seen/3"]
    assert found.shown[0].failed == ("case.upper fails: letter_case(case='upper')",)
    assert report.examples(judged(True)) == []


def test_a_conflict_that_user_info_wins_is_a_miss() -> None:
    upper = suites.Check("case.upper", "letter_case", {"case": "upper"})
    lower = suites.Check("case.lower", "letter_case", {"case": "lower"})
    case = suites.Case("c", "conflict", ("Tea?",), checks=(upper,), losing=(lower,))
    (found,) = report.examples([suites.Judged(case, "tea.")])
    assert len(found.shown[0].failed) == 2 and "User Info asks for in vain" in found.shown[0].failed[1]


@pytest.mark.parametrize("kind, start", [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_a_chart_is_drawn_with_matplotlib(kind: str, start: bytes, tiny: Path, own: Path) -> None:
    path = own.with_name(f"chart.{kind}")
    arguments = ["eval", "-m", str(tiny), "--suite", str(own), "-n", "3", "-q", "--chart", str(path)]
    assert edge.run(arguments) == 0 and path.read_bytes().startswith(start)
    before = path.read_bytes()
    assert edge.run(arguments) == 0 and path.read_bytes() == before


def test_without_matplotlib_the_chart_says_what_to_install(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "matplotlib" else find(name))
    assert edge.run(["eval", "-m", str(tiny), "--chart", str(tmp_path / "c.png")]) == 2
    assert 'pip install "metaalign-edge[eval]"' in capsys.readouterr().err


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, said", [
    (b'{"query": "tea?", "values": ["case.uper"]}', "did you mean 'case.upper'?"),
    (b'{"query": "tea?", "values": ["no.such"]}', "no.such"),
    (b'{"query": 7, "values": ["case.upper"]}', "'query' must be a text"),
    (b'{"query": "tea?", "valus": []}', "did you mean 'values'?"),
    (b'{"query": "tea?"}', "nothing to check"),
    (b'{"query": "tea?", "checks": [{"checker": "sentences", "parameters": {"at_most": "x"}}]}', "parameters"),
    (b"[1, 2]", "object"),
    (b"{", "not JSON"),
    (b"\xff\xfe", "not UTF-8"),
    (b"", "holds no case"),
    (b"[" * 100_000, "nested"),
])  # fmt: skip
def test_a_suite_that_is_none_is_a_usage_error(text: bytes, said: str, refuses: Callable[..., str], tiny: Path) -> None:
    path = tiny.with_name("suite.jsonl")
    path.write_bytes(text)
    line = refuses(2, "eval", "-m", str(tiny), "--suite", str(path))
    assert said in line and str(path) in line


def test_what_cannot_work_is_said_before_the_first_answer(
    refuses: Callable[..., str], tiny: Path, own: Path, tmp_path: Path
) -> None:
    short = ("--suite", str(own), "-n", "3")
    assert "no model file" in refuses(3, "eval", "-m", str(tmp_path / "none.gguf"), *short)
    assert "no model file" in refuses(3, "eval", "-m", str(tiny), "--against", "./none.gguf", *short)
    assert "cannot read the suite" in refuses(3, "eval", "-m", str(tiny), "--suite", str(tmp_path / "none"))
    assert "cannot read the suite" in refuses(3, "eval", "-m", str(tiny), "--suite", str(tmp_path))
    nowhere = str(tmp_path / "no" / "where.html")
    for flag in ("--report", "--answers"):
        assert nowhere in refuses(8, "eval", "-m", str(tiny), *short, flag, nowhere)
    assert "directory" in refuses(8, "eval", "-m", str(tiny), *short, "--report", str(tmp_path))
    assert ".png or .svg" in refuses(2, "eval", "-m", str(tiny), *short, "--chart", str(tmp_path / "c.pdf"))
    assert "is no file" in refuses(2, "eval", "-m", str(tiny), *short, "--answers", str(tmp_path))
    assert "--ifeval-tier" in refuses(2, "eval", "-m", str(tiny), *short, "--ifeval-tier", "nowhere")
    for size in ("0", "-1", "many"):
        assert "--size" in refuses(2, "eval", "-m", str(tiny), "--size", size)
    assert "--parallel" in refuses(2, "eval", "-m", str(tiny), "--parallel", "0")
    assert list(tmp_path.glob("cache/answers/*")) == []


def test_a_full_disk_under_the_answers_is_exit_8_where_they_were_named(tiny: Path, own: Path, cache: Path) -> None:
    def limited(*arguments: str) -> subprocess.CompletedProcess[str]:
        """Run with files of 1 KiB at most."""
        line = shlex.join([*COMMAND, "-m", str(tiny), "--suite", str(own), "-n", "200", "--json", *arguments])
        return subprocess.run(["bash", "-c", f"ulimit -f 1; {line}"], capture_output=True, text=True, timeout=60)

    named = limited("--answers", str(own.with_name("answers.jsonl")), "-q")
    assert (named.returncode, named.stdout, named.stderr.count("\n")) == (8, "", 1)
    assert "answers.jsonl: File too large" in named.stderr
    cached = limited()
    assert cached.returncode == 0 and json.loads(cached.stdout)["n"] == 4
    assert "nothing is kept: File too large" in cached.stderr


def test_a_case_without_an_answer_counts_as_missed_and_says_why(here: Run, tiny: Path, tmp_path: Path) -> None:
    suite = write_suite(
        tmp_path / "suite.jsonl",
        {"id": "long", "query": "zoo " * 2000, "values": ["case.upper"]},
        {"id": "halves", "queries": ["tea?", "half a letter: \ud800"], "values": ["case.upper"]},
        {"id": "short", "query": "tea?", "values": ["case.upper"]},
    )
    answers = tmp_path / "answers.jsonl"
    arguments = ("eval", "-m", str(tiny), "--suite", str(suite), "-n", "3", "--json", "--answers", str(answers))
    first = here(*arguments)
    assert first.returncode == 0, first.stderr
    document = json.loads(first.stdout)
    assert [error["id"] for error in document["errors"]] == ["long", "halves"]
    assert "context" in document["errors"][0]["reason"] and "surrogate" in document["errors"][1]["reason"]
    assert document["n"] == document["adherence"]["own"]["n"] == 3
    again = here(*arguments)
    assert again.stdout == first.stdout and "4 answers, 4 of them given" in again.stderr


def test_a_checker_that_fails_on_some_answer_costs_that_case_only() -> None:
    bad = suites.Check("own.bad", "sentences", {"at_most": 1, "at_least": "x"})  # compared for one sentence only
    case = suites.Case("bad", "own", ("Tea?",), checks=(bad,), facts=("Tea is hot.",))
    errors: list[dict[str, str]] = []
    fine = findings.sound(suites.Judged(case, "Two. Sentences."), errors)
    assert errors == [] and fine.response == "Two. Sentences."
    broken = findings.sound(suites.Judged(case, "One sentence."), errors)
    assert [error["id"] for error in errors] == ["bad"] and "sentences of own.bad failed: TypeError" in errors[0][
        "reason"
    ]
    assert not broken.obeyed and broken.case.family == "own"
    assert report.results([fine, broken])["adherence"]["own"].n == 2
    clash = edge.replace(case, section="conflict", losing=(bad,))
    conflict = report.results([findings.sound(suites.Judged(clash, "One sentence."), errors)])["conflict"]
    assert (conflict["neither"].rate, conflict["neither"].n) == (1.0, 1)


def test_answers_that_were_cut_off_are_counted(here: Run, tiny: Path, own: Path) -> None:
    arguments = ("eval", "-m", str(tiny), "--suite", str(own), "-n", "2", "-q")
    document = json.loads(here(*arguments, "--json").stdout)
    assert document["max_tokens"] == 2 and document["unfinished"] > 0
    assert f"{document['unfinished']} answers were cut off after 2 tokens (-n)" in here(*arguments).stdout


def test_ifeval_is_explained_and_nothing_is_downloaded(refuses: Callable[..., str], tiny: Path) -> None:
    line = refuses(2, "eval", "-m", str(tiny), "--suite", "ifeval")
    assert "nothing is downloaded" in line and "--suite ifeval_input_data.jsonl" in line


def test_without_lm_eval_a_file_of_ifevals_says_what_to_install(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"key": 1, "prompt": "Tea?", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    path = write_suite(tmp_path / "rows.jsonl", row)
    monkeypatch.setattr(ifeval, "missing", lambda: True)
    assert edge.run(["eval", "-m", str(tiny), "--suite", str(path)]) == 2
    assert 'pip install "metaalign-edge[eval]"' in capsys.readouterr().err
