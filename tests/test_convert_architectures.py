"""Every class that `convert` knows: it converts, llama.cpp runs it, and what GGUF cannot say is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from helpers.checkpoints import CONFIG, edit_json, random_weights, write_json, write_tokenizer, write_weights
from helpers.families import FAMILIES, GOLDEN, configuration, give_tokenizer, golden_digests, make_family
from safetensors.numpy import load_file

from metaalign_edge_convert import ARCHITECTURES, open_checkpoint, write_gguf
from metaalign_edge_runtime.errors import LoadError

IDS = [11, 42, 7, 99, 300, 255, 17, 80]


def logits(path: Path) -> np.ndarray:
    """Return llama.cpp's scores at every position of IDS."""
    from llama_cpp import Llama

    llama = Llama(
        str(path), n_ctx=64, logits_all=True, verbose=False, n_threads=1, n_threads_batch=1, type_k=0, type_v=0
    )
    try:
        llama.eval(IDS)
        return np.array(llama.scores[: len(IDS)])
    finally:
        llama.close()


def test_every_class_of_the_registry_is_tested() -> None:
    assert set(FAMILIES) | {"Gemma3ForConditionalGeneration"} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_runs_what_comes_out(name: str, tmp_path: Path) -> None:
    old, new = (make_family(tmp_path / kind, name, dtype="BF16", old=kind == "old") for kind in ("old", "new"))
    outputs = []
    for folder in (old, new):
        outputs.append(tmp_path / f"{folder.name}.gguf")
        done = write_gguf(open_checkpoint(folder), outputs[-1], outtype="f32")
        assert done.architecture == ARCHITECTURES[name].name
    scores = logits(outputs[0])
    assert np.isfinite(scores).all()
    assert scores.std() > 0
    assert np.array_equal(scores, logits(outputs[1]))  # the same model, saved twice


@pytest.mark.parametrize("name", FAMILIES)
def test_every_byte_is_as_it_was_when_it_was_compared_with_the_reference(name: str, tmp_path: Path) -> None:
    assert golden_digests(tmp_path, name) == json.loads(GOLDEN.read_text())[name]


def test_internlm2_is_llama_with_its_projections_interleaved(tmp_path: Path) -> None:
    llama = random_weights(CONFIG)
    names = {
        "model.embed_tokens": "model.tok_embeddings",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "lm_head": "output",
    }
    renamed = {}
    for name, values in llama.items():
        for old, new in names.items():
            name = name.replace(old, new)
        if "_proj" not in name:
            renamed[name] = values
    for layer in range(2):
        q, k, v = (llama[f"model.layers.{layer}.self_attn.{part}_proj.weight"] for part in "qkv")
        # two groups, each of two heads of queries, one of keys and one of values, 16 rows a head
        groups = [q.reshape(2, 2, 16, 64), k.reshape(2, 1, 16, 64), v.reshape(2, 1, 16, 64)]
        renamed[f"model.layers.{layer}.attention.wqkv.weight"] = np.concatenate(groups, 1).reshape(-1, 64)
    config = {key: value for key, value in CONFIG.items() if key not in ("rope_parameters", "head_dim")}
    config |= {"architectures": ["InternLM2ForCausalLM"], "rope_theta": 10000, "bias": False}
    folders = {"llama": (CONFIG, llama), "internlm2": (config, renamed)}
    scores = []
    for name, (values, weights) in folders.items():
        folder = tmp_path / name
        folder.mkdir()
        write_json(folder / "config.json", values)
        write_weights(folder, weights)
        write_tokenizer(folder)
        write_gguf(open_checkpoint(folder), tmp_path / f"{name}.gguf", outtype="f32")
        scores.append(logits(tmp_path / f"{name}.gguf"))
    assert np.array_equal(*scores)


