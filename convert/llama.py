"""Llama, and Mistral, which is the same graph with other defaults."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from .architectures import (
    FILE_TYPE,
    Architecture,
    Computed,
    Key,
    Pair,
    Rule,
    Transform,
    refuse_activation,
    refuse_experts,
    refuse_quantized,
    refuse_window,
    register,
)
from .config import Config
from .errors import ConvertError
from .shards import Array
from .vocabulary import VocabularyRules


def sizes(config: Config) -> dict[str, int]:
    """Return the sizes that the shapes below are written in."""
    heads, kv_heads = config.integer("num_attention_heads"), kv_head_count(config)
    if heads % kv_heads:
        raise ConvertError(f"config.json: {heads} heads cannot share {kv_heads} key-value heads evenly")
    return {
        "layers": config.integer("num_hidden_layers", high=1024),
        "vocab": config.integer("vocab_size", high=2**24),
        "hidden": config.integer("hidden_size"),
        "ff": config.integer("intermediate_size"),
        "q": heads * config.head_dim,
        "kv": kv_heads * config.head_dim,
    }


def kv_head_count(config: Config) -> int:
    """Return the number of key-value heads; without one, every head has its own."""
    return config.integer("num_key_value_heads", "num_attention_heads")


def pair_up(heads: int, rows: int) -> Transform:
    """Reorder each head's rows from two halves (transformers) to pairs (llama.cpp's RoPE for this architecture)."""
    size = rows // heads

    def apply(chunk: Array) -> Array:
        rest = chunk.shape[1:]
        paired: Array = chunk.reshape(-1, 2, size // 2, *rest).swapaxes(1, 2).reshape(chunk.shape)
        return paired

    return Transform(size, apply)


def turn_queries(config: Config, rows: int) -> Transform:
    """Pair up the rows of a query projection."""
    return pair_up(config.integer("num_attention_heads"), rows)


def turn_keys(config: Config, rows: int) -> Transform:
    """Pair up the rows of a key projection."""
    return pair_up(kv_head_count(config), rows)


def rope_scaling(config: Config) -> Iterable[Pair]:
    """Write what stretches RoPE; llama3 is a tensor instead, and the default is silence."""
    rope = config.rope
    if rope.kind not in ("linear", "yarn"):
        return
    yield "rope.scaling.type", rope.kind
    names = {  # in the order of writing
        "factor": "factor",
        "original_max_position_embeddings": "original_context_length",
        "extrapolation_factor": "yarn_ext_factor",
        "attention_factor": "yarn_attn_factor",
        "beta_fast": "yarn_beta_fast",
        "beta_slow": "yarn_beta_slow",
    }
    for source, name in names.items():
        if source in rope.parameters:
            value = rope.parameters[source]
            yield f"rope.scaling.{name}", int(value) if name == "original_context_length" else float(value)


def rope_frequencies(config: Config) -> Iterable[tuple[str, Array]]:
    """Make the tensor of divisors by which Llama 3.1 stretches its low frequencies.

    High frequencies stay (1), low ones are divided by the factor, and those between are blended. In float32 and as
    reciprocals times a number, as torch does it, so that the bits agree; its power is a correctly rounded one.
    """
    rope = config.rope
    if rope.kind != "llama3":
        return
    size, factor = config.head_dim, rope.parameters["factor"]
    low, high = rope.parameters["low_freq_factor"], rope.parameters["high_freq_factor"]
    context = rope.parameters["original_max_position_embeddings"]
    if low == high:
        raise ConvertError("config.json: low_freq_factor equals high_freq_factor, which leaves nothing to blend")
    one = np.float32(1)
    exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    frequency = one / (np.float64(rope.theta) ** exponents.astype(np.float64)).astype(np.float32)
    wavelength = one / frequency * np.float32(2 * math.pi)
    smooth = (one / wavelength * np.float32(context) - np.float32(low)) / np.float32(high - low)
    blended = one / ((one - smooth) / np.float32(factor) + smooth)
    divisors = np.where(wavelength > context / low, np.float32(factor), blended)
    yield "rope_freqs.weight", np.where(wavelength < context / high, one, divisors).astype(np.float32)


def attention_bias(config: Config) -> bool:
    """Say whether the attention's projections have biases."""
    return config.flag("attention_bias")


