"""Phi-3 and Phi-4: one tensor for queries, keys and values, and one for gate and up; GGUF keeps them whole."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from metaalign_edge_runtime.errors import LoadError, counted

from .architectures import (
    FILE_TYPE,
    SILU,
    Architecture,
    Computed,
    Key,
    Pair,
    Rule,
    refuse_other_head_size,
    refuse_rope,
    register,
)
from .blocks import BEFORE, BLOCKS, CONTEXT, EMBEDDING, FEED_FORWARD, HEADS, KV_HEADS, LAYER, NORM_EPS, ends, sizes
from .config import Config
from .shards import Array
from .vocabulary import VocabularyRules

TRAINED = Key("rope.scaling.original_context_length", "u32", ("original_max_position_embeddings",))


def fused_sizes(config: Config) -> dict[str, int]:
    """Return the usual sizes, and those of the two fused tensors."""
    found = sizes(config)
    return found | {"qkv": found["q"] + 2 * found["kv"], "gate_up": 2 * found["ff"]}


def turned(config: Config) -> int:
    """Return how many numbers of each head RoPE rotates."""
    return int(config.rope.share * config.integer("hidden_size")) // config.integer("num_attention_heads")


def attention_factor(config: Config) -> Iterable[Pair]:
    """Yield the factor of LongRoPE that scales attention in an extended context (Ding et al. 2024)."""
    if config.rope.kind != "longrope":
        return
    trained = config.integer("original_max_position_embeddings")
    scale = config.integer("max_position_embeddings") / trained
    factor = math.sqrt(1 + math.log(scale) / math.log(trained)) if scale > 1 else 1.0
    yield "rope.scaling.attn_factor", factor


def rope_factors(config: Config) -> Iterable[tuple[str, Array]]:
    """Yield the two tensors of frequency divisors, for long contexts and for short ones."""
    if config.rope.kind != "longrope":
        return
    for kind in ("long", "short"):
        yield f"rope_factors_{kind}.weight", np.array(config.rope.lists[f"{kind}_factor"], np.float32)


def refuse_other_factors(config: Config) -> None:
    """Refuse lists of divisors without exactly one for each pair of numbers that RoPE rotates."""
    for name, factors in config.rope.lists.items():
        if len(factors) != turned(config) // 2:
            raise LoadError(f"config.json: {counted(len(factors), 'number')} in {name}, not {turned(config) // 2}")


def window(config: Config) -> Iterable[Pair]:
    """Yield the sliding window; 0 stands for none, and tells llama.cpp that the model is a Phi-4."""
    yield "attention.sliding_window", config.integer("sliding_window") if config.get("sliding_window") else 0


def mention_window(config: Config) -> str | None:
    """Return a remark if the model was trained with a sliding window, which llama.cpp ignores."""
    found = config.get("sliding_window")
    if found and config.integer("sliding_window") < config.integer("max_position_embeddings"):
        return f"llama.cpp attends to everything, not to the last {found} tokens only: beyond them answers may differ"
    return None


PHI3 = register(
    Architecture(
        name="phi3",
        classes={
            "Phi3ForCausalLM": {
                "rms_norm_eps": 1e-5,
                "max_position_embeddings": 4096,
                "original_max_position_embeddings": 4096,
                "hidden_act": "silu",
                "rope_theta": 10000.0,
            }
        },
        first=Computed(attention_factor),
        keys=(
            CONTEXT,
            TRAINED,
            *(EMBEDDING, FEED_FORWARD, BLOCKS, HEADS, KV_HEADS, NORM_EPS),
            Computed(lambda config: [("rope.dimension_count", turned(config))]),
            Computed(lambda config: [("rope.freq_base", float(config.rope.theta))]),
            FILE_TYPE,
            Computed(window),
        ),
        tensors=(
            *ends(),
            *BEFORE,
            Rule(LAYER + "self_attn.qkv_proj.weight", ("qkv", "hidden")),
            Rule(LAYER + "self_attn.o_proj.weight", ("hidden", "q")),
            Rule(LAYER + "mlp.gate_up_proj.weight", ("gate_up", "hidden")),
            Rule(LAYER + "mlp.down_proj.weight", ("hidden", "ff")),
        ),
        sizes=fused_sizes,
        guards=(
            SILU,
            refuse_other_head_size,
            refuse_rope("default", "longrope", share=True),
            refuse_other_factors,
            mention_window,
        ),
        extra=rope_factors,
        vocabulary=VocabularyRules(by_looks=False),
    )
)
