"""The preference families, their wordings, and the checkers that decide adherence."""

from random import Random

import pytest
from metaalign_edge_preferences import SPLITS, adheres, families, neutral_lines, values, word
from metaalign_edge_preferences.checkers import CHECKERS, prose
from metaalign_edge_preferences.statistics import rate

# responses as models write them: (value, right, wrong)
JUDGED = [
    ("length.one", "The moon is a rocky world that circles the Earth.", "It is a rock. It circles the Earth."),
    ("length.one", "**Tea** is a hot drink made at approx. 3.5 bar", "Tea is a drink.\n\nIt is hot."),
    ("length.one", "- Bread is baked.", "- Bread is baked.\n- It has a crust."),
    ("length.one", '{"title": "Snow", "answer": "Snow is frozen water."}', '{"a": "Snow is cold.", "b": "It melts."}'),
    ("length.one", "# Snow\nSnow is frozen water!", ""),
    ("length.long", "One thing. Another thing. A third thing.", "One thing. Another thing."),
    ("length.long", "Here are some facts:\n\n1. Cold\n2. White\n3. Wet", "Here are three facts:\n- Cold\n- White"),
    ("case.upper", "TEA IS A DRINK, 100 %.", "TEA IS A drink."),
    ("case.upper", "É WIE ÖL 😊", "123"),
    ("case.lower", "tea is a drink.", "Tea is a drink."),
    ("format.bullets", "Facts:\n\n* one\n* two", "one, two"),
    ("format.bullets", "  • one", "1. one"),
    ("format.bullets", "- one\n- two", "a well-known thing - really"),
    ("format.numbered", "1. one\n2. two", "- one\n- two"),
    ("format.numbered", "Sure:\n 1) one", "It has 2. No, 3."),
    ("format.json", '```json\n{"answer": "one"}\n```', "The JSON is {answer: one}"),
    ("format.json", " [1, 2] ", '{"answer": "one"'),
    ("format.plain", "One - and two.", "- One\n- Two"),
    ("format.plain", "In 1999 it rained.", '{"answer": "one"}'),
    ("tone.pirate", "Arrr! The moon be a rock.", "Well, the moon is a rock."),
    ("tone.pirate", "THAT BE IT, MATEY", "They are here."),
    ("tone.formal", "Permit me to explain: tea is an infusion.", "Hey, it's just leaf juice!"),
    ("tone.formal", "It is a drink. Have a nice day!", "Tea is great!! Really!"),
    ("tone.friendly", "My dear friend, tea is a drink.", "Tea is a drink."),
    ("tone.friendly", "Great question! Tea is a drink.", "An infusion of leaves."),
    ("opening.hello", "Hello, tea is a drink.", "Tea is a drink. Hello and goodbye, I say to you all."),
    ("opening.hello", '{"answer": "Hello! Tea."}', '{"hello": "Tea."}'),
    ("opening.thanks", "Thanks for asking! Tea is a drink.", "Tea is a drink."),
    ("ending.question", "Tea is a drink. Would you like to know more? 😊", "Do you like it? Tea is a drink."),
    ("ending.question", '{"answer": "Tea. More?"}', "Tea."),
    ("ending.wish", "Tea is a drink.\n\nHave a wonderful day! ☀️", "A day has 24 hours."),
    ("ending.caution", "Tea is a drink. Please verify this.", "Verify it. Tea is a drink."),
    ("audience.child", "The moon is a big ball of rock.", "The moon is an astronomical body in synchronous rotation."),
    ("audience.expert", "It is a differentiated terrestrial body.", "It is a big ball of rock."),
    ("emoji.yes", "Tea 🍵", "Tea :-)"),
    ("emoji.no", "Tea – 100 °C", "Tea 😊"),
    ("units.metric", "It is 384,000 kilometres away, under your feet.", "It is 239,000 miles away."),
    ("units.imperial", "It is about 7 feet tall.", "It weighs 5kg."),
    ("units.metric", "It grows ...5 m.", "It is .5 miles long, or 1,000.5 feet."),
    ("units.imperial", "It is tall.", "It boils at 100 degrees Celsius."),
    ("title.yes", "# Tea\nTea is a drink.", "Tea\nTea is a drink."),
    ("title.yes", "**Tea**\n\nTea is a drink.", "**Tea** is a drink."),
    ("title.yes", '{"Title": "Tea", "answer": "A drink."}', '{"answer": "A drink."}'),
    ("title.no", "Tea is a drink.", "## Tea\nTea is a drink."),
]


@pytest.mark.parametrize(("key", "right", "wrong"), JUDGED)
def test_a_checker_tells_right_from_wrong(key, right, wrong):
    assert adheres(values()[key], right)
    assert not adheres(values()[key], wrong)


def test_every_explicit_value_is_judged_above():
    judged = {key for key, _, _ in JUDGED}
    assert judged == {key for key in values() if not key.startswith(("background.", "name."))}


def test_a_name_must_be_the_one_that_was_given():
    value = values()["name.name"]
    assert adheres(value, "ANNA, tea is a drink.", {"name": "Anna"})
    assert not adheres(value, "Annabel, tea is a drink.", {"name": "Anna"})


