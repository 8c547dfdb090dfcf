"""convert/: from a checkpoint to a GGUF file that llama.cpp loads, or to a message that says why not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from helpers.checkpoints import (
    BYTE_LEVEL,
    CONFIG,
    MARKERS,
    ROWS,
    TEMPLATE,
    edit_json,
    make_checkpoint,
    random_weights,
    write_container,
    write_json,
    write_tokenizer,
    write_weights,
)
from helpers.families import LLAMA3
from helpers.gguf_files import keys, weights_in
from llama_cpp import Llama

import metaalign_edge_convert.plan as planning
from metaalign_edge_convert import OUTTYPES, open_checkpoint, prove_pre_tokenizer, write_gguf
from metaalign_edge_convert.pretokenizers import TABLE
from metaalign_edge_convert.prove import TEXTS
from metaalign_edge_runtime.errors import CannotWrite, LoadError, NotFound, UsageError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny checkpoint."""
    return make_checkpoint(tmp_path / "tiny-model")


def convert(folder: Path, outtype: str = "f32", **options: Any) -> Path:
    """Convert a folder into a file beside it, without the proof, which has tests of its own."""
    output = folder.parent / f"{folder.name}-{outtype}.gguf"
    write_gguf(open_checkpoint(folder), output, outtype=outtype, force=True, **{"check": False, **options})
    return output


def logits(path: Path, ids: list[int]) -> np.ndarray:
    """Ask llama.cpp for the logits of every position."""
    llama = Llama(
        str(path), n_ctx=64, logits_all=True, verbose=False, n_threads=1, n_threads_batch=1, type_k=0, type_v=0
    )
    llama.eval(ids)
    found = np.array(llama.scores[: len(ids)])
    llama.close()
    return found


