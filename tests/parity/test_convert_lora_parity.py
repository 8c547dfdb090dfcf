"""LoRA against the programs it must agree with: PEFT, which trains the adapters, and llama.cpp's own converter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from helpers.checkpoints import CONFIG, ROWS, edit_json, make_checkpoint
from peft import LoraConfig, PeftModel, get_peft_model
from test_convert_lora import IDS, logits
from test_convert_parity import assert_same_bytes
from transformers import AutoModelForCausalLM

from metaalign_edge_convert import merge, open_adapter, open_checkpoint, write_adapter, write_gguf

if TYPE_CHECKING:
    from conftest import Reference

Json = dict[str, Any]
DRIVER = """
import json, runpy, sys
script = sys.argv[1] + "/convert_lora_to_gguf.py"
sys.path.insert(0, sys.argv[1])
for arguments in json.load(sys.stdin):
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
"""
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base_model(folder: Path) -> Any:
    """Load a checkpoint in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def train(folder: Path, lora: Path, seed: int = 0, **changes: Any) -> Path:
    """Make an adapter with PEFT, move everything that can be trained somewhere else, and save it."""
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **changes}
    model = get_peft_model(base_model(folder), LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                away = torch.randn_like(parameter) * 0.1
                parameter.copy_(away if "lora_A" in name or "lora_B" in name else parameter + away)
    model.save_pretrained(lora)
    return lora


def peft_logits(folder: Path, lora: Path, merged: bool) -> np.ndarray:
    """Ask PEFT for the logits of every position, with the adapter beside the weights, as trained, or merged."""
    model = PeftModel.from_pretrained(base_model(folder), lora).eval()
    model = model.merge_and_unload() if merged else model
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].numpy()


def convert_merged(folder: Path, *loras: tuple[Path, float]) -> Path:
    """Merge with our own converter, into a float32 GGUF."""
    checkpoint = open_checkpoint(folder)
    output = folder.parent / "merged.gguf"
    adapters = [open_adapter(lora, checkpoint, scale) for lora, scale in loras]
    write_gguf(merge(checkpoint, adapters), output, outtype="f32", force=True, check=False)
    return output


def saved_by_peft(folder: Path, model: Any) -> Path:
    """Save a merged model as a checkpoint, and convert that."""
    other = folder.parent / "by-peft"
    model.save_pretrained(other)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (other / name).write_bytes((folder / name).read_bytes())
    output = folder.parent / "by-peft.gguf"
    write_gguf(open_checkpoint(other), output, outtype="f32", force=True, check=False)
    return output


def close(ours: np.ndarray, theirs: np.ndarray, limit: float) -> None:
    """Compare logits."""
    assert np.abs(ours - theirs).max() < limit
    assert (ours.argmax(1) == theirs.argmax(1)).all()


