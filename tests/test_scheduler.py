"""Many dialogs answered together say what each says alone, whatever the company, the order and the memory's kind."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from helpers import checkpoints
from helpers.families import make_family
from helpers.gguf_files import finish
from helpers.reading import read

import metaalign_edge as edge
from metaalign_edge import (  # fmt: skip
    Answer,
    BatchEntry,
    Dialog,
    Engine,
    Model,
    RenderOptions,
    Request,
    Sampler,
    Scheduler,
    Settings,
    Turn,
)
from metaalign_edge_runtime.errors import (
    ContextOverflow,
    EdgeError,
    Interrupted,
    LoadError,
    TemplateError,
    TierViolation,
)
from metaalign_edge_runtime.llama import library
from metaalign_edge_runtime.llama.gguf import ModelFile
from metaalign_edge_runtime.llama.interrupt import Interrupt

GREEDY = Settings(temperature=0.0, threads=1, max_tokens=16)
SHORT = replace(GREEDY, max_tokens=12, context=256)
WORDS = "the quick brown fox jumps over a lazy dog and counts penguins".split()
TIMES = ("load_ms", "first_token_ms", "duration_ms", "tokens_per_second", "cached_tokens")


@pytest.fixture(scope="module")
def demo_model(demo: Path) -> Iterator[Model]:
    with Model(ModelFile(demo), GREEDY) as model:
        yield model


@pytest.fixture
def model(tiny: Path, exact: None) -> Iterator[Model]:
    with Model(ModelFile(tiny), SHORT) as loaded:
        yield loaded


def chat(model: Model, settings: Settings) -> Scheduler:
    return Scheduler(model, edge.choose_template("auto", model.file), settings, RenderOptions(), Interrupt())


def parallel(model: Model, settings: Settings, count: int, interrupt: Interrupt | None = None) -> Scheduler:
    template = edge.choose_template("auto", model.file)
    size = edge.least_context(model.file, settings)
    return Scheduler(model, template, settings, RenderOptions(), interrupt or Interrupt(), count, size)


def alone(model: Model, settings: Settings, jobs: Iterable[Request]) -> list[Answer]:
    """Answer one after another, each in a context of its own."""

    def answer(job: Request) -> Answer:
        with chat(model, settings) as session:
            return edge.answer_one(session, edge.Request(job.dialog, job.seed))

    return [answer(job) for job in jobs]


def together(desk: Scheduler, jobs: Sequence[Request]) -> list[Answer]:
    """Answer side by side; return the answers in the order of the jobs, whose tags are their places in it."""
    found: dict[int, Answer] = {}
    for job, answer in desk.run(jobs):
        assert isinstance(answer, Answer) and jobs[job.tag] is job and answer.query == job.dialog.turns[-1].query
        found[job.tag] = answer
    return [found[place] for place in range(len(jobs))]


def content(answers: Iterable[Answer]) -> list[dict[str, Any]]:
    return [{key: value for key, value in asdict(answer).items() if key not in TIMES} for answer in answers]


def babble(count: int, seed: int = 0) -> list[Request]:
    """Make jobs for random weights: prompts that often begin alike, of a few to some ninety tokens."""
    draw = random.Random(seed)

    def text(most: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(draw.randrange(1, most)))

    openings = [text(9), text(20), ""]
    turns = [tuple(Turn(text(8), text(8)) for _ in range(draw.choice((0, 0, 1, 2)))) for _ in range(count)]
    return [
        Request(Dialog(draw.choice(openings), text(12), (*before, Turn(text(6)))), seed=place, tag=place)
        for place, before in enumerate(turns)
    ]


@pytest.fixture(scope="module")
def conversations(demo_model: Model) -> list[Request]:
    """Make jobs of one to three turns that the embedded model can answer."""
    topics = "the moon,tea,bread,a bicycle,rain,honey,a volcano,a clock".split(",")
    wishes = ["", "one sentence", "Answer in capital letters.", "Answer as a numbered list.", "Reply as JSON."]
    wishes += ["My daughter is five.", "Be formal.", "answer in lower case"]
    asked = [Turn(f"What is {topic}?") for topic in topics]
    with parallel(demo_model, GREEDY, 8) as desk:
        known = together(desk, [Request(Dialog(turns=(turn,)), tag=place) for place, turn in enumerate(asked)])
    past = [Turn(answer.query, answer.response) for answer in known]
    dialogs = [
        Dialog(wish if row % 2 else "", "" if row % 2 else wish, (*past[column - (row + column) % 3 : column], turn))
        for row, wish in enumerate(wishes)
        for column, turn in enumerate(asked)
    ]
    return [Request(dialog, tag=place) for place, dialog in enumerate(dialogs)]


@pytest.fixture(scope="module")
def expected(demo_model: Model, conversations: list[Request]) -> list[Answer]:
    """What one chat answers that is given everything in turn."""
    with chat(demo_model, GREEDY) as session:
        return [edge.answer_one(session, edge.Request(job.dialog, 0)) for job in conversations]


@pytest.mark.parametrize("count, shuffled", [(1, False), (3, False), (8, True)])
def test_answers_given_together_are_those_given_alone(
    count: int, shuffled: bool, demo_model: Model, conversations: list[Request], expected: list[Answer]
) -> None:
    assert len(conversations) == 64 and sum(len(job.dialog.turns) > 1 for job in conversations) > 20
    order = random.Random(1).sample(conversations, 64) if shuffled else conversations
    with parallel(demo_model, GREEDY, count) as desk:
        found = {job.tag: answer for job, answer in desk.run(order)}
    assert all(isinstance(answer, Answer) for answer in found.values())
    answers = content(found[place] for place in range(64))
    differ = [place for place, answer in enumerate(content(expected)) if answer != answers[place]]
    assert len(differ) <= (0 if count == 1 else 2)  # rounding; the docstring of Scheduler says how often


def hybrid(tiny: Path, path: Path) -> Path:
    """Write a random model of a convolution, whose state cannot be cut, and a layer of attention (LFM2)."""
    writer, width, inner = gguf.GGUFWriter(path, "lfm2"), 64, 96
    for name, entry in gguf.GGUFReader(tiny).fields.items():
        if name.startswith(("tokenizer.", "metaalign.")):
            writer.add_key_value(name, entry.contents(), *entry.types[:2])
    writer.add_context_length(512)
    writer.add_block_count(2)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv([0, 2])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(checkpoints.ROWS)
    writer.add_shortconv_l_cache(3)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (checkpoints.ROWS, width), "token_embd_norm": (width,),
        "blk.0.shortconv.conv": (width, 3), "blk.0.shortconv.in_proj": (3 * width, width), "blk.0.shortconv.out_proj": (width, width),
        "blk.1.attn_q": (width, width), "blk.1.attn_k": (width // 2, width), "blk.1.attn_v": (width // 2, width),
        "blk.1.attn_output": (width, width), "blk.1.attn_q_norm": (16,), "blk.1.attn_k_norm": (16,),
    }  # fmt: skip
    for block in ("blk.0", "blk.1"):
        shapes |= {f"{block}.attn_norm": (width,), f"{block}.ffn_norm": (width,), f"{block}.ffn_down": (width, inner)}
        shapes |= {f"{block}.ffn_gate": (inner, width), f"{block}.ffn_up": (inner, width)}
    for name, values in checkpoints.draw_weights(shapes).items():
        writer.add_tensor(f"{name}.weight", values * (1 if "norm" in name else 2))
    return finish(writer, path)


@pytest.fixture(scope="module")
def memories(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random models by the kind of their memory."""
    folder = tmp_path_factory.mktemp("memories")
    checkpoint = make_family(folder / "olmo", "Olmo3ForCausalLM", max_position_embeddings=512)  # a window of 64
    arguments = ["convert", str(checkpoint), "-o", str(folder / "window.gguf"), "--outtype", "f32", "-q", "--no-check"]
    assert edge.run(arguments) == 0
    return {"full": tiny, "window": folder / "window.gguf", "hybrid": hybrid(tiny, folder / "hybrid.gguf")}


