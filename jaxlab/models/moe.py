"""Mixture of experts: each token passes through its best k routed experts, and through the shared ones.

No token is dropped: tokens are sorted by expert and multiplied by groups of rows (`jax.lax.ragged_dot`), so
that the work is that of k experts a token, whatever the load. Sums are gathers, never scatters: the same bits
each time.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab.models.config import ModelConfig, MoEConfig
from jaxlab.models.layers import ACTIVATIONS, mlp


def experts(
    params: Mapping[str, Any], x: Float[Array, "B T D"], config: ModelConfig
) -> tuple[Float[Array, "B T D"], Float[Array, ""]]:
    """The experts' output, and the load-balancing loss of this layer (1 where the load is even)."""
    m, flat = config.moe, x.reshape(-1, x.shape[-1])
    weights, chosen, balance = route(params["router"], flat, m)
    # Rows by expert: row r of the sorted ones is token order[r] // k.
    order = jnp.argsort(chosen.reshape(-1), stable=True)
    sizes = jnp.bincount(chosen.reshape(-1), length=m.num_experts).astype(jnp.int32)
    rows = flat[order // m.experts_per_token]
    linear = lambda name, y: jax.lax.ragged_dot(y, params[name].astype(y.dtype), sizes)
    hidden = ACTIVATIONS[config.activation](linear("gate", rows)) * linear("up", rows)
    out = linear("down", hidden)[jnp.argsort(order)].reshape(*chosen.shape, -1)
    y = jnp.einsum("nkd,nk->nd", out, weights.astype(out.dtype))
    if m.scale != 1.0:
        y = y * jnp.asarray(m.scale, y.dtype)
    if m.shared_width:
        shared = mlp(params["shared"], flat, config)
        if m.shared_gate:
            gate = jnp.einsum("nd,d->n", flat, params["shared_gate"].astype(flat.dtype))
            shared = shared * jax.nn.sigmoid(gate)[:, None]
        y = y + shared
    return y.reshape(x.shape), balance


def route(
    router: Float[Array, "D E"], x: Float[Array, "N D"], moe: MoEConfig
) -> tuple[Float[Array, "N k"], Int[Array, "N k"], Float[Array, ""]]:
    """Weights and numbers of the chosen experts (on ties the lower ones), and the load-balancing loss.

    The loss is E times the sum over experts of (share of choices) * (mean probability): Switch Transformer,
    arXiv 2101.03961, eq. 4, with the k choices of a token counted alike.
    """
    logits = (x @ router.astype(x.dtype)).astype(jnp.float32)
    scores = jax.nn.softmax(logits, axis=-1) if moe.scoring == "softmax" else jax.nn.sigmoid(logits)
    weights, chosen = jax.lax.top_k(scores, moe.experts_per_token)
    if moe.normalize:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    load = jnp.bincount(chosen.reshape(-1), length=moe.num_experts).astype(jnp.float32) / chosen.size
    mean = jnp.mean(scores / jnp.sum(scores, axis=-1, keepdims=True), axis=0)
    return weights, chosen, moe.num_experts * jnp.sum(jax.lax.stop_gradient(load) * mean)
