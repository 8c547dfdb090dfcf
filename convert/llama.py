"""Llama; Mistral, the same model with other defaults; and InternLM3, the same with other names for its biases."""

from __future__ import annotations

from .architectures import SILU, Architecture, refuse_rope, refuse_window, register
from .blocks import (
    BEFORE,
    HEAD_SIZES,
    LLAMA_KEYS,
    attention,
    attention_bias,
    ends,
    feed_forward,
    general,
    mlp_bias,
    rope_frequencies,
    sizes,
    switch,
)
from .vocabulary import VocabularyRules

# 32,016 rows: Code Llama with infilling. 49,152 rows: Granite and SmolLM. llama.cpp's converter tells them so, too.
RULES = VocabularyRules(space_prefix="settings first", eot_by_rows={32016: 32010}, no_bos_rows=frozenset({49152}))
DEFAULTS = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "hidden_act": "silu", "rope_theta": 10000.0}

LLAMA = register(
    Architecture(
        name="llama",
        classes={
            "LlamaForCausalLM": DEFAULTS,
            "MistralForCausalLM": DEFAULTS
            | {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
        },
        keys=(*general(HEAD_SIZES), *LLAMA_KEYS),
        tensors=(*ends(), *BEFORE, *attention(True, attention_bias, attention_bias), *feed_forward(mlp_bias)),
        sizes=sizes,
        guards=(SILU, refuse_window, refuse_rope("default", "linear", "yarn", "llama3")),
        extra=rope_frequencies,
        vocabulary=RULES,
    )
)

INTERNLM3 = register(
    Architecture(
        name="llama",
        classes={"InternLM3ForCausalLM": DEFAULTS | {"max_position_embeddings": 32768}},
        keys=(*general(), *LLAMA_KEYS),
        tensors=(*ends(), *BEFORE, *attention(True, switch("qkv_bias"), switch("bias")), *feed_forward(switch("bias"))),
        sizes=sizes,
        guards=(SILU, refuse_rope("default", "linear", "dynamic")),
        vocabulary=VocabularyRules(space_prefix="settings", end="<|im_end|>"),
    )
)
