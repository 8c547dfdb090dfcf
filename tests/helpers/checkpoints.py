"""Tiny random Llama checkpoints with a vocabulary of their own, made without torch."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

CORPUS = """The quick brown fox jumps over the lazy dog. It's what they'd say, isn't it? 12 345 6789 and so on.
A zookeeper's day: feed the lions, count 1, 2, 3 penguins, write it down. Répétez s'il vous plaît. Привет, мир. 你好。
def answer(question): return "forty-two" if question else None  # why not?
"""
MARKERS = ("<|endoftext|>", "<|system_info|>", "<|user_info|>", "<|user|>", "<|assistant|>", "<|end|>")
ROWS = 512
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": ROWS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
TEMPLATE = "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def make_checkpoint(folder: Path, *, dtype: str = "F32", shards: int = 1, seed: int = 0, **changes: Any) -> Path:
    """Write a whole checkpoint into ``folder``; ``changes`` go into config.json. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, **changes}
    write_json(folder / "config.json", config)
    write_weights(folder, random_weights(config, seed), dtype, shards)
    write_tokenizer(folder)
    return folder


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON."""
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def edit_json(path: Path, **changes: Any) -> None:
    """Change some keys of a JSON object on disk; None removes a key."""
    value = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    write_json(path, {key: item for key, item in value.items() if item is not None})


def random_weights(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Draw float32 weights that bfloat16 and float16 hold exactly, so that every dtype stores the same model."""
    hidden, ff, rows = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or hidden // heads
    q, kv = heads * size, (config.get("num_key_value_heads") or heads) * size
    layer = {
        "input_layernorm.weight": (hidden,),
        "mlp.down_proj.weight": (hidden, ff),
        "mlp.gate_proj.weight": (ff, hidden),
        "mlp.up_proj.weight": (ff, hidden),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, q),
        "self_attn.q_proj.weight": (q, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
    }
    if config.get("attention_bias"):
        layer |= {f"self_attn.{part}_proj.bias": (kv if part in "kv" else hidden,) for part in "kov"}
        layer["self_attn.q_proj.bias"] = (q,)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, hidden), "model.norm.weight": (hidden,)}
    for number in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (rows, hidden)
    return draw_weights(shapes, seed)


def draw_weights(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """Draw float32 weights of these shapes that bfloat16 and float16 hold exactly."""
    draw = np.random.default_rng(seed)
    weights = {}
    for name, shape in shapes.items():
        values = draw.normal(0, 0.1, shape).astype(np.float32)
        values = values + 1 if "norm" in name else values
        values = (np.round(values * 2**10) / 2**10).astype(np.float32)  # no exponent that float16 lacks
        weights[name] = (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)  # cut to bfloat16
    return weights


def stored(values: np.ndarray, dtype: str) -> bytes:
    """Return float32 ``values`` as the bytes of ``dtype``: F32, F16 or BF16."""
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return values.astype({"F32": "<f4", "F16": "<f2"}[dtype]).tobytes()


def write_safetensors(path: Path, weights: dict[str, np.ndarray], dtype: str) -> None:
    """Write one safetensors file. By hand, for numpy has no bfloat16."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = bytearray()
    for name, values in weights.items():
        part = stored(values, dtype)
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [len(data), len(data) + len(part)]}
        data += part
    write_container(path, json.dumps(header).encode(), bytes(data))


def write_container(path: Path, header: bytes, data: bytes) -> None:
    """Write a safetensors file out of any header and any data, right or wrong."""
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def write_weights(folder: Path, weights: dict[str, np.ndarray], dtype: str = "F32", shards: int = 1) -> None:
    """Write ``weights`` as one safetensors file, or as several and their index."""
    if shards == 1:
        write_safetensors(folder / "model.safetensors", weights, dtype)
        return
    weight_map = {}
    for number in range(shards):
        shard = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: weights[name] for name in sorted(weights)[number::shards]}
        write_safetensors(folder / shard, part, dtype)
        weight_map |= dict.fromkeys(part, shard)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def write_tokenizer(
    folder: Path,
    pre_tokenizer: dict[str, Any] = BYTE_LEVEL,
    corpus: tuple[str, ...] = (CORPUS,) * 4,
    rows: int = ROWS,
    **model: Any,
) -> None:
    """Write a byte-level BPE tokenizer with the tier tokens; ``model`` changes keys of its model."""
    tokenizer = json.loads(_train(json.dumps(pre_tokenizer), corpus, rows))
    tokenizer["model"] |= model
    write_json(folder / "tokenizer.json", tokenizer)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", settings)


@cache
def _train(pre_tokenizer: str, corpus: tuple[str, ...], rows: int) -> str:
    tokenizer = Tokenizer(models.BPE())
    shell = json.loads(tokenizer.to_str()) | {"pre_tokenizer": json.loads(pre_tokenizer)}
    tokenizer = Tokenizer.from_str(json.dumps(shell))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=rows - 8,  # the rest of the rows are holes
        special_tokens=list(MARKERS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return str(tokenizer.to_str())
