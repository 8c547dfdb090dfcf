"""The converter against the two programs it must agree with: llama.cpp's own converter, and transformers."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
import torch
from helpers.checkpoints import CONFIG, edit_json, random_weights, write_json, write_weights
from helpers.families import LLAMA3
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from metaalign_edge_convert import OUTTYPES, open_checkpoint, write_gguf

if TYPE_CHECKING:
    from conftest import Reference

Json = dict[str, Any]
CLASSES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral"}
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
CL100K = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def split(regex: str) -> Json:
    """Split with ``regex``, then turn bytes into letters."""
    cut = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [cut, {**BYTES, "use_regex": False}]}


BOS = "<|begin_of_text|>"
REAL = {  # vocabulary -> pre-tokenizer, begin and end tokens, what is added, further keys of the model
    "gpt-2": (BYTES, "<|endoftext|>", "<|endoftext|>", BYTES, {}),
    "qwen2": (split(CL100K % r"\p{N}"), None, "<|endoftext|>", BYTES, {}),
    "llama-bpe": (
        split(CL100K % r"\p{N}{1,3}"),
        BOS,
        "<|end_of_text|>",
        {
            "type": "Sequence",
            "processors": [
                BYTES,
                {
                    "type": "TemplateProcessing",
                    "single": [{"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                    "special_tokens": {BOS: {"id": BOS, "ids": [128000], "tokens": [BOS]}},
                },
            ],
        },
        {"ignore_merges": True},
    ),
}


@cache
def real_tokenizer(path: Path, name: str) -> tuple[Json, Json, int]:
    """Rebuild tokenizer.json and tokenizer_config.json of a real model from llama.cpp's copy of its vocabulary."""
    fields = gguf.GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    types = fields["tokenizer.ggml.token_type"].contents()
    pre, bos, eos, post, model = REAL[name]
    special = [number for number, kind in enumerate(types) if kind == gguf.TokenType.CONTROL]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": tokens[number], **flags} for number in special],
        "normalizer": {"type": "NFC"} if name == "qwen2" else None,
        "pre_tokenizer": pre,
        "post_processor": post,
        "decoder": BYTES,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {
                token: number
                for number, token in enumerate(tokens)
                if types[number] == gguf.TokenType.NORMAL or (name == "gpt-2" and number in special)
            },
            "merges": [merge.split(" ") for merge in fields["tokenizer.ggml.merges"].contents()],
            **model,
        },
    }
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "model_max_length": 1024}
    if bos is not None:
        settings["bos_token"] = bos
    return tokenizer, settings, len(tokens)


def config_for(name: str, rows: int, **changes: Any) -> Json:
    """Return a tiny configuration for the class ``name``."""
    config = {**CONFIG, "architectures": [name], "model_type": CLASSES[name], "vocab_size": rows, **changes}
    if name == "MistralForCausalLM":
        config["sliding_window"] = None
    return config


def save_old(folder: Path, config: Json, dtype: str, tokenizer: Json, settings: Json) -> Path:
    """Save as transformers 4 did: one file, rope_theta at the top, merges as texts, the template in the settings."""
    folder.mkdir(parents=True)
    old = {**config, "torch_dtype": "float32", "rope_theta": config["rope_parameters"]["rope_theta"]}
    scaling = {key: value for key, value in old.pop("rope_parameters").items() if key != "rope_theta"}
    if scaling["rope_type"] != "default":
        old["rope_scaling"] = scaling
    write_json(folder / "config.json", old)
    write_weights(folder, random_weights(config), dtype)
    model = {**tokenizer["model"], "merges": [" ".join(merge) for merge in tokenizer["model"]["merges"]]}
    write_json(folder / "tokenizer.json", {**tokenizer, "model": model})
    decoder = {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in tokenizer["added_tokens"]}
    template = {"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}", "added_tokens_decoder": decoder}
    write_json(folder / "tokenizer_config.json", {**settings, **template})
    named = {key: value for key, value in settings.items() if key in ("bos_token", "eos_token")}
    write_json(folder / "special_tokens_map.json", named)
    sampling = {"temperature": 0.6, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.1, "do_sample": True}
    write_json(folder / "generation_config.json", sampling)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags:\n- tiny\nlanguage:\n- en\n---\n# Tiny\n")
    return folder


def save_new(folder: Path, config: Json, dtype: str, tokenizer: Json, settings: Json) -> Path:
    """Save with the installed transformers, in several shards."""
    save_old(folder.with_name(folder.name + "-old"), config, dtype, tokenizer, settings)
    folder.mkdir(parents=True)
    old = folder.with_name(folder.name + "-old")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).to(DTYPES[dtype])
    weights = {name: torch.from_numpy(values.copy()) for name, values in random_weights(config).items()}
    model.load_state_dict(weights, strict=False)
    model.save_pretrained(folder, max_shard_size="100KB")
    saved = PreTrainedTokenizerFast.from_pretrained(old)
    saved.save_pretrained(folder)
    assert (folder / "model.safetensors.index.json").exists()
    return folder


