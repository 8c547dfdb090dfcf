"""LoRA adapters laid over a model while it runs: the same scores as merged, refused where they do not fit."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.checkpoints import CONFIG, make_checkpoint, random_weights
from helpers.parrot import make_parrot
from helpers.terminal import Terminal
from test_convert_lora import IDS, MODULES, alone, base_gguf, matrices, merged, write_lora

import metaalign_edge as edge
from metaalign_edge import (  # fmt: skip
    Adapter,
    BatchEntry,
    Dialog,
    Engine,
    Model,
    RenderOptions,
    Scheduler,
    Settings,
    Turn,
    find_adapters,
    split_scale,
)
from metaalign_edge_runtime.errors import LoadError, UsageError
from metaalign_edge_runtime.llama.gguf import ModelFile
from metaalign_edge_runtime.llama.interrupt import Interrupt

Run = Callable[..., "subprocess.CompletedProcess[str]"]
Fails = Callable[..., str]
GREEDY = Settings(temperature=0.0, threads=1, max_tokens=12)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base model, two adapters for it as PEFT saves them and as GGUFs, and what merging makes of them."""
    top = tmp_path_factory.mktemp("adapters")
    folder = make_checkpoint(top / "tiny-model", max_position_embeddings=1024)
    base = random_weights(CONFIG)
    found = {"checkpoint": folder, "base": base_gguf(folder)}
    for seed, name in enumerate(("one", "two"), 1):
        found[f"peft {name}"] = write_lora(top / name, matrices(MODULES, base, seed=seed))
        found[name] = alone(folder, found[f"peft {name}"]).rename(top / f"{name}.gguf")
    return found


def scores(path: Path, *adapters: Adapter) -> np.ndarray:
    settings = replace(GREEDY, adapters=adapters)
    with Model(ModelFile(path), settings) as model, Engine(model, settings, Interrupt(), 64) as engine:
        return np.array(
            [engine.logits(engine.decode([BatchEntry(engine.sequences[0], [token])])[0]).copy() for token in IDS]
        )


# -- what it does -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 0.5, -1.5, 0.0])
@pytest.mark.usefixtures("exact")
def test_an_adapter_gives_the_scores_of_the_merged_model(scale: float, trained: dict[str, Path]) -> None:
    (adapter,) = find_adapters([f"{trained['one']}:{scale}"])
    whole = merged(trained["checkpoint"], (trained["peft one"], scale)) if scale else trained["base"]
    assert np.abs(scores(trained["base"], adapter) - scores(whole)).max() < 1e-4
    assert (np.abs(scores(trained["base"]) - scores(whole)).max() > 0.1) == (scale != 0)


@pytest.mark.usefixtures("exact")
def test_several_adapters_add_up(trained: dict[str, Path]) -> None:
    adapters = find_adapters([f"{trained['one']}:0.5", str(trained["two"])])
    expected = scores(merged(trained["checkpoint"], (trained["peft one"], 0.5), trained["peft two"]))
    assert np.abs(scores(trained["base"], *adapters) - expected).max() < 1e-4


@pytest.mark.usefixtures("exact")
def test_a_session_changes_its_adapters_and_forgets_what_it_read(trained: dict[str, Path]) -> None:
    asked, file = Dialog("be kind", "briefly", (Turn("What is tea?"),)), ModelFile(trained["base"])
    (one,), (two,) = find_adapters([str(trained["one"])]), find_adapters([f"{trained['two']}:0.5"])
    chosen = edge.choose_template("auto", file)
    with Model(file, GREEDY) as model:

        def fresh(*adapters: Adapter) -> str:
            with Scheduler(model, chosen, replace(GREEDY, adapters=adapters), RenderOptions(), Interrupt()) as chat:
                return edge.answer_one(chat, edge.Request(asked, 0)).response

        with Scheduler(model, chosen, GREEDY, RenderOptions(), Interrupt()) as chat:
            for adapters in ((), (one,), (one, two), (replace_scale(one, 0.5),), ()):
                chat.set_adapters(adapters)
                answer = edge.answer_one(chat, edge.Request(asked, 0))
                assert (answer.response, answer.cached_tokens) == (fresh(*adapters), 0)
            chat.set_adapters(())
            assert edge.answer_one(chat, edge.Request(asked, 0)).cached_tokens > 0
        assert len({fresh(), fresh(one), fresh(one, two)}) == 3


