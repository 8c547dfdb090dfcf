"""InternLM2: Llama with other names, and with the queries, keys and values of each group in one tensor."""

from __future__ import annotations

from collections.abc import Callable

from .architectures import (
    SILU,
    Architecture,
    Make,
    Part,
    Rule,
    Transform,
    refuse_other_head_size,
    refuse_rope,
    refuse_set,
    refuse_tied,
    register,
)
from .blocks import LAYER, general, kv_head_count, pair_up, sizes
from .config import Config
from .shards import Array
from .vocabulary import VocabularyRules


def fused_sizes(config: Config) -> dict[str, int]:
    """Return the usual sizes, and that of the tensor with queries, keys and values."""
    found = sizes(config)
    return found | {"qkv": found["q"] + 2 * found["kv"]}


def pick(place: Callable[[int], slice], paired: bool = True) -> Make:
    """Return a maker of transforms that pick heads out of every group: its queries, its key, then its value.

    place: takes the number of queries in a group, returns the heads to pick. paired: reorder rows; see `pair_up`.
    """

    def make(config: Config, rows: int) -> Transform:
        size, groups = config.head_dim, kv_head_count(config)
        queries = config.integer("num_attention_heads") // groups
        order = pair_up(1, size)

        def apply(chunk: Array) -> Array:
            grouped = chunk.reshape(-1, queries + 2, size, *chunk.shape[1:])
            picked = grouped[:, place(queries)].reshape(-1, *chunk.shape[1:])
            return order.apply(picked) if paired else picked

        return Transform((queries + 2) * size, apply)

    return make


QKV = (
    Part("blk.{}.attn_q.weight", "q", pick(lambda queries: slice(queries))),
    Part("blk.{}.attn_k.weight", "kv", pick(lambda queries: slice(queries, queries + 1))),
    Part("blk.{}.attn_v.weight", "kv", pick(lambda queries: slice(queries + 1, queries + 2), paired=False)),
)

INTERNLM2 = register(
    Architecture(
        name="internlm2",
        classes={
            "InternLM2ForCausalLM": {
                "rms_norm_eps": 1e-6,
                "max_position_embeddings": 2048,
                "hidden_act": "silu",
                "rope_theta": 10000.0,
            }
        },
        keys=general(),
        tensors=(
            Rule("model.tok_embeddings.weight", ("vocab", "hidden")),
            Rule(LAYER + "attention_norm.weight", ("hidden",)),
            Rule(LAYER + "attention.wqkv.weight", ("qkv", "hidden"), parts=QKV),
            Rule(LAYER + "attention.wo.weight", ("hidden", "q")),
            Rule(LAYER + "ffn_norm.weight", ("hidden",)),
            Rule(LAYER + "feed_forward.w1.weight", ("ff", "hidden")),
            Rule(LAYER + "feed_forward.w2.weight", ("hidden", "ff")),
            Rule(LAYER + "feed_forward.w3.weight", ("ff", "hidden")),
            Rule("model.norm.weight", ("hidden",)),
            Rule("output.weight", ("vocab", "hidden")),
        ),
        sizes=fused_sizes,
        guards=(
            SILU,
            refuse_set("bias"),
            refuse_other_head_size,
            refuse_tied,
            refuse_rope("default", "linear", "dynamic"),
        ),
        vocabulary=VocabularyRules(space_prefix="model", by_looks=False, unused="[UNUSED", end="<|im_end|>"),
    )
)
