"""LoRA adapters: merged into their base model while it is converted, or as a GGUF of their own beside it."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from helpers.checkpoints import (
    CONFIG,
    ROWS,
    edit_json,
    make_checkpoint,
    random_weights,
    write_container,
    write_json,
    write_safetensors,
    write_tokenizer,
    write_weights,
)
from helpers.families import FAMILIES, configuration, make_family, weights
from helpers.gguf_files import keys, weights_in
from llama_cpp import Llama

import metaalign_edge_convert.plan as planning
from metaalign_edge_convert import merge, open_adapter, open_checkpoint, write_adapter, write_gguf
from metaalign_edge_runtime.errors import CannotWrite, LoadError, NotFound

Weights = dict[str, np.ndarray]
IDS = [6, 77, 300, 5, 200, 42, 7, 100]
RANK = 4
SETTINGS = {  # what PEFT writes, and nothing that has no effect
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "someone/tiny",
    "r": RANK,
    "lora_alpha": 8,
    "lora_dropout": 0.05,
    "bias": "none",
    "init_lora_weights": True,
    "use_rslora": False,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "target_modules": ["q_proj", "k_proj", "down_proj"],
    "megatron_core": "megatron.core",
}
QUERY, KEY, DOWN = (
    f"model.layers.{place}" for place in ("0.self_attn.q_proj", "1.self_attn.k_proj", "0.mlp.down_proj")
)
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
MODULES = (QUERY, KEY, DOWN)
TOKENS = "token_adapter.trainable_tokens_delta"
TIED = {"tie_word_embeddings": True}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every matrix come in several chunks, as real ones do."""
    monkeypatch.setattr(planning, "CHUNK", 9000)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny checkpoint."""
    return make_checkpoint(tmp_path / "tiny-model")


def matrices(modules: tuple[str, ...], base: Weights, ranks: dict[str, int] | None = None, seed: int = 1) -> Weights:
    """Draw the matrices A and B for some modules, large enough to change what the model says."""
    draw, found = np.random.default_rng(seed), {}
    for module in modules:
        rows, columns = base[f"{module if f'{module}.weight' in base else EMBEDDING}.weight"].shape  # a tied head
        rank = (ranks or {}).get(module, RANK)
        a, b = (draw.normal(0, 0.15, shape).astype(np.float32) for shape in ((rank, columns), (rows, rank)))
        if module == EMBEDDING:
            found |= {f"{module}.lora_embedding_A": b.T.copy(), f"{module}.lora_embedding_B": a.T.copy()}
        else:
            found |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    return found


def write_lora(folder: Path, tensors: Weights, dtype: str = "F32", **changes: Any) -> Path:
    """Write an adapter as PEFT does; ``changes`` go into adapter_config.json. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "adapter_config.json", {**SETTINGS, **changes})
    named = {f"base_model.model.{name}": values for name, values in sorted(tensors.items())}
    write_safetensors(folder / "adapter_model.safetensors", named, dtype)
    return folder


