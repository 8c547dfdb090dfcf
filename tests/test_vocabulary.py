"""The vocabulary: loaded beside the weights or, by an index, only the words of the text; the tokens are the same."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import vocabularies

import metaalign_edge as edge
from metaalign_edge import (
    Answer,
    Background,
    Chat,
    Dialog,
    IndexedVocabulary,
    Interrupt,
    LlamaVocabulary,
    LoadError,
    Loading,
    Model,
    ModelFile,
    Settings,
    States,
    Turn,
    VocabularyIndex,
)

Run = Callable[..., "subprocess.CompletedProcess[str]"]
GREEDY = Settings(temperature=0.0, threads=1, max_tokens=12, context=256)
DIALOG = Dialog("be a kind and patient fox", "brief and quick", (Turn("does the dog jump"),))


@pytest.fixture
def all_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep indexes of small vocabularies, too."""
    monkeypatch.setattr(edge, "TINY_MODEL", 1)
    monkeypatch.setattr(VocabularyIndex, "LEAST", 300)


@pytest.fixture
def states(tmp_path: Path, all_are_large: None) -> States:
    return States(tmp_path / "states")


def ask(path: Path, states: States | None, dialog: Dialog = DIALOG) -> tuple[Answer, bytes, Model]:
    """Load a model and answer, as a call does; return the last logits, too, bit by bit, and the model, closed."""
    with Loading(path, states=states) as loading, Model(ModelFile(path), GREEDY, Interrupt(), loading) as model:
        with Chat(model, edge.choose_template("auto", model.file), GREEDY, edge.AS_USUAL, Interrupt()) as session:
            answer = session.answer(dialog, 0, lambda _: None, lambda _: None)
            assert session.engine
            bits = session.engine.logits(-1).tobytes()
        model.keep_index()
        return answer, bits, model


def indexes(states: States) -> list[edge.StateFile]:
    return [file for file in states.files() if file.path.name.startswith(edge.INDEX)]


def no_index(*_: object) -> bytes:
    raise AssertionError("an index is made")