def test_of_a_model_that_sees_the_language_model_is_converted(tmp_path: Path) -> None:
    plain = make_family(tmp_path / "plain", "Gemma3ForCausalLM")
    nested = tmp_path / "nested"
    nested.mkdir()
    own = load_file(plain / "model.safetensors").items()
    weights: dict[str, Any] = {name.replace("model.", "model.language_model.", 1): values for name, values in own}
    weights["model.vision_tower.patch.weight"] = weights["model.multi_modal_projector.weight"] = np.ones(4, np.float32)
    write_weights(nested, weights)
    text = configuration("Gemma3ForCausalLM")
    top = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "vision_config": {}}
    write_json(nested / "config.json", {**top, "text_config": text})
    give_tokenizer(nested, "Gemma3ForCausalLM")
    for folder in (plain, nested):
        write_gguf(open_checkpoint(folder), folder.with_suffix(".gguf"), outtype="f16")
    checkpoint = open_checkpoint(nested)
    assert checkpoint.notes == ("only the language model is converted, without 2 tensors for images",)
    a, b = (gguf.GGUFReader(folder.with_suffix(".gguf")) for folder in (plain, nested))
    assert [t.name for t in a.tensors] == [t.name for t in b.tensors]
    assert all(np.array_equal(x.data, y.data) for x, y in zip(a.tensors, b.tensors, strict=True))


REFUSED = {
    "gemma scale": ("Gemma2ForCausalLM", {"query_pre_attn_scalar": 144}, "is 144, but llama.cpp scales by 32"),
    "gemma theta": (
        "GemmaForCausalLM",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        "rope_theta is 500, but llama.cpp takes 10000 for granted",
    ),
    "gemma head": ("GemmaForCausalLM", {"tie_word_embeddings": False}, "takes the output head of this architecture"),
    "gemma activation": ("GemmaForCausalLM", {"hidden_activation": "relu"}, "the activation 'relu', but llama.cpp"),
    "gemma 2 activation": ("Gemma2ForCausalLM", {"hidden_activation": "gelu"}, "hidden_activation is 'gelu', but"),
    "gemma 3 caps": ("Gemma3ForCausalLM", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0, which"),
    "order of layers": ("Gemma2ForCausalLM", {"layer_types": ["full_attention"] * 4}, "an order that llama.cpp"),
    "pattern": ("Gemma3ForCausalLM", {"sliding_window_pattern": 4}, "an order that llama.cpp does not compute"),
    "layers without positions": ("SmolLM3ForCausalLM", {"no_rope_layers": [0, 1, 1, 1]}, "not every 4th layer"),
    "interval without positions": ("SmolLM3ForCausalLM", {"no_rope_layer_interval": 2}, "not every 4th layer"),
    "qwen 3 biases": ("Qwen3ForCausalLM", {"attention_bias": True}, "attention_bias is True, which llama.cpp cannot"),
    "head size": ("Qwen2ForCausalLM", {"head_dim": 32}, "4 heads of 32 are not hidden_size 64"),
    "window": (
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 64},
        "sliding_window 64 in a context",
    ),
    "whole heads": (
        "Qwen2ForCausalLM",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor 0.5, but here whole heads are turned",
    ),
    "long factors": (
        "Phi3ForCausalLM",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "long_factor": [1.0],
                "short_factor": [1.0] * 8,
            }
        },
        "1 number in long_factor, not 8",
    ),
    "no list": (
        "Phi3ForCausalLM",
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, "long_factor": 2, "short_factor": [1.0]}},
        "long_factor .RoPE 'longrope'. is 2, not a list of numbers",
    ),
    "tied": ("Olmo2ForCausalLM", {"tie_word_embeddings": True}, "wants an output head of its own"),
    "a norm for each head": ("StableLmForCausalLM", {"qk_layernorm": True}, "qk_layernorm is True, which llama.cpp"),
    "internlm biases": ("InternLM2ForCausalLM", {"bias": True}, "bias is True, which llama.cpp cannot compute"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_would_compute_otherwise_is_refused(case: str, tmp_path: Path) -> None:
    name, changes, message = REFUSED[case]
    folder = make_family(tmp_path / "tiny", name, old=False)
    edit_json(folder / "config.json", **changes)
    with pytest.raises(LoadError, match=message):
        open_checkpoint(folder)


def test_a_window_that_llama_cpp_ignores_is_mentioned(tmp_path: Path) -> None:
    folder = make_family(tmp_path / "tiny", "Phi3ForCausalLM", sliding_window=32)
    assert "not to the last 32 tokens only" in open_checkpoint(folder).notes[0]


def test_dynamic_rope_is_the_default_within_the_context_and_mentioned(tmp_path: Path) -> None:
    folder = make_family(tmp_path / "tiny", "InternLM2ForCausalLM")
    edit_json(folder / "config.json", rope_scaling={"type": "dynamic", "factor": 2.0})
    assert "'dynamic' stretches beyond" in open_checkpoint(folder).notes[0]
