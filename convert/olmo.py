"""OLMo 2: norms after attention and feed-forward, and over all queries and all keys at once."""

from __future__ import annotations

from .architectures import SILU, Architecture, refuse_other_head_size, refuse_rope, refuse_set, refuse_tied, register
from .blocks import attention, ends, feed_forward, general, norms, sizes

DEFAULTS = {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "hidden_act": "silu", "rope_theta": 10000.0}
AFTER = (
    *norms("post_attention_layernorm", "post_feedforward_layernorm"),
    *norms("self_attn.q_norm", size="q"),
    *norms("self_attn.k_norm", size="kv"),
)

OLMO2 = register(
    Architecture(
        name="olmo2",
        classes={"Olmo2ForCausalLM": DEFAULTS},
        keys=general(),
        tensors=(*ends(), *AFTER, *attention(), *feed_forward()),
        sizes=sizes,
        guards=(
            SILU,
            refuse_set("attention_bias"),
            refuse_other_head_size,
            refuse_tied,
            refuse_rope("default", "linear", "yarn"),
        ),
    )
)
