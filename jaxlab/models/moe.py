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
        bias = lambda there, *shape: init.zeros(shape, ("experts", "mlp")[: len(shape)]) if there else None
        self.router_bias = bias(m.router_bias, m.num_experts)
        self.choice_bias = bias(m.choice_bias, m.num_experts)
        self.gate_bias = bias(m.bias, m.num_experts, m.width)
        self.up_bias = bias(m.bias, m.num_experts, m.width)
        self.down_bias = init.zeros((m.num_experts, c.width), ("experts", "embed")) if m.bias else None
        self.shared = MLP(c, m.shared_width, residual_scale, init) if m.shared_width else None
        self.shared_gate = init.normal((c.width,), ("embed",), std) if m.shared_gate else None

    def __call__(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D"], Float[Array, ""]]:
        """The experts' output, and the load-balancing loss of this layer (1 where the load is even)."""
        m, flat = self.moe, x.reshape(-1, x.shape[-1])
        weights, chosen, balance = route(
            self.router[...], flat, m, _value(self.router_bias), _value(self.choice_bias)
        )
        # Rows by expert: row r of the sorted ones is token order[r] // k.
        order = jnp.argsort(chosen.reshape(-1), stable=True)
        sizes = jnp.bincount(chosen.reshape(-1), length=m.num_experts).astype(jnp.int32)
        rows = flat[order // m.experts_per_token]

        def by_expert(y: Array, kernel: nnx.Param, bias: nnx.Param | None) -> Array:
            z = jax.lax.ragged_dot(y, kernel.astype(y.dtype), sizes)
            return z if bias is None else z + bias.astype(y.dtype)[chosen.reshape(-1)[order]]

        gate, up = by_expert(rows, self.gate, self.gate_bias), by_expert(rows, self.up, self.up_bias)
        hidden = self._gated(gate, up)
        out = by_expert(hidden, self.down, self.down_bias)[jnp.argsort(order)].reshape(*chosen.shape, -1)
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

    def _gated(self, gate: Float[Array, "N F"], up: Float[Array, "N F"]) -> Float[Array, "N F"]:
        """Neurons of the routed experts."""
        limit = self.moe.swiglu_limit
        if limit is None:
            return ACTIVATIONS[self.activation](gate) * up
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        return gate * jax.nn.sigmoid(self.moe.swiglu_alpha * gate) * (up + 1)


def _value(param: nnx.Param | None) -> Array | None:
    return None if param is None else param[...]


def route(
    router: Float[Array, "D E"],
    x: Float[Array, "N D"],
    moe: MoEConfig,
    bias: Float[Array, " E"] | None = None,
    choice_bias: Float[Array, " E"] | None = None,
) -> tuple[Float[Array, "N k"], Int[Array, "N k"], Float[Array, ""]]:
    """Weights and numbers of the chosen experts (on ties the lower ones), and the load-balancing loss.

    `bias` is on the logits, `choice_bias` on the weights by which experts are chosen, not on those that they
    get.

    The loss is E times the sum over experts of (share of choices) * (mean probability): Switch Transformer,
    arXiv 2101.03961, eq. 4, with the k choices of a token counted alike.
    """
    if moe.router_dtype == "float32":
        x = x.astype(jnp.float32)
    logits = x @ router.astype(x.dtype)
    if bias is not None:
        logits = logits + bias.astype(x.dtype)[None]
    logits = logits.astype(jnp.float32)
    scores = jax.nn.softmax(logits, axis=-1) if moe.scoring == "softmax" else jax.nn.sigmoid(logits)
    if choice_bias is None and moe.num_groups == 1:
        weights, chosen = jax.lax.top_k(scores, moe.experts_per_token)
    else:
        rated = scores if choice_bias is None else scores + choice_bias.astype(jnp.float32)[None]
        _, chosen = jax.lax.top_k(_within_groups(rated, moe), moe.experts_per_token)
        weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if moe.normalize:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    load = jnp.bincount(chosen.reshape(-1), length=moe.num_experts).astype(jnp.float32) / chosen.size
    mean = jnp.mean(scores / jnp.sum(scores, axis=-1, keepdims=True), axis=0)
    return weights, chosen, moe.num_experts * jnp.sum(jax.lax.stop_gradient(load) * mean)


def _within_groups(rated: Float[Array, "N E"], moe: MoEConfig) -> Float[Array, "N E"]:
    """Ratings of the experts in each token's best groups; -inf for the others."""
    if moe.num_groups == 1:
        return rated
    groups = rated.reshape(rated.shape[0], moe.num_groups, -1)
    best = jnp.sum(jax.lax.top_k(groups, 1 if moe.group_score == "max" else 2)[0], axis=-1)
    _, chosen = jax.lax.top_k(best, moe.groups_per_token)
    open_groups = jnp.any(chosen[:, :, None] == jnp.arange(moe.num_groups)[None, None], axis=1)
    return jnp.where(open_groups[:, :, None], groups, -jnp.inf).reshape(rated.shape)
