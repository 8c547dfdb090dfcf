"""Building blocks of architectures: sizes, keys, tensors, and RoPE as GGUF stores it.

A piece is put together from them and adds only what is special about the architecture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np

from metaalign_edge_runtime.errors import LoadError

from .architectures import FILE_TYPE, Computed, Key, Make, Pair, Rule, Transform
from .config import Config
from .shards import Array

When = Callable[[Config], bool]

# -- sizes and switches ----------------------------------------------------------------------------------------------


def sizes(config: Config) -> dict[str, int]:
    """Return the sizes that the shapes of the tensors below refer to."""
    heads, kv_heads = config.integer("num_attention_heads"), kv_head_count(config)
    if heads % kv_heads:
        raise LoadError(f"config.json: {heads} heads cannot share {kv_heads} key-value heads evenly")
    return {
        "layers": config.integer("num_hidden_layers", high=1024),
        "vocab": config.integer("vocab_size", high=2**24),
        "hidden": config.integer("hidden_size"),
        "ff": config.integer("intermediate_size"),
        "head": config.head_dim,
        "q": heads * config.head_dim,
        "kv": kv_heads * config.head_dim,
    }


def kv_head_count(config: Config) -> int:
    """Return the number of key-value heads; without one, every head has its own."""
    return config.integer("num_key_value_heads", "num_attention_heads")


def never(config: Config) -> bool:
    """Return False, for a tensor that no model has."""
    return False


def always(config: Config) -> bool:
    """Return True, for a tensor that every model has."""
    return True


def switch(name: str) -> When:
    """Return a function that says whether the switch `name` of config.json is on."""
    return lambda config: config.flag(name)


attention_bias, mlp_bias = switch("attention_bias"), switch("mlp_bias")


def own_head(config: Config) -> bool:
    """Say whether the output head has weights of its own, not those of the embedding."""
    return not config.flag("tie_word_embeddings")


# -- rows in another order --------------------------------------------------------------------------------------------


def pair_up(heads: int, rows: int) -> Transform:
    """Reorder the rows of each head: transformers rotates row i with row i + size/2, llama.cpp with its neighbour."""
    size = rows // heads

    def apply(chunk: Array) -> Array:
        rest = chunk.shape[1:]
        paired: Array = chunk.reshape(-1, 2, size // 2, *rest).swapaxes(1, 2).reshape(chunk.shape)
        return paired

    return Transform(size, apply)


def turn_queries(config: Config, rows: int) -> Transform:
    """Reorder the rows of a query projection; see `pair_up`."""
    return pair_up(config.integer("num_attention_heads"), rows)


def turn_keys(config: Config, rows: int) -> Transform:
    """Reorder the rows of a key projection; see `pair_up`."""
    return pair_up(kv_head_count(config), rows)


def add_one(config: Config, rows: int) -> Transform:
    """Add one to the weights of a norm that multiplies by `1 + weight`, in the type in which they are stored."""
    return Transform(1, lambda chunk: chunk + chunk.dtype.type(1), arithmetic=True)


# -- RoPE -------------------------------------------------------------------------------------------------------------


def rope_scaling(config: Config) -> Iterable[Pair]:
    """Yield the keys that scale RoPE. The kind llama3 is stored as a tensor instead; the default needs no key."""
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
    """Yield the tensor of divisors by which Llama 3.1 scales the frequencies of RoPE.

    High frequencies keep their value (divisor 1), low ones are divided by the factor, those between are interpolated.
    The steps are in float32 and in the order of torch, so that the bits agree; only the power is computed in float64,
    as torch rounds it correctly.
    """
    rope = config.rope
    if rope.kind != "llama3":
        return
    size, factor = config.head_dim, rope.parameters["factor"]
    low, high = rope.parameters["low_freq_factor"], rope.parameters["high_freq_factor"]
    context = rope.parameters["original_max_position_embeddings"]
    if low == high:
        raise LoadError("config.json: low_freq_factor equals high_freq_factor, which leaves nothing to blend")
    one = np.float32(1)
    exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    frequency = one / (np.float64(rope.theta) ** exponents.astype(np.float64)).astype(np.float32)
    wavelength = one / frequency * np.float32(2 * math.pi)
    smooth = (one / wavelength * np.float32(context) - np.float32(low)) / np.float32(high - low)
    blended = one / ((one - smooth) / np.float32(factor) + smooth)
    divisors = np.where(wavelength > context / low, np.float32(factor), blended)
    yield "rope_freqs.weight", np.where(wavelength < context / high, one, divisors).astype(np.float32)


def rope_base(config: Config) -> Iterable[Pair]:
    """Yield the base frequency, and that of the layers with a sliding window if it differs."""
    yield "rope.freq_base", float(config.rope.theta)
    if config.local_rope is not None:
        yield "rope.freq_base_swa", float(config.local_rope.theta)


# -- keys -------------------------------------------------------------------------------------------------------------


def head_sizes(config: Config) -> Iterable[Pair]:
    """Yield the size of a head."""
    yield "attention.key_length", config.head_dim
    yield "attention.value_length", config.head_dim


def given_head_sizes(config: Config) -> Iterable[Pair]:
    """Return the keys for the size of a head if config.json states it."""
    return () if config.get("head_dim") is None else head_sizes(config)


CONTEXT = Key("context_length", "u32", ("max_position_embeddings",))
EMBEDDING = Key("embedding_length", "u32", ("hidden_size",))
BLOCKS = Key("block_count", "u32", ("num_hidden_layers",))
FEED_FORWARD = Key("feed_forward_length", "u32", ("intermediate_size",))
HEADS = Key("attention.head_count", "u32", ("num_attention_heads",))
KV_HEADS = Key("attention.head_count_kv", "u32", ("num_key_value_heads", "num_attention_heads"))
NORM_EPS = Key("attention.layer_norm_rms_epsilon", "f32", ("rms_norm_eps",))
ROPE = (Computed(rope_scaling), Computed(rope_base))
HEAD_SIZES, GIVEN_HEAD_SIZES = Computed(head_sizes), Computed(given_head_sizes)
NO_HEAD_SIZES = Computed(lambda config: ())
LLAMA_KEYS = (  # that Llama and its relatives write besides the general ones
    Key("vocab_size", "u32", ("vocab_size",)),
    Computed(lambda config: [("rope.dimension_count", config.head_dim)]),
)


def general(heads: Computed = GIVEN_HEAD_SIZES) -> tuple[Key | Computed, ...]:
    """Return the keys that most architectures write, in the order of llama.cpp's converter."""
    shape = (BLOCKS, CONTEXT, EMBEDDING, FEED_FORWARD, HEADS, KV_HEADS)
    return (*shape, *ROPE, NORM_EPS, heads, FILE_TYPE)