def likeliest(engine: Engine) -> int:
    """Return what the latest step finds likeliest to come next."""
    return int(engine.logits(-1).argmax())


@pytest.mark.parametrize("kind", ["full", "window", "hybrid"])
def test_every_kind_of_memory_gives_the_answers_given_alone(
    kind: str, memories: dict[str, Path], exact: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = babble(16)
    with Model(ModelFile(memories[kind]), SHORT) as model:
        wanted = content(alone(model, SHORT, jobs))
        assert len({answer["response"] for answer in wanted}) > 12
        for count, room in ((5, 512), (2, 32)):  # with little room a prompt takes several steps
            monkeypatch.setattr(edge, "PREFILL_CHUNK", room)
            with parallel(model, SHORT, count) as desk:
                for again in (False, True):  # the second time, the first run's prompts are in the cache
                    answers = together(desk, jobs)
                    assert content(answers) == wanted, (count, again)
                    assert any(answer.cached_tokens for answer in answers) == (kind != "hybrid")


def test_what_a_sliding_window_has_lost_is_read_again(memories: dict[str, Path], exact: None) -> None:
    def prompt(seed: int, size: int) -> list[int]:
        return random.Random(seed).choices(range(10, 400), k=size)

    first, second = prompt(1, 300), prompt(2, 300)
    wanted = second[:150] + prompt(3, 20)
    with Model(ModelFile(memories["window"]), SHORT) as model:
        with Engine(model, SHORT, Interrupt(), 512) as engine:
            read(engine, engine.sequences[0], wanted)
            expected = likeliest(engine)
        with Engine(model, SHORT, Interrupt(), 512, sequences=2) as engine:
            one, other = engine.sequences
            read(engine, one, first[:200])
            read(engine, other, second[:200])
            engine.truncate(one, 20)
            read(engine, other, second[:300])  # into the cells that are free now
            read(engine, one, first[:20] + prompt(4, 200))  # into those, then into the other's outside its window
            memory = library.llama_cpp().llama_get_memory(engine.pointer)
            assert library.llama_cpp().llama_memory_seq_pos_min(memory, other.id) > 0
            engine.copy_prefix(other, one, 150)
            assert len(one.tokens) == 220  # nothing was shared
            read(engine, one, wanted)
            assert likeliest(engine) == expected
            assert read(engine, other, wanted) == 0
            assert likeliest(engine) == expected


@pytest.mark.parametrize("changes", [
    {"stop": ("the", "e")}, {"max_tokens": 1}, {"max_tokens": None, "context": 128}, {"repeat_penalty": 1.5},
    {"context": 64}, {"temperature": 1.5, "repeat_penalty": 1.5},
])  # fmt: skip
def test_settings_mean_the_same_as_in_a_chat(changes: dict[str, Any], model: Model) -> None:
    settings = replace(SHORT, **changes)
    jobs = [job for job in babble(10, seed=1) if len(job.dialog.turns) > 1 or "context" not in changes]
    jobs = [replace(job, tag=place) for place, job in enumerate(jobs)]
    with parallel(model, settings, 4) as desk:
        answers = together(desk, jobs)
    assert content(answers) == content(alone(model, settings, jobs))
    reasons = {answer.finish_reason for answer in answers}
    assert ("stop" in reasons) if "stop" in changes else ("length" in reasons)
    assert any(answer.truncated for answer in answers) == (changes.get("context") == 64)


def test_a_seed_decides_a_text_whatever_else_is_answered(model: Model) -> None:
    settings, dialog = replace(SHORT, temperature=1.5), Dialog(turns=(Turn("tea?"),))
    jobs = [Request(dialog, seed, tag=seed) for seed in range(6)]
    with parallel(model, settings, 4) as desk:
        texts = [answer.response for answer in together(desk, jobs)]
    assert len(set(texts)) == 6
    with parallel(model, settings, 2) as desk:
        mixed = [*babble(3), Request(dialog, 3, tag=3), Request(dialog, 3, tag=4)]
        assert [answer.response for answer in together(desk, mixed)][3:] == [texts[3]] * 2


def test_a_short_answer_overtakes_a_long_one(demo_model: Model) -> None:
    wishes = ["in detail please", *["one sentence"] * 4]
    jobs = [Request(Dialog("", wish, (Turn("What is the moon?"),)), tag=place) for place, wish in enumerate(wishes)]
    with parallel(demo_model, replace(GREEDY, max_tokens=60), 2) as desk:
        order = [job.tag for job, _ in desk.run(jobs)]
    assert sorted(order) == [0, 1, 2, 3, 4] and order[0] != 0


def test_a_job_is_taken_only_when_a_sequence_is_free(model: Model) -> None:
    taken = []

    def endless() -> Iterator[Request]:
        for place, job in enumerate(babble(50)):
            taken.append(place)
            yield job

    with parallel(model, SHORT, 3) as desk:
        answers = desk.run(endless())
        assert taken == []
        next(answers)
        assert taken == [0, 1, 2]
        answers.close()
        assert [job.tag for job, _ in desk.run([])] == []
        assert content(together(desk, babble(4))) == content(alone(model, SHORT, babble(4)))


def test_a_dialog_that_does_not_fit_does_not_stop_the_others(model: Model) -> None:
    jobs = [replace(job, tag=place) for place, job in enumerate(babble(9))]
    jobs[0] = replace(jobs[0], dialog=Dialog("be kind " * 200, "", (Turn("q"),)))
    jobs[5] = replace(jobs[5], dialog=Dialog("be kind " * 20_000, "", (Turn("q"),)))  # too long to be tokenised
    with parallel(model, SHORT, 2) as desk:
        found = {job.tag: answer for job, answer in desk.run(jobs)}
    assert isinstance(found.pop(0), ContextOverflow) and isinstance(found.pop(5), ContextOverflow)
    assert len(found) == 7 and all(isinstance(answer, Answer) for answer in found.values())


def test_a_dialog_that_the_template_refuses_does_not_stop_the_others(model: Model, tmp_path: Path) -> None:
    (tmp_path / "picky.jinja").write_text(
        "{% for m in messages %}{% if 'fox' in m.content|string %}{{ raise_exception('no foxes') }}{% endif %}"
        "<|user|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"
    )
    template = edge.choose_template(str(tmp_path / "picky.jinja"), model.file)
    jobs = [Request(Dialog(turns=(Turn(text),)), tag=text) for text in ("a fox", "a dog", "a cat", "two foxes")]
    with Scheduler(model, template, SHORT, RenderOptions(), Interrupt(), 2, 256) as desk:
        found = {job.tag: answer for job, answer in desk.run(jobs)}
    refused = [tag for tag, answer in found.items() if isinstance(answer, TemplateError) and "no foxes" in str(answer)]
    assert refused == ["a fox", "two foxes"]
    assert all(isinstance(found[tag], Answer) for tag in ("a dog", "a cat"))


def test_an_answer_is_seen_before_it_is_begun_and_can_be_refused(model: Model) -> None:
    seen = []

    def before(prompt: edge.Prompt) -> None:
        seen.append((prompt.answer.input_tokens, prompt.answer.output_tokens))
        if len(seen) == 2:
            raise TierViolation("not this one")

    with parallel(model, SHORT, 2) as desk:
        found = {job.tag: answer for job, answer in desk.run(babble(4), before)}
    assert len(seen) == 4 and all(read and not written for read, written in seen)
    assert [tag for tag, answer in found.items() if isinstance(answer, EdgeError)] == [1]


def test_what_is_finished_leaves_only_its_prompt_which_is_not_read_again(model: Model) -> None:
    llama, jobs = library.llama_cpp(), babble(3)
    with parallel(model, SHORT, 3) as desk:
        together(desk, jobs)
        assert desk.engine
        prompts = sorted(desk.submit(job).contexts[0] for job in jobs)
        desk.cancel()
        assert sorted(sequence.tokens for sequence in desk.engine.sequences) == prompts
        memory = llama.llama_get_memory(desk.engine.pointer)
        for sequence in desk.engine.sequences:
            assert llama.llama_memory_seq_pos_max(memory, sequence.id) == len(sequence.tokens) - 1
        again = together(desk, [replace(job, tag=place) for place, job in enumerate(jobs[::-1])])
        assert all(answer.cached_tokens == answer.input_tokens - 1 for answer in again)


def test_a_prompt_that_begins_as_a_busy_sequence_does_is_not_read_twice(demo_model: Model) -> None:
    system = "Be formal. " * 10
    asked = [(system, "in detail please"), ("", "one sentence"), (system, "one sentence")]
    jobs = [Request(Dialog(*tiers, (Turn("What is the moon?"),)), tag=place) for place, tiers in enumerate(asked)]
    with parallel(demo_model, replace(GREEDY, max_tokens=60), 2) as desk:
        running = desk.run(jobs)
        assert next(running)[0].tag == 1
        rest = {job.tag: answer for job, answer in running}
    assert isinstance(rest[2], Answer) and rest[2].cached_tokens > 30


def test_ctrl_c_ends_the_run_after_whole_answers_only(model: Model) -> None:
    interrupt, jobs = Interrupt(), babble(12)
    wanted = content(alone(model, SHORT, jobs))
    with parallel(model, SHORT, 3, interrupt) as desk:
        given = []
        with pytest.raises(Interrupted):
            for job, answer in desk.run(jobs):
                assert isinstance(answer, Answer)
                given.append((job.tag, content([answer])[0]))
                interrupt.raised = True
        assert 1 <= len(given) < 12
        assert all(answer == wanted[tag] for tag, answer in given)
        interrupt.raised = False
        assert content(together(desk, jobs)) == wanted


class Late(Interrupt):
    """Ctrl-C in the middle of a step: once the flag has been looked at so many times."""

    looks = 1 << 40

    @property
    def raised(self) -> bool:
        self.looks -= 1
        return self.looks < 0

    @raised.setter
    def raised(self, value: bool) -> None:
        pass


@pytest.mark.parametrize("kind", ["full", "hybrid"])
def test_ctrl_c_in_the_middle_of_a_step_leaves_nothing_half_read(
    kind: str, memories: dict[str, Path], exact: None
) -> None:
    jobs, interrupt = babble(6), Late()
    with Model(ModelFile(memories[kind]), SHORT) as model, parallel(model, SHORT, 2, interrupt) as desk:
        wanted = content(alone(model, SHORT, jobs))
        running = desk.run(jobs)
        next(running)
        interrupt.looks = 40  # a step in which a prompt is read looks at it before every operation
        with pytest.raises(Interrupted):
            list(running)
        interrupt.looks = Late.looks
        assert content(together(desk, jobs)) == wanted


@pytest.mark.parametrize("kind", ["full", "hybrid"])
def test_a_state_that_cannot_be_cut_is_computed_anew_after_an_interruption(
    kind: str, memories: dict[str, Path], exact: None
) -> None:
    interrupt, prompt = Late(), list(range(5, 45))
    with Model(ModelFile(memories[kind]), SHORT) as model, Sampler(model.file, SHORT) as sampler:
        with Engine(model, SHORT, Interrupt(), 64) as engine:
            read(engine, engine.sequences[0], prompt)
            wanted = sampler.draw(engine, -1), likeliest(engine)
        with Engine(model, SHORT, interrupt, 64) as engine:
            (sequence,) = engine.sequences
            read(engine, sequence, prompt[:10])
            interrupt.looks = 40
            with pytest.raises(Interrupted):
                read(engine, sequence, prompt)
            interrupt.looks, kept = Late.looks, 0 if kind == "hybrid" else 10
            assert len(sequence.tokens) == kept == read(engine, sequence, prompt)
            assert (sampler.draw(engine, -1), likeliest(engine)) == wanted


def test_of_equal_logits_the_first_is_taken_as_llama_cpps_greedy_sampler_does(model: Model) -> None:
    with Engine(model, SHORT, Interrupt(), 64, sequences=4) as engine, Sampler(model.file, SHORT) as sampler:
        feeds = [BatchEntry(sequence, [5, 6 + sequence.id]) for sequence in engine.sequences]
        feeds[1] = feeds[1]._replace(logits=False)
        rows = [row for row in engine.decode(feeds) if row >= 0]
        pointer = library.llama_cpp().llama_get_logits(engine.pointer)
        table = np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (3, model.vocabulary.size))
        assert (
            [sampler.draw(engine, row, several=True) for row in rows]
            == [sampler.draw(engine, row) for row in rows]
            == table.argmax(axis=1).tolist()
        )
        table[0] = 1.0
        table[1, [300, 7, 9]] = 99.0
        table[2] = -np.inf
        table[2, -1] = -1e30
        expected = [0, 7, model.vocabulary.size - 1]
        assert (
            [sampler.draw(engine, row, several=True) for row in rows]
            == [sampler.draw(engine, row) for row in rows]
            == expected
        )


