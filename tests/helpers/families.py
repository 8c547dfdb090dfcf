"""A tiny random checkpoint for every class that `convert` knows, in the ways in which transformers 4 and 5 save it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from helpers.checkpoints import CONFIG, ROWS, draw_weights, edit_json, write_json, write_tokenizer, write_weights
from helpers.vocabularies import GEMMA as GEMMA_STYLE
from helpers.vocabularies import LEGACY, model_proto, pieces, write_sentencepiece
from metaalign_edge_convert import OUTTYPES, open_checkpoint, write_gguf
from metaalign_edge_convert.architectures import find

Json = dict[str, Any]
LOCAL = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GELU = {"hidden_act": None, "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}
GEMMA = {**GELU, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 64, "num_hidden_layers": 6}
FACTORS = {"long_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5], "short_factor": [1.0, 1.0, 1.1, 1.1, 1.2, 1.2]}
# class -> the model_type, and what differs from CONFIG; the keys are those of transformers 5
FAMILIES: dict[str, tuple[str, Json]] = {
    "LlamaForCausalLM": ("llama", {"rope_parameters": LLAMA3, "head_dim": 32}),
    "MistralForCausalLM": ("mistral", {"sliding_window": None}),
    "SmolLM3ForCausalLM": ("smollm3", {"head_dim": None, "num_hidden_layers": 4, "tie_word_embeddings": True}),
    "GraniteForCausalLM": (
        "granite",
        {
            "head_dim": None,
            "attention_multiplier": 0.25,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
        },
    ),
    "Qwen2ForCausalLM": ("qwen2", {"head_dim": None}),
    "Qwen3ForCausalLM": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "GemmaForCausalLM": ("gemma", {**GEMMA, "query_pre_attn_scalar": None, "sliding_window": None}),
    "Gemma2ForCausalLM": (
        "gemma2",
        {**GEMMA, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "num_hidden_layers": 4},
    ),
    "Gemma3ForCausalLM": (
        "gemma3_text",
        {
            **GEMMA,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
                "sliding_attention": LOCAL,
            },
        },
    ),
    "Phi3ForCausalLM": (
        "phi3",
        {
            "head_dim": None,
            "max_position_embeddings": 1024,
            "original_max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
                "original_max_position_embeddings": 256,
                **FACTORS,
            },
        },
    ),
    "Olmo2ForCausalLM": ("olmo2", {"head_dim": None}),
    "Olmo3ForCausalLM": (
        "olmo3",
        {
            "head_dim": None,
            "num_hidden_layers": 5,
            "sliding_window": 64,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "yarn",
                    "rope_theta": 500000.0,
                    "factor": 8.0,
                    "original_max_position_embeddings": 64,
                    "attention_factor": 1.2079441541679836,
                    "beta_fast": 32.0,
                    "beta_slow": 1.0,
                },
                "sliding_attention": {**LOCAL, "rope_theta": 500000.0},
            },
        },
    ),
    "StableLmForCausalLM": (
        "stablelm",
        {
            "head_dim": None,
            "rms_norm_eps": None,
            "layer_norm_eps": 1e-5,
            "use_qkv_bias": True,
            "rope_parameters": {**LOCAL, "partial_rotary_factor": 0.25},
        },
    ),
    "InternLM2ForCausalLM": ("internlm2", {"head_dim": None}),
    "InternLM3ForCausalLM": ("internlm3", {"head_dim": 32, "qkv_bias": False, "bias": False}),
}
GOLDEN = Path(__file__).with_name("golden.json")  # digests; tests/parity says that they are the reference's
SENTENCEPIECE = ("Gemma", "Phi3", "InternLM")  # how the classes begin that have such vocabularies
NOT_IN_TRANSFORMERS = ("InternLM2ForCausalLM", "InternLM3ForCausalLM")  # their code comes with their weights


def configuration(name: str, **changes: Any) -> Json:
    """Return a tiny config.json of the class ``name``, as transformers 5 writes it."""
    kind, differences = FAMILIES[name]
    ids = {"pad_token_id": 0, **({"bos_token_id": 1, "eos_token_id": 2} if name.startswith(SENTENCEPIECE) else {})}
    config = {**CONFIG, "architectures": [name], "model_type": kind, **ids, **differences, **changes}
    return {key: value for key, value in config.items() if value is not None or key == "sliding_window"}


def older(config: Json) -> Json:
    """Return the same configuration as transformers 4 wrote it: RoPE in keys of its own."""
    given = config["rope_parameters"]
    rope = dict(given.get("full_attention", given))
    found = {key: value for key, value in config.items() if key != "rope_parameters"}
    found |= {"torch_dtype": "float32", "rope_theta": rope.pop("rope_theta")}
    if "sliding_attention" in given:
        found["rope_local_base_freq"] = given["sliding_attention"]["rope_theta"]
    if "partial_rotary_factor" in rope:
        found["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    if config["model_type"] == "phi3":  # it alone kept this key at the top
        found["original_max_position_embeddings"] = rope.pop("original_max_position_embeddings")
    if rope["rope_type"] != "default":
        found["rope_scaling"] = rope
    return found


def weights(config: Json, seed: int = 0) -> dict[str, np.ndarray]:
    """Draw the weights that a checkpoint with this configuration holds."""
    piece, read, _ = find(config)
    return draw_weights({name: shape for name, (_, shape) in piece.expected(read).items()}, seed)


def make_family(folder: Path, name: str, *, dtype: str = "F32", old: bool = True, **changes: Any) -> Path:
    """Write a checkpoint of the class ``name``: in one file, as transformers 4 did, or as 5 does, in shards."""
    config = configuration(name, **changes)
    folder.mkdir(parents=True)
    write_json(folder / "config.json", older(config) if old else config)
    write_weights(folder, weights(config), dtype, shards=1 if old else 3)
    give_tokenizer(folder, name)
    return folder


def give_tokenizer(folder: Path, name: str) -> None:
    """Write a tokenizer of the kind that the class ``name`` has."""
    if not name.startswith(SENTENCEPIECE):
        write_tokenizer(folder)
        return
    write_sentencepiece(folder, style=GEMMA_STYLE if name.startswith("Gemma") else LEGACY)
    if name.startswith("InternLM2"):  # every row has a piece, and those without a use say so
        kept = [(f"[UNUSED_TOKEN_{number}]", 0.0, 1) for number in range(ROWS - len(pieces()))]
        (folder / "tokenizer.model").write_bytes(model_proto([*pieces(), *kept]))
    edit_json(folder / "tokenizer_config.json", add_bos_token=True, add_eos_token=False)


def digest(path: Path) -> str:
    """Return what tells one file from another."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def golden_folders(root: Path, name: str) -> Iterator[Path]:
    """Make the checkpoints of the class ``name`` whose conversions are known: every dtype, saved in both ways."""
    for dtype in ("F32", "F16", "BF16"):
        for old in (True, False):
            yield make_family(root / f"tiny-{'old' if old else 'new'}-{dtype}", name, dtype=dtype, old=old)


def golden_digests(root: Path, name: str) -> dict[str, str]:
    """Convert the golden checkpoints of the class ``name`` to every type; return the digests."""
    found = {}
    for folder in golden_folders(root, name):
        checkpoint = open_checkpoint(folder)
        for outtype in OUTTYPES:
            output = folder.parent / f"{folder.name}-{outtype}.gguf"
            write_gguf(checkpoint, output, outtype=outtype, check=False)
            found[f"{folder.name}-{outtype}"] = digest(output)
    return found