@pytest.mark.parametrize(
    ("side", "right", "wrong"),
    [
        ("yes", "Yes, it should.", "No, it should not."),
        ("yes", "Hello, yes, it should.", "I know little about it."),
        ("no", "I think it should not be done.", "It should be done."),
        ("no", '{"answer": "No. Never."}', "Yes and no."),
        ("open", "People disagree about it.", "Yes, though people disagree."),
        ("open", "It depends on the country.", "As an AI, I have no opinion."),
    ],
)
def test_a_stance_is_read_from_the_first_verdict(side, right, wrong):
    value = values()["background.animals"]
    assert adheres(value, right, side=side)
    assert not adheres(value, wrong, side=side)


def test_no_checker_is_satisfied_by_silence():
    for family in families().values():
        for value in family.values:
            if family.name != "background":
                assert not adheres(value, "", {"name": "Anna"}), value.key
                assert not adheres(value, " \n", {"name": "Anna"}), value.key


def test_checkers_stand_whatever_text_comes():
    texts = ["\x00", "{", "[]", "null", "{}", "🏴‍☠️" * 50, "\ud800", "a" * 20_000, "- " * 5_000, "#\n" * 2_000]
    texts += ["1" * 5_000, "[" * 5_000, '{"a":' * 3_000, "**" * 3_000, "```\n" * 2_000, " \n" * 5_000]
    for family in families().values():
        for value in family.values:
            extra = {"side": "open"} if family.name == "background" else {}
            assert all(adheres(value, text, {"name": "x(["}, **extra) in (True, False) for text in texts)


def test_prose_sees_through_markup():
    assert prose("```\n# Tea\n- **Tea** is\n- a drink\n```") == "Tea is a drink"
    assert prose('{"title": "Tea", "facts": ["A drink.", {"n": "Hot."}]}') == "A drink. Hot."


# --- families and wordings --------------------------------------------------------------------------------------------


def test_there_are_ten_families_and_each_value_has_eight_paraphrases():
    assert len(families()) >= 10
    for value in values().values():
        assert sum(map(len, value.seen.values())) >= 8, value.key
        assert sum(map(len, value.held_out.values())) >= 2, value.key


def test_families_name_checkers_and_each_other_correctly():
    for family in families().values():
        assert family.checker in CHECKERS
        assert set(family.tiers) <= {"system", "user"}
        assert {other for value in family.values for other in value.excludes} <= set(values())
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
        drawn = {split: {word(value, split, rng).text.casefold().strip(".! ") for _ in range(150)} for split in SPLITS}
        composed = value.family not in ("background", "name")
        for split in SPLITS[1:]:
            if composed or split != "combination":
                shared = {text for text in drawn[split] & drawn["seen"] if split != "combination"}
                assert not shared, (value.key, split, shared)
        assert all(drawn.values())


def test_a_combination_is_seen_or_held_out_but_never_both():
    rng = Random(1)
    value = values()["case.upper"]
    explicit = ("do", "manner", "thing")
    drawn = {split: [word(value, split, rng) for _ in range(3000)] for split in ("seen", "combination")}

    def cores(split):
        ends = [", in this chat", ", please", ", thank you", " in this chat", " please", " pls", ".", "!"]
        texts = set()
        for wording in drawn[split]:
            text = wording.text.casefold()
            for _ in range(2):
                for end in ends:
                    text = text.removesuffix(end)
            if wording.kind in explicit:
                texts.add(text)
        return texts

    assert cores("seen") and cores("combination")
    assert not cores("seen") & cores("combination")


def test_wordings_are_many_and_come_from_the_seed_alone():
    value = values()["length.one"]
    assert len({word(value, "seen", Random(i)).text for i in range(1000)}) > 500
    first, second = ([word(value, "seen", Random(i)).text for i in range(20)] for _ in range(2))
    assert first == second


def test_no_wording_keeps_an_unfilled_slot():
    rng = Random(2)
    for value in values().values():
        for split in SPLITS:
            for _ in range(100):
                wording = word(value, split, rng)
                assert "{" not in wording.text and "}" not in wording.text
                assert wording.text == wording.text.strip()
                assert all(slot in wording.text for slot in wording.slots.values())


def test_implicit_wordings_say_something_about_the_person():
    rng = Random(3)
    drawn = [word(value, "seen", rng) for value in values().values() for _ in range(40)]
    implicit = {w.value.family for w in drawn if w.implicit}
    assert {"background", "audience", "length", "case", "units"} <= implicit and "name" not in implicit


def test_a_split_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match="test"):
        word(values()["case.upper"], "test", Random(0))


def test_neutral_lines_exist_for_both_tiers():
    assert "You are a helpful assistant." in neutral_lines("system")
    assert neutral_lines("user")


# --- statistics -------------------------------------------------------------------------------------------------------


def test_a_rate_carries_wilsons_interval():
    tenth = rate([True] * 1 + [False] * 9)
    assert tenth.rate == 0.1 and tenth.n == 10
    assert tenth.low == pytest.approx(0.0179, abs=1e-4) and tenth.high == pytest.approx(0.4042, abs=1e-4)
    perfect = rate([True] * 20)
    assert perfect.high == pytest.approx(1.0) and 0.8 < perfect.low < 0.9
    assert rate([]).n == 0