@pytest.mark.parametrize("name", ["tiny", "demo"])
def test_a_second_call_loads_the_words_of_its_text_and_gives_the_same_answer(
    name: str, request: pytest.FixtureRequest, states: States, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = request.getfixturevalue(name)
    first, bits, model = ask(path, states)
    assert not model.indexed and isinstance(model.vocabulary, LlamaVocabulary)
    assert [file.hits for file in indexes(states)] == [0]
    monkeypatch.setattr(edge, "make_index", no_index)
    for number in (1, 2):
        again, same, model = ask(path, states)
        assert model.indexed and isinstance(model.vocabulary, IndexedVocabulary) and model.vocabulary.is_small
        assert (again.response, again.input_tokens, same) == (first.response, first.input_tokens, bits)
        assert [file.hits for file in indexes(states)] == [number]
    other = Dialog(
        "Speak of rivers.", "I'm a sailor. " * 2, (Turn("Where does the water go?", "Away."), Turn("And then?"))
    )
    (found, same, _), (wanted, bits, _) = ask(path, states, other), ask(path, None, other)
    assert (found.response, found.input_tokens, same) == (wanted.response, wanted.input_tokens, bits)


def test_an_index_is_of_one_file_and_one_build(
    tiny: Path, tmp_path: Path, states: States, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "copy.gguf"
    path.write_bytes(tiny.read_bytes())
    assert not ask(path, states)[2].indexed and ask(path, states)[2].indexed
    os.utime(path, ns=(1, 1))  # written anew
    assert not ask(path, states)[2].indexed and ask(path, states)[2].indexed
    monkeypatch.setattr(edge, "build", lambda: "another")
    assert not ask(path, states)[2].indexed
    assert len(indexes(states)) == 3


@pytest.mark.parametrize("where", [2, 40, 60, -1])  # its head, its checksum, what it says
def test_a_damaged_index_is_made_anew(where: int, tiny: Path, states: States) -> None:
    wanted = ask(tiny, states)
    (file,) = indexes(states)
    data = bytearray(file.path.read_bytes())
    data[where] ^= 1
    file.path.write_bytes(data)
    answer, bits, model = ask(tiny, states)
    assert not model.indexed and (answer.response, bits) == (wanted[0].response, wanted[1])
    assert ask(tiny, states)[2].indexed


def test_none_is_made_where_it_could_not_be_kept(
    tiny: Path, tmp_path: Path, states: States, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed, blocked = tmp_path / "closed", tmp_path / "file"
    closed.mkdir()
    blocked.write_text("")
    monkeypatch.setattr(edge, "make_index", no_index)
    for kept in (
        None,
        States(tmp_path / "small", most=1000),
        States(tmp_path / "read", fills=False),
        States(blocked / "in a file"),
    ):
        ask(tiny, kept)
    closed.chmod(0o500)
    if not os.access(closed, os.W_OK):  # root may write everywhere
        ask(tiny, States(closed))
    monkeypatch.setattr(VocabularyIndex, "LEAST", 1 << 14)  # the vocabulary is small
    ask(tiny, states)
    assert not list(tmp_path.glob("**/*.kv"))


def test_weights_are_freed_for_it_and_a_call_that_fails_makes_none(
    demo: Path, here: Run, all_are_large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def noting(what: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any) -> Any:
            done.append(what)
            return real(*arguments)

        return noted

    monkeypatch.setattr(edge, "make_index", noting("made", edge.make_index))
    monkeypatch.setattr(Model, "_free", noting("freed", Model._free))
    assert here("chat", "-n", "1", "-c", "64", "word " * 100).returncode == edge.ContextOverflow.exit_code
    assert "made" not in done
    done.clear()
    assert [here("chat", "-n", "3", "What is tea?").returncode for _ in range(2)] == [0, 0]
    assert done[:2] == ["freed", "made"] and done.count("made") == 1
    assert here("chat", "--json-schema", "n int", "How many?").returncode == 0 and done.count("made") == 1


def test_one_interrupt_may_hold_another() -> None:
    usual, interrupt = signal.getsignal(signal.SIGINT), Interrupt()
    with interrupt:
        ours = signal.getsignal(signal.SIGINT)
        with interrupt:
            pass
        assert signal.getsignal(signal.SIGINT) == ours != usual
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is usual and interrupt.raised


def test_what_has_no_index_is_not_tried_again(tmp_path: Path, states: States, monkeypatch: pytest.MonkeyPatch) -> None:
    path = vocabularies.write_spm(tmp_path / "spm.gguf", name="Phi-3 mini")  # by which llama.cpp knows what strips
    for made in (True, False):
        with Loading(path, states=states) as loading, loading.take(ModelFile(path)) as vocabulary:
            assert isinstance(vocabulary, LlamaVocabulary) and loading.index is None
            if place := loading.index_for(vocabulary):
                place[0].save(place[1], edge.make_index(vocabulary))
            assert bool(place) == made
            assert [file.bytes for file in indexes(states)] == [edge.STATE_HEAD.size]
        if made:
            monkeypatch.setattr(edge, "make_index", no_index)


@pytest.mark.parametrize("merge", ["t  e", "te", " te"])
def test_a_vocabulary_of_another_make_has_none(merge: str, tmp_path: Path) -> None:
    path = vocabularies.write_bpe(tmp_path / "bpe.gguf", more_merges=[merge])
    with edge.load_vocabulary(ModelFile(path)) as vocabulary:
        data = edge.make_index(vocabulary)
        if data:  # then it is right
            with IndexedVocabulary(VocabularyIndex(data), vocabulary.file, lambda: vocabulary) as indexed:
                for text in ("te", "t  e te tea", "the team"):
                    assert indexed.encode(text, False) == vocabulary.encode(text, False)


def test_an_index_that_tokenises_otherwise_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = vocabularies.write_bpe(tmp_path / "bpe.gguf")
    with edge.load_vocabulary(ModelFile(path)) as vocabulary:
        assert edge.make_index(vocabulary)
        monkeypatch.setattr(VocabularyIndex, "find", lambda *_: set())  # as if it missed words
        assert edge.make_index(vocabulary) == b""


def indexed(vocabulary: LlamaVocabulary, asked: list[str]) -> IndexedVocabulary:
    """Return a vocabulary by its index, which writes down when it needs the whole."""

    def whole() -> Any:
        asked.append("whole")
        return vocabulary

    return IndexedVocabulary(VocabularyIndex(edge.make_index(vocabulary)), vocabulary.file, whole)


def test_long_text_spelling_and_a_grammar_need_the_whole_vocabulary_and_it_is_loaded_once(tiny: Path) -> None:
    with edge.load_vocabulary(ModelFile(tiny)) as vocabulary:
        text = "the quick brown fox\n" * 1000
        needs: dict[str, Callable[[IndexedVocabulary], object]] = {
            "long text": lambda one: one.encode(text, False),
            "spelling": lambda one: one.spell("fox"),
            "a grammar": lambda one: one.pointer,
        }
        for name, need in needs.items():
            asked: list[str] = []
            one = indexed(vocabulary, asked)
            assert one.encode("the fox", False) == vocabulary.encode("the fox", False) and not asked
            need(one)
            assert one.encode(text, False) == vocabulary.encode(text, False), name
            assert one.encode("a new word", False) == vocabulary.encode("a new word", False)
            assert asked == ["whole"] and not one.is_small, name


def test_without_a_folder_for_temporary_files_the_whole_vocabulary_is_loaded(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with edge.load_vocabulary(ModelFile(tiny)) as vocabulary:
        asked: list[str] = []
        one = indexed(vocabulary, asked)
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
        assert one.encode("the fox", False) == vocabulary.encode("the fox", False) and asked == ["whole"]


def test_few_words_are_loaded_and_parts_of_a_text_need_no_more(demo: Path) -> None:
    with edge.load_vocabulary(ModelFile(demo)) as vocabulary:
        index = VocabularyIndex(edge.make_index(vocabulary))
        data, ids = index.excerpt(b"What is tea?")
        assert len(ids) < vocabulary.size / 10 and ids == sorted(ids) and len(data) < 1 << 14
        assert {index.word(number).decode() for number in index.find(b"tea")} >= {"t", "e", "a"}
        one = IndexedVocabulary(index, vocabulary.file, no_index)  # type: ignore[arg-type]
        one.expect("What is tea? A drink.")
        loaded = one._small
        for part in ("What is tea?", " A drink.", "tea"):
            assert one.encode(part, False) == vocabulary.encode(part, False)
        assert one._small is loaded
        one.encode("coffee", False)
        assert one._small is not loaded
        one.close()
        one.close()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_any_vocabulary_gives_the_same_tokens_by_its_index(seed: int, tmp_path: Path) -> None:
    def encoded(vocabulary: LlamaVocabulary | IndexedVocabulary, text: str, special: bool) -> list[int] | None:
        try:
            return vocabulary.encode(text, special)
        except edge.TierViolation:  # some of these have no token for a space
            return None

    chance = random.Random(seed)
    words = [*"abc <>|\né▁d中", "ab", *vocabularies.SPECIALS, "<0x0A>"]
    for number in range(60):
        write = chance.choice([vocabularies.write_random_bpe, vocabularies.write_random_spm])
        with edge.load_vocabulary(ModelFile(write(tmp_path / f"{number}.gguf", chance))) as whole:
            data = edge.packed_index(whole)
            one = IndexedVocabulary(VocabularyIndex(data), whole.file, no_index)  # type: ignore[arg-type]
            for token in range(whole.size):
                assert one.piece(token) == whole.piece(token)
                assert (one.attributes(token), one.is_end(token)) == (whole.attributes(token), whole.is_end(token))
            for _ in range(20):
                text = "".join(chance.choices(words, k=chance.choice([1, 3, 10, 60])))
                fresh = IndexedVocabulary(VocabularyIndex(data), whole.file, no_index)  # type: ignore[arg-type]
                for special, by_index in itertools.product((False, True), (one, fresh)):
                    assert encoded(by_index, text, special) == encoded(whole, text, special), (number, text, special)
                fresh.close()
            one.close()


def test_a_file_is_read_by_its_landmarks_as_without(demo: Path) -> None:
    first = ModelFile(demo)
    names = [first.token("bos"), first.token("eos")]
    again = ModelFile(demo, landmarks=dict(first.landmarks))
    assert again.landmarks == first.landmarks and len(first.landmarks) >= 2
    assert (again.metadata, [again.token("bos"), again.token("eos")]) == (first.metadata, names)
    assert list(again.items("tokenizer.ggml.tokens")) == list(ModelFile(demo).items("tokenizer.ggml.tokens"))
    assert again.landmarks == first.landmarks


def test_what_fails_in_the_background_is_raised_where_it_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge, "is_program", True)
    usual = sys.getswitchinterval()
    one, two = Background(lambda: 1 / 0), Background(lambda: 2)
    assert sys.getswitchinterval() < usual
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            one.result()
    assert sys.getswitchinterval() < usual  # the other one may still be at work
    assert two.result() == two.result() == 2
    assert sys.getswitchinterval() == usual


def test_a_model_that_is_closed_while_it_loads_is_freed(tiny: Path, tmp_path: Path) -> None:
    with Loading(tiny) as loading:
        Model(ModelFile(tiny), GREEDY, Interrupt(), loading).close()
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(tiny.read_bytes()[:-5000])
    with Loading(damaged) as loading, Model(ModelFile(damaged), GREEDY, Interrupt(), loading) as model:
        for _ in range(2):
            with pytest.raises(LoadError):
                model.pointer  # noqa: B018


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of 40 MB whose vocabulary is worth an index."""
    chance, width = np.random.default_rng(0), 512
    shown = vocabularies.byte_symbols()
    letters = [shown[byte] for byte in b"abcdefghijklmnopqrstuvwxyz "]
    merges = [f"{one} {two}" for one in letters for two in letters]
    merges += [f"{one}{two} {three}" for one in letters for two in letters for three in letters]
    tokens = [*shown, *(merge.replace(" ", "") for merge in merges), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    path = tmp_path_factory.mktemp("large") / "large.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in {
        "context_length": 4096, "embedding_length": width, "block_count": 1, "feed_forward_length": 64,
        "head_count": 8, "head_count_kv": 8, "layer_norm_rms_eps": 1e-5,
    }.items():  # fmt: skip
        getattr(writer, f"add_{name}")(value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([token.encode() for token in tokens])
    writer.add_token_types([vocabularies.NORMAL] * (len(tokens) - 3) + [vocabularies.CONTROL] * 3)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_chat_template(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    )
    shapes = {
        "token_embd": (len(tokens), width), "output_norm": (width,), "blk.0.attn_norm": (width,),
        "blk.0.ffn_norm": (width,), "blk.0.attn_q": (width, width), "blk.0.attn_k": (width, width),
        "blk.0.attn_v": (width, width), "blk.0.attn_output": (width, width), "blk.0.ffn_gate": (64, width),
        "blk.0.ffn_up": (64, width), "blk.0.ffn_down": (width, 64),
    }  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", chance.standard_normal(shape, dtype=np.float32) * 0.05)
    return vocabularies.finish(writer, path)


@pytest.mark.slow
def test_a_shell_call_keeps_an_index_and_the_next_one_starts_by_it(large: Path, run: Run) -> None:
    assert large.stat().st_size > edge.TINY_MODEL
    call = ["chat", "-m", str(large), "--temp", "0", "-n", "3", "--json"]
    first, second = (json.loads(run(*call, "what is tea").stdout) for _ in range(2))
    assert first["response"] == second["response"] and first["input_tokens"] == second["input_tokens"]
    (kept,) = json.loads(run("cache", "show", "--json").stdout)["states"]
    assert kept["name"].startswith("vocabulary-") and kept["hits"] == 1
    assert "\nvocabulary " in run("cache", "show").stdout
    other, alone = (json.loads(run(*call, *flag, "and what of bread").stdout) for flag in ([], ["--no-cache"]))
    assert other["response"] == alone["response"] and other["input_tokens"] == alone["input_tokens"]
    compared = run(
        "compare", "-m", str(large), "--temp", "0", "-n", "3", "--pref", "-", "--pref", "brief", "what is tea"
    )
    assert compared.returncode == 0 and not compared.stderr
    schema = run("chat", "-m", str(large), "-n", "30", "--json-schema", "n int", "how many")
    assert schema.returncode in (0, 1) and "Traceback" not in schema.stderr
    assert json.loads(run("cache", "show", "--json").stdout)["hits"] == 3  # a grammar needs all words
    assert run("cache", "clear").stderr.endswith(" removed\n")
    run(*call, "--no-cache", "what is tea")
    assert json.loads(run("cache", "show", "--json").stdout)["states"] == []
    verbose = [run("chat", "-v", "-m", str(large), "-n", "1", "hi").stderr for _ in range(2)]
    assert ["load: token to piece cache size" in said for said in verbose] == [True, False]  # nor the words' own log
    assert all("load_tensors: " in said and "llama_context: " in said for said in verbose)
