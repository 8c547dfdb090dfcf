"""OLMo 2 and 3: norms after attention and feed-forward, and norms over all queries and over all keys together."""

from __future__ import annotations

from dataclasses import replace

from .architectures import (
    SILU,
    Architecture,
    Computed,
    Key,
    refuse_layers,
    refuse_other_head_size,
    refuse_rope,
    refuse_set,
    refuse_tied,
    register,
    sliding,
)
from .blocks import attention, ends, feed_forward, general, norms, sizes

DEFAULTS = {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "hidden_act": "silu", "rope_theta": 10000.0}
AFTER = (
    *norms("post_attention_layernorm", "post_feedforward_layernorm"),
    *norms("self_attn.q_norm", size="q"),
    *norms("self_attn.k_norm", size="kv"),
)
GUARDS = (SILU, refuse_set("attention_bias"), refuse_other_head_size, refuse_tied)
PERIOD = 4  # in OLMo 3, every fourth layer has full attention

OLMO2 = register(
    Architecture(
        name="olmo2",
        classes={"Olmo2ForCausalLM": DEFAULTS},
        keys=general(),
        tensors=(*ends(), *AFTER, *attention(), *feed_forward()),
        sizes=sizes,
        guards=(*GUARDS, refuse_rope("default", "linear", "yarn")),
    )
)


OLMO3 = register(
    replace(
        OLMO2,
        classes={"Olmo3ForCausalLM": DEFAULTS | {"rope_theta": 500000.0, "sliding_window": 4096}},
        keys=(
            *general(),
            Key("attention.sliding_window", "u32", ("sliding_window",)),
            Computed(lambda config: [("attention.sliding_window_pattern", sliding(config, PERIOD))]),
        ),
        guards=(*GUARDS, refuse_layers(PERIOD), refuse_rope("default", "linear", "yarn", layered=True)),
    )
)
