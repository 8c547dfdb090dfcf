"""Granite 3: Llama with four scale factors, for attention, embedding, residuals and logits."""

from __future__ import annotations

from .architectures import SILU, Architecture, Key, refuse_other_head_size, refuse_rope, register
from .blocks import (
    BEFORE,
    LLAMA_KEYS,
    NO_HEAD_SIZES,
    attention,
    attention_bias,
    ends,
    feed_forward,
    general,
    mlp_bias,
    rope_frequencies,
    sizes,
)
from .llama import RULES

GRANITE = register(
    Architecture(
        name="granite",
        classes={
            "GraniteForCausalLM": {
                "rms_norm_eps": 1e-6,
                "max_position_embeddings": 2048,
                "hidden_act": "silu",
                "rope_theta": 10000.0,
                "attention_multiplier": 1.0,
                "embedding_multiplier": 1.0,
                "residual_multiplier": 1.0,
                "logits_scaling": 1.0,
            }
        },
        keys=(
            *general(NO_HEAD_SIZES),
            *LLAMA_KEYS,
            Key("attention.scale", "f32", ("attention_multiplier",)),
            Key("embedding_scale", "f32", ("embedding_multiplier",)),
            Key("residual_scale", "f32", ("residual_multiplier",)),
            Key("logit_scale", "f32", ("logits_scaling",)),
        ),
        tensors=(*ends(), *BEFORE, *attention(True, attention_bias, attention_bias), *feed_forward(mlp_bias)),
        sizes=sizes,
        guards=(SILU, refuse_other_head_size, refuse_rope("default", "linear", "yarn", "llama3")),
        extra=rope_frequencies,
        vocabulary=RULES,
    )
)
