"""Settings that stand in the user's file: their order, their checks, and what a command makes of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import metaalign_edge as edge
from metaalign_edge_commands.measure import speeds
from metaalign_edge_commands.options import in_files
from metaalign_edge_runtime.llama.gguf import ModelFile
from metaalign_edge_runtime.llama.interrupt import Interrupt
from metaalign_edge_runtime.stores import config

Says = Callable[..., tuple[str, str]]
Refuses = Callable[..., str]


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's settings, which are not there yet."""
    monkeypatch.setenv("METAALIGN_EDGE_CONFIG", str(tmp_path / "config"))
    (tmp_path / "config").mkdir()
    return tmp_path / "config" / "config.toml"


def test_a_flag_comes_before_a_variable_before_the_file_before_what_is_built_in(
    says: Says, tiny: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tokens(*flags: str) -> int:
        return int(json.loads(says("chat", "--json", "--temp", "0", *flags, "tea?")[0])["output_tokens"])

    file.write_text(f"model = {json.dumps(str(tiny))}\nmax_tokens = 3\n")
    assert tokens() == 3
    monkeypatch.setenv("METAALIGN_EDGE_MAX_TOKENS", "2")
    assert tokens() == 2
    assert tokens("-n", "4") == 4
    assert json.loads(says("config", "get", "--json", "max_tokens")[0]) == 2
    assert "METAALIGN_EDGE_MAX_TOKENS comes before it" in says("config", "set", "max_tokens", "9")[1]


def test_every_setting_is_named_like_its_option() -> None:
    known = in_files.settings_by_name()
    for name, option in known.items():
        flags = [flag for flag in (*option.opts, *option.secondary_opts) if flag.startswith("--")]
        assert f"--{name.replace('_', '-')}" in flags
    assert {"model", "system", "pref", "temp", "stop", "parallel", "no_cache", "quiet", "pref_strength"} <= set(known)


def test_show_lists_every_setting_with_what_gives_it(says: Says, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text('temp = 0\nstop = ["a", "b"]\nno_cache = true\npref = "Be brief."\ngpu_layers = 4\n')
    monkeypatch.setenv("METAALIGN_EDGE_SEED", "7")
    shown = json.loads(says("config", "show", "--json")[0])
    assert shown.keys() == in_files.settings_by_name().keys()
    here = str(file)
    assert shown["temp"] == {"value": 0.0, "origin": here} and shown["stop"] == {"value": ["a", "b"], "origin": here}
    assert shown["pref"]["value"] == ["Be brief."] and shown["gpu_layers"]["value"] == "4"
    assert shown["seed"] == {"value": 7, "origin": "METAALIGN_EDGE_SEED"}
    assert shown["template"] == {"value": "auto", "origin": "built-in"}
    lines = {line.split()[0]: line.split() for line in says("config", "show")[0].splitlines()}
    assert lines["no_cache"] == ["no_cache", "true", here] and lines["seed"] == ["seed", "7", "METAALIGN_EDGE_SEED"]
    assert shown["max_tokens"] == {"value": edge.USUAL_MAX_TOKENS, "origin": "built-in"}
    assert shown["top_p"] == {"value": 0.95, "origin": "built-in (a model's own comes first)"}
    assert lines["top_k"] == "top_k 40 built-in (a model's own comes first)".split()
    assert lines["model"] == ["model", "-", "built-in"]


def test_set_get_and_unset(says: Says, refuses: Refuses, file: Path) -> None:
    assert says("config", "path") == (f"{file}\n", "")
    assert "config set seed VALUE" in refuses(3, "config", "get", "seed")
    says("config", "set", "temp", "0.5")
    says("config", "set", "--", "max-tokens", "300")
    says("config", "set", "quiet", "yes")
    says("config", "set", "pref", "@concise", "I live in Rome.")
    says("config", "set", "gpu_layers", "20")
    assert config.read_toml(file) == {
        "temp": 0.5,
        "max_tokens": 300,
        "quiet": True,
        "pref": ["@concise", "I live in Rome."],
        "gpu_layers": "20",
    }
    assert says("config", "get", "pref")[0] == "@concise\nI live in Rome.\n"
    assert says("config", "get", "quiet")[0] == "true\n"
    assert says("config", "get", "template")[0] == "auto\n"
    for key in ("temp", "max_tokens", "quiet", "pref", "gpu_layers"):
        says("config", "unset", key)
    assert config.read_toml(file) == {} and says("config", "unset", "temp") == ("", "")


def test_comments_links_and_rights_stay(says: Says, file: Path, tmp_path: Path) -> None:
    real = tmp_path / "dotfiles.toml"
    real.write_bytes(b"\xef\xbb\xbf# mine\ntemp = 0.5  # not too wild\n\n# the end\n")
    real.chmod(0o600)
    file.symlink_to(real)
    says("config", "set", "temp", "0.7")
    says("config", "set", "seed", "1")
    assert real.read_text() == "# mine\ntemp = 0.7  # not too wild\n\n# the end\nseed = 1\n"
    assert file.is_symlink() and real.stat().st_mode & 0o777 == 0o600
    real.write_text("# only a comment\n")
    says("config", "set", "seed", "1")
    assert real.read_text() == "# only a comment\nseed = 1\n"


def test_one_mistake_keeps_no_other_setting_from_being_seen_or_mended(says: Says, refuses: Refuses, file: Path) -> None:
    file.write_text('temp = "hot"\nmodel = "/no/such/model.gguf"\npref = "@gone"\n')
    assert says("config", "set", "seed", "3") == ("", "")
    assert says("config", "set", "temp", "0.5") == ("", "")
    assert says("config", "get", "model")[0] == "/no/such/model.gguf\n"
    assert "@gone" in says("config", "show")[0] and "*" not in says("pref", "list")[0]
    file.write_text("nonsense = 1\nseed = 2\n")
    assert says("config", "set", "seed", "3") == ("", "")
    assert config.read_toml(file) == {"nonsense": 1, "seed": 3}


def test_a_models_path_is_found_from_anywhere(
    says: Says, tiny: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny.parent)
    says("config", "set", "model", tiny.name)
    monkeypatch.chdir(tmp_path)
    assert says("config", "get", "model")[0] == f"{tiny}\n"
    file.write_text(f"model = {json.dumps(os.path.relpath(tiny, file.parent))}\n")
    assert f"model: {tiny} (from" in says("render", "-v", "tea?")[1]
    file.write_text('model = "user/repo:Q4_K_M"\n')
    assert says("config", "get", "model")[0] == "user/repo:Q4_K_M\n"


def test_a_key_that_means_nothing_is_named_with_the_nearest_and_can_be_removed(
    says: Says, refuses: Refuses, file: Path
) -> None:
    file.write_text("temprature = 1\n")
    for command in (("chat", "tea?"), ("render", "tea?"), ("pref", "list"), ("config", "show")):
        line = refuses(2, *command)
        assert str(file) in line and "'temprature': do you mean temp?" in line
    assert "--pref" in says("chat", "--help")[0]
    says("config", "unset", "temprature")
    says("render", "tea?")
    file.write_text("[chat]\ntemp = 1\n")
    assert "no setting 'chat': it takes system, pref" in refuses(2, "render", "tea?")
    assert "do you mean top_k" in refuses(2, "config", "set", "topk", "3")
    assert "config show" in refuses(2, "config", "get", "zzzz")


@pytest.mark.parametrize("content, said", [
    (b'temp = 1\npref = Be brief.\n', "line 2"),
    (b"temp = 1\ntemp = 2\n", "line 2"),
    (b'pref = "caf\xe9"\n', "UTF-8"),
    (b"stop = " + b"[" * 5000, "TOML"),
])  # fmt: skip
def test_a_damaged_file_is_named_with_the_line_and_what_to_do(
    content: bytes, said: str, says: Says, refuses: Refuses, file: Path
) -> None:
    file.write_bytes(content)
    for command in (("chat", "tea?"), ("config", "get", "temp"), ("config", "set", "temp", "1")):
        line = refuses(2, *command)
        assert str(file) in line and said in line
    assert file.read_bytes() == content
    assert "--pref" in says("chat", "--help")[0]
    assert "no model" in refuses(3, "models", "rm", "nothing")  # which takes no settings


@pytest.mark.parametrize("line, said", [
    ('temp = "hot"', "temp: 'hot' is not a valid float"),
    ("max_tokens = 1.5", "max_tokens: '1.5' is not a valid int"),
    ("max_tokens = 0", "max_tokens: 0 is not in the range"),
    ("temp = true", "temp: it takes a text or a number, not True"),
    ("quiet = 1", "quiet: it takes true or false, not 1"),
    ("system = ['a', 'b']", "system: it takes a text or a number, not ['a', 'b']"),
    ("stop = [['a']]", "stop: it takes a text or a number, or a list of them, not ['a']"),
    ("seed = 2026-11-27", "seed: it takes a text or a number"),
    ("template = {}", "template: it takes a text"),
    ('gpu_layers = "some"', "gpu_layers: -ngl takes auto"),
    ('ctx_size = "most"', "ctx_size: -c takes auto"),
    ("pref_strength = -1", "pref_strength: --pref-strength takes"),
    ('pref = ""', "pref: the preference is empty"),
])  # fmt: skip
def test_a_value_that_its_option_does_not_take_is_named_with_its_file(
    line: str, said: str, refuses: Refuses, file: Path
) -> None:
    file.write_text(f"{line}\n")
    assert f"{file}: {said}" in refuses(2, "chat", "tea?")


@pytest.mark.parametrize("line", ['template = "none.jinja"', 'model = "none.gguf"', 'model = "none"', 'pref = "@none"'])
def test_what_a_setting_names_and_is_not_there_is_named_with_the_file(line: str, refuses: Refuses, file: Path) -> None:
    file.write_text(f"{line}\n")
    assert f"{file}: {line.split()[0]}: " in refuses(3, "chat", "tea?")


def test_quiet_and_verbose_replace_each_other(says: Says, tiny: Path, file: Path) -> None:
    file.write_text("verbose = true\n")
    assert "template metaalign" in says("chat", "-m", str(tiny), "-n", "1", "tea?")[1]
    assert says("chat", "-m", str(tiny), "-n", "1", "-q", "tea?")[1] == ""
    file.write_text("quiet = true\n")
    assert "template metaalign" in says("chat", "-m", str(tiny), "-n", "1", "-v", "tea?")[1]


def test_what_a_flag_replaces_is_not_looked_at(
    says: Says, refuses: Refuses, tiny: Path, file: Path, tmp_path: Path
) -> None:
    file.write_text('model = "/no/such/model.gguf"\nmax_tokens = "x"\nsystem = "Be kind."\n')
    assert f"{file}: model: no model file" in refuses(3, "render", "tea?")
    assert "max_tokens" in refuses(2, "chat", "-m", str(tiny), "tea?")
    says("chat", "-m", str(tiny), "-n", "1", "tea?")
    (tmp_path / "system.txt").write_text("Be brief.")
    out, _ = says("render", "-m", str(tiny), "--system-file", str(tmp_path / "system.txt"), "tea?")
    assert "Be brief." in out and "Be kind." not in out


@pytest.mark.parametrize("arguments, said", [
    (("temp", "hot"), "temp: 'hot' is not a valid float"), (("seed", "-1"), "-1"), (("quiet", "perhaps"), "quiet"),
    (("gpu_layers", "some"), "-ngl"), (("temp", "1", "2"), "one value"), (("pref", ""), "empty"),
    (("ctx_size", "8"), "-c"), (("system", "caf\udce9"), "UTF-8"), (("pref_strength", "101"), "100"),
])  # fmt: skip
def test_set_refuses_what_the_option_would(arguments: tuple[str, ...], said: str, refuses: Refuses, file: Path) -> None:
    assert said in refuses(2, "config", "set", "--", *arguments)
    assert not file.exists()


def test_numbers_may_be_texts_and_flags_have_both_values(says: Says, tiny: Path, file: Path) -> None:
    file.write_text('system = 5\ngpu_layers = 0\npref_strength = 2\nmax_tokens = "2"\nremind = false\nstop = "z"\n')
    out, error = says("chat", "-m", str(tiny), "--json", "-v", "tea?")
    assert json.loads(out)["system_info"] == "5" and "remind: false (from" in error and "User Info 2" in error


def test_what_measures_a_model_leaves_sampling_and_preferences_aside(
    says: Says, tiny: Path, file: Path, tmp_path: Path
) -> None:
    suite = {"query": "What is tea?", "checks": [{"checker": "mentions", "parameters": {"text": "water"}}]}
    (tmp_path / "suite.jsonl").write_text(json.dumps(suite) + "\n")
    command = ("eval", "-m", str(tiny), "--suite", str(tmp_path / "suite.jsonl"), "-c", "256", "-t", "1")
    assert "1 answer, 0 of them given already" in says(*command)[1]
    file.write_text("temp = 1\nseed = 5\nmax_tokens = 3\npref = '@json'\nsystem_strength = 2\nthink = true\n")
    assert "1 answer, 1 of them given already" in says(*command)[1]
    file.write_text('quiet = true\nmodel = "/no/such/model.gguf"\n')
    assert says(*command)[1] == ""


def test_what_bench_times_knows_nothing_of_the_users_files(tiny: Path, file: Path) -> None:
    file.write_text("damage\n")
    times = speeds.time_calls(ModelFile(tiny), edge.Settings(threads=1), "auto", "be kind", Interrupt())
    assert min(times[:2]) > 0


def test_a_settings_template_is_not_what_convert_writes(says: Says, checkpoint: Path, file: Path) -> None:
    file.write_text('template = "chatml"\n')
    plan = json.loads(says("convert", str(checkpoint), "--dry-run", "--json")[0])
    assert plan["template"] == "metaalign"


def test_paths_says_where_everything_lies(says: Says, file: Path, tmp_path: Path) -> None:
    states = Path(os.environ["HOME"], ".cache", "metaalign-edge", "states")
    states.mkdir(parents=True)
    (states / "one.kv").write_bytes(bytes(2_000_000))
    found = json.loads(says("paths", "--json")[0])
    assert found["settings"] == {"path": str(file), "bytes": None}
    assert found["profiles"]["path"] == str(file.parent / "preferences")
    assert found["states"] == {"path": str(states), "bytes": 2_000_000} and found["answers"]["bytes"] == 0
    assert found["project"]["path"] is None
    lines = dict(line.split(None, 1) for line in says("paths")[0].splitlines())
    assert lines.keys() == found.keys() and lines["states"] == f"{states}  (2.0 MB)"
    assert lines["settings"] == str(file) and lines["project"] == "-" and lines["hub"].endswith("hub")


def test_no_file_costs_no_toml(tmp_path: Path, tiny: Path) -> None:
    from test_package import imported_by

    assert not imported_by("render", "-m", str(tiny), "tea?") & {"tomllib", "tomli", "tomlkit"}
    config.store_setting("temp", 0.5)
    assert "tomlkit" not in imported_by("render", "-m", str(tiny), "tea?")
