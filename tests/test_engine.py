"""llama.cpp, several sequences at a time: the same tokens together as alone, prefixes kept, interruptions clean."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.reading import read, write

import metaalign_edge as edge
from metaalign_edge import (  # fmt: skip
    BatchEntry,
    Dialog,
    Engine,
    Model,
    RenderOptions,
    Sampler,
    Scheduler,
    Settings,
    StopFilter,
    Turn,
)
from metaalign_edge_runtime.errors import ContextOverflow, Interrupted
from metaalign_edge_runtime.llama.gguf import ModelFile
from metaalign_edge_runtime.llama.interrupt import Interrupt

GREEDY = Settings(temperature=0.0, threads=1)


@pytest.fixture
def model(tiny: Path) -> Iterator[Model]:
    with Model(ModelFile(tiny), GREEDY) as loaded:
        yield loaded


def prompts(model: Model) -> list[list[int]]:
    return [
        model.vocabulary.encode(text, special=False)
        for text in ("What is tea?", "A zookeeper's day", "count 1, 2, 3 penguins and so on")
    ]


def alone(model: Model, prompt: list[int], count: int) -> list[int]:
    with Engine(model, GREEDY, Interrupt(), 128) as engine, Sampler(model.file, GREEDY) as sampler:
        tokens = write(engine, engine.sequences[0], prompt, sampler)
        return [next(tokens) for _ in range(count)]


def test_sequences_decoded_in_one_batch_say_what_each_says_alone(model: Model) -> None:
    expected = [alone(model, prompt, 12) for prompt in prompts(model)]
    with Engine(model, GREEDY, Interrupt(), 128, sequences=3) as engine, Sampler(model.file, GREEDY) as sampler:
        rows = engine.decode(
            [BatchEntry(sequence, prompt) for sequence, prompt in zip(engine.sequences, prompts(model), strict=True)]
        )
        written: list[list[int]] = [[], [], []]
        for _ in range(12):
            drawn = [sampler.draw(engine, row) for row in rows]
            for said, token in zip(written, drawn, strict=True):
                said.append(token)
            rows = engine.decode(
                [BatchEntry(sequence, [token]) for sequence, token in zip(engine.sequences, drawn, strict=True)]
            )
    assert written == expected


def test_a_prompt_longer_than_a_chunk_is_prefilled_in_chunks_to_the_same_end(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Model(ModelFile(tiny), GREEDY) as model:
        prompt = (prompts(model)[2] * 20)[:100]
        whole = alone(model, prompt, 5)
        monkeypatch.setattr(edge, "PREFILL_CHUNK", 32)
        assert alone(model, prompt, 5) == whole


def test_a_shared_prefix_stays_in_the_cache_and_changes_no_answer(model: Model) -> None:
    first, second = prompts(model)[2], prompts(model)[2][:8] + prompts(model)[0]
    expected = alone(model, second, 6)
    with Engine(model, GREEDY, Interrupt(), 128) as engine, Sampler(model.file, GREEDY) as sampler:
        sequence = engine.sequences[0]
        assert read(engine, sequence, first) == 0
        assert read(engine, sequence, second) == 8
        tokens = write(engine, sequence, second, sampler)
        assert [next(tokens) for _ in range(6)] == expected


def test_an_interrupt_stops_a_prefill_and_the_sequence_can_be_used_again(model: Model) -> None:
    interrupt = Interrupt()
    prompt = prompts(model)[1]
    expected = alone(model, prompt, 4)
    with Engine(model, GREEDY, interrupt, 128) as engine, Sampler(model.file, GREEDY) as sampler:
        sequence = engine.sequences[0]
        interrupt.raised = True
        with pytest.raises(Interrupted):
            engine.decode([BatchEntry(sequence, prompt)])
        interrupt.raised = False
        tokens = write(engine, sequence, prompt, sampler)
        assert [next(tokens) for _ in range(4)] == expected


def test_a_full_context_is_an_error_that_says_so(model: Model) -> None:
    with Engine(model, GREEDY, Interrupt(), 256) as engine, pytest.raises(ContextOverflow, match="256"):
        for _ in range(100):
            engine.decode([BatchEntry(engine.sequences[0], prompts(model)[2])])


def test_a_step_refuses_more_tokens_than_its_batch_has_room_for(model: Model) -> None:
    with Engine(model, GREEDY, Interrupt(), 128, sequences=2) as engine, pytest.raises(ValueError, match="512"):
        engine.decode([BatchEntry(sequence, [5] * 300) for sequence in engine.sequences])


def test_a_model_that_asks_for_greedy_answers_gives_way_to_a_temperature(demo: Path) -> None:
    with Model(ModelFile(demo), GREEDY) as model:
        asked = Dialog(turns=(Turn("What is the moon?"),))

        def answers(temperature: float | None) -> set[str]:
            with chat(model, Settings(temperature=temperature, top_p=1.0, min_p=0.0)) as session:
                return {edge.answer_one(session, edge.Request(asked, seed)).response for seed in range(5)}

        assert len(answers(None)) == 1
        assert len(answers(5.0)) > 1


def test_closing_twice_is_harmless(tiny: Path) -> None:
    model = Model(ModelFile(tiny), GREEDY).wait()
    engine = Engine(model, GREEDY, Interrupt(), 64)
    for _ in range(2):
        engine.close()
    for _ in range(2):
        model.close()


def chat(model: Model, settings: Settings) -> Scheduler:
    return Scheduler(model, edge.choose_template("auto", model.file), settings, RenderOptions(), Interrupt())


def test_the_context_grows_when_a_dialog_needs_it_up_to_the_models_own(model: Model) -> None:
    assert model.file.context == 512
    with chat(model, Settings(max_tokens=4, temperature=0.0)) as session:
        outline = session.submit(edge.Request(Dialog(turns=(Turn("tea " * 40),))))
        assert outline.size == 512 and outline.answer.input_tokens + 4 <= 512 and not outline.answer.truncated


def test_the_oldest_turns_go_first_and_the_meta_prompt_and_the_newest_query_stay(model: Model) -> None:
    turns = tuple(Turn(f"question {index} " * 4, f"answer {index} " * 4) for index in range(20))
    asked = Dialog("be kind", "short", (*turns, Turn("newest")))
    with chat(model, Settings(max_tokens=8, temperature=0.0, context=256)) as session:
        outline = session.submit(edge.Request(asked))
        session.cancel()
        (fitted,) = outline.guidance.dialogs
        assert 1 < len(fitted.turns) < 21 and len(outline.contexts[0]) + 8 <= 256
        assert fitted.turns == asked.turns[-len(fitted.turns) :]
        assert (fitted.system_info, fitted.user_info) == ("be kind", "short")
        answer = edge.answer_one(session, edge.Request(asked, 0))
        assert answer.truncated == 21 - len(fitted.turns)


def test_what_is_pinned_and_does_not_fit_is_an_error_with_the_counts(model: Model) -> None:
    with (
        chat(model, Settings(max_tokens=8, context=64)) as session,
        pytest.raises(ContextOverflow, match=r"\d+ tokens .* 8; .* 64"),
    ):
        session.submit(edge.Request(Dialog("be kind " * 50, "", (Turn("q"),))))


def test_text_is_never_half_a_character() -> None:
    text = StopFilter([])
    assert [text.feed(bytes([byte])) for byte in "ü€😀".encode()] == ["", "ü", "", "", "€", "", "", "", "😀"]
    assert text.feed("😀".encode()[:3]) + text.rest() == ""


@pytest.mark.parametrize("pieces", [["one ST", "OP two"], ["one STOP two"], list("one STOP two")])
def test_a_stop_text_is_found_across_pieces_and_never_shown(pieces: list[str]) -> None:
    text, shown = StopFilter(["STOP", "never"]), ""
    for piece in pieces:
        shown += text.feed(piece.encode())
        if text.stopped:
            break
    assert shown + text.rest() == "one " and text.stopped


def test_what_looks_like_a_stop_text_and_is_none_is_shown_in_the_end() -> None:
    text = StopFilter(["STOP"])
    assert text.feed(b"a ST") == "a "
    assert text.feed(b"ART") == "START"
    assert text.feed(b"S") + text.rest() == "S"