def assert_same_bytes(ours: Path, theirs: Path) -> None:
    """Compare two GGUF files; say what differs, in GGUF's own terms."""
    if ours.read_bytes() == theirs.read_bytes():
        return
    a, b = gguf.GGUFReader(ours), gguf.GGUFReader(theirs)
    assert list(a.fields) == list(b.fields)
    for name, field in a.fields.items():
        assert (field.types, field.contents()) == (b.fields[name].types, b.fields[name].contents()), name
    assert [t.name for t in a.tensors] == [t.name for t in b.tensors]
    for x, y in zip(a.tensors, b.tensors, strict=True):
        assert (x.tensor_type, list(x.shape)) == (y.tensor_type, list(y.shape)), x.name
        assert np.array_equal(x.data, y.data), x.name
    raise AssertionError("the same content, but other bytes")


def compare(reference: Reference, folder: Path, outtypes: tuple[str, ...]) -> None:
    """Convert one checkpoint with both converters and compare the files."""
    jobs = [(folder, folder.parent / f"{folder.name}-{outtype}-theirs.gguf", outtype) for outtype in outtypes]
    reference.convert(jobs)
    checkpoint = open_checkpoint(folder)
    for _, theirs, outtype in jobs:
        ours = theirs.with_name(theirs.name.replace("theirs", "ours"))
        write_gguf(checkpoint, ours, outtype=outtype)
        assert_same_bytes(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("save", [save_old, save_new], ids=["single-file", "sharded"])
@pytest.mark.parametrize("name", CLASSES)
def test_the_files_are_the_reference_converters_byte_for_byte(
    name: str, save: Any, dtype: str, reference: Reference, tmp_path: Path
) -> None:
    tokenizer, settings, rows = real_tokenizer(reference.vocabulary("gpt-2"), "gpt-2")
    config = config_for(name, rows, hidden_size=32, head_dim=8)
    folder = save(tmp_path / "tiny-chat-7", config, dtype, tokenizer, settings)
    compare(reference, folder, OUTTYPES)


@pytest.mark.parametrize("save", [save_old, save_new], ids=["single-file", "sharded"])
@pytest.mark.parametrize("vocabulary", ["qwen2", "llama-bpe"])
def test_real_vocabularies_come_out_as_the_reference_writes_them(
    vocabulary: str, save: Any, reference: Reference, tmp_path: Path
) -> None:
    tokenizer, settings, rows = real_tokenizer(reference.vocabulary(vocabulary), vocabulary)
    config = config_for("LlamaForCausalLM", rows, hidden_size=32, head_dim=8, num_hidden_layers=1)
    compare(reference, save(tmp_path / "tiny", config, "BF16", tokenizer, settings), ("q8_0",))


VARIANTS = {
    "tied": {"tie_word_embeddings": True},
    "heads-of-their-own-size": {"head_dim": 32},
    "every-head-its-own-keys": {"num_key_value_heads": 4},
    "biases": {"attention_bias": True},
    "llama3-rope": {"rope_parameters": LLAMA3, "head_dim": 64},
    "linear-rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "yarn-rope": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_of_llama_is_the_references_file_and_computes_what_transformers_computes(
    variant: str, reference: Reference, tmp_path: Path
) -> None:
    tokenizer, settings, rows = real_tokenizer(reference.vocabulary("gpt-2"), "gpt-2")
    config = config_for("LlamaForCausalLM", rows, **VARIANTS[variant])
    folder = save_old(tmp_path / "tiny", config, "F32", tokenizer, settings)
    compare(reference, folder, ("f32",))
    same_function(folder, tmp_path / "tiny-f32-ours.gguf")


@pytest.mark.parametrize("name", CLASSES)
def test_llama_cpp_computes_what_transformers_computes(name: str, reference: Reference, tmp_path: Path) -> None:
    tokenizer, settings, rows = real_tokenizer(reference.vocabulary("gpt-2"), "gpt-2")
    folder = save_new(tmp_path / "tiny", config_for(name, rows), "BF16", tokenizer, settings)
    # in float32, for llama.cpp rounds what it multiplies with bfloat16
    write_gguf(open_checkpoint(folder), tmp_path / "tiny.gguf", outtype="f32")
    same_function(folder, tmp_path / "tiny.gguf")


def same_function(folder: Path, path: Path) -> None:
    """Compare the logits of eight positions, all in float32."""
    from llama_cpp import Llama

    ids = [15496, 11, 995, 0, 383, 2068, 7586, 21831]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits[0].numpy()
    llama = Llama(str(path), n_ctx=64, logits_all=True, verbose=False, n_threads=1, type_k=0, type_v=0)
    llama.eval(ids)
    found = np.array(llama.scores[: len(ids)])
    llama.close()
    assert np.abs(found - wanted).max() < 1e-3
    assert (found.argmax(1) == wanted.argmax(1)).all()


def test_a_named_chat_template_and_a_list_of_end_tokens_do_not_disturb_the_reference_keys(
    reference: Reference, tmp_path: Path
) -> None:
    tokenizer, settings, rows = real_tokenizer(reference.vocabulary("gpt-2"), "gpt-2")
    folder = save_old(tmp_path / "tiny", config_for("LlamaForCausalLM", rows), "F32", tokenizer, settings)
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    edit_json(folder / "tokenizer_config.json", chat_template=named)
    edit_json(folder / "generation_config.json", eos_token_id=[50256])
    compare(reference, folder, ("f16",))
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [50256]
