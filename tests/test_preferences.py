"""Preferences as data: families, their wordings, and which of them training may see."""

from random import Random

import pytest

from metaalign_edge_preferences import SPLITS, express, families, neutral_lines, profiles, values
from metaalign_edge_preferences.checkers import CHECKERS
from metaalign_edge_preferences.dialogs import SUBJECTS, Plan, compose

KINDS = {
    "length", "case", "format", "tone", "persona", "phrases", "words", "units", "audience", "stance", "priority",
}  # fmt: skip


def test_there_are_thirty_families_of_every_kind_and_each_value_has_twenty_paraphrases():
    assert len(families()) >= 30 and {family.kind for family in families().values()} == KINDS
    for value in values().values():
        assert sum(map(len, value.seen.values())) >= 20, value.key
        assert sum(map(len, value.held_out.values())) >= 2, value.key


def test_every_preference_but_a_name_has_an_opposite_or_is_no_contradiction():
    for family in families().values():
        assert len(family.values) >= 2 or family.name == "name"


def test_families_name_checkers_and_each_other_correctly():
    for family in families().values():
        assert family.checker in CHECKERS
        assert set(family.tiers) <= {"system", "user"}
        assert set(family.subjects) <= set(SUBJECTS)
        assert {other for value in family.values for other in value.excludes} <= {*values(), *families()}
        assert [value.family for value in family.values] == [family.name] * len(family.values)


def test_no_phrase_is_both_trained_and_held_out_or_belongs_to_two_values():
    owner: dict[str, str] = {}
    for value in values().values():
        seen = {phrase.casefold() for phrases in value.seen.values() for phrase in phrases}
        held_out = {phrase.casefold() for phrases in value.held_out.values() for phrase in phrases}
        assert not seen & held_out, value.key
        for phrase in seen | held_out:
            assert owner.setdefault(phrase, value.key) == value.key, phrase


def test_the_splits_of_wordings_do_not_overlap():
    rng = Random(0)
    for value in values().values():
        drawn = {
            split: {express(value, split, rng).text.casefold().strip(".! ") for _ in range(150)} for split in SPLITS
        }
        composed = value.family not in ("background", "name", "word")
        for split in SPLITS[1:]:
            if composed or split != "combination":
                shared = {text for text in drawn[split] & drawn["seen"] if split != "combination"}
                assert not shared, (value.key, split, shared)
        assert all(drawn.values())


def test_a_combination_is_seen_or_held_out_but_never_both():
    rng = Random(1)
    value = values()["case.upper"]
    explicit = ("do", "manner", "thing")
    drawn = {split: [express(value, split, rng) for _ in range(3000)] for split in ("seen", "combination")}

    def cores(split):
        ends = [", in this chat", ", please", ", thank you", " in this chat", " please", " pls", ".", "!"]
        texts = set()
        for wording in drawn[split]:
            text = wording.text.casefold()
            for _ in range(2):
                for end in ends:
                    text = text.removesuffix(end)
            if wording.form in explicit:
                texts.add(text)
        return texts

    assert cores("seen") and cores("combination")
    assert not cores("seen") & cores("combination")


def test_wordings_are_many_and_come_from_the_seed_alone():
    value = values()["length.one"]
    assert len({express(value, "seen", Random(i)).text for i in range(1000)}) > 500
    first, second = ([express(value, "seen", Random(i)).text for i in range(20)] for _ in range(2))
    assert first == second


def test_no_wording_keeps_an_unfilled_slot():
    rng = Random(2)
    for value in values().values():
        for split in SPLITS:
            for _ in range(100):
                wording = express(value, split, rng)
                assert "{" not in wording.text and "}" not in wording.text
                assert wording.text == wording.text.strip()
                assert all(said.casefold() in wording.text.casefold() for said in wording.slots.values())


def test_implicit_wordings_say_something_about_the_person():
    rng = Random(3)
    drawn = [express(value, "seen", rng) for value in values().values() for _ in range(40)]
    implicit = {w.value.family for w in drawn if w.implicit}
    assert implicit == set(families()) - {"name", "word"}


def test_an_order_in_the_negative_stays_english():
    rng = Random(4)
    texts = [
        express(values()[key], split, rng).text
        for key in ("bold.no", "title.no")
        for split in SPLITS
        for _ in range(300)
    ]
    assert any("do not" in text.casefold() for text in texts)
    wrong = ("to do not", "could do not", "should do not", "must do not", "please you")
    assert not [text for text in texts if any(part in text.casefold() for part in wrong)]


def test_a_word_that_two_tiers_speak_of_is_the_same_in_both():
    rng = Random(5)
    for _ in range(20):
        plan = Plan(kind="topic", values=("word.avoid",), tiers=("system",), losing="word.use", turns=1)
        prompt = compose(rng, plan).prompt
        assert len({wording.slots["word"] for wording in prompt.wordings if wording.slots}) == 1


def test_the_profiles_are_short_texts_in_words_of_the_families():
    assert {"concise", "child", "json"} <= set(profiles())
    assert all(text.endswith(".") and len(text) < 80 for text in profiles().values())


def test_a_split_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match="test"):
        express(values()["case.upper"], "test", Random(0))


def test_neutral_lines_exist_for_both_tiers():
    assert "You are a helpful assistant." in neutral_lines("system")
    assert neutral_lines("user")
