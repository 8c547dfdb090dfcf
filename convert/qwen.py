"""Qwen 2 and 2.5, with biases for queries, keys and values; Qwen 3, with norms for queries and keys instead."""

from __future__ import annotations

from .architectures import SILU, Architecture, refuse_other_head_size, refuse_rope, refuse_set, refuse_window, register
from .blocks import BEFORE, HEAD_SIZES, always, attention, ends, feed_forward, general, norms, sizes

DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "use_sliding_window": False,
}
ROPE = refuse_rope("default", "linear", "yarn")

QWEN2 = register(
    Architecture(
        name="qwen2",
        classes={"Qwen2ForCausalLM": DEFAULTS},
        keys=general(),
        tensors=(*ends(), *BEFORE, *attention(bias=always), *feed_forward()),
        sizes=sizes,
        guards=(SILU, refuse_other_head_size, refuse_window, ROPE),
    )
)

QWEN3 = register(
    Architecture(
        name="qwen3",
        classes={"Qwen3ForCausalLM": DEFAULTS | {"head_dim": 128}},
        keys=general(HEAD_SIZES),
        tensors=(
            *ends(),
            *BEFORE,
            *attention(),
            *norms("self_attn.q_norm", "self_attn.k_norm", size="head"),
            *feed_forward(),
        ),
        sizes=sizes,
        guards=(SILU, refuse_set("attention_bias"), refuse_window, ROPE),
    )
)