def replace_scale(adapter: Adapter, scale: float) -> Adapter:
    return adapter._replace(scale=scale)


def test_a_state_on_disk_belongs_to_its_adapters(trained: dict[str, Path]) -> None:
    (one,), (two,) = find_adapters([str(trained["one"])]), find_adapters([str(trained["two"])])
    keys = set()
    with Model(ModelFile(trained["base"]), GREEDY) as model, Engine(model, GREEDY, Interrupt(), 64) as engine:
        for adapters in ((), (one,), (two,), (one, two), (replace_scale(one, 0.5),)):
            engine.set_adapters(adapters)
            keys.add(engine.key(IDS))
        engine.set_adapters(())
        assert engine.key(IDS) in keys
    assert len(keys) == 5


@pytest.mark.usefixtures("exact")
def test_an_adapter_that_does_not_fit_changes_nothing(trained: dict[str, Path], tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "wide", hidden_size=128)
    base = random_weights({**CONFIG, "hidden_size": 128})
    wrong = alone(other, write_lora(tmp_path / "lora", matrices(MODULES, base)))
    file = ModelFile(trained["base"])
    chosen = edge.choose_template("auto", file)
    with Model(file, GREEDY) as model, Scheduler(model, chosen, GREEDY, RenderOptions(), Interrupt()) as chat:
        asked = Dialog(turns=(Turn("tea?"),))
        before = edge.answer_one(chat, edge.Request(asked, 0)).response
        with pytest.raises(LoadError, match=r"does not fit .*shape"):
            chat.set_adapters(find_adapters([str(wrong)]))
        assert chat.settings.adapters == () and edge.answer_one(chat, edge.Request(asked, 0)).response == before


# -- the command line -------------------------------------------------------------------------------------------------

ASKED = ("--temp", "0", "--seed", "1", "-n", "12", "--no-cache")


def test_every_command_that_answers_takes_adapters(trained: dict[str, Path], here: Run, tmp_path: Path) -> None:
    whole = merged(trained["checkpoint"], (trained["peft one"], 0.5))
    base, lora = ("-m", str(trained["base"])), ("--lora", f"{trained['one']}:0.5")
    expected = here("chat", "-m", str(whole), *ASKED, "tea?").stdout
    assert here("chat", *base, *lora, *ASKED, "tea?").stdout == expected != here("chat", *base, *ASKED, "tea?").stdout
    compared = json.loads(here("compare", *base, *lora, *ASKED, "--json", "--pref", "-", "--pref", "a", "tea?").stdout)
    assert compared[0]["response"] + "\n" == expected
    (tmp_path / "in.jsonl").write_text('{"query": "tea?"}\n')
    batch = ("batch", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), *base, *ASKED)
    assert here(*batch, *lora).returncode == 0
    assert json.loads((tmp_path / "out.jsonl").read_text())["response"] + "\n" == expected
    assert "another run" in here(*batch, "--lora", str(trained["one"])).stderr
    assert f"adapters {trained['one']}:0.5" in here("chat", *base, *lora, *ASKED, "-v", "tea?").stderr


@pytest.mark.slow
def test_eval_compares_a_model_with_and_without_its_adapter(
    trained: dict[str, Path], here: Run, tmp_path: Path
) -> None:
    suite = tmp_path / "suite.jsonl"
    suite.write_text('{"query": "What is tea?", "user_info": "Be brief.", "values": ["length.one"]}\n')
    base = ("-m", str(trained["base"]), "--suite", str(suite), "-n", "12")
    answers = tmp_path / "answers.jsonl"
    done = here(
        "eval", *base, "--lora", str(trained["one"]), "--against", str(trained["base"]), "--answers", str(answers)
    )
    assert done.returncode == 0, done.stderr
    with_it, without = (path.read_text() for path in (answers, tmp_path / "answers.against.jsonl"))
    assert json.loads(with_it.splitlines()[-1])["response"] != json.loads(without.splitlines()[-1])["response"]
    bench = here("bench", "-m", str(trained["base"]), "--lora", f"{trained['one']}:0.5", "--rounds", "1", "--json")
    assert bench.returncode == 0 and json.loads(bench.stdout)["decode_tps"] > 0


