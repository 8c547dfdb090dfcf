"""By what tokens are drawn: who decides each value, how that is shown, and where an answer ends that would not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import checkpoints
from helpers.parrot import make_parrot

import metaalign_edge as edge
from metaalign_edge import Model, generate
from metaalign_edge_runtime.llama.sampling import SAMPLING_PARAMETERS, choose_sampling

Says = Callable[..., tuple[str, str]]
NOTHING = dict.fromkeys(SAMPLING_PARAMETERS)


@pytest.fixture(scope="module")
def repeating(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says ` quick brown quick brown` for ever, and holds 8,192 tokens."""
    folder = tmp_path_factory.mktemp("repeating") / "repeating"
    path = make_parrot(folder, ["<|assistant|>", " quick"], [" quick", " brown", " quick"])
    checkpoints.edit_json(folder / "config.json", max_position_embeddings=8192)
    assert edge.run(["convert", str(folder), "-o", str(path), "--outtype", "f32", "-q", "--force"]) == 0
    return path


# -- who decides ------------------------------------------------------------------------------------------------------


def test_what_is_given_comes_before_the_model_and_the_model_before_what_is_built_in() -> None:
    metadata = {"general.sampling.temp": 0.6000000238418579, "general.sampling.top_k": 20}
    found = choose_sampling({**NOTHING, "temperature": 1.5, "min_p": 0.1}, {"temp": "flag"}, metadata)
    assert found == {
        "temperature": {"value": 1.5, "from": "flag"},
        "top_k": {"value": 20, "from": "model"},
        "top_p": {"value": 0.95, "from": "built-in"},
        "min_p": {"value": 0.1, "from": "call"},
        "repeat_penalty": {"value": 1.0, "from": "built-in"},
    }
    assert choose_sampling(NOTHING, {}, metadata)["temperature"] == {"value": 0.6, "from": "model"}


@pytest.mark.parametrize("value", ["hot", True, [1], None, math.nan, math.inf, -1.0])
def test_a_model_that_recommends_nonsense_is_not_followed(value: Any) -> None:
    metadata = {f"general.sampling.{one.key}": value for one in SAMPLING_PARAMETERS.values()}
    assert {one["from"] for one in choose_sampling(NOTHING, {}, metadata).values()} == {"built-in"}


def test_greedy_as_the_model_recommends_gives_way_to_a_temperature_and_says_so() -> None:
    metadata = {"general.sampling.top_k": 1}
    assert choose_sampling({**NOTHING, "temperature": 0.7}, {}, metadata)["top_k"] == {"value": 40, "from": "built-in"}
    for temperature in (None, 0):
        found = choose_sampling({**NOTHING, "temperature": temperature}, {}, metadata)
        assert found["top_k"] == {"value": 1, "from": "model"}


# -- what is shown ----------------------------------------------------------------------------------------------------


def test_json_and_v_say_each_value_and_what_gave_it(
    demo: Path, says: Says, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METAALIGN_EDGE_CONFIG", str(tmp_path))
    monkeypatch.setenv("METAALIGN_EDGE_TOP_P", "0.5")
    (tmp_path / "config.toml").write_text("min_p = 0.25\nmax_tokens = 3\ntop_p = 0.75\n")
    out, error = says("chat", "-m", str(demo), "--repeat-penalty", "1.5", "--json", "-v", "tea?")
    assert json.loads(out)["sampling"] == {
        "temperature": {"value": 1.0, "from": "model"},
        "top_k": {"value": 1, "from": "model"},
        "top_p": {"value": 0.5, "from": "environment"},
        "min_p": {"value": 0.25, "from": "config file"},
        "repeat_penalty": {"value": 1.5, "from": "flag"},
    }
    (line,) = (line for line in error.splitlines() if line.startswith("sampling: "))
    assert line == (
        "sampling: temperature 1 (model), top_k 1 (model), top_p 0.5 (environment), min_p 0.25 (config file), "
        "repeat_penalty 1.5 (flag); at most 3 tokens (config file)"
    )


def test_compare_says_it_for_each_answer_and_batch_once_for_all(tiny: Path, says: Says) -> None:
    asked = ("-m", str(tiny), "-n", "2", "--temp", "0.5")
    compared = json.loads(says("compare", *asked, "--pref", "a", "--pref", "-", "--json", "tea?")[0])
    assert [one["sampling"]["temperature"] for one in compared] == [{"value": 0.5, "from": "flag"}] * 2
    out, error = says("batch", *asked, "-v", "-", stdin=b'{"query": "tea?"}\n{"query": "bread?"}\n')
    assert "sampling" not in out and error.count("temperature 0.5 (flag), top_k 40 (built-in)") == 1


def test_python_is_told_too(tiny: Path) -> None:
    with Model.open(tiny) as model:
        answer = generate(model, "tea?", max_tokens=2, top_p=0.5)
    assert answer.sampling["top_p"] == {"value": 0.5, "from": "call"}
    assert answer.sampling["temperature"] == {"value": 0.7, "from": "built-in"}


def test_help_names_the_built_in_values_and_that_a_models_own_come_first(
    says: Says, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    for command in ("chat", "compare", "batch"):
        lines = says(command, "--help")[0].splitlines()
        for one in SAMPLING_PARAMETERS.values():
            (line,) = (line for line in lines if f"--{one.option.replace('_', '-')} " in line)
            assert f"Default: the model's own, else {one.built_in:g}." in line
        assert any("--max-tokens" in line and f"Default: {edge.USUAL_MAX_TOKENS:,}." in line for line in lines)


def test_where_a_value_comes_from_makes_no_other_run_of_a_batch(
    tiny: Path, says: Says, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in.jsonl").write_text('{"query": "tea?"}\n')
    command = ("batch", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), "-m", str(tiny), "--seed", "1")
    says(*command, "-n", "2")
    monkeypatch.setenv("METAALIGN_EDGE_MAX_TOKENS", "2")
    assert "1 row: 0 answered, 1 before" in says(*command)[1]


# -- an answer without end --------------------------------------------------------------------------------------------


def test_an_answer_without_end_stops_at_the_usual_bound_and_n_sets_another(repeating: Path, says: Says) -> None:
    def cut(*more: str) -> tuple[int, str]:
        answer = json.loads(says("chat", "-m", str(repeating), "--temp", "0", "--json", *more, "tea?")[0])
        return answer["output_tokens"], answer["finish_reason"]

    assert cut() == (edge.USUAL_MAX_TOKENS, "length")
    assert cut("-n", "2100") == (2100, "length") and cut("-n", "5") == (5, "length")


def test_the_usual_bound_reserves_no_more_of_the_context_than_before(repeating: Path, says: Says, refuses: Any) -> None:
    def ask(words: int, *more: str) -> tuple[str, ...]:
        return ("chat", "-m", str(repeating), "-c", "512", "--temp", "0", "--json", *more, " fox" * words)

    answer = json.loads(says(*ask(360))[0])  # of 512 tokens, 128 are reserved for the answer
    assert 360 < answer["input_tokens"] <= 384 and answer["finish_reason"] == "length"
    assert answer["input_tokens"] + answer["output_tokens"] == 512
    assert "the answer reserves 128" in refuses(6, *ask(390)) and "reserves 2,048" in refuses(6, *ask(9, "-n", "2048"))