VARIANTS: dict[str, Json] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"k_proj": 8, r"layers\.1\..*_proj": 2},
        "alpha_pattern": {"model.layers.0.mlp.down_proj": 3, "q_proj": 16},
    },
    "rslora-patterns": {
        "use_rslora": True,
        "rank_pattern": {"v_proj": 9},
        "alpha_pattern": {"v_proj": 5, "up_proj": 2},
    },
    "fan-in-fan-out": {"fan_in_fan_out": True},
    "gaussian-layers": {"init_lora_weights": "gaussian", "layers_to_transform": [1], "target_modules": ["q_proj"]},
    "embedding-and-head": {"target_modules": ["embed_tokens", "q_proj", "lm_head"]},
    "exclude": {"target_modules": "all-linear", "exclude_modules": ["k_proj"]},
}
MERGED_ONLY: dict[str, tuple[Json, Json]] = {  # what llama.cpp's adapters cannot express; settings, config.json
    "dora": ({"use_dora": True}, {}),
    "dora-rslora": ({"use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 7}}, {}),
    "modules-to-save": ({"modules_to_save": ["lm_head", "embed_tokens"]}, {}),
    "norms-to-save": ({"modules_to_save": ["norm", "input_layernorm"]}, {}),
    "all-biases": ({"bias": "all"}, {"attention_bias": True}),
    "lora-biases": ({"bias": "lora_only", "target_modules": ["q_proj", "o_proj"]}, {"attention_bias": True}),
    "tokens": ({"trainable_token_indices": {"embed_tokens": [6, 77], "lm_head": [5]}}, {}),
    "lora-bias": ({"lora_bias": True, "target_modules": ["q_proj", "v_proj"]}, {"attention_bias": True}),
}
TIED: dict[str, Json] = {
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "both-tied": {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "embedding-saved": {"modules_to_save": ["embed_tokens"]},
    "tokens": {"trainable_token_indices": [77, 6, 300]},
    "tokens-of-both": {"trainable_token_indices": {"embed_tokens": [6], "lm_head": [5, 7]}},
    "tokens-tied": {"trainable_token_indices": [77, 6], "ensure_weight_tying": True},
    "both-saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "both-saved-tied": {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_laid_over_and_peft_s_own_merge_agree(variant: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "tiny", dtype="BF16")
    lora = train(folder, tmp_path / "lora", **VARIANTS[variant])
    if variant == "fan-in-fan-out":  # saved as false, for PEFT found it to be wrong here; older versions did not
        edit_json(lora / "adapter_config.json", fan_in_fan_out=True)
    checkpoint = open_checkpoint(folder)
    write_gguf(checkpoint, tmp_path / "base.gguf", outtype="f32", check=False)
    write_adapter(checkpoint, open_adapter(lora, checkpoint), tmp_path / "lora.gguf")
    merged = logits(convert_merged(folder, (lora, 1.0)))
    close(logits(tmp_path / "base.gguf", tmp_path / "lora.gguf"), merged, 1e-5)
    close(
        merged,
        logits(saved_by_peft(folder, PeftModel.from_pretrained(base_model(folder), lora).merge_and_unload())),
        1e-5,
    )
    close(merged, peft_logits(folder, lora, merged=True), 1e-4)
    assert np.abs(merged - logits(tmp_path / "base.gguf")).max() > 0.05


@pytest.mark.parametrize("variant", MERGED_ONLY)
def test_what_only_merging_can_express_is_what_peft_merges(variant: str, tmp_path: Path) -> None:
    settings, config = MERGED_ONLY[variant]
    folder = make_checkpoint(tmp_path / "tiny", **config)
    lora = train(folder, tmp_path / "lora", **settings)
    merged = logits(convert_merged(folder, (lora, 1.0)))
    close(merged, peft_logits(folder, lora, merged=True), 1e-4)
    close(merged, peft_logits(folder, lora, merged=False), 1e-4)


@pytest.mark.parametrize("variant", TIED)
def test_a_tied_model_becomes_what_was_trained(variant: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "tiny", tie_word_embeddings=True)
    lora = train(folder, tmp_path / "lora", **TIED[variant])
    # unmerged, for PEFT's merging would write the one's change into the other too
    close(logits(convert_merged(folder, (lora, 1.0))), peft_logits(folder, lora, merged=False), 1e-4)


@pytest.mark.parametrize("settings", [{}, {"trainable_token_indices": [ROWS, 6]}], ids=["all-rows", "some-rows"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_vocabulary_that_grew_is_what_peft_merges(tied: bool, settings: Json, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "tiny", tie_word_embeddings=tied)
    model = base_model(folder)
    model.resize_token_embeddings(ROWS + 4)
    settings = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False, **settings}
    saved = get_peft_model(model, LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in saved.named_parameters():
            if "trainable_tokens" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    saved.save_pretrained(tmp_path / "lora")  # with the embeddings, for they have another size than the base model's
    found = logits(convert_merged(folder, (tmp_path / "lora", 1.0)))
    assert found.shape[1] == ROWS + 4
    with torch.no_grad():
        close(found, saved.eval()(torch.tensor([IDS])).logits[0].numpy(), 1e-4)


def test_several_adapters_with_scales_are_what_peft_adds_up(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "tiny", dtype="F16")
    one = train(folder, tmp_path / "one")
    two = train(folder, tmp_path / "two", seed=1, target_modules=["q_proj", "down_proj"], use_rslora=True)
    model = PeftModel.from_pretrained(base_model(folder), one, adapter_name="one")
    model.load_adapter(two, adapter_name="two")
    for module in model.modules():
        for name, scale in (("one", 0.5), ("two", -1.5)):
            if hasattr(module, "set_scale") and name in getattr(module, "scaling", {}):
                module.set_scale(name, scale)
    wanted = saved_by_peft(folder, model.merge_and_unload(adapter_names=["one", "two"]))
    close(logits(convert_merged(folder, (one, 0.5), (two, -1.5))), logits(wanted), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_merge_in_half_precision_is_closer_to_float32_than_peft_s(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "tiny", dtype="BF16")
    lora = train(folder, tmp_path / "lora")
    exact = peft_logits(folder, lora, merged=True)
    rounded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
    theirs = PeftModel.from_pretrained(rounded, lora).merge_and_unload().float()
    with torch.no_grad():
        error = np.abs(theirs(torch.tensor([IDS])).logits[0].numpy() - exact).max()
    assert np.abs(logits(convert_merged(folder, (lora, 1.0))) - exact).max() < error


# -- the adapter's file -----------------------------------------------------------------------------------------------


PLAIN: dict[str, tuple[str, Json]] = {  # name of the folder -> outtype, settings
    "tiny-chat-lora": ("f32", {}),
    "ranks": ("f32", {"rank_pattern": {"k_proj": 8}}),  # each B carries its own
    "embedding-and-head": ("f32", {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
    "activated": ("f32", {"alora_invocation_tokens": [3, 77]}),
    "lora-v2.1-8b": ("f16", {}),
    "brief": ("bf16", {}),
    "Blocks-Of-32": ("q8_0", {"r": 32}),
    "no-blocks": ("q8_0", {}),
}


def test_an_adapter_s_file_is_the_reference_converter_s_byte_for_byte(reference: Reference, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "tiny", dtype="BF16")
    jobs = []
    for name, (outtype, settings) in PLAIN.items():
        lora = train(folder, tmp_path / name, **settings)
        # PEFT's own card names the base model by its path here, which we leave out
        (lora / "README.md").write_text(
            "---\nlicense: mit\nbase_model: someone/tiny\ntags:\n- lora\n---\n# An adapter\n"
        )
        theirs = f"{lora}.theirs.gguf"
        jobs.append([str(lora), "--base", str(folder), "--outfile", theirs, "--outtype", outtype])
    command = [sys.executable, "-c", DRIVER, str(reference.llama_cpp)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, input=json.dumps(jobs), text=True, capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    checkpoint = open_checkpoint(folder)
    for name, (outtype, _) in PLAIN.items():
        ours = tmp_path / f"{name}.ours.gguf"
        write_adapter(checkpoint, open_adapter(tmp_path / name, checkpoint), ours, outtype=outtype)
        assert_same_bytes(ours, tmp_path / f"{name}.theirs.gguf")


def test_the_readme_that_peft_writes_does_not_take_the_disk_s_folders_along(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "tiny")
    lora = train(folder, tmp_path / "lora")
    assert str(tmp_path) in (lora / "README.md").read_text()
    assert json.loads((lora / "adapter_config.json").read_text())["base_model_name_or_path"] == str(folder)
    checkpoint = open_checkpoint(folder)
    write_adapter(checkpoint, open_adapter(lora, checkpoint), tmp_path / "lora.gguf")
    content = (tmp_path / "lora.gguf").read_bytes()
    assert str(tmp_path.name).encode() not in content
    assert CONFIG["model_type"].encode() in content
