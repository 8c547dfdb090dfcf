"""A strength for each tier: the formula, its special cases, and everything else that must not change."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.reading import read

import metaalign_edge as edge
from metaalign_edge import (  # fmt: skip
    Answer,
    BatchEntry,
    Dialog,
    Engine,
    Guidance,
    Model,
    Request,
    Sampler,
    Scheduler,
    Settings,
    Strength,
    Turn,
)
from metaalign_edge_runtime.llama import library
from metaalign_edge_runtime.llama.gguf import ModelFile
from metaalign_edge_runtime.llama.interrupt import Interrupt

GREEDY = Settings(temperature=0.0, threads=1, max_tokens=12, context=256)
BOTH = Dialog("be a kind fox", "brief and quick", (Turn("does the dog jump"),))
STRENGTHS: list[tuple[float, Strength]] = [
    (1, 1), (1, 2.5), (2, 2), (2, 1), (0.5, 3), (0, 0), (1, 0), (0, 1), (1, "auto"), (2, "auto"),
]  # fmt: skip


@pytest.fixture
def model(tiny: Path, exact: None) -> Iterator[Model]:
    with Model(ModelFile(tiny), GREEDY) as loaded:
        yield loaded


def chat(model: Model, settings: Settings) -> Scheduler:
    return Scheduler(model, edge.choose_template("auto", model.file), settings, edge.AS_USUAL, Interrupt())


def ask(model: Model, settings: Settings, dialog: Dialog = BOTH, seed: int = 0) -> Answer:
    with chat(model, settings) as session:
        return edge.answer_one(session, edge.Request(dialog, seed))


def prompt_of(model: Model, dialog: Dialog) -> list[int]:
    rendering = edge.render(dialog, edge.choose_template("auto", model.file))
    return edge.tokenize(rendering, model.vocabulary, 512).ids


def log_softmax(logits: Any) -> Any:
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def jensen_shannon(one: Any, other: Any) -> float:
    """By the textbook: the entropy of the mean less the mean of the entropies."""

    def entropy(chances: Any) -> float:
        return float(-sum(chance * math.log2(chance) for chance in chances if chance > 0))

    return entropy((one + other) / 2) - (entropy(one) + entropy(other)) / 2


def by_hand(model: Model, system: float, pref: Strength, count: int) -> list[int]:
    """Write greedily with every context in a cache of its own, and probabilities instead of logits."""
    dialogs = [replace(BOTH, system_info="", user_info=""), replace(BOTH, user_info=""), BOTH]
    prompts, written = [prompt_of(model, dialog) for dialog in dialogs], []
    for _ in range(count):
        rows = []
        for prompt in prompts:
            with Engine(model, GREEDY, Interrupt(), 256) as engine:
                read(engine, engine.sequences[0], [*prompt, *written])
                rows.append(log_softmax(engine.logits(-1)))
        alone, told, asked = rows
        strength = 1 + jensen_shannon(np.exp(asked), np.exp(told)) if pref == "auto" else pref
        guided = alone + system * (told - alone) + strength * (asked - told)
        conditioned = asked if strength else told if system else alone
        if (system, strength) != (1, 1):
            guided[np.exp(conditioned) < 0.1 * np.exp(conditioned).max()] = -np.inf
        written.append(int(guided.argmax()))
    return written


@pytest.mark.parametrize("system, pref", STRENGTHS)
def test_tokens_are_those_of_the_formula_over_probabilities(system: float, pref: Strength, model: Model) -> None:
    wanted = by_hand(model, system, pref, 12)
    answer = ask(model, replace(GREEDY, system_strength=system, pref_strength=pref))
    pieces = [model.vocabulary.piece(token) for token in wanted if not model.vocabulary.is_end(token)]
    assert b"".join(pieces).decode("utf-8", "replace").startswith(answer.response.rstrip("\ufffd"))
    assert answer.output_tokens == len(pieces)


def test_strengths_change_what_is_said(model: Model) -> None:
    said = {ask(model, replace(GREEDY, system_strength=s, pref_strength=p)).response for s, p in STRENGTHS}
    assert len(said) >= 6


@pytest.mark.parametrize("system, pref, tiers", [
    (1, 1, ["both"]), (1, 2, ["both", "system"]), (2, 2, ["both", "none"]), (3, 2, ["both", "system", "none"]),
    (1, 0, ["system"]), (0, 0, ["none"]), (2, 0, ["system", "none"]), (0, 1, ["both", "system", "none"]),
    (1, "auto", ["both", "system"]), (2, "auto", ["both", "system", "none"]),
])  # fmt: skip
def test_only_contexts_that_count_are_evaluated(system: float, pref: Strength, tiers: list[str]) -> None:
    names = {("s", "u"): "both", ("s", ""): "system", ("", ""): "none"}
    found = Guidance(Dialog("s", "u", (Turn("q"),)), system, pref).dialogs
    assert [names[dialog.system_info, dialog.user_info] for dialog in found] == tiers
    assert all(dialog.turns == (Turn("q"),) for dialog in found)


@pytest.mark.parametrize("system_info, user_info, system, pref, count", [
    ("", "", 3, 4, 1), ("", "", 3, "auto", 1), (" ", "\n", 2, 3, 1), ("", "u", 3, 1, 1), ("", "u", 3, 2, 2),
    ("s", "", 1, 5, 1), ("s", "", 1, "auto", 1), ("s", "", 2, 5, 2), ("s", "", 2, "auto", 2), ("", "u", 1, "auto", 2),
])  # fmt: skip
def test_an_empty_tier_makes_contexts_equal(
    system_info: str, user_info: str, system: float, pref: Strength, count: int
) -> None:
    assert len(Guidance(Dialog(system_info, user_info, (Turn("q"),)), system, pref).dialogs) == count


def test_strength_one_is_the_model_as_it_is_in_every_bit(model: Model) -> None:
    def last_logits(settings: Settings) -> bytes:
        with chat(model, settings) as session:
            edge.answer_one(session, edge.Request(BOTH, 0))
            assert session.engine and len(session.engine.sequences) == 1
            return bytes(session.engine.logits(-1).tobytes())

    plain = last_logits(GREEDY)
    assert last_logits(replace(GREEDY, system_strength=1.0, pref_strength=1.0)) == plain
    empty = replace(BOTH, user_info="", system_info="")
    guided = replace(GREEDY, system_strength=2.0, pref_strength=3.0)
    assert ask(model, guided, empty).response == ask(model, GREEDY, empty).response


def test_strength_nought_is_the_dialog_without_the_tier(model: Model) -> None:
    without = ask(model, GREEDY, replace(BOTH, user_info=""))
    answer = ask(model, replace(GREEDY, pref_strength=0.0))
    assert (answer.response, answer.input_tokens) == (without.response, without.input_tokens)
    assert answer.user_info == BOTH.user_info  # what was given is reported


def test_contexts_that_begin_alike_are_read_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    fed: list[list[tuple[int, int]]] = []
    usual = Engine.decode

    def step(engine: Engine, feeds: Any) -> list[int]:
        fed.append([(feed.sequence.id, len(feed.tokens)) for feed in feeds])
        return usual(engine, feeds)

    monkeypatch.setattr(Engine, "decode", step)
    dialog = Dialog("be kind " * 20, "brief", (Turn("q"),))
    answer = ask(model, replace(GREEDY, pref_strength=2.0), dialog)
    long, short = (len(prompt_of(model, one)) for one in (dialog, replace(dialog, user_info="")))
    assert answer.output_tokens > 1
    reading = [feeds for feeds in fed if sum(size for _, size in feeds) > len(feeds)]
    common = edge.common_prefix(prompt_of(model, dialog), prompt_of(model, replace(dialog, user_info="")))
    assert common > 40
    assert sum(size for feeds in reading for _, size in feeds) in range(
        long + short - common - 2, long + short - common + 1
    )
    assert all(len(feeds) == 2 for feeds in fed if feeds not in reading)  # one llama_decode a token


def test_a_conversation_goes_on_from_what_was_read_in_every_context(model: Model) -> None:
    settings = replace(GREEDY, system_strength=2.0, pref_strength=3.0)
    with chat(model, settings) as session:
        first = edge.answer_one(session, edge.Request(BOTH, 0))
        asked = replace(BOTH, turns=(Turn(BOTH.turns[0].query, first.response), Turn("and the fox")))
        second = edge.answer_one(session, edge.Request(asked, 0))
    assert second.response == ask(model, settings, asked).response
    assert second.cached_tokens >= first.input_tokens - 1


def test_what_does_not_fit_is_dropped_in_every_context_alike(model: Model) -> None:
    turns = tuple(Turn(f"question {place} " * 4, f"answer {place} " * 4) for place in range(20))
    with chat(model, replace(GREEDY, system_strength=2.0, pref_strength=3.0)) as session:
        outline = session.submit(edge.Request(replace(BOTH, turns=(*turns, Turn("newest")))))
    assert len(outline.contexts) == 3 and 0 < outline.answer.truncated < 20
    assert len({dialog.turns for dialog in outline.guidance.dialogs}) == 1
    assert all(len(prompt) + 12 <= 256 for prompt in outline.contexts)


@pytest.mark.parametrize("system, pref", [(1, 2.5), (2, 0.5), (1.5, "auto")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_guided_answers_given_together_are_those_given_alone(
    system: float, pref: Strength, temperature: float, model: Model
) -> None:
    settings = replace(GREEDY, system_strength=system, pref_strength=pref, temperature=temperature)
    tiers = [("be kind", "brief"), ("be kind", ""), ("", "brief"), ("", ""), ("be kind " * 20, "brief and quick")]
    dialogs = [Dialog(*tier, (Turn(query),)) for query in ("a dog", "the fox jumps") for tier in tiers]
    template = edge.choose_template("auto", model.file)
    with Scheduler(model, template, settings, edge.AS_USUAL, Interrupt(), 3, 256) as desk:
        found = {
            job.tag: answer for job, answer in desk.run(Request(one, 7, place) for place, one in enumerate(dialogs))
        }
    for place, dialog in enumerate(dialogs):
        answer = found[place]
        assert isinstance(answer, Answer) and answer.response == ask(model, settings, dialog, 7).response


def test_a_prompt_of_many_steps_is_guided_as_one_of_a_single_step(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, dialog = replace(GREEDY, system_strength=2.0, pref_strength=3.0), replace(BOTH, user_info="a fox " * 30)
    wanted = ask(model, settings, dialog).response
    for room in (3, 7, 64):
        monkeypatch.setattr(edge, "PREFILL_CHUNK", room)
        assert ask(model, settings, dialog).response == wanted


def test_ctrl_c_keeps_what_was_said(model: Model) -> None:
    with chat(model, replace(GREEDY, pref_strength=3.0)) as session:
        wanted = edge.answer_one(session, edge.Request(BOTH, 0)).response
        shown: list[str] = []

        def show(piece: str) -> None:
            shown.append(piece)
            session.interrupt.raised = len(shown) >= 4

        answer = edge.answer_one(session, edge.Request(BOTH, show=show))
        assert answer.finish_reason == "interrupted" and answer.output_tokens == 4
        assert "".join(shown) == answer.response and wanted.startswith(answer.response.rstrip("\ufffd"))
        session.interrupt.raised = False
        assert edge.answer_one(session, edge.Request(BOTH, 0)).response == wanted


def guide(*rows: list[float], system: float = 1.0, pref: Strength = 3.0) -> Any:
    arrays = [np.array(row, np.float32) for row in rows]
    Guidance(Dialog("s" if len(rows) == 3 else "", "u", (Turn("q"),)), system, pref).combine(arrays)
    return arrays[0]


def test_what_is_implausible_given_all_tiers_cannot_win() -> None:
    asked, alone = [5.0, 4.0, 2.0, -9.0], [5.0, 3.0, -40.0, -50.0]
    assert guide(asked, alone).argmax() == 1  # 5, 6; the third would have 86, but has less than a tenth of the chance
    assert list(guide(asked, alone)[:2]) == [5.0, 6.0]


def test_of_what_is_implausible_the_model_itself_decides_where_a_grammar_leaves_nothing_else(model: Model) -> None:
    found = guide([5.0, 4.0, 2.0, 1.0], [5.0, 3.0, 9.0, -50.0])
    assert found[2] > found[3] and max(found[2:]) < min(found[:2]) - 1000
    llama = library.llama_cpp()
    with Engine(model, GREEDY, Interrupt(), 256, sequences=2) as engine:
        prompts = [prompt_of(model, dialog) for dialog in (BOTH, replace(BOTH, user_info=""))]
        rows = engine.decode([BatchEntry(one, prompt) for one, prompt in zip(engine.sequences, prompts, strict=True)])
        grammar = llama.llama_sampler_init_grammar(model.vocabulary.pointer, b'root ::= "zebra" [0-9]+', b"root")
        with Sampler(model.file, replace(GREEDY, temperature=0.8)) as sampler:
            written = b""
            for _ in range(6):
                Guidance(BOTH, 1.0, 4.0).combine([engine.logits(row) for row in rows])
                chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
                llama.llama_sampler_chain_add(chain, llama.llama_sampler_clone(grammar))
                llama.llama_sampler_chain_add(chain, llama.llama_sampler_clone(sampler.pointer))
                token = llama.llama_sampler_sample(chain, engine.pointer, rows[0])
                llama.llama_sampler_free(chain)
                llama.llama_sampler_accept(grammar, token)
                written += model.vocabulary.piece(token)
                rows = engine.decode([BatchEntry(one, [token]) for one in engine.sequences])
        llama.llama_sampler_free(grammar)
    assert b"zebra".startswith(written[:5]) and (not written[5:] or written[5:].isdigit())


def test_the_adaptive_strength_leaves_alone_what_the_preference_does_not_change() -> None:
    same = [3.0, 2.5, 1.0, -2.0]
    assert guide(same, same, pref="auto") == pytest.approx([3.0, 2.5, 1.0, -2.0 - 1e4])
    asked, alone = [4.0, 3.9, -8.0], [4.0, -9.0, 3.0]
    strength = 1 + jensen_shannon(*(np.exp(log_softmax(np.array(row))) for row in (asked, alone)))
    assert 1.3 < strength < 2
    assert guide(asked, alone, pref="auto")[1] == pytest.approx(strength * 3.9 + (1 - strength) * -9.0, rel=1e-5)


@pytest.mark.parametrize("one, other, wanted", [
    ([1.0, 2.0], [1.0, 2.0], 0.0), ([900.0, 0.0], [0.0, 900.0], 1.0), ([0.0, 0.0], [0.0, -1e4], 0.3113), ([7.0], [-7.0], 0.0),
])  # fmt: skip
def test_divergence_is_that_of_jensen_and_shannon_in_bits(one: list[float], other: list[float], wanted: float) -> None:
    arrays = np.array(one, np.float32), np.array(other, np.float32)
    assert edge.divergence(*arrays) == pytest.approx(wanted, abs=1e-4)
    assert edge.divergence(*arrays[::-1]) == pytest.approx(wanted, abs=1e-4)


def test_the_command_line_takes_a_strength_for_each_tier(here: Callable[..., Any]) -> None:
    run = partial(here, "chat", "--no-stdin", "--temp", "0")
    asked = ("--system", "Answer in capital letters.", "--pref", "one sentence", "What is bread?")
    done = run("-v", "--system-strength", "0", "--pref-strength", "0", *asked)
    assert done.returncode == 0 and done.stdout and not done.stdout.isupper()
    assert "guided: System Info 0, User Info 0" in done.stderr
    assert "User Info auto" in run("-v", "--pref-strength", "auto", *asked).stderr
    plain, one = run(*asked), run("--system-strength", "1", "--pref-strength", "1.0", "--json", *asked)
    assert plain.stdout.isupper() and json.loads(one.stdout)["response"] == plain.stdout.rstrip("\n")


@pytest.mark.parametrize("flag", ["--system-strength", "--pref-strength"])
@pytest.mark.parametrize("value", ["-1", "nan", "inf", "101", "much", ""])
def test_a_strength_that_is_none_is_a_usage_error(flag: str, value: str, refuses: Callable[..., str]) -> None:
    assert flag in refuses(2, "chat", f"{flag}={value}", "What is tea?")
