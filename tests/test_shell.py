"""What a shell needs: completion, loops that read stdin, counts, exit codes, text of every origin, any terminal."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.terminal import Terminal
from test_package import imported_by

import metaalign_edge as edge
from metaalign_edge_commands import program
from metaalign_edge_commands.completion import SHELLS, VALUES
from metaalign_edge_runtime.stores import docs, profiles, sessions
from metaalign_edge_templates.tier_text import TIERS

Run = Callable[..., "subprocess.CompletedProcess[str]"]
ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"llama_cpp", "llama_cpp.llama_cpp", "numpy", "huggingface_hub", "jinja2", "metaalign_edge_convert", "gguf"}


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `metaalign-edge` be this environment's."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


def completed(capfd: pytest.CaptureFixture[str], *words: str, shell: str = "bash") -> list[str]:
    """Return the lines that a shell's script is given."""
    assert edge.run(["completion", shell, "--", *words]) == 0
    out, error = capfd.readouterr()
    assert error == ""
    return str(out).splitlines()


def test_commands_and_options_are_completed_with_their_help(capfd: pytest.CaptureFixture[str]) -> None:
    root = program
    assert set(completed(capfd, "")) == set(root.commands)  # type: ignore[attr-defined]
    assert completed(capfd, "ren", shell="zsh") == ["render\tPrint exactly what the model is fed."]
    assert completed(capfd, "cache", "") == ["show", "clear"]
    assert completed(capfd, "chat", "--pref", "brief", "--no-st") == ["--no-stream", "--no-stdin"]
    assert "--json\tOne JSON document on stdout." in completed(capfd, "chat", "--j", shell="fish")
    assert completed(capfd, "nonsense", "") == completed(capfd, "chat", "") == completed(capfd, "-x", "y", "") == []


def test_values_are_completed_where_there_are_some(capfd: pytest.CaptureFixture[str]) -> None:
    assert completed(capfd, "chat", "--pref", "@chi") == ["@child"]
    assert completed(capfd, "chat", "--pref", "@json+@chi") == ["@json+@child"]
    assert completed(capfd, "compare", "--pref=@json+@chi") == ["--pref=@json+@child"]
    assert completed(capfd, "chat", "--pref", "be br") == []
    assert completed(capfd, "chat", "--template", "") == ["auto", *edge.shipped_templates()]
    assert completed(capfd, "render", "-v", "--template", "'ll") == ["llama3"]
    assert completed(capfd, "chat", "-ngl", "a") == ["auto", "all"]
    assert completed(capfd, "chat", "--json", "-n", "5", "--pref-strength", '""') == ["auto"]
    assert completed(capfd, "help", "exi") == ["exit-codes"]
    assert completed(capfd, "completion", "") == list(SHELLS)
    assert completed(capfd, "chat", "-m", "metaalign-d") == ["metaalign-demo"]
    assert completed(capfd, "models", "rm", "metaalign-demo", "meta") == ["metaalign-demo"]
    profiles.store_profile("mine", "Be kind.")
    assert completed(capfd, "pref", "show", "@mi", shell="zsh") == ["@mine\tBe kind."]
    sessions.session_path("garden").parent.mkdir(parents=True)
    sessions.session_path("garden").touch()
    assert completed(capfd, "chat", "--session", "") == completed(capfd, "sessions", "show", "g") == ["garden"]


def test_every_value_that_can_be_completed_belongs_to_a_parameter() -> None:
    def names(command: object) -> set[str]:
        below = getattr(command, "commands", {}).values()
        return {one.name for one in command.params}.union(*map(names, below))  # type: ignore[attr-defined]

    root = program
    for key in VALUES:
        group, _, name = key.rpartition(" ")
        assert name in names(root.commands[group] if group else root), key  # type: ignore[attr-defined]


@pytest.mark.parametrize("words", [("",), ("chat", "--pref", "@"), ("chat", "--template", ""), ("chat", "-m", "")])
def test_a_tab_imports_nothing_heavy(words: tuple[str, ...]) -> None:
    assert not imported_by("completion", "bash", "--", *words) & (HEAVY | {"rich"})


