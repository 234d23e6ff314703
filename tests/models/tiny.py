"""Small models and batches whose numbers are drawn, so that no bias is zero and no scale is one."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.models import (
    LearnedPositions,
    ModelConfig,
    NSAConfig,
    PlainVisionConfig,
    RopeConfig,
    SlidingAttentionConfig,
    abstract_params,
    forward,
    init_params,
)

run_model = jax.jit(forward, static_argnames="config")
"""One program; called as it is, `forward` compiles one for each of its operations."""
make_params = jax.jit(init_params, static_argnums=0)

NSA = NSAConfig(
    block_len=4, stride=2, block_size=4, num_blocks=3, num_init=1, num_local=1, window=3, compress_width=4
)
VISION = PlainVisionConfig(
    num_layers=1, image_size=4, patch_size=2, channels=2, width=8, num_heads=2, mlp_width=6, image_token=3
)
VARIANTS: dict[str, dict[str, Any]] = {
    "rotary": {},
    "other": {
        "position": LearnedPositions(),
        "norm": "layer",
        "mlp": "plain",
        "activation": "gelu",
        "attention_bias": True,
        "mlp_bias": True,
        "tie_embeddings": False,
        "num_kv_heads": None,
        "head_dim": None,
        "value_head_dim": None,
    },
    "sliding": {"attention": SlidingAttentionConfig(window=3), "mlp_bias": True, "activation": "relu"},
    "post_norms": {"pre_norms": False, "post_norms": True, "qk_norm": "width"},
    "parallel": {
        "parallel": True,
        "parallel_norms": True,
        "norm": "layer",
        "position": RopeConfig(dim=2),
        "qk_norm": "each_head",
    },
    "nope": {"position": RopeConfig(layers=(False, True))},
    "nsa_nope": {"position": RopeConfig(layers=(False, True)), "attention": NSA, "attention_bias": True},
    "nsa": {"attention": NSA, "attention_bias": True},
    "nsa_min_max": {
        "attention_bias": True,
        "attention": replace(NSA, selector="min_max", branches=("selection", "window")),
    },
    "nsa_auxiliary": {
        "attention_bias": True,
        "attention": replace(NSA, selector="auxiliary", selector_dim=3),
    },
    "nsa_indexer": {
        "attention_bias": True,
        "attention": replace(NSA, selector="indexer", selector_dim=5, selector_heads=3, num_init=0),
    },
    "nsa_dot": {
        "attention_bias": True,
        "attention": replace(
            NSA,
            selector="indexer",
            selector_dim=2,
            selector_heads=1,
            selector_score="dot",
            num_init=0,
            compress_kind="mean",
            branches=("selection",),
            shared_kv=True,
            gated=False,
        ),
    },
    "nsa_shared": {
        "attention_bias": True,
        "attention": replace(NSA, shared_kv=True, branches=("compression", "window")),
    },
    "vision": {"vision": VISION},
}
"""Options by a name; together they visit every one of them."""


def make_config(variant: str = "rotary", **changes: Any) -> ModelConfig:
    base: dict[str, Any] = {
        "vocab_size": 13,
        "width": 12,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 4,
        "value_head_dim": 6,
        "mlp_width": 8,
        "max_length": 24,
    }
    return ModelConfig(**(base | VARIANTS[variant] | changes))


def draw_params(config: ModelConfig, seed: int = 0) -> dict[str, Any]:
    """Parameters of a size that makes attention and activations far from linear."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(centre + 0.4 * rng.standard_normal(leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(config))


def draw_tokens(config: ModelConfig, batch: int, length: int, seed: int = 0) -> jax.Array:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.integers(0, config.vocab_size, (batch, length)), jnp.int32)
