"""Whole layers of attention with their projections, to be timed."""

from typing import Any

import jax
import jax.numpy as jnp
from nsa_parts.subjects import cudnn, kept_scores
from nsa_parts.timing import Subject

from jaxlab.models import (
    AttentionContext,
    Block,
    ModelConfig,
    NSAConfig,
    bind,
    init_params,
    rope_tables,
)
from kernels_pallas.nsa.specs.arg_specs import ArgSpec

WIDTH = 2560
"""Of the paper's model: the input of a layer."""


def layers(spec: ArgSpec, implementation: str) -> tuple[list[Subject], dict[str, Any]]:
    """One attention layer with its projections: NSA's (three pairs of keys and values, compression MLPs,
    gates) and one with full attention by cuDNN (elsewhere by what keeps all scores), and their inputs."""
    shared: dict[str, Any] = {
        "vocab_size": 8,
        "width": WIDTH,
        "num_layers": 1,
        "num_heads": spec.heads,
        "num_kv_heads": spec.kv_heads,
        "head_dim": spec.key_dim,
        "value_head_dim": spec.value_dim,
        "mlp_width": 8,
        "compute_dtype": spec.dtype,
    }
    sparse = ModelConfig(**shared, attention=NSAConfig(**spec.sizes, implementation=implementation))
    full = ModelConfig(**shared)
    positions = jnp.broadcast_to(jnp.arange(spec.length, dtype=jnp.int32)[None], (spec.batch, spec.length))
    dense = cudnn if jax.default_backend() == "gpu" else kept_scores

    def nsa_layer(x, params):
        context = AttentionContext(positions, rotary=rope_tables(positions, sparse)[0])
        return bind(params, Block, sparse).attention(x, context, kind="nsa").out, None

    def full_layer(x, params):
        attention, rotary = bind(params, Block, full).attention, rope_tables(positions, full)[0]
        q, k, v = attention.project(x)
        out = dense(attention.with_rope(q, rotary), attention.with_rope(k, rotary), v)
        return attention.project_output(out), None

    make = lambda config: jax.tree.map(lambda p: p[0], init_params(config, jax.random.key(0))["layers"])
    shape, dtype = (spec.batch, spec.length, WIDTH), jnp.dtype(spec.dtype)
    x, d_out = (jax.random.normal(jax.random.key(i), shape, dtype) for i in (1, 2))
    data = {
        "x": x,
        "d_out": d_out,
        "sparse": jax.jit(make, static_argnums=0)(sparse),
        "full": jax.jit(make, static_argnums=0)(full),
    }
    return [
        Subject(f"layer, nsa [{implementation}]", nsa_layer, ("x", "sparse")),
        Subject("layer, full attention", full_layer, ("x", "full")),
    ], data