def test_an_unknown_shell_is_refused_with_those_there_are(refuses: Callable[..., str]) -> None:
    assert "bash, zsh, fish, powershell" in refuses(2, "completion", "tcsh")


def test_bash_completes_words_that_it_cuts_itself(tmp_path: Path) -> None:
    (tmp_path / "rc").write_text('PS1="$ "; eval "$(metaalign-edge completion bash)"; bind "set bell-style none"\n')
    (tmp_path / "a file.gguf").touch()
    terminal = Terminal("-c", f"cd {tmp_path}; exec bash --rcfile rc -i", program=("bash",))
    for typed, becomes in (
        ("ren", "render "),
        ("chat --pref @chi", "chat --pref @child "),
        ("chat --pref @json+@chi", "chat --pref @json+@child "),
        ("chat --pref=@json+@chi", "chat --pref=@json+@child "),
        ('chat --pref "@chi', 'chat --pref "@child" '),
        ("chat -m a", r"chat -m a\ file.gguf "),
        ("chat -s 'a b' --template=chat", "chat -s 'a b' --template=chatml "),
    ):
        terminal.until("$ ")
        terminal.type(f"metaalign-edge {typed}\t")
        terminal.until(f"metaalign-edge {becomes}")
        terminal.type("\x01: \n")  # to the beginning of the line, and make it a command that does nothing
    terminal.until("$ ")
    terminal.type("exit\n")
    terminal.rest()
    assert terminal.leave() == 0


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_asks_for_what_it_is_told(shell: str, here: Run) -> None:
    script = here("completion", shell).stdout
    assert f"metaalign-edge completion {shell}" in script and "metaalign-edge.*" not in script
    assert re.search(rf"completion {shell} '?--'? ", script)


