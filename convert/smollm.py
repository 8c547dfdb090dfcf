"""SmolLM3: Llama without RoPE in every fourth layer."""

from __future__ import annotations

from metaalign_edge_runtime.errors import LoadError

from .architectures import SILU, Architecture, refuse_rope, refuse_set, register
from .blocks import BEFORE, LLAMA_KEYS, attention, ends, feed_forward, general, sizes
from .config import Config
from .llama import RULES

PERIOD = 4  # fixed in llama.cpp


def refuse_other_rope_layers(config: Config) -> None:
    """Refuse a model that leaves out RoPE in other layers than every fourth."""
    count = config.integer("num_hidden_layers", high=1024)
    wanted = [int((number + 1) % PERIOD != 0) for number in range(count)]
    found = config.get("no_rope_layers")
    every = config.get("no_rope_layer_interval")
    if found != wanted if found is not None else every not in (None, PERIOD):
        raise LoadError(
            f"config.json: no_rope_layers is not every {PERIOD}th layer, which is what llama.cpp has built in"
        )


SMOLLM3 = register(
    Architecture(
        name="smollm3",
        classes={
            "SmolLM3ForCausalLM": {
                "rms_norm_eps": 1e-6,
                "max_position_embeddings": 32768,
                "hidden_act": "silu",
                "rope_theta": 2000000.0,
                "num_key_value_heads": 4,
                "tie_word_embeddings": True,
            }
        },
        keys=(*general(), *LLAMA_KEYS),
        tensors=(*ends(), *BEFORE, *attention(paired=True), *feed_forward()),
        sizes=sizes,
        guards=(
            SILU,
            refuse_set("attention_bias", "mlp_bias", "use_sliding_window"),
            refuse_other_rope_layers,
            refuse_rope("default", "linear", "yarn"),
        ),
        vocabulary=RULES,
    )
)
