"""IFEval's rows and lm-eval's checkers: the same verdicts as lm-eval's own, offline. The rows here are ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metaalign_edge_preferences import suite
from metaalign_edge_runtime.errors import UsageError

Run = Callable[..., "subprocess.CompletedProcess[str]"]
ROWS: list[dict[str, Any]] = [
    {"key": 1, "prompt": "What is tea?", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    {"key": 2, "prompt": "What is the moon?",
     "instruction_id_list": ["change_case:english_capital", "length_constraints:number_sentences"],
     "kwargs": [{}, {"relation": "at least", "num_sentences": 2}]},
    {"key": 3, "prompt": "What is bread?", "instruction_id_list": ["keywords:frequency", "startend:quotation"],
     "kwargs": [{"relation": "at least", "keyword": "flour", "frequency": 2, "language": None}, {}]},
    {"key": 4, "prompt": "What is snow?", "instruction_id_list": ["keywords:forbidden_words"],
     "kwargs": [{"forbidden_words": ["cold", "white"]}]},
    {"key": 5, "prompt": "What is rain?", "instruction_id_list": ["combination:repeat_prompt"],
     "kwargs": [{"prompt_to_repeat": "What is rain?"}]},
    {"key": 6, "prompt": "What is wind?", "instruction_id_list": ["change_case:capital_word_frequency"],
     "kwargs": [{"capital_relation": "at least", "capital_frequency": 2}]},
    {"key": 7, "prompt": "What is salt?", "instruction_id_list": ["language:response_language"],
     "kwargs": [{"language": "en"}]},
    {"key": 8, "prompt": "What is iron?", "instruction_id_list": ["length_constraints:number_words"], "kwargs": [{}]},
]  # fmt: skip
RESPONSES = [
    "",
    " \n",
    "Tea is a drink.",
    "THE MOON IS A ROCKY WORLD. IT CIRCLES THE EARTH.",
    '"Flour and more flour, well baked."',
    "What is rain? Water that falls from clouds.",
    "NASA and ESA know. Dr. Who, too.",
    "Der Schnee ist weiß und sehr kalt, sagte der alte Mann.",
    '<<Iron>>\n\n* one\n* two\n***\nP.S. Section 1 {"a": 1}',
    "word " * 400,
    "12345 ... ?!",
]


@pytest.fixture(scope="module")
def punkt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence tokenizer as NLTK's data has it, trained on a few words: what a user has after a download."""
    import nltk
    from nltk.tokenize.punkt import PunktTrainer, save_punkt_params

    data = tmp_path_factory.mktemp("nltk")
    folder = data / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True)
    trainer = PunktTrainer("Dr. No came. Dr. Who left. Dr. Yes stayed. Tea is hot. It is a drink. " * 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nltk.data, "path", [str(data)])  # nltk writes to no other folder that every user may write to
        save_punkt_params(trainer.get_params(), str(folder))
    return data


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("METAALIGN_EDGE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def ifeval(punkt: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, in this process, with NLTK's data."""
    import nltk

    monkeypatch.setattr(nltk.data, "path", [str(punkt)])
    from metaalign_edge_preferences import ifeval

    return ifeval


def test_verdicts_are_those_of_lm_eval(ifeval: Any, rows: Path) -> None:
    cases, unchecked = ifeval.read_ifeval(rows)
    assert unchecked == [] and {case.section for case in cases} == {"prompt"}
    from lm_eval.tasks.ifeval import utils

    verdict = suite.Judged
    for case, row in zip(cases, ROWS, strict=True):
        drawn = [check.parameters["arguments"] for check in case.checks] if row["key"] == 8 else row["kwargs"]
        for response in RESPONSES:
            theirs = utils.process_results({**row, "kwargs": drawn}, [response])
            one, *each = ifeval.judged_by_instruction([verdict(case, response)])
            assert one.obeyed == theirs["prompt_level_strict_acc"], (row, response)
            assert [single.obeyed for single in each] == theirs["inst_level_strict_acc"], (row, response)
    summary = ifeval.summary(ifeval.judged_by_instruction([verdict(case, "TEA") for case in cases]))["ifeval"]
    assert (summary["prompt_strict"].n, summary["instruction_strict"].n) == (8, 10)
    assert sum(kind.n for kind in summary["by_instruction"].values()) == 10


def test_every_instruction_of_lm_eval_has_words_and_a_verdict(ifeval: Any, tmp_path: Path) -> None:
    from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT

    given = {"combination:repeat_prompt": {"prompt_to_repeat": "Tea?"}}
    lines = [
        {"key": name, "prompt": "Tea?", "instruction_id_list": [name], "kwargs": [given.get(name, {})]}
        for name in INSTRUCTION_DICT
    ]
    path = tmp_path / "all.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, again = ifeval.read_ifeval(path)[0], ifeval.read_ifeval(path)[0]
    assert first == again and len(first) == len(INSTRUCTION_DICT)  # what a row leaves open is drawn by its key
    assert [case.checks[0].parameters for case in first] == [case.checks[0].parameters for case in again]
    assert all(case.system_info and isinstance(case.checks[0].holds("Tea is hot."), bool) for case in first)


@pytest.mark.parametrize("tier, filled", [("system", "system_info"), ("user", "user_info"), ("query", None)])
def test_the_instructions_words_stand_in_the_tier_and_the_prompt_is_the_question(
    tier: str, filled: str | None, ifeval: Any, rows: Path
) -> None:
    case = ifeval.read_ifeval(rows, tier)[0][1]
    texts = {"system_info": case.system_info, "user_info": case.user_info}
    words = "Your entire response should be in English, and in all capital letters.\nYour response should contain at least 2 sentences."
    assert texts == {"system_info": "", "user_info": ""} | ({filled: words} if filled else {})
    assert case.queries == ("What is the moon?",)


@pytest.mark.parametrize("row, said", [
    ({**ROWS[0], "instruction_id_list": ["no:such"]}, "no:such"),
    ({**ROWS[0], "kwargs": []}, "'kwargs'"),
    ({**ROWS[0], "prompt": 7}, "'prompt'"),
    ({**ROWS[0], "kwargs": [{"colour": "red"}]}, "colour"),
    ({**ROWS[1], "kwargs": [{}, {"relation": "perhaps", "num_sentences": 3}]}, "perhaps"),
    ([1], "object"),
])  # fmt: skip
def test_a_row_that_is_none_is_named(row: Any, said: str, ifeval: Any, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(UsageError, match="line 2") as error:
        ifeval.read_ifeval(path)
    assert said in str(error.value)


def test_the_command_prints_the_strict_rates_and_downloads_nothing(
    run: Run, tiny: Path, rows: Path, punkt: Path
) -> None:
    command = ("eval", "-m", str(tiny), "--suite", str(rows), "-n", "6", "--json")
    without = run(*command, timeout=300)
    assert without.returncode == 0, without.stderr
    document = json.loads(without.stdout)  # lm-eval says on stdout that it has downloaded something: not here
    kinds = ["change_case:capital_word_frequency", "length_constraints:number_sentences"]
    assert document["unchecked"] == kinds and all(kind in without.stderr for kind in kinds)
    assert "python -m nltk.downloader punkt_tab" in without.stderr
    assert (document["n"], document["ifeval"]["prompt_strict"]["n"]) == (7, 6)
    assert document["ifeval"]["instruction_strict"]["n"] == 8
    page = rows.with_suffix(".html")
    environment = {**os.environ, "NLTK_DATA": str(punkt)}
    whole = run(*command, "--report", str(page), "--against", str(tiny), env=environment, timeout=300)
    assert whole.returncode == 0, whole.stderr
    document = json.loads(whole.stdout)
    assert document["unchecked"] == [] and document["ifeval"]["prompt_strict"]["n"] == 8
    families = document["against"]["families"]
    assert families["worse"] == families["better"] == [] and len(families["not_distinguishable"]) == 10
    assert "IFEval" in page.read_text() and "ifeval by instruction" in page.read_text().lower()


def test_importing_the_checkers_asks_nobody(punkt: Path) -> None:
    code = (
        "import socket, sys\n"
        "def refuse(*_): raise SystemExit('the network!')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "import metaalign_edge\n"
        "from metaalign_edge_preferences import ifeval\n"
        "ifeval._registry()\n"
        "print(ifeval._can_check('length_constraints:number_sentences'))\n"
    )
    for data, said in ((punkt, "True\n"), (punkt / "none", "False\n")):
        environment = {**os.environ, "NLTK_DATA": str(data)}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300
        )
        assert (done.returncode, done.stdout) == (0, said), done.stderr