def by_hand(base: Weights, tensors: Weights, scale: float | dict[str, float]) -> Weights:
    """Add the adapter to the weights the way the paper has it, in float64."""
    merged = {name: values.astype(np.float64) for name, values in base.items()}
    for name, a in tensors.items():
        module, _, part = name.rpartition(".lora_")
        if part not in ("A.weight", "embedding_A"):
            continue
        b = tensors[name.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")]
        delta = b.astype(np.float64) @ a.astype(np.float64)
        factor = scale[module] if isinstance(scale, dict) else scale
        merged[f"{module}.weight"] += factor * (delta.T if module == EMBEDDING else delta)
    return {name: values.astype(np.float32) for name, values in merged.items()}


def merged(folder: Path, *adapters: Path | tuple[Path, float], outtype: str = "f32") -> Path:
    """Merge some adapters into a checkpoint and convert it."""
    checkpoint = open_checkpoint(folder)
    pairs = [entry if isinstance(entry, tuple) else (entry, 1.0) for entry in adapters]
    opened = [open_adapter(path, checkpoint, scale) for path, scale in pairs]
    output = folder.parent / "merged.gguf"
    write_gguf(merge(checkpoint, opened), output, outtype=outtype, force=True, check=False)
    return output


def converted(folder: Path, weights: Weights, name: str = "by-hand", **changes: Any) -> Path:
    """Convert a checkpoint that holds these ``weights`` and is otherwise that of ``folder``."""
    other = folder.parent / name
    shutil.copytree(folder, other, dirs_exist_ok=True)
    edit_json(other / "config.json", **changes)
    write_weights(other, weights)
    output = folder.parent / f"{name}.gguf"
    write_gguf(open_checkpoint(other), output, outtype="f32", force=True, check=False)
    return output


def alone(folder: Path, lora: Path, outtype: str = "f32") -> Path:
    """Convert an adapter by itself."""
    checkpoint = open_checkpoint(folder)
    output = folder.parent / "adapter.gguf"
    write_adapter(checkpoint, open_adapter(lora, checkpoint), output, outtype=outtype, force=True)
    return output


def logits(path: Path, lora: Path | None = None, scale: float = 1.0) -> np.ndarray:
    """Ask llama.cpp for the logits of every position, with an adapter laid over the model or without."""
    llama = Llama(
        str(path),
        n_ctx=64,
        logits_all=True,
        verbose=False,
        n_threads=1,
        n_threads_batch=1,
        type_k=0,
        type_v=0,
        lora_path=str(lora) if lora else None,
        lora_scale=scale,
    )
    llama.eval(IDS)
    found = np.array(llama.scores[: len(IDS)])
    llama.close()
    return found


def base_gguf(folder: Path) -> Path:
    """Convert the base model."""
    output = folder.parent / "base.gguf"
    write_gguf(open_checkpoint(folder), output, outtype="f32", force=True, check=False)
    return output


def same_weights(ours: Path, theirs: Path) -> None:
    """Compare two files' tensors up to what float32 rounds."""
    a, b = weights_in(ours), weights_in(theirs)
    assert a.keys() == b.keys()
    for name, values in a.items():
        assert np.abs(values - b[name]).max() < 2e-6, name


# -- merging ----------------------------------------------------------------------------------------------------------

VARIANTS: dict[str, tuple[dict[str, Any], dict[str, int], float | dict[str, float]]] = {
    "plain": ({}, {}, 2.0),
    "rslora": ({"use_rslora": True}, {}, 8 / math.sqrt(RANK)),
    "alpha pattern": (  # fan_in_fan_out is what PEFT itself turns off for weights stored as these are
        {"alpha_pattern": {r"layers\.0\..*_proj": 3.0}, "fan_in_fan_out": True},
        {},
        {QUERY: 0.75, KEY: 2.0, DOWN: 0.75},
    ),
    "all at once": (
        {"use_rslora": True, "rank_pattern": {KEY: 9}, "alpha_pattern": {"q_proj": 1, "k_proj": 6}},
        {KEY: 9},
        {QUERY: 0.5, KEY: 2.0, DOWN: 4.0},
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_merging_and_laying_over_compute_the_same_function(variant: str, folder: Path) -> None:
    changes, ranks, scale = VARIANTS[variant]
    base = random_weights(CONFIG)
    tensors = matrices(MODULES, base, ranks)
    lora = write_lora(folder.parent / "lora", tensors, **changes)
    found = merged(folder, lora)
    same_weights(found, converted(folder, by_hand(base, tensors, scale)))
    without = base_gguf(folder)
    beside = logits(without, alone(folder, lora))
    assert np.abs(logits(found) - beside).max() < 1e-5
    assert np.abs(logits(without) - beside).max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture_can_be_adapted(family: str, tmp_path: Path) -> None:
    folder = make_family(tmp_path / "tiny", family)
    checkpoint = open_checkpoint(folder)
    base = weights(configuration(family))
    ends = {checkpoint.embedding} | ({checkpoint.head} if checkpoint.tied else set())
    modules = [name.removesuffix(".weight") for name, values in base.items() if values.ndim == 2 and name not in ends]
    tensors = {name: values / 2 for name, values in matrices(tuple(modules), base).items()}
    lora = write_lora(tmp_path / "lora", tensors)
    found = merged(folder, lora)
    same_weights(found, converted(folder, by_hand(base, tensors, 2.0)))
    without = base_gguf(folder)
    beside, ours = logits(without, alone(folder, lora)), logits(found)
    limit = 1e-5 if configuration(family).get("hidden_act") == "silu" else 1e-3  # GELU is a table of float16 in ggml
    assert np.abs(ours - beside).max() < limit * max(1, np.abs(ours).max())
    assert np.abs(logits(without) - beside).max() > 0.01


def test_several_adapters_add_up_each_with_its_scale(folder: Path) -> None:
    base = random_weights(CONFIG)
    first, second = matrices((QUERY, DOWN), base), matrices((QUERY, KEY), base, seed=2)
    one = write_lora(folder.parent / "one", first)
    two = write_lora(folder.parent / "two", second, dtype="BF16", lora_alpha=2)
    rounded = {
        name: (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32) for name, values in second.items()
    }
    wanted = by_hand(by_hand(base, first, 0.5 * 2), rounded, -0.5)
    same_weights(merged(folder, (one, 0.5), (two, -1.0)), converted(folder, wanted))


@pytest.mark.parametrize("outtype", ["f16", "bf16", "q8_0"])
def test_the_sum_is_rounded_once(outtype: str, folder: Path) -> None:
    base = random_weights(CONFIG)
    tensors = matrices(MODULES, base)
    lora = write_lora(folder.parent / "lora", tensors)
    found = weights_in(merged(folder, lora, outtype=outtype))["blk.0.ffn_down.weight"]
    kind = gguf.GGMLQuantizationType[outtype.upper()]
    exact = by_hand(base, tensors, 2.0)[f"{DOWN}.weight"]
    wanted = gguf.quants.dequantize(gguf.quants.quantize(exact, kind), kind)
    assert (found == wanted).mean() > 0.99  # where float32 differs in its last bit, the rounding may go the other way


def test_an_embedding_and_a_head_can_be_adapted(folder: Path) -> None:
    base = random_weights(CONFIG)
    tensors = matrices((EMBEDDING, HEAD, QUERY), base)
    tensors[f"{EMBEDDING}.base_layer.weight"] = base[f"{EMBEDDING}.weight"]  # as PEFT saves it beside its adapter
    lora = write_lora(folder.parent / "lora", tensors)
    found = merged(folder, lora)
    same_weights(found, converted(folder, by_hand(base, tensors, 2.0)))
    assert np.abs(logits(found) - logits(base_gguf(folder), alone(folder, lora))).max() < 1e-5


@pytest.mark.parametrize("changed", [(EMBEDDING,), (HEAD,), (EMBEDDING, HEAD)], ids=["embedding", "head", "both"])
def test_an_adapter_on_one_end_of_a_tied_model_tells_the_two_ends_apart(
    changed: tuple[str, ...], tmp_path: Path
) -> None:
    folder = make_checkpoint(tmp_path / "tiny", **TIED)
    base = random_weights({**CONFIG, **TIED})
    tensors = matrices(changed, base)
    lora = write_lora(tmp_path / "lora", tensors)
    own_head = {**base, "lm_head.weight": base[f"{EMBEDDING}.weight"]}
    wanted = converted(folder, by_hand(own_head, tensors, 2.0), tie_word_embeddings=False)
    same_weights(merged(folder, lora), wanted)
    assert "the head is no longer tied" in merge_notes(folder, lora)[-1]


def merge_notes(folder: Path, *loras: Path) -> tuple[str, ...]:
    """Return what a merge has to say."""
    checkpoint = open_checkpoint(folder)
    return merge(checkpoint, [open_adapter(lora, checkpoint) for lora in loras]).notes


def test_dora_stretches_every_row_to_its_length(folder: Path) -> None:
    base = random_weights(CONFIG)
    tensors = matrices((QUERY, DOWN), base)
    wanted = by_hand(base, tensors, 2.0)
    for module in (QUERY, DOWN):
        rows = wanted[f"{module}.weight"]
        lengths = np.linspace(0.5, 2, len(rows), dtype=np.float32)
        tensors[f"{module}.lora_magnitude_vector"] = lengths
        wanted[f"{module}.weight"] = rows * (lengths / np.linalg.norm(rows, axis=1))[:, None]
    lora = write_lora(folder.parent / "lora", tensors, use_dora=True)
    same_weights(merged(folder, lora), converted(folder, wanted))


def test_whole_modules_and_biases_replace_those_of_the_base_model(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "tiny", attention_bias=True)
    base = random_weights({**CONFIG, "attention_bias": True})
    tensors = matrices((QUERY,), base)
    wanted = by_hand(base, tensors, 2.0)
    draw = np.random.default_rng(5)
    biases = [name for name in base if name.endswith(".bias")]
    for name in ("lm_head.weight", "model.norm.weight", *biases):
        wanted[name] = draw.normal(0, 0.2, base[name].shape).astype(np.float32)
        tensors[name.replace("q_proj.", "q_proj.base_layer.")] = wanted[name]
    lora = write_lora(tmp_path / "lora", tensors, modules_to_save=["lm_head", "norm"], bias="all")
    same_weights(merged(folder, lora), converted(folder, wanted))
    with pytest.raises(
        LoadError, match=r"^lora replaces lm_head\.weight, .* or rows of it, which no adapter can; merge it"
    ):
        alone(folder, lora)


@pytest.mark.parametrize("tied", [False, True])
def test_rows_of_some_tokens_are_replaced_at_both_ends_of_a_tied_model(tied: bool, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "tiny", tie_word_embeddings=tied)
    base = random_weights({**CONFIG, "tie_word_embeddings": tied})
    tokens, tensors = [300, 5, 511], matrices((QUERY,), base)
    wanted = by_hand(base, tensors, 2.0)
    tensors[f"{EMBEDDING}.{TOKENS}"] = np.random.default_rng(3).normal(0, 1, (3, 64)).astype(np.float32)
    wanted[f"{EMBEDDING}.weight"][tokens] = tensors[f"{EMBEDDING}.{TOKENS}"]
    lora = write_lora(tmp_path / "lora", tensors, trainable_token_indices=tokens)
    same_weights(merged(folder, lora), converted(folder, wanted))
    with pytest.raises(LoadError, match=r"^lora replaces model\.embed_tokens\.weight or rows of it, which no adapter"):
        alone(folder, lora)
    if not tied:
        tensors[f"{HEAD}.{TOKENS}"] = tensors[f"{EMBEDDING}.{TOKENS}"][:1] + 1
        wanted["lm_head.weight"][7] = tensors[f"{HEAD}.{TOKENS}"][0]
        write_lora(lora, tensors, trainable_token_indices={"embed_tokens": tokens, "lm_head": [7]})
        same_weights(merged(folder, lora), converted(folder, wanted))


def test_a_bias_of_the_adapter_is_added_to_that_of_the_base_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "CHUNK", 128)
    folder = make_checkpoint(tmp_path / "tiny", attention_bias=True)
    base = random_weights({**CONFIG, "attention_bias": True})
    tensors = matrices((QUERY,), base)
    wanted = by_hand(base, tensors, 2.0)
    tensors[f"{QUERY}.lora_B.bias"] = np.linspace(-1, 1, 64, dtype=np.float32)
    wanted[f"{QUERY}.bias"] += 2 * tensors[f"{QUERY}.lora_B.bias"]
    lora = write_lora(tmp_path / "lora", tensors, lora_bias=True)
    same_weights(merged(folder, lora), converted(folder, wanted))
    with pytest.raises(LoadError, match=r"^lora: llama\.cpp's adapters know no lora_bias; merge it instead"):
        alone(folder, lora)


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_may_bring_new_tokens_with_rows_and_a_tokenizer_of_its_own(tied: bool, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "tiny", tie_word_embeddings=tied)
    base = random_weights({**CONFIG, "tie_word_embeddings": tied})
    if tied:  # with a copy of the old rows, which nobody needs any more
        write_weights(folder, {**base, "lm_head.weight": base[f"{EMBEDDING}.weight"]})
    rows = ROWS + 3
    tensors = matrices((QUERY,), base)
    wanted = by_hand(base, tensors, 2.0)
    more = np.full((3, 64), 0.25, np.float32)
    for module in (EMBEDDING, HEAD):
        tensors[f"{module}.weight"] = np.concatenate(
            [2 * base.get(f"{module}.weight", base[f"{EMBEDDING}.weight"]), more]
        )
        if f"{module}.weight" in base:
            wanted[f"{module}.weight"] = tensors[f"{module}.weight"]
    lora = write_lora(tmp_path / "lora", tensors, modules_to_save=[*(["lm_head"] if tied else []), "embed_tokens"])
    found = keys(merged(folder, lora))
    assert found["tokenizer.ggml.tokens"][-3:] == ["[PAD512]", "[PAD513]", "[PAD514]"]
    write_tokenizer(lora)
    added = json.loads((lora / "tokenizer.json").read_text())["added_tokens"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    edit_json(lora / "tokenizer.json", added_tokens=[*added, {"id": 513, "content": "<|new|>", **flags}])
    edit_json(lora / "tokenizer_config.json", chat_template="the adapter's")
    path = merged(folder, lora)
    same_weights(path, converted(folder, wanted, vocab_size=rows))
    found = keys(path)
    assert found["tokenizer.ggml.tokens"][-3:] == ["[PAD512]", "<|new|>", "[PAD514]"]
    assert found["llama.vocab_size"] == rows
    assert found["tokenizer.chat_template"] == "the adapter's"
    assert found["general.name"] == "Tiny Lora"
    assert merge_notes(folder, lora)[-1] == "the vocabulary is that of lora"


def test_the_proof_of_the_pre_tokenizer_goes_by_the_tokenizer_that_is_written(folder: Path) -> None:
    lora = write_lora(folder.parent / "lora", matrices((QUERY,), random_weights(CONFIG)))
    write_tokenizer(lora, corpus=("other words make other merges, and then other tokens " * 3,) * 4)
    checkpoint = open_checkpoint(folder)
    result = write_gguf(merge(checkpoint, [open_adapter(lora, checkpoint)]), folder.parent / "out.gguf")
    assert result.checks == (
        "pre-tokenizer gpt-2: 52 of 52 texts become the same tokens",
        "merged with lora, which changes 1 tensor, scale 1",
        "the vocabulary is that of lora",
    )


# -- an adapter by itself ---------------------------------------------------------------------------------------------


def test_an_adapter_says_what_it_is_and_is_always_the_same(folder: Path) -> None:
    lora = write_lora(folder.parent / "my-lora", matrices(MODULES, random_weights(CONFIG)))
    path = alone(folder, lora)
    found, bytes_ = keys(path), path.read_bytes()
    assert (found["general.architecture"], found["general.type"], found["adapter.type"]) == ("llama", "adapter", "lora")
    assert (found["general.name"], found["adapter.lora.alpha"]) == ("My Lora", 8.0)
    assert alone(folder, lora).read_bytes() == bytes_
    names = [tensor.name for tensor in gguf.GGUFReader(path).tensors]
    assert names == [
        f"blk.{place}.weight.lora_{half}" for place in ("0.ffn_down", "0.attn_q", "1.attn_k") for half in "ab"
    ]


def test_a_card_s_paths_on_somebody_s_disk_are_left_out(folder: Path) -> None:
    lora = write_lora(folder.parent / "lora", matrices((QUERY,), random_weights(CONFIG)))
    card = "---\nbase_model: /home/me/base\ntags:\n- base_model:adapter:/home/me/base\n- lora\nlicense: mit\n---\n"
    (lora / "README.md").write_text(card)
    path = alone(folder, lora)
    assert b"home" not in path.read_bytes()
    assert (keys(path)["general.tags"], keys(path)["general.license"]) == (["lora"], "mit")


@pytest.mark.parametrize("outtype", ["f16", "bf16", "q8_0"])
def test_an_adapter_can_be_smaller(outtype: str, folder: Path) -> None:
    lora = write_lora(folder.parent / "lora", matrices(MODULES, random_weights(CONFIG)))
    full, base = logits(base_gguf(folder), alone(folder, lora)), base_gguf(folder)
    assert np.abs(logits(base, alone(folder, lora, outtype)) - full).max() < 0.1
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(folder.parent / "adapter.gguf").tensors}
    assert kinds["blk.0.ffn_down.weight.lora_a"] == outtype.upper()
    assert kinds["blk.0.ffn_down.weight.lora_b"] == ("F16" if outtype == "q8_0" else outtype.upper())


def test_an_activated_lora_names_its_invocation(folder: Path) -> None:
    tensors = matrices(MODULES, random_weights(CONFIG))
    lora = write_lora(folder.parent / "lora", tensors, alora_invocation_tokens=[3, 77])
    assert keys(alone(folder, lora))["adapter.alora.invocation_tokens"] == [3, 77]
    with pytest.raises(LoadError, match=r"^lora: an activated LoRA .* cannot be merged; .* with --lora-only"):
        merged(folder, lora)


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_merges_and_converts_alone(folder: Path, run: Any) -> None:
    base = random_weights(CONFIG)
    one = write_lora(folder.parent / "one", matrices((QUERY,), base))
    two = write_lora(folder.parent / "t:wo", matrices((KEY,), base, seed=2))
    out = folder.parent / "out.gguf"
    options = ["-o", str(out), "--outtype", "f32", "--template", "keep", "--no-check"]
    result = run("convert", str(folder), "--lora", f"{one}:0.5", "--lora", str(two), *options, "--json")
    assert result.returncode == 0, result.stderr
    assert "merged with one, which changes 1 tensor, scale 0.5" in json.loads(result.stdout)["checks"]
    assert out.read_bytes() == merged(folder, (one, 0.5), two).read_bytes()
    result = run("convert", str(folder), "--lora", str(one), "--lora-only", cwd=folder.parent)
    assert result.returncode == 0, result.stderr
    assert (folder.parent / "one-f32.gguf").read_bytes() == alone(folder, one).read_bytes()


def test_the_command_explains_itself(folder: Path, refuses: Callable[..., str]) -> None:
    lora = write_lora(folder.parent / "lora", matrices((QUERY,), random_weights(CONFIG)))
    assert "--lora-only writes one adapter" in refuses(2, "convert", str(folder), "--lora-only")
    assert "no such folder" in refuses(3, "convert", str(folder), "--lora", str(folder.parent / "nowhere"))
    assert f"convert its base model, with --lora {lora}" in refuses(5, "convert", str(lora))


# -- what is refused --------------------------------------------------------------------------------------------------


def settings(**changes: Any) -> Callable[[Path], None]:
    """Change adapter_config.json."""
    return lambda lora: edit_json(lora / "adapter_config.json", **changes)


def tensors(*spoil: Callable[[Weights], Any], **changes: Any) -> Callable[[Path], None]:
    """Change the adapter's tensors, and keys of adapter_config.json."""

    def apply(lora: Path) -> None:
        found = matrices(MODULES, random_weights(CONFIG))
        for change in spoil:
            change(found)
        write_lora(lora, found, **changes)

    return apply


def put(name: str, shape: tuple[int, ...], value: float = 0.5) -> Callable[[Weights], Any]:
    """Put a tensor into the adapter."""
    return lambda found: found.update({name: np.full(shape, value, np.float32)})


def token_rows(indices: list[int]) -> Callable[[Path], None]:
    """Replace two rows of the embedding, those of the tokens ``indices``."""
    return tensors(put(f"{EMBEDDING}.{TOKENS}", (2, 64)), trainable_token_indices=indices)


INSTEAD = r"merge it with PEFT \(merge_and_unload\), save that, and convert the saved folder$"
REFUSALS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no settings": (
        lambda lora: os.remove(lora / "adapter_config.json"),
        "no adapter_config.json in the folder, so it",
    ),
    "a model": (
        lambda lora: os.rename(lora / "adapter_config.json", lora / "config.json"),
        r"a whole model, not a LoRA adapter \(no adapter_config.json\)$",
    ),
    "no weights": (
        lambda lora: os.remove(lora / "adapter_model.safetensors"),
        "no adapter_model.safetensors in the folder; download the adapter again$",
    ),
    "pickle": (
        lambda lora: os.rename(lora / "adapter_model.safetensors", lora / "adapter_model.bin"),
        r"adapter_model.bin: pickled weights can run any code .* save it again \(save_pretrained\)",
    ),
    "not PEFT's": (settings(peft_type=None), f"no peft_type in it, so it is none of PEFT's; {INSTEAD}"),
    "LoKr": (settings(peft_type="LOKR"), f"an adapter of type 'LOKR'; only LORA is supported: {INSTEAD}"),
    "token rows": (
        settings(trainable_token_indices=[3]),
        "lacks trainable_tokens_delta, which adapter_config.json says",
    ),
    "token ids": (token_rows([-3]), r"trainable_token_indices is \[-3\], not a list of token ids$"),
    "token twice": (token_rows([3, 3]), "trainable_token_indices names a token twice, or one beyond the 512 rows$"),
    "token beyond": (token_rows([3, 512]), "trainable_token_indices names a token twice, or one beyond the 512 rows$"),
    "token count": (token_rows([3]), r"trainable_tokens_delta has the shape \[2, 64\], but the .* ask for \[1, 64\]"),
    "token rows and LoRA": (
        tensors(put(f"{QUERY}.{TOKENS}", (2, 64)), trainable_token_indices=[3, 4]),
        f"q_proj has {TOKENS} and LoRA's matrices too; {INSTEAD}",
    ),
    "parameters": (settings(target_parameters=["experts"]), f"target_parameters changes what .*; {INSTEAD}"),
    "layers again": (settings(layer_replication=[[0, 2]]), f"layer_replication changes what .*; {INSTEAD}"),
    "a key of the future": (settings(use_xylora=True), f"use_xylora changes what the adapter computes, .*; {INSTEAD}"),
    "pissa": (settings(init_lora_weights="pissa"), f"init_lora_weights is 'pissa', and such a .*; {INSTEAD}"),
    "no rank": (settings(r=None), "r is None, not a whole number from 1 to 65,535$"),
    "rank 0": (settings(r=0), "r is 0, not a whole number"),
    "alpha": (settings(lora_alpha="16"), "lora_alpha is '16', not a number$"),
    "alpha true": (settings(lora_alpha=True), "lora_alpha is True, not a number$"),
    "flag": (settings(use_rslora="yes"), "use_rslora is 'yes', not true or false$"),
    "pattern": (settings(alpha_pattern=[1]), r"alpha_pattern is \[1\], not an object$"),
    "pattern value": (settings(rank_pattern={"q_proj": -1}), "rank_pattern of q_proj is -1, not a whole number"),
    "broken pattern": (settings(rank_pattern={"(q": 1}), r"the pattern '\(q', which is none \("),
    "endless pattern": (settings(rank_pattern={"(a+)+": 1}), "too involved; name the modules$"),
    "bias": (settings(bias="some"), "bias is 'some', not none, all or lora_only$"),
    "modules": (settings(modules_to_save="lm_head"), "modules_to_save is 'lm_head', not a list of names$"),
    "invocation": (settings(alora_invocation_tokens=["x"]), r"alora_invocation_tokens is \['x'\], not a list of token"),
    "module missing": (
        settings(modules_to_save=["lm_head"]),
        "adapter_model.safetensors lacks lm_head, which adapter_config.json says was trained; save it again$",
    ),
    "other rank": (
        settings(r=8),
        r"base_model.model.model.layers.0.mlp.down_proj.lora_A.weight has the shape \[4, 96\], but the base model and "
        r"adapter_config.json ask for \[8, 96\]; is it another model's\?$",
    ),
    "no B": (
        tensors(lambda found: found.pop(f"{QUERY}.lora_B.weight")),
        "model.layers.0.self_attn.q_proj lacks lora_B.weight; save the adapter again, gathered on one machine$",
    ),
    "no A": (tensors(lambda found: found.pop(f"{KEY}.lora_A.weight")), "k_proj lacks lora_A.weight; save"),
    "no magnitude": (settings(use_dora=True), "lacks lora_magnitude_vector; save"),
    "magnitude": (
        tensors(put(f"{QUERY}.lora_magnitude_vector", (64,))),
        "q_proj has lora_magnitude_vector, which adapter_config.json does not announce$",
    ),
    "zero size": (tensors(put(f"{QUERY}.lora_B.weight", (0,))), r"has the shape \[0\], but the base model"),
    "layer too many": (
        tensors(lambda found: found.update(matrices((QUERY.replace("0", "7"),), random_weights(CONFIG)))),
        "model.layers.7.self_attn.q_proj.lora_A.weight, .*: no place for this in the base model; is it another one's",
    ),
    "unknown part": (tensors(put(f"{QUERY}.lora_E", (4, 1))), "q_proj.lora_E: no place for this in the base model"),
    "norm": (
        tensors(put("model.norm.lora_A.weight", (4, 1)), put("model.norm.lora_B.weight", (64, 4))),
        "model.norm is no matrix in the base model, so LoRA has no place there$",
    ),
    "no bias there": (
        tensors(*(put(f"{module}.lora_B.bias", (64,)) for module in MODULES), lora_bias=True),
        "down_proj has lora_B.bias, but the base model has no bias to add it to$",
    ),
    "embedding as a matrix": (
        tensors(put(f"{EMBEDDING}.lora_A.weight", (4, 64)), put(f"{EMBEDDING}.lora_B.weight", (512, 4))),
        "embed_tokens lacks lora_embedding_A, lora_embedding_B",
    ),
    "nothing": (
        tensors(lambda found: found.clear()),
        "adapter_model.safetensors: nothing in it changes the base model$",
    ),
    "nan": (tensors(put(f"{QUERY}.lora_A.weight", (4, 64), math.nan)), "q_proj.lora_A.weight holds NaN or infinity"),
    "infinity": (tensors(put(f"{KEY}.lora_B.weight", (32, 4), math.inf)), "k_proj.lora_B.weight holds NaN or infinity"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_an_adapter_that_is_damaged_foreign_or_more_than_lora_is_refused(case: str, folder: Path) -> None:
    lora = write_lora(folder.parent / "lora", matrices(MODULES, random_weights(CONFIG)))
    spoil, message = REFUSALS[case]
    spoil(lora)
    with pytest.raises(NotFound if case == "no settings" else LoadError, match=message) as caught:
        merged(folder, lora)
    assert str(caught.value).startswith((str(lora), "adapter_"))
    assert not (folder.parent / "merged.gguf").exists()


def test_tensors_that_are_not_peft_s_are_refused(folder: Path) -> None:
    lora = write_lora(folder.parent / "lora", {})
    file = lora / "adapter_model.safetensors"
    write_safetensors(file, {f"{QUERY}.lora_A.weight": np.ones((4, 64), np.float32)}, "F32")
    with pytest.raises(LoadError, match=r"q_proj.lora_A.weight does not begin with base_model.model., as PEFT names"):
        merged(folder, lora)
    header = {"base_model.model.lm_head.weight": {"dtype": "I8", "shape": [2], "data_offsets": [0, 2]}}
    write_container(file, json.dumps(header).encode(), b"ab")
    with pytest.raises(LoadError, match=r"lm_head.weight is stored as I8; save the adapter in float32 or bfloat16$"):
        merged(folder, lora)
    twice = dict.fromkeys(("lm_head.weight", "lm_head.base_layer.weight"), np.ones((ROWS, 64), np.float32))
    write_lora(lora, twice)
    with pytest.raises(LoadError, match=r"lm_head.weight stands there twice, under two spellings; save the adapter"):
        merged(folder, lora)


def test_adapters_that_contradict_each_other_are_refused(folder: Path) -> None:
    base, home = random_weights(CONFIG), folder.parent
    plain = write_lora(home / "plain", matrices((QUERY, HEAD), base))
    dora = {**matrices((QUERY,), base), f"{QUERY}.lora_magnitude_vector": np.ones(64, np.float32)}
    dora_folder = write_lora(home / "dora", dora, use_dora=True)
    whole = write_lora(home / "whole", {"lm_head.weight": base["lm_head.weight"] + 1})
    alone_please = "^dora: a DoRA adapter sets the length of every row; merge it alone, unscaled$"
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((plain, dora_folder), alone_please),
        (((dora_folder, 0.5),), alone_please),
        ((plain, whole), r"^whole replaces lm_head\.weight, and plain changes it; leave one out$"),
        (((plain, math.nan),), "plain: the scale nan is no use; give a number such as 0.5, or leave the adapter out$"),
        (((whole, 0.5),), r"^whole: it replaces lm_head\.weight, which has no half-way; leave the scale out$"),
        (((plain, 0.0),), "the scale 0 is no use; give a number such as 0.5, or leave the adapter out$"),
    ]
    for adapters, message in cases:
        with pytest.raises(LoadError, match=message):
            merged(folder, *adapters)
    write_tokenizer(plain)
    second = write_lora(home / "second", matrices((KEY,), base))
    write_tokenizer(second, corpus=("other words " * 9,) * 4)
    with pytest.raises(LoadError, match=r"^plain and second bring different tokenizers \(tokenizer.json\); remove one"):
        merged(folder, plain, second)


def test_dora_where_it_cannot_be_computed_is_refused(folder: Path) -> None:
    base = random_weights(CONFIG)
    on_embedding = {**matrices((EMBEDDING,), base), f"{EMBEDDING}.lora_magnitude_vector": np.ones(64, np.float32)}
    lora = write_lora(folder.parent / "lora", on_embedding, use_dora=True)
    with pytest.raises(LoadError, match=r"^lora: DoRA on the embedding goes by columns, which do not stream; merge it"):
        merged(folder, lora)
    base[f"{QUERY}.weight"][3] = 0
    write_weights(folder, base)
    nothing = {name: values * 0 for name, values in matrices((QUERY,), base).items()}
    write_lora(lora, {**nothing, f"{QUERY}.lora_magnitude_vector": np.ones(64, np.float32)}, use_dora=True)
    with pytest.raises(LoadError, match=r"DoRA would divide by the length of a row that is all zeros$"):
        merged(folder, lora)
    with pytest.raises(LoadError, match=r"^lora: llama\.cpp's adapters know no DoRA; merge it instead"):
        alone(folder, lora)


def test_what_llama_cpp_would_get_wrong_in_an_adapter_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "tiny", **TIED)
    base = random_weights({**CONFIG, **TIED})
    for module in (EMBEDDING, HEAD):
        lora = write_lora(tmp_path / "lora", matrices((module,), base))
        with pytest.raises(LoadError, match=f"^lora changes {module}.weight, but the base model ties .* merge it inst"):
            alone(folder, lora)
    write_lora(lora, matrices((QUERY,), base), lora_alpha=0)
    with pytest.raises(LoadError, match=r"lora_alpha is 0, which llama.cpp would take for a scale of 1$"):
        alone(folder, lora)
    write_lora(lora, matrices((QUERY,), base))
    checkpoint = open_checkpoint(folder)
    with pytest.raises(LoadError, match=r"^lora: a scale belongs to the run"):
        write_adapter(checkpoint, open_adapter(lora, checkpoint, 0.5), tmp_path / "out.gguf")
    with pytest.raises(LoadError, match=r"^outtype 'q9' is not one of f32, f16, bf16, q8_0$"):
        write_adapter(checkpoint, open_adapter(lora, checkpoint), tmp_path / "out.gguf", outtype="q9")
    with pytest.raises(CannotWrite, match=r"one of the adapter's own files; name another output$"):
        write_adapter(checkpoint, open_adapter(lora, checkpoint), lora / "adapter_model.safetensors", force=True)
    with pytest.raises(NotFound, match=r"no such folder; give the one that holds adapter_config.json$"):
        open_adapter(tmp_path / "nowhere", checkpoint)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora", "tiny"]


def test_a_head_that_was_not_saved_with_new_rows_of_a_tied_embedding_is_missed(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "tiny", **TIED)
    lora = write_lora(tmp_path / "lora", {f"{EMBEDDING}.weight": np.ones((ROWS + 1, 64), np.float32)})
    with pytest.raises(LoadError, match="embedding has 513 rows and its head was not saved; train with modules_to_sa"):
        merged(folder, lora)


def test_an_adapter_of_a_quantized_base_is_noted(folder: Path) -> None:
    tensors_ = matrices((QUERY,), random_weights(CONFIG))
    lora = write_lora(folder.parent / "lora", tensors_, base_model_name_or_path="/home/me/unsloth/llama-3-8b-bnb-4bit")
    assert merge_notes(folder, lora)[0] == (
        "lora was trained on the quantized llama-3-8b-bnb-4bit; on the weights themselves, answers may differ a little"
    )