def test_the_conversation_changes_its_adapter(trained: dict[str, Path]) -> None:
    terminal = Terminal("chat", "-m", str(trained["base"]), *ASKED)
    terminal.until("> ")
    terminal.type(f"/lora {trained['one']}:0.5\n")
    assert "one.gguf:0.5" in terminal.until("\n> ")
    terminal.type("/lora none.gguf\n")
    assert "no adapter none.gguf" in terminal.until("\n> ")
    terminal.type("/lora\n")
    assert "one.gguf:0.5" in terminal.until("\n> ")
    terminal.type("/lora -\n")
    assert "adapters: (none)" in terminal.until("\n> ")
    terminal.type("\x04")
    assert terminal.leave() == 0


def test_what_is_no_adapter_is_refused_by_name(trained: dict[str, Path], tmp_path: Path, refuses: Fails) -> None:
    chat = ("chat", "-m", "never-loaded.gguf", "--no-stdin", "tea?", "--lora")
    assert "no adapter ./none.gguf" in refuses(3, *chat, "./none.gguf")
    assert "no adapter ./none.gguf" in refuses(3, *chat, "./none.gguf:0.5")
    line = refuses(5, *chat, str(trained["peft one"]))
    assert f"convert BASE --lora {trained['peft one']} --lora-only" in line
    assert "--lora-only" in refuses(5, *chat, str(trained["peft one"] / "adapter_model.safetensors"))
    assert "is a model, not an adapter" in refuses(5, *chat, str(trained["base"]))
    (tmp_path / "cut.gguf").write_bytes(trained["one"].read_bytes()[:200])
    assert "cut.gguf is truncated" in refuses(5, *chat, str(tmp_path / "cut.gguf"))
    assert "'half'" in refuses(2, *chat, f"{trained['one']}:half")
    assert "''" in refuses(2, *chat, f"{trained['one']}:")
    for scale in ("nan", "inf", "-inf"):
        assert f"is {scale}" in refuses(2, *chat, f"{trained['one']}:{scale}")
    assert "twice" in refuses(2, *chat, str(trained["one"]), "--lora", f"{trained['one']}:2")


def test_an_adapter_of_another_model_is_refused_by_name(
    trained: dict[str, Path], tmp_path: Path, refuses: Fails
) -> None:
    (tmp_path / "lora.gguf").write_bytes(
        trained["one"].read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0qwen3", 1)
    )
    line = refuses(5, "chat", "--no-stdin", "-m", str(trained["base"]), "--lora", str(tmp_path / "lora.gguf"), "tea?")
    assert "lora.gguf is for qwen3" in line and "is llama" in line
    parrot = make_parrot(tmp_path / "parrot", ["<|assistant|>", " quick"])
    line = refuses(5, "chat", "--no-stdin", "-m", str(parrot), "--lora", str(trained["one"]), "tea?")
    assert str(trained["one"]) in line and "does not fit" in line and ("shape" in line or "tensor" in line)
    data = trained["one"].read_bytes()
    (tmp_path / "half.gguf").write_bytes(data[: len(data) * 3 // 4])
    assert "half.gguf" in refuses(
        5, "chat", "--no-stdin", "-m", str(trained["base"]), "--lora", str(tmp_path / "half.gguf"), "tea?"
    )


def test_a_scale_stands_behind_the_last_colon_and_a_drives_colon_is_none(
    trained: dict[str, Path], tmp_path: Path
) -> None:
    assert split_scale(r"C:\models\lora.gguf") == (r"C:\models\lora.gguf", 1.0)
    assert split_scale(r"C:\models\lora.gguf:0.25") == (r"C:\models\lora.gguf", 0.25)
    assert split_scale("lora.gguf:-2e-1") == ("lora.gguf", -0.2)
    odd = tmp_path / "lora:2"
    odd.write_bytes(trained["one"].read_bytes())
    assert split_scale(str(odd)) == (str(odd), 1.0)
    assert split_scale(f"{odd}:3") == (str(odd), 3.0)
    with pytest.raises(UsageError, match="no number"):
        split_scale(f"{odd}:x")
