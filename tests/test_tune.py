"""The generated dialogs: correct by construction, the same for a seed, and free of what evaluation holds out."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import Random

import metaalign_edge_templates
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from metaalign_edge_preferences import families, values
from metaalign_edge_tune.dataset import Plan, held_out_pair, row, rows, subjects, write_row
from metaalign_edge_tune.evaluate import measure, suite, summary, table


@pytest.fixture(scope="module")
def sample():
    """Two thousand training rows."""
    return [row(0, index) for index in range(2000)]


@pytest.fixture(scope="module")
def tests():
    """A small suite of test rows."""
    return suite(seed=0, size=60)


def test_a_row_is_a_function_of_seed_and_index(sample):
    assert [row(0, i) for i in range(50)] == sample[:50]
    stream = rows(0, start=30)
    assert [next(stream) for _ in range(20)] == sample[30:50]
    assert row(1, 0) != sample[0]


def test_there_are_a_hundred_topics_with_distinct_facts():
    topics = subjects("topic")
    assert len(topics) >= 100 and len({topic.name for topic in topics}) == len(topics)
    asked = [phrase for topic in topics for phrase in topic.ask]
    assert len(asked) == len(set(asked))
    facts = [fact for topic in topics for fact in topic.facts]
    assert len(facts) == len(set(facts))
    for topic in topics:
        assert len(topic.facts) == 3 and topic.name in topic.ask
        texts = [*topic.facts, *topic.by_value.values()]
        assert all(re.fullmatch(r"[A-Z][^!?\n]*\.", text) for text in texts), topic.name


def test_every_opinion_has_a_balanced_answer_and_one_for_each_of_its_backgrounds():
    for opinion in subjects("opinion"):
        assert len(opinion.facts) == 3 and opinion.by_value
        for key, stance in opinion.by_value.items():
            assert key in values() and stance["side"] in ("yes", "no") and len(stance["answer"]) == 3


def test_every_response_obeys_the_preferences_of_its_row(sample):
    checked = 0
    for one in sample:
        for check in one.checks:
            checked += 1
            assert check.holds(one.turns[-1].response), (check, one)
    assert checked > 2000


def test_every_test_response_obeys_the_preferences_of_its_row(tests):
    for section, found in tests.items():
        for one in found:
            assert all(check.holds(one.turns[-1].response) for check in one.checks), (section, one)


def test_a_plain_answer_does_not_obey_by_accident(tests):
    """The checks mean something: the answer that ignores every preference fails most of them."""
    for name in ("wording: seen", "conflict", "two preferences"):
        ignored = [all(c.holds("A fox is a small wild dog. It hunts mice.") for c in one.checks) for one in tests[name]]
        assert sum(ignored) < 0.45 * len(ignored), name


def test_system_info_wins_every_conflict(sample, tests):
    clashes = [one for one in sample + tests["conflict"] if one.losing]
    assert len(clashes) > 250
    for one in clashes:
        lost = one.losing[0].key
        family = lost.partition(".")[0]
        held = [check.key for check in one.checks if check.key.startswith(family + ".")]
        if family != "audience" or one.kind == "topic":
            assert len(held) == 1 and held[0] != lost
            winner = next(w for w in one.wordings if w.value.key == held[0])
            assert winner.text.rstrip(".!")[1:] in one.system_info


def test_training_covers_every_value_subject_and_shape_of_dialog(sample):
    assert {check.key for one in sample for check in one.checks} >= {k for k in values() if k[:10] != "background"}
    assert {one.kind for one in sample} == {"topic", "opinion", "unknown", "smalltalk"}
    assert {len(one.turns) for one in sample} == {1, 2, 3}
    assert any(not one.system_info and not one.user_info for one in sample)
    assert any(len(one.wordings) >= 3 for one in sample)


def test_a_response_that_followed_a_replaced_preference_is_not_trained_on(sample):
    changed = [one for one in sample if not all(turn.trained for turn in one.turns)]
    assert changed and all(one.turns[-1].trained for one in sample)
    switch = Plan(kind="topic", values=("case.upper",), turns=3, changed=True, background="")
    for index in range(50):
        one = write_row(Random(index), switch)
        assert [turn.trained for turn in one.turns] == [False, False, True]
        assert one.turns[-1].response.isupper()


def test_preferences_that_exclude_each_other_never_meet(sample):
    for one in sample:
        keys = {check.key for check in one.checks} & set(values())
        assert not any(keys & set(values()[key].excludes) for key in keys), keys


# --- what is held out -------------------------------------------------------------------------------------------------


def test_training_has_no_held_out_wording(sample):
    assert {wording.split for one in sample for wording in one.wordings} == {"seen"}
    trained = "\n".join(f"{one.system_info}\n{one.user_info}" for one in sample).casefold()
    for value in values().values():
        for kind, phrases in value.held_out.items():
            if kind == "say":  # whole sentences; shorter phrases may stand inside other words
                assert not any(phrase.casefold() in trained for phrase in phrases if "{" not in phrase), value.key
    for frame in ("whatever I ask", "one rule:", "let every reply", "I am fond of", "a word about me", "style:"):
        assert frame.casefold() not in trained


def test_training_never_joins_a_held_out_pair_of_topic_and_value(sample):
    by_name = {topic.name: topic for topic in subjects("topic")}
    pairs = [(name, key) for name in by_name for key in values() if held_out_pair(name, key)]
    assert 150 < len(pairs) < 0.15 * len(by_name) * len(values())
    for one in sample:
        if one.kind == "topic":
            text = one.turns[-1].response.casefold()
            about = [n for n, topic in by_name.items() if any(f.casefold() in text for f in topic.facts[1:])]
            for check in one.checks:
                assert not any(held_out_pair(name, check.key) for name in about[:1]), (about, check.key)


def test_the_suite_asks_what_training_never_showed(tests):
    assert {w.split for one in tests["wording: word"] for w in one.wordings} == {"word"}
    assert {w.split for one in tests["wording: frame"] for w in one.wordings} == {"frame"}
    assert all(held_out_pair_of(one) for one in tests["topic new to the value"])
    trained = {turn.query for index in range(2000) for turn in row(0, index).turns}
    forms = [one.turns[-1].query for one in tests["new form of question"]]
    assert not any(query in trained for query in forms)
    unknown = {one.turns[-1].query for one in tests["unknown question"]}
    assert len(unknown) > 20 and len(unknown & trained) <= 2


def held_out_pair_of(one):
    """Tell whether a one-turn topic row joins a held-out pair."""
    text = one.turns[-1].response.casefold()
    names = [t.name for t in subjects("topic") if any(str(f).casefold().rstrip(".") in text for f in every_fact(t))]
    return any(held_out_pair(name, one.wordings[0].value.key) for name in names) or not names


def every_fact(topic):
    """Yield what a response on a topic may open with, as it stands after a comma too."""
    for fact in (*topic.facts, *topic.by_value.values()):
        yield fact[1:]


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_an_oracle_reaches_every_rate_and_a_deaf_model_does_not(tests):
    oracle = summary(measure(lambda one: one.turns[-1].response, tests))
    assert all(rate.rate == 1.0 for rates in oracle.values() for name, rate in rates.items() if name != "user wins")
    assert oracle["conflicts"]["user wins"].rate == 0.0
    deaf = summary(measure(lambda one: "I am a model. I like tea.", tests))
    assert deaf["wording: seen"]["obeyed"].rate < 0.5 and deaf["no preference"]["exact"].rate == 0.0
    text = table(oracle)
    assert "wording: word" in text and "system wins 100.0 %" in text


def test_a_model_that_listens_to_the_user_loses_the_conflicts(tests):
    def user_first(one):
        keys = tuple(check.key for check in one.losing)
        plan = Plan(kind="topic", values=keys, turns=1, background="")
        return write_row(Random(0), plan).turns[-1].response if keys else one.turns[-1].response

    outcome = summary(measure(user_first, tests))["conflicts"]
    assert outcome["user wins"].rate > 0.8 and outcome["system wins"].rate < 0.1


def test_the_suite_comes_from_its_seed(tests):
    assert suite(seed=0, size=60) == tests
    assert suite(seed=1, size=60) != tests


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


def test_dataset_and_evaluation_need_no_torch():
    heavy = {"torch", "tokenizers", "llama_cpp"}
    code = f"import sys, metaalign_edge_tune.evaluate; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_models_card_names_every_family():
    card = (Path(__file__).parent.parent / "models" / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| (\w+) \| [^|]*[^|\s] \|$", card, re.MULTILINE)
    assert set(families()) <= set(named)


def test_a_plan_is_followed():
    plan = Plan(kind="topic", subject="the moon", values=("case.upper", "format.json"), turns=1, background="")
    one = write_row(Random(5), plan)
    assert one.turns[0].response.startswith('{"ANSWER": "THE MOON IS A ROCKY WORLD')
    explicit = replace(plan, values=("background.animals",), kind="opinion", subject=None)
    assert write_row(Random(5), explicit).kind == "opinion"