def test_a_loop_that_reads_stdin_keeps_what_it_has_not_read() -> None:
    loop = 'while read -r thing; do metaalign-edge chat --no-stdin --temp 0 --stop " is" "What is $thing?"; done'
    result = subprocess.run(["bash", "-c", loop], input="tea\nbread\nfog\n", capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("Tea\nBread\nFog\n", "")
    greedy = loop.replace("--no-stdin ", "")
    assert (
        subprocess.run(["bash", "-c", greedy], input="tea\nbread\n", capture_output=True, text=True).stdout.count("\n")
        == 1
    )


def test_a_count_is_that_of_the_tokens_and_loads_no_weights(here: Run, tiny: Path) -> None:
    arguments = ("render", "-m", str(tiny), "--system", "be kind", "--pref", "@child", "What is <|end|> tea?")
    tokens = json.loads(here(*arguments, "--tokens", "--json").stdout)["tokens"]
    counts = json.loads(here(*arguments, "--count", "--json").stdout)
    assert here(*arguments, "--count").stdout == f"{len(tokens)}\n"
    assert counts.pop("total") == len(tokens) == sum(counts.values())
    assert counts == {tier: sum(token["tier"] == tier for token in tokens) for tier in (*TIERS, "scaffold")}
    assert counts["response"] == 0 < counts["scaffold"]


def test_text_from_windows_is_the_same_text(run: Run, tmp_path: Path) -> None:
    for name, data in (("unix", b"be\nbrief\n"), ("windows", b"\xef\xbb\xbfbe\r\nbrief\r\n")):
        (tmp_path / name).write_bytes(data)
    render = ("render", "-q", "--pref-file", str(tmp_path / "unix"))
    usual = run(*render, input="two\nlines\n").stdout
    for query in (b"two\nlines\n", b"\xef\xbb\xbftwo\r\nlines\r\n"):
        command = [sys.executable, "-m", "metaalign_edge", "render", "-q", "--pref-file", str(tmp_path / "windows")]
        assert subprocess.run(command, input=query, capture_output=True).stdout.decode() == usual
    row = b'\xef\xbb\xbf{"query": "What is tea?"}\r\n'
    result = subprocess.run([sys.executable, "-m", "metaalign_edge", "batch", "-"], input=row, capture_output=True)
    assert result.returncode == 0 and json.loads(result.stdout)["query"] == "What is tea?"


@pytest.mark.parametrize("arguments, code", [
    (["chat"], 6), (["compare", "--pref", "a", "--pref", "b"], 6), (["render", "--count"], 6), (["batch", "-"], 1),
    (["help"], 0), (["cache", "show"], 0),
])  # fmt: skip
@pytest.mark.slow
def test_ten_megabytes_on_stdin_are_an_answer_or_a_line(arguments: list[str], code: int, run: Run) -> None:
    text = "a" * 10_000_000 if arguments[0] != "batch" else json.dumps({"query": "a" * 10_000_000})
    result = run(*arguments, input=text)
    assert result.returncode == code and "Traceback" not in result.stderr
    assert code != 6 or (result.stdout == "" and result.stderr.count("\n") == 1)
    assert len(result.stdout) + len(result.stderr) < 5000


PLAIN = {"LANG": "C", "LC_ALL": "C", "TERM": "dumb", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_a_locale_without_letters_loses_them_and_no_answer(run: Run) -> None:
    query = "Was ist T\N{LATIN SMALL LETTER E WITH ACUTE}?"
    environment = {**os.environ, **PLAIN}
    result = run("render", "-q", input=query, env=environment, encoding="utf-8")
    assert (result.returncode, result.stderr) == (0, "") and "Was ist T?" in result.stdout.replace(
        "\N{LATIN SMALL LETTER E WITH ACUTE}", ""
    )
    document = run("render", "--json", input=query, env=environment, encoding="utf-8")
    assert json.loads(document.stdout)["messages"][-1]["content"].startswith("Was ist T")


NARROW = [
    (["chat", "--temp", "0", "What is tea?"], "Tea is a drink"),
    (["compare", "--temp", "0", "--pref", "@child", "--pref", "@expert", "What is tea?"], "[@expert]"),
    (["render", "--tokens", "tea?"], "scaffold"),
    (["help"], "exit-codes"),
    (["cache", "show"], "states"),
    (["bench", "--rounds", "1"], "tokens/s"),
    (["eval", "--size", "1"], "adherence"),
    (["convert", "nowhere"], "nowhere"),
]


@pytest.mark.slow
@pytest.mark.parametrize("arguments, says", NARROW, ids=lambda value: value[0] if isinstance(value, list) else "")
def test_a_dumb_terminal_of_20_columns_shows_all_that_matters(
    arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"LANG": "C", "LC_ALL": "C"}.items():
        monkeypatch.setenv(name, value)
    terminal = Terminal(*arguments, columns=20)
    shown = terminal.rest()
    assert says in shown and "\x1b" not in shown and "Traceback" not in shown, shown
    assert terminal.leave() == (3 if arguments[0] == "convert" else 0)


def test_rows_for_a_pipe_go_there_while_a_terminal_shows_the_bar(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"query": "What is tea?"}\n' * 3)
    line = f"metaalign-edge batch {tmp_path}/rows.jsonl > {tmp_path}/answers.jsonl"
    terminal = Terminal("-c", line, program=("sh",), kind="xterm")
    assert "3 rows: 3 answered" in terminal.rest() and terminal.leave() == 0
    assert [json.loads(row)["index"] for row in (tmp_path / "answers.jsonl").read_text().splitlines()] == [0, 1, 2]


def test_rows_at_a_terminal_are_not_broken() -> None:
    row = json.dumps({"query": "What is tea?", "pref": "@child"})
    terminal = Terminal("-c", f"echo '{row}' | metaalign-edge batch -", program=("sh",), kind="xterm")
    first, _, rest = terminal.rest().partition("\n")
    assert json.loads(first)["query"] == "What is tea?" and "\x1b" not in first + rest and terminal.leave() == 0


def exit_codes(tiny: Path, folder: Path) -> list[tuple[int, list[str], str]]:
    """List a command line for each exit code, with its stdin."""
    (folder / "bad.gguf").write_bytes(b"GGUF")
    (folder / "bad.jsonl").write_text("{}\n")
    (folder / "not mine.jsonl").write_text("text\n")
    return [
        (0, ["chat", "-m", str(tiny), "-n", "1", "tea?"], ""),
        (0, ["batch", "-"], ""),
        (1, ["batch", str(folder / "bad.jsonl")], ""),
        (2, ["chat", "--temp", "hot", "tea?"], ""),
        (2, ["batch", "-", "-o", str(folder / "not mine.jsonl")], '{"query": "tea?"}'),
        (3, ["chat", "-m", str(folder / "none.gguf"), "tea?"], ""),
        (3, ["batch", str(folder / "none.jsonl")], ""),
        (4, ["convert", "nobody/nothing"], ""),
        (5, ["chat", "-m", str(folder / "bad.gguf"), "tea?"], ""),
        (6, ["chat", "-m", str(tiny), "-c", "64", "zoo " * 99], ""),
        (7, ["render", "--template", "mistral", "--strict-tiers", "[/INST]"], ""),
        (8, ["batch", "-", "-o", str(folder / "no" / "folder.jsonl")], '{"query": "tea?"}'),
    ]


def test_each_exit_code_comes_from_a_real_command(tiny: Path, tmp_path: Path, run: Run) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    cases = exit_codes(tiny, tmp_path)
    for code, arguments, stdin in cases:
        result = run(*arguments, input=stdin, env=environment)
        assert result.returncode == code, (arguments, result.stderr)
        assert "Traceback" not in result.stderr
        assert code in (0, 1) or (result.stdout == "" and result.stderr.count("\n") == 1), result.stderr
    interrupted = "import os, signal, metaalign_edge as e; os.kill(os.getpid(), signal.SIGINT)"
    line = f"{interrupted.replace('; os.kill', '; from metaalign_edge_commands.terminal import screen; screen.Screen.write = lambda *_: os.kill')}; raise SystemExit(e.run(['--version']))"
    assert subprocess.run([sys.executable, "-c", line], capture_output=True).returncode == 130
    listed = set(map(int, re.findall(r"^\| (\d+) \|", docs.topics()["exit-codes"][1], re.MULTILINE)))
    assert listed == {code for code, _, _ in cases} | {130}


def test_ctrl_c_while_it_starts_is_no_traceback() -> None:
    script = shutil.which("metaalign-edge", path=str(Path(sys.executable).parent))
    command = [sys.executable, "-X", "importtime", str(script), "chat", "What is tea?"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        for line in process.stderr:
            if "typer" in line:  # the first part of it has just been imported
                break
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130 and "Traceback" not in rest and "KeyboardInterrupt" not in rest


def test_importing_the_toolkit_leaves_ctrl_c_as_it_is() -> None:
    code = (
        "import sys, signal; {}sys.argv[0] = {!r}; import metaalign_edge; print(repr(signal.getsignal(signal.SIGINT)))"
    )
    ignored = "signal.signal(signal.SIGINT, signal.SIG_IGN); "  # as a script's background job has it
    for before, name, handler in (
        ("", "metaalign-edge", "default_int_handler"),
        ("", "mine.py", "default_int_handler"),
        (ignored, "metaalign-edge", "SIG_IGN"),
    ):
        command = [sys.executable, "-c", code.format(before, name)]
        assert handler in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_whatever_prints_data_can_print_json() -> None:
    def lacking(command: object, name: str) -> set[str]:
        below = getattr(command, "commands", {})
        if below:
            return set().union(*(lacking(one, f"{name} {word}".strip()) for word, one in below.items()))
        return set() if any("--json" in one.opts for one in command.params) else {name}  # type: ignore[attr-defined]

    # rows of JSON, text to read, a script, a path, and nothing
    data_apart = {"batch", "help", "completion", "config path", "sessions export", "cache clear"}
    done = {"config set", "config unset", "pref add", "pref edit", "pref rm", "models rm", "sessions rm"}
    assert lacking(program, "") == data_apart | done