def llama_in_numpy(weights: dict[str, np.ndarray], config: dict[str, Any], ids: list[int]) -> np.ndarray:
    """The model as its paper has it, on the checkpoint's own weights: the other side of the comparison."""
    heads, kv_heads, size = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    angles = np.arange(len(ids))[:, None] / 10000 ** (np.arange(0, size, 2) / size)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    mask = np.triu(np.full((len(ids), len(ids)), -np.inf), 1)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config["rms_norm_eps"]) * weights[name]

    def turn(x: np.ndarray) -> np.ndarray:
        a, b = np.split(x, 2, -1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    x = weights["model.embed_tokens.weight"][ids].astype(np.float64)
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}."
        h = norm(x, layer + "input_layernorm.weight")
        q, k, v = (h @ weights[f"{layer}self_attn.{part}_proj.weight"].T for part in "qkv")
        q, k = turn(q.reshape(len(ids), heads, size)), turn(k.reshape(len(ids), kv_heads, size))
        v = v.reshape(len(ids), kv_heads, size)
        k, v = (np.repeat(part, heads // kv_heads, 1) for part in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(size) + mask
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("hqk,khd->qhd", scores / scores.sum(-1, keepdims=True), v).reshape(len(ids), -1)
        x = x + mixed @ weights[layer + "self_attn.o_proj.weight"].T
        h = norm(x, layer + "post_attention_layernorm.weight")
        gate, up = (h @ weights[f"{layer}mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        x = x + gate / (1 + np.exp(-gate)) * up @ weights[layer + "mlp.down_proj.weight"].T
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return norm(x, "model.norm.weight") @ head.T


# -- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"head_dim": 32, "num_key_value_heads": 1}])
def test_llama_cpp_computes_the_function_that_the_checkpoint_describes(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "tiny", dtype="BF16", shards=3, **changes)
    config = {**CONFIG, **changes}
    ids = [6, 77, 300, 5, 200, 42, 7, 100]
    wanted = llama_in_numpy(random_weights(config), config, ids)
    found = logits(convert(folder), ids)
    assert np.abs(found - wanted).max() < 1e-3
    assert (found.argmax(1) == wanted.argmax(1)).all()


@pytest.mark.parametrize(("outtype", "error"), [("f32", 0), ("bf16", 0), ("f16", 0), ("q8_0", 0.003)])
def test_every_outtype_holds_the_weights_as_exactly_as_it_can(outtype: str, error: float, folder: Path) -> None:
    found, source = weights_in(convert(folder, outtype)), random_weights(CONFIG)
    pairs = {"token_embd": "model.embed_tokens", "output": "lm_head", "blk.1.ffn_down": "model.layers.1.mlp.down_proj"}
    for name, origin in pairs.items():
        assert np.abs(found[f"{name}.weight"] - source[f"{origin}.weight"]).max() <= error
    assert np.array_equal(found["blk.0.attn_norm.weight"], source["model.layers.0.input_layernorm.weight"])
    size, query = CONFIG["head_dim"], source["model.layers.0.self_attn.q_proj.weight"]
    paired = query.reshape(4, 2, size // 2, -1).swapaxes(1, 2).reshape(query.shape)
    assert np.abs(found["blk.0.attn_q.weight"] - paired).max() <= error


@pytest.mark.parametrize("outtype", OUTTYPES)
def test_the_same_checkpoint_gives_the_same_bytes_and_loads(outtype: str, folder: Path) -> None:
    first = convert(folder, outtype).read_bytes()
    path = convert(folder, outtype)
    assert path.read_bytes() == first
    assert np.isfinite(logits(path, [1, 2, 3])).all()


def test_how_the_weights_are_stored_leaves_no_trace(tmp_path: Path) -> None:
    files = []
    for dtype in ("F32", "F16", "BF16"):
        folder = make_checkpoint(tmp_path / dtype / "tiny", dtype=dtype)
        files.append(convert(folder, "q8_0").read_bytes())
    assert files[0] == files[1] == files[2]


def test_small_chunks_of_rows_give_the_same_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = convert(folder, "q8_0").read_bytes()
    monkeypatch.setattr(planning, "CHUNK", 5000)
    assert convert(folder, "q8_0").read_bytes() == whole


def test_old_and_new_spellings_of_the_configuration_mean_the_same(folder: Path) -> None:
    edit_json(folder / "config.json", rope_parameters=LLAMA3)
    new = convert(folder).read_bytes()
    scaling = {key: value for key, value in LLAMA3.items() if key not in ("rope_theta", "rope_type")}
    old = {"rope_scaling": {**scaling, "type": "llama3"}, "rope_theta": 500000.0, "head_dim": None}
    edit_json(folder / "config.json", rope_parameters=None, **old)
    assert convert(folder).read_bytes() == new


def test_a_sparse_configuration_means_what_transformers_takes_it_to_mean(folder: Path) -> None:
    absent = dict.fromkeys(("rms_norm_eps", "max_position_embeddings", "rope_parameters", "hidden_act", "head_dim"))
    edit_json(folder / "config.json", **absent, tie_word_embeddings=None)
    found = keys(convert(folder))
    assert found["llama.context_length"] == 2048
    assert found["llama.rope.freq_base"] == 10000
    assert found["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert found["llama.attention.key_length"] == 16


def test_llama3_frequencies_are_a_tensor_that_stretches_only_the_slow_ones(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "tiny", rope_parameters=LLAMA3, head_dim=64)
    found = weights_in(convert(folder))["rope_freqs.weight"]
    assert found.shape == (32,)
    assert found[0] == 1
    assert found[-1] == 8
    assert (np.diff(found) >= 0).all()


def test_a_saved_copy_of_a_tied_embedding_is_left_out(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "tiny", tie_word_embeddings=True)
    plain = convert(folder).read_bytes()
    weights = random_weights({**CONFIG, "tie_word_embeddings": True})
    write_weights(folder, {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]})
    assert convert(folder).read_bytes() == plain


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_refused(folder: Path) -> None:
    edit_json(folder / "config.json", tie_word_embeddings=True)
    with pytest.raises(LoadError, match=r"lm_head\.weight differs from the embedding"):
        convert(folder)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_rows_that_no_block_fits_become_float16(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "tiny", intermediate_size=72)
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(convert(folder, "q8_0")).tensors}
    assert types["blk.0.ffn_down.weight"] == "F16"
    assert types["blk.0.ffn_up.weight"] == "Q8_0"


def test_what_happened_is_reported(folder: Path) -> None:
    output, calls = folder.parent / "out.gguf", []
    checkpoint = open_checkpoint(folder)
    result = write_gguf(checkpoint, output, progress=lambda *call: calls.append(call))
    assert (result.output, result.architecture, result.outtype, result.template) == (output, "llama", "q8_0", "keep")
    assert result.parameters == checkpoint.parameters == sum(w.size for w in random_weights(CONFIG).values())
    assert result.bytes == output.stat().st_size
    assert result.checks == ("pre-tokenizer gpt-2: 52 of 52 texts become the same tokens",)
    assert calls[0][0] == "output.weight"
    assert calls[-1][1] == calls[-1][2] < result.bytes


def test_memory_stays_small_whatever_the_tensor(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "tiny", num_hidden_layers=1)
    ff = 300_000  # three matrices of 77 MB, all zeros and not really on the disk
    edit_json(folder / "config.json", intermediate_size=ff)
    header, end = {}, 0
    for name, values in random_weights({**CONFIG, "num_hidden_layers": 1}).items():
        shape = [ff if size == CONFIG["intermediate_size"] else size for size in values.shape]
        length = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + length]}
        end += length
    write_container(folder / "model.safetensors", json.dumps(header).encode(), b"")
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size + end)
    script = (
        "import sys; from pathlib import Path; import metaalign_edge; from metaalign_edge_convert import *\n"
        "done = write_gguf(open_checkpoint(Path(sys.argv[1])), Path(sys.argv[2]), outtype='f16', check=False)\n"
        "print(done.peak_mb)"
    )
    command = [sys.executable, "-c", script, str(folder), str(tmp_path / "big.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (tmp_path / "big.gguf").stat().st_size > 115_000_000
    assert float(done.stdout) < 140


# -- the vocabulary ---------------------------------------------------------------------------------------------------


def test_tokens_have_their_types_and_holes_are_filled(folder: Path) -> None:
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added += [{"id": 505, "content": "▁two words", "special": False, **flags}]
    added += [{"id": 506, "content": "<|looks|>", "special": False, **flags}]
    edit_json(folder / "tokenizer.json", added_tokens=added)
    found = keys(convert(folder))
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == ROWS
    assert tokens[:6] == list(MARKERS)
    assert types[:6] == [gguf.TokenType.CONTROL] * 6
    assert (tokens[505], types[505]) == (" two words", gguf.TokenType.USER_DEFINED)
    assert (tokens[506], types[506]) == ("<|looks|>", gguf.TokenType.CONTROL)
    assert (tokens[507], types[507]) == ("[PAD507]", gguf.TokenType.UNUSED)
    assert types[100] == gguf.TokenType.NORMAL


def test_both_spellings_of_the_merges_are_read(folder: Path) -> None:
    first = convert(folder).read_bytes()
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    pairs = [" ".join(merge) if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]
    edit_json(folder / "tokenizer.json", model={**model, "merges": pairs})
    assert convert(folder).read_bytes() == first


def test_what_is_added_to_a_text_is_always_said(folder: Path) -> None:
    found = keys(convert(folder))
    assert (found["tokenizer.ggml.add_bos_token"], found["tokenizer.ggml.add_eos_token"]) == (False, False)
    edit_json(folder / "tokenizer.json", post_processor=None)
    found = keys(convert(folder))
    assert (found["tokenizer.ggml.add_bos_token"], found["tokenizer.ggml.add_eos_token"]) == (False, False)
    single = [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    template = {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}}
    edit_json(folder / "tokenizer.json", post_processor={"type": "Sequence", "processors": [BYTE_LEVEL, template]})
    assert keys(convert(folder))["tokenizer.ggml.add_bos_token"] is True


def test_end_tokens_beyond_the_first_find_a_place(folder: Path) -> None:
    write_json(folder / "generation_config.json", {"eos_token_id": [0, 3, 5, 100], "top_k": 20, "temperature": 0.7})
    found = keys(convert(folder))
    assert found["tokenizer.ggml.eos_token_id"] == 0
    assert found["tokenizer.ggml.eot_token_id"] == 3  # 5 is <|end|>, which llama.cpp knows, 100 an ordinary word
    assert (found["general.sampling.top_k"], found["general.sampling.temp"]) == (20, pytest.approx(0.7))


def test_every_row_of_the_pre_tokenizer_table_splits_as_the_tokenizers_library_does(tmp_path: Path) -> None:
    rows = 1024  # room for whole words of every script, so that a cut in the wrong place shows
    for number, row in enumerate(TABLE):
        folder = make_checkpoint(tmp_path / str(number), vocab_size=rows, num_hidden_layers=1)
        pre = pre_tokenizer_of(row.parts)
        write_tokenizer(folder, pre, corpus=TEXTS * 3, rows=rows, ignore_merges=row.ignore_merges)
        checkpoint = open_checkpoint(folder)
        assert checkpoint.vocabulary.signature.row == row
        found = prove_pre_tokenizer(checkpoint, row.name)
        assert row.approximate in found
        assert row.approximate or "52 of 52" in found, (row.name, found)


def pre_tokenizer_of(parts: tuple[str, ...]) -> dict[str, Any]:
    """Write a row's parts the way tokenizer.json has them."""
    steps: list[dict[str, Any]] = []
    for part in parts:
        if part.startswith("split("):
            regex = {"Regex": part.removeprefix("split(").removesuffix(")")}
            steps.append({"type": "Split", "pattern": regex, "behavior": "Isolated", "invert": False})
        elif part == "digits(each)":
            steps.append({"type": "Digits", "individual_digits": True})
        else:
            steps.append({**BYTE_LEVEL, "use_regex": part == "bytes(words)"})
    return {"type": "Sequence", "pretokenizers": steps}


def test_an_unknown_pre_tokenizer_is_named_by_its_parts_and_can_be_overridden(folder: Path) -> None:
    vowels = {"type": "Split", "pattern": {"Regex": "[aeiou]"}, "behavior": "Isolated", "invert": False}
    edit_json(folder / "tokenizer.json", pre_tokenizer={"type": "Sequence", "pretokenizers": [vowels, BYTE_LEVEL]})
    with pytest.raises(LoadError, match=r"is not known: split\(\[aeiou\]\) \+ bytes\(words\); none of its own"):
        convert(folder)
    assert keys(convert(folder, pre="gpt-2"))["tokenizer.ggml.pre"] == "gpt-2"
    with pytest.raises(LoadError, match="is no name of a pre-tokenizer"):
        convert(folder, pre="../x")


def test_a_wrong_pre_tokenizer_does_not_pass_the_proof(folder: Path) -> None:
    with pytest.raises(LoadError, match=r"llama\.cpp splits \d+ of 52 texts otherwise than tokenizer\.json"):
        convert(folder, pre="qwen2", check=True)
    with pytest.raises(LoadError, match=r"cannot load the vocabulary: .*unknown pre-tokenizer type: 'no-such-name'"):
        convert(folder, pre="no-such-name", check=True)


def test_without_the_tokenizers_library_the_proof_is_left_out_and_says_so(folder: Path) -> None:
    script = (
        "import sys; sys.modules['tokenizers'] = None; from pathlib import Path; import metaalign_edge; from metaalign_edge_convert import *\n"
        "print(*write_gguf(open_checkpoint(Path(sys.argv[1])), Path(sys.argv[2])).checks)"
    )
    command = [sys.executable, "-c", script, str(folder), str(folder.parent / "out.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (
        done.stdout.strip() == "pre-tokenizer gpt-2 found by its structure, not tried out: tokenizers is not installed"
    )


def test_a_folder_that_sounds_like_phi_3_still_loads(folder: Path) -> None:
    other = folder.rename(folder.with_name("phi-3-tune"))
    path = convert(other)
    assert "phi-3" not in keys(path)["general.name"].lower()
    assert np.isfinite(logits(path, [1])).all()


# -- chat templates and metadata --------------------------------------------------------------------------------------


def test_the_checkpoints_own_template_is_kept(folder: Path) -> None:
    assert open_checkpoint(folder).chat_template == TEMPLATE
    found = keys(convert(folder))
    assert found["tokenizer.chat_template"] == TEMPLATE
    assert "tokenizer.chat_templates" not in found
    assert "metaalign.template" not in found


def test_a_replaced_template_stays_in_the_file_under_another_name(folder: Path) -> None:
    found = keys(convert(folder, chat_template="NEW", template_name="metaalign"))
    assert found["tokenizer.chat_template"] == "NEW"
    assert found["tokenizer.chat_template.original"] == TEMPLATE
    assert found["tokenizer.chat_templates"] == ["original"]
    assert found["metaalign.template"] == "metaalign"
    same = keys(convert(folder, chat_template=TEMPLATE, template_name="metaalign"))
    assert "tokenizer.chat_template.original" not in same


def test_templates_are_found_wherever_checkpoints_keep_them(folder: Path) -> None:
    named = [{"name": "tool use", "template": "T"}, {"name": "default", "template": "D"}]
    edit_json(folder / "tokenizer_config.json", chat_template=named)
    found = keys(convert(folder))
    assert (found["tokenizer.chat_template"], found["tokenizer.chat_template.tool_use"]) == ("D", "T")
    edit_json(folder / "tokenizer_config.json", chat_template=None)
    assert open_checkpoint(folder).chat_template is None
    write_json(folder / "chat_template.json", {"chat_template": "J"})
    assert open_checkpoint(folder).chat_template == "J"
    (folder / "chat_template.jinja").write_text("F")
    assert open_checkpoint(folder).chat_template == "F"


def test_the_makers_way_of_sampling_is_kept_and_nonsense_is_not(folder: Path) -> None:
    given = {"top_k": 40, "top_p": 1, "temperature": "hot", "min_p": True, "repetition_penalty": 1.1, "mirostat": 1e300}
    write_json(folder / "generation_config.json", given)
    found = {key.split(".")[-1]: value for key, value in keys(convert(folder)).items() if ".sampling." in key}
    assert found == {"top_k": 40, "top_p": 1.0, "penalty_repeat": pytest.approx(1.1)}


def test_a_model_card_fills_in_the_metadata_and_cannot_break_it(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: mit\nversion: 1.0\ntags: [a, 2]\nlanguage:\n- no\n---\nText\n")
    found = keys(convert(folder))
    assert (found["general.license"], found["general.version"]) == ("mit", "1.0")
    assert (found["general.tags"], found["general.languages"]) == (["a", "2"], ["no"])
    for front in (
        "a: [",
        "- list",
        "base_model: {x: {y: z}}",
        "datasets: 7\nname: [1]\nauthor: {}",
        "x: !!python/none",
    ):
        (folder / "README.md").write_text(f"---\n{front}\n---\n")
        assert keys(convert(folder))["general.name"] == "Tiny Model"


def test_no_local_path_gets_into_the_file(folder: Path) -> None:
    edit_json(folder / "config.json", _name_or_path="secret/run7")
    data = convert(folder).read_bytes()
    assert b"secret" not in data.lower()
    assert str(folder).encode() not in data


def test_a_snapshot_in_the_hubs_cache_has_the_hubs_name(folder: Path) -> None:
    repository = folder.parent / "models--someone--tiny-7b-chat"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        blob = path.rename(repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    assert open_checkpoint(snapshot).name == "someone/tiny-7b-chat"
    found = keys(convert(snapshot))
    assert (found["general.name"], found["general.organization"]) == ("Tiny 7b Chat", "Someone")


# -- what is refused --------------------------------------------------------------------------------------------------


def config(**changes: Any) -> Callable[[Path], None]:
    """Change config.json."""
    return lambda folder: edit_json(folder / "config.json", **changes)


def rope(**parameters: Any) -> Callable[[Path], None]:
    """Change the RoPE parameters."""
    return config(rope_parameters={"rope_theta": 10000.0, **parameters})


def model(**changes: Any) -> Callable[[Path], None]:
    """Change the model in tokenizer.json."""

    def change(folder: Path) -> None:
        found = json.loads((folder / "tokenizer.json").read_text())["model"]
        edit_json(folder / "tokenizer.json", model={**found, **changes})

    return change


def tokens(**changes: Any) -> Callable[[Path], None]:
    """Change the vocabulary in tokenizer.json."""

    def change(folder: Path) -> None:
        found = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
        model(vocab={**found, **changes})(folder)

    return change


def settings(**changes: Any) -> Callable[[Path], None]:
    """Change tokenizer_config.json."""
    return lambda folder: edit_json(folder / "tokenizer_config.json", **changes)


def tokenizer(**changes: Any) -> Callable[[Path], None]:
    """Change tokenizer.json."""
    return lambda folder: edit_json(folder / "tokenizer.json", **changes)


def weights(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    """Change the weights."""

    def apply(folder: Path) -> None:
        found = random_weights(CONFIG)
        change(found)
        write_weights(folder, found)

    return apply


def text(name: str, content: str | bytes) -> Callable[[Path], None]:
    """Write a file."""
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data) and None


def sparse(name: str, size: int) -> Callable[[Path], None]:
    """Make a file so large that it must not be read."""
    return lambda folder: os.truncate(folder / name, size)


def without(name: str) -> Callable[[Path], None]:
    """Remove a file."""
    return lambda folder: (folder / name).unlink()


def only(name: str) -> Callable[[Path], None]:
    """Have another file in place of the weights."""
    return lambda folder: (folder / "model.safetensors").rename(folder / name) and None


def index(weight_map: Any) -> Callable[[Path], None]:
    """Write an index."""
    return lambda folder: write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})


ADDED = {"id": 3, "content": "<|other|>", "special": True}
NORM = "model.norm.weight"
REFUSALS: dict[str, tuple[Callable[[Path], None], str]] = {
    "another architecture": (
        config(architectures=["BertModel"]),
        "BertModel is not supported: it does not continue a text .supported: Gemma",
    ),
    "experts by name": (config(architectures=["Qwen3MoeForCausalLM"]), "not supported: it is a mixture of experts"),
    "a typing error": (config(architectures=["Qwen3ForCausaLM"]), "did you mean Qwen3ForCausalLM?"),
    "eyes": (config(architectures=["Qwen2VLForConditionalGeneration"]), "not supported: it reads more than text"),
    "a state": (config(architectures=["MambaForCausalLM"]), "not supported: it has layers with a state"),
    "no architecture": (config(architectures=None), "no architectures in it"),
    "quantized": (config(quantization_config={"quant_method": "gptq"}), r"quantized already \(gptq\)"),
    "quantized elsewhere": (text("hf_quant_config.json", "{}"), "hf_quant_config.json: the weights are quantized"),
    "experts": (config(num_local_experts=8), "num_local_experts is 8; mixtures of experts"),
    "activation": (config(hidden_act="gelu"), "hidden_act is 'gelu', but llama.cpp computes silu"),
    "window": (config(sliding_window=64), "sliding_window 64 in a context of 128"),
    "rope type": (rope(rope_type="spiral", factor=2.0), "RoPE of type 'spiral' is not known"),
    "rope type of others": (rope(rope_type="dynamic", factor=2.0), "RoPE of type 'dynamic' has no place in this"),
    "rope keys": (rope(rope_type="linear", factor=2.0, mscale=1), "'linear' with mscale cannot be written"),
    "rope missing": (rope(rope_type="llama3"), "factor .RoPE 'llama3'. is None, not a number above 0"),
    "rope value": (rope(rope_type="linear", factor="2"), "is '2', not a number"),
    "rope per layer": (
        config(rope_parameters={"full_attention": {}, "sliding_attention": {}}),
        "differs from layer to layer",
    ),
    "rope of some layers": (config(rope_parameters={"full_attention": {}}), "RoPE for full_attention; known are"),
    "partial rope": (config(partial_rotary_factor=0.5), "partial_rotary_factor 0.5, but here whole heads"),
    "huge theta": (rope(rope_theta=1e300), "rope_theta is 1e.300, not a number above 0"),
    "layers": (config(num_hidden_layers=10**6), "num_hidden_layers is 1000000, not a whole number from 1 to 1,024"),
    "no layers": (config(num_hidden_layers=0), "num_hidden_layers is 0, not a whole number from 1"),
    "negative": (config(hidden_size=-64), "hidden_size is -64, not a whole number from 1"),
    "huge": (
        config(intermediate_size=10**30),
        "intermediate_size is 1000000000000000000000000000000, not a whole number",
    ),
    "heads": (config(num_attention_heads=3), "3 heads cannot share 2 key-value heads"),
    "odd heads": (config(head_dim=15), "head_dim must be even"),
    "text for a number": (config(hidden_size="64"), "hidden_size is '64'"),
    "missing size": (config(intermediate_size=None), "intermediate_size is missing"),
    "text for a flag": (config(tie_word_embeddings="yes"), "tie_word_embeddings is 'yes', not true or false"),
    "no json": (text("config.json", "{"), r"config.json: not valid JSON \(Expecting.*download"),
    "not utf-8": (text("config.json", b"\xff{}"), r"config.json: not UTF-8 \(byte 0\)"),
    "a list": (text("config.json", "[]"), "holds a list where a JSON object belongs"),
    "deep": (text("config.json", '{"a":' * 100_000), "config.json: nested too deeply"),
    "key twice": (text("config.json", '{"a": 1, "a": 2}'), "the key 'a' stands twice"),
    "nan": (text("config.json", '{"a": NaN}'), "NaN is not a JSON number"),
    "large": (text("config.json", " " * 5_000_000), "larger than 4 MB"),
    "large tokenizer": (sparse("tokenizer.json", 201_000_000), "tokenizer.json: larger than 200 MB"),
    "pickle": (only("pytorch_model.bin"), r"pickled weights can run any code.*save_pretrained\(new_folder\)"),
    "pickle, pth": (only("consolidated.00.pth"), "pickled weights can run any code"),
    "adapter": (only("adapter_model.safetensors"), "a LoRA adapter, not a model"),
    "no weights": (only("weights.txt"), r"no model\*.safetensors in the folder"),
    "index out of the folder": (index({NORM: "../model.safetensors"}), "is not the plain name of a .safetensors file"),
    "absolute index": (index({NORM: "/etc/passwd"}), "is not the plain name of a .safetensors file"),
    "index of numbers": (index({NORM: 7}), "7 for model.norm.weight is not the plain name"),
    "empty index": (index({}), "no weight_map in it"),
    "missing shard": (index({NORM: "model-2.safetensors"}), "names files that are not there: model-2.safetensors"),
    "index too short": (index({NORM: "model.safetensors"}), "does not list lm_head.weight, .* and 16 more"),
    "index too long": (index({"x": "model.safetensors"}), "says that model.safetensors holds x, but it does not"),
    "missing tensor": (weights(lambda w: w.pop(NORM)), "the checkpoint lacks model.norm.weight; download"),
    "surplus tensor": (weights(lambda w: w.update(x=w[NORM])), "x: no place for this in the architecture LlamaForC"),
    "shape": (
        weights(lambda w: w.update({NORM: w[NORM][:3]})),
        r"has the shape \[3\], but config.json asks for \[64\]",
    ),
    "nan in a tensor": (weights(lambda w: w[NORM].fill(np.nan)), "model.norm.weight holds NaN or infinity"),
    "sentencepiece": (
        lambda f: (without("tokenizer.json")(f), text("tokenizer.model", "x")(f)),
        "tokenizer.model: not SentencePiece's",
    ),
    "no tokenizer": (without("tokenizer.json"), "tokenizer.json is missing; write one with"),
    "unigram": (model(type="Unigram", vocab=[]), "a Unigram vocabulary, but llama.cpp has only"),
    "spm-style": (
        lambda f: (tokenizer(pre_tokenizer=None)(f), model(vocab={"a": 0}, merges=[])(f)),
        "no byte_fallback",
    ),
    "wrongly saved": (tokenizer(pre_tokenizer={"type": "Metaspace"}), "take tokenizer.json from the base model"),
    "suffix": (model(end_of_word_suffix="</w>"), "end_of_word_suffix '</w>' has no counterpart"),
    "normalizer": (tokenizer(normalizer={"type": "Lowercase"}), "the normalizer 'Lowercase' has no counterpart"),
    "id twice": (tokens(extra=3), r"the tokens '<\|user\|>' and 'extra' have the same id 3"),
    "two ids": (tokenizer(added_tokens=[{**ADDED, "content": "<|end|>"}]), r"'<\|end\|>' has two ids, 5 and 3"),
    "clash": (tokenizer(added_tokens=[ADDED]), r"have the same id 3"),
    "beyond the rows": (tokens(far=600, further=601), r"'far' \(600\), 'further' \(601\) beyond the 512 rows"),
    "negative id": (tokens(x=-1), "token 'x' has the id -1"),
    "id no number": (tokens(x="1"), "token 'x' has the id '1'"),
    "token no text": (tokenizer(added_tokens=[{"id": 510, "content": 5}]), "token 510 is 5, not a text"),
    "empty token": (tokens(**{"": 510}), "token 510 is '', which GGUF cannot hold"),
    "surrogate": (text("x", "") and tokens(**{"\ud800": 510}), "not valid Unicode"),
    "same text": (tokens(**{"[PAD511]": 510}), r"tokens 510 and 511 would both be '\[PAD511\]'"),
    "merges": (model(merges=["a b c"]), "merge 0 is 'a b c', not a pair"),
    "merge of nothing": (model(merges=[["zz", "qq"]]), "'zz' . 'qq', uses a token that is not there"),
    "no merges": (model(merges=[]), "no merges in it"),
    "unknown end": (settings(eos_token="<|nowhere|>"), r"eos_token '<\|nowhere\|>' is not in the vocabulary"),
    "no end": (lambda f: (settings(eos_token=None)(f), config(eos_token_id=None)(f)), "no file names an end token"),
    "end beyond": (lambda f: (settings(eos_token=None)(f), config(eos_token_id=9999)(f)), "eos_token_id 9999 is no id"),
    "odd template": (settings(chat_template=5), "its chat_template is neither a text nor a list"),
    "post-processor": (tokenizer(post_processor={"type": "BertProcessing"}), "post-processor 'BertProcessing' has no"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_converted_is_refused_with_a_line_that_says_why(name: str, folder: Path) -> None:
    change, message = REFUSALS[name]
    if name == "surrogate":  # json writes it as an escape only
        found = (folder / "tokenizer.json").read_text().replace('"vocab":{', '"vocab":{"\\ud800":510,', 1)
        found = found.replace('"vocab": {', '"vocab": {"\\ud800":510,', 1)
        (folder / "tokenizer.json").write_text(found)
    else:
        change(folder)
    with pytest.raises(LoadError, match=message) as caught:
        convert(folder)
    assert "\n" not in str(caught.value)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_names_out_of_files_make_no_message_endless_or_unsafe(folder: Path) -> None:
    weights(lambda found: found.update({"\x1b]0;steer\x07\n" + "x" * 9999: np.ones((2,), np.float32)}))(folder)
    with pytest.raises(LoadError, match=r"no place for this in the architecture LlamaForCausalLM$") as caught:
        convert(folder)
    assert str(caught.value).startswith(r"\x1b]0;steer\x07 xxx") and len(str(caught.value)) < 700


def test_numbers_that_float16_cannot_hold_are_pointed_out_with_a_way_out(folder: Path) -> None:
    weights(lambda found: found["model.embed_tokens.weight"].fill(1e6))(folder)
    output, checkpoint = folder.parent / "out.gguf", open_checkpoint(folder)
    (warning,) = write_gguf(checkpoint, output, outtype="f16", check=False).checks
    assert "warning: model.embed_tokens.weight hold numbers up to 1e+06, and float16" in warning
    assert "infinities may be in the file; use --outtype bf16" in warning
    assert write_gguf(checkpoint, output, outtype="bf16", check=False, force=True).checks == ()


def test_a_window_as_wide_as_the_context_is_no_window(folder: Path) -> None:
    edit_json(folder / "config.json", architectures=["MistralForCausalLM"], max_position_embeddings=4096)
    assert keys(convert(folder))["llama.context_length"] == 4096
    edit_json(folder / "config.json", max_position_embeddings=None)
    with pytest.raises(LoadError, match="sliding_window 4096 in a context of 131072"):
        convert(folder)


def test_there_must_be_a_checkpoint(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path, Path(__file__)):
        with pytest.raises(NotFound):
            open_checkpoint(path)


def test_a_link_out_of_the_folder_is_not_followed(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to("../elsewhere.safetensors")
    with pytest.raises(LoadError, match=r"model\.safetensors: a link out of the checkpoint's folder"):
        open_checkpoint(folder)


def test_a_pipe_is_not_waited_for(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    with pytest.raises(LoadError, match=r"config\.json: not a regular file"):
        open_checkpoint(folder)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HOSTILE: dict[str, tuple[bytes, bytes, str]] = {
    "gap": (json.dumps({"a": {**ENTRY, "data_offsets": [4, 12]}}).encode(), bytes(12), "starts at byte 4"),
    "overlap": (json.dumps({"a": ENTRY, "b": ENTRY}).encode(), bytes(8), "starts at byte 0 of the data, not at 8"),
    "beyond the end": (json.dumps({"a": ENTRY}).encode(), bytes(4), "4 bytes of data, not the 8 of its header"),
    "data left over": (json.dumps({"a": ENTRY}).encode(), bytes(16), "16 bytes of data, not the 8"),
    "wrong length": (json.dumps({"a": {**ENTRY, "shape": [3]}}).encode(), bytes(8), "8 bytes, but F32 .3. takes 12"),
    "backwards": (json.dumps({"a": {**ENTRY, "data_offsets": [8, 0]}}).encode(), bytes(8), "-8 bytes, but F32"),
    "negative": (json.dumps({"a": {**ENTRY, "shape": [-2]}}).encode(), bytes(8), r"\[-2\] is no shape"),
    "true": (json.dumps({"a": {**ENTRY, "shape": [True, 2]}}).encode(), bytes(8), r"\[True, 2\] is no shape"),
    "fraction": (json.dumps({"a": {**ENTRY, "data_offsets": [0, 8.0]}}).encode(), bytes(8), "are no offsets"),
    "five dimensions": (json.dumps({"a": {**ENTRY, "shape": [1, 1, 1, 1, 2]}}).encode(), bytes(8), "is no shape"),
    "enormous": (json.dumps({"a": {**ENTRY, "shape": [2**40]}}).encode(), bytes(8), "is no shape"),
    "unknown type": (json.dumps({"a": {**ENTRY, "dtype": "F31"}}).encode(), bytes(8), "unknown type 'F31'"),
    "no description": (b'{"a": 1}', b"", "the header has no description"),
    "name twice": (b'{"a": 1, "a": 2}', b"", "the key 'a' stands twice"),
    "not json": (b"pickle", b"", "not valid JSON"),
    "not utf-8": (b"\xff\xfe", b"", "not a safetensors file"),
    "deep": (b'{"a":' * 100_000, b"", "nested too deeply"),
    "100,001 tensors": (
        json.dumps({str(n): {**ENTRY, "data_offsets": [8 * n, 8 * n + 8]} for n in range(100_001)}).encode(),
        bytes(8 * 100_001),
        "100,001 tensors, more than any model has",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_refused(name: str, folder: Path) -> None:
    header, data, message = HOSTILE[name]
    write_container(folder / "model.safetensors", header, data)
    with pytest.raises(LoadError, match=message):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "data", [b"", b"\x08", b"\xff" * 8, (2**63).to_bytes(8, "little"), bytes(8), b"\x09" + bytes(8)]
)
def test_a_header_cut_short_is_refused(data: bytes, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(LoadError):
        open_checkpoint(folder)


def test_random_damage_never_leads_to_anything_but_a_convert_error(folder: Path) -> None:
    draw = random.Random(7)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        whole = (folder / name).read_bytes()
        for _ in range(60):
            data, place = bytearray(whole), draw.randrange(min(len(whole), 3000))
            data[place : place + draw.choice((0, 1, 4))] = draw.randbytes(draw.choice((0, 1, 3)))
            (folder / name).write_bytes(data)
            try:
                convert(folder)
            except LoadError as error:
                assert "\n" not in str(error)
        (folder / name).write_bytes(whole)
    convert(folder)


# -- all or nothing ---------------------------------------------------------------------------------------------------


def test_an_output_that_exists_is_replaced_only_on_demand(folder: Path) -> None:
    output, checkpoint = folder.parent / "out.gguf", open_checkpoint(folder)
    output.write_text("precious")
    with pytest.raises(UsageError, match=r"out\.gguf: exists already"):
        write_gguf(checkpoint, output)
    assert output.read_text() == "precious"
    write_gguf(checkpoint, output, force=True)
    assert output.read_bytes()[:4] == b"GGUF"


def test_an_output_that_cannot_be_is_refused_at_once(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    for output, message in (
        (folder, "a folder; name a file in it"),
        (folder.parent / "no" / "out.gguf", "no such folder"),
        (Path("/dev/null"), "not a regular file"),
        (folder / "config.json", "one of the checkpoint's own files"),
        (folder / ("x" * 260 + ".gguf"), "File name too long"),
    ):
        with pytest.raises(CannotWrite, match=message):
            write_gguf(checkpoint, output, force=True)
    with pytest.raises(UsageError, match="outtype 'q2' is not one of f32, f16, bf16, q8_0"):
        write_gguf(checkpoint, folder.parent / "out.gguf", outtype="q2")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), LoadError("stop"), ZeroDivisionError()])
def test_an_interruption_leaves_nothing_behind(error: BaseException, folder: Path) -> None:
    output = folder.parent / "out.gguf"

    def stop(name: str, done: int, total: int) -> None:
        if done > total / 2:
            raise error

    with pytest.raises(type(error)):
        write_gguf(open_checkpoint(folder), output, progress=stop)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


KILLED = """
import os, signal, sys
from pathlib import Path
import metaalign_edge
from metaalign_edge_convert import open_checkpoint, write_gguf

def kill(name, done, total):
    if done > total / 2:
        os.kill(os.getpid(), signal.SIGKILL)

write_gguf(open_checkpoint(Path(sys.argv[1])), Path(sys.argv[2]), check=False, progress=kill)
"""


def test_a_killed_conversion_leaves_no_file_and_the_next_one_starts_clean(folder: Path) -> None:
    output = folder.parent / "out.gguf"
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(output)], check=False)
        assert done.returncode == -signal.SIGKILL
        assert not output.exists()
    write_gguf(open_checkpoint(folder), output)
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, "out.gguf"}
    assert output.read_bytes() == convert(folder, "q8_0").read_bytes()


FULL = """
import resource, sys
from pathlib import Path
import metaalign_edge
from metaalign_edge_convert import open_checkpoint, write_gguf
from metaalign_edge_runtime.errors import CannotWrite

resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write_gguf(open_checkpoint(Path(sys.argv[1])), Path(sys.argv[2]), check=False)
except CannotWrite as error:
    print(error)
"""


def test_a_write_that_fails_half_way_is_reported_and_cleared_away(folder: Path) -> None:
    command = [sys.executable, "-c", FULL, str(folder), str(folder.parent / "out.gguf")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "out.gguf: cannot be written (File too large)" in done.stdout
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_model_larger_than_the_disk_is_refused_before_anything_is_written(folder: Path) -> None:
    ff = 2**31 - 1
    edit_json(folder / "config.json", intermediate_size=ff)
    header, end = {}, 0
    for name, values in random_weights(CONFIG).items():
        shape = [ff if size == CONFIG["intermediate_size"] else size for size in values.shape]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end := end + 4 * int(np.prod(shape))]}
    write_container(folder / "model.safetensors", json.dumps(header).encode(), b"")
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size + end)
    with pytest.raises(CannotWrite, match=r"3,298,\d+ MB are needed, and [\d,]+ MB are free"):
        convert(folder)


def test_two_conversions_to_the_same_file_do_not_meet(folder: Path) -> None:
    output, checkpoint = folder.parent / "out.gguf", open_checkpoint(folder)

    def again(name: str, done: int, total: int) -> None:
        with pytest.raises(CannotWrite, match="another conversion is writing it"):
            write_gguf(checkpoint, output, check=False)

    write_gguf(checkpoint, output, progress=again)
    assert output.read_bytes() == convert(folder, "q8_0").read_bytes()


def test_a_file_has_the_permissions_that_any_new_file_has(folder: Path) -> None:
    path, plain = convert(folder), folder.parent / "plain"
    plain.touch()
    assert path.stat().st_mode == plain.stat().st_mode
