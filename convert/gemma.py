"""Gemma 1, 2 and 3, whose norms multiply by `1 + weight`.

Much of them is fixed in llama.cpp: the base frequency, the order of the layers, the scale of the scores. A config.json
that differs from it is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from metaalign_edge_runtime.errors import LoadError

from .architectures import (
    FILE_TYPE,
    Architecture,
    Computed,
    Guard,
    Key,
    Pair,
    refuse_activation,
    refuse_layers,
    refuse_rope,
    refuse_set,
    refuse_theta,
    refuse_untied,
    register,
)
from .blocks import (
    BLOCKS,
    CONTEXT,
    EMBEDDING,
    FEED_FORWARD,
    HEAD_SIZES,
    HEADS,
    KV_HEADS,
    NORM_EPS,
    add_one,
    attention,
    ends,
    feed_forward,
    general,
    norms,
    sizes,
)
from .config import Config
from .vocabulary import VocabularyRules

DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 8192,
    "head_dim": 256,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
RULES = VocabularyRules(space_prefix="never")
GELU = "gelu_pytorch_tanh"
PLAIN = (CONTEXT, EMBEDDING, BLOCKS, FEED_FORWARD, HEADS, KV_HEADS, NORM_EPS, HEAD_SIZES, FILE_TYPE)
AROUND = norms(  # a norm before and after attention, and before and after feed-forward
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    change=add_one,
)


def refuse_scale(layers_of_27b: int) -> Guard:
    """Refuse scores that are not scaled by the size of a head or, in the 27B model, by hidden size / heads.

    layers_of_27b: the number of layers by which llama.cpp knows that model.
    """

    def guard(config: Config) -> None:
        found = config.number("query_pre_attn_scalar")
        heads, hidden = config.integer("num_attention_heads"), config.integer("hidden_size")
        large = config.integer("num_hidden_layers", high=1024) == layers_of_27b
        wanted = hidden // heads if large else config.head_dim
        if found != wanted:
            raise LoadError(
                f"config.json: query_pre_attn_scalar is {found}, but llama.cpp scales by {wanted} in this model"
            )

    return guard


def refuse_exact_gelu(config: Config) -> None:
    """Refuse any other activation; old files say "gelu" but mean the tanh version, too."""
    found = config.get("hidden_activation") or config.get("hidden_act") or GELU
    if found not in (GELU, "gelu"):
        raise LoadError(f"config.json: the activation {found!r}, but llama.cpp computes {GELU} for this architecture")


def softcap(config: Config) -> Iterable[Pair]:
    """Write where the last scores level off, if they do."""
    if config.get("final_logit_softcapping") is not None:
        yield "final_logit_softcapping", float(config.number("final_logit_softcapping"))


GEMMA = register(
    Architecture(
        name="gemma",
        classes={"GemmaForCausalLM": DEFAULTS},
        keys=PLAIN,
        tensors=(
            *ends(add_one),
            *norms("input_layernorm", "post_attention_layernorm", change=add_one),
            *attention(),
            *feed_forward(),
        ),
        sizes=sizes,
        guards=(
            refuse_exact_gelu,
            refuse_set("attention_bias"),
            refuse_untied,
            refuse_rope("default"),
            refuse_theta(10000),
        ),
        vocabulary=replace(RULES, eot=107),
    )
)

GEMMA2 = register(
    Architecture(
        name="gemma2",
        classes={
            "Gemma2ForCausalLM": DEFAULTS
            | {
                "num_key_value_heads": 4,
                "hidden_activation": GELU,
                "query_pre_attn_scalar": 256,
                "sliding_window": 4096,
                "attn_logit_softcapping": 50.0,
                "final_logit_softcapping": 30.0,
            }
        },
        keys=(
            *PLAIN,
            Key("attn_logit_softcapping", "f32", ("attn_logit_softcapping",)),
            Key("final_logit_softcapping", "f32", ("final_logit_softcapping",)),
            Key("attention.sliding_window", "u32", ("sliding_window",)),
        ),
        tensors=(*ends(add_one), *AROUND, *attention(), *feed_forward()),
        sizes=sizes,
        guards=(
            refuse_activation(GELU, key="hidden_activation"),
            refuse_set("attention_bias"),
            refuse_untied,
            refuse_scale(46),
            refuse_layers(2),
            refuse_rope("default"),
            refuse_theta(10000),
        ),
        vocabulary=RULES,
    )
)

GEMMA3 = register(
    Architecture(
        name="gemma3",
        classes={
            name: DEFAULTS
            | {
                "max_position_embeddings": 131072,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "hidden_activation": GELU,
                "query_pre_attn_scalar": 256,
                "sliding_window": 4096,
                "rope_theta": 1000000.0,
                "rope_local_base_freq": 10000.0,
            }
            for name in ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration")
        },
        keys=(
            *general(HEAD_SIZES),
            Computed(softcap),
            Key("attention.sliding_window", "u32", ("sliding_window",)),
        ),
        tensors=(
            *ends(add_one),
            *AROUND,
            *attention(),
            *norms("self_attn.q_norm", "self_attn.k_norm", size="head", change=add_one),
            *feed_forward(),
        ),
        sizes=sizes,
        guards=(
            refuse_activation(GELU, key="hidden_activation"),
            refuse_set("attention_bias", "attn_logit_softcapping", "use_bidirectional_attention"),
            refuse_scale(62),
            refuse_layers(6),
            refuse_rope("default", "linear", layered=True),
        ),
        vocabulary=replace(RULES, beyond=frozenset({"<image_soft_token>"})),
    )
)
