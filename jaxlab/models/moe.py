"""Mixture of experts: each token passes through its best k routed experts, and through the shared ones.

No token is dropped: tokens are sorted by expert and multiplied by groups of rows (`jax.lax.ragged_dot`), so
that the work is that of k experts a token, whatever the load. Sums are gathers, never scatters: the same bits
each time.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxlab.models.config import ModelConfig, MoEConfig
from jaxlab.models.initializer import Initializer
from jaxlab.models.layers import ACTIVATIONS, MLP


class MixtureOfExperts(nnx.Module):
    """Routed experts, gated MLPs D -> F -> D, and the shared ones as one MLP."""

    def __init__(self, config: ModelConfig, residual_scale: float, init: Initializer):
        c, m, std = config, config.moe, config.initializer_range
        if m is None:
            raise ValueError("a model without experts")
        self.moe, self.activation = m, c.activation
        inward, outward = ("experts", "embed", "mlp"), ("experts", "mlp", "embed")
        self.router = init.normal((c.width, m.num_experts), ("embed", "experts"), std)
        self.gate = init.normal((m.num_experts, c.width, m.width), inward, std)
        self.up = init.normal((m.num_experts, c.width, m.width), inward, std)
        self.down = init.normal((m.num_experts, m.width, c.width), outward, std * residual_scale)
        self.shared = MLP(c, m.shared_width, residual_scale, init) if m.shared_width else None
        self.shared_gate = init.normal((c.width,), ("embed",), std) if m.shared_gate else None

    def __call__(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], Float[Array, ""]]:
        """The experts' output, and the load-balancing loss of this layer (1 where the load is even)."""
        m, flat = self.moe, x.reshape(-1, x.shape[-1])
        weights, chosen, balance = route(self.router[...], flat, m)
        # Rows by expert: row r of the sorted ones is token order[r] // k.
        order = jnp.argsort(chosen.reshape(-1), stable=True)
        sizes = jnp.bincount(chosen.reshape(-1), length=m.num_experts).astype(jnp.int32)
        rows = flat[order // m.experts_per_token]
        by_expert = lambda y, kernel: jax.lax.ragged_dot(y, kernel.astype(y.dtype), sizes)
        hidden = ACTIVATIONS[self.activation](by_expert(rows, self.gate)) * by_expert(rows, self.up)
        out = by_expert(hidden, self.down)[jnp.argsort(order)].reshape(*chosen.shape, -1)
        y = jnp.einsum("nkd,nk->nd", out, weights.astype(out.dtype))
        if m.scale != 1.0:
            y = y * jnp.asarray(m.scale, y.dtype)
        if self.shared is not None:
            shared = self.shared(flat)
            if self.shared_gate is not None:
                gate = jnp.einsum("nd,d->n", flat, self.shared_gate.astype(flat.dtype))
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