def test_a_context_that_cannot_be_made_is_refused_politely(model: Model) -> None:
    for count, context, said in ((257, 64, "fewer at a time"), (256, 1 << 21, r"-c \d+ or --parallel \d+ would fit")):
        with pytest.raises(LoadError, match=rf"{count} times {context:,} tokens .*{said}"):
            Scheduler(
                model,
                edge.choose_template("auto", model.file),
                SHORT,
                RenderOptions(),
                Interrupt(),
                count,
                context,
            )


def test_the_context_of_each_sequence_is_what_was_asked_for_or_the_models_own(model: Model) -> None:
    def context(settings: Settings, given: int | None = None) -> int:
        template = edge.choose_template("auto", model.file)
        size = given or edge.least_context(model.file, settings)
        with Scheduler(model, template, settings, RenderOptions(), Interrupt(), 2, size) as desk:
            assert desk.engine and desk.settings.context == desk.engine.context
            return desk.engine.context

    assert [context(Settings(context=128), 96), context(Settings(context=128)), context(Settings())] == [96, 128, 512]


def test_a_closed_context_answers_nothing_and_closing_twice_is_harmless(model: Model) -> None:
    desk = parallel(model, SHORT, 2)
    for _ in range(2):
        desk.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(desk.run(babble(1)))