def mlp_bias(config: Config) -> bool:
    """Say whether the feed-forward projections have biases."""
    return config.flag("mlp_bias")


def own_head(config: Config) -> bool:
    """Say whether the output head has weights of its own, not those of the embedding."""
    return not config.flag("tie_word_embeddings")


LAYER = "model.layers.{}."
# The rows of Code Llama with infilling, and of Granite and SmolLM; llama.cpp's converter knows them by these numbers.
RULES = VocabularyRules(space_prefix="settings first", eot_by_rows={32016: 32010}, no_bos_rows=frozenset({49152}))

LLAMA = register(
    Architecture(
        name="llama",
        classes={
            "LlamaForCausalLM": {
                "rms_norm_eps": 1e-6,
                "max_position_embeddings": 2048,
                "hidden_act": "silu",
                "rope_theta": 10000.0,
            },
            "MistralForCausalLM": {
                "rms_norm_eps": 1e-6,
                "max_position_embeddings": 131072,
                "hidden_act": "silu",
                "rope_theta": 10000.0,
                "num_key_value_heads": 8,
                "sliding_window": 4096,
            },
        },
        keys=(
            Key("block_count", "u32", ("num_hidden_layers",)),
            Key("context_length", "u32", ("max_position_embeddings",)),
            Key("embedding_length", "u32", ("hidden_size",)),
            Key("feed_forward_length", "u32", ("intermediate_size",)),
            Key("attention.head_count", "u32", ("num_attention_heads",)),
            Key("attention.head_count_kv", "u32", ("num_key_value_heads", "num_attention_heads")),
            Computed(rope_scaling),
            Computed(lambda config: [("rope.freq_base", float(config.rope.theta))]),
            Key("attention.layer_norm_rms_epsilon", "f32", ("rms_norm_eps",)),
            Computed(lambda config: [("attention.key_length", config.head_dim)]),
            Computed(lambda config: [("attention.value_length", config.head_dim)]),
            FILE_TYPE,
            Key("vocab_size", "u32", ("vocab_size",)),
            Computed(lambda config: [("rope.dimension_count", config.head_dim)]),
        ),
        tensors=(
            Rule("model.embed_tokens.weight", ("vocab", "hidden")),
            Rule(LAYER + "input_layernorm.weight", ("hidden",)),
            Rule(LAYER + "self_attn.q_proj.weight", ("q", "hidden"), transform=turn_queries),
            Rule(LAYER + "self_attn.k_proj.weight", ("kv", "hidden"), transform=turn_keys),
            Rule(LAYER + "self_attn.v_proj.weight", ("kv", "hidden")),
            Rule(LAYER + "self_attn.o_proj.weight", ("hidden", "q")),
            Rule(LAYER + "self_attn.q_proj.bias", ("q",), attention_bias, turn_queries),
            Rule(LAYER + "self_attn.k_proj.bias", ("kv",), attention_bias, turn_keys),
            Rule(LAYER + "self_attn.v_proj.bias", ("kv",), attention_bias),
            Rule(LAYER + "self_attn.o_proj.bias", ("hidden",), attention_bias),
            Rule(LAYER + "post_attention_layernorm.weight", ("hidden",)),
            Rule(LAYER + "mlp.gate_proj.weight", ("ff", "hidden")),
            Rule(LAYER + "mlp.up_proj.weight", ("ff", "hidden")),
            Rule(LAYER + "mlp.down_proj.weight", ("hidden", "ff")),
            Rule(LAYER + "mlp.gate_proj.bias", ("ff",), mlp_bias),
            Rule(LAYER + "mlp.up_proj.bias", ("ff",), mlp_bias),
            Rule(LAYER + "mlp.down_proj.bias", ("hidden",), mlp_bias),
            Rule("model.norm.weight", ("hidden",)),
            Rule("lm_head.weight", ("vocab", "hidden"), own_head),
        ),
        sizes=sizes,
        guards=(refuse_quantized, refuse_experts, refuse_activation("silu", "swish"), refuse_window),
        extra=rope_frequencies,
        vocabulary=RULES,
    )
)
