"""StableLM 2: layer norms with biases, and RoPE for a quarter of each head."""

from __future__ import annotations

from .architectures import (
    FILE_TYPE,
    SILU,
    Architecture,
    Computed,
    Key,
    Rule,
    refuse_other_head_size,
    refuse_rope,
    refuse_set,
    refuse_theta,
    refuse_tied,
    register,
)
from .blocks import (
    BLOCKS,
    CONTEXT,
    EMBEDDING,
    FEED_FORWARD,
    HEADS,
    KV_HEADS,
    LAYER,
    attention,
    ends,
    feed_forward,
    norms,
    sizes,
    switch,
)
from .config import Config


def turned(config: Config) -> int:
    """Return how many numbers of each head RoPE rotates."""
    return int(config.rope.share * (config.integer("hidden_size") // config.integer("num_attention_heads")))


def sequential(config: Config) -> bool:
    """Say whether feed-forward follows attention, with a norm between; otherwise both read the same input."""
    return not config.flag("use_parallel_residual")


STABLELM = register(
    Architecture(
        name="stablelm",
        classes={
            "StableLmForCausalLM": {
                "layer_norm_eps": 1e-5,
                "max_position_embeddings": 4096,
                "hidden_act": "silu",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.25,
                "num_key_value_heads": 32,
                "use_parallel_residual": False,
            }
        },
        keys=(
            *(CONTEXT, EMBEDDING, BLOCKS, FEED_FORWARD),
            Computed(lambda config: [("rope.dimension_count", turned(config))]),
            *(HEADS, KV_HEADS),
            Computed(lambda config: [("use_parallel_residual", config.flag("use_parallel_residual"))]),
            Key("attention.layer_norm_epsilon", "f32", ("layer_norm_eps",)),
            FILE_TYPE,
        ),
        tensors=(
            *ends(),
            Rule("model.norm.bias", ("hidden",)),
            *norms("input_layernorm"),
            Rule(LAYER + "input_layernorm.bias", ("hidden",)),
            Rule(LAYER + "post_attention_layernorm.weight", ("hidden",), sequential),
            Rule(LAYER + "post_attention_layernorm.bias", ("hidden",), sequential),
            *attention(bias=switch("use_qkv_bias")),
            *feed_forward(),
        ),
        sizes=sizes,
        guards=(
            SILU,
            refuse_set("qk_layernorm"),
            refuse_other_head_size,
            refuse_tied,
            refuse_rope("default", share=True),
            refuse_theta(10000),
        ),
    )
)
