"""The dataset: right by construction, flipped with the meta-prompt, the same for a seed, free of what is held out."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

import metaalign_edge_templates
from metaalign_edge_preferences import families, values
from metaalign_edge_preferences.dialogs import SUBJECTS, Plan, compose, flip, held_out_pair, subjects
from metaalign_edge_runtime.stores import files
from metaalign_edge_tune.dataset import (
    SUBSETS,
    InvalidRow,
    document,
    leaks,
    main,
    pair,
    read_rows,
    report,
    row,
    rows,
)  # fmt: skip
from metaalign_edge_tune.responses import respond


@pytest.fixture(scope="module")
def sample():
    """Three thousand training rows."""
    return [row(0, index) for index in range(3000)]


def test_a_row_is_a_function_of_seed_and_index(sample):
    assert [row(0, i) for i in range(50)] == sample[:50]
    stream = rows(0, start=30)
    assert [next(stream) for _ in range(20)] == sample[30:50]
    assert row(1, 0) != sample[0]


# --- what there is to say ---------------------------------------------------------------------------------------------


def test_there_are_three_hundred_topics_with_distinct_facts():
    topics = subjects("topic")
    assert len(topics) >= 300 and len({topic.name for topic in topics}) == len(topics)
    asked = [phrase for topic in topics for phrase in topic.ask]
    assert len(asked) == len(set(asked))
    facts = [fact for topic in topics for fact in topic.facts]
    assert len(facts) == len(set(facts))
    for topic in topics:
        assert len(topic.facts) == 3 and topic.name in topic.ask
        texts = [*topic.facts, *topic.by_value.values()]
        assert all(re.fullmatch(r"[A-Z][^!?\n]*\.", text) for text in texts), topic.name
        begin = topic.name[0].upper() + topic.name[1:] + " "
        named = [topic.facts[0], topic.by_value["audience.child"], topic.by_value["audience.expert"]]
        assert all(text.startswith(begin) for text in named), topic.name


def test_every_opinion_has_a_balanced_answer_and_one_for_each_of_its_backgrounds():
    opinions = subjects("opinion")
    assert len(opinions) >= 30
    for opinion in opinions:
        assert len(opinion.facts) == 3 and len(opinion.by_value) >= 2
        for key, stance in opinion.by_value.items():
            assert key in values() and stance["side"] in ("yes", "no") and len(stance["answer"]) == 3
    asked = Counter(key for opinion in opinions for key in opinion.by_value)
    assert set(asked) == {key for key in values() if key.startswith("background.")} and min(asked.values()) >= 5


def test_every_request_has_an_answer_for_each_priority():
    for request in subjects("request"):
        assert set(request.by_value) == {"priority.safety", "priority.helpfulness", "priority.honesty"}
        assert all(len(answer["answer"]) == 3 for answer in request.by_value.values())


# --- responses --------------------------------------------------------------------------------------------------------


# a child's answer may hold a long word of a later fact; "Please ask me about one of those." ends like advice
EXCUSED = ("audience.child", "ending.nothing", "person.i")


def test_every_response_obeys_the_preferences_of_its_row(sample):
    checked, missed = Counter(), Counter()
    for one in sample:
        for check in one.scene.checks:
            checked[check.key] += 1
            if not check.holds(one.turns[-1].response):
                missed[check.key] += 1
                assert check.key in EXCUSED, (check, one)
    assert sum(checked.values()) > 4500 and sum(missed.values()) < 0.005 * sum(checked.values()), missed


def test_training_covers_every_value_subject_and_length_of_dialog(sample):
    met = Counter(key for one in sample for key in one.families)
    assert set(met) == set(values())
    assert {one.scene.last.subject.kind for one in sample} == set(SUBJECTS)
    assert {len(one.turns) for one in sample} == set(range(1, 7))
    assert any(not one.system_info and not one.user_info for one in sample)
    assert any(len(one.families) >= 3 for one in sample)


def test_system_info_wins_every_conflict(sample):
    clashes = [one for one in sample if one.scene.prompt.losing]
    assert len(clashes) > 400
    undecided = 0
    for one in clashes:
        (lost,) = one.scene.prompt.losing
        winner = next(w for w in one.scene.prompt.system if w.value.family == lost.value.family)
        assert winner.value.key in one.families and lost.value.key not in one.families
        assert lost in one.scene.prompt.user and one.winner == "system"
        losing = one.scene.losing
        undecided += bool(losing) and all(check.holds(one.turns[-1].response) for check in losing)
    assert undecided < 0.06 * len(clashes)  # some wishes can be obeyed together by chance: no measure, so any unit


def test_a_plan_is_followed():
    plan = Plan(kind="topic", subject="the moon", values=("case.upper", "format.json"), turns=1, background="")
    scene = compose(Random(5), plan)
    assert respond(scene.last, scene.prompt.force).startswith('{"ANSWER": "THE MOON IS A ROCKY WORLD')
    mine = replace(plan, values=(), background="animals", kind="opinion", subject="zoos")
    scene = compose(Random(5), mine)
    expected = (
        "For someone who cares for animals, no, good zoos should stay open. You know that they save rare species."
    )
    assert respond(scene.last, scene.prompt.force) == expected
    measured = replace(plan, values=("units.imperial", "taboo.unnamed"))
    text = respond((scene := compose(Random(5), measured)).last, scene.prompt.force)
    assert text.endswith("circles the Earth. In imperial units, it is about 239,000 miles away.")
    neutral = replace(mine, values=("stance.open",), tiers=("system",))
    scene = compose(Random(5), neutral)
    assert respond(scene.last, scene.prompt.force).startswith("People disagree about zoos.")


@pytest.mark.parametrize(("keys", "expected"), [
    (("format.table", "title.yes"), "# Tea\n| Facts |\n| --- |\n| Tea is a drink made by pouring"),
    (("echo.yes", "lines.separate"), "You asked: "),
    (("taboo.unnamed",), "It is a drink made by pouring"),
    (("bold.yes", "opening.hello"), "Hello, **tea is a drink made by pouring"),
    (("code.yes", "exclamation.yes"), "```\nTea is a drink made by pouring hot water over dried leaves!"),
    (("quotes.yes", "persona.wizard"), '"By my magic wand, tea is'),
    (("label.yes", "opening.thanks"), "Answer: Thank you for asking: tea is"),
])  # fmt: skip
def test_a_response_takes_the_shape_that_is_wanted(keys, expected):
    scene = compose(Random(1), Plan(kind="topic", subject="tea", values=keys, turns=1, background=""))
    assert respond(scene.last, scene.prompt.force).startswith(expected)


def test_preferences_that_exclude_each_other_never_meet(sample):
    for one in sample:
        keys = set(one.families)
        for key in keys:
            excluded = values()[key].excludes
            assert not keys & set(excluded) and not any(k.partition(".")[0] in excluded for k in keys - {key}), keys


# --- the order flips --------------------------------------------------------------------------------------------------


def test_the_order_of_two_candidates_flips_with_the_meta_prompt():
    kinds = Counter()
    for index in range(400):
        first, second = pair(3, index)
        assert first.turns[-1].query == second.turns[-1].query
        assert first.turns[-1].response == second.rejected != first.rejected == second.turns[-1].response
        assert (first.system_info, first.user_info) != (second.system_info, second.user_info)
        kinds[first.subset] += 1
    assert set(kinds) == set(SUBSETS)


def test_in_a_flipped_conflict_the_tiers_swap_their_wishes():
    plan = Plan(kind="topic", values=("case.upper",), tiers=("system",), losing="case.lower", turns=1, background="")
    scene = compose(Random(0), plan)
    other = flip(Random(0), scene)
    assert list(other.prompt.force) == ["case.lower"] and other.prompt.losing[0].value.key == "case.upper"
    assert other.last.query == scene.last.query


def test_a_response_that_followed_a_replaced_preference_is_not_trained_on(sample):
    changed = [one for one in sample if not all(turn.trained for turn in one.turns)]
    assert changed and all(one.turns[-1].trained for one in sample)
    switch = Plan(kind="topic", values=("case.upper",), turns=3, changed=True, background="")
    scene = compose(Random(1), switch)
    assert [question.prompt is scene.prompt for question in scene.questions] == [False, False, True]


# --- what is held out -------------------------------------------------------------------------------------------------


def test_training_has_no_held_out_wording(sample):
    assert not [leak for one in sample for leak in leaks(one)]
    trained = "\n".join(f"{one.system_info}\n{one.user_info}" for one in sample).casefold()
    for value in values().values():
        for form, phrases in value.held_out.items():
            if form == "say":  # whole sentences; shorter phrases may stand inside other words
                assert not any(phrase.casefold() in trained for phrase in phrases if "{" not in phrase), value.key
    for frame in ("whatever I ask", "one rule:", "let every reply", "I am fond of", "a word about me", "style:"):
        assert frame.casefold() not in trained


def test_training_never_joins_a_held_out_pair_of_topic_and_value(sample):
    names = [topic.name for topic in subjects("topic")]
    keys = [key for key in values() if families()[key.partition(".")[0]].transfer]
    pairs = [(name, key) for name in names for key in keys if held_out_pair(name, key)]
    assert 0.06 < len(pairs) / (len(names) * len(keys)) < 0.11
    asked = {(one.scene.last.subject.name, key) for one in sample for key in one.families}
    assert not asked & set(pairs)


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_dataset_is_written_reported_and_valid(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    assert main(["--out", str(path), "--rows", "600"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert written["rows"] == 600 and set(written["subsets"]) == set(SUBSETS)
    assert written.pop("held_out_shown") == 0
    found = list(read_rows(path))
    assert found == [document(row(1, index)) for index in range(600)]
    assert set(found[0]) == {
        "subset", "system_info", "user_info", "turns", "query", "response", "rejected", "families", "winner",
    }  # fmt: skip
    assert main(["--validate", str(path)]) == 0
    assert json.loads(capsys.readouterr().out) == written


def test_the_report_counts_preferences_and_duplicates():
    found = [document(row(2, index)) for index in range(1000)]
    counted = report([*found, found[0]])
    assert counted["duplicates"] >= 1 and counted["distinct"]["preferences"] > 700
    assert counted["characters"]["response"]["max"] == max(len(one["response"]) for one in found)


GOOD = document(row(0, 0))


@pytest.mark.parametrize(("change", "said"), [
    ({"subset": "Other"}, "field 'subset' must be one of Priority"),
    ({"query": 3}, "field 'query' must be a string, not int"),
    ({"response": " "}, "field 'response' is empty"),
    ({"families": ["case.uper"]}, "names 'case.uper', which is unknown: did you mean 'case.upper'?"),
    ({"families": "case.upper"}, "field 'families' must be a list"),
    ({"turns": [{"query": "Tea?"}]}, "field 'turns' must be a list of objects"),
    ({"rejected": GOOD["response"]}, "field 'rejected' is the same as 'response'"),
    ({"winner": None}, "field 'winner' must be one of"),
])  # fmt: skip
def test_a_bad_row_is_named_with_its_line_and_field(change, said, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n\n" + json.dumps({**GOOD, **change}) + "\n", encoding="utf-8")
    with pytest.raises(InvalidRow, match="line 3: .*" + re.escape(said[:30])):
        list(read_rows(path))
    assert main(["--validate", str(path)]) == 2
    assert said in capsys.readouterr().err


def test_every_error_of_a_file_is_named(tmp_path, capsys):
    wrong = [{**GOOD, "query": 3, "winner": "me"}, GOOD, {**GOOD, "families": ["a", "b"], "subset": None}, [1], GOOD]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in wrong) + "{\n", encoding="utf-8")
    assert main(["--validate", str(path)]) == 2
    shown = capsys.readouterr()
    *lines, last = shown.err.splitlines()
    assert shown.out == "" and last == f"dataset: {path}: 4 of 6 rows are wrong"
    places = [re.search(r"line (\d): (?:field '(\w+)')?", line).groups() for line in lines]
    assert places == [
        ("1", "query"), ("1", "winner"), ("3", "subset"), ("3", "families"), ("3", "families"), ("4", None), ("6", None),
    ]  # fmt: skip
    path.write_text("\n")
    assert main(["--validate", str(path)]) == 2 and "holds no row" in capsys.readouterr().err


@pytest.mark.parametrize(("line", "said"), [
    (b'{"query": "\xff"}', "line 1: not UTF-8"), (b"{", "line 1: not JSON"), (b"[]", "line 1: a list where"),
    (b'{"subset": "Priority"}', "field 'system_info' is missing"), (b"[" * 100_000, "line 1: not JSON"),
])  # fmt: skip
def test_a_file_that_holds_no_rows_is_refused(line, said, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(line)
    assert main(["--validate", str(path)]) == 2
    assert said in capsys.readouterr().err


def test_a_file_that_is_missing_or_cannot_be_written_is_an_error_of_one_line(tmp_path, capsys):
    assert main(["--validate", str(tmp_path / "none.jsonl")]) == 3
    assert main(["--out", str(tmp_path / "no" / "rows.jsonl"), "--rows", "2"]) == 8
    assert all(line.startswith("dataset: ") for line in capsys.readouterr().err.splitlines())


FULL = """
import resource, sys
import metaalign_edge
from metaalign_edge_tune.dataset import main

resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
sys.exit(main(["--out", sys.argv[1], "--rows", "2"]))
"""


def test_a_full_disk_leaves_no_file(tmp_path):
    command = [sys.executable, "-c", FULL, str(tmp_path / "full.jsonl")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 8 and list(tmp_path.iterdir()) == []
    assert all(line.startswith("dataset: ") for line in ended.stderr.splitlines())


def test_a_pipe_is_written_and_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "rows")
    command = [sys.executable, "-m", "metaalign_edge_tune.dataset", "--out", str(tmp_path / "rows"), "--rows", "3"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        lines = (tmp_path / "rows").read_text().splitlines()
    assert process.returncode == 0 and [json.loads(line) for line in lines] == [
        document(row(1, one)) for one in range(3)
    ]
    assert (tmp_path / "rows").is_fifo()


# --- the dialog -------------------------------------------------------------------------------------------------------


def test_a_row_renders_through_the_native_template(sample):
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    source = Path(metaalign_edge_templates.__file__).with_name("metaalign.jinja").read_text(encoding="utf-8")
    template = environment.from_string(source)
    one = next(one for one in sample if len(one.turns) == 2 and one.system_info and one.user_info)
    messages = [{"role": "system", "content": one.system_info}, {"role": "user_info", "content": one.user_info}]
    for turn in one.turns:
        messages += [{"role": "user", "content": turn.query}, {"role": "assistant", "content": turn.response}]
    rendered = template.render(messages=messages, add_generation_prompt=False)
    assert rendered.count("<|end|>") == 6 and rendered.endswith(f"{one.turns[-1].response}<|end|>")


def test_the_dataset_needs_no_torch():
    heavy = {"torch", "tokenizers", "llama_cpp", "transformers"}
    code = f"import sys, metaalign_edge_tune.dataset; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_a_killed_process_left_is_removed_and_what_another_writes_is_not(tmp_path):
    (tmp_path / ".rows.jsonl.metaalign-part").write_text("half")
    (tmp_path / ".rows.jsonl.txt").write_text("somebody else's")
    with files.replacing(tmp_path / "more.jsonl") as used:
        used.write_text("half")
        assert main(["--out", str(tmp_path / "rows.jsonl"), "--rows", "2"]) == 0
        assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", used.name, ".rows.jsonl.txt"}


@pytest.mark.parametrize(("arguments", "code", "said"), [
    ([], 5, 'demo: torch is not installed: pip install "metaalign-edge[tune]"'),
    (["--every", "0"], 2, "--every 0: at least one"),
])  # fmt: skip
def test_the_recipe_says_what_it_lacks_before_it_writes(arguments, code, said, tmp_path):
    script = "import sys; sys.modules['torch'] = None; from metaalign_edge_tune.demo import main; sys.exit(main())"
    command = [sys.executable, "-c", script, "--out", str(tmp_path / "out"), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == code and said in ended.stderr and "Traceback" not in ended.stderr
    assert not (tmp_path / "out").exists()