# -- tensors ----------------------------------------------------------------------------------------------------------

LAYER = "model.layers.{}."


def ends(norm: Make | None = None) -> tuple[Rule, ...]:
    """Return the tensors before and after the layers."""
    return (
        Rule("model.embed_tokens.weight", ("vocab", "hidden")),
        Rule("model.norm.weight", ("hidden",), transform=norm),
        Rule("lm_head.weight", ("vocab", "hidden"), own_head),
    )


def norms(*names: str, size: str = "hidden", change: Make | None = None) -> tuple[Rule, ...]:
    """Return the norms of a layer."""
    return tuple(Rule(f"{LAYER}{name}.weight", (size,), transform=change) for name in names)


def attention(paired: bool = False, bias: When = never, out_bias: When = never) -> tuple[Rule, ...]:
    """Return the projections of attention. paired: reorder queries and keys for llama.cpp's RoPE; see `pair_up`."""
    queries, keys = (turn_queries, turn_keys) if paired else (None, None)
    return (
        Rule(LAYER + "self_attn.q_proj.weight", ("q", "hidden"), transform=queries),
        Rule(LAYER + "self_attn.k_proj.weight", ("kv", "hidden"), transform=keys),
        Rule(LAYER + "self_attn.v_proj.weight", ("kv", "hidden")),
        Rule(LAYER + "self_attn.o_proj.weight", ("hidden", "q")),
        Rule(LAYER + "self_attn.q_proj.bias", ("q",), bias, queries),
        Rule(LAYER + "self_attn.k_proj.bias", ("kv",), bias, keys),
        Rule(LAYER + "self_attn.v_proj.bias", ("kv",), bias),
        Rule(LAYER + "self_attn.o_proj.bias", ("hidden",), out_bias),
    )


def feed_forward(bias: When = never) -> tuple[Rule, ...]:
    """Return the gated feed-forward part."""
    return (
        Rule(LAYER + "mlp.gate_proj.weight", ("ff", "hidden")),
        Rule(LAYER + "mlp.up_proj.weight", ("ff", "hidden")),
        Rule(LAYER + "mlp.down_proj.weight", ("hidden", "ff")),
        Rule(LAYER + "mlp.gate_proj.bias", ("ff",), bias),
        Rule(LAYER + "mlp.up_proj.bias", ("ff",), bias),
        Rule(LAYER + "mlp.down_proj.bias", ("hidden",), bias),
    )


BEFORE = norms("input_layernorm", "post_attention_layernorm")  # one norm before attention, one before feed-forward
